"""Steps during the backward pass, held to SGDM's own, without a Trainer."""

import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from hf_momentum import SGDM
from hf_momentum.errors import UserError
from hf_momentum.optim import FusedBackward, remove_fused_backward

INPUTS = torch.randn(8, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Net(nn.Module):
    """One matrix used three times, a layer of its own, and one that is never used."""

    def __init__(self, reentrant: bool | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.last, self.unused = nn.Linear(5, 5), nn.Linear(5, 1), nn.Linear(2, 2)
        self.reentrant = reentrant
        self.double()

    def forward(self, x):
        for _ in range(2):
            if self.reentrant is None:
                x = torch.tanh(self.shared(x))
            else:
                x = checkpoint(lambda y: torch.tanh(self.shared(y)), x, use_reentrant=self.reentrant)
        return self.last(x @ self.shared.weight).square().mean()


def groups(net: Net) -> list[dict]:
    return [{"params": net.shared.parameters(), "weight_decay": 0.1}, {"params": [*net.last.parameters()]}]


def train(net: Net, fuse: bool, steps: int = 4, **settings) -> list[torch.Tensor]:
    """Train with a learning rate that falls, and return the weights after every step."""
    optimizer = SGDM(groups(net), lr=0.5, momentum=0.0, **settings)
    steps_made, fused = [], FusedBackward(optimizer) if fuse else None
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.5 / (step + 1)
        if fused:
            fused.begin_step()
        net(INPUTS).backward()
        if fused:
            fused.end_step()
            assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])
        optimizer.step()
        optimizer.zero_grad()
        steps_made.append(torch.cat([p.detach().flatten().clone() for p in net.parameters()]))
    return steps_made


@pytest.mark.parametrize("settings", [{}, {"maximize": True}, {"fused": True}])
@pytest.mark.parametrize("reentrant", [None, False])
def test_the_steps_are_plain_sgds(settings, reentrant):
    expected, found = train(Net(reentrant), False, **settings), train(Net(reentrant), True, **settings)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert not torch.equal(found[0], found[1])


def test_a_tensor_as_learning_rate():
    nets = Net(), Net()
    for net, fused in zip(nets, (False, True), strict=True):
        optimizer = SGDM(groups(net), lr=torch.tensor(0.3), momentum=0.0)
        fuse = FusedBackward(optimizer) if fused else None
        if fuse:
            fuse.begin_step()
        net(INPUTS).backward()
        optimizer.step()
    torch.testing.assert_close(nets[0].state_dict(), nets[1].state_dict(), atol=1e-12, rtol=0)


def test_few_gradients_exist_at_a_time():
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(10)])
    fuse, alive = FusedBackward(SGDM(net.parameters(), lr=0.1, momentum=0.0)), []
    for p in net.parameters():
        p.register_post_accumulate_grad_hook(lambda _: alive.append(sum(q.grad is not None for q in net.parameters())))
    fuse.begin_step()
    net(torch.ones(2, 4)).sum().backward()
    assert len(alive) == 20
    assert max(alive) == 0  # at the hook after ours


def test_there_is_no_state_and_loading_one_keeps_the_hooks_at_work():
    net = Net()
    optimizer = SGDM(groups(net), lr=0.5, momentum=0.0)
    fuse = FusedBackward(optimizer)
    saved = optimizer.state_dict()
    saved["param_groups"][1]["lr"] = 0.0
    optimizer.load_state_dict(saved)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fuse.begin_step()
    net(INPUTS).backward()
    optimizer.step()
    assert not optimizer.state
    assert torch.equal(net.last.weight, before["last.weight"])
    assert not torch.equal(net.shared.weight, before["shared.weight"])


def clip_values(net: nn.Module) -> None:
    for p in net.parameters():
        p.register_hook(lambda g: g.clamp(-1e-2, 1e-2))


def clip_norms(net: nn.Module) -> None:
    def clip(p: torch.Tensor) -> None:
        clip_grad_norm_([p], 1e-2)

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(clip)


@pytest.mark.parametrize("clip", [clip_values, clip_norms])
def test_hooks_that_were_there_before_clip_the_gradients(clip):
    free = train(Net(), False)
    nets = Net(), Net()
    for net in nets:
        clip(net)
    expected, found = train(nets[0], False), train(nets[1], True)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    assert (free[0] - found[0]).abs().max() > 1e-2


def test_the_norm_of_all_gradients_is_the_plain_one():
    nets = Net(), Net()
    nets[0](INPUTS).backward()
    expected = clip_grad_norm_(nets[0].parameters(), float("inf"))
    fuse = FusedBackward(SGDM(groups(nets[1]), lr=0.5, momentum=0.0))
    norms = []
    for _ in range(2):
        fuse.begin_step()
        nets[1](INPUTS).backward()
        norms.append(fuse.grad_norm)
    assert norms[0] == pytest.approx(float(expected), rel=1e-12)
    assert norms[1] != pytest.approx(float(expected), rel=1e-3)  # of the second step alone


def test_outside_of_a_step_and_once_removed_or_gone_gradients_are_left_alone():
    net = Net()
    fuse = FusedBackward(SGDM(groups(net), lr=0.5, momentum=0.0))
    before = net.shared.weight.detach().clone()

    def backward_leaves_the_weights():
        net.zero_grad()
        net(INPUTS).backward()
        net(INPUTS).backward()
        assert torch.equal(net.shared.weight, before)
        assert net.shared.weight.grad is not None

    backward_leaves_the_weights()
    fuse.begin_step()
    fuse.end_step()
    backward_leaves_the_weights()
    fuse.begin_step()
    remove_fused_backward(net.parameters())
    backward_leaves_the_weights()
    fuse = FusedBackward(SGDM(groups(net), lr=0.5, momentum=0.0))
    fuse.begin_step()
    fuse.remove()
    backward_leaves_the_weights()
    fuse = FusedBackward(SGDM(groups(net), lr=0.5, momentum=0.0))
    fuse.begin_step()
    del fuse
    gc.collect()
    backward_leaves_the_weights()


def test_a_new_one_takes_the_place_of_the_old():
    net = Net()
    old, new = (FusedBackward(SGDM(groups(net), lr=lr, momentum=0.0)) for lr in (100.0, 0.0))
    before = net.shared.weight.detach().clone()
    old.begin_step()
    new.begin_step()
    net(INPUTS).backward()
    assert torch.equal(net.shared.weight, before)


def test_two_backward_passes_in_a_step_are_refused():
    net = Net()
    fuse = FusedBackward(SGDM(groups(net), lr=0.5, momentum=0.0))
    fuse.begin_step()
    net(INPUTS).backward()
    with pytest.raises(UserError, match=r"gradient in two parts.*one backward pass per step.*use_reentrant=True"):
        net(INPUTS).backward()


def test_a_parameter_in_two_reentrant_segments_is_refused():
    net = Net(reentrant=True)
    fuse = FusedBackward(SGDM(groups(net), lr=0.5, momentum=0.0))
    fuse.begin_step()
    with pytest.raises(UserError, match="gradient in two parts"):
        net(INPUTS.clone().requires_grad_()).backward()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])  # by another kernel
def test_a_detached_use_of_a_parameter_is_caught_by_autograd(weight_decay):
    first, second = nn.Linear(3, 3), nn.Linear(3, 3)
    parameters = [*first.parameters(), *second.parameters()]
    fuse = FusedBackward(SGDM(parameters, lr=0.5, momentum=0.0, weight_decay=weight_decay))
    fuse.begin_step()
    x = first(torch.ones(2, 3)) @ second.weight.detach()  # its backward needs second's old weights
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second(x).sum().backward()


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda p: SGDM(p, 0.1), "needs plain SGD, SGDM with momentum 0, and this is SGDM with momentum"),
        (lambda p: SGDM([{"params": p, "keep_buffer": True}], 0.1, momentum=0.0), "SGDM with momentum"),
        (lambda p: torch.optim.SGD(p, 0.1), r"this is SGD\. Use optim='sgd'"),
    ],
)
def test_momentum_and_other_optimizers_are_refused(build, message):
    with pytest.raises(UserError, match=message):
        FusedBackward(build([nn.Parameter(torch.ones(1))]))


def test_momentum_cannot_be_raised_afterwards():
    parameter = nn.Parameter(torch.ones(1))
    optimizer = SGDM([parameter], 0.1, momentum=0.0)
    fuse = FusedBackward(optimizer)
    optimizer.param_groups[0]["momentum"] = 0.9
    with pytest.raises(UserError, match="needs plain SGD"):
        fuse.begin_step()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(5, 3, sparse=True)
    fuse = FusedBackward(SGDM(embedding.parameters(), lr=0.1, momentum=0.0))
    fuse.begin_step()
    with pytest.raises(UserError, match="does not support sparse gradients"):
        embedding(torch.tensor([1, 2])).sum().backward()
