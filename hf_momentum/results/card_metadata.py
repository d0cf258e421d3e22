"""What a model card tells machines: the `model-index` in its header, and entries for the Hub's `.eval_results`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import EvalResult, EvalResultEntry, ModelCardData

from hf_momentum.results.rows import Row, row_names
from hf_momentum.results.statistics import mean_std

PAPER = "2307.15196"


@dataclass(frozen=True)
class Score:
    """A value for the metadata.

    Attributes:
        record: A run that it is of.
        value: The test accuracy, a row's mean over seeds or one run's.
        text: What it is of.
    """

    record: dict[str, Any]
    value: float
    text: str


def card_metadata(rows: Sequence[Row], name: str, scores: Sequence[Score]) -> ModelCardData:
    """The card's header.

    Args:
        rows: From `table_rows`.
        name: The model's name.
        scores: The values to state.

    Returns:
        The metadata; what the records lack is left out.
    """
    records = [record for row in rows for record in row.records]
    hub = [record["data"]["id"] for record in records if (record.get("data") or {}).get("source") == "hub"]
    bases = [base for base in dict.fromkeys(record.get("base_model") for record in records) if base]
    trained = [row for row in rows if row.is_trained]
    pipelines = {_pipeline(record) for record in records}
    return ModelCardData(
        base_model=(bases if len(bases) > 1 else bases[0]) if bases else None,
        library_name="peft" if {row.records[0].get("peft") for row in trained} == {"lora"} else "transformers",
        pipeline_tag=pipelines.pop() if len(pipelines) == 1 else None,
        tags=["hf_momentum", *dict.fromkeys(row.optim for row in trained), f"arxiv:{PAPER}"],
        datasets=list(dict.fromkeys(hub)) or None,
        metrics=["accuracy"],
        model_name=name if scores else None,
        eval_results=[_eval_result(score) for score in scores] or None,
    )


def card_scores(rows: Sequence[Row], model: dict[str, Any] | None) -> list[Score]:
    """What there is to state: the trained rows of known tasks, and before them the run that the weights are of.

    Args:
        rows: From `table_rows`.
        model: The run's record; None without weights.

    Returns:
        The scores.
    """
    names, scores = row_names(rows), []
    for row in rows:
        task, base, tuning, k = row.setting
        if not (row.is_trained and task and (tuning or _pipeline(row.records[0]))):
            continue
        how = ", ".join(filter(None, [names[id(row)], base, tuning and f"{tuning} tuning", k and f"k={k}"]))
        seeds = f"mean of {len(row.picks)} seeds" if len(row.picks) > 1 else "one seed"
        scores.append(Score(row.records[0], mean_std(list(row.accuracy.values()))[0], f"{how}, {seeds}"))
        if model in row.records:
            scores.insert(0, Score(model, model["test_accuracy"], f"this model: {how}, seed {model['seed']}"))
    return scores


def _pipeline(record: dict[str, Any]) -> str | None:
    return record.get("pipeline_tag") or ("text-classification" if record.get("tuning") == "classifier" else None)


def _eval_result(score: Score) -> EvalResult:
    task, data = score.record["task"], score.record.get("data") or {}
    # A type with a colon can be no data set's id on the Hub: only what came from there claims one.
    types = {"hub": data.get("id"), "folder": f"local-folder:{task}", "demo": f"hf_momentum-demo:{task}"}
    names = {"hub": task, "folder": f"{task} from a local folder", "demo": data.get("id") or f"{task}, a stand-in"}
    source = data.get("source")
    return EvalResult(
        task_type=score.record.get("pipeline_tag") or "text-classification",
        task_name="Image classification" if score.record.get("pipeline_tag") else "Few-shot text classification",
        dataset_type=types.get(source, f"not-recorded:{task}"),
        dataset_name=names.get(source, f"{task}, its source not recorded"),
        dataset_config=data.get("config"),
        dataset_split=data.get("split"),
        metric_type="accuracy",
        metric_name=f"Test accuracy of {score.text}",
        metric_value=round(score.value, 4),
    )


def hub_entries(scores: Sequence[Score]) -> list[EvalResultEntry]:
    """Entries for `.eval_results`, which the Hub shows on data sets that it knows as benchmarks with such a task.

    Args:
        scores: The values to state; those on data that did not come from the Hub, or whose task within their data set
            is not known, are left out.

    Returns:
        The entries; a data set's configuration names its task.
    """
    entries = []
    for score in scores:
        data = score.record.get("data") or {}
        if data.get("source") == "hub" and data.get("config"):
            tested = f", {data['test_examples']:,} test examples" if data.get("test_examples") else ""
            notes = f"accuracy of {score.text}{tested}"
            entry = EvalResultEntry(data["id"], data["config"], round(score.value, 4), notes=notes)
            entries.append(entry)
    return entries
