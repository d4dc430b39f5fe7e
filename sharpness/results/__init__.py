"""The records that every function returns.

Each has four groups of fields under the same names everywhere: the value; the doubt (``residuals``,
``interval``, ``stderr``, ``converged``); the price (``num_matvecs`` or ``num_evaluations``,
``num_passes``, ``seconds``); the provenance (``settings``: what was resolved from the call).
"""

from sharpness._record import Record
from sharpness.results.comparison import Comparison, ComparisonRow, InterpolationResult, Spread
from sharpness.results.density import DensityResult
from sharpness.results.diagonal import DiagonalResult
from sharpness.results.eigen import EigenResult, SampleInterval
from sharpness.results.epsilon import EpsilonSharpnessResult
from sharpness.results.landscape import LandscapeResult
from sharpness.results.layerwise import LayerwiseResult
from sharpness.results.perturbation import PerturbationResult, ScalarResult
from sharpness.results.piggyback import PiggybackResult
from sharpness.results.report import Report
from sharpness.results.trace import TraceResult
from sharpness.results.training import LearningRateResult, NoiseResult
from sharpness.results.trajectory import TrajectoryComparison, TrajectoryResult

__all__ = [
    "Comparison",
    "ComparisonRow",
    "DensityResult",
    "DiagonalResult",
    "EigenResult",
    "EpsilonSharpnessResult",
    "InterpolationResult",
    "LandscapeResult",
    "LayerwiseResult",
    "LearningRateResult",
    "NoiseResult",
    "PerturbationResult",
    "PiggybackResult",
    "Record",
    "Report",
    "SampleInterval",
    "ScalarResult",
    "Spread",
    "TraceResult",
    "TrajectoryComparison",
    "TrajectoryResult",
]
