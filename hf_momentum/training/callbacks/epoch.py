"""Tells the training data which epoch begins."""

import math

from transformers import TrainerCallback

from hf_momentum.errors import UserError


class EpochCallback(TrainerCallback):
    """Calls `set_epoch` of the training data set at the start of every epoch.

    For data whose random draws depend on the epoch, such as `AugmentedImages`. accelerate's loader calls a data set's
    `set_epoch` only where it finds no sampler inside its own batch sampler to tell instead: not with several
    processes, and not in an epoch that is resumed part-way.
    """

    def __init__(self):
        self._epoch = 0

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Find the epoch to begin or go on with, as the Trainer does."""
        data = getattr(train_dataloader, "dataset", None)
        if not hasattr(data, "set_epoch"):
            raise UserError(f"EpochCallback needs training data with a set_epoch, which {type(data).__name__} lacks.")
        updates_per_epoch = max(1, math.ceil(len(train_dataloader) / args.gradient_accumulation_steps))
        self._epoch = state.global_step // updates_per_epoch

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        """Announce the epoch."""
        train_dataloader.dataset.set_epoch(self._epoch)
        self._epoch += 1
