"""SGDM is Eq. 3, step by step, on every kernel; momentum 0 is torch's SGD; Eq. 1 converts."""

import copy
import random

import pytest
import torch
from torch.nn import Parameter

from hf_momentum.errors import UserError
from hf_momentum.optim import SGDM, sgdm
from hf_momentum.optim.sgdm import reference_sgdm_step

KERNELS = {
    "loop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "default": {},
}
SHAPES = [(5, 3), (7,), (), (2, 0)]


def make_params(dtype=torch.float64, shapes=SHAPES):
    return [Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def set_grads(params):
    for p in params:
        p.grad = torch.randn_like(p)


def step_with_same_grads(params, optimizer, others, other):
    set_grads(params)
    for p, q in zip(params, others, strict=True):
        q.grad = p.grad.clone()
    optimizer.step()
    other.step()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=KERNELS)
def kernel(request):
    return KERNELS[request.param]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("zeros", [(), (0, 1), (3, 7, 8), tuple(range(25))], ids=["none", "first", "inside", "all"])
def test_every_step_is_equation_3(kernel, zeros, maximize):
    rng = random.Random(str(zeros))
    params = make_params()
    optimizer = SGDM(params, lr=1.0, momentum=0.5, weight_decay=0.1, maximize=maximize, **kernel)
    xs, ms = [p.detach().clone() for p in params], [torch.zeros_like(p) for p in params]
    for k in range(25):
        lr, beta, decay = rng.uniform(0.01, 0.5), 0.0 if k in zeros else rng.random() * 0.99, rng.random()
        optimizer.param_groups[0].update(lr=lr, momentum=beta, weight_decay=decay)
        set_grads(params)
        sign = -1 if maximize else 1
        for i, p in enumerate(params):
            xs[i], ms[i] = reference_sgdm_step(xs[i], ms[i], sign * p.grad, lr, beta, decay)
        optimizer.step()
        for p, x, m in zip(params, xs, ms, strict=True):
            torch.testing.assert_close(p.detach(), x, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], m, rtol=1e-12, atol=1e-12)
        assert optimizer.param_groups[0]["dampening"] == optimizer.param_groups[0]["momentum"] == beta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.complex64, torch.complex128])
def test_zero_momentum_makes_the_buffer_the_gradient(kernel, dtype):
    if dtype.is_complex and kernel.get("fused"):
        pytest.skip("the fused kernel has no complex numbers")
    params = make_params(dtype)
    optimizer = SGDM(params, lr=0.1, **kernel)
    set_grads(params)
    optimizer.step()
    optimizer.param_groups[0]["momentum"] = 0.0
    set_grads(params)
    before = [p.detach().clone() for p in params]
    optimizer.step()
    for p, x in zip(params, before, strict=True):
        buffer = optimizer.state[p]["momentum_buffer"]
        assert buffer.dtype == dtype
        if dtype == torch.complex128:
            torch.testing.assert_close(buffer, p.grad, rtol=1e-15, atol=0)
        else:
            assert torch.equal(buffer, p.grad)
        torch.testing.assert_close(p.detach(), x - 0.1 * p.grad, rtol=0.01, atol=0.01)


def test_the_first_step_is_damped_where_torch_is_not():
    (p,), (q,) = make_params(shapes=[(3,)]), make_params(shapes=[(3,)])
    q.data.copy_(p)
    start = p.detach().clone()
    step_with_same_grads(
        [p], SGDM([p], lr=1.0, momentum=0.9), [q], torch.optim.SGD([q], lr=1.0, momentum=0.9, dampening=0.9)
    )
    torch.testing.assert_close(p.detach(), start - 0.1 * p.grad)
    torch.testing.assert_close(q.detach(), start - p.grad)


def test_without_momentum_it_is_torchs_sgd_bit_by_bit_and_has_no_state(kernel):
    params = make_params(torch.float32)
    others = copy.deepcopy(params)
    ours = SGDM(params, lr=0.3, momentum=0, weight_decay=0.1, **kernel)
    theirs = torch.optim.SGD(others, lr=0.3, weight_decay=0.1, **kernel)
    for _ in range(5):
        step_with_same_grads(params, ours, others, theirs)
        assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
        assert len(ours.state) == 0
    assert ours.state_dict()["state"] == {}
    assert ours.param_groups[0]["keep_buffer"] is False


@pytest.mark.parametrize(
    ("settings", "dtype", "expected"),
    [
        ({"momentum": 0.9}, torch.float32, (True, False)),
        ({"momentum": 0.0, "weight_decay": 0.1}, torch.bfloat16, (True, False)),
        ({"momentum": 0.0}, torch.float32, (False, True)),
        ({"momentum": 0.9}, torch.complex64, (False, False)),
        ({"momentum": 0.9, "differentiable": True}, torch.float32, (False, False)),
        ({"momentum": 0.9, "fused": False}, torch.float32, (False, None)),
    ],
)
def test_the_default_kernel_on_the_cpu_is_the_fastest(monkeypatch, settings, dtype, expected):
    chosen = []
    monkeypatch.setattr(sgdm, "sgd", lambda *_, fused, foreach, **__: chosen.append((fused, foreach)))
    p = Parameter(torch.ones(2, dtype=dtype))
    p.grad = torch.ones_like(p)
    SGDM([p], lr=0.1, **settings).step()
    assert chosen == [expected]


def test_momentum_raised_before_the_first_step_is_kept():
    params = make_params()
    optimizer = SGDM(params, lr=0.1, momentum=0.0)
    optimizer.step()  # no gradients: nothing is settled
    assert optimizer.param_groups[0]["keep_buffer"] is None
    optimizer.param_groups[0]["momentum"] = 0.9
    set_grads(params)
    optimizer.step()
    for p in params:
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], 0.1 * p.grad)


def test_momentum_raised_after_stateless_steps_is_refused_and_nothing_moves():
    params = make_params(shapes=[(2,), (3,)])
    optimizer = SGDM([{"params": params[:1], "momentum": 0.9}, {"params": params[1:]}], lr=0.1, momentum=0.0)
    set_grads(params)
    optimizer.step()
    optimizer.param_groups[1]["momentum"] = 0.5
    before = [p.detach().clone() for p in params]
    with pytest.raises(UserError, match=r"Invalid momentum value: 0\.5.*keep_buffer"):
        optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
    optimizer.param_groups[1]["keep_buffer"] = True
    optimizer.step()
    torch.testing.assert_close(optimizer.state[params[1]]["momentum_buffer"], 0.5 * params[1].grad)


def test_keep_buffer_false_frees_the_buffers():
    params = make_params()
    optimizer = SGDM(params, lr=0.1)
    set_grads(params)
    optimizer.step()
    optimizer.param_groups[0].update(momentum=0.0, keep_buffer=False)
    params[0].grad = None
    optimizer.step()
    assert len(optimizer.state) == 0


def test_keep_buffer_true_lets_momentum_rise_from_zero():
    params = make_params()
    optimizer = SGDM(params, lr=0.1, momentum=0.0)
    optimizer.param_groups[0]["keep_buffer"] = True
    set_grads(params)
    optimizer.step()
    first = [p.grad for p in params]
    optimizer.param_groups[0]["momentum"] = 0.75
    set_grads(params)
    optimizer.step()
    for p, g in zip(params, first, strict=True):
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], 0.75 * g + 0.25 * p.grad)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.99])
def test_from_heavy_ball_makes_torchs_iterates(kernel, beta):
    params = make_params()
    others = copy.deepcopy(params)
    ours = SGDM.from_heavy_ball(iter(params), lr=0.01, momentum=beta, weight_decay=0.1, **kernel)
    theirs = torch.optim.SGD(others, lr=0.01, momentum=beta, weight_decay=0.1)
    for _ in range(20):
        step_with_same_grads(params, ours, others, theirs)
        torch.testing.assert_close(params, others, rtol=1e-12, atol=1e-12)


def test_from_heavy_ball_converts_each_group_with_its_own_momentum():
    params = make_params(shapes=[(2,)] * 4)
    groups = [
        {"params": params[:1]},
        {"params": params[1:2], "lr": 0.2},
        {"params": params[2:3], "momentum": 0.5},
        {"params": params[3:], "lr": 0.2, "momentum": 0.0},
    ]
    given = copy.deepcopy(groups)
    optimizer = SGDM.from_heavy_ball(groups, lr=0.1, momentum=0.9)
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([1.0, 2.0, 0.2, 0.2])
    assert [set(group) for group in groups] == [set(group) for group in given]


@pytest.mark.parametrize("scheduler", [False, True])
def test_load_heavy_ball_state_goes_on_with_torchs_iterates(kernel, scheduler):
    params = make_params()
    others = copy.deepcopy(params)
    groups = lambda ps: [{"params": ps[:2]}, {"params": ps[2:], "momentum": 0.5, "lr": 0.02}]  # noqa: E731
    theirs = torch.optim.SGD(groups(others), lr=0.01, momentum=0.9, weight_decay=0.1)
    if scheduler:
        torch.optim.lr_scheduler.StepLR(theirs, 100)
    for _ in range(3):
        set_grads(others)
        theirs.step()
    for p, q in zip(params, others, strict=True):
        p.data.copy_(q)
    checkpoint = theirs.state_dict()
    kept = copy.deepcopy(checkpoint)
    ours = SGDM(groups(params), lr=5.0, **kernel)
    ours.load_heavy_ball_state(checkpoint)
    torch.testing.assert_close(checkpoint, kept, rtol=0, atol=0)
    assert [g["lr"] for g in ours.param_groups] == pytest.approx([0.1, 0.04])
    assert [g.get("initial_lr") for g in ours.param_groups] == (
        pytest.approx([0.1, 0.04]) if scheduler else [None] * 2
    )
    assert [g["weight_decay"] for g in ours.param_groups] == [0.1, 0.1]
    for _ in range(10):
        step_with_same_grads(params, ours, others, theirs)
        torch.testing.assert_close(params, others, rtol=1e-12, atol=1e-12)


def test_load_heavy_ball_state_without_momentum_or_buffers():
    params = make_params()
    plain = torch.optim.SGD(make_params(), lr=0.1).state_dict()
    plain["state"] = {i: {"momentum_buffer": None} for i in range(len(params))}
    ours = SGDM(params, lr=1.0)
    ours.load_heavy_ball_state(plain)
    set_grads(params)
    ours.step()
    assert ours.param_groups[0]["lr"] == 0.1
    assert len(ours.state) == 0

    fresh = torch.optim.SGD(make_params(), lr=0.1, momentum=0.5).state_dict()
    fresh["state"] = {0: {"momentum_buffer": None}}
    ours.load_heavy_ball_state(fresh)
    assert ours.param_groups[0]["lr"] == 0.2
    assert len(ours.state) == 0


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"nesterov": True}, "Nesterov"),
        ({"dampening": 0.5}, "dampening 0.5"),
        ({"dampening": 0.9}, "use load_state_dict"),
    ],
)
def test_load_heavy_ball_state_refuses_other_forms(kwargs, message):
    theirs = torch.optim.SGD(make_params(), lr=0.1, momentum=0.9, **kwargs)
    ours = SGDM(make_params(), lr=1.0)
    with pytest.raises(UserError, match=message):
        ours.load_heavy_ball_state(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 1.0


def test_load_heavy_ball_state_refuses_what_is_no_sgd_checkpoint():
    ours = SGDM(make_params(), lr=1.0)
    with pytest.raises(UserError, match=r"no checkpoint of torch\.optim\.SGD"):
        ours.load_heavy_ball_state(torch.optim.Adam(make_params()).state_dict())
    with pytest.raises(UserError, match="lacks 'state'"):
        ours.load_heavy_ball_state({"model": 1})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lr": -1}, "Invalid learning rate: -1"),
        ({"lr": -0.5}, r"Invalid learning rate: -0\.5"),
        ({"lr": float("nan")}, "Invalid learning rate: nan"),
        ({"lr": float("inf")}, "Invalid learning rate: inf"),
        ({"lr": "0.1"}, "Invalid learning rate: '0.1'"),
        ({"lr": torch.tensor(-1.0)}, "Invalid learning rate: -1"),
        ({"lr": torch.ones(2)}, "Tensor lr must be 1-element"),
        ({"momentum": 1.5}, r"Invalid momentum value: 1\.5"),
        ({"momentum": 1.0}, r"Invalid momentum value: 1\.0"),
        ({"momentum": -0.5}, r"Invalid momentum value: -0\.5"),
        ({"momentum": float("nan")}, "Invalid momentum value: nan"),
        ({"momentum": True}, "Invalid momentum value: True"),
        ({"momentum": "0.9"}, "Invalid momentum value: 0.9"),
        ({"weight_decay": -1}, "Invalid weight_decay value: -1"),
    ],
)
def test_values_out_of_range_are_refused(kwargs, message):
    params = make_params(shapes=[(2,), (2,)])
    with pytest.raises(UserError, match=message):
        SGDM(params[:1], **{"lr": 0.1, **kwargs})
    with pytest.raises(UserError, match=message):
        SGDM([{"params": params[:1], **kwargs}], lr=0.1)
    optimizer = SGDM(params[:1], lr=0.1)
    with pytest.raises(UserError, match=message):
        optimizer.add_param_group({"params": params[1:], **kwargs})
    assert len(optimizer.param_groups) == 1


def test_momentum_out_of_range_in_a_schedule_is_refused_before_anything_moves():
    (p,) = make_params(shapes=[(2,)])
    optimizer = SGDM([p], lr=0.1)
    optimizer.param_groups[0]["momentum"] = 1.0
    set_grads([p])
    before = p.detach().clone()
    with pytest.raises(UserError, match=r"Invalid momentum value: 1\.0"):
        optimizer.step()
    assert torch.equal(p, before)


def test_groups_of_another_form_are_refused():
    params = make_params(shapes=[(2,)])
    with pytest.raises(UserError, match="dampening 0; in SGDM both are equal"):
        SGDM([{"params": params, "dampening": 0}], lr=0.1)
    with pytest.raises(UserError, match="Nesterov"):
        SGDM([{"params": params, "nesterov": True}], lr=0.1)
    with pytest.raises(TypeError):
        SGDM(params, lr=0.1, nesterov=True)


def test_a_heavy_ball_checkpoint_is_not_taken_for_an_effective_one():
    ours = SGDM(make_params(), lr=1.0, momentum=0.9)
    with pytest.raises(UserError, match="load_heavy_ball_state"):
        ours.load_state_dict(torch.optim.SGD(make_params(), lr=0.1, momentum=0.9).state_dict())
    with pytest.raises(UserError, match="no state of SGDM"):
        ours.load_state_dict(torch.optim.Adam(make_params()).state_dict())
    assert ours.param_groups[0]["lr"] == 1.0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sparse_gradients_are_refused_before_anything_moves(kernel, momentum):
    embedding, p = torch.nn.Embedding(5, 3, sparse=True), Parameter(torch.randn(2))
    optimizer = SGDM([{"params": [p]}, {"params": embedding.parameters()}], lr=0.1, momentum=momentum, **kernel)
    (embedding(torch.tensor([1, 2])).sum() + p.sum()).backward()
    before = p.detach().clone()
    with pytest.raises(UserError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(p, before)
