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


@app.command()
def table(results: Annotated[list[Path], typer.Argument(help="Files of runs (results.jsonl), or folders with one.")]):
    """Print the accuracy table and the paired differences of finished runs."""
    from hf_momentum.results.record import read_records
    from hf_momentum.results.tables import print_summary

    records, problems = [], []
    for path in results:
        file = path / "results.jsonl" if path.is_dir() else path
        if not file.exists():
            raise UserError(f"No such file: {file}. Give a results.jsonl, or the folder that a recipe wrote it to.")
        found = read_records(file)
        records += found.records
        problems += found.problems
    if not any(record.get("test_accuracy") is not None for record in records):
        problems.append("No tested run yet: a table needs records with a test_accuracy.")
    print_summary(records, problems)


@app.command()
def demo() -> None:
    """Fetch the embedded demo (a small model and its data, 86 MB) into the user's cache."""
    from hf_momentum.tasks.demo import demo_model_path, fetch_demo

    fetch_demo()
    typer.echo(f"The demo is ready: {demo_model_path()}")


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
