"""Callbacks for a stock Trainer, one file each."""

from hf_momentum.training.callbacks.best_weights import BestWeightsCallback
from hf_momentum.training.callbacks.progress import RunProgressCallback, run_progress

__all__ = ["BestWeightsCallback", "RunProgressCallback", "run_progress"]
