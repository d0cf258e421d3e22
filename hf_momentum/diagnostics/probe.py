"""A model and its loss as functions of the trainable parameters alone, for measurements that leave a run untouched."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DataParallel, DistributedDataParallel

from hf_momentum.errors import UserError

Vector = list[Tensor]  # one tensor per trainable parameter, in the parameters' order and shapes
Loss = Callable[[nn.Module, Any], Tensor]
Mode = Literal["training", "evaluation"]

# Both have second derivatives: "sdpa" under `sdpa_kernel(SDPBackend.MATH)`.
_TWICE_DIFFERENTIABLE = {"eager", "sdpa", None}
_NO_SECOND_DERIVATIVE = ("derivative for", "double backward", "once_differentiable")


class Probe:
    """The loss of a batch, its gradient and its Hessian–vector products at the model's present weights.

    The parameters are those that require a gradient: frozen ones are constants, tied ones count once, and of a LoRA
    model only the adapters remain. Every method works on the model's own device and runs inside `measuring`, so that
    weights, `.grad`, buffers, modes and random states are bit for bit what they were; a loss that draws random
    numbers draws the same ones at each call. Weight decay is no part of the loss.

    Args:
        model: The model, bare or in `DistributedDataParallel`, `DataParallel` or `torch.compile`, which are taken off.
        loss: Gives the mean loss of a batch, a scalar, from `(model, batch)`. By default it is `model(**batch).loss`.
        mode: How normalisation layers behave, as in `measuring`.

    Attributes:
        model: The bare model.
        parameters: The trainable parameters.

    Raises:
        UserError: If nothing is trainable, or the parameters are sharded (DeepSpeed ZeRO-3, FSDP) or not in memory.
    """

    def __init__(self, model: nn.Module, loss: Loss | None = None, mode: Mode = "training") -> None:
        self.model = _bare(model)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.mode = mode
        self._loss = loss or _loss_of_output
        self._is_twice_differentiable = False  # until a graph was searched
        _check_parameters(self.model, self.parameters)

    @property
    def device(self) -> torch.device:
        """The device of the first parameter: batches are moved there, and products are collected there."""
        return self.parameters[0].device

    def loss(self, batch: Any) -> Tensor:
        """Give the loss of a batch.

        Args:
            batch: Tensors in any nesting of mappings, lists and tuples, as the loss takes them.

        Returns:
            A scalar without a graph.
        """
        with measuring(self.model, self.mode):
            return self._evaluate(batch).detach()

    def gradient(self, batch: Any) -> Vector:
        """Give the gradient of the loss of a batch.

        Args:
            batch: As in `loss`.

        Returns:
            One tensor per parameter, zero where the loss does not depend on it; half precision comes as float32.
        """
        with measuring(self.model, self.mode):
            gradient = torch.autograd.grad(self._evaluate(batch), self.parameters, materialize_grads=True)
        return [_at_least_single(g) for g in gradient]

    @contextmanager
    def hessian(self, batch: Any) -> Iterator[Callable[[Vector], Vector]]:
        """Multiply by the Hessian of the loss of a batch (Pearlmutter, Neural Computation 1994).

        The forward and the first backward pass are run once, and their graph stays in memory inside the context, in
        which no other method of a probe of this model may be called.

        Args:
            batch: As in `loss`.

        Yields:
            A function that gives the product with a vector, one tensor per parameter.
        """
        with measuring(self.model, self.mode):
            with _explained():
                loss = self._evaluate(batch)
                gradient = torch.autograd.grad(loss, self.parameters, create_graph=True, materialize_grads=True)
                if not self._is_twice_differentiable:
                    _check_graph(gradient)
                    self._is_twice_differentiable = True
            yield lambda vector: self._product(gradient, vector)

    def hvp(self, batch: Any, vectors: Sequence[Vector]) -> list[Vector]:
        """Multiply the Hessian of the loss of a batch by several vectors.

        Args:
            batch: As in `loss`.
            vectors: The vectors, each one tensor per parameter.

        Returns:
            One product per vector.
        """
        with self.hessian(batch) as multiply:
            return [multiply(vector) for vector in vectors]

    def quadratic_forms(self, batch: Any, vectors: Sequence[Vector]) -> Tensor:
        """Give all `aᵀ H b` with the Hessian H of the loss of a batch, with one product in memory at a time.

        Args:
            batch: As in `loss`.
            vectors: k vectors, each one tensor per parameter.

        Returns:
            A float64 matrix `(k, k)` on the CPU, symmetric up to rounding.
        """
        with self.hessian(batch) as multiply:
            return torch.cat([inner_products([multiply(vector)], vectors) for vector in vectors])

    def flatten(self, vector: Vector) -> Tensor:
        """Copy a vector into one tensor.

        Args:
            vector: One tensor per parameter.

        Returns:
            `(n,)`, for n trainable numbers, on the first parameter's device.
        """
        return torch.cat([tensor.reshape(-1).to(self.device) for tensor in vector])

    def unflatten(self, flat: Tensor) -> Vector:
        """Split what `flatten` gave.

        Args:
            flat: `(n,)`.

        Returns:
            One tensor per parameter, views where the parameter is on the device of `flat`.
        """
        parts = flat.split([parameter.numel() for parameter in self.parameters])
        return [part.view(p.shape).to(p.device) for part, p in zip(parts, self.parameters, strict=True)]

    def _evaluate(self, batch: Any) -> Tensor:
        from accelerate.utils import send_to_device

        loss = self._loss(self.model, send_to_device(batch, self.device))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise UserError(
                f"The loss must be a tensor with one number, not {_describe(loss)}. Give the batch's mean loss."
            )
        value = float(loss.detach())
        if not math.isfinite(value):
            raise UserError(
                f"The loss is {value}, at which nothing can be measured. Measure earlier in the run, lower the "
                "learning rate, or look for bad inputs in the batch."
            )
        if not loss.requires_grad:
            raise UserError("The loss does not depend on the trainable parameters: it carries no graph.")
        return loss.reshape(())

    def _product(self, gradient: Vector, vector: Vector) -> Vector:
        # Where the gradient is constant in all parameters, it carries no graph and the Hessian is 0 there.
        curved = [(g, v.to(g.dtype)) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
        if not curved:
            return [torch.zeros_like(v) for v in vector]
        outputs, weights = zip(*curved, strict=True)
        with _explained():
            product = torch.autograd.grad(outputs, self.parameters, weights, retain_graph=True, materialize_grads=True)
        return [_at_least_single(p) for p in product]


def inner_products(left: Sequence[Vector], right: Sequence[Vector]) -> Tensor:
    """Give the inner products of vectors.

    Args:
        left: j vectors, each one tensor per parameter.
        right: k vectors.

    Returns:
        `(j, k)` in float64 on the CPU; each parameter's part is summed in its own precision.
    """
    device = left[0][0].device

    def inner(u: Vector, v: Vector) -> Tensor:
        parts = [torch.dot(a.reshape(-1), b.reshape(-1)) for a, b in zip(u, v, strict=True)]
        return torch.stack([part.to(device, torch.float64) for part in parts]).sum()

    return torch.stack([inner(u, v) for u in left for v in right]).reshape(len(left), len(right)).cpu()


@contextmanager
def measuring(model: nn.Module, mode: Mode = "training") -> Iterator[None]:
    """Make the loss deterministic and twice differentiable, and put everything back; not to be nested.

    Dropout and all that depends on the mode like it (stochastic depth, gradient checkpointing) is off. Layers with
    running statistics normalise by the batch in mode `"training"`, since this is the loss that training descends;
    those that are frozen (in evaluation mode inside a model in training mode) stay so. In mode `"evaluation"` they
    take the running statistics. Attention runs on kernels that have second derivatives. Gradients are recorded also
    under `torch.no_grad`. Put back are: each module's mode, every buffer (BatchNorm's running statistics among them),
    the random state of the CPU and of the model's devices, and the attention implementation.

    Args:
        model: The bare model.
        mode: `"training"` or `"evaluation"`.

    Yields:
        Nothing.

    Raises:
        UserError: If there is no such mode.
    """
    if mode not in ("training", "evaluation"):
        raise UserError(
            f"Unknown mode {mode!r}. Allowed: 'training' (batch statistics) and 'evaluation' (running ones)."
        )
    with ExitStack() as stack:
        stack.enter_context(_forked_rng(model))
        stack.enter_context(_kept_buffers(model))
        stack.enter_context(_modes(model, mode))
        stack.enter_context(_plain_attention(model))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def _modes(model: nn.Module, mode: Mode) -> Iterator[None]:
    # The attribute is set directly: some models do more than that in `train` and `eval`.
    before = {module: module.training for module in model.modules()}
    for module, was_training in before.items():
        normalises = isinstance(module, _NormBase) and mode == "training"
        module.training = normalises and (was_training or not before[model])
    try:
        yield
    finally:
        for module, was_training in before.items():
            module.training = was_training


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    # `.data` leaves the version counter alone: a graph of the run may have saved the buffer. Batch normalisation does
    # not count its own writes, so that the counter cannot tell what was written to.
    kept = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in kept:
            module._buffers[name] = buffer
            buffer.data.copy_(values)


@contextmanager
def _forked_rng(model: nn.Module) -> Iterator[None]:
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type != "cpu"}
    indices = sorted(device.index or 0 for device in devices)
    with torch.random.fork_rng(indices, device_type=devices.pop().type if devices else None):
        yield


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Switch transformers models from kernels without second derivatives (flash, flex, …) to plain matrix products."""
    from transformers import PreTrainedModel

    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    switched = [(c, c._attn_implementation_internal) for c in configs.values()]
    switched = [(config, kernel) for config, kernel in switched if kernel not in _TWICE_DIFFERENTIABLE]
    try:
        for config, _ in switched:
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, kernel in switched:
            config._attn_implementation_internal = kernel


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not any(part in str(error) for part in _NO_SECOND_DERIVATIVE):
            raise
        raise UserError(
            f"An operation of this model has no second derivative, which curvature needs: {error}. Measure the noise "
            "alone, or use a plain implementation of that operation (no compiled model, no custom or cuDNN kernel)."
        ) from error


def _check_graph(gradient: Vector) -> None:
    """Refuse operations marked once differentiable: autograd takes their second derivatives for 0."""
    seen: set[Any] = set()
    nodes = [tensor.grad_fn for tensor in gradient]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("once_differentiable is set on a torch.autograd.Function")
        seen.add(node)
        nodes.extend(following for following, _ in node.next_functions)


def _loss_of_output(model: nn.Module, batch: Any) -> Tensor:
    if not isinstance(batch, Mapping):
        raise UserError(
            f"A batch of type {type(batch).__name__} cannot be passed to the model by keywords. "
            "Give Probe a loss, a function of (model, batch)."
        )
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if loss is None:
        raise UserError(
            f"{type(model).__name__} gave no loss for a batch with {', '.join(batch)}. Put the labels into the batch, "
            "or give Probe a loss, a function of (model, batch)."
        )
    return loss


def _bare(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        elif hasattr(model, "_orig_mod"):  # torch.compile
            model = model._orig_mod
        else:
            return model


def _check_parameters(model: nn.Module, parameters: list[nn.Parameter]) -> None:
    if not parameters:
        raise UserError("The model has no trainable parameters. Set requires_grad on those that are to be trained.")
    from torch.distributed.tensor import DTensor

    in_shards = any(isinstance(p, DTensor) or hasattr(p, "ds_id") for p in parameters)
    if in_shards or any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise UserError(
            "The parameters are sharded (DeepSpeed ZeRO-3 or FSDP), so that no process has the model to measure. Save "
            "the full weights and measure those, or train with DDP or ZeRO-1/2."
        )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise UserError("Parameters of this model are not in memory (device 'meta'). Load the weights first.")


def _at_least_single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _describe(loss: Any) -> str:
    return f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
