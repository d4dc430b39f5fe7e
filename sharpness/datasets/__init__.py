"""Real data that come with the package."""

from sharpness.datasets.digits import digits

__all__ = ["digits"]
