"""Prompt-based classification with a masked language model, computed at the mask alone.

The class logits are the logits that the masked-LM head gives the label words at the mask (Gao et al. 2021, arXiv
2012.15723). The head maps every position by itself, so it runs on the hidden state at the mask instead of on all of
them: with a vocabulary of 30,000 words the logits of all positions cost more than a small model's body.
"""

import logging
import threading
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoConfig, AutoModelForMaskedLM, PreTrainedModel
from transformers.modeling_outputs import ModelOutput, SequenceClassifierOutput

from hf_momentum.errors import UserError

logger = logging.getLogger(__name__)


@dataclass
class AttachedHead:
    """What `LabelWordHead.attach` returns.

    Attributes:
        model: The model the hooks are on.
        handles: The hooks' handles.
    """

    model: PreTrainedModel
    handles: list

    def remove(self) -> None:
        """Take the hooks away: the model computes a masked language model's logits again."""
        for handle in self.handles:
            handle.remove()
        self.model.__dict__.pop("accepts_loss_kwargs", None)


class LabelWordHead:
    """Turns a masked language model into a classifier over label words, by hooks.

    The model stays what it is, so saving, PEFT, gradient checkpointing and the Trainer work on it. It then takes
    `input_ids` (B, S) with one mask a row and optionally `labels` (B,), and gives a `SequenceClassifierOutput` with
    `logits` (B, n) and, given labels, `loss`: their cross-entropy, a float32 mean over the batch. Hooks run where the
    module is called; `model.forward(...)` bypasses them.

    Args:
        mask_token_id: The tokenizer's.
        label_word_ids: One token id per class, in the order of the class indices.
    """

    def __init__(self, mask_token_id: int, label_word_ids: list[int]):
        self.mask_token_id = mask_token_id
        self.label_word_ids = list(label_word_ids)
        self.at_mask_only = True
        # Mask positions and labels of the forward pass under way, by thread: DataParallel runs one per device.
        self._running: dict[int, tuple[Tensor, Tensor | None]] = {}

    def attach(self, model: nn.Module) -> AttachedHead:
        """Put the hooks on a model, and check them once against the logits of all positions.

        Also sets `accepts_loss_kwargs = False` on the model: the loss is a mean over the batch, and the Trainer must
        divide it by the gradient accumulation steps.

        Args:
            model: A masked language model, or a PeftModel around one. PEFT may also wrap the model afterwards.

        Returns:
            A handle whose `remove()` undoes it.

        Raises:
            UserError: If the token ids are not in the model's vocabulary, or the model has such a head already.
        """
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        if any(isinstance(getattr(hook, "__self__", None), LabelWordHead) for hook in model._forward_hooks.values()):
            raise UserError("This model has a LabelWordHead already: call remove() on what attach() returned first.")
        vocabulary = model.get_input_embeddings().num_embeddings
        if max(self.mask_token_id, *self.label_word_ids) >= vocabulary:
            raise UserError(
                f"The mask or a label word has a token id beyond this model's vocabulary of {vocabulary}: "
                "use the tokenizer that belongs to the model."
            )
        handles = [
            model.register_forward_pre_hook(self._before_model, with_kwargs=True),
            model.base_model.register_forward_hook(self._after_body),
            model.register_forward_hook(self._after_model),
        ]
        model.accepts_loss_kwargs = False
        attached = AttachedHead(model, handles)
        check_against_full_logits(model, self)
        return attached

    def _before_model(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs = dict(kwargs)
        input_ids = args[0] if args else kwargs.get("input_ids")
        if input_ids is None:
            raise UserError("A model with label words needs input_ids, to find the mask in them.")
        is_mask = input_ids == self.mask_token_id
        counts = is_mask.sum(dim=1)
        if not bool((counts == 1).all()):
            row = int((counts != 1).nonzero()[0])
            raise UserError(
                f"Row {row} of the batch holds {int(counts[row])} mask tokens (id {self.mask_token_id}), not one: "
                "encode the examples with PromptEncoder."
            )
        self._running[threading.get_ident()] = (is_mask.int().argmax(dim=1), kwargs.pop("labels", None))
        return args, kwargs

    def _after_body(self, body: nn.Module, args: tuple, output: ModelOutput | tuple) -> ModelOutput | tuple | None:
        running = self._running.get(threading.get_ident())
        if running is None or not self.at_mask_only:
            return None
        if isinstance(output, ModelOutput):
            output.last_hidden_state = _at(output.last_hidden_state, running[0])[:, None]
            return output
        return (_at(output[0], running[0])[:, None], *output[1:])

    def _after_model(self, model: nn.Module, args: tuple, output: ModelOutput | tuple) -> ModelOutput | tuple:
        positions, labels = self._running.pop(threading.get_ident())
        logits = output.logits if isinstance(output, ModelOutput) else output[0]
        logits = logits[:, 0] if self.at_mask_only else _at(logits, positions)
        logits = logits[:, self.label_word_ids]
        loss = None if labels is None else nn.functional.cross_entropy(logits.float(), labels.to(logits.device))
        result = SequenceClassifierOutput(loss=loss, logits=logits)
        return result if isinstance(output, ModelOutput) else result.to_tuple()


def _at(values: Tensor, positions: Tensor) -> Tensor:
    # One position a row: (B, S, H) and (B,) give (B, H).
    positions = positions.to(values.device)
    return values[torch.arange(len(positions), device=values.device), positions]


def check_against_full_logits(model: PreTrainedModel, head: LabelWordHead, length: int = 12) -> float:
    """Compare the logits computed at the mask alone with those picked from all positions, on two random rows.

    Where they differ, or the model is not built as the hooks expect, the head takes the logits of all positions from
    then on and a warning says so. Weights, gradients, the random state and train/eval modes stay as they were.

    Args:
        model: The model that `head` is attached to.
        head: The head; its `at_mask_only` is set to the outcome.
        length: Tokens in each row.

    Returns:
        The largest difference relative to the largest logit; infinite where the computation at the mask fails.
    """
    if any(weight.is_meta or hasattr(weight, "ds_id") for weight in model.parameters()):
        # `ds_id` marks weights that DeepSpeed ZeRO-3 has split up.
        logger.warning("The weights of this model are not in memory: its logits at the mask alone are not checked.")
        return float("nan")
    inputs = _random_prompts(model, head, length)
    with _undisturbed(model, inputs["input_ids"].device):
        head.at_mask_only = False
        full = model(**inputs)[0].float()
        head.at_mask_only = True
        try:
            difference = float((model(**inputs)[0].float() - full).abs().max() / full.abs().max().clamp_min(1e-30))
            reason = f"they differ by {difference:.1e} (relative)"
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            difference, reason = float("inf"), f"{type(error).__name__}: {error}"
    if not difference <= _tolerance(model):
        head.at_mask_only = False
        logger.warning(
            "The logits of %s at the mask alone are not those of all positions: %s. "
            "The logits of all positions are computed instead, which is right but slower.",
            type(model).__name__,
            reason,
        )
    return difference


def _random_prompts(model: PreTrainedModel, head: LabelWordHead, length: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().num_embeddings, (2, length), generator=generator)
    ids[(ids == head.mask_token_id) | (ids == getattr(model.config, "pad_token_id", None))] = head.label_word_ids[0]
    ids[[0, 1], [length // 3, length - 2]] = head.mask_token_id
    ids = ids.to(next(model.parameters()).device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@contextmanager
def _undisturbed(model: nn.Module, device: torch.device):
    # Evaluation mode without gradients; the modes and the random state are put back.
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def _tolerance(model: nn.Module) -> float:
    # Matrix products of other shapes round otherwise, by a few units of the coarsest arithmetic in use.
    epsilon = max(torch.finfo(weight.dtype).eps for weight in model.parameters() if weight.is_floating_point())
    if torch.get_float32_matmul_precision() != "highest":
        epsilon = max(epsilon, torch.finfo(torch.float16).eps)  # TF32 has float16's mantissa
    return max(1e-4, 8 * epsilon)


_HUB_KEYS = ("revision", "code_revision", "token", "cache_dir", "subfolder", "local_files_only", "trust_remote_code")


def load_masked_lm(name_or_path: str, **kwargs) -> PreTrainedModel:
    """Load a masked language model, and make sure that its head comes from the checkpoint.

    Args:
        name_or_path: A Hub id or a local folder.
        **kwargs: Passed on to `from_pretrained`.

    Returns:
        The model.

    Raises:
        UserError: If the architecture has no masked-LM head or the checkpoint lacks its weights.
    """
    advice = "Choose a masked language model, or use --tuning classifier."
    config = AutoConfig.from_pretrained(name_or_path, **{key: kwargs[key] for key in _HUB_KEYS if key in kwargs})
    own_code = getattr(config, "auto_map", None) or {}
    if type(config) not in MODEL_FOR_MASKED_LM_MAPPING and "AutoModelForMaskedLM" not in own_code:
        raise UserError(f"{name_or_path!r} ({config.model_type}) has no masked-LM head, which prompts need. {advice}")
    model, info = AutoModelForMaskedLM.from_pretrained(name_or_path, output_loading_info=True, **kwargs)
    body = f"{model.base_model_prefix}."
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(body))
    if missing:
        lacking = f"it lacks {', '.join(missing)}"
        raise UserError(f"{name_or_path!r} comes without the masked-LM head that prompts need: {lacking}. {advice}")
    return model
