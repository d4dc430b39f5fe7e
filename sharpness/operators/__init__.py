"""Curvature of an objective as linear operators."""

from sharpness.operators.hessian import HessianOperator

__all__ = ["HessianOperator"]
