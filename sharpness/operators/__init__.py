"""Curvature of an objective as linear operators."""

from sharpness.operators.curvature import (
    CurvatureOperator,
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    HessianOperator,
)

__all__ = ["CurvatureOperator", "EmpiricalFisherOperator", "FisherOperator", "GGNOperator", "HessianOperator"]
