"""What steps: SGD, SGDM and SVAG, their learning rates and momenta over a run. Needs torch alone."""

from hf_momentum.optim.factory import (
    OptimizerInfo,
    create_optimizer,
    get_optimizer_info,
    list_optimizers,
    parameter_groups,
)
from hf_momentum.optim.fused_backward import FusedBackward, remove_fused_backward
from hf_momentum.optim.schedules import (
    MOMENTUM_SCHEDULES,
    ConstantMomentum,
    CosineMomentum,
    LinearMomentum,
    MomentumSchedule,
    ScalingMomentum,
    StepMomentum,
    averaged_lr,
    effective_lr,
    heavy_ball_lr,
    momentum_schedule,
)
from hf_momentum.optim.sgdm import SGDM
from hf_momentum.optim.svag import svag_coefficients, svag_hyperparameters

__all__ = [
    "MOMENTUM_SCHEDULES",
    "SGDM",
    "ConstantMomentum",
    "CosineMomentum",
    "FusedBackward",
    "LinearMomentum",
    "MomentumSchedule",
    "OptimizerInfo",
    "ScalingMomentum",
    "StepMomentum",
    "averaged_lr",
    "create_optimizer",
    "effective_lr",
    "get_optimizer_info",
    "heavy_ball_lr",
    "list_optimizers",
    "momentum_schedule",
    "parameter_groups",
    "remove_fused_backward",
    "svag_coefficients",
    "svag_hyperparameters",
]
