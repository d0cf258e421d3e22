"""Measurements of small problems whose modes are all known."""

import numpy as np

from hf_momentum.diagnostics.measurements import Interval, Measurements, Mode, Setting

BETA = 0.9


def interval(value, spread=0.0):
    return Interval(value, value - spread * abs(value), value + spread * abs(value))


def measurements(
    curvature=(1.0, 0.1), gradient=(0.01, 0.01), noise=(1.0, 1.0), variance=(0.0, 0.0), loss=1.0, spread=0.0
):
    """All modes of a small problem, so that nothing is left to pool; each number ± spread."""
    modes = [
        Mode(*(interval(each, spread) for each in row))
        for row in zip(curvature, gradient, noise, variance, strict=True)
    ]
    h, g, s = map(np.array, (curvature, gradient, noise))
    totals = [interval(float(each), spread) for each in (g.sum(), s.sum(), h @ s, h @ g)]
    return Measurements(loss, *totals, interval(float(h @ s / (h @ g)), spread), modes)


def setting(lr, batch_size=10, **options):
    return Setting(**({"lr": lr, "batch_size": batch_size, "momentum": BETA, "steps": 1000} | options))
