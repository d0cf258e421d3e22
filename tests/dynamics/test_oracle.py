"""Noisy gradient oracles: mean, covariance, shared draws, and what they refuse."""

import itertools

import pytest
import torch

from hf_momentum.dynamics.oracle import LabelNoiseOracle, MinibatchOracle, NoisyGradientOracle, covariance_root
from hf_momentum.dynamics.problems import LinearRegression, Quadratic
from hf_momentum.dynamics.valleys import ExponentialValley, QuadraticValley
from hf_momentum.errors import UserError

POINT = torch.tensor([0.7, -1.2], dtype=torch.float64)
FULL = torch.tensor([[2.0, 0.6], [0.6, 0.5]], dtype=torch.float64)
SINGULAR = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
BOWL = Quadratic(torch.tensor([[1.0, 0.3], [0.3, 2.0]], dtype=torch.float64), minimiser=[0.5, -0.5])
REGRESSION = LinearRegression(
    [[1.0, 0.5], [-0.3, 2.0], [0.8, -1.0], [0.1, 0.4], [-1.5, 0.2]], [1.0, -1.0, 0.5, 2.0, 0.0]
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def by_position(x):
    return x.square() + 0.1


def matrix_by_position(x):
    return x[:, :, None] * x[:, None, :] + 0.2 * torch.eye(2, dtype=x.dtype)


ORACLES = {
    "gaussian, number": NoisyGradientOracle(BOWL, 0.4, scale=1.5),
    "gaussian, diagonal": NoisyGradientOracle(BOWL, torch.tensor([0.4, 3.0], dtype=torch.float64), scale=0.5),
    "gaussian, matrix": NoisyGradientOracle(BOWL, FULL, scale=2.0),
    "gaussian, singular": NoisyGradientOracle(BOWL, SINGULAR),
    "rademacher, matrix": NoisyGradientOracle(BOWL, FULL, "rademacher", 0.7),
    "diagonal of x": NoisyGradientOracle(QuadraticValley(), by_position, scale=0.3),
    "matrix of x": NoisyGradientOracle(QuadraticValley(), matrix_by_position, "rademacher", scale=1.3),
    "bare function": NoisyGradientOracle(lambda x: x.cos().prod(-1), FULL, dim=2),
    "labels": LabelNoiseOracle(ExponentialValley(), 2.0, scale=0.8),
    "labels, gaussian": LabelNoiseOracle(REGRESSION, 0.5, "gaussian"),
    "mini-batch": MinibatchOracle(REGRESSION, 3),
    "mini-batch, no replacement": MinibatchOracle(REGRESSION, 3, replacement=False),
    "svag": NoisyGradientOracle(BOWL, FULL).svag(5.0),
    "svag of mini-batches": MinibatchOracle(REGRESSION, 2).svag(3.0),
    "gaussian twin of mini-batches": MinibatchOracle(REGRESSION, 2, replacement=False).gaussian(),
    "gaussian twin of labels": LabelNoiseOracle(ExponentialValley(), 2.0).gaussian(),
    "gaussian twin of svag": NoisyGradientOracle(BOWL, FULL, "rademacher").svag(4).gaussian(),
}


@pytest.mark.parametrize("name", ORACLES)
def test_mean_and_covariance(name):
    oracle, paths = ORACLES[name], 40_000
    x = POINT.expand(paths, 2)
    gradients = oracle.sample(x, generator())
    noise = gradients - oracle.problem.gradient(x[:1])
    products = noise[:, :, None] * noise[:, None, :]
    target = oracle.scale**2 * oracle.covariance(x[:1])[0]
    assert ((noise.mean(0)).abs() <= 4 * noise.std(0) / paths**0.5 + 1e-12).all()
    assert ((products.mean(0) - target).abs() <= 4 * products.std(0) / paths**0.5 + 1e-12).all()
    assert target.diagonal().max() > 0


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_scale_of_mini_batches_is_exact(batch_size, replacement):
    oracle = MinibatchOracle(REGRESSION, batch_size, replacement)
    batches = (
        itertools.product(range(5), repeat=batch_size) if replacement else itertools.combinations(range(5), batch_size)
    )
    weights = torch.stack([torch.bincount(torch.tensor(b), minlength=5) / batch_size for b in batches]).double()
    gradients = oracle(POINT.expand(len(weights), 2), weights)
    torch.testing.assert_close(gradients.mean(0), REGRESSION.gradient(POINT[None])[0])
    torch.testing.assert_close(gradients.T.cov(correction=0), oracle.scale**2 * oracle.covariance(POINT[None])[0])


def test_mini_batch_draws():
    x = POINT.expand(1000, 2)
    for oracle, largest in ((MinibatchOracle(REGRESSION, 4), 1.0), (MinibatchOracle(REGRESSION, 4, False), 0.25)):
        weights = oracle.draw(x, generator())
        torch.testing.assert_close(weights.sum(1), torch.ones(1000).double())
        assert weights.max() == largest
    whole = MinibatchOracle(REGRESSION, 5, replacement=False)
    assert whole.scale == 0
    torch.testing.assert_close(whole.sample(x, generator()), REGRESSION.gradient(x))


def test_svag_covariance_is_exactly_ell_times():
    base = MinibatchOracle(REGRESSION, 1)
    oracle = base.svag(3.7)
    first, second = torch.cartesian_prod(torch.arange(5), torch.arange(5)).T
    one_hot = torch.eye(5).double()
    gradients = oracle(POINT.expand(25, 2), (one_hot[first], one_hot[second]))
    torch.testing.assert_close(gradients.mean(0), REGRESSION.gradient(POINT[None])[0])
    torch.testing.assert_close(gradients.T.cov(correction=0), 3.7 * base.covariance(POINT[None])[0])
    assert oracle.scale**2 == pytest.approx(3.7 * base.scale**2)


def test_svag_of_one_is_the_first_draw():
    oracle, x = NoisyGradientOracle(BOWL, FULL), POINT.expand(7, 2)
    torch.testing.assert_close(oracle.svag(1).sample(x, generator()), oracle.sample(x, generator()))


@pytest.mark.parametrize("name", ORACLES)
def test_draws_are_shared_and_kept(name):
    oracle = ORACLES[name]
    x, elsewhere = POINT.expand(6, 2), torch.randn(6, 2, generator=generator(1), dtype=torch.float64)
    draw, again = oracle.draw(x, generator(3)), oracle.draw(elsewhere, generator(3))
    torch.testing.assert_close(draw, again, rtol=0, atol=0)
    expected = oracle(x, draw).clone()
    torch.testing.assert_close(draw, again, rtol=0, atol=0)  # a call leaves the draw alone
    torch.testing.assert_close(oracle(x, draw, torch.empty(6, 2).double()), expected, rtol=0, atol=0)
    reused = oracle.draw(x, generator(3), oracle.draw(x, generator(9)))
    torch.testing.assert_close(reused, again, rtol=0, atol=0)


def test_laws():
    oracle, x = NoisyGradientOracle(Quadratic([0.0, 0.0]), 4.0, "rademacher"), POINT.expand(50, 2)
    assert set(oracle.sample(x, generator()).unique().tolist()) == {-2.0, 2.0}
    normals = NoisyGradientOracle(Quadratic([0.0])).draw(torch.zeros(400_000, 1).double(), generator())
    assert normals.isfinite().all()
    for degree, moment, spread in ((2, 1, 2), (4, 3, 96), (6, 15, 10170)):
        assert abs(normals.pow(degree).mean() - moment) < 4 * (spread / 4e5) ** 0.5
    assert (normals.abs() > 4).double().mean().item() == pytest.approx(6.33e-5, rel=0.8)


def test_labels_give_the_hessian_on_the_valley():
    valley, x = ExponentialValley(), torch.tensor([[0.0, 1.3], [0.0, -0.4]]).double()
    torch.testing.assert_close(LabelNoiseOracle(valley, 3.0).covariance(x), 3 * valley.hessian(x))


def test_other_dtype_stays():
    x = POINT.float().expand(5, 2)
    for oracle in (
        NoisyGradientOracle(BOWL.to(torch.float32), FULL),
        MinibatchOracle(REGRESSION.to(torch.float32), 2),
    ):
        assert oracle.sample(x, generator()).dtype == torch.float32


def test_square_root():
    for matrix in (FULL, SINGULAR, torch.zeros(2, 2).double()):
        root = covariance_root(matrix, diagonal=False)
        torch.testing.assert_close(root @ root, matrix)
        torch.testing.assert_close(root, root.T)


BAD_COVARIANCES = [-0.1, [1.0, -0.1], [[1.0, 2.0], [2.0, 1.0]], float("nan"), float("inf")]


@pytest.mark.parametrize("covariance", BAD_COVARIANCES)
def test_covariance_must_be_positive_semidefinite(covariance):
    with pytest.raises(UserError, match="not positive semi-definite"):
        NoisyGradientOracle(BOWL, torch.tensor(covariance).double())


@pytest.mark.parametrize("covariance", [lambda x: x, lambda x: -matrix_by_position(x)])
def test_covariance_by_position_is_checked_where_it_is_used(covariance):
    oracle = NoisyGradientOracle(BOWL, covariance)
    with pytest.raises(UserError, match="not positive semi-definite"):
        oracle.sample(POINT.expand(3, 2), generator())


BAD_ARGUMENTS = [
    (lambda: NoisyGradientOracle(BOWL, torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "not symmetric"),
    (lambda: NoisyGradientOracle(BOWL, torch.ones(3)), "does not fit 2 parameters"),
    (lambda: NoisyGradientOracle(BOWL, 1.0, "gausian"), "Did you mean 'gaussian'"),
    (lambda: NoisyGradientOracle(BOWL, 1.0, scale=-1.0), "Invalid scale"),
    (lambda: NoisyGradientOracle(lambda x: x.sum(-1)), "needs dim"),
    (lambda: LabelNoiseOracle(BOWL), "LeastSquares"),
    (lambda: MinibatchOracle(BOWL, 2), "FiniteSum"),
    (lambda: MinibatchOracle(REGRESSION, 0), "Invalid batch_size"),
    (lambda: MinibatchOracle(REGRESSION, 6, replacement=False), "in 1 … 5"),
    (lambda: NoisyGradientOracle(BOWL).svag(0.5), "Invalid ell"),
]


@pytest.mark.parametrize(("build", "message"), BAD_ARGUMENTS)
def test_bad_arguments(build, message):
    with pytest.raises(UserError, match=message):
        build()
