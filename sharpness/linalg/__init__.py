"""Vectors and products: algorithms for any symmetric operator, which have never heard of a network."""

from sharpness.linalg.arpack import arpack
from sharpness.linalg.deflated import DeflatedOperator
from sharpness.linalg.dense import dense
from sharpness.linalg.diagonal import hutchinson_diagonal, xdiag
from sharpness.linalg.frobenius import frobenius_norm
from sharpness.linalg.lanczos import lanczos
from sharpness.linalg.lobpcg import lobpcg
from sharpness.linalg.operator import DenseOperator, FunctionOperator, LinearOperator
from sharpness.linalg.power import power_iteration
from sharpness.linalg.quadrature import stochastic_lanczos_quadrature
from sharpness.linalg.recorded import RecordedOperator
from sharpness.linalg.trace import hutchinson, hutchpp, xtrace

__all__ = [
    "DeflatedOperator",
    "DenseOperator",
    "FunctionOperator",
    "LinearOperator",
    "RecordedOperator",
    "arpack",
    "dense",
    "frobenius_norm",
    "hutchinson",
    "hutchinson_diagonal",
    "hutchpp",
    "lanczos",
    "lobpcg",
    "power_iteration",
    "stochastic_lanczos_quadrature",
    "xdiag",
    "xtrace",
]
