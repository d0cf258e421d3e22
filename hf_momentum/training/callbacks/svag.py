"""SVAG in a stock Trainer: each micro-batch's gradient gets its weight on its way into the model.

The weights of the two halves could be put on the loss, but a callback never sees it, and the logged loss would change;
or on the gradients, but these may be sharded, reduced or already used when a callback is called. So a forward hook
leaves every output of the model as it is and multiplies the gradient that comes back through it. This is the one place
that DDP, DeepSpeed, FSDP, PEFT, mixed precision and torch.compile have in common, and it costs no copy of a gradient.
"""

import logging
import math
import weakref
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import has_length

from hf_momentum.errors import UserError
from hf_momentum.optim import svag_coefficients

logger = logging.getLogger(__name__)

_HOOKS: weakref.WeakKeyDictionary[nn.Module, RemovableHandle] = weakref.WeakKeyDictionary()


class _WeighGradient(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a weight."""

    @staticmethod
    def forward(ctx, tensor: Tensor, weight: float) -> Tensor:
        ctx.weight = weight
        return tensor.clone()  # the Trainer multiplies the loss in place

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.weight, None


def weigh_gradient(tensor: Tensor, weight: float) -> Tensor:
    """Copy a tensor such that the gradient that flows back through the copy is multiplied by `weight`.

    Args:
        tensor: Any tensor.
        weight: The factor.

    Returns:
        A tensor of the same value.
    """
    return _WeighGradient.apply(tensor, weight)


def micro_batch_weight(index: int, group: int, ell: float) -> float:
    """The factor on one micro-batch's gradient, where the mean over the group is what is applied.

    With it the mean over a group of m micro-batches is `r₁ ḡ₁ + r₂ ḡ₂`, ḡ₁ the mean gradient of the first
    `m₁ = ⌈m/2⌉` and ḡ₂ that of the other `m − m₁`: the factors are `m r₁ / m₁` and `m r₂ / (m − m₁)`, in a full group
    of 2n just `2 r₁` and `2 r₂`. A group of one has no second half: its factor is 1, plain SGD.

    Args:
        index: Position of the micro-batch in its group, from 0.
        group: Number m of micro-batches in the group, more than `index`.
        ell: ℓ, at least 1.

    Returns:
        The factor.
    """
    if group == 1:
        return 1.0
    r1, r2 = svag_coefficients(ell)
    first = (group + 1) // 2
    return group * r1 / first if index < first else group * r2 / (group - first)


def check_accumulation(steps: int) -> None:
    """Refuse an accumulation count that SVAG cannot split into halves.

    Args:
        steps: Micro-batches per optimizer step.

    Raises:
        UserError: If the count is odd.
    """
    if steps % 2:
        raise UserError(
            f"gradient_accumulation_steps={steps}: SVAG adds the gradients of two equal halves of every step's "
            f"micro-batches, so the count must be even. Use {2 * steps}, twice that of the run with plain SGD "
            "(svag_arguments does so), or another even number."
        )


def remove_svag_hooks(model: nn.Module) -> None:
    """Take the hooks of `SVAGCallback` off a model and its parts, such as those that an interrupted training left.

    Args:
        model: Any module.
    """
    for module in model.modules():
        if handle := _HOOKS.pop(module, None):
            handle.remove()


class SVAGCallback(TrainerCallback):
    """Makes the Trainer apply SVAG's gradient `g = r₁ ḡ₁ + r₂ ḡ₂`, with `r₁,₂ = (1 ± √(2ℓ−1))/2`.

    ḡ₁ is the mean gradient of the first n micro-batches of a step's 2n = `gradient_accumulation_steps`, ḡ₂ that of the
    other n, over all processes. The learning rate is not touched: train at η/ℓ for ℓ times the steps (`svag_arguments`
    stretches the training arguments). The logged loss is the unweighted mean over all 2n, comparable across ℓ.
    Evaluation, and whatever else runs between the steps, is left alone. The end of an epoch may leave a short group:
    see `micro_batch_weight`.

    *Independence.* `E g = ∇L` always, and `Cov g = ℓ Cov ḡ` if the two halves are independent draws. Without
    replacement, as the Trainer samples, disjoint halves from N examples give `ℓ V + (ℓ−1) S/(N−1)` instead, with V the
    covariance of one half's gradient and S that of one example's: for halves of B examples the excess is about
    (1 − 1/ℓ) B/N of the whole.

    *Models that divide by the number of tokens.* Where the Trainer hands `num_items_in_batch` to the model (causal
    language models), the loss is divided by the token count N of the whole step. With Sᵢ the gradient of half i's
    summed loss, g = r₁ S₁/(N/2) + r₂ S₂/(N/2): both halves are normalised by half of the step's tokens. Its
    expectation is that of S/N, the gradient of plain accumulation over the same 2n micro-batches; with the same number
    of tokens in both halves (packed sequences) it is exactly `r₁ ḡ₁ + r₂ ḡ₂` with ḡᵢ the token means. Where the counts
    N₁ and N₂ differ, noise of variance (2ℓ−1) Var((N₁−N₂)/N) is added along ∇L, since N₁ is not known before the first
    half is over. To avoid it, set `model.accepts_loss_kwargs = False` before the Trainer is built, here and in the
    runs to compare with: every micro-batch then counts as its own token mean.

    *A loss of your own.* A `compute_loss` override is fine if it computes the loss from what `model(...)` returned.
    `compute_loss_func` is not supported and cannot be seen from a callback: the Trainer then divides nothing by the
    accumulation count. A term that does not pass through the model's outputs, such as a penalty on the weights, is
    added with weight 1.

    After an exception in `train()` the hook stays on the model, and weighs if a step was interrupted. The next
    training with such a callback removes it, `remove_svag_hooks(model)` does so by hand.

    Args:
        ell: ℓ, any real number of at least 1; at 1, plain SGD on the first half.
        allow_clipping: Whether `max_grad_norm` may be set. Clipping cuts the amplified noise, which is then no longer
            SVAG's.
    """

    def __init__(self, ell: float, allow_clipping: bool = False):
        svag_coefficients(ell)
        self.ell = ell
        self.allow_clipping = allow_clipping
        self._steps = self._epoch_length = 0  # micro-batches of a full step, and of an epoch
        self._position = self._group = 0  # micro-batches in the epoch before this step, and in this step
        self._index = 0  # of the current micro-batch in its step
        self._weight: float | None = None  # of the current micro-batch; None between steps
        self._weighed = False  # whether the current micro-batch has passed through the hook
        self._warned = False

    def on_train_begin(self, args, state, control, model=None, train_dataloader=None, **kwargs):
        """Check the arguments, find the place in the epoch, and put the hook on the model."""
        self._check(args, train_dataloader)
        self._steps, self._epoch_length = args.gradient_accumulation_steps, len(train_dataloader)
        updates_per_epoch = math.ceil(self._epoch_length / self._steps)
        resumed_at = 0 if args.ignore_data_skip else state.global_step % updates_per_epoch
        self._position, self._weight = resumed_at * self._steps, None
        remove_svag_hooks(model)
        _HOOKS[model] = model.register_forward_hook(self._weigh_outputs)

    def on_step_begin(self, args, state, control, **kwargs):
        """Begin the first micro-batch of a step."""
        self._group = min(self._steps, self._epoch_length - self._position)
        if self._group == 1 and not self._warned:
            self._warned = True
            logger.warning(
                f"An epoch has {self._epoch_length} micro-batches, {self._steps} to a step. Its last step has only "
                "one and is plain SGD, since SVAG needs two. Another batch size may avoid it."
            )
        self._begin_micro_batch(0)

    def on_substep_end(self, args, state, control, **kwargs):
        """Go on to the next micro-batch of the step."""
        self._check_weighed()
        if self._index + 1 == self._group:
            raise self._wrong_length()
        self._begin_micro_batch(self._index + 1)

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Stop weighing: the step's gradient is complete."""
        self._check_weighed()
        if self._index + 1 != self._group:
            raise self._wrong_length()
        self._position += self._group
        self._weight = None

    def on_epoch_end(self, args, state, control, **kwargs):
        """Begin the next epoch at its start."""
        if self._weight is not None and not (control.should_epoch_stop or control.should_training_stop):
            raise self._wrong_length()
        self._position, self._weight = 0, None

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Take the hook off the model."""
        self._weight = None
        remove_svag_hooks(model)

    def _check(self, args: TrainingArguments, train_dataloader: Any) -> None:
        check_accumulation(args.gradient_accumulation_steps)
        if args.max_grad_norm and not self.allow_clipping:
            raise UserError(
                f"max_grad_norm={args.max_grad_norm}: clipping cuts the noise that SVAG amplifies. Set it to 0, also "
                "in the runs that SVAG is compared with, or pass allow_clipping=True to clip nevertheless."
            )
        if args.n_gpu > 1:
            raise UserError(
                f"The Trainer would spread one process over n_gpu={args.n_gpu} GPUs by nn.DataParallel, where SVAG is "
                "not supported. Start one process per GPU with torchrun or accelerate launch, or make one GPU visible."
            )
        if train_dataloader is None or not has_length(train_dataloader):
            raise UserError(
                "SVAG needs a training dataloader with a length, to know the last step of an epoch before it begins. "
                "Give the Trainer a dataset with __len__."
            )

    def _begin_micro_batch(self, index: int) -> None:
        self._index, self._weighed = index, False
        self._weight = micro_batch_weight(index, self._group, self.ell)

    def _weigh_outputs(self, module: nn.Module, inputs: tuple, outputs: Any) -> Any:
        """The forward hook."""
        if self._weight is None or not module.training:
            return None
        return recursively_apply(self._weigh, outputs, test_type=_requires_gradient)

    def _weigh(self, tensor: Tensor) -> Tensor:
        self._weighed = True
        return weigh_gradient(tensor, self._weight)

    def _check_weighed(self) -> None:
        if not self._weighed:
            raise UserError(
                "SVAG weighs the gradients of the model's outputs, but no output that requires a gradient passed "
                "through the model's forward in this micro-batch. Call the model itself in compute_loss, not a part "
                "of it, and let it return a tensor, tuple, list, dict or ModelOutput."
            )

    def _wrong_length(self) -> UserError:
        return UserError(
            f"SVAG expected a step of {self._group} micro-batches, since the training dataloader has the length "
            f"{self._epoch_length}, but the step had another number: micro-batch {self._index + 1} was weighed for a "
            "step that did not come. Give the Trainer a dataset whose __len__ is right."
        )


def _requires_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad
