"""What people call: one function per quantity."""

from sharpness.metrics.eigenvalues import top_eigenvalues
from sharpness.metrics.epsilon import epsilon_sharpness

__all__ = ["epsilon_sharpness", "top_eigenvalues"]
