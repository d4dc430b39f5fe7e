"""Quantiles of Student's t, and how much an estimated variance knows."""

import pytest
import torch

from sharpness.linalg.confidence import freedom_of, half_width, quantile


def test_quantiles_are_those_of_the_tables():
    assert [round(quantile(freedom), 3) for freedom in (1, 2, 5, 10, 30, 1e9)] == [
        12.706,
        4.303,
        2.571,
        2.228,
        2.042,
        1.96,
    ]
    assert half_width(4.0, 10, 0.5) == pytest.approx(2 * 2.228 + 0.5, abs=1e-3)


def test_a_variance_has_as_many_degrees_of_freedom_as_its_terms_agree():
    assert freedom_of(torch.tensor([1.0, 2.0, 3.0, 4.0])) == pytest.approx(2 * 4 * 2.5**2 / (5 / 3))
    assert freedom_of(torch.tensor([0.0, 0.0, 0.0, 4.0])) == 3.0
    assert freedom_of(torch.ones(4)) > 1e5
    chi = torch.distributions.Chi2(5.0).sample((200_000,))
    assert freedom_of(chi) / 200_000 == pytest.approx(5.0, rel=0.05)


@pytest.mark.parametrize("value", [0.0, 2.0])
def test_terms_that_are_all_the_same(value):
    assert freedom_of(torch.full((5,), value)) >= 4
