import json
import math
from dataclasses import replace

import numpy as np
import pytest
from known_measurements import interval, measurements, setting

from hf_momentum.diagnostics.measurements import Interval
from hf_momentum.diagnostics.regime import CURVATURE, EFFECT_FLOOR, NOISE, assess
from hf_momentum.diagnostics.validation import (
    PREDICTED,
    areas_under_curves,
    compare,
    measurement_from_json,
    measurement_to_json,
    predictors,
)
from hf_momentum.errors import UserError

E = math.e
STEEP = measurements(spread=0.01), setting(1.5, steps=50)


def cell_of(sgd, sgdm, foretold=STEEP, place="a"):
    cell = {"task": place}
    runs = [
        {"cell": cell, "optim": optim, "seed": seed, "loss": loss, "chance": 1.0}
        for optim, losses in (("sgd", sgd), ("sgdm", sgdm))
        for seed, loss in enumerate(losses)
    ]
    said = {"problem": foretold} if isinstance(foretold, str) else measurement_to_json(*foretold)
    (found,) = compare([*runs[:1], {"cell": cell, **said}, *runs[1:]])
    return found


def test_a_difference_must_exceed_the_floor_and_its_interval():
    found = cell_of([E**1.0, E**1.1, E**1.2], [1.0, 1.0, 1.0])
    assert found["measured"] == pytest.approx(1.1)
    assert found["high"] - found["measured"] == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-6)  # t(.975, 2)
    assert found["differ"]
    assert not cell_of([E**0.04, E**0.05, E**0.06], [1.0, 1.0, 1.0])["differ"]  # clear, but small
    assert not cell_of([E**1.0, E**-1.0, E**2.0], [1.0, 1.0, 1.0])["differ"]  # large, but noise
    assert EFFECT_FLOOR == 0.1


def test_a_lost_run_counts_as_a_multiple_of_chance_and_two_lost_ones_do_not_differ():
    lost = cell_of([None, 3e9, None], [0.9, 1.0, 1.1])
    assert lost["differ"] and lost["measured"] == pytest.approx(2.3059, abs=1e-3)  # log 10, less mean log .9 1. 1.1
    both = cell_of([None, None, None], [1e8, None, None])
    assert (both["measured"], both["low"], both["high"], both["differ"]) == (0, 0, 0, False)


def test_a_measurement_comes_back_from_json_with_the_same_verdict():
    measured, run = measurements(spread=0.3), setting(1.2, steps=3, factors=(1.0, 0.5, 0.25))
    measured = replace(measured, noise_batch=Interval(5.0, -math.inf, math.inf))
    text = json.dumps(measurement_to_json(measured, run), allow_nan=False)
    again = measurement_from_json(json.loads(text))
    assert assess(*again) == assess(measured, replace(run, factors=[1.0, 0.5, 0.25]))


def test_cells_have_the_verdict_of_their_measurement_or_its_problem():
    found = cell_of([1, 1, 1], [1, 1, 1], STEEP)
    report = assess(*STEEP)
    assert found["verdict"] == report.verdict == CURVATURE
    assert found["score"] == {"value": report.score.value, "low": report.score.low, "high": report.score.high}
    assert cell_of([1, 1], [1, 1], (STEEP[0], setting(0.001)))["verdict"] == NOISE
    assert cell_of([1, 1], [1, 1], "too few")["problem"] == "too few"
    json.dumps(found, allow_nan=False)


def test_predictors_are_what_they_say():
    h, g, s, lr, batch = np.array([1.0, 0.1]), np.array([0.02, 0.01]), np.array([1.0, 3.0]), 0.5, 10
    measured = measurements(h, g, s, loss=2.0, spread=0.2)
    report = assess(measured, setting(lr, batch))
    found = predictors(measured, report)
    assert next(iter(found)) == PREDICTED
    assert found == pytest.approx(
        {
            PREDICTED: report.score.value,
            "upper end of its interval": report.score.high,
            "stationary difference over L": lr**2 * 0.9 / (4 * 1.9) * (h @ s) / batch / 2.0,
            "learning rate η": lr,
            "h = ηλ_max": lr * 1.0,
            "η over SGD's limit": lr / report.sgd_limit.value,
            "η × sharpness along g": lr * (h @ (g + s / batch)) / (g + s / batch).sum(),
            "η × sharpness along ∇L": lr * (h @ g) / g.sum(),
            "B_noise/B, inverted": -(h @ s) / batch / (h @ g),
        }
    )


def test_ratios_without_a_denominator_rank_as_no_curvature():
    flat = measurements(loss=0.0)
    flat = replace(flat, squared_gradient=Interval(-1.0, -2.0, 1.0), hessian_gradient=interval(-1.0))
    found = predictors(flat, assess(flat, setting(0.5)))
    ratios = ("η × sharpness along ∇L", "η × sharpness along g", "stationary difference over L")
    assert [found[name] for name in ratios] == [0.0, 0.0, 0.0]
    assert found["B_noise/B, inverted"] == -1e12


def test_cells_that_lack_something_are_told():
    with pytest.raises(UserError, match=r"SGD has the seeds \[0\], SGDM \[0\]; both need the same, two"):
        cell_of([1.2], [1.0])
    with pytest.raises(UserError, match=r"\[0, 1, 2\], SGDM \[0, 1\]"):
        cell_of([1, 2, 3], [1, 1])
    run = {"cell": {"task": "a"}, "optim": "sgd", "seed": 0, "loss": 1.0, "chance": 1.0}
    with pytest.raises(UserError, match=r"\{'task': 'a'\}: 0 measurements, where one is needed"):
        compare([run])


def test_every_predictor_ranks_all_cells():
    apart, alike = ([5.0, 5.1, 5.2], [1.0, 1.0, 1.0]), ([1.0, 1.01, 0.99], [1.0, 1.0, 1.0])
    lrs = {"a": 1.5, "b": 0.3, "c": 0.2, "d": 0.1}
    outcomes = {"a": apart, "b": alike, "c": apart, "d": alike}
    cells = [cell_of(*outcomes[name], (STEEP[0], setting(lr, steps=50)), name) for name, lr in lrs.items()]
    areas = areas_under_curves(cells)
    assert list(areas) == list(cells[0]["predictors"])
    assert areas["learning rate η"].first == areas["h = ηλ_max"].first == 0.75  # one of four pairs the wrong way round
    assert areas["learning rate η"].second == areas[PREDICTED].first
