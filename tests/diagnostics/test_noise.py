"""Estimates of gradient and noise: exact over all draws, right as often as they say, the same on several ranks."""

import itertools
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from known_problems import Regression, check_coverage, regression_probe
from scipy import stats

from hf_momentum.diagnostics.estimates import Jackknifed, fieller, mean_of, pair_statistics
from hf_momentum.diagnostics.noise import measure_noise, noise_from_products
from hf_momentum.errors import UserError

RANDOM = np.random.default_rng(0)


def products(gradients: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return (gradients**2).sum(1), gradients @ gradients.sum(0)


def reference_pairs(vectors: np.ndarray) -> tuple[float, float]:
    """Means over all pairs of different vectors: `x_i·x_j` and `½|x_i − x_j|²`."""
    pairs = list(itertools.combinations(vectors, 2))
    return float(np.mean([a @ b for a, b in pairs])), float(np.mean([0.5 * (a - b) @ (a - b) for a, b in pairs]))


def test_pair_statistics_and_their_left_out_values_are_means_over_pairs():
    vectors = RANDOM.normal(size=(7, 3)) + 1
    found = pair_statistics(*products(vectors))
    for statistic, expected in zip(found, reference_pairs(vectors), strict=True):
        assert statistic.value == pytest.approx(expected)
    for i in range(7):
        for statistic, expected in zip(found, reference_pairs(np.delete(vectors, i, 0)), strict=True):
            assert statistic.left_out[i] == pytest.approx(expected)


def test_without_skewness_the_interval_of_a_mean_is_students():
    samples = np.array([-3.0, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0])
    found = mean_of(samples).estimate()
    np.testing.assert_allclose([found.low, found.high], stats.t.interval(0.95, 8, 1.0, stats.sem(samples)))
    assert (found.value, found.standard_error, found.n) == (1.0, pytest.approx(stats.sem(samples)), 9)


def test_the_ends_of_a_skewed_interval_transform_to_students():
    samples = RANDOM.exponential(size=12)
    found, skewness = mean_of(samples).estimate(), stats.skew(samples)
    for end, t in ((found.low, stats.t.ppf(0.975, 11)), (found.high, stats.t.ppf(0.025, 11))):
        x = (samples.mean() - end) / samples.std(ddof=1)
        transformed = x + skewness * x**2 / 3 + skewness**2 * x**3 / 27 + skewness / 72
        assert np.sqrt(12) * transformed == pytest.approx(t)
    assert found.high - found.value > found.value - found.low


def test_the_jackknife_is_no_further_from_the_sampling_variance_than_it_should_be():
    draws = np.random.default_rng(1).normal(size=(2000, 12, 4)) + 1.0
    found = [pair_statistics(*products(vectors))[0] for vectors in draws]
    jackknife = np.mean([f.covariance(f) for f in found])
    assert jackknife == pytest.approx(np.var([f.value for f in found]), rel=0.15)


def test_an_interval_known_not_to_be_negative_ends_at_0():
    scattered = Jackknifed(1.0, np.array([-2.0, 1.0, 4.0]))
    assert scattered.estimate().low < 0 == scattered.estimate(nonnegative=True).low


def test_fiellers_ends_are_where_the_line_is_t_standard_errors_from_0():
    samples = RANDOM.normal(loc=(3.0, 2.0), size=(15, 2))
    numerator, denominator = mean_of(samples[:, 0]), mean_of(samples[:, 1])
    found = fieller(numerator, denominator)
    assert found.is_decided and found.low < found.value < found.high
    for end in (found.low, found.high):
        line = samples[:, 0] - end * samples[:, 1]
        assert abs(line.mean()) / stats.sem(line) == pytest.approx(stats.t.ppf(0.975, 14))


def test_a_ratio_whose_denominator_may_be_0_is_undecided():
    samples = np.random.default_rng(2).normal(loc=(3.0, 0.1), size=(15, 2))
    numerator, denominator = mean_of(samples[:, 0]), mean_of(samples[:, 1])
    assert denominator.estimate().low < 0 < denominator.estimate().high
    found = fieller(numerator, denominator)
    assert not found.is_decided and (found.low, found.high) == (-np.inf, np.inf)
    bounded = fieller(numerator, denominator, nonnegative=True)
    line = samples[:, 0] - bounded.low * samples[:, 1]
    assert bounded.low > 0 and bounded.high == np.inf
    assert line.mean() / stats.sem(line) == pytest.approx(stats.t.ppf(0.975, 14))


def test_a_negative_denominator_gives_no_ratio():
    negative = Jackknifed(-1.0, np.array([-1.5, -1.0, -0.5]))
    assert fieller(mean_of([1.0, 2.0, 3.0]), negative, nonnegative=True).value == np.inf
    assert np.isnan(fieller(mean_of([1.0, 2.0, 3.0]), Jackknifed(0.0, negative.left_out + 1)).value)


@pytest.mark.parametrize(("population", "size", "count"), [(6, 1, 4), (6, 2, 3)])
def test_without_replacement_the_mean_over_all_draws_is_the_truth(population, size, count):
    gradients = np.random.default_rng(3).normal(size=(population, 2)) + 1
    found = []
    for order in itertools.permutations(range(population)):
        batches = gradients[list(order[: size * count])].reshape(count, size, 2).mean(1)
        found.append(noise_from_products(*products(batches), size, population))
    mean = gradients.mean(0)
    assert np.mean([f.gradient_squared_norm.value for f in found]) == pytest.approx(mean @ mean)
    assert np.mean([f.noise_trace.value for f in found]) == pytest.approx(gradients.var(0).sum())


def test_the_whole_population_leaves_no_doubt_about_its_gradient():
    gradients = RANDOM.normal(size=(8, 3))
    found = noise_from_products(*products(gradients), 1, 8).gradient_squared_norm
    assert found.value == pytest.approx(gradients.mean(0) @ gradients.mean(0))
    assert found.low == pytest.approx(found.high) == pytest.approx(found.value)


def test_measuring_equals_the_formulas_on_the_batches_gradients():
    model = Regression()
    batches = list(torch.arange(40).split(5))
    gradients = np.stack([model.per_example_gradients()[batch].mean(0).numpy() for batch in batches])
    found = measure_noise(regression_probe(model), iter(batches), 5)
    squared, noise = reference_pairs(gradients)
    assert found.gradient_squared_norm.value == pytest.approx(squared)
    assert found.noise_trace.value == pytest.approx(5 * noise)
    assert found.noise_scale.value == pytest.approx(5 * noise / squared)


def test_intervals_cover_the_truth_as_often_as_they_say():
    model = Regression()
    probe, truth = regression_probe(model), model.truth()
    squared, trace = float(truth["gradient"].square().sum()), float(truth["covariance"].trace())
    expected = {"gradient_squared_norm": squared, "noise_trace": trace, "noise_scale": trace / squared}
    generator = torch.Generator().manual_seed(0)
    found = [
        measure_noise(probe, torch.randint(len(model.inputs), (16, 32), generator=generator), 32) for _ in range(200)
    ]
    for name, value in expected.items():
        check_coverage([getattr(f, name) for f in found], value, unbiased=name != "noise_scale")


def test_too_little_or_unusable_data_is_refused():
    with pytest.raises(UserError, match="2 pieces of data are too few"):
        noise_from_products(np.ones(2), np.ones(2), 4)
    with pytest.raises(UserError, match="1 of 4 measured products are not finite"):
        noise_from_products(np.array([1, np.inf, 1, 1]), np.ones(4), 4)
    with pytest.raises(UserError, match="12 examples cannot be drawn without replacement from 10"):
        noise_from_products(np.ones(3), np.ones(3), 4, population=10)
    with pytest.raises(UserError, match="Invalid batch_size: 0"):
        noise_from_products(np.ones(3), np.ones(3), 0)
    with pytest.raises(UserError, match="no batches"):
        measure_noise(regression_probe(Regression()), [], 4)


def _rank(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}/rendezvous", rank=rank, world_size=2)
    batches = torch.arange(40).split(5)
    mine = batches[:3] if rank == 0 else batches[3:]  # of unequal number
    torch.save(measure_noise(regression_probe(Regression()), mine, 5), f"{store}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads outlive a forked process's normal end


def test_two_ranks_measure_what_one_does(tmp_path):
    context = torch.multiprocessing.get_context("fork")
    ranks = [context.Process(target=_rank, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    alone = measure_noise(regression_probe(Regression()), torch.arange(40).split(5), 5)
    assert found[0] == found[1]
    assert found[0].noise_scale.value == pytest.approx(alone.noise_scale.value)
    assert found[0].noise_scale.low == pytest.approx(alone.noise_scale.low)
    assert found[0].gradient_squared_norm.n == 8
