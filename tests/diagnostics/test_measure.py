from collections import Counter

import numpy as np
import pytest
import torch
from known_problems import Bowl, NormNet, Regression, check_coverage, regression_probe, rows, squared_error
from torch import nn

from hf_momentum.diagnostics.measure import BUDGETS, Budget, measure
from hf_momentum.diagnostics.measurements import Setting
from hf_momentum.diagnostics.probe import Probe
from hf_momentum.diagnostics.regime import assess
from hf_momentum.errors import UserError

REPETITIONS = 60
TOTALS = ("squared_gradient", "noise_trace", "hessian_noise", "hessian_gradient")


def draws(model: Regression, count: int, size: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(len(model.inputs), (size,), generator=generator) for _ in range(count)]


def exact_totals(model: Regression) -> dict[str, float]:
    truth = model.truth()
    gradient, hessian, covariance = truth["gradient"], truth["hessian"], truth["covariance"]
    values = (gradient @ gradient, covariance.trace(), (hessian @ covariance).trace(), gradient @ hessian @ gradient)
    return dict(zip(TOTALS, map(float, values), strict=True))


@pytest.fixture(scope="module")
def regression() -> tuple[Regression, list]:
    """The model, and measurements on draws of their own."""
    model = Regression()
    probe = regression_probe(model)
    return model, [measure(probe, draws(model, 14, 5, seed)) for seed in range(REPETITIONS)]


@pytest.mark.parametrize("name", TOTALS)
def test_totals_cover_the_truth(regression, name):
    model, found = regression
    check_coverage([getattr(each, name) for each in found], exact_totals(model)[name])


def test_loss_and_leading_curvature(regression):
    model, found = regression
    loss = float(model.loss(torch.arange(400)).detach())
    losses = [each.loss for each in found]
    assert abs(np.mean(losses) - loss) < 4 * np.std(losses) / REPETITIONS**0.5
    largest = float(torch.linalg.eigvalsh(model.truth()["hessian"])[-1])
    curvatures = [each.modes[0].curvature.value for each in found]
    # Along directions found on ten other examples: below the largest eigenvalue, not far.
    assert 0.8 * largest < np.mean(curvatures) < largest


def test_values_along_a_known_mode():
    """Where all inputs but one are 0, its mode is known, and the values are those of the examples."""
    model = Regression(dim=2)
    model.inputs[:, 0] = 0
    gradients, curvatures = model.per_example_gradients()[:, 1], model.inputs[:, 1] ** 2
    probe = regression_probe(model)
    found = [measure(probe, draws(model, 14, 8, seed)).modes[0] for seed in range(REPETITIONS)]
    truths = {
        "curvature": curvatures.mean(),
        "squared_gradient": gradients.mean() ** 2,
        "noise": gradients.var(correction=0),
        "curvature_variance": curvatures.var(correction=0),
    }
    for name, truth in truths.items():
        values = [getattr(mode, name).value for mode in found]
        assert abs(np.mean(values) - truth) < 4 * np.std(values) / REPETITIONS**0.5, name
        covered = sum(getattr(mode, name).low <= truth <= getattr(mode, name).high for mode in found)
        assert covered >= 0.85 * REPETITIONS, (name, covered)


class Counting(Probe):
    """Counts what is spent, a product as two gradients and a forward pass as a third."""

    def __init__(self, *given, **named):
        super().__init__(*given, **named)
        self.calls = Counter()

    def loss(self, batch):
        self.calls["loss"] += 1
        return super().loss(batch)

    def gradient(self, batch):
        self.calls["gradient"] += 1
        return super().gradient(batch)

    def hessian(self, batch):
        self.calls["gradient"] += 1
        return super().hessian(batch)

    def _product(self, gradient, vector):
        self.calls["product"] += 1
        return super()._product(gradient, vector)

    @property
    def cost(self) -> int:
        return round(self.calls["loss"] / 3 + self.calls["gradient"] + 2 * self.calls["product"])


@pytest.mark.parametrize("name", list(BUDGETS))
def test_the_cost_is_what_the_budget_says(name):
    model = Regression(dim=30)  # so that Lanczos is not done early
    probe, budget = Counting(model, loss=Regression.loss), BUDGETS[name]
    measure(probe, draws(model, 100, 4, seed=0), budget=name)
    assert 0.5 * budget.gradients < probe.cost <= budget.gradients
    assert probe.calls["loss"] == 3 * budget.blocks
    row = next(line for line in measure.__doc__.splitlines() if line.strip().startswith(f"| {name} |"))
    assert f"at most {budget.gradients} " in row
    assert f"at most {budget.search * budget.products + 3 * budget.blocks * (3 + budget.modes)} " in row


def test_the_cost_of_a_search_is_spent_where_it_does_not_converge(monkeypatch):
    monkeypatch.setitem(BUDGETS, "tiny", Budget(search=2, products=2, blocks=2, modes=1))
    model = Regression(dim=30)
    probe = Counting(model, loss=Regression.loss)
    measure(probe, draws(model, 8, 4, seed=0), budget="tiny")
    assert probe.cost == BUDGETS["tiny"].gradients


def test_noise_and_population():
    """A whole table in one go, without replacement: the estimate of |∇L|² has no error left."""
    model = Regression(rows=14 * 5)
    order = torch.randperm(70, generator=torch.Generator().manual_seed(0)).split(5)
    found = measure(regression_probe(model), order, population=70)
    free = measure(regression_probe(model), order)
    assert found.squared_gradient.value != free.squared_gradient.value
    width = [each.squared_gradient.high - each.squared_gradient.low for each in (found, free)]
    assert width[0] < 0.7 * width[1]


def test_it_feeds_the_verdict(regression):
    _, found = regression
    far_below = assess(found[0], Setting(lr=1e-3, batch_size=4, momentum=0.9, steps=100))
    assert far_below.verdict == "noise dominates"


def test_the_run_is_left_as_it_was():
    torch.manual_seed(0)
    net = NormNet().double().train()
    probe, batches = Probe(net, loss=squared_error), [rows(2, seed=seed) for seed in range(14)]
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    state = torch.random.get_rng_state()
    measure(probe, batches)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in net.parameters())
    for name, tensor in net.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)
    assert all(module.training for module in net.modules())


def test_what_cannot_be_measured_on():
    model = Regression()
    probe = regression_probe(model)
    with pytest.raises(UserError, match=r"13 micro-batches are too few.*'economy' needs 14"):
        measure(probe, draws(model, 13, 4, seed=0))
    with pytest.raises(UserError, match=r"27 micro-batches are too few.*'full' needs 28"):
        measure(probe, draws(model, 27, 4, seed=0), budget="full")
    with pytest.raises(UserError, match="from 3 to 4 examples"):
        measure(probe, [*draws(model, 13, 4, seed=0), torch.arange(3)])
    with pytest.raises(UserError, match=r"Unknown budget: 'lavish'. Allowed: economy, full"):
        measure(probe, draws(model, 14, 4, seed=0), budget="lavish")
    with pytest.raises(UserError, match="Cannot tell how many examples"):
        measure(probe, ["text"] * 14)
    norm = Probe(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double(), loss=squared_error)
    with pytest.raises(UserError, match="Micro-batches of 1 examples are too small"):
        measure(norm, [rows(2, count=1)] * 14)


def test_a_loss_that_is_not_finite():
    bowl = Bowl(torch.eye(2).double(), torch.tensor([torch.inf, 0.0]).double())
    with pytest.raises(UserError, match="The loss is nan"):
        measure(Probe(bowl), [{"shift": torch.zeros(2).double()}] * 14)
