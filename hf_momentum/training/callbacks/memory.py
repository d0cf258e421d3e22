"""Log what an optimizer costs in memory, at the end of training."""

import logging

from accelerate.utils import gather_object
from transformers import TrainerCallback

from hf_momentum.training.memory import optimizer_state_bytes, peak_memory_bytes, reset_peak_memory

logger = logging.getLogger(__name__)


class OptimizerMemoryCallback(TrainerCallback):
    """Adds the bytes of the optimizer's state and the peak memory of training, per process, to the Trainer's last log.

    `optimizer_state_bytes/rank_0`, `peak_memory_bytes/rank_0` and so on stand in the metrics that `train()` returns
    and in the last entry of `state.log_history`, go to this module's logger, and to the trackers of `report_to` if the
    callback is given to `trainer_kwargs` (see `LogFirstCallbacks`). The peak is that of `hf_momentum.training.memory`,
    counted from the beginning of training.
    """

    extends_logs = True

    def __init__(self):
        self._training = False

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin a new peak."""
        self._training = True
        reset_peak_memory(args.device)

    def on_log(self, args, state, control, logs=None, optimizer=None, **kwargs):
        """Extend the log with which the Trainer sums up training."""
        if not (self._training and "train_runtime" in logs):
            return
        self._training = False
        figures = gather_object([(optimizer_state_bytes(optimizer), peak_memory_bytes(args.device))])
        found = {}
        for rank, (state_bytes, peak_bytes) in enumerate(figures):
            found |= {f"optimizer_state_bytes/rank_{rank}": state_bytes, f"peak_memory_bytes/rank_{rank}": peak_bytes}
        logs.update(found)
        state.log_history[-1].update(found)
        if state.is_world_process_zero:
            logger.info("%s", found)
