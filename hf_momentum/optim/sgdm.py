"""SGD with momentum as the theory writes it (Eq. 3), on torch's own kernels; momentum 0 is plain SGD without state.

Per parameter, from `m₀ = 0`, with the gradient `g_k` and the weight decay w:

    m_k = β_k m_{k−1} + (1−β_k) (g_k + w x_{k−1})
    x_k = x_{k−1} − η_k m_k

Wang et al., "The Marginal Value of Momentum for Small Learning Rate SGD" (ICLR 2024, arXiv 2307.15196), Eq. 3.
`torch.optim.SGD(dampening=β)` is not this: it stores the first gradient undamped, and leaves the buffer as it was
while β is 0. Here buffers start at zero, and a kernel that must keep its buffer at β = 0 gets a β too small to matter.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, _default_to_fused_or_foreach, _use_grad_for_differentiable
from torch.optim.sgd import sgd

from hf_momentum.errors import UserError
from hf_momentum.optim.schedules import check_momentum, check_nonnegative, effective_lr

# Not 0, so that the kernels update the buffer at β = 0; times m it is 0 in every type but float64, and nothing there.
_ZERO_MOMENTUM = 1e-300

NO_SPARSE_GRADIENTS = (
    "SGDM does not support sparse gradients. Build the layer that makes them with sparse=False (torch.nn.Embedding's "
    "default)."
)

_LEARNING_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


class SGDM(torch.optim.SGD):
    """SGD with momentum in the form of Eq. 3, where `lr` is the effective learning rate η.

    `group["lr"]`, `group["momentum"]` and `group["weight_decay"]` may change between steps; every step is Eq. 3 with
    what it finds there, through β = 0 and back. `group["dampening"]` follows the momentum at the next step or
    `state_dict()` and is not for setting.

    **When a buffer is kept.** `group["keep_buffer"]` says whether the group keeps m, one tensor per parameter:

    - A group made with momentum > 0 keeps it (True), also while a schedule holds β at 0: m is then the last gradient,
      which Eq. 3 needs when β rises. So for a schedule that starts at 0, make the optimizer with any momentum > 0.
    - A group made with momentum 0 decides at its first step with a gradient (None until then): still at 0 it keeps
      nothing, not even an empty entry in `state` (False), and is plain SGD. Raising the momentum later is an error,
      since the last gradient is gone.
    - It may be set by hand at any time: False at momentum 0 frees the buffers at the next step, True starts m at 0.

    **Kernels.** With `foreach=None, fused=None` parameters on the CPU take what is fastest there: the fused kernel
    with a buffer or weight decay, foreach without. Elsewhere the choice is torch's own for SGD. Without momentum the
    steps are those of `torch.optim.SGD` with the same kernel, bit by bit.

    Args:
        params: Parameters, `(name, parameter)` pairs, or dicts of parameter groups; a group may set its own `lr`,
            `momentum` and `weight_decay`.
        lr: Effective learning rate η ≥ 0, a number or a tensor of one element.
        momentum: β in [0, 1).
        weight_decay: L2 penalty w ≥ 0, added to the gradient before momentum.
        maximize: Ascend instead of descend.
        foreach: Use the multi-tensor kernel.
        fused: Use the fused kernel; it cannot be differentiated through.
        differentiable: Let autograd run through the steps, which then use the for-loop unless told otherwise.

    Raises:
        UserError: If lr, momentum or weight decay is out of range, here or in a group.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        momentum = check_momentum(momentum)
        super().__init__(
            params,
            lr=check_nonnegative("learning rate", lr),
            momentum=momentum,
            dampening=momentum,
            weight_decay=check_nonnegative("weight_decay value", weight_decay),
            maximize=maximize,
            foreach=foreach,
            fused=fused,
            differentiable=differentiable,
        )

    @classmethod
    def from_heavy_ball(cls, params: ParamsT, lr: float | Tensor, momentum: float = 0.9, **kwargs: Any) -> "SGDM":
        """Make the optimizer from Eq. 1's learning rate γ, as `torch.optim.SGD(params, lr=γ, momentum=β)` takes it.

        For constant β the iterates are Eq. 1's. Each group's own `lr` is a γ too, converted with the group's momentum.

        Args:
            params: As for the class.
            lr: γ; the effective learning rate is `γ / (1−β)`.
            momentum: β in [0, 1).
            **kwargs: The other arguments of the class.

        Returns:
            The optimizer, in the effective form.
        """
        params = params if isinstance(params, Tensor) else list(params)
        if len(params) and isinstance(params[0], dict):
            params = [
                {**group, "lr": effective_lr(group.get("lr", lr), group.get("momentum", momentum))} for group in params
            ]
        return cls(params, effective_lr(lr, momentum), momentum, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, with its own `lr`, `momentum` or `weight_decay` where it sets them.

        Args:
            param_group: The group, as for `torch.optim.Optimizer.add_param_group`.
        """
        if isinstance(param_group, dict):  # anything else is torch's to refuse
            group = {**self.defaults, "dampening": None, **param_group}
            _check_form(group)
            param_group["lr"] = check_nonnegative("learning rate", group["lr"])
            param_group["weight_decay"] = check_nonnegative("weight_decay value", group["weight_decay"])
            param_group["momentum"] = param_group["dampening"] = group["momentum"]
            param_group.setdefault("keep_buffer", group["momentum"] > 0 or None)
        super().add_param_group(param_group)

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor | None]
    ) -> bool:
        # Collects what a step of one group works on and makes the buffers that are missing; none leave the list empty.
        group["momentum"] = group["dampening"] = check_momentum(group["momentum"])
        if super()._init_group({**group, "momentum": 0.0}, params, grads, []):
            raise UserError(NO_SPARSE_GRADIENTS)
        if params and _keeps_buffer(group):
            for p in params:
                buffer = (state := self.state[p]).get("momentum_buffer")
                if buffer is None:
                    buffer = torch.zeros_like(p, memory_format=torch.preserve_format)
                if group["differentiable"]:  # autograd may have saved the last one for the gradient of a tensor lr
                    buffer = buffer.clone()
                state["momentum_buffer"] = buffer
                buffers.append(buffer)
        elif group["keep_buffer"] is False:
            for p in group["params"]:
                self.state.pop(p, None)
        return False

    @_use_grad_for_differentiable
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step of Eq. 3.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            What the closure returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = []
        for group in self.param_groups:  # all groups are checked before the first one moves
            params, grads, buffers = [], [], []
            self._init_group(group, params, grads, buffers)
            work.append((group, params, grads, buffers))
        for group, params, grads, buffers in work:
            if params:
                amp = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
                update(group, params, grads, buffers, **amp)
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Give the state, as `torch.optim.Optimizer.state_dict` does, with each dampening equal to its momentum.

        Returns:
            The state; `torch.optim.SGD` can load it and, once all buffers exist, goes on with the same steps at β > 0.
        """
        self._tie_dampening()
        return super().state_dict()

    def load_heavy_ball_state(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a checkpoint of `torch.optim.SGD(momentum=β)`, Eq. 1, and go on with the same iterates.

        Buffers are multiplied by `1−β`, the groups' learning rates (`lr`, and a scheduler's `initial_lr`, `max_lr`,
        `min_lr`) divided by it; weight decay and the rest of the groups are taken as they are. A learning rate
        scheduler's own state still holds γ: build it anew. Exact while β stays constant. The argument is not changed.

        Args:
            state_dict: What `torch.optim.SGD.state_dict()` gave.

        Raises:
            UserError: If it is no such checkpoint, or one with Nesterov momentum or dampening.
        """
        if not {"state", "param_groups"} <= set(state_dict):
            raise UserError("This is no optimizer checkpoint: it lacks 'state' or 'param_groups'.")
        groups = [_effective_group(group) for group in state_dict["param_groups"]]
        momentum = {index: group["momentum"] for group in groups for index in group["params"]}
        state = {}
        for index, entry in state_dict["state"].items():
            beta, buffer = momentum.get(index, 0.0), entry.get("momentum_buffer")
            if beta > 0 and buffer is not None:  # else Eq. 1 goes on from m = 0, as a missing buffer does here
                state[index] = {"momentum_buffer": buffer * (1.0 - beta)}
        self.load_state_dict({**state_dict, "param_groups": groups, "state": state})

    def __getstate__(self) -> dict[str, Any]:
        self._tie_dampening()
        return super().__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            _check_form(group)
        super().__setstate__(state)
        for group in self.param_groups:
            has_buffer = any("momentum_buffer" in self.state.get(p, {}) for p in group["params"])
            group.setdefault("keep_buffer", group["momentum"] > 0 or has_buffer or None)
        self._tie_dampening()

    def _tie_dampening(self) -> None:
        for group in self.param_groups:
            group["dampening"] = group["momentum"]


def reference_sgdm_step(
    x: Tensor, m: Tensor, gradient: Tensor, lr: float, momentum: float, weight_decay: float = 0.0
) -> tuple[Tensor, Tensor]:
    """State one step as Eq. 3 does.

    Args:
        x: The parameter before the step, any shape.
        m: The momentum before the step, of x's shape; zero before the first.
        gradient: The gradient at x.
        lr: Effective learning rate η_k.
        momentum: β_k.
        weight_decay: w.

    Returns:
        The parameter and the momentum after the step.
    """
    m = momentum * m + (1 - momentum) * (gradient + weight_decay * x)
    return x - lr * m, m


def _check_form(group: dict[str, Any]) -> None:
    # Eq. 3's form: momentum in range, dampening absent or equal to it, no Nesterov.
    if "momentum" not in group:
        raise UserError("This is no state of SGDM: a parameter group has no 'momentum'.")
    momentum, dampening = check_momentum(group["momentum"]), group.get("dampening")
    group["momentum"] = momentum
    if group.get("nesterov"):
        raise UserError("SGDM has no Nesterov momentum (Eq. 3 has none): set nesterov=False, or use torch.optim.SGD.")
    if momentum > 0 and dampening is not None and dampening != momentum:
        raise UserError(
            f"A parameter group has momentum {momentum:g} with dampening {dampening:g}; in SGDM both are equal. "
            "Leave dampening out of a group. A checkpoint of torch.optim.SGD (dampening 0, Eq. 1) is loaded with "
            "load_heavy_ball_state, which converts its learning rate and buffers."
        )


def _effective_group(group: Mapping[str, Any]) -> dict[str, Any]:
    # A copy of a group of torch.optim.SGD (Eq. 1) in the effective form.
    if not {"lr", "momentum", "params"} <= set(group):
        raise UserError("This is no checkpoint of torch.optim.SGD: a parameter group lacks 'lr' or 'momentum'.")
    momentum = check_momentum(group["momentum"])
    if group.get("nesterov"):
        raise UserError(
            "The checkpoint uses Nesterov momentum, which Eq. 3 cannot continue. Use torch.optim.SGD for it."
        )
    if momentum > 0 and group.get("dampening", 0) != 0:
        raise UserError(
            f"The checkpoint uses dampening {group['dampening']:g}; only dampening 0 is the heavy-ball form (Eq. 1). "
            "If dampening equals momentum its buffers and learning rate are Eq. 3's already: use load_state_dict."
        )
    rates = {key: effective_lr(group[key], momentum) for key in _LEARNING_RATES if key in group}
    return {**group, **rates, "momentum": momentum, "dampening": momentum}


def _keeps_buffer(group: dict[str, Any]) -> bool:
    # Whether a group that steps now keeps its momentum; settled here if it was open.
    if group["keep_buffer"] is None:
        group["keep_buffer"] = group["momentum"] > 0
    if group["momentum"] > 0 and not group["keep_buffer"]:
        raise UserError(
            f"Invalid momentum value: {group['momentum']:g}. This group stepped at momentum 0 without a buffer "
            "(keep_buffer is False), so the last gradient, which Eq. 3 needs now, is gone. For a momentum that rises "
            "from 0 make the optimizer with momentum > 0, or set group['keep_buffer'] = True before the first step; "
            "set now, it starts the average at zero."
        )
    return group["keep_buffer"]


def update(
    group: dict[str, Any],
    params: list[Tensor],
    grads: list[Tensor],
    buffers: list[Tensor],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Run torch's kernel on parameters of one group.

    Args:
        group: The group, as `SGDM` keeps it.
        params: The parameters.
        grads: Their gradients.
        buffers: Their momenta; without any, the step is plain SGD's.
        grad_scale: What a GradScaler multiplied the gradients by, for the fused kernel.
        found_inf: Whether it found them to overflow.
    """
    momentum = (group["momentum"] or _ZERO_MOMENTUM) if buffers else 0.0
    params, grads, buffers = _local(params, grads, buffers)
    foreach, fused = group["foreach"], group["fused"]
    if foreach is None and fused is None:
        needs_one_pass = bool(buffers or group["weight_decay"])
        fused, foreach = _best_kernel(params, needs_one_pass, group["differentiable"])
    operands = [params, grads, buffers]
    if fused and not _plainly_laid_out([*params, *grads, *buffers]):
        operands = [_laid_out_like(params, tensors) for tensors in operands]
    sgd(
        *operands,
        lr=group["lr"],
        momentum=momentum,
        dampening=momentum,
        weight_decay=group["weight_decay"],
        nesterov=False,
        maximize=group["maximize"],
        foreach=foreach,
        fused=fused,
        grad_scale=grad_scale,
        found_inf=found_inf,
    )
    for originals, used in ((params, operands[0]), (buffers, operands[2])):
        if used is not originals:
            for original, tensor in zip(originals, used, strict=True):
                if tensor is not original:
                    original.copy_(tensor)


def _best_kernel(params: list[Tensor], needs_one_pass: bool, differentiable: bool) -> tuple[bool, bool]:
    # Whether to take the fused kernel, and whether foreach. On the CPU the fused kernel is the only one that reads and
    # writes each number once when there is more to a step than p − ηg, and foreach the one without a loop in Python.
    if params[0].device.type == "cpu" and not torch.compiler.is_compiling():
        is_supported, _ = _default_to_fused_or_foreach(params, differentiable, use_fused=True)
        if is_supported:
            return needs_one_pass, not needs_one_pass
    return _default_to_fused_or_foreach(params, differentiable)


def _local(params: list[Tensor], *others: list[Tensor]) -> list[list[Tensor]]:
    # This process's shards of DTensors, which torch's kernels do not all take; a step is the same element by element.
    if not any(hasattr(p, "to_local") for p in params):
        return [params, *others]
    return [[_shard(tensor, p) for tensor, p in zip(tensors, params, strict=False)] for tensors in (params, *others)]


def _shard(tensor: Tensor, param: Tensor) -> Tensor:
    if not hasattr(tensor, "to_local"):
        return tensor
    same = tensor.placements == param.placements
    return (tensor if same else tensor.redistribute(placements=param.placements)).to_local()


def _laid_out_like(params: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
    # The fused kernel walks memory without looking at strides: on parameters with gaps, or operands in another order
    # than their parameter, it would silently write wrong values. So these are copied, and only these.
    return [
        tensor if _same_layout(param, tensor) else torch.empty_like(param).copy_(tensor)
        for param, tensor in zip(params, tensors, strict=False)  # no buffers without momentum
    ]


def _plainly_laid_out(tensors: list[Tensor]) -> bool:
    # Whether no two can differ in layout or type: nearly always, and quickly seen.
    return all(map(Tensor.is_contiguous, tensors)) and len({tensor.dtype for tensor in tensors}) == 1


def _same_layout(param: Tensor, tensor: Tensor) -> bool:
    if tensor.dtype != param.dtype:
        return False
    if param.is_contiguous() and tensor.is_contiguous():
        return True
    return tensor.stride() == torch.empty_like(param, device="meta").stride()
