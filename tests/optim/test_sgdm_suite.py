"""SGDM passes what torch asks of its own optimizers: states, hooks, copies, layouts, types, wrappers."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from hf_momentum.optim import SGDM

KERNELS = {
    "loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "default": {},
}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param]


def make_model():
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()


def train(model, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 3, generator=generator, dtype=torch.float64)).square().mean().backward()
        optimizer.step()


def assert_same_continuation(model, optimizer, other_model, other, steps=4):
    train(model, optimizer, steps, seed=7)
    train(other_model, other, steps, seed=7)
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [0, 3])
def test_state_dict_round_trip(kernel, momentum, steps):
    model = make_model()
    optimizer = SGDM(model.parameters(), lr=0.1, momentum=momentum, weight_decay=0.1, **kernel)
    train(model, optimizer, steps)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other_model = copy.deepcopy(model)
    other = SGDM(other_model.parameters(), lr=5.0, momentum=0.3)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]
    assert_same_continuation(model, optimizer, other_model, other)


def test_state_is_weights_only_loadable_with_numpy_hyperparameters():
    optimizer = SGDM(
        make_model().parameters(), lr=np.float64(0.1), momentum=np.float32(0.5), weight_decay=np.float64(0)
    )
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"][0]["momentum"] == 0.5


@pytest.mark.parametrize("beta", [0.9, 0.0])
def test_an_older_state_gains_what_it_lacks(beta):
    model = make_model()
    optimizer = SGDM(model.parameters(), lr=0.1)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["momentum"] = beta
    old = copy.deepcopy(optimizer.state_dict())
    for key in ("dampening", "nesterov", "maximize", "foreach", "fused", "differentiable", "keep_buffer"):
        del old["param_groups"][0][key]
    other_model = copy.deepcopy(model)
    other = SGDM(other_model.parameters(), lr=5.0)
    other.load_state_dict(old)
    group = other.param_groups[0]
    assert (group["momentum"], group["dampening"], group["keep_buffer"]) == (beta, beta, True)
    assert_same_continuation(model, optimizer, other_model, other)


def test_torchs_sgd_with_equal_dampening_exchanges_states():
    model = make_model()
    optimizer = SGDM(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 2)
    other_model = copy.deepcopy(model)
    other = torch.optim.SGD(other_model.parameters(), lr=1.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_continuation(model, optimizer, other_model, other)
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    assert_same_continuation(model, optimizer, other_model, other)


def test_the_dampening_in_a_saved_state_follows_the_momentum():
    optimizer = SGDM(make_model().parameters(), lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["momentum"] = 0.5
    assert pickle.loads(pickle.dumps(optimizer)).param_groups[0]["dampening"] == 0.5
    optimizer.param_groups[0]["momentum"] = 0.3
    assert optimizer.state_dict()["param_groups"][0]["dampening"] == 0.3


def test_named_parameters():
    model = make_model()
    optimizer = SGDM(model.named_parameters(), lr=0.1)
    train(model, optimizer, 2)
    names = [name for name, _ in model.named_parameters()]
    state = copy.deepcopy(optimizer.state_dict())
    assert state["param_groups"][0]["param_names"] == names
    other_model = copy.deepcopy(model)
    unnamed = SGDM(other_model.parameters(), lr=5.0)
    unnamed.load_state_dict(state)
    assert_same_continuation(model, optimizer, other_model, unnamed)
    heavy = SGDM.from_heavy_ball(make_model().named_parameters(), lr=0.1, momentum=0.5)
    assert heavy.param_groups[0]["param_names"] == names


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_copies_continue_alike(clone, momentum):
    model = make_model()
    optimizer = SGDM(model.parameters(), lr=0.1, momentum=momentum)
    train(model, optimizer, 2)
    other_model, other = clone((model, optimizer))
    assert type(other) is SGDM
    assert_same_continuation(model, optimizer, other_model, other)


def test_hooks_run_once_per_step():
    (p,) = [Parameter(torch.ones(2))]
    torch.optim.SGD([Parameter(torch.ones(1))], lr=0.1)  # has torch wrap its own step
    optimizer = SGDM([p], lr=0.1)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("save"))
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("load"))
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["pre", "post", "save", "load"]


def test_load_hooks_see_a_converted_heavy_ball_state():
    optimizer = SGDM([Parameter(torch.ones(2))], lr=0.1)
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, state: seen.append(state["param_groups"][0]["lr"]))
    optimizer.load_heavy_ball_state(torch.optim.SGD([Parameter(torch.ones(2))], lr=0.1, momentum=0.5).state_dict())
    assert seen == [0.2]


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_tensor_lr(kernel, momentum, shape):
    model = make_model()
    other_model = copy.deepcopy(model)
    lr = torch.full(shape, 0.1, dtype=torch.float64)
    optimizer = SGDM(model.parameters(), lr=lr, momentum=momentum, **kernel)
    assert optimizer.param_groups[0]["lr"] is lr
    other = SGDM(other_model.parameters(), lr=0.1, momentum=momentum, **kernel)
    assert_same_continuation(model, optimizer, other_model, other)
    lr.fill_(0.2)
    other.param_groups[0]["lr"] = 0.2
    assert_same_continuation(model, optimizer, other_model, other)
    heavy = SGDM.from_heavy_ball(model.parameters(), lr=lr, momentum=0.5)
    assert isinstance(heavy.param_groups[0]["lr"], torch.Tensor)
    assert heavy.param_groups[0]["lr"].item() == pytest.approx(0.4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_kernels_agree(momentum):
    models, start = [], make_model()
    for kernel in KERNELS.values():
        model = copy.deepcopy(start)
        train(model, SGDM(model.parameters(), lr=0.1, momentum=momentum, weight_decay=0.1, **kernel), 6)
        models.append(torch.nn.utils.parameters_to_vector(model.parameters()))
    for other in models[1:]:
        torch.testing.assert_close(other, models[0], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_bfloat16_follows_float32(kernel, momentum):
    p = Parameter(torch.randn(50).bfloat16())
    q = Parameter(p.detach().float())
    ours, exact = (SGDM([x], lr=0.1, momentum=momentum, **kernel) for x in (p, q))
    for _ in range(5):
        q.grad = torch.randn(50).bfloat16().float()
        p.grad = q.grad.bfloat16()
        ours.step()
        exact.step()
    torch.testing.assert_close(p.float(), q, rtol=0.02, atol=0.02)
    assert p.dtype == torch.bfloat16
    assert all(state["momentum_buffer"].dtype == torch.bfloat16 for state in ours.state.values())


LAYOUTS = {
    "transposed": lambda: torch.randn(4, 3).t(),
    "gaps": lambda: torch.randn(4, 6)[:, ::2],
    "last": lambda: torch.randn(5, 4, 2)[..., 0],
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
}


@pytest.mark.parametrize("grad_layout", ["same", "contiguous", "expanded"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_any_memory_layout(kernel, layout, grad_layout, momentum):
    base = LAYOUTS[layout]()
    whole = base._base if base._base is not None else base
    gaps = whole.numel() - base.numel()
    p, q = Parameter(base), Parameter(base.contiguous().clone())
    untouched = whole.sum() - base.sum()
    ours, plain = SGDM([p], lr=0.1, momentum=momentum, **kernel), SGDM([q], lr=0.1, momentum=momentum)
    for _ in range(4):
        g = torch.randn(base.shape)
        if grad_layout == "expanded":
            g = torch.randn(()).expand(base.shape)
        p.grad = torch.empty_like(p).copy_(g) if grad_layout == "same" else g
        q.grad = g.clone(memory_format=torch.contiguous_format)
        ours.step()
        plain.step()
        torch.testing.assert_close(p.detach().contiguous(), q.detach())
    ours.load_state_dict(copy.deepcopy(plain.state_dict()))  # buffers in another layout than the parameter
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    ours.step()
    plain.step()
    torch.testing.assert_close(p.detach().contiguous(), q.detach())
    if gaps:
        torch.testing.assert_close(whole.detach().sum() - p.detach().sum(), untouched)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", ["loop", "foreach", "default"])
def test_complex_parameters_step_like_their_real_view(name, momentum):
    p = Parameter(torch.randn(6, dtype=torch.complex128))
    q = Parameter(torch.view_as_real(p.detach()).clone())
    ours, real = (SGDM([x], lr=0.1, momentum=momentum, weight_decay=0.1, **KERNELS[name]) for x in (p, q))
    for _ in range(4):
        p.grad = torch.randn_like(p)
        q.grad = torch.view_as_real(p.grad).clone()
        ours.step()
        real.step()
    torch.testing.assert_close(torch.view_as_real(p.detach()), q.detach())


def test_fused_refuses_what_torch_refuses():
    p = Parameter(torch.ones(2, dtype=torch.complex64))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match="floating point Tensors"):
        SGDM([p], lr=0.1, fused=True).step()
    with pytest.raises(RuntimeError, match="does not support `differentiable`"):
        SGDM([p], lr=0.1, fused=True, differentiable=True)
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        SGDM([p], lr=0.1, fused=True, foreach=True)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_gradient_no_step_no_state(kernel, momentum):
    p, q = Parameter(torch.ones(2)), Parameter(torch.ones(3))
    optimizer = SGDM([p, q], lr=0.1, momentum=momentum, weight_decay=0.5, **kernel)
    optimizer.step()
    assert len(optimizer.state) == 0
    q.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(p, torch.ones(2))
    assert p not in optimizer.state
    assert not torch.equal(q, torch.ones(3))
    optimizer.zero_grad(set_to_none=True)
    before = q.detach().clone()
    optimizer.step()
    assert torch.equal(q, before)


def test_groups_have_their_own_hyperparameters(kernel):
    start = [torch.randn(3, dtype=torch.float64) for _ in range(3)]
    settings = [{}, {"lr": 0.5, "weight_decay": 0.3}, {"momentum": 0.0}]
    grouped, alone = [Parameter(x.clone()) for x in start], [Parameter(x.clone()) for x in start]
    optimizer = SGDM([{"params": [grouped[0]]}], lr=0.1, weight_decay=0.1, **kernel)
    for p, setting in zip(grouped[1:], settings[1:], strict=True):
        optimizer.add_param_group({"params": p, **setting})
    optimizers = [
        SGDM([p], **{"lr": 0.1, "weight_decay": 0.1, **setting}, **kernel)
        for p, setting in zip(alone, settings, strict=True)
    ]
    for _ in range(4):
        for p, q in zip(grouped, alone, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        optimizer.step()
        for single in optimizers:
            single.step()
    assert all(torch.equal(p, q) for p, q in zip(grouped, alone, strict=True))
    assert grouped[2] not in optimizer.state
    assert [g["dampening"] for g in optimizer.param_groups] == [0.9, 0.9, 0.0]


def test_a_group_added_in_training_starts_from_zero_momentum():
    p, q = Parameter(torch.ones(2)), Parameter(torch.ones(2))
    optimizer = SGDM([p], lr=0.1, momentum=0.9)
    p.grad = torch.ones(2)
    optimizer.step()
    optimizer.add_param_group({"params": [q]})
    p.grad = None
    q.grad = torch.ones(2)
    optimizer.step()
    torch.testing.assert_close(optimizer.state[q]["momentum_buffer"], torch.full((2,), 0.1))


@pytest.mark.parametrize("scale", [1.0, 0.0])
@pytest.mark.parametrize("lr_needs_grad", [False, True])
def test_differentiable_steps(scale, lr_needs_grad):
    x0 = torch.randn(3, dtype=torch.float64, requires_grad=True)
    lr0 = torch.tensor(0.1, dtype=torch.float64, requires_grad=lr_needs_grad)

    def after_three_steps(x, lr):
        p = x.clone()
        optimizer = SGDM([p], lr=lr, momentum=0.9, weight_decay=0.1, differentiable=True)
        for k in range(3):
            optimizer.param_groups[0]["momentum"] = 0.9 * (scale if k == 1 else 1.0)
            p.grad = p.clone() ** 3
            optimizer.step()
        return p

    assert torch.autograd.gradcheck(after_three_steps, (x0, lr0))


def test_maximize_climbs(kernel):
    p = Parameter(torch.ones(2))
    optimizer = SGDM([p], lr=0.1, maximize=True, **kernel)
    for _ in range(3):
        p.grad = torch.ones(2)
        optimizer.step()
    torch.testing.assert_close(p.detach(), 1 + 0.1 * torch.full((2,), 0.1 + 0.19 + 0.271))


def test_closure_is_run_with_gradients_and_returned(kernel):
    p = Parameter(torch.ones(2))
    optimizer = SGDM([p], lr=0.1, **kernel)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert torch.equal(p, torch.full((2,), 1 - 0.1 * 0.1 * 2))
    assert optimizer.step() is None


def test_repr_names_class_and_hyperparameters():
    text = repr(SGDM([Parameter(torch.ones(2))], lr=0.25, momentum=0.5))
    assert text.startswith("SGDM (\nParameter Group 0\n")
    assert "    lr: 0.25\n" in text
    assert "    momentum: 0.5\n" in text
    assert "    dampening: 0.5\n" in text


def test_learning_rate_and_momentum_schedulers_drive_it():
    model = make_model()
    optimizer = SGDM(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=10)
    for _ in range(5):
        train(model, optimizer, 1)
        scheduler.step()
    group = optimizer.param_groups[0]
    assert group["momentum"] != 0.9
    train(model, optimizer, 1)
    assert group["dampening"] == group["momentum"]


def test_bad_parameter_lists_fail_as_in_torch():
    p, q = Parameter(torch.ones(1)), Parameter(torch.ones(1))
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        SGDM(p, lr=0.1)
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        SGDM.from_heavy_ball(p, lr=0.1)
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        SGDM([p, p], lr=0.1)
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        SGDM([{"params": p}, {"params": p}], lr=0.1)
    with pytest.raises(ValueError, match="should be with/without names"):
        SGDM([("p", p), q], lr=0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        SGDM([], lr=0.1)
    with pytest.raises(TypeError, match="must be a dict"):
        SGDM([p], lr=0.1).add_param_group([q])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("steps", [0, 2])
def test_accelerates_wrapper(momentum, steps):
    from accelerate import Accelerator

    model = make_model()
    optimizer = SGDM(model.parameters(), lr=0.1, momentum=momentum)
    train(model, optimizer, steps)
    other_model, other = copy.deepcopy((model, optimizer))
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    assert wrapped.optimizer is optimizer
    assert_same_continuation(model, wrapped, other_model, other)
    assert len(optimizer.state) == (4 if momentum else 0)


@pytest.mark.parametrize("fused", [None, True])
def test_gradient_scaling(fused):
    p = Parameter(torch.ones(4))
    optimizer = SGDM([p], lr=0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(p.sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(p.detach(), torch.full((4,), 0.99))
    before, buffer = p.detach().clone(), optimizer.state[p]["momentum_buffer"].clone()
    optimizer.param_groups[0]["momentum"] = 0.0
    p.grad = torch.full((4,), float("inf"))
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert torch.equal(p, before)
    assert torch.equal(optimizer.state[p]["momentum_buffer"], buffer)


def test_a_compiled_step_is_the_same_step():
    model = make_model()
    other_model = copy.deepcopy(model)
    optimizer = SGDM(model.parameters(), lr=0.1)
    other = SGDM(other_model.parameters(), lr=0.1)
    optimizer.step = torch.compile(optimizer.step, backend="eager")
    assert_same_continuation(model, optimizer, other_model, other)


def test_gradients_of_a_wider_type_than_their_parameter(kernel):
    p = Parameter(torch.ones(16, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    optimizer = SGDM([p], lr=0.5, momentum=0.5, **kernel)
    p.grad = torch.ones(16)
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].dtype == torch.bfloat16
    assert torch.equal(p.detach(), torch.full((16,), 0.75, dtype=torch.bfloat16))
