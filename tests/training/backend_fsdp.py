"""SGDM on parameters that `fully_shard` shards over two processes: cases for `backend_run.py`."""

from unittest import mock

import torch
from backend_run import RATE, backend_arguments, build, cpu_as_accelerator, shared_folder
from tiny_models import TokenRows, tiny_classifier
from torch import distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import Trainer, TrainingArguments

from hf_momentum import SGDM
from hf_momentum.errors import UserError

STEPS = 6


def build_network(sharded: bool) -> nn.Sequential:
    """Five hidden units, so that two processes hold shards of unequal size."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    if sharded:
        fully_shard(network[0])
        fully_shard(network)
    return network


def step(network: nn.Module, optimizer: torch.optim.Optimizer, index: int, sharded: bool) -> None:
    """One step on eight rows; a process of a sharded network takes its half of them."""
    rows = torch.randn(8, 6, generator=torch.Generator().manual_seed(index), dtype=torch.float64)
    if sharded:
        rows = rows.chunk(2)[dist.get_rank()]
    network(rows).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def difference(sharded: nn.Module, whole: nn.Module) -> float:
    """The largest absolute difference of two networks' parameters."""
    pairs = zip(sharded.parameters(), whole.parameters(), strict=True)
    return max((p.full_tensor() - q).abs().max().item() for p, q in pairs)


def kernels() -> dict:
    """Per kernel and momentum: the distance from one process, the class of the buffers, and their size here."""
    seen = {}
    for foreach in (None, False, True):
        for momentum in (0.0, 0.8):
            networks = build_network(True), build_network(False)
            settings = {"lr": 0.3, "momentum": momentum, "weight_decay": 0.1, "foreach": foreach}
            optimizers = [SGDM(network.parameters(), **settings) for network in networks]
            for index in range(STEPS):
                for network, optimizer, sharded in zip(networks, optimizers, (True, False), strict=True):
                    step(network, optimizer, index, sharded)
            buffers = [state["momentum_buffer"] for state in optimizers[0].state.values()]
            seen[foreach, momentum] = {
                "difference": difference(*networks),
                "sharded": [type(buffer) is DTensor for buffer in buffers],
                "elements": sum(buffer.to_local().numel() for buffer in buffers),
            }
    return seen


def mixed_group() -> float:
    """The distance from one process where a group holds sharded and whole parameters, and torch prefers foreach.

    As on a GPU with adapters that were added to a sharded model. foreach kernels take no mixture.
    """
    networks = build_network(True), build_network(False)
    alone = [nn.Parameter(torch.ones(4, dtype=torch.float64)) for _ in networks]
    with mock.patch("hf_momentum.optim.sgdm._default_to_fused_or_foreach", lambda *_, **__: (False, True)):
        for network, parameter, sharded in zip(networks, alone, (True, False), strict=True):
            optimizer = SGDM([*network.parameters(), parameter], lr=0.3, momentum=0.8)
            for index in range(STEPS):
                parameter.grad = torch.full_like(parameter, float(index))
                step(network, optimizer, index, sharded)
    return max(difference(*networks), (alone[0] - alone[1]).abs().max().item())


def state_dicts() -> dict:
    """The full state of a sharded SGDM: equal to one process's, and good to go on from on a new sharded network."""
    options = StateDictOptions(full_state_dict=True)
    sharded, whole = build_network(True), build_network(False)
    optimizers = [SGDM(network.parameters(), lr=0.3, momentum=0.8) for network in (sharded, whole)]
    for index in range(STEPS):
        step(sharded, optimizers[0], index, True)
        step(whole, optimizers[1], index, False)
    state = get_optimizer_state_dict(sharded, optimizers[0], options=options)
    buffers = {name: entry["momentum_buffer"] for name, entry in state["state"].items()}
    named = dict(whole.named_parameters())
    apart = [(buffers[name] - optimizers[1].state[named[name]]["momentum_buffer"]).abs().max() for name in buffers]
    resumed = build_network(True)
    with torch.no_grad():
        for p, q in zip(resumed.parameters(), sharded.parameters(), strict=True):
            p.copy_(q)
    optimizer = SGDM(resumed.parameters(), lr=0.1, momentum=0.5)
    set_optimizer_state_dict(resumed, optimizer, state, options=StateDictOptions(full_state_dict=True))
    step(resumed, optimizer, STEPS, True)
    step(whole, optimizers[1], STEPS, False)
    group = optimizer.param_groups[0]
    return {
        "names": sorted(buffers),
        "buffers": max(apart).item(),
        "resumed": difference(resumed, whole),
        "settings": (group["lr"], group["momentum"], group["dampening"]),
    }


def fsdp_trainer(as_accelerator: bool) -> tuple[Trainer | None, str]:
    """A Trainer with `fsdp=True` and `optimizers=`, and the message of its refusal."""
    arguments = backend_arguments("fsdp") | {"output_dir": shared_folder(), "max_steps": 1, "report_to": "none"}
    args = TrainingArguments(use_cpu=True, disable_tqdm=True, save_strategy="no", **arguments)
    model = tiny_classifier()
    given = {"optimizers": (torch.optim.SGD(model.parameters(), lr=RATE), None)} if as_accelerator else {}
    try:
        return Trainer(model, args, train_dataset=TokenRows(), **given), ""
    except RuntimeError as error:
        return None, str(error)


def bare_optimizers() -> str:
    """Trap 3: the message with which FSDP refuses `optimizers=`."""
    with cpu_as_accelerator():
        return fsdp_trainer(as_accelerator=True)[1]


def bare_cpu() -> bool:
    """Whether `fsdp=True` on a CPU shards, in a Trainer that trains without complaint."""
    trainer, _ = fsdp_trainer(as_accelerator=False)
    trainer.train()
    return trainer.is_fsdp_enabled


def unsharded() -> str:
    """What the Trainer's `fsdp=True` says on a CPU, where accelerate trains with DDP instead."""
    try:
        build(shared_folder(), "fsdp", "sgd", gradient_accumulation_steps=1).train()
    except UserError as error:
        return str(error)
    return "no error"
