"""The `hf-momentum` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_momentum.errors import UserError

app = typer.Typer(
    help="SGD, SGD with momentum and SVAG for the Hugging Face Trainer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"max_content_width": 119},
    rich_markup_mode=None,  # plain help: importing what draws panels takes longer than all the rest
)


@app.command()
def optimizers() -> None:
    """List the optimizers, what they do and their defaults."""
    from hf_momentum.optim import get_optimizer_info, list_optimizers

    for name in list_optimizers():
        info = get_optimizer_info(name)
        defaults = ", ".join(f"{key}={value}" for key, value in info.defaults.items())
        typer.echo(f"{name:6} {info.description}" + (f" [{defaults}]" if defaults else ""))


@app.command()
def lr(
    value: Annotated[float, typer.Argument(help="The learning rate to convert.")],
    momentum: Annotated[float, typer.Option(help="β, in [0, 1).")] = 0.9,
    to: Annotated[str, typer.Option(help="effective: γ → η = γ/(1−β); heavy_ball: η → γ = η(1−β).")] = "effective",
) -> None:
    """Convert between torch's learning rate γ and the effective one η."""
    from hf_momentum.optim import effective_lr, heavy_ball_lr

    conversions = {"effective": effective_lr, "heavy_ball": heavy_ball_lr}
    if to not in conversions:
        raise UserError(f"Unknown form: {to!r}. Allowed: {', '.join(conversions)}.")
    typer.echo(f"{conversions[to](value, momentum):.6g}")


Results = Annotated[list[Path], typer.Argument(help="Files of runs (results.jsonl), or folders with one.")]
Format = Annotated[str, typer.Option("--format", help="terminal, markdown, latex or csv.")]
Output = Annotated[Path | None, typer.Option(help="Write to this file instead of the terminal.")]
Metric = Annotated[str, typer.Option(help="The field of a record to compare.")]


@app.command()
def table(results: Results, form: Format = "terminal", output: Output = None) -> None:
    """Show the accuracy table of finished runs, with the paired differences (CSV: the table's rows alone)."""
    from hf_momentum.results.export import show
    from hf_momentum.results.record import read_results
    from hf_momentum.results.tables import accuracy_report

    found = read_results(results)
    if not any(record.get("test_accuracy") is not None for record in found.records):
        found.problems.append("No tested run yet: a table needs records with a test_accuracy.")
    show(accuracy_report(found.records, found.problems), form, output)


@app.command()
def compare(
    results: Results,
    margin: Annotated[
        float, typer.Option(help="The largest difference that counts as none, in points; choose it beforehand.")
    ],
    alpha: Annotated[float, typer.Option(help="Level of each test.")] = 0.05,
    confidence: Annotated[float, typer.Option(help="Level of the intervals.")] = 0.95,
    metric: Metric = "test_accuracy",
    form: Format = "terminal",
    output: Output = None,
) -> None:
    """Say per task whether two methods are equivalent within a margin, different, or undecided."""
    from hf_momentum.results.comparisons import comparison_report
    from hf_momentum.results.export import show
    from hf_momentum.results.record import read_results

    found = read_results(results)
    show(comparison_report(found.records, margin, alpha, confidence, metric, found.problems), form, output)


@app.command()
def plot(
    results: Results,
    figure: Annotated[str, typer.Option(help="lr, difference, curves; of image runs also svag, rates.")],
    output: Annotated[Path, typer.Option(help="The folder for FIGURE.png, .svg and .jsonl.")] = Path("figures"),
    margin: Annotated[float | None, typer.Option(help="difference: draw ±margin in points as a band.")] = None,
    confidence: Annotated[
        float | None, typer.Option(help="difference: level of the intervals. Default: 0.95.")
    ] = None,
) -> None:
    """Draw accuracy over the learning rate, paired differences, or learning curves."""
    from hf_momentum.results.comparisons import check_confidence
    from hf_momentum.results.plots import write_figure
    from hf_momentum.results.record import read_results
    from hf_momentum.results.rows import repeated_tests

    if confidence is None:
        confidence = 0.95
    elif figure != "difference":
        raise UserError(f"--confidence belongs to --figure difference, not {figure}.")
    check_confidence(confidence)
    found = read_results(results)
    for file in write_figure(figure, found.records, output, margin, confidence):
        typer.echo(file)
    for problem in (*found.problems, *repeated_tests(found.records)):
        typer.echo(problem, err=True)


@app.command()
def card(
    results: Results,
    output: Annotated[Path, typer.Option(help="Folder for README.md and .eval_results.")] = Path("card"),
    figure: Annotated[Path | None, typer.Option(help="A PNG to show in the card.")] = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name. Default: the results' folder's or file's.")
    ] = None,
) -> None:
    """Write a Hub model card from finished runs alone."""
    from hf_momentum.results.card import results_card, write_card
    from hf_momentum.results.record import read_results
    from hf_momentum.results.rows import repeated_tests

    found = read_results(results)
    for problem in (*found.problems, *repeated_tests(found.records)):
        typer.echo(problem, err=True)
    name = name or "-".join(dict.fromkeys(map(_results_name, results)))
    made = results_card(found.records, name, figure)
    typer.echo(f"Model card: {write_card(made, output)}")


def _results_name(path: Path) -> str:
    """The folder that holds a results.jsonl, or the name of a file that is called otherwise."""
    path = path.resolve()
    folder = path.parent if path.name == "results.jsonl" else path
    return folder.stem if folder.is_file() else folder.name


@app.command()
def advise(
    model: Annotated[str | None, typer.Option("--model", help="Hub id, local folder, or demo. Default: demo.")] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="sst-2 sst-5 snli trec mnli, the demo's own, or your YAML file.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning_rate", help="η of the run to judge. Default: 0.1, of the demo only.")
    ] = None,
    batch_size: Annotated[int, typer.Option("--per_device_train_batch_size", help="Its batch size B.")] = 8,
    momentum: Annotated[float, typer.Option("--momentum", help="β of the SGDM that SGD is compared with.")] = 0.9,
    max_steps: Annotated[
        int | None, typer.Option("--max_steps", help="Its steps, decaying linearly. Default: 1000; demo: 100.")
    ] = None,
    warm_steps: Annotated[
        int | None, typer.Option("--warm_steps", help="Steps of SGD before the measurement. Default: a tenth.")
    ] = None,
    k: Annotated[int, typer.Option("--k", help="Examples per class to train on.")] = 16,
    seed: Annotated[int, typer.Option("--seed", help="Of draw, initialisation and data order.")] = 13,
    data_dir: Annotated[
        str | None, typer.Option("--data_dir", help="Folder with TASK/{train,test}.jsonl instead of the Hub.")
    ] = None,
    tuning: Annotated[
        str, typer.Option("--tuning", help="prompt: label words at the mask, or classifier: a new head.")
    ] = "prompt",
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", help="full (default), or economy (the demo's): a third of the cost, wider intervals."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", help="Folder for advice.jsonl and the picture.")] = Path(
        "runs/advise"
    ),
) -> None:
    """Do I need momentum? Measure gradient noise and curvature on your model and task, and say so.

    It trains the first steps with SGD (a measurement before the first one misleads), measures on training batches,
    and predicts by how much SGD and SGDM will differ at the end of the run, at your learning rate and batch size.

    Noise dominates: momentum is of marginal value here, and costs a copy of the weights. Drop it.

    Curvature dominates: momentum buys stability; below the learning rate that is named SGD would match.

    Undecided: the intervals are too wide. Take --budget full, or a larger --k.

    Example: hf-momentum advise --model FacebookAI/roberta-large --task sst-2 --k 512 --learning_rate 0.01
    """
    from rich.console import Console
    from transformers.utils import logging

    from hf_momentum.training.advise import AdviseArguments
    from hf_momentum.training.advise import advise as run

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    named = {"model": model, "task": task, "learning_rate": learning_rate, "per_device_train_batch_size": batch_size}
    named |= {"momentum": momentum, "max_steps": max_steps, "warm_steps": warm_steps, "k": k, "seed": seed}
    run(AdviseArguments(**named, data_dir=data_dir, tuning=tuning, budget=budget, output=output), Console())


@app.command()
def demo() -> None:
    """Fetch the embedded demo (a small model and its data, 86 MB) and keep it, 180 MB, in the user's cache."""
    from hf_momentum.tasks.demo import fetch_demo
    from hf_momentum.tasks.demo_mlm import demo_masked_lm_path

    fetch_demo()
    typer.echo(f"The demo is ready: {demo_masked_lm_path()}")


@app.command()
def doctor() -> None:
    """Say what is installed and can run here, and check in seconds that training does what it should."""
    from rich.console import Console
    from transformers import logging

    from hf_momentum.training.doctor import run_doctor

    logging.set_verbosity_error()
    if not run_doctor(Console()):
        raise typer.Exit(1)


def main() -> None:
    """Run the command; a user's mistake ends it with one message and status 2."""
    try:
        app()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
