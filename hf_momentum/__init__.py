"""SGD, SGD with momentum and SVAG as first-class optimizers for the Hugging Face Trainer."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers: what `__getattr__` imports when it is first used
    from hf_momentum.optim import (
        SGDM,
        averaged_lr,
        create_optimizer,
        effective_lr,
        heavy_ball_lr,
        list_optimizers,
        svag_coefficients,
        svag_hyperparameters,
    )
    from hf_momentum.training import (
        LRMilestonesCallback,
        MomentumGuard,
        MomentumTrainingArguments,
        svag_arguments,
        trainer_kwargs,
    )
    from hf_momentum.training.callbacks import ModelCardCallback

__version__ = "0.1.0"

_EXPORTS = {
    "SGDM": "hf_momentum.optim",
    "create_optimizer": "hf_momentum.optim",
    "list_optimizers": "hf_momentum.optim",
    "svag_coefficients": "hf_momentum.optim",
    "svag_hyperparameters": "hf_momentum.optim",
    "effective_lr": "hf_momentum.optim",
    "heavy_ball_lr": "hf_momentum.optim",
    "averaged_lr": "hf_momentum.optim",
    "LRMilestonesCallback": "hf_momentum.training",
    "ModelCardCallback": "hf_momentum.training.callbacks",
    "MomentumGuard": "hf_momentum.training",
    "MomentumTrainingArguments": "hf_momentum.training",
    "svag_arguments": "hf_momentum.training",
    "trainer_kwargs": "hf_momentum.training",
}

__all__ = [
    "SGDM",
    "LRMilestonesCallback",
    "ModelCardCallback",
    "MomentumGuard",
    "MomentumTrainingArguments",
    "__version__",
    "averaged_lr",
    "create_optimizer",
    "effective_lr",
    "heavy_ball_lr",
    "list_optimizers",
    "svag_arguments",
    "svag_coefficients",
    "svag_hyperparameters",
    "trainer_kwargs",
]


def __getattr__(name: str):
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
