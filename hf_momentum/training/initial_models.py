"""The models that a command's runs start from, loaded once for all cells of a grid."""

import copy

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, set_seed

from hf_momentum.tasks.prompts import Task
from hf_momentum.training.arguments import FewShotArguments, MomentumTrainingArguments
from hf_momentum.training.fewshot_model import build_model
from hf_momentum.training.protocol import is_sharded


class InitialModels:
    """Gives every run the same model that `build_model` would, and loads one only where task or seed ask for another.

    The last model that was loaded stays in host memory untouched, one copy of the weights, and a run trains a copy of
    it: whatever the Trainer does to a model (wrap it, patch its forward, move it) is gone with that run. A model in
    which nothing is new (a prompt without adapters) is the same for all seeds. Where DeepSpeed or FSDP splits the
    weights up while they are loaded, every run loads its own.

    Args:
        few: The protocol's arguments.
        tokenizer: The model's.
    """

    def __init__(self, few: FewShotArguments, tokenizer: PreTrainedTokenizerBase):
        self.few, self.tokenizer = few, tokenizer
        self._kept: nn.Module | None = None
        self._task: Task | None = None
        self._seed: int | None = None  # None: the same for all seeds

    def load(self, task: Task, seed: int, arguments: MomentumTrainingArguments) -> nn.Module:
        """Make a run's model.

        Args:
            task: The run's task.
            seed: Of what is new in the model.
            arguments: The run's arguments.

        Returns:
            A model that is the run's own.

        Raises:
            UserError: As `build_model`.
        """
        if is_sharded(arguments):
            return build_model(self.few, task, self.tokenizer, seed)
        if self._kept is None or self._task != task or self._seed not in {None, seed}:
            self._kept = None  # makes room for the next one
            set_seed(seed)
            before = torch.get_rng_state()
            self._kept = build_model(self.few, task, self.tokenizer, seed)
            drawn = not torch.equal(before, torch.get_rng_state())
            self._task, self._seed = task, seed if drawn else None
        return copy.deepcopy(self._kept)
