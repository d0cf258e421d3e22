"""Gradients and Hessian–vector products are exact on models of all kinds, and leave no trace."""

import copy
import pickle

import pytest
import torch
from known_problems import (
    NormNet,
    TiedNet,
    dense_hessian,
    dense_vector,
    lora_roberta,
    probes,
    rows,
    small_roberta,
    squared_error,
    tokens,
)
from torch import nn
from transformers import AttentionInterface

from hf_momentum.diagnostics.probe import Probe, inner_products, measuring
from hf_momentum.errors import UserError

CASES = probes()


def random_vector(probe: Probe, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in probe.parameters]


@pytest.mark.parametrize("name", CASES)
def test_products_equal_the_dense_hessian(name):
    probe, batch = CASES[name]
    hessian = dense_hessian(probe, batch)
    vectors = [random_vector(probe, seed) for seed in (1, 2)]
    dense = torch.stack([dense_vector(v) for v in vectors])
    products = torch.stack([dense_vector(p) for p in probe.hvp(batch, vectors)])
    torch.testing.assert_close(products, dense @ hessian, rtol=0, atol=1e-10)
    forms = probe.quadratic_forms(batch, vectors)
    torch.testing.assert_close(forms, dense @ hessian @ dense.T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_the_slope_of_the_loss(name):
    probe, batch = CASES[name]
    gradient, direction, step = probe.gradient(batch), random_vector(probe, 3), 1e-5
    losses = []
    for sign in (1, -1):
        moved = Probe(copy.deepcopy(probe.model), probe._loss)
        with torch.no_grad():
            for parameter, part in zip(moved.parameters, direction, strict=True):
                parameter.add_(part, alpha=sign * step)
        losses.append(moved.loss(batch))
    slope = (losses[0] - losses[1]) / (2 * step)
    torch.testing.assert_close(inner_products([gradient], [direction])[0, 0], slope, rtol=1e-7, atol=1e-7)


def test_only_trainable_weights_count_and_tied_ones_once():
    tied = Probe(TiedNet(), squared_error)
    assert sum(p.numel() for p in tied.parameters) == 9 + 3 + 3 + 4 + 2
    lora = lora_roberta()
    names = {id(p): name for name, p in lora.named_parameters()}
    assert all("lora" in names[id(p)] or "classifier" in names[id(p)] for p in Probe(lora).parameters)


def test_an_unused_parameter_has_zero_gradient_and_curvature():
    probe, batch = CASES["tied, frozen and unused weights"]
    index = next(i for i, p in enumerate(probe.parameters) if p is probe.model.unused)
    assert not probe.gradient(batch)[index].any()
    assert not probe.hvp(batch, [random_vector(probe, 0)])[0][index].any()


def test_a_loss_that_is_linear_in_the_weights_has_no_curvature():
    probe = Probe(nn.Linear(3, 1).double(), lambda model, x: model(x).mean())
    assert not dense_vector(probe.hvp(rows(1)[0], [random_vector(probe, 0)])[0]).any()


def everything(model: nn.Module) -> bytes:
    state = {
        "weights": [p.detach().numpy().tobytes() for p in model.parameters()],
        "buffers": [(id(b), b.numpy().tobytes()) for b in model.buffers()],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.numpy().tobytes()) for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "random": torch.get_rng_state().numpy().tobytes(),
        "grad mode": torch.is_grad_enabled(),
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
        "kernels": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
    }
    return pickle.dumps(state)


def noisy_loss(model: nn.Module, batch: tuple) -> torch.Tensor:
    inputs, targets = batch
    return nn.functional.mse_loss(model(inputs + torch.randn_like(inputs)), targets)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["training", "evaluation"])
def test_measuring_leaves_no_trace(training, mode):
    model = NormNet().double().train(training)
    model.net[5].eval()
    squared_error(model, rows(2)).backward()
    probe, batch, before = Probe(model, noisy_loss, mode), rows(2, seed=1), everything(model)
    gradient = probe.gradient(batch)
    probe.hvp(batch, [gradient])
    probe.quadratic_forms(batch, [gradient])
    with torch.no_grad():
        probe.loss(batch)
    assert everything(model) == before


def test_measuring_leaves_no_trace_on_transformers_and_after_an_error():
    model = small_roberta(hidden_dropout_prob=0.3)
    probe, before = Probe(model), everything(model)
    probe.hvp(tokens(), [probe.gradient(tokens())])
    assert everything(model) == before
    with pytest.raises(UserError, match="gave no loss"):
        probe.gradient({"input_ids": torch.ones(1, 3).long()})
    assert everything(model) == before


def test_a_replaced_buffer_is_put_back():
    class Replacing(nn.Linear):
        def forward(self, x):
            self.seen = self.seen + 1
            return super().forward(x)

    model = Replacing(3, 1).double()
    model.register_buffer("seen", torch.zeros(()))
    Probe(model, squared_error).gradient(rows(1))
    assert model.seen == 0


def test_the_loss_has_batch_statistics_and_no_dropout():
    model, batch = NormNet().double().train(), rows(2)
    by_hand = copy.deepcopy(model)
    by_hand.net[3].p = 0.0
    expected = squared_error(by_hand, batch)
    torch.testing.assert_close(Probe(model, squared_error).loss(batch), expected, rtol=0, atol=0)
    torch.testing.assert_close(Probe(model.eval(), squared_error).loss(batch), expected, rtol=0, atol=0)
    running = squared_error(model, batch)
    torch.testing.assert_close(Probe(model, squared_error, "evaluation").loss(batch), running, rtol=0, atol=0)
    assert abs(expected - running) > 1e-3


def test_a_frozen_normalisation_stays_frozen():
    model, batch = NormNet().double().train(), rows(2)
    model.net[1].eval()
    by_hand = copy.deepcopy(model)
    by_hand.net[3].p = 0.0
    torch.testing.assert_close(Probe(model, squared_error).loss(batch), squared_error(by_hand, batch), rtol=0, atol=0)


def test_a_kernel_without_second_derivatives_is_switched_and_restored():
    AttentionInterface.register("once_only", _once_only_attention)
    model = small_roberta()
    expected = dense_vector(Probe(model).hvp(tokens(), [random_vector(Probe(model), 0)])[0])
    model.config._attn_implementation_internal = "once_only"
    probe = Probe(model)
    with pytest.raises(AssertionError, match="the kernel ran"):
        model(**tokens())
    product = dense_vector(probe.hvp(tokens(), [random_vector(probe, 0)])[0])
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-12)
    assert model.config._attn_implementation == "once_only"


def _once_only_attention(*args, **kwargs):
    raise AssertionError("the kernel ran")


def test_half_precision_gives_single():
    model = TiedNet().bfloat16()
    probe, batch = Probe(model, squared_error), tuple(t.bfloat16() for t in rows(1))
    gradient = probe.gradient(batch)
    assert {t.dtype for t in gradient + probe.hvp(batch, [gradient])[0]} == {torch.float32}


def test_wrappers_are_taken_off_and_vectors_flatten():
    model = TiedNet()
    assert Probe(nn.DataParallel(model)).model is model
    probe, vector = CASES["LoRA"][0], random_vector(CASES["LoRA"][0], 0)
    for part, again in zip(vector, probe.unflatten(probe.flatten(vector)), strict=True):
        assert torch.equal(part, again)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient


def test_an_operation_without_second_derivative_is_named():
    probe = Probe(nn.Linear(3, 1).double(), lambda model, batch: _Once.apply(model(batch[0])).square().mean())
    probe.gradient(rows(1))
    with pytest.raises(UserError, match="no second derivative"):
        probe.hvp(rows(1), [random_vector(probe, 0)])


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (None, "cannot be passed to the model by keywords"),
        (lambda model, batch: model(batch[0]), r"one number, not a tensor of shape \(6, 1\)"),
        (lambda model, batch: 1.0, "one number, not a float"),
        (lambda model, batch: squared_error(model, batch) * float("nan"), "loss is nan"),
        (lambda model, batch: squared_error(model, batch).detach(), "does not depend on the trainable"),
    ],
)
def test_unusable_losses_are_refused(loss, message):
    with pytest.raises(UserError, match=message):
        Probe(nn.Linear(3, 1).double(), loss).gradient(rows(1))


def test_unusable_models_are_refused():
    with pytest.raises(UserError, match="no trainable parameters"):
        Probe(nn.Linear(3, 1).requires_grad_(False))
    with pytest.raises(UserError, match="not in memory"):
        Probe(nn.Linear(3, 1, device="meta"))
    sharded = nn.Linear(3, 1)
    sharded.weight.ds_id = 0  # as DeepSpeed ZeRO-3 marks them
    with pytest.raises(UserError, match="sharded"):
        Probe(sharded)
    with pytest.raises(UserError, match="Unknown mode 'train'"), measuring(nn.Linear(3, 1), "train"):
        pass
