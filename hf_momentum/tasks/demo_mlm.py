"""The demo's masked language model: the embedded encoder, low-rank adapters and a masked-LM head.

What was trained is a data file of this package, `demo_mlm.safetensors`; its card `demo_mlm.md` says on what. It is
put on the demo's encoder once; the result, an ordinary BERT with merged adapters, is kept in a folder beside the demo.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from hf_momentum.errors import UserError
from hf_momentum.tasks.demo import demo_dir, demo_model_path

DEMO_MLM_FILE = Path(__file__).with_name("demo_mlm.safetensors")
MASK_EMBEDDING = "mask_embedding"
_HEAD, _DOWN, _UP = "cls.predictions.", ".lora_A", ".lora_B"


def demo_masked_lm_path() -> Path:
    """Put the demo's masked language model together unless it is there; several processes may call this at once.

    Returns:
        A folder for `AutoModelForMaskedLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Raises:
        UserError: If the demo cannot be fetched, the package's file is damaged, or the cache cannot be written.
    """
    base, tensors = demo_model_path(), read_demo_mlm(DEMO_MLM_FILE)
    folder = demo_dir().with_name(f"demo-mlm-{_digest(tensors)[:12]}")
    if _is_complete(folder):
        return folder
    try:
        with FileLock(folder.with_name("demo-mlm.lock")):
            if not _is_complete(folder):  # another process may have made it meanwhile
                _write(folder, base, tensors)
    except OSError as error:
        raise UserError(
            f"The demo's cache {folder} cannot be written: {error}. Set HF_MOMENTUM_CACHE to a folder of your own."
        ) from error
    return folder


def assemble(base: Path, tensors: Mapping[str, Tensor]) -> BertForMaskedLM:
    """Merge adapters into an encoder and give it the masked-LM head, whose decoder is the word embeddings.

    A weight W with the adapters A (r, in) and B (out, r) becomes W + BA. The random state stays as it was.

    Args:
        base: The encoder's folder: a BERT without a head.
        tensors: As `read_demo_mlm` gives them.

    Returns:
        The model, in float32.

    Raises:
        UserError: If the tensors do not fit the encoder.
    """
    with torch.random.fork_rng([]):
        model = BertForMaskedLM(BertConfig.from_pretrained(base))
    encoder = load_file(base / "model.safetensors")
    state = {f"bert.{name}": weight for name, weight in encoder.items() if not name.startswith("pooler.")}
    state |= {name: tensor.float() for name, tensor in tensors.items() if name.startswith(_HEAD)}
    try:
        state["bert.embeddings.word_embeddings.weight"][_mask_token_id(base)] = tensors[MASK_EMBEDDING].float()
        for name in [name.removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)]:
            weight = state[f"{name}.weight"]
            weight += tensors[name + _UP].float() @ tensors[name + _DOWN].float()
        state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"]
        state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"]
        state.pop("bert.embeddings.position_ids", None)
        model.load_state_dict(state)
    except (KeyError, RuntimeError) as error:
        raise UserError(f"The masked-LM file does not fit the encoder in {base}: {error}") from error
    return model.eval()


def adapter_tensors(model: torch.nn.Module, mask_embedding: Tensor) -> dict[str, Tensor]:
    """Collect what `assemble` takes from a model with PEFT's LoRA on it; the adapters' scale goes into B.

    Args:
        model: A `PeftModel` around a `BertForMaskedLM`.
        mask_embedding: (hidden,), the mask's.

    Returns:
        Name -> tensor, in half precision.
    """
    inner = model.get_base_model()
    tensors = {MASK_EMBEDDING: mask_embedding}
    tensors |= {name: weight for name, weight in inner.named_parameters() if name.startswith(_HEAD)}
    for name, module in inner.named_modules():
        if hasattr(module, "lora_A"):
            tensors[name + _DOWN] = module.lora_A["default"].weight
            tensors[name + _UP] = module.lora_B["default"].weight * module.scaling["default"]
    return {name: tensor.detach().half().contiguous() for name, tensor in sorted(tensors.items())}


def write_demo_mlm(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors with their sha256, by which a damaged file shows.

    Args:
        file: Where to.
        tensors: As `adapter_tensors` gives them.
    """
    save_file(dict(tensors), file, metadata={"sha256": _digest(tensors)})


def read_demo_mlm(file: Path) -> dict[str, Tensor]:
    """Read a file that `write_demo_mlm` wrote.

    Args:
        file: The file.

    Returns:
        Name -> tensor.

    Raises:
        UserError: If the file is missing or damaged.
    """
    try:
        with safe_open(file, "pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            sha256 = (stream.metadata() or {}).get("sha256")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is missing or damaged ({error}): install hf_momentum again.") from error
    if sha256 != _digest(tensors):
        raise UserError(
            f"{file} is damaged: its tensors have not the sha256 that it names. Install hf_momentum again."
        )
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(save(dict(sorted(tensors.items())))).hexdigest()


def _mask_token_id(base: Path) -> int:
    return AutoTokenizer.from_pretrained(base).mask_token_id


def _is_complete(folder: Path) -> bool:
    try:
        expected = json.loads((folder / "sha256.json").read_text(encoding="utf-8"))
        with (folder / "model.safetensors").open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == expected["model.safetensors"]
    except (OSError, ValueError, KeyError):
        return False


def _write(folder: Path, base: Path, tensors: Mapping[str, Tensor]) -> None:
    """Make the folder beside its place and move it there in one step. The caller holds the lock."""
    partial = folder.with_name("demo-mlm.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left behind by a killed process
    shutil.rmtree(folder, ignore_errors=True)  # damaged
    try:
        assemble(base, tensors).save_pretrained(partial)
        for file in (*base.glob("*token*"), *base.glob("vocab*")):
            shutil.copy(file, partial)
        with (partial / "model.safetensors").open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        (partial / "sha256.json").write_text(json.dumps({"model.safetensors": sha256}), encoding="utf-8")
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
