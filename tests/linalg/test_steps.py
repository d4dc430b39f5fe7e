"""Lanczos as a generator: many runs fed by one caller give the bits of each run alone."""

import pytest
import torch

from sharpness.errors import ArgumentError
from sharpness.linalg import DenseOperator, lanczos
from sharpness.linalg.lanczos import lanczos_steps
from tests.zoo import rotated, spectra

SPECTRA = spectra()


class Shape:
    """All that the generator may know of an operator."""

    def __init__(self, n):
        self.n, self.dtype, self.device = n, torch.float64, torch.device("cpu")

    def product_error(self, rows):
        return 0.0


@pytest.mark.parametrize("options", [{}, {"confirm": True}, {"memory": 0}, {"basis_dtype": torch.float32}])
def test_runs_in_lockstep_are_the_runs_alone(options):
    matrices = {name: rotated(values) for name, values in SPECTRA.items() if len(values) > 1}
    steps = {name: lanczos_steps(Shape(len(m)), 2, vectors=True, **options) for name, m in matrices.items()}
    waiting, results = {name: next(s) for name, s in steps.items()}, {}
    while waiting:
        for name, v in list(waiting.items()):
            assert v.shape == (len(matrices[name]),)
            try:
                waiting[name] = steps[name].send(matrices[name] @ v)
            except StopIteration as end:
                results[name] = end.value
                del waiting[name]
    for name, matrix in matrices.items():
        alone = lanczos(DenseOperator(matrix), 2, vectors=True, **options)
        for field in ("eigenvalues", "residuals", "interval", "eigenvectors"):
            assert torch.equal(getattr(alone, field), getattr(results[name], field))
        assert alone.num_matvecs == results[name].num_matvecs
        assert alone.confirmation == results[name].confirmation


def test_options_are_checked_before_the_first_vector():
    with pytest.raises(ArgumentError, match="`k` must be between 1 and 3"):
        lanczos_steps(Shape(3), 4)
