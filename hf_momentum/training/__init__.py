"""How the optimizers plug into the Hugging Face Trainer: arguments, `trainer_kwargs` and callbacks."""

from typing import TYPE_CHECKING

from hf_momentum.training.arguments import FewShotArguments, MomentumTrainingArguments, RecipeTrainingArguments
from hf_momentum.training.callbacks import (
    FusedBackwardCallback,
    HyperparameterLogCallback,
    LogFirstCallbacks,
    LRMilestonesCallback,
    MomentumGuard,
    MomentumScheduleCallback,
    OptimizerMemoryCallback,
    SVAGCallback,
)
from hf_momentum.training.loss_scaling import honours_num_items_in_batch, normalise_loss_per_micro_batch
from hf_momentum.training.svag_arguments import svag_arguments
from hf_momentum.training.trainer_kwargs import OptimizerFactory, trainer_kwargs

if TYPE_CHECKING:
    from hf_momentum.training.callbacks import RegimeCallback

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


def __getattr__(name: str):
    if name == "RegimeCallback":  # all that needs the diagnostics, which are slow to import
        from hf_momentum.training.callbacks import RegimeCallback

        return RegimeCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
