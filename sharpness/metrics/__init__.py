"""What people call: one function per quantity."""

from sharpness.metrics.average_case import average_case_sharpness
from sharpness.metrics.critical import critical_sharpness
from sharpness.metrics.density import spectral_density
from sharpness.metrics.diagonal import diagonal
from sharpness.metrics.eigenvalues import top_eigenvalues
from sharpness.metrics.epsilon import epsilon_sharpness
from sharpness.metrics.fisher_rao import fisher_rao_norm
from sharpness.metrics.frobenius import frobenius_norm
from sharpness.metrics.layerwise import per_layer
from sharpness.metrics.learning_rate import learning_rate_limit
from sharpness.metrics.low_pass import low_pass_sharpness
from sharpness.metrics.noise import gradient_noise_scale
from sharpness.metrics.pac_bayes import pac_bayes_sharpness
from sharpness.metrics.relative_flatness import relative_flatness
from sharpness.metrics.report import report
from sharpness.metrics.trace import trace
from sharpness.metrics.worst_case import worst_case_sharpness

__all__ = [
    "average_case_sharpness",
    "critical_sharpness",
    "diagonal",
    "epsilon_sharpness",
    "fisher_rao_norm",
    "frobenius_norm",
    "gradient_noise_scale",
    "learning_rate_limit",
    "low_pass_sharpness",
    "pac_bayes_sharpness",
    "per_layer",
    "relative_flatness",
    "report",
    "spectral_density",
    "top_eigenvalues",
    "trace",
    "worst_case_sharpness",
]
