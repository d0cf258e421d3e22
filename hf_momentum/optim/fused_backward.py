"""Plain SGD during the backward pass: each parameter moves as soon as its gradient is complete, which is then freed.

So no more than a few gradients exist at a time. Autograd runs a parameter's hook once the whole graph has added to its
gradient, tied weights included; should anything in the graph need the old value after that, autograd raises.
"""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn.utils import get_total_norm
from torch.utils.weak import WeakTensorKeyDictionary

from hf_momentum.errors import UserError
from hf_momentum.optim.sgdm import NO_SPARSE_GRADIENTS, SGDM, update

_HANDLES = WeakTensorKeyDictionary()  # parameter → handle of its hook


def remove_fused_backward(parameters: Iterable[Tensor]) -> None:
    """Take the hooks of `FusedBackward` off parameters, such as those that an interrupted training left.

    Args:
        parameters: Any parameters, such as `model.parameters()`.
    """
    for parameter in parameters:
        if (handle := _HANDLES.pop(parameter, None)) is not None:
            handle.remove()


class FusedBackward:
    """Makes the steps of an `SGDM` without momentum inside `backward()`, x ← x − η (g + w x) parameter by parameter.

    Between `begin_step` and `end_step` every parameter's `grad` is used and freed when it is complete; outside of it
    backward passes accumulate gradients as always. `optimizer.step()` then finds nothing to do, and may be called.

    A step is one backward pass: a parameter that got its gradient in two parts would move after the first.

    *Clipping.* The norm of all gradients is known too late. Hooks of your own, made before this object, see each
    gradient before it is used: `p.register_hook(lambda g: g.clamp(-c, c))` clips values, and a function registered by
    `p.register_post_accumulate_grad_hook` that calls `clip_grad_norm_([p], c)` each parameter's norm.

    Nothing happens once this object is gone: the hooks hold it by a weak reference.

    Args:
        optimizer: The optimizer, whose groups' learning rate and weight decay are read during each backward pass.

    Raises:
        UserError: If it is no `SGDM`, or has momentum.
    """

    def __init__(self, optimizer: SGDM) -> None:
        _check_plain(optimizer)
        self._optimizer, self._active = optimizer, False
        self._updated: set[Tensor] = set()  # in this step
        self._norms: list[Tensor] = []
        myself = weakref.ref(self)
        for index, group in enumerate(optimizer.param_groups):
            group["keep_buffer"] = False  # as after a first step
            remove_fused_backward(group["params"])
            for parameter in group["params"]:
                _HANDLES[parameter] = parameter.register_post_accumulate_grad_hook(_hook(myself, index))

    @property
    def grad_norm(self) -> float:
        """The 2-norm of all gradients of the last step, taken one by one before they were used."""
        return float(get_total_norm(self._norms))

    def begin_step(self) -> None:
        """Use the gradients of the backward pass that comes."""
        _check_plain(self._optimizer)
        self._updated.clear()
        self._norms.clear()
        self._active = True

    def end_step(self) -> None:
        """Leave gradients alone until the next step begins."""
        self._active = False

    def remove(self) -> None:
        """Take all hooks off the parameters."""
        self._active = False
        for group in self._optimizer.param_groups:
            remove_fused_backward(group["params"])

    @torch.no_grad()
    def _update(self, parameter: Tensor, index: int) -> None:
        if not self._active:
            return
        if parameter in self._updated:
            raise UserError(
                "fused_backward: a parameter got its gradient in two parts in one step, and moved after the first. "
                "It allows one backward pass per step, and no parameter in two checkpointed segments of a model with "
                "use_reentrant=True (set it to False). After an interrupted training call "
                "remove_fused_backward(model.parameters())."
            )
        gradient, group = parameter.grad, self._optimizer.param_groups[index]  # loading a state replaces the groups
        if gradient.is_sparse:
            raise UserError(NO_SPARSE_GRADIENTS)
        self._updated.add(parameter)
        self._norms.append(torch.linalg.vector_norm(gradient))
        update(group, [parameter], [gradient], [])
        increment_version(parameter)  # the fused kernel does not; by it autograd sees a use of lost values
        parameter.grad = None


def _check_plain(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, SGDM) or any(
        group["momentum"] or group["keep_buffer"] for group in optimizer.param_groups
    ):
        raise UserError(
            f"fused_backward needs plain SGD, SGDM with momentum 0, and this is {type(optimizer).__name__}"
            f"{' with momentum' if isinstance(optimizer, SGDM) else ''}. Use optim='sgd'."
        )


def _hook(owner: weakref.ref, index: int) -> Callable[[Tensor], None]:
    def update(parameter: Tensor) -> None:
        if (fused := owner()) is not None:
            fused._update(parameter, index)

    return update
