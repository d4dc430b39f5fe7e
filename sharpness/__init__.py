"""Measure how sharp or flat the minimum of a trained PyTorch model is.

Three doors lead into one corridor. The one-line function::

    sharpness.top_eigenvalues(model, loader, k=5)        metrics/eigenvalues.py
      -> Objective(model, loader)                        objective/   model, loss and data as one function
      -> HessianOperator(objective)                      operators/   a symmetric linear operator
      -> linalg.lanczos(operator, k=5)                   linalg/      vectors and products, no networks
      -> operator.matvec(v) -> objective.hvp(v)

an operator and an algorithm of your choice; and `linalg.lanczos` on any symmetric product. All run the same code.
"""

from sharpness import datasets, errors, linalg, plotting, results
from sharpness._version import __version__
from sharpness.comparison import (
    SharpnessTracker,
    compare,
    compare_batch_sizes,
    interpolate,
    landscape,
    piggyback,
    trajectory,
)
from sharpness.errors import (
    ArgumentError,
    ConvergenceError,
    ConvergenceWarning,
    DataError,
    DeterminismWarning,
    MemoryWarning,
    ModelError,
    NonFiniteError,
    PrecisionWarning,
    SharpnessError,
    SharpnessWarning,
    StateWarning,
)
from sharpness.metrics import (
    average_case_sharpness,
    critical_sharpness,
    epsilon_sharpness,
    fisher_rao_norm,
    gradient_noise_scale,
    learning_rate_limit,
    low_pass_sharpness,
    pac_bayes_sharpness,
    per_layer,
    relative_flatness,
    report,
    top_eigenvalues,
    worst_case_sharpness,
)
from sharpness.objective import Evaluation, Objective
from sharpness.operators import EmpiricalFisherOperator, FisherOperator, GGNOperator, HessianOperator
from sharpness.results import (
    Comparison,
    ComparisonRow,
    EigenResult,
    EpsilonSharpnessResult,
    InterpolationResult,
    LandscapeResult,
    LayerwiseResult,
    LearningRateResult,
    NoiseResult,
    PerturbationResult,
    PiggybackResult,
    Report,
    SampleInterval,
    ScalarResult,
    Spread,
    TrajectoryComparison,
    TrajectoryResult,
)

__all__ = [
    "ArgumentError",
    "Comparison",
    "ComparisonRow",
    "ConvergenceError",
    "ConvergenceWarning",
    "DataError",
    "DeterminismWarning",
    "EigenResult",
    "EmpiricalFisherOperator",
    "EpsilonSharpnessResult",
    "Evaluation",
    "FisherOperator",
    "GGNOperator",
    "HessianOperator",
    "InterpolationResult",
    "LandscapeResult",
    "LayerwiseResult",
    "LearningRateResult",
    "MemoryWarning",
    "ModelError",
    "NoiseResult",
    "NonFiniteError",
    "Objective",
    "PerturbationResult",
    "PiggybackResult",
    "PrecisionWarning",
    "Report",
    "SampleInterval",
    "ScalarResult",
    "SharpnessError",
    "SharpnessTracker",
    "SharpnessWarning",
    "Spread",
    "StateWarning",
    "TrajectoryComparison",
    "TrajectoryResult",
    "__version__",
    "average_case_sharpness",
    "compare",
    "compare_batch_sizes",
    "critical_sharpness",
    "datasets",
    "epsilon_sharpness",
    "errors",
    "fisher_rao_norm",
    "gradient_noise_scale",
    "interpolate",
    "landscape",
    "learning_rate_limit",
    "linalg",
    "low_pass_sharpness",
    "pac_bayes_sharpness",
    "per_layer",
    "piggyback",
    "plotting",
    "relative_flatness",
    "report",
    "results",
    "top_eigenvalues",
    "trajectory",
    "worst_case_sharpness",
]
