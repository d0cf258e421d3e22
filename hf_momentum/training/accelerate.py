"""SVAG in a plain Accelerate loop."""

from typing import Any

from accelerate import Accelerator
from torch import Tensor
from transformers.trainer_utils import has_length

from hf_momentum.errors import UserError
from hf_momentum.optim import svag_coefficients
from hf_momentum.training.callbacks.svag import check_accumulation, micro_batch_weight, weigh_gradient


class SVAG:
    """Weighs the losses of a loop such that every step applies SVAG's gradient `r₁ ḡ₁ + r₂ ḡ₂`.

    ```python
    accelerator = Accelerator(gradient_accumulation_steps=2 * n)
    svag = SVAG(ell, accelerator)
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(svag.weigh(loss))
            optimizer.step()
            optimizer.zero_grad()
    ```

    `weigh` keeps the loss's value, so it may be logged as it is, and multiplies its gradient by `2 r₁` in the first n
    micro-batches of a step and by `2 r₂` in the other n; Accelerate divides the loss by 2n. Train at the learning rate
    η/ℓ for ℓ times the steps (`svag_hyperparameters`), and do not clip gradients. See `SVAGCallback` on independence.

    Every step must have 2n micro-batches: Accelerate divides by 2n also where a dataloader ends in a short group, and
    SVAG refuses that. `sync_with_dataloader=False` lets groups run on into the next epoch instead.

    It holds no state between steps. `accelerator.register_for_checkpointing(svag)` keeps a training from being resumed
    with another ℓ.

    Args:
        ell: ℓ, any real number of at least 1; at 1, plain SGD on the first half.
        accelerator: The loop's, with an even number of accumulation steps.

    Raises:
        UserError: If ℓ or the number of accumulation steps is not allowed, or DeepSpeed would clip gradients.
    """

    def __init__(self, ell: float, accelerator: Accelerator):
        svag_coefficients(ell)
        check_accumulation(accelerator.gradient_accumulation_steps)
        plugin = accelerator.state.deepspeed_plugin
        clipping = plugin.deepspeed_config.get("gradient_clipping", 0) if plugin is not None else 0
        if clipping != 0:
            raise UserError(
                f"DeepSpeed would clip gradients (gradient_clipping: {clipping!r}; 'auto' is 1.0 in your own loop), "
                "which cuts the noise that SVAG amplifies. Before accelerator.prepare set "
                "accelerator.state.deepspeed_plugin.deepspeed_config['gradient_clipping'] = 0.0."
            )
        self.ell = ell
        self.accelerator = accelerator
        self._index = 0  # of the next micro-batch in its step

    def weigh(self, loss: Tensor) -> Tensor:
        """Give one micro-batch's loss its weight; to be called once per micro-batch, inside `accelerator.accumulate`.

        Args:
            loss: The micro-batch's mean loss, of any shape.

        Returns:
            The same value, with a weighted gradient.

        Raises:
            UserError: If the step does not have as many micro-batches as Accelerate accumulates.
        """
        group = self.accelerator.gradient_accumulation_steps
        self._check_length(group)
        ends = self.accelerator.sync_gradients
        if ends != (self._index == group - 1):
            raise UserError(
                f"SVAG weighs {group} micro-batches per step, but Accelerate {'ended' if ends else 'did not end'} the "
                f"step at number {self._index + 1}. Call weigh() once per micro-batch, in accelerator.accumulate(), "
                "start and resume at the first micro-batch of a step, and avoid a short group at the end of a "
                f"dataloader: {_WAYS_OUT}"
            )
        weight = micro_batch_weight(self._index, group, self.ell)
        self._index = 0 if ends else self._index + 1
        return weigh_gradient(loss, weight)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps.

        Returns:
            ℓ.
        """
        return {"ell": self.ell}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Begin a step anew after a checkpoint was loaded.

        Args:
            state: From `state_dict`.

        Raises:
            UserError: If the checkpoint was saved with another ℓ.
        """
        if state["ell"] != self.ell:
            raise UserError(f"The checkpoint was trained with ell={state['ell']}, not {self.ell}: resume with that.")
        self._index = 0

    def _check_length(self, group: int) -> None:
        """Say before an epoch begins, not at its end, that it would end in a short group."""
        loader = self.accelerator.gradient_state.active_dataloader
        if loader is None or not self.accelerator.gradient_state.sync_with_dataloader or not has_length(loader):
            return
        if short := len(loader) % group:
            raise UserError(
                f"The dataloader gives {len(loader)} micro-batches, {group} to a step, and its last step would have "
                f"{short}. {_WAYS_OUT}"
            )


_WAYS_OUT = (
    "Use a dataset and batch size that give a multiple, or let steps run on into the next epoch: "
    "Accelerator(gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=..., sync_with_dataloader=False))."
)
