"""One progress display over many runs, instead of one bar and a page of logs for each."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback


def run_progress(console: Console, disable: bool = False) -> Progress:
    """The display: a bar over all runs and one over the steps of the current run.

    Args:
        console: Where to draw.
        disable: Draw nothing, as on every process but the first.

    Returns:
        A rich progress display, to be entered as a context.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console, disable=disable)


class RunProgressCallback(TrainerCallback):
    """Shows one run's optimizer steps as a line of a shared progress display, removed when the run ends.

    Args:
        progress: The display, from `run_progress`.
        description: What the line says.
    """

    def __init__(self, progress: Progress, description: str):
        self.progress, self.description = progress, description
        self._line = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Add the run's line."""
        self._line = self.progress.add_task(self.description, total=state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        """Move it to the run's global step."""
        self.progress.update(self._line, completed=state.global_step)

    def on_train_end(self, args, state, control, **kwargs):
        """Take it away."""
        self.progress.remove_task(self._line)
