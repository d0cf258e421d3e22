import dataclasses
import math
from functools import lru_cache

import numpy as np
import pytest
import torch
from known_measurements import BETA, measurements, setting
from scipy import stats

from hf_momentum.diagnostics.measurements import Interval, Measurements, Mode
from hf_momentum.diagnostics.regime import (
    CURVATURE,
    EFFECT_FLOOR,
    NOISE,
    UNDECIDED,
    assess,
    decide,
    predicted_ratios,
)
from hf_momentum.dynamics.iterates import iterates
from hf_momentum.dynamics.oracle import MinibatchOracle
from hf_momentum.dynamics.problems import LinearRegression
from hf_momentum.dynamics.stability import critical_lr
from hf_momentum.errors import UserError
from hf_momentum.results.ranking import paired_auc_interval, roc_auc


def test_the_rule():
    def number(low, high):
        return Interval((low + high) / 2, low, high)

    far, near, open_ = number(0.1, 0.5), number(0.6, 0.9), number(0.4, 0.6)
    small, large, unsure = number(0.0, 0.1), number(0.2, 3.0), number(0.05, 0.2)
    expected = {
        (far, large): NOISE,
        (near, small): NOISE,
        (far, unsure): NOISE,
        (open_, small): NOISE,
        (near, large): CURVATURE,
        (open_, large): UNDECIDED,
        (near, unsure): UNDECIDED,
        (open_, unsure): UNDECIDED,
    }
    assert {key: decide(*key) for key in expected} == expected
    assert decide(near, large, effect_floor=3.0) == NOISE


def test_terms_of_the_descent_lemma_and_their_intervals():
    report = assess(measurements(spread=0.1), setting(0.5))
    for term, value in (
        (report.descent, 0.5 * 0.02),
        (report.noise, 0.5 * 0.25 * 1.1 / 10),
        (report.curvature, 0.5 * 0.25 * 0.011),
        (report.noise_ratio, 100 / 10),
        (report.h, 0.5),
        (report.difference, 0.25 * BETA / (4 * (1 + BETA)) * 1.1 / 10),
    ):
        assert (term.value, term.low, term.high) == pytest.approx((value, 0.9 * value, 1.1 * value))
    assert report.noise.value / report.curvature.value == pytest.approx(report.noise_ratio.value)


def test_limits_have_the_curvature_noise_of_the_batch_size():
    measured = measurements(variance=(4.0, 0.5))
    for batch in (1, 4, 64):
        report = assess(measured, setting(0.1, batch))
        for mode, v in zip(report.mode_limits, (4.0, 0.5), strict=True):
            assert mode.sgd == pytest.approx(critical_lr(mode.curvature, 0.0, v / batch))
            assert mode.sgdm == pytest.approx(critical_lr(mode.curvature, BETA, v / batch))
        assert report.sgd_limit.value == min(mode.sgd for mode in report.mode_limits)
        assert report.sgdm_limit.value == min(mode.sgdm for mode in report.mode_limits)
        assert report.limit_fraction.value == pytest.approx(0.1 / report.sgd_limit.value)


def test_exact_inputs_give_exact_outputs():
    report = assess(measurements(), setting(1.5))
    for each in (report.sgd_limit, report.sgdm_limit, report.log_ratio, report.score, report.limit_fraction):
        assert each.low == each.value == each.high


def test_score_at_stationarity_is_that_of_the_closed_form():
    report = assess(measurements(loss=0.0), setting(1.5, steps=100_000))
    h, kappa = np.array([1.5, 0.15]), (1 - BETA) / (1 + BETA)
    assert report.log_ratio.value == pytest.approx(math.log((1 / (2 - h)).sum() / (1 / (2 - kappa * h)).sum()))
    small = assess(measurements(loss=0.0), setting(0.01, steps=10**6))
    exact = 0.5 * 0.01 / 10 * sum(1 / (2 - h) - 1 / (2 - kappa * h) for h in (0.01, 0.001))
    assert small.difference.value == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(
    ("lr", "verdict"), [(0.01, NOISE), (0.9, NOISE), (1.5, CURVATURE), (5.0, CURVATURE), (60.0, NOISE)]
)
def test_verdict_over_the_learning_rate(lr, verdict):
    report = assess(measurements(loss=0.1), setting(lr, momentum_bytes=3 * 2**30))
    assert report.verdict == verdict
    words = " ".join(report.sentences)
    assert ("saves 3 GiB" in words) == (verdict == NOISE)
    assert ("SGDM is not stable either" in words) == (lr > 38)
    assert f"below learning rate {report.matching_lr:.3g}" in words or verdict == NOISE


def test_small_learning_rates_are_marginal_whatever_the_ratio():
    report = assess(measurements(gradient=(9.0, 0.1), noise=(1e-3, 1e-3), loss=10.0), setting(0.01, 64))
    assert report.noise_ratio.high < 1
    assert report.verdict == NOISE
    assert "too small here for momentum" in report.sentences[-1]


def test_small_batches_leave_momentum_nothing_to_stabilise():
    measured = measurements(variance=(20.0, 0.0), gradient=(1e-6, 0.0), noise=(1.0, 0.0), loss=0.0)
    lrs = {batch: 0.9 * critical_lr(1.0, 0.0, 20.0 / batch) for batch in (1, 1000)}
    small, large = (assess(measured, setting(lr, batch, steps=20_000)) for batch, lr in lrs.items())
    assert small.limit_fraction.value == pytest.approx(large.limit_fraction.value) == pytest.approx(0.9)
    assert small.sgdm_limit.value / small.sgd_limit.value < 1.1
    assert large.sgdm_limit.value / large.sgd_limit.value > 10
    assert small.score.value == pytest.approx(math.log(1.4), abs=0.01)
    assert large.score.value == pytest.approx(math.log(9.5), abs=0.05)


def test_below_the_matching_lr_the_verdict_is_noise_and_above_it_curvature():
    measured = measurements(loss=0.1)
    bound = assess(measured, setting(1.9)).matching_lr
    assert 1.0 <= bound < 1.9
    assert bound == pytest.approx(assess(measured, setting(0.01)).matching_lr, rel=0.02)
    assert assess(measured, setting(0.99 * bound)).verdict == NOISE
    assert assess(measured, setting(1.02 * bound)).verdict == CURVATURE


def test_at_the_matching_batch_the_verdict_is_noise():
    # Near its limit SGD still descends along the first mode, until smaller batches hide that in the second's noise.
    measured = measurements(curvature=(1.0, 0.01), gradient=(1.0, 0.0), noise=(1e-3, 500.0), loss=0.5)
    report = assess(measured, setting(1.999, 2**20, steps=400))
    assert report.verdict == CURVATURE
    assert 1 <= report.matching_batch < 2**20
    assert f"batch size {report.matching_batch:,}" in report.sentences[0]
    assert assess(measured, setting(1.999, report.matching_batch, steps=400)).verdict == NOISE
    assert assess(measurements(), setting(1.8)).matching_batch is None


def test_an_open_condition_is_undecided_and_says_what_would_decide_it():
    open_limit = assess(measurements(loss=0.01, spread=0.3), setting(1.15))
    assert open_limit.verdict == UNDECIDED
    assert open_limit.sentences[0] == "Undecided at this sample size."
    times = [word for word in " ".join(open_limit.sentences).split() if word.isdigit() and int(word) > 1]
    assert times
    assert "times as many micro-batches would decide it" in " ".join(open_limit.sentences)
    assert assess(measurements(loss=0.01, spread=0.01), setting(1.15)).verdict == CURVATURE
    boundary = measurements(loss=0.01, spread=0.3)
    assert "no practical number" in " ".join(assess(boundary, setting(1.0001)).sentences)


def test_sgd_ahead_is_said():
    ahead = measurements(curvature=(1.0,), gradient=(1.0,), noise=(0.0,), variance=(0.0,), loss=0.5)
    report = assess(ahead, setting(1.2, steps=30))
    assert report.log_ratio.value < 0
    assert "SGD is predicted to end lower" in report.sentences[0]


def test_what_the_modes_leave_is_pooled():
    part = dataclasses.replace(measurements(), modes=measurements().modes[:1])
    whole, pooled = (assess(each, setting(1.5)) for each in (measurements(), part))
    assert pooled.log_ratio.value == pytest.approx(whole.log_ratio.value, rel=1e-9)
    assert len(pooled.mode_limits) == 1


def test_schedules_enter():
    steps = 1000
    decayed = setting(1.9, factors=[1 - k / steps for k in range(steps)])
    assert assess(measurements(), decayed).score.value < 0.2 * assess(measurements(), setting(1.9)).score.value
    assert (
        assess(measurements(), setting(1.9, factors=[1.0] * steps)).log_ratio
        == assess(measurements(), setting(1.9)).log_ratio
    )


def test_ratios_over_the_learning_rate_are_those_of_the_reports():
    measured, lrs = measurements(variance=(1.0, 0.2), spread=0.2), [0.1, 1.0, 1.8]
    expected = [math.exp(assess(measured, setting(lr)).log_ratio.value) for lr in lrs]
    assert predicted_ratios(measured, setting(7.0), lrs) == pytest.approx(expected)


def test_the_interval_of_the_score_covers_the_true_one():
    rng, true = np.random.default_rng(5), assess(measurements(loss=0.1), setting(1.5)).log_ratio.value
    hits = 0
    for _ in range(200):
        drawn = [
            [value * (1 + 0.1 * rng.standard_normal()) for value in row]
            for row in ((1.0, 0.1), (0.01, 0.01), (1.0, 1.0))
        ]
        given = measurements(*drawn, loss=0.1, spread=0.196)
        found = assess(given, setting(1.5)).log_ratio
        hits += found.low <= true <= found.high
    assert 0.90 <= hits / 200 <= 1.0


def test_any_object_with_value_low_and_high_will_do():
    @dataclasses.dataclass
    class Estimate:
        value: float
        low: float
        high: float
        n: int = 3

    measured = measurements()
    other = dataclasses.replace(measured, squared_gradient=Estimate(0.02, 0.01, 0.03))
    assert assess(other, setting(0.5)).descent == Interval(0.01, 0.005, 0.015)
    unknown = dataclasses.replace(measured, noise_batch=Estimate(5.0, -math.inf, math.inf))
    assert assess(unknown, setting(0.5)).noise_ratio == Interval(0.5, -math.inf, math.inf)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.0}, "above 0"),
        ({"lr": math.nan}, "learning rate|lr"),
        ({"lr": -1.0}, "lr"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 2.5}, "batch_size"),
        ({"momentum": 1.0}, "momentum"),
        ({"momentum": -0.1}, "momentum"),
        ({"steps": 0}, "steps"),
        ({"factors": [1.0]}, "one per step"),
        ({"factors": [1.0] * 999 + [-1.0]}, "schedule"),
        ({"momentum_bytes": -1}, "momentum_bytes"),
    ],
)
def test_bad_settings(changes, words):
    with pytest.raises(UserError, match=words):
        setting(**({"lr": 0.1} | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": math.nan}, "loss"),
        ({"loss": -1.0}, "loss"),
        ({"modes": []}, "at least one mode"),
        ({"noise_trace": Interval(1.0, 0.5, math.inf)}, "noise_trace.*micro-batches"),
        ({"hessian_noise": Interval(1.0, 2.0, 3.0)}, "hessian_noise.*interval"),
        ({"noise_batch": Interval(math.nan, 0.0, 1.0)}, "noise_batch"),
        ({"modes": [Mode(*[Interval(math.inf, 0, math.inf)] * 4)]}, "curvature of mode 0"),
    ],
)
def test_bad_measurements(changes, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(measurements(), **changes)


def test_bad_floor():
    with pytest.raises(UserError, match="effect_floor"):
        assess(measurements(), setting(0.1), effect_floor=0.0)


# Linear regressions of random spectra, residuals, batch sizes and learning rates. Runs of 8 seeds, SGD and SGDM on
# the same mini-batches; measured, exactly, on one more run where a tenth of the steps is made.
_SEEDS, _DIVERGED = 8, 1e6


def simulated_cell(number):
    rng = np.random.default_rng((2024, number))
    examples, dim = int(rng.choice([64, 128])), int(rng.integers(3, 9))
    scales = np.sqrt(np.arange(1, dim + 1) ** -rng.uniform(0, 2.0))
    features = rng.normal(size=(examples, dim)) * scales @ np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    problem = LinearRegression(features, 10 ** rng.uniform(-1.5, 0.5) * rng.normal(size=examples))
    batch, steps = int(2 ** rng.integers(0, 7)), int(rng.integers(200, 600))
    sharpness = float(torch.linalg.eigvalsh(problem.matrix)[-1])
    lr, done = 10 ** rng.uniform(-2, 0.5) / sharpness, steps // 10
    start, oracle = problem.minimiser + torch.as_tensor(rng.normal(size=dim)), MinibatchOracle(problem, batch)

    def run(paths, count, momentum, seed):
        generator = torch.Generator().manual_seed(seed)
        *_, last = iterates(
            oracle, start.repeat(paths, 1), lr, momentum, steps=count, generator=generator, every=count
        )
        return last.x

    losses = [problem.loss(run(_SEEDS, steps, momentum, number)).numpy() for momentum in (0.0, BETA)]
    measured = measure_exactly(problem, run(1, done, BETA, 10**6 + number))
    return measured, setting(lr, batch, steps=steps - done), differ(*losses)


def measure_exactly(problem, x):
    features = problem.features.numpy()
    gradients = problem.example_gradients(x)[0].numpy()
    gradient, noise = gradients.mean(0), np.cov(gradients.T, bias=True)
    hessian = problem.matrix.numpy()
    values, vectors = np.linalg.eigh(hessian)
    columns = (
        values,
        (vectors.T @ gradient) ** 2,
        np.diag(vectors.T @ noise @ vectors),
        ((features @ vectors) ** 2).var(0),
    )
    modes = [Mode(*map(Interval.exact, map(float, row))) for row in zip(*columns, strict=True)]
    curved, bent = np.trace(hessian @ noise), gradient @ hessian @ gradient
    totals = (gradient @ gradient, np.trace(noise), curved, bent, curved / bent)
    return Measurements(float(problem.loss(x)), *map(Interval.exact, map(float, totals)), modes)


def differ(sgd, sgdm):
    """By more than the floor and more than seed noise; a run that diverges differs from one that does not."""
    kept = [bool((np.isfinite(losses) & (losses < _DIVERGED)).all()) for losses in (sgd, sgdm)]
    if not all(kept):
        return kept[0] != kept[1]
    difference = np.log(sgd) - np.log(sgdm)
    mean, error = abs(difference.mean()), difference.std(ddof=1) / math.sqrt(_SEEDS)
    return bool(mean > EFFECT_FLOOR and mean > stats.t.ppf(0.975, _SEEDS - 1) * error)


@lru_cache
def validated(count):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tensors this small are faster on one
    try:
        cells = [simulated_cell(number) for number in range(count)]
    finally:
        torch.set_num_threads(threads)
    reports = [assess(measured, run) for measured, run, _ in cells]
    scores = {
        "score": [report.score.value for report in reports],
        "lr": [report.setting.lr for report in reports],
        "h": [report.h.value for report in reports],
        "B_noise/B": [-report.noise_ratio.value for report in reports],
    }
    return scores, [label for *_, label in cells], reports


def test_the_score_predicts_where_simulated_runs_differ():
    scores, labels, reports = validated(120)
    areas = {name: roc_auc(values, labels) for name, values in scores.items()}
    assert areas["score"] > 0.9
    assert areas["score"] > max(areas["h"], areas["lr"], areas["B_noise/B"])
    hits = [(report.verdict == CURVATURE) == label for report, label in zip(reports, labels, strict=True)]
    assert np.mean(hits) > 0.85


@pytest.mark.slow
def test_the_score_is_ahead_of_every_baseline():
    scores, labels, _ = validated(1000)
    for name in ("lr", "h", "B_noise/B"):
        found = paired_auc_interval(scores["score"], scores[name], labels)
        assert found.first > 0.9, found
        assert found.low > 0, (name, found)
