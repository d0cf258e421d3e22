"""Callbacks for a stock Trainer, one file each."""

import importlib

_EXPORTS = {
    "BestWeightsCallback": "best_weights",
    "EpochCallback": "epoch",
    "FusedBackwardCallback": "fused_backward",
    "HyperparameterLogCallback": "trackers",
    "LRMilestonesCallback": "lr_milestones",
    "LogFirstCallbacks": "trackers",
    "ModelCardCallback": "card",
    "MomentumGuard": "guard",
    "MomentumScheduleCallback": "momentum_schedule",
    "OptimizerMemoryCallback": "memory",
    "RegimeCallback": "regime",
    "RunProgressCallback": "progress",
    "SVAGCallback": "svag",
    "run_progress": "progress",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
