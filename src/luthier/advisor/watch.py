"""What a person sees while an advice is made: what is being done, and the race as it stands."""

from __future__ import annotations

from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from luthier.advisor.race import Standing

_STYLES = {"finished": "green", "stopped": "dim", "failed": "red", "waiting": ""}


def table(standings: list[Standing]) -> Table:
    """Entries as rows: how far they came, their last held-out score, G and Lt, and why they stopped."""
    shown = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("", "steps", "held-out", "G", "Lt", ""):
        shown.add_column(name, justify="left" if not name else "right")
    for s in standings:
        last = next(reversed(s.scores.values()), None)
        dynamics = [f"{s.dynamics[k]:.3g}" if k in s.dynamics else "-" for k in ("G", "Lt")]
        told = Text(s.reason or ("" if s.status == "waiting" else s.status), style=_STYLES[s.status])
        score = "-" if last is None else f"{last:.3f}"
        shown.add_row(Text(s.entry), f"{s.step:,}/{s.total:,}", score, *dynamics, told)
    return shown


class Watch:
    """A live view on stderr; without a terminal, one line per change.

    Args:
        quiet: show nothing.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.console = Console(stderr=True, quiet=quiet)
        self.doing = ""
        self.standings: dict[str, Standing] = {}
        self.live = Live(console=self.console, get_renderable=self._view, refresh_per_second=2, transient=True)

    def __enter__(self) -> Watch:
        if self.console.is_terminal and not self.console.quiet:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def _view(self) -> Any:
        return Group(
            Text(self.doing, style="bold"), table(list(self.standings.values())) if self.standings else Text("")
        )

    def say(self, text: str) -> None:
        """What is being done now."""
        self.doing = text
        if not self.live.is_started:
            self.console.print(text, markup=False)

    def standing(self, standing: Standing) -> None:
        """A change in the race."""
        self.standings[standing.entry] = standing
        if not self.live.is_started:
            last = next(reversed(standing.scores.values()), None)
            told = f", held-out {last:.3f}" if last is not None else ""
            why = f": {standing.status} ({standing.reason})" if standing.reason else ""
            line = f"{standing.entry} at step {standing.step:,} of {standing.total:,}{told}{why}"
            self.console.print(line, markup=False, soft_wrap=True)
