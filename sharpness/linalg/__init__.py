"""Vectors and products: algorithms for any symmetric operator, which have never heard of a network."""

from sharpness.linalg.dense import dense
from sharpness.linalg.lanczos import lanczos
from sharpness.linalg.operator import DenseOperator, FunctionOperator, LinearOperator
from sharpness.linalg.power import power_iteration

__all__ = [
    "DenseOperator",
    "FunctionOperator",
    "LinearOperator",
    "dense",
    "lanczos",
    "power_iteration",
]
