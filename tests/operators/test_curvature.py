"""Gauss-Newton and Fisher matrices against closed forms, and against dense Jacobians taken sample by sample."""

import pytest
import torch
from torch import nn
from torch.nn import functional

import sharpness
from sharpness import (
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    Objective,
)
from sharpness.errors import ArgumentError
from tests.checks import assert_untouched, check_operator
from tests.zoo import batches, features, linear_regression, logistic_regression, softmax_regression, tanh_net

OPERATORS = {
    "hessian": HessianOperator,
    "ggn": GGNOperator,
    "fisher": FisherOperator,
    "empirical_fisher": EmpiricalFisherOperator,
}
X = features(3)
LABELS = torch.arange(11) % 3


def net(outputs=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def jacobian(model, x):
    """Outputs by parameters, ``(*outputs, n)``, by reverse mode on one flat function."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in named.values()]
    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])

    def f(vector):
        pieces = vector.split(sizes)
        shaped = {name: v.view(p.shape) for (name, p), v in zip(named.items(), pieces, strict=True)}
        return torch.func.functional_call(model, shaped, (x,))

    return torch.func.jacrev(f)(flat)


def gauss_newton(model, x, loss):
    """J' M J with M the Hessian of the mean ``loss`` with respect to all outputs."""
    out = model(x).detach()
    j = jacobian(model, x).reshape(out.numel(), -1)
    m = torch.func.hessian(lambda f: loss(f.view_as(out)))(out.reshape(-1))
    return j.T @ m @ j


def second_moment(model, x, losses, weights=None):
    """Sum over the terms of the outer products of their gradients, weighed; ``losses(model(x))`` gives the terms."""
    named = [p for p in model.parameters() if p.requires_grad]
    terms = losses(model(x))
    rows = []
    for term in terms.reshape(-1):
        found = torch.autograd.grad(term, named, retain_graph=True, allow_unused=True)
        pairs = zip(found, named, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in pairs]))
    g = torch.stack(rows)
    weights = torch.ones(len(g), dtype=g.dtype) if weights is None else weights.reshape(-1)
    return (g.T * weights) @ g / weights.sum()


def dense(name, model, loader, loss_fn=None, **options):
    return OPERATORS[name](Objective(model, loader, loss_fn, **options)).to_dense()


# --- closed forms --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [softmax_regression(), logistic_regression(), linear_regression()], ids=str)
@pytest.mark.parametrize("name", ["ggn", "fisher"])
def test_a_model_linear_in_its_parameters_has_its_hessian(problem, name):
    check_operator(OPERATORS[name](Objective(problem.model, problem.loader, **problem.options)), problem.hessian)


def test_the_empirical_fisher_of_softmax_regression_at_zero():
    problem = softmax_regression()
    x, y = (torch.cat(parts) for parts in zip(*problem.loader, strict=True))
    residual = torch.full((len(x), 4), 0.25, dtype=torch.float64) - nn.functional.one_hot(y, 4)
    rows = torch.einsum("nk,nd->nkd", residual, x).reshape(len(x), -1)
    exact = torch.block_diag(torch.zeros(2, 2, dtype=torch.float64), rows.T @ rows / len(x))
    check_operator(EmpiricalFisherOperator(Objective(problem.model, problem.loader)), exact)


def test_the_empirical_fisher_of_linear_regression_takes_whole_rows():
    x, y = X, features(2, seed=4)
    model = nn.Linear(3, 2, bias=False).double()
    slope = 2 * (model(x).detach() - y)  # the loss of a row is the sum of two squares, of which there are 22
    rows = torch.einsum("nk,nd->nkd", slope, x).reshape(len(x), -1)
    check_operator(EmpiricalFisherOperator(Objective(model, batches(x, y))), rows.T @ rows / y.numel())


# --- dense Jacobians -----------------------------------------------------------------------------------------------


def with_ignored(labels):
    labels = labels.clone()
    labels[[1, 6, 7]] = -100
    return labels


WEIGHTS = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
CLASS_LOSSES = {
    "plain": {},
    "weights": {"weight": WEIGHTS},
    "smoothed": {"label_smoothing": 0.2},
    "both": {"weight": WEIGHTS, "label_smoothing": 0.2},
}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("options", CLASS_LOSSES.values(), ids=CLASS_LOSSES)
@pytest.mark.parametrize("memory", [0, "auto"])
def test_cross_entropy_with_all_that_weighs_it(options, reduction, memory):
    model, labels = net(), with_ignored(LABELS)
    loader = batches(X, labels)
    mean = nn.CrossEntropyLoss(**options)
    criterion = nn.CrossEntropyLoss(reduction=reduction, **options)
    exact = gauss_newton(model, X, lambda f: mean(f, labels))
    for name in ("ggn", "fisher"):
        torch.testing.assert_close(dense(name, model, loader, criterion, memory=memory), exact, rtol=1e-9, atol=1e-12)
    counted = labels >= 0
    weights = options.get("weight", torch.ones(3, dtype=torch.float64))[labels[counted]]
    each = nn.CrossEntropyLoss(reduction="none", **options)
    moment = second_moment(model, X[counted], lambda f: each(f, labels[counted]) / weights, weights)
    found = dense("empirical_fisher", model, loader, criterion, memory=memory)
    torch.testing.assert_close(found, moment, rtol=1e-9, atol=1e-12)


class Tokens(nn.Module):
    """Two tokens of three classes each, with the classes in the last dimension or in the second."""

    def __init__(self, last):
        super().__init__()
        self.core, self.last = net(6), last

    def forward(self, x):
        out = self.core(x).view(-1, 2, 3)
        return out if self.last else out.movedim(-1, 1)


@pytest.mark.parametrize("last", [True, False])
def test_tokens_are_terms_of_their_own(last):
    labels = torch.stack([LABELS, with_ignored(LABELS.flip(0))], dim=1)
    model = Tokens(last)
    flat = lambda f: (f if last else f.movedim(1, -1)).reshape(-1, 3)  # noqa: E731
    loss = lambda f: functional.cross_entropy(flat(f), labels.reshape(-1))  # noqa: E731
    loader = batches(X, labels)
    criterion = None if last else nn.CrossEntropyLoss()
    if last:  # inferred, as nothing else knows that the classes come last
        loader = batches(X, labels.clamp(min=0))
        labels = labels.clamp(min=0)
    exact = gauss_newton(model, X, loss)
    for name in ("ggn", "fisher"):
        torch.testing.assert_close(dense(name, model, loader, criterion), exact, rtol=1e-9, atol=1e-12)
    counted = labels.reshape(-1) >= 0
    each = lambda f: functional.cross_entropy(flat(f), labels.reshape(-1), reduction="none")[counted]  # noqa: E731
    torch.testing.assert_close(
        dense("empirical_fisher", model, loader, criterion), second_moment(model, X, each), rtol=1e-9, atol=1e-12
    )


def test_mean_squared_error_and_binary_cross_entropy_with_logits():
    model, numbers = net(2), features(2, seed=9)
    ones = (numbers > 0).double()
    for criterion, targets in (
        (nn.MSELoss(), numbers),
        (functional.mse_loss, numbers),
        (nn.BCEWithLogitsLoss(), ones),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([0.5, 3.0], dtype=torch.float64)), ones),
    ):
        exact = gauss_newton(model, X, lambda f, c=criterion, t=targets: c(f, t))
        for name in ("ggn", "fisher"):
            found = dense(name, model, batches(X, targets), criterion)
            torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def expected_outer(model, x, outcomes):
    """The Fisher matrix from its definition: a sum over outcomes ``(probability, losses of the rows)``."""
    total = 0
    for probability, losses in outcomes:
        g = second_moment_rows(model, x, losses)
        total = total + torch.einsum("n,ni,nj->ij", probability, g, g) / len(x)
    return total


def second_moment_rows(model, x, losses):
    named = list(model.parameters())
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(term, named, retain_graph=True)])
        for term in losses(model(x))
    ]
    return torch.stack(rows)


class LogSoftmax(nn.Sequential):
    def __init__(self):
        super().__init__(net(), nn.LogSoftmax(dim=1))


class Sigmoid(nn.Sequential):
    def __init__(self):
        super().__init__(net(1), nn.Sigmoid())


def test_the_fisher_matrix_does_not_depend_on_where_the_model_ends():
    """Log-probabilities and the negative log-likelihood are the same predictions as logits and cross-entropy."""
    exact = dense("fisher", net(), batches(X, LABELS))
    found = dense("fisher", LogSoftmax(), batches(X, LABELS), nn.NLLLoss())
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    ones = (features(1, seed=9) > 0).double()
    exact = dense("fisher", net(1), batches(X, ones), nn.BCEWithLogitsLoss())
    found = dense("fisher", Sigmoid(), batches(X, ones), nn.BCELoss())
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    weight = torch.tensor([3.0], dtype=torch.float64)
    exact = dense("fisher", net(1), batches(X, ones), nn.BCEWithLogitsLoss(weight=weight))
    found = dense("fisher", Sigmoid(), batches(X, ones), nn.BCELoss(weight=weight))
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
    # The Gauss-Newton matrix does depend on it: the log-likelihood is linear in log-probabilities.
    flat = dense("ggn", LogSoftmax(), batches(X, LABELS), nn.NLLLoss())
    assert torch.equal(flat, torch.zeros_like(flat))


def test_class_weights_weigh_the_terms_of_log_probabilities_too():
    labels = with_ignored(LABELS)
    exact = dense("fisher", net(), batches(X, labels), nn.CrossEntropyLoss(weight=WEIGHTS))
    found = dense("fisher", LogSoftmax(), batches(X, labels), nn.NLLLoss(weight=WEIGHTS))
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_the_fisher_matrix_of_counts_from_its_definition():
    model, counts = net(1), (LABELS % 3).double()[:, None]
    rate = model(X).detach().exp()[:, 0]
    outcomes = []
    for y in range(40):  # the rates are small
        y_ = torch.tensor(float(y), dtype=torch.float64)
        probability = torch.exp(y_ * rate.log() - rate - torch.lgamma(y_ + 1))
        outcomes.append((probability, lambda f, y=y_: f[:, 0].exp() - y * f[:, 0]))
    exact = expected_outer(model, X, outcomes)
    found = dense("fisher", model, batches(X, counts), nn.PoissonNLLLoss())
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


class Exponential(nn.Sequential):
    def __init__(self):
        super().__init__(net(1))

    def forward(self, x):
        return super().forward(x).exp()


def test_rates_are_the_same_predictions_as_their_logarithms():
    counts = (LABELS % 3).double()[:, None]
    exact = dense("fisher", net(1), batches(X, counts), nn.PoissonNLLLoss())
    found = dense("fisher", Exponential(), batches(X, counts), nn.PoissonNLLLoss(log_input=False))
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-9)  # the criterion adds 1e-8 to the rates


def test_the_absolute_error_has_gradients_of_one_size():
    model, numbers = net(2), features(2, seed=9)
    j = jacobian(model, X).reshape(22, -1)
    found = dense("fisher", model, batches(X, numbers), nn.L1Loss())
    torch.testing.assert_close(found, j.T @ j / 22, rtol=1e-9, atol=1e-12)


# --- Monte Carlo ---------------------------------------------------------------------------------------------------


def same_as_cross_entropy(outputs, targets):
    return functional.cross_entropy(outputs, targets)


def test_drawn_labels_estimate_the_exact_matrix():
    """An unknown loss that is cross-entropy: over seeds the estimates scatter around the exact matrix."""
    model, v = net(), torch.linspace(-1, 1, 31, dtype=torch.float64)
    loader = batches(X, LABELS)
    exact = v @ dense("fisher", model, loader) @ v
    forms = []
    for seed in range(60):
        operator = FisherOperator(Objective(model, loader, same_as_cross_entropy, seed=seed), num_samples=4)
        forms.append(v @ (operator @ v))
    forms = torch.stack(forms)
    assert forms.std() > 0
    assert abs(forms.mean() - exact) < 4 * forms.std() / len(forms) ** 0.5
    many = FisherOperator(Objective(model, loader, same_as_cross_entropy), num_samples=400)
    assert abs(v @ (many @ v) - exact) < 4 * forms.std() / 100**0.5


def test_drawn_targets_are_one_fixed_matrix():
    objective = Objective(net(), batches(X, LABELS), same_as_cross_entropy)
    operator = FisherOperator(objective, num_samples=2)
    matrix = operator.to_dense()
    assert torch.equal(matrix, operator.to_dense())
    torch.testing.assert_close(matrix, matrix.T)
    streamed = Objective(net(), batches(X, LABELS), same_as_cross_entropy, memory=0)
    torch.testing.assert_close(FisherOperator(streamed, num_samples=2).to_dense(), matrix)


class Renamed(nn.CrossEntropyLoss):
    """A criterion of one's own, which happens to compute cross-entropy."""


def test_no_label_is_drawn_where_the_data_have_none():
    model, v = net(), torch.linspace(-1, 1, 31, dtype=torch.float64)
    loader = batches(X, with_ignored(LABELS))
    exact = v @ dense("fisher", model, loader, nn.CrossEntropyLoss()) @ v
    forms = [
        v @ (FisherOperator(Objective(model, loader, Renamed(), seed=seed), num_samples=8) @ v) for seed in range(40)
    ]
    mean, error = torch.stack(forms).mean(), torch.stack(forms).std() / 40**0.5
    assert error < 0.05 * exact
    assert abs(mean - exact) < 4 * error


def test_every_batch_draws_for_itself():
    batch = (X, LABELS)
    once, twice = (Objective(net(), [batch] * count, same_as_cross_entropy) for count in (1, 2))
    one, two = (FisherOperator(objective, num_samples=1).to_dense() for objective in (once, twice))
    assert (one - two).abs().max() > 1e-3 * one.abs().max()


def test_a_distribution_of_the_users_own():
    def laplace(outputs, generator):
        u = torch.rand(outputs.shape, generator=generator, dtype=outputs.dtype) - 0.5
        return outputs - u.sign() * torch.log1p(-2 * u.abs())

    def absolute(outputs, targets):
        return (outputs - targets).abs().mean()

    model, loader = net(1), batches(X, features(1, seed=9))
    exact = dense("fisher", model, loader, nn.L1Loss())  # gradients of one size whatever is drawn
    found = FisherOperator(Objective(model, loader, absolute), sample_targets=laplace, num_samples=1).to_dense()
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


# --- shapes of models and outputs ----------------------------------------------------------------------------------


class Two(nn.Module):
    """Two heads, the second a function of the first."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, x):
        out = self.body(x)
        return out, out.square()[:, :2]


def both(outputs, targets):
    labels, numbers = targets
    return functional.cross_entropy(outputs[0], labels) + functional.mse_loss(outputs[1], numbers)


def test_heads_that_depend_on_each_other():
    model, numbers = Two(), features(2, seed=9)
    labels = LABELS
    j = [jacobian_of(model, X, head) for head in (0, 1)]
    outs = [out.detach() for out in model(X)]
    m = [
        torch.func.hessian(lambda f: functional.cross_entropy(f.view(11, 3), labels))(outs[0].reshape(-1)),
        torch.func.hessian(lambda f: functional.mse_loss(f.view(11, 2), numbers))(outs[1].reshape(-1)),
    ]
    exact = sum(a.T @ b @ a for a, b in zip(j, m, strict=True))
    loader = [(x, (y, z)) for x, y, z in batches(X, labels, numbers)]
    torch.testing.assert_close(dense("ggn", model, loader, both), exact, rtol=1e-9, atol=1e-12)

    def rows(outputs):
        each = functional.cross_entropy(outputs[0], labels, reduction="none")
        return each + (outputs[1] - numbers).square().mean(dim=1)

    found = dense("empirical_fisher", model, loader, both)
    torch.testing.assert_close(found, second_moment(model, X, rows), rtol=1e-9, atol=1e-12)


def jacobian_of(model, x, head):
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)[head]

    out = model(x)[head]
    return jacobian(One(), x).reshape(out.numel(), -1)


class Own(nn.Module):
    """A model that computes its own loss, as those of Hugging Face do."""

    def __init__(self):
        super().__init__()
        self.body = net()

    def forward(self, inputs, labels=None):
        logits = self.body(inputs)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def test_a_model_that_computes_its_own_loss():
    loader = [{"inputs": x, "labels": y} for x, y in batches(X, LABELS)]
    plain = batches(X, LABELS)
    for name in ("ggn", "empirical_fisher"):
        torch.testing.assert_close(dense(name, Own(), loader), dense(name, net(), plain), rtol=1e-9, atol=1e-12)
    with pytest.raises(ArgumentError, match=r"the model's own loss tells none\. Pass torch\.nn\.CrossEntropyLoss"):
        dense("fisher", Own(), loader)


class OwnTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Tokens(last=True)

    def forward(self, inputs, labels=None):
        logits = self.body(inputs)
        return {"loss": functional.cross_entropy(logits.movedim(-1, 1), labels), "logits": logits}


def test_tokens_of_a_model_that_computes_its_own_loss_are_terms_of_their_own():
    labels = torch.stack([LABELS, with_ignored(LABELS.flip(0))], dim=1)
    loader = [{"inputs": x, "labels": y} for x, y in batches(X, labels)]
    exact = dense("empirical_fisher", Tokens(last=False), batches(X, labels), nn.CrossEntropyLoss())
    torch.testing.assert_close(dense("empirical_fisher", OwnTokens(), loader), exact, rtol=1e-9, atol=1e-12)


def test_recurrent_models_and_attention_have_these_products():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.lstm = nn.LSTM(3, 4, batch_first=True)
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.last = nn.Linear(4, 3)
            self.double()

        def forward(self, x):
            out, _ = self.lstm(x.view(-1, 1, 3).expand(-1, 2, 3))
            return self.last(self.attention(out, out, out)[0][:, -1])

    model = Reader()
    exact = gauss_newton(model, X, lambda f: functional.cross_entropy(f, LABELS))
    torch.testing.assert_close(dense("ggn", model, batches(X, LABELS)), exact, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_keeps_the_contract_on_a_net_with_all_traps(name):
    problem = tanh_net()
    operator = OPERATORS[name](Objective(problem.model, problem.loader))
    with assert_untouched(problem.model):
        matrix = operator.to_dense()
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-9, atol=1e-12)
    check_operator(operator, matrix)
    assert torch.equal(matrix[:2], torch.zeros_like(matrix[:2]))  # the unused parameter
    if name != "hessian":
        assert torch.linalg.eigvalsh(matrix).min() > -1e-12
    half = OPERATORS[name](Objective(problem.model.float(), [(x.float(), y) for x, y in problem.loader]))
    torch.testing.assert_close(half.to_dense().double(), matrix, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["ggn", "fisher", "empirical_fisher"])
def test_eigenvalues_of_every_curvature(name):
    problem = tanh_net()
    exact = torch.linalg.eigvalsh(dense(name, problem.model, problem.loader)).flip(0)[:2]
    result = sharpness.top_eigenvalues(problem.model, problem.loader, k=2, curvature=name, tol=1e-8)
    torch.testing.assert_close(result.eigenvalues, exact, rtol=1e-7, atol=0)
    assert result.settings["curvature"] == name
    single = [(x.float(), y) for x, y in problem.loader]
    rounded = sharpness.top_eigenvalues(problem.model.float(), single, k=2, curvature=name)
    low, high = rounded.interval.T
    assert bool(((low <= exact) & (exact <= high)).all())


def test_a_block_of_products_costs_one_pass():
    objective = Objective(net(), batches(X, LABELS), memory=0)
    HessianOperator(objective).matmat(torch.eye(objective.n, dtype=torch.float64))
    assert objective.num_passes == 1


def test_targets_drawn_from_the_model_make_the_two_fisher_matrices_one():
    """Over targets drawn from the Gaussian that the loss stands for, also with several outputs per row."""
    model, x = net(2), features(3)

    def gaussian(outputs, generator):
        return outputs + torch.randn(outputs.shape, generator=generator, dtype=outputs.dtype) / 2**0.5

    v = torch.linspace(-1, 1, 26, dtype=torch.float64)
    exact = v @ (FisherOperator(Objective(model, batches(x, features(2)), nn.MSELoss())) @ v)
    drawn, empirical = [], []
    for seed in range(150):
        g = torch.Generator().manual_seed(seed)
        objective = Objective(model, batches(x, gaussian(model(x).detach(), g)), nn.MSELoss(), seed=seed)
        drawn.append(v @ (FisherOperator(objective, sample_targets=gaussian, num_samples=2) @ v))
        empirical.append(v @ (EmpiricalFisherOperator(objective) @ v))
    for forms in map(torch.stack, (drawn, empirical)):
        error = forms.std() / 150**0.5
        assert error < 0.1 * exact
        assert abs(forms.mean() - exact) < 4 * error


def test_prompts_that_are_masked_lose_no_term_of_a_causal_model():
    """The term of a label is at the position before it, whether or not the label there counts."""

    class CausalOutput(dict):
        pass

    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Tokens(last=True)

        def forward(self, inputs, labels=None):
            logits = self.body(inputs)
            loss = functional.cross_entropy(logits[:, :-1].reshape(-1, 3), labels[:, 1:].reshape(-1))
            return CausalOutput(loss=loss, logits=logits)

    labels = torch.stack([torch.full_like(LABELS, -100), LABELS], dim=1)  # the prompt does not count, the answer does
    loader = [{"inputs": x, "labels": y} for x, y in batches(X, labels)]
    model = Causal()
    each = lambda f: functional.cross_entropy(f[:, 0], LABELS, reduction="none")  # noqa: E731
    exact = second_moment(model.body, X, each)
    torch.testing.assert_close(dense("empirical_fisher", model, loader), exact, rtol=1e-9, atol=1e-12)


def test_a_loss_that_is_not_computed_from_the_outputs_is_found_out():
    class Probabilities(Own):
        def forward(self, inputs, labels=None):
            found = super().forward(inputs, labels)
            return {"loss": found["loss"], "logits": found["logits"].softmax(dim=-1)}

    loader = [{"inputs": x, "labels": y} for x, y in batches(X, LABELS)]
    for name in ("ggn", "empirical_fisher"):
        with pytest.raises(sharpness.ModelError, match="not computed from the outputs that the model returns"):
            dense(name, Probabilities(), loader)


def test_a_model_that_was_refused_is_refused_again():
    for name in ("hessian", "ggn"):
        for kernel in (Once, Unseen):
            objective = Objective(Fused(kernel), batches(X, LABELS))
            for _ in range(3):
                with pytest.raises(sharpness.ModelError, match="cannot be differentiated twice"):
                    OPERATORS[name](objective).matvec(torch.ones(objective.n, dtype=torch.float64))


def test_weights_of_classes_leave_open_what_a_drawn_label_counts():
    for criterion in (Renamed(weight=WEIGHTS), Renamed(ignore_index=0)):
        with pytest.raises(ArgumentError, match="class weights, or an ignored class, leave open"):
            dense("fisher", net(), batches(X, LABELS), criterion)


def test_how_a_fisher_matrix_was_made_is_said():
    exact = sharpness.top_eigenvalues(net(), batches(X, LABELS), curvature="fisher")
    drawn = sharpness.top_eigenvalues(net(), batches(X, LABELS), same_as_cross_entropy, curvature="fisher")
    assert exact.settings["fisher"] == "exact"
    assert drawn.settings["fisher"] == "16 draws per term"
    assert "fisher" not in sharpness.top_eigenvalues(net(), batches(X, LABELS)).settings


def test_what_cannot_be_told_is_refused_before_any_data_is_touched():
    def touched(model, batch):
        raise AssertionError("the data was touched")

    for name in ("ggn", "fisher", "empirical_fisher"):
        with pytest.raises(ArgumentError, match="is defined by the outputs of the model, and a batch_loss hides them"):
            sharpness.top_eigenvalues(net(), batches(X, LABELS), batch_loss=touched, curvature=name)
    with pytest.raises(ArgumentError, match="`curvature` must be one of 'hessian', 'ggn', 'fisher', 'emp"):
        sharpness.top_eigenvalues(net(), batches(X, LABELS), curvature="kfac")

    def unknown(outputs, targets):
        return (outputs - targets).abs().pow(1.5).mean()

    with pytest.raises(ArgumentError, match=r"unknown tells none\. .*FisherOperator\(objective, sample_targets"):
        sharpness.top_eigenvalues(net(1), batches(X, features(1)), unknown, curvature="fisher")
    with pytest.raises(ArgumentError, match="`num_samples` must be at least 1"):
        FisherOperator(Objective(net(), batches(X, LABELS)), num_samples=0)
    with pytest.raises(ArgumentError, match="`sample_targets` must be a function"):
        FisherOperator(Objective(net(), batches(X, LABELS)), sample_targets=3)


# --- first derivatives only ----------------------------------------------------------------------------------------


class Once(torch.autograd.Function):
    """A hyperbolic tangent whose backward pass cannot be differentiated, as those of fused kernels."""

    @staticmethod
    def forward(ctx, x):
        y = torch.tanh(x)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        (y,) = ctx.saved_tensors
        return slope * (1 - y**2)


class Unseen(Once):
    """The same, with a backward pass that PyTorch takes for a constant."""

    @staticmethod
    def backward(ctx, slope):
        (y,) = ctx.saved_tensors
        return slope.detach() * (1 - y.detach() ** 2)


class Fused(nn.Module):
    def __init__(self, kernel):
        super().__init__()
        self.plain, self.kernel = net(), kernel

    def forward(self, x):
        return self.plain[2](self.kernel.apply(self.plain[0](x)))


@pytest.mark.parametrize("memory", [0, "auto"])
@pytest.mark.parametrize("kernel", [Once, Unseen])
def test_the_empirical_fisher_needs_first_derivatives_only(kernel, memory):
    labels = with_ignored(LABELS)
    loader, criterion = batches(X, labels), nn.CrossEntropyLoss(weight=WEIGHTS)
    objective = Objective(Fused(kernel), loader, criterion, memory=memory)
    exact = dense("empirical_fisher", net(), loader, criterion)
    check_operator(EmpiricalFisherOperator(objective), exact)
    result = sharpness.top_eigenvalues(objective, curvature="empirical_fisher", k=2)
    assert result.settings["one_backward_per_term"]
    assert not sharpness.top_eigenvalues(net(), loader, criterion, curvature="ggn").settings["one_backward_per_term"]
    for name in ("hessian", "ggn", "fisher"):
        with pytest.raises(sharpness.ModelError, match='cannot be differentiated twice.*curvature="empirical_fisher"'):
            dense(name, Fused(kernel), loader, criterion)


def test_drawn_labels_need_first_derivatives_only():
    loader = batches(X, LABELS)
    plain, fused = (Objective(model, loader, same_as_cross_entropy) for model in (net(), Fused(Once)))
    exact = FisherOperator(plain, num_samples=3).to_dense()
    torch.testing.assert_close(FisherOperator(fused, num_samples=3).to_dense(), exact, rtol=1e-9, atol=1e-12)


def test_rows_of_numbers_one_backward_pass_each():
    numbers = features(3, seed=9)
    exact = dense("empirical_fisher", net(), batches(X, numbers), nn.MSELoss())
    found = dense("empirical_fisher", Fused(Once), batches(X, numbers), nn.MSELoss())
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)
