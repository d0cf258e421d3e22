"""SVAG inside a stock Trainer: the applied gradient, the logged loss, and what is refused."""

import pytest
import torch
from svag_driver import training
from svag_steps import arguments, largest_errors, mean_gradient, run_case, step_batches
from svag_steps import train as train_svag
from tiny_models import TokenRows, tiny_classifier
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from hf_momentum import create_optimizer
from hf_momentum.errors import UserError
from hf_momentum.optim import svag_coefficients
from hf_momentum.training.callbacks import svag
from hf_momentum.training.callbacks.svag import SVAGCallback, micro_batch_weight, remove_svag_hooks

EXACT = 1e-12


@pytest.mark.parametrize("ell", [1, 2.5, 16])
@pytest.mark.parametrize("group", range(2, 9))
def test_weights_give_the_two_halves_their_coefficients(group, ell):
    weights = [micro_batch_weight(index, group, ell) / group for index in range(group)]
    first = (group + 1) // 2
    r1, r2 = svag_coefficients(ell)
    assert weights == pytest.approx([r1 / first] * first + [r2 / (group - first)] * (group - first), rel=1e-15)


def test_a_group_of_one_is_plain_sgd():
    assert micro_batch_weight(0, 1, 16) == 1


# ℓ, rows, accumulation; batches of 2, so 16 rows are 8 micro-batches and epochs may end in a group of m
CASES = {
    "n=1": (4, 16, 2),
    "n=2": (4, 16, 4),
    "ell not an integer": (2.7, 16, 4),
    "ell=1": (1, 16, 4),
    "m=1 of 2": (4, 10, 2),
    "m=1 of 4": (4, 18, 4),
    "m=2 of 4": (4, 12, 4),
    "m=3 of 4": (4, 14, 4),
    "an epoch shorter than a step": (4, 6, 8),
    "a last batch of one row": (4, 7, 4),
}


@pytest.mark.parametrize("case", CASES)
def test_the_applied_gradient_and_the_logged_loss(tmp_path, case):
    gradient_error, loss_error = run_case(tmp_path, *CASES[case])
    assert gradient_error < EXACT
    assert loss_error < 1e-6  # the Trainer sums losses in float32


def test_ell_1_equals_plain_sgd_on_the_first_half(tmp_path):
    rows, halves = TokenRows(32), [i for i in range(32) if i % 8 < 4]
    doubled = train_svag(tiny_classifier().double(), arguments(tmp_path, gradient_accumulation_steps=4), 1, rows)
    plain = train_svag(tiny_classifier().double(), arguments(tmp_path), None, torch.utils.data.Subset(rows, halves))
    torch.testing.assert_close(torch.stack(doubled.gradients), torch.stack(plain.gradients), atol=EXACT, rtol=0)


def test_mean_and_covariance_of_the_update():
    # Rows of the parameter are independent runs: one step of each is a draw. Per row, L = ½ xᵀHx with H diagonal and
    # x = 1; a micro-batch's gradient is Hx + ξ with Cov ξ = nσ²Σ, so that of a half's mean is σ²Σ.
    draws, ell, rate, n, scale = 20_000, 3.5, 0.2, 2, 0.7
    generator = torch.Generator().manual_seed(3)
    curvature = torch.tensor([1.2, 0.3, -0.4], dtype=torch.float64)
    root = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.8, 0.0], [-0.3, 0.2, 0.6]], dtype=torch.float64)
    target = root @ root.T

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Parameter(torch.ones(draws, 3, dtype=torch.float64))

        def forward(self):
            noise = torch.randn(draws, 3, generator=generator, dtype=torch.float64) @ root.T * scale * n**0.5
            return {"loss": (0.5 * curvature * self.x**2 + noise * self.x).sum()}

    model = Quadratic()
    optimizer = create_optimizer("sgd", model, lr=rate / ell)
    with training(SVAGCallback(ell), model, 2 * n) as step:
        step(lambda index: model()["loss"])
    optimizer.step()
    update = model.x.detach() - 1
    mean, covariance = -rate / ell * curvature, ell * scale**2 * target * (rate / ell) ** 2
    variances = covariance.diagonal()
    assert ((update.mean(0) - mean).abs() < 4 * (variances / draws).sqrt()).all()
    errors = ((variances[:, None] * variances + covariance**2) / draws).sqrt()  # of Gaussian samples
    assert ((update.T.cov() - covariance).abs() < 4 * errors).all()
    assert (4 * errors.diagonal() < 0.05 * variances).all()  # sharp enough to see a wrong factor


class Measure(TrainerCallback):
    """Takes a gradient of its own in training mode between the steps, and drops it."""

    def __init__(self, batches):
        self.batches, self.gradients = batches, []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.gradients.append(mean_gradient(model, self.batches)[0])
        model.zero_grad()


def test_what_runs_between_the_steps_is_left_alone(tmp_path):
    rows, args = TokenRows(16), arguments(tmp_path, eval_strategy="steps", eval_steps=1, max_steps=3)
    batches = step_batches(rows, args, 1)[0]
    model, mirror, measure = tiny_classifier().double(), tiny_classifier().double(), Measure(batches)
    recorder = train_svag(model, args, 4, rows, [measure], eval_dataset=rows)
    assert largest_errors(recorder, mirror, args, rows, 4)[0] < EXACT
    mirror.load_state_dict(model.state_dict())
    torch.testing.assert_close(measure.gradients[2], mean_gradient(mirror, batches)[0], atol=EXACT, rtol=0)


class FromLogits(Trainer):
    """Computes the loss outside of the model."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        labels = inputs.pop("labels")
        return nn.functional.cross_entropy(model(**inputs).logits, labels)


class FromAPart(Trainer):
    """Goes around the model's own forward."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        inputs.pop("labels")
        return model.roberta(**inputs)[0].square().mean()


def test_a_loss_computed_from_the_logits(tmp_path):
    rows, args, model = TokenRows(16), arguments(tmp_path), tiny_classifier().double()
    recorder = train_svag(model, args, 4, rows, trainer_class=FromLogits)
    assert largest_errors(recorder, tiny_classifier().double(), args, rows, 4)[0] < EXACT


def test_a_loss_that_goes_around_the_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="no output that requires a gradient passed through the model's forward"):
        train_svag(tiny_classifier(), arguments(tmp_path), 4, TokenRows(16), trainer_class=FromAPart)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.x = nn.Parameter(torch.ones(2, dtype=torch.float64))

    def forward(self):
        y = self.x * torch.tensor([2.0, 3.0], dtype=torch.float64)
        return {"loss": y.sum(), "more": (y, [y * 5]), "constant": torch.ones(2), "name": "y"}


def test_every_output_is_weighed_once_whatever_holds_it():
    model, ell = Nested(), 4
    read = [lambda out: out["loss"], lambda out: out["more"][0].sum(), lambda out: out["more"][1][0].sum()]
    for output, factor in zip(read, (1, 1, 5), strict=True):
        model.zero_grad()
        with training(SVAGCallback(ell), model, 2) as step:
            step(lambda index, output=output: output(model()) * (index + 1))  # half 2 has twice the gradient
        r1, r2 = svag_coefficients(ell)
        expected = factor * (r1 + 2 * r2) * torch.tensor([2.0, 3.0], dtype=torch.float64)
        torch.testing.assert_close(model.x.grad, expected)


def test_a_forward_in_evaluation_mode_is_not_weighed():
    model = Nested()

    def loss_of(index: int) -> torch.Tensor:
        in_training, in_evaluation = model.train()()["loss"], model.eval()()["loss"]
        return in_training + index * in_evaluation

    with training(SVAGCallback(4), model, 2) as step:
        step(loss_of)
    expected = (1 + 0.5) * torch.tensor([2.0, 3.0], dtype=torch.float64)  # (r₁ + r₂) + ½
    torch.testing.assert_close(model.x.grad, expected)


def test_the_loss_scaler_of_fp16_sees_weighted_gradients():
    model, plain = Nested(), Nested()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = create_optimizer("sgd", model, lr=0.1)
    with training(SVAGCallback(4), model, 2) as step:
        step(lambda index: model()["loss"], lambda loss: scaler.scale(loss).backward())
    scaler.unscale_(optimizer)
    plain()["loss"].backward()
    torch.testing.assert_close(model.x.grad, plain.x.grad)  # r₁ + r₂ = 1


def test_a_resumed_run_knows_its_place_in_the_epoch(tmp_path):
    rows, changes = TokenRows(14), {"gradient_accumulation_steps": 4, "save_strategy": "steps", "save_steps": 3}
    args = arguments(tmp_path, **changes)  # 4 + 3 micro-batches an epoch: step 3 is the first of two
    whole = train_svag(tiny_classifier().double(), args, 4, rows)
    resumed = train_svag(tiny_classifier().double(), args, 4, rows, resume=f"{tmp_path}/checkpoint-3")
    assert len(resumed.gradients) == 3
    torch.testing.assert_close(torch.stack(resumed.gradients), torch.stack(whole.gradients[3:]), atol=EXACT, rtol=0)


def test_a_resumed_run_that_does_not_skip_data_begins_its_epoch_anew(tmp_path):
    rows, changes = TokenRows(14), {"gradient_accumulation_steps": 4, "save_strategy": "steps", "save_steps": 3}
    args = arguments(tmp_path, ignore_data_skip=True, **changes)
    train_svag(tiny_classifier().double(), args, 4, rows)
    resumed = train_svag(tiny_classifier().double(), args, 4, rows, resume=f"{tmp_path}/checkpoint-3")
    assert largest_errors(resumed, tiny_classifier().double(), args, rows, 4)[0] < EXACT


def test_the_hook_goes_when_training_ends_or_the_next_begins(tmp_path):
    class Interrupt(TrainerCallback):
        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise KeyboardInterrupt

    rows, args, model = TokenRows(16), arguments(tmp_path), tiny_classifier().double()
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train_svag(model, args, 9, rows, [Interrupt()])
        assert len(model._forward_hooks) == 1
    recorder = train_svag(model, args, 4, rows)
    assert largest_errors(recorder, tiny_classifier().double(), args, rows, 4)[0] < EXACT
    assert not model._forward_hooks
    with pytest.raises(KeyboardInterrupt):
        train_svag(model, args, 9, rows, [Interrupt()])
    remove_svag_hooks(nn.Sequential(model))
    assert not model._forward_hooks


def test_a_last_group_of_one_warns_once(tmp_path, caplog):
    train_svag(tiny_classifier(), arguments(tmp_path), 4, TokenRows(6))
    assert [record.name for record in caplog.records].count(svag.__name__) == 1
    assert "An epoch has 3 micro-batches, 2 to a step" in caplog.text


class Stream(IterableDataset):
    def __iter__(self):
        rows = TokenRows(10)
        return (rows[i] for i in range(10))


class Overstated(Stream):
    def __len__(self):
        return 16


@pytest.mark.parametrize(
    ("changes", "rows", "message"),
    [
        ({"gradient_accumulation_steps": 3}, None, "gradient_accumulation_steps=3.* must be even. Use 6"),
        ({"gradient_accumulation_steps": 1}, None, "gradient_accumulation_steps=1.* must be even. Use 2"),
        ({"max_grad_norm": 1.0}, None, "max_grad_norm=1.0: clipping .* Set it to 0.* or pass allow_clipping=True"),
        ({}, Stream(), "a training dataloader with a length"),
        ({}, Overstated(), "expected a step of 2 micro-batches, since the training dataloader has the length 8"),
    ],
)
def test_what_is_refused(tmp_path, changes, rows, message):
    with pytest.raises(UserError, match=message):
        train_svag(tiny_classifier(), arguments(tmp_path, **changes), 4, rows or TokenRows(16))


def test_data_parallel_is_refused():
    with (
        pytest.raises(UserError, match=r"n_gpu=2 GPUs by nn\.DataParallel"),
        training(SVAGCallback(4), Nested(), 2, n_gpu=2),
    ):
        pass


def test_clipping_can_be_allowed():
    model = Nested()
    with training(SVAGCallback(4, allow_clipping=True), model, 2, max_grad_norm=1.0) as step:
        step(lambda index: model()["loss"])
    assert model.x.grad is not None


def test_ell_is_checked_at_once():
    with pytest.raises(UserError, match=r"Invalid ell: 0\.5"):
        SVAGCallback(0.5)
