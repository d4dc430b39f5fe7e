"""What the columns of a table mean, in words for a reader who has not seen this library."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable

_METRICS = {
    "top_eigenvalues": "Largest eigenvalue of the Hessian of the training loss: the curvature in the steepest "
    "direction. The doubt is a certified interval: it contains an eigenvalue for certain.",
    "epsilon_sharpness": "Largest rise of the loss in a box of relative size epsilon around the weights, in "
    "percent of 1 + loss (Keskar et al. 2017, Metric 2.1). A search finds it, so it is a lower bound.",
    "worst_case_sharpness": "Largest rise of the loss within distance rho of the weights; with adaptive, each weight "
    "is measured against its own size. A search finds it, so it is a lower bound.",
    "average_case_sharpness": "Mean rise of the loss under Gaussian noise of size sigma in the weights; with adaptive, "
    "relative to the size of each weight.",
    "low_pass_sharpness": "Mean loss under Gaussian noise in the weights: the loss surface after smoothing.",
    "pac_bayes_sharpness": "1 / sigma squared, at the size sigma of the noise in the weights that moves the accuracy "
    "(or the loss) by a given amount.",
    "relative_flatness": "Trace of the Hessian of one layer, weighed by the scalar products of its weights, so that "
    "rescaling the layers does not change it (Petzka et al. 2021).",
    "fisher_rao_norm": "Squared norm of the weights in the geometry of the model's outputs (Liang et al. 2019).",
    "gradient_noise_scale": "Variance of the gradient over its squared length: the batch size at which larger batches "
    "cease to pay.",
    "learning_rate_limit": "Largest step at which gradient descent is still stable at these weights.",
    "trace": "Sum of all eigenvalues of the Hessian of the training loss: its curvature in total. It is estimated from "
    "products with random vectors; the doubt is an interval at 95 %.",
    "diagonal": "Sum of the diagonal of the Hessian, whose entries are the curvature along each single weight: its "
    "trace.",
    "frobenius_norm": "Root of the sum of all squared eigenvalues of the Hessian: negative curvature counts as well.",
    "spectral_density": "Density of all eigenvalues of the Hessian; the value is its upper end, which is close to the "
    "largest of them.",
    "critical_sharpness": "2 / the smallest step along the gradient that raises the loss: curvature along this "
    "direction.",
}
_COLUMNS = {
    "doubt": "How far the value can be trusted: a certified interval, a standard error, or the kind of bound it is.",
    "passes": "What the value cost, in passes over the data.",
    "time": "Wall time for this value.",
}


def meanings(names: Iterable[str], kind: type | None = None) -> dict[str, str]:
    """Return what each name means, of a metric, of a field of the record ``kind``, or of a column; others are left out.

    Metrics that are asked for with several options, as in ``name(option=1)``, are explained once.
    """
    fields = _described(kind) if kind is not None else {}
    found = {}
    for name in names:
        base = name.partition("(")[0]
        text = _METRICS.get(base) or fields.get(name) or _COLUMNS.get(name)
        if text is not None:
            found[base.replace("_", " ") if base in fields else base] = text
    return found


def _described(kind: type) -> dict[str, str]:
    """Return the fields of a record as its docstring describes them."""
    _, _, section = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", section, flags=re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text.replace("`", "")) for name, text in entries}
