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
from sharpness.comparison import compare, compare_batch_sizes, interpolate
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
    epsilon_sharpness,
    fisher_rao_norm,
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
    LayerwiseResult,
    PerturbationResult,
    Report,
    SampleInterval,
    ScalarResult,
    Spread,
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
    "LayerwiseResult",
    "MemoryWarning",
    "ModelError",
    "NonFiniteError",
    "Objective",
    "PerturbationResult",
    "PrecisionWarning",
    "Report",
    "SampleInterval",
    "ScalarResult",
    "SharpnessError",
    "SharpnessWarning",
    "Spread",
    "StateWarning",
    "__version__",
    "average_case_sharpness",
    "compare",
    "compare_batch_sizes",
    "datasets",
    "epsilon_sharpness",
    "errors",
    "fisher_rao_norm",
    "interpolate",
    "linalg",
    "low_pass_sharpness",
    "pac_bayes_sharpness",
    "per_layer",
    "plotting",
    "relative_flatness",
    "report",
    "results",
    "top_eigenvalues",
    "worst_case_sharpness",
]
