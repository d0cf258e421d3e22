"""The warm-up case: variances by sums over the noises and by the paper's values, and rows that hold them."""

import numpy as np
import pytest

from hf_momentum.dynamics.studies import plan
from hf_momentum.dynamics.studies import warm_up as study


def weights(steps, momentum):
    """What x and m of each step hold of m₀ and of each noise, by Eq. 3 at η = 1, up to the sign of x."""
    x, m = np.zeros(steps + 1), np.zeros(steps + 1)
    m[0] = 1
    for k in range(steps):
        m = momentum * m
        m[k + 1] += 1 - momentum
        x = x + m
        yield x.copy(), m.copy()


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("stationary", [False, True])
def test_variances_are_sums_over_the_noises(momentum, stationary):
    start = (1 - momentum) / (1 + momentum) if stationary else 0.0
    variances = np.array([start, *[1.0] * 12])
    for k, (x, m) in enumerate(weights(12, momentum), start=1):
        assert study.position_variance(k, momentum, start) == pytest.approx(x**2 @ variances)
        assert study.momentum_variance(k, momentum, start) == pytest.approx(m**2 @ variances)
        if stationary and momentum:
            closed = k - 2 * momentum * (1 - momentum**k) / (1 - momentum**2)
            assert study.position_variance(k, momentum, start) == pytest.approx(closed)


def test_rows_hold_what_is_predicted():
    cells = plan("warm_up", {"paths": 20_000})
    ends = {}
    for cell in cells:
        rows = study.rows(**cell)
        for row in rows:
            assert row["low"] <= row["measured"] <= row["high"]
            assert abs(row["measured"] - row["predicted"]) <= 2.2 * (row["high"] - row["low"]) + 1e-12
            if row["quantity"] == "variance of x" and row["step"] == 50:
                ends[row["method"]] = round(row["predicted"], 5)
        lags = {row["lag"]: row["predicted"] for row in rows if row["quantity"] == "autocorrelation"}
        if cell["momentum"]:
            (*_, (_, last)) = weights(50, cell["momentum"])
            (*_, (_, before)) = weights(43, cell["momentum"])
            start = 0.1 / 1.9 if "stationary" in cell["method"] else 0.0
            late, early = np.array([start, *[1.0] * 50]), np.array([start, *[1.0] * 43])
            product = (last[:44] * before) @ early
            assert lags[7] == pytest.approx(product / np.sqrt((last**2 @ late) * (before**2 @ early)))
    assert list(ends.values()) == [0.5, 0.36356, 0.40575]
