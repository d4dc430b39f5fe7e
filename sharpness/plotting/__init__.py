"""From results to matplotlib axes; sees results only, never computes, never calls ``plt.show``."""

from sharpness.plotting.figures import (
    plot_comparison,
    plot_eigenvalues,
    plot_epsilon_sharpness,
    plot_interpolation,
    plot_landscape,
    plot_layerwise,
    plot_learning_rate,
    plot_noise,
    plot_perturbation,
    plot_report,
    plot_scalar,
)
from sharpness.plotting.piggyback import plot_piggyback
from sharpness.plotting.spectrum import plot_density, plot_diagonal, plot_trace
from sharpness.plotting.sweep import plot_sweep
from sharpness.plotting.trajectory import plot_trajectories, plot_trajectory

__all__ = [
    "plot_comparison",
    "plot_density",
    "plot_diagonal",
    "plot_eigenvalues",
    "plot_epsilon_sharpness",
    "plot_interpolation",
    "plot_landscape",
    "plot_layerwise",
    "plot_learning_rate",
    "plot_noise",
    "plot_perturbation",
    "plot_piggyback",
    "plot_report",
    "plot_scalar",
    "plot_sweep",
    "plot_trace",
    "plot_trajectories",
    "plot_trajectory",
]
