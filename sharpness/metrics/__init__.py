"""What people call: one function per quantity."""

from sharpness.metrics.eigenvalues import top_eigenvalues
from sharpness.metrics.epsilon import epsilon_sharpness
from sharpness.metrics.layerwise import per_layer

__all__ = ["epsilon_sharpness", "per_layer", "top_eigenvalues"]
