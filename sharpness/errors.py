"""The tree of exceptions and warnings.

::

    SharpnessError
      ArgumentError      (ValueError)       an argument that cannot be accepted
      ModelError         (ValueError)       a model or loss that cannot be differentiated as asked
      DataError          (ValueError)       a loader or batch that cannot be used
        NoTermsError                        of which nothing counts
      NonFiniteError     (ArithmeticError)  NaN or infinity met; names the batch
      ConvergenceError   (RuntimeError)     carries ``.result``, the best answer so far
    SharpnessWarning     (UserWarning)
      ConvergenceWarning                    an answer that missed its tolerance
      DeterminismWarning                    the loss is not the same on every pass
      StateWarning                          the model's state makes the answer unusual
      PrecisionWarning                      rounding limits the answer
      MemoryWarning                         a run that will hardly fit into the memory
      CompileWarning                        products that could not be compiled, and run as they are

Messages say what was given, what is needed and what to do, in this order.
"""

from __future__ import annotations

from typing import Any


class SharpnessError(Exception):
    """Root of all errors raised by this library."""


class ArgumentError(SharpnessError, ValueError):
    """An argument that cannot be accepted."""


class ModelError(SharpnessError, ValueError):
    """A model or loss that cannot be differentiated as asked."""


class DataError(SharpnessError, ValueError):
    """A loader or batch that cannot be used."""


class NoTermsError(DataError):
    """Data of which nothing counts: every target is ignored, or has the weight zero."""


class NonFiniteError(SharpnessError, ArithmeticError):
    """A loss, gradient or product that is NaN or infinite."""


class ConvergenceError(SharpnessError, RuntimeError):
    """A tolerance that was not met; ``result`` holds the best answer so far."""

    def __init__(self, message: str, result: Any = None) -> None:
        super().__init__(message)
        self.result = result


class SharpnessWarning(UserWarning):
    """Root of all warnings issued by this library."""


class ConvergenceWarning(SharpnessWarning):
    """An answer that missed its tolerance."""


class DeterminismWarning(SharpnessWarning):
    """A loss that is not the same on every pass over the data."""


class StateWarning(SharpnessWarning):
    """A state of the model that makes the answer unusual."""


class PrecisionWarning(SharpnessWarning):
    """Rounding that limits the answer."""


class MemoryWarning(SharpnessWarning):
    """A run that will hardly fit into the memory, issued before it starts."""


class CompileWarning(SharpnessWarning):
    """Products that could not be compiled, and run as they are."""
