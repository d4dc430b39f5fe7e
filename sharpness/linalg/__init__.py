"""Vectors and products: algorithms for any symmetric operator, which have never heard of a network."""

from sharpness.linalg.arpack import arpack
from sharpness.linalg.deflated import DeflatedOperator
from sharpness.linalg.dense import dense
from sharpness.linalg.lanczos import lanczos
from sharpness.linalg.lobpcg import lobpcg
from sharpness.linalg.operator import DenseOperator, FunctionOperator, LinearOperator
from sharpness.linalg.power import power_iteration
from sharpness.linalg.recorded import RecordedOperator

__all__ = [
    "DeflatedOperator",
    "DenseOperator",
    "FunctionOperator",
    "LinearOperator",
    "RecordedOperator",
    "arpack",
    "dense",
    "lanczos",
    "lobpcg",
    "power_iteration",
]
