"""SVAG's coefficients and rescaled hyperparameters."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from hf_momentum.errors import UserError
from hf_momentum.optim import svag_coefficients, svag_hyperparameters
from hf_momentum.optim.svag import reference_svag_gradient

ELLS = [1, 1.0, 1 + 2**-52, 1.5, 2, 3, 4, 10 / 3, 8, 64, 1000.5, 1e6, 1e15, 2**100, np.float64(2.5), Fraction(7, 2)]


@pytest.mark.parametrize("ell", ELLS)
def test_coefficients_solve_both_equations(ell):
    r1, r2 = (Fraction(r) for r in svag_coefficients(ell))
    assert r1 + r2 == 1
    assert abs(r1**2 + r2**2 - Fraction(ell)) <= 2 * Fraction(np.spacing(float(ell)))
    assert r1 >= 1 >= 1 + r2


def test_ell_one_is_plain_sgd():
    assert svag_coefficients(1) == (1.0, 0.0)
    assert svag_coefficients(5) == (2.0, -1.0)


@pytest.mark.parametrize("ell", [1, 2.5, 16])
def test_coefficients_give_the_papers_gradient(ell):
    generator = torch.Generator().manual_seed(0)
    g1, g2 = torch.randn(2, 100, generator=generator, dtype=torch.float64)
    r1, r2 = svag_coefficients(ell)
    torch.testing.assert_close(r1 * g1 + r2 * g2, reference_svag_gradient(g1, g2, ell), rtol=1e-13, atol=1e-13)


def test_mean_stays_and_covariance_is_amplified():
    # Exact over the uniform law on all pairs of four gradients, drawn independently.
    gradients = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 1.0], [4.0, 5.0]], dtype=torch.float64)
    r1, r2 = svag_coefficients(3.7)
    pairs = torch.stack([r1 * a + r2 * b for a in gradients for b in gradients])
    torch.testing.assert_close(pairs.mean(0), gradients.mean(0))
    torch.testing.assert_close(pairs.T.cov(correction=0), 3.7 * gradients.T.cov(correction=0))


BAD_ELLS = [0.999, 0, -2, float("nan"), float("inf"), True, "4", None, 1j, torch.tensor(2.0), 10**400]


@pytest.mark.parametrize("ell", BAD_ELLS)
def test_bad_ell_is_refused(ell):
    with pytest.raises(UserError, match="Invalid ell"):
        svag_coefficients(ell)
    with pytest.raises(UserError, match="Invalid ell"):
        svag_hyperparameters(0.1, 100, ell)


def test_hyperparameters():
    assert svag_hyperparameters(0.8, 100, 1) == (0.8, 100)
    assert svag_hyperparameters(0.8, 100, 4) == (0.2, 400)
    assert svag_hyperparameters(0.3, 10, 1.1) == (0.3 / 1.1, 11)
    assert svag_hyperparameters(0.3, 3, 10 / 3)[1] == 10
    assert type(svag_hyperparameters(0.3, np.int64(4), 1.5)[1]) is int
    assert torch.equal(svag_hyperparameters(torch.tensor(0.5), 2, 2)[0], torch.tensor(0.25))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((0.1, 3, 1.5), r"stretches 3 steps to 4\.5"),
        ((-0.1, 3, 2), "Invalid learning rate: -0.1"),
        ((0.1, 0, 2), "Invalid steps: 0"),
        ((0.1, 2.5, 2), r"Invalid steps: 2\.5"),
        ((0.1, True, 2), "Invalid steps: True"),
        ((0.1, float("nan"), 2), "Invalid steps: nan"),
        ((0.1, float("inf"), 2), "Invalid steps: inf"),
    ],
)
def test_bad_hyperparameters_are_refused(args, message):
    with pytest.raises(UserError, match=message):
        svag_hyperparameters(*args)
