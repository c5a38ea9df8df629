"""What a person sees while a run works: one live line with loss, tokens per second and the time left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class MergeProgress:
    """A live line per weight operation, which counts tensors.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            console=Console(stderr=True, quiet=quiet),
            disable=quiet,
            refresh_per_second=4,
        )

    def __enter__(self) -> MergeProgress:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def operation(self, slug: str) -> Callable[[str, int], None]:
        """The observer of one operation: told of each tensor that is written and of how many there are."""
        bar = self.progress.add_task(slug, total=None, shown="")

        def observe(name: str, total: int) -> None:
            self.progress.update(bar, total=total, advance=1, shown=name)

        return observe


class TrainProgress:
    """An observer of the step loop.

    Args:
        total: steps of the run.
        quiet: show nothing.
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            disable=quiet,
            refresh_per_second=4,  # drawing takes a core's time from small models
        )
        self.bar = self.progress.add_task("training", total=total, shown="")

    def __enter__(self) -> TrainProgress:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def __call__(self, event: str, values: dict[str, Any]) -> None:
        """React to an event of the loop."""
        if event == "tick":
            self.progress.update(self.bar, completed=values["step"])
        elif event == "step":
            shown = f"loss {values['loss']:.4f}  {values['tokens_per_second']:,.0f} tokens/s"
            self.progress.update(self.bar, completed=values["step"], shown=shown)
        elif event == "evaluation":
            self.console.print(f"step {values['step']}: evaluation loss {values['loss']:.4f}")
        elif event == "checkpoint":
            self.console.print(
                f"step {values['step']}: checkpoint {values['path']}" + (" (best)" if values["best"] else "")
            )
