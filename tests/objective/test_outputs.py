import pytest
import torch

from sharpness import Objective
from sharpness.objective.outputs import evaluate_with_logits
from tests.checks import assert_untouched
from tests.zoo import linear_regression, quadratics, softmax_regression, tanh_net


def test_loss_and_accuracy_are_those_of_an_evaluation_in_one_pass():
    problem = tanh_net()
    objective = Objective(problem.model, problem.loader)
    with assert_untouched(problem.model):
        found, norm = evaluate_with_logits(objective)
    assert objective.num_passes == 1
    assert found == objective.evaluate()
    logits = torch.cat([problem.model(x) for x, _ in problem.loader])  # a ragged last batch
    lengths = (logits - logits.mean(1, keepdim=True)).norm(dim=1)
    assert norm == pytest.approx(lengths.mean().item(), rel=1e-6)


def test_a_shift_of_all_logits_is_no_length():
    problem = softmax_regression()  # of zero weights
    assert evaluate_with_logits(Objective(problem.model, problem.loader))[1] == 0.0


def test_classes_in_the_second_of_many_dimensions():
    class Tokens(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table = torch.nn.Embedding(5, 3)

        def forward(self, tokens):
            return self.table(tokens).movedim(-1, 1)  # (samples, classes, tokens)

    model, tokens = Tokens(), torch.arange(10).reshape(2, 5) % 5
    table = model.table.weight - model.table.weight.mean(1, keepdim=True)
    _, norm = evaluate_with_logits(Objective(model, [(tokens, tokens % 3)]))
    assert norm == pytest.approx(table.norm(dim=1).mean().item(), rel=1e-5)


@pytest.mark.parametrize("problem", [linear_regression(), quadratics()[0]], ids=lambda p: p.name)
def test_without_classes_or_outputs_there_is_none(problem):
    objective = Objective(problem.model, problem.loader, **problem.options)
    found, norm = evaluate_with_logits(objective)
    assert norm is None
    assert found == objective.evaluate()
