"""From results to matplotlib axes; sees results only, never computes, never calls ``plt.show``."""

from sharpness.plotting.figures import (
    plot_comparison,
    plot_eigenvalues,
    plot_epsilon_sharpness,
    plot_interpolation,
    plot_layerwise,
    plot_perturbation,
    plot_report,
    plot_scalar,
)

__all__ = [
    "plot_comparison",
    "plot_eigenvalues",
    "plot_epsilon_sharpness",
    "plot_interpolation",
    "plot_layerwise",
    "plot_perturbation",
    "plot_report",
    "plot_scalar",
]
