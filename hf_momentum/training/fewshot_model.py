"""The model and the tokenizer of a few-shot run."""

import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from hf_momentum.errors import UserError, require_extra
from hf_momentum.tasks.demo import demo_model_path
from hf_momentum.tasks.demo_mlm import demo_masked_lm_path
from hf_momentum.tasks.encoding import label_word_ids
from hf_momentum.tasks.masked_lm import LabelWordHead, load_masked_lm
from hf_momentum.tasks.prompts import Task
from hf_momentum.training.arguments import FewShotArguments


def model_path(few: FewShotArguments) -> str:
    """The folder or Hub id to load; the demo is fetched on first use, and for prompts given its masked-LM head.

    Args:
        few: The protocol's arguments.

    Returns:
        What `from_pretrained` takes.
    """
    if few.model != "demo":
        return few.model
    return str(demo_masked_lm_path() if few.tuning == "prompt" else demo_model_path())


def load_tokenizer(few: FewShotArguments) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer; a model that cannot be found shows here.

    Args:
        few: The protocol's arguments.

    Returns:
        The tokenizer.

    Raises:
        UserError: If the model cannot be loaded, or its tokenizer cannot pad.
    """
    with PartialState().main_process_first():
        try:
            tokenizer = AutoTokenizer.from_pretrained(model_path(few))
        except (OSError, ValueError) as error:
            raise UserError(f"Cannot load --model {few.model}: {error}") from error
    if tokenizer.pad_token is None:
        raise UserError(f"The tokenizer of {few.model} has no pad token. Choose an encoder such as RoBERTa or BERT.")
    return tokenizer


def build_model(few: FewShotArguments, task: Task, tokenizer: PreTrainedTokenizerBase, seed: int) -> nn.Module:
    """Load the model with the label words at the mask, or with a new head; what is new is initialised by the seed.

    In float32, whatever the checkpoint holds: SGD's small updates would be rounded away in half precision. `--bf16`
    and `--fp16` train in mixed precision.

    Args:
        few: The protocol's arguments.
        task: The task.
        tokenizer: The model's.
        seed: Of a new head, and of LoRA's adapters.

    Returns:
        The model.

    Raises:
        UserError: If the model cannot be loaded, or does not fit the task.
    """
    set_seed(seed)
    try:
        if few.tuning == "prompt":
            model = load_masked_lm(model_path(few), dtype=torch.float32)
            LabelWordHead(tokenizer.mask_token_id, label_word_ids(task, tokenizer)).attach(model)
        else:
            model = AutoModelForSequenceClassification.from_pretrained(
                model_path(few), num_labels=len(task.labels), dtype=torch.float32
            )
    except (OSError, ValueError) as error:
        raise error if isinstance(error, UserError) else UserError(f"Cannot load {few.model}: {error}") from error
    if few.peft == "lora":
        peft = require_extra("peft", "text")
        kind = "SEQ_CLS" if few.tuning == "classifier" else None
        model = peft.get_peft_model(model, peft.LoraConfig(task_type=kind, target_modules="all-linear"))
    return model
