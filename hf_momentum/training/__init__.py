"""How the optimizers plug into the Hugging Face Trainer: arguments, `trainer_kwargs` and callbacks."""

from hf_momentum.training.arguments import FewShotArguments, MomentumTrainingArguments, RecipeTrainingArguments
from hf_momentum.training.callbacks import (
    FusedBackwardCallback,
    HyperparameterLogCallback,
    LogFirstCallbacks,
    LRMilestonesCallback,
    MomentumGuard,
    MomentumScheduleCallback,
    OptimizerMemoryCallback,
    RegimeCallback,
    SVAGCallback,
)
from hf_momentum.training.loss_scaling import honours_num_items_in_batch, normalise_loss_per_micro_batch
from hf_momentum.training.svag_arguments import svag_arguments
from hf_momentum.training.trainer_kwargs import OptimizerFactory, trainer_kwargs

__all__ = [
    "FewShotArguments",
    "FusedBackwardCallback",
    "HyperparameterLogCallback",
    "LRMilestonesCallback",
    "LogFirstCallbacks",
    "MomentumGuard",
    "MomentumScheduleCallback",
    "MomentumTrainingArguments",
    "OptimizerFactory",
    "OptimizerMemoryCallback",
    "RecipeTrainingArguments",
    "RegimeCallback",
    "SVAGCallback",
    "honours_num_items_in_batch",
    "normalise_loss_per_micro_batch",
    "svag_arguments",
    "trainer_kwargs",
]
