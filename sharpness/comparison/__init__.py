"""Small batch against large batch: train, compare, walk from one minimum to the other, and look around."""

from sharpness.comparison.batch_sizes import compare_batch_sizes
from sharpness.comparison.compare import compare
from sharpness.comparison.interpolate import interpolate
from sharpness.comparison.landscape import landscape
from sharpness.comparison.piggyback import piggyback
from sharpness.comparison.tracker import SharpnessTracker
from sharpness.comparison.trajectory import trajectory

__all__ = ["SharpnessTracker", "compare", "compare_batch_sizes", "interpolate", "landscape", "piggyback", "trajectory"]
