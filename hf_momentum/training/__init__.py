"""How the optimizers plug into the Hugging Face Trainer: arguments, `trainer_kwargs` and callbacks."""

import importlib

_EXPORTS = {
    "MomentumTrainingArguments": "arguments",
    "FewShotArguments": "arguments",
    "RecipeTrainingArguments": "arguments",
    "parse_recipe": "arguments",
    "trainer_kwargs": "trainer_kwargs",
    "OptimizerFactory": "trainer_kwargs",
    "normalise_loss_per_micro_batch": "loss_scaling",
    "honours_num_items_in_batch": "loss_scaling",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value  # over the submodule of the same name, which the import has just bound
    return value
