"""Plain SGD during the backward pass in a stock Trainer."""

from transformers import TrainerCallback, TrainingArguments

from hf_momentum.errors import UserError
from hf_momentum.optim import FusedBackward
from hf_momentum.training.callbacks.guard import fsdp_is_asked_for
from hf_momentum.training.optimizers import innermost_optimizer


def check_takes_fused_backward(optim: str) -> None:
    """Refuse all but plain SGD.

    Args:
        optim: The optimizer's name.

    Raises:
        UserError: If it is not `sgd`.
    """
    if optim != "sgd":
        why = "needs several backward passes per step" if optim == "svag" else "keeps momentum, a copy of the weights"
        raise UserError(
            f"fused_backward belongs to sgd, whose steps hold neither gradients nor state; {optim} {why}. Use "
            "optim='sgd', or leave fused_backward out."
        )


def check_fused_backward(args: TrainingArguments) -> None:
    """Refuse training arguments under which parameters cannot move as soon as their gradient is there.

    Args:
        args: The Trainer's arguments.

    Raises:
        UserError: If so, with the reason.
    """
    if problem := _problem(args):
        raise UserError(f"fused_backward updates each parameter during the backward pass. {problem}")


def _problem(args: TrainingArguments) -> str | None:
    if args.gradient_accumulation_steps != 1:
        return (
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}: the weights would move after every "
            "micro-batch. Set it to 1, with a larger per_device_train_batch_size if you need one."
        )
    if args.max_grad_norm:
        return (
            f"max_grad_norm={args.max_grad_norm:g}: the norm of all gradients is known only when they are used up. "
            "Turn clipping by it off with --max_grad_norm 0 (max_grad_norm=0); clipping by value or by each "
            "parameter's own norm works with hooks, see FusedBackward."
        )
    if args.deepspeed or args.deepspeed_plugin:
        return "DeepSpeed keeps, reduces and uses the gradients itself. Leave one of the two out."
    if fsdp_is_asked_for(args):
        return "FSDP reduces and shards the gradients after they are complete. Leave one of the two out."
    if args.world_size > 1:
        return (
            f"With {args.world_size} processes each would use its own gradients before they are averaged, and the "
            "replicas would drift apart. Use one process, or leave fused_backward out."
        )
    if args.n_gpu > 1:
        return (
            f"The Trainer would spread one process over n_gpu={args.n_gpu} GPUs by nn.DataParallel, where it is not "
            "supported. Make one GPU visible (CUDA_VISIBLE_DEVICES=0)."
        )
    if args.fp16:
        return (
            "fp16=True scales the loss, and steps are left out where gradients overflow, which is known only when "
            "they are used up. Use bf16=True, or full precision."
        )
    if args.auto_find_batch_size:
        return (
            "auto_find_batch_size=True starts again after running out of memory, when some parameters have moved and "
            "others have not. Choose the batch size yourself."
        )
    return None


class FusedBackwardCallback(TrainerCallback):
    """Makes the Trainer's steps of plain SGD during the backward pass, see `FusedBackward`.

    The trajectory, the learning rate schedule, logs and checkpoints are those of plain SGD; a run can be resumed with
    it or without. `grad_norm` in the log is the norm of the gradients as they were used, after hooks that clip them.
    A callback that reads gradients in `on_pre_optimizer_step` finds None.
    """

    extends_logs = True

    def __init__(self):
        self._fused: FusedBackward | None = None

    def on_init_end(self, args, state, control, **kwargs):
        """Check the arguments when the Trainer is built."""
        check_fused_backward(args)

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        """Check once more."""
        self._fused = None
        check_fused_backward(args)
        if getattr(optimizer, "scaler", None) is not None:
            raise UserError(
                "fused_backward cannot use gradients that a GradScaler (mixed precision fp16) has scaled. Use bf16 "
                "or full precision."
            )

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        """Use the gradients of the coming backward pass; before the first one, put the hooks on the parameters."""
        if self._fused is None:  # not before all callbacks have agreed to this training
            self._fused = FusedBackward(innermost_optimizer(optimizer))
        self._fused.begin_step()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Leave gradients alone that are computed between the steps."""
        self._fused.end_step()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Correct the norm of the gradients, which the Trainer takes when they are gone."""
        if self._fused is not None and "grad_norm" in logs:
            logs["grad_norm"] = state.log_history[-1]["grad_norm"] = self._fused.grad_norm

    def on_train_end(self, args, state, control, **kwargs):
        """Take the hooks off the parameters."""
        if self._fused is not None:
            self._fused.remove()
            self._fused = None
