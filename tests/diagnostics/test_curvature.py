"""Eigenvalues against dense ones; curvature terms exact on given batches, and right as often as they say."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from known_problems import Bowl, Regression, check_coverage, dense_hessian, dense_vector, probes, regression_probe

from hf_momentum.diagnostics.curvature import (
    curvature_from_products,
    curvatures_along,
    directional_sharpness,
    measure_curvature,
    measure_modes,
    top_eigenpairs,
)
from hf_momentum.diagnostics.probe import Probe
from hf_momentum.errors import UserError

CASES = probes()
SIZE = 32


def bowl(*curvatures: float) -> Probe:
    values = torch.tensor(curvatures).double()
    return Probe(Bowl(torch.diag(values), torch.ones_like(values)))


def no_shift(probe: Probe) -> dict:
    return {"shift": torch.zeros_like(probe.parameters[0]).detach()}


def draws(count: int, seed: int, size: int = SIZE) -> torch.Tensor:
    return torch.randint(400, (count, size), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", CASES)
def test_the_largest_eigenvalues_are_the_dense_ones(name):
    probe, batch = CASES[name]
    values, vectors = torch.linalg.eigh(dense_hessian(probe, batch))
    for seed in range(3):
        found = top_eigenpairs(probe, [batch], count=2, seed=seed)
        assert found.is_converged
        np.testing.assert_allclose(found.values, values.flip(0)[:2], atol=0.01 * float(values[-1]))
    found = top_eigenpairs(probe, [batch], tolerance=1e-12)
    assert found.values[0] == pytest.approx(float(values[-1]))
    assert abs(float(dense_vector(found.vectors[0]) @ vectors[:, -1])) == pytest.approx(1)


def test_the_largest_is_the_algebraically_largest():
    probe = bowl(1.0, -50.0, 2.0, 0.5, -3.0)
    assert top_eigenpairs(probe, [no_shift(probe)]).values[0] == pytest.approx(2, rel=0.01)


def test_repeated_eigenvalues_are_found_though_the_krylov_space_ends():
    probe = bowl(1.0, 1.0, 1.0, 1.0)
    found = top_eigenpairs(probe, [no_shift(probe)], count=3)
    np.testing.assert_allclose(found.values, [1, 1, 1])
    vectors = torch.stack([dense_vector(v) for v in found.vectors])
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(3).double())


def test_a_flat_loss_has_sharpness_0():
    probe = bowl(0.0, 0.0)
    found = top_eigenpairs(probe, [no_shift(probe)])
    assert found.values == (0.0,) and found.is_converged


def test_several_batches_give_the_hessian_of_their_mean_loss():
    model = Regression()
    probe = regression_probe(model)
    whole = top_eigenpairs(probe, [torch.arange(40)], tolerance=1e-10)
    parts = top_eigenpairs(probe, torch.arange(40).split(8), tolerance=1e-10)
    assert parts.values[0] == pytest.approx(whole.values[0])


def test_too_few_products_are_told():
    probe = bowl(*np.linspace(1, 2, 60))
    found = top_eigenpairs(probe, [no_shift(probe)], tolerance=1e-6, max_products=4)
    assert not found.is_converged and found.products == 4
    assert found.errors[0] > 1e-6 and found.values[0] < 2


def dense_batches(model: Regression, batches: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and Hessian of each batch."""
    gradients = model.per_example_gradients()[batches].mean(1)
    inputs = model.inputs[batches]
    return gradients.numpy(), (inputs.transpose(1, 2) @ inputs / batches.shape[1]).numpy()


def test_measuring_equals_the_formulas_on_the_batches_gradients_and_hessians():
    model = Regression()
    batches = draws(7, seed=1)
    g, h = dense_batches(model, batches)
    noise, curvature = [], []
    for block in (0, 3):  # the seventh is left over
        triples = [(block + i, block + (i + 1) % 3, block + (i + 2) % 3) for i in range(3)]
        d, s = ([g[i] + sign * g[j] for i, j, _ in triples] for sign in (-1, 1))
        dhd, shs = ([v @ h[k] @ v for v, (_, _, k) in zip(vectors, triples, strict=True)] for vectors in (d, s))
        noise.append(np.mean(dhd) / 2)
        curvature.append((np.mean(shs) - np.mean(dhd)) / 4)
    found = measure_curvature(regression_probe(model), batches, SIZE)
    assert found.noise_curvature.value == pytest.approx(SIZE * np.mean(noise))
    assert found.gradient_curvature.value == pytest.approx(np.mean(curvature))
    assert found.gradient_curvature.standard_error == pytest.approx(np.std(curvature, ddof=1) / 2**0.5)
    assert found.noise_scale.value == pytest.approx(SIZE * np.mean(noise) / np.mean(curvature))
    own = np.mean([g[i] @ h[i] @ g[i] for i in range(6)]) / np.mean((g[:6] ** 2).sum(1))
    assert found.batch_sharpness.value == pytest.approx(own)


def truth_of(model: Regression) -> dict[str, float]:
    truth = model.truth()
    gradient, hessian, covariance = truth["gradient"], truth["hessian"], truth["covariance"]
    return {
        "gradient_curvature": float(gradient @ hessian @ gradient),
        "noise_curvature": float((hessian @ covariance).trace()),
        "noise_scale": float((hessian @ covariance).trace() / (gradient @ hessian @ gradient)),
    }


def test_intervals_of_the_curvature_terms_cover_the_truth_as_often_as_they_say():
    model = Regression()
    probe, truth = regression_probe(model), truth_of(model)
    g, h = dense_batches(model, draws(100_000, seed=99))
    truth["batch_sharpness"] = float(np.einsum("bi,bij,bj->b", g, h, g).mean() / (g**2).sum(1).mean())
    found = [measure_curvature(probe, draws(36, seed), SIZE) for seed in range(200)]
    for name, value in truth.items():
        ratio = name in {"noise_scale", "batch_sharpness"}
        check_coverage([getattr(f, name) for f in found], value, unbiased=not ratio)


def test_a_batchs_own_hessian_would_be_biased():
    model = Regression()
    g, h = dense_batches(model, draws(20_000, seed=5, size=2))
    own = np.einsum("bi,bij,bj->b", g, h, g).mean() - np.einsum("bi,ij,bj->b", g, h.mean(0), g).mean()
    assert own > 0.5 * truth_of(model)["noise_curvature"] / 2


def test_modes_cover_the_truth_as_often_as_they_say():
    model = Regression()
    probe, truth = regression_probe(model), model.truth()
    pairs = top_eigenpairs(probe, [torch.arange(400)], count=2, tolerance=1e-10)
    found = [measure_modes(probe, draws(24, seed), pairs, SIZE) for seed in range(200)]
    for index in range(2):
        u = dense_vector(pairs.vectors[index])
        modes = [f[index] for f in found]
        check_coverage([m.gradient_squared for m in modes], float((u @ truth["gradient"]) ** 2))
        check_coverage([m.noise for m in modes], float(u @ truth["covariance"] @ u))
    assert {m.curvature for m in modes} == {None}
    tops, u = [f[0] for f in found], dense_vector(pairs.vectors[0])
    check_coverage([m.curvature for m in tops], float(u @ truth["hessian"] @ u))
    per_example = (model.inputs @ u).square()
    check_coverage([m.curvature_variance for m in tops], float(per_example.var(correction=0)) / SIZE)


def test_directional_sharpness_does_not_depend_on_the_directions_length():
    model = Regression()
    probe, batches = regression_probe(model), draws(5, seed=2)
    direction = torch.tensor([1.0, 2.0, 0.0, -1.0]).double()
    _, h = dense_batches(model, batches)
    expected = np.einsum("i,bij,j->b", direction, h, direction) / 6
    np.testing.assert_allclose(curvatures_along(probe, batches, [[10 * direction]])[:, 0], expected)
    assert directional_sharpness(probe, batches, [direction]).value == pytest.approx(expected.mean())


def test_bad_input_is_refused():
    probe = regression_probe(Regression())
    with pytest.raises(UserError, match="2 micro-batches are too few"):
        measure_curvature(probe, draws(2, seed=0), SIZE)
    with pytest.raises(UserError, match="1 pieces of data are too few"):
        measure_curvature(probe, draws(3, seed=0), SIZE)
    with pytest.raises(UserError, match="Invalid batch_size"):
        curvature_from_products(np.ones((2, 3)), np.ones((2, 3, 3, 3)), 1.5)
    with pytest.raises(UserError, match="Cannot find 5 of 4 eigenvalues"):
        top_eigenpairs(probe, [torch.arange(10)], count=5)
    with pytest.raises(UserError, match="finite and not 0"):
        directional_sharpness(probe, draws(2, seed=0), [torch.zeros(4).double()])
    with pytest.raises(UserError, match="no batches"):
        top_eigenpairs(probe, [])


def _rank(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}/rendezvous", rank=rank, world_size=2)
    torch.save(_all_of(draws(12, seed=3)[6 * rank : 6 * rank + 6]), f"{store}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads outlive a forked process's normal end


def _all_of(batches: torch.Tensor) -> tuple:
    probe = regression_probe(Regression())
    pairs = top_eigenpairs(probe, batches, tolerance=1e-10)
    return pairs.values, measure_curvature(probe, batches, SIZE), measure_modes(probe, batches, pairs, SIZE)


def test_two_ranks_measure_what_one_does(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2))
    assert first == second
    values, terms, modes = _all_of(draws(12, seed=3))
    np.testing.assert_allclose(first[0], values)
    assert first[1].noise_scale.value == pytest.approx(terms.noise_scale.value)
    assert first[2][0].noise.value == pytest.approx(modes[0].noise.value)
    assert first[2][0].curvature_variance.low == pytest.approx(modes[0].curvature_variance.low)
