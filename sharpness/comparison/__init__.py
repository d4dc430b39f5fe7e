"""Small batch against large batch: train, compare, walk from one minimum to the other."""

from sharpness.comparison.batch_sizes import compare_batch_sizes
from sharpness.comparison.compare import compare
from sharpness.comparison.interpolate import interpolate

__all__ = ["compare", "compare_batch_sizes", "interpolate"]
