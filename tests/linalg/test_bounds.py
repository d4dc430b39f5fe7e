import numpy as np

from sharpness.linalg.bounds import kato_temple, residual_interval
from sharpness.linalg.which import count, select


def test_residual_interval():
    np.testing.assert_allclose(
        residual_interval(np.array([2.0, 1.0]), np.array([0.5, 0.25])), [[1.5, 2.5], [0.75, 1.25]]
    )


def test_kato_temple_on_a_two_by_two_matrix_is_exact():
    # For diag(3, 1) and the unit vector (cos t, sin t), theta and r are known, and the bound is attained.
    t = 0.1
    theta = 3 * np.cos(t) ** 2 + np.sin(t) ** 2
    r = 2 * np.cos(t) * np.sin(t)
    rows = kato_temple(np.array([1.0, theta]), np.array([0.0, r]), np.array([1]), 0.0)
    np.testing.assert_allclose(rows[0, 1], 3.0, rtol=1e-12)
    np.testing.assert_allclose(rows[0, 0], theta, rtol=1e-12)  # nothing above: the Ritz value is a lower bound


def test_kato_temple_is_nan_where_a_neighbour_reaches_in():
    rows = kato_temple(np.array([1.0, 1.2, 5.0]), np.array([0.3, 0.1, 0.1]), np.array([2, 1]), 0.0)
    assert not np.isnan(rows[0]).any()
    assert np.isnan(rows[1]).all()


def test_select_orders_as_documented():
    theta = np.array([-5.0, -1.0, 0.5, 2.0, 4.0])
    assert theta[select(theta, "largest", 2)].tolist() == [4.0, 2.0]
    assert theta[select(theta, "smallest", 2)].tolist() == [-5.0, -1.0]
    assert theta[select(theta, "magnitude", 3)].tolist() == [-5.0, 4.0, 2.0]
    assert theta[select(theta, "both", 2)].tolist() == [4.0, 2.0, -1.0, -5.0]
    assert theta[select(theta, "both", 3)].tolist() == [4.0, 2.0, 0.5, -1.0, -5.0]
    assert [count(which, 3, 5) for which in ("largest", "both")] == [3, 5]
