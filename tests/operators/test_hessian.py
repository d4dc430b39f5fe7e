import pytest

from sharpness import HessianOperator, Objective
from tests.checks import assert_untouched, check_operator
from tests.zoo import problems


@pytest.mark.parametrize("memory", ["auto", 0, 3000])
@pytest.mark.parametrize("problem", problems(), ids=lambda p: p.name)
def test_the_operator_is_the_hessian_of_the_mean_over_all_terms(problem, memory):
    objective = Objective(problem.model, problem.loader, memory=memory, **problem.options)
    with assert_untouched(problem.model):
        check_operator(HessianOperator(objective), problem.hessian)
