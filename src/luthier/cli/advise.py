"""``luthier advise``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli import common


def advise(
    model: Annotated[
        str, typer.Option("--model", "-M", help="A model folder, a hub id or lab:nano.", show_default=False)
    ],
    data: Annotated[
        str, typer.Option("--data", "-D", help="Training rows, as a recipe names them.", show_default=False)
    ],
    overrides: common.Overrides = None,
    test: Annotated[
        str | None, typer.Option("--test", help="Held-out rows; by default a file beside the data, else a part of it.")
    ] = None,
    budget: Annotated[str, typer.Option("--budget", help="For all of it: 90s, 20m, 2h, 1h30m.")] = "20m",
    methods: Annotated[
        str, typer.Option("--methods", "-m", help="Entries to race besides the proposed ones, as `compare` takes them.")
    ] = "",
    seeds: Annotated[int, typer.Option("--seeds", min=1, help="Most seeds of the final comparison.")] = 3,
    no_race: Annotated[bool, typer.Option("--no-race", help="Only measure and propose; train nothing.")] = False,
    sample: Annotated[int, typer.Option("--sample", min=1, help="Training rows that the base scores.")] = 512,
    answers: Annotated[int, typer.Option("--answers", min=1, help="Rows that the base answers.")] = 64,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The advice's folder.", show_default="runs/advice-<data>")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: common.Json = False,
) -> None:
    """Measure a model and its data, race what should help within a time budget, and write the recipe that won.

    What was measured and trained is kept: the same command goes on where it was stopped.
    """
    from luthier.advisor.advise import advise as run

    made = run(
        model,
        data,
        test=test,
        budget=budget,
        methods=methods,
        seeds=seeds,
        race=not no_race,
        output=output,
        overrides=overrides or (),
        sample_rows=sample,
        answered_rows=answers,
        quiet=quiet or as_json,
    )
    common.emit(made, as_json, lambda out: _human(out, made))


def _human(out: Any, made: dict[str, Any]) -> None:
    from rich.text import Text

    def line(text: str, style: str = "") -> None:
        out.print(Text(text, style=style), soft_wrap=True)

    line("Measured", "bold")
    for finding in made["findings"]:
        line(
            f"- {finding['name'].replace('_', ' ')}: {finding['sentence']}",
            "" if finding["value"] is not None else "dim",
        )
        if finding["follows"] and finding["value"] is not None:
            line(f"  {finding['follows']}", "dim")
    rules = made["rules"]
    if rules["remarks"]:
        line("\nBefore anything is trained", "bold")
    for remark in rules["remarks"]:
        line(f"- {remark['kind']}: {remark['why']} ({remark['source']})")
    line("\nProposed", "bold")
    for candidate in rules["candidates"]:
        line(f"- {candidate['entry']}: {candidate['why']} ({candidate['source']})")
    for entry, why in rules["left_out"].items():
        line(f"- left out: {entry} ({why})", "dim")
    if made["race"]:
        from luthier.advisor.race import Standing
        from luthier.advisor.watch import table
        from luthier.comparison.table import table as compared

        line("\nThe race", "bold")
        for remark in made["race"]["notes"]:
            line(remark, "dim")
        out.print(table([Standing(**s) for s in made["race"]["standings"]]))
        out.print()
        out.print(compared(made["comparison"]))
    line("")
    line(made["verdict"]["headline"], "bold")
    for sentence in made["verdict"]["sentences"]:
        line(f"- {sentence}")
    folder = Path(made["folder"])
    line(f"\nrecipe  {folder / 'recommended.yaml'}\npage    {folder / 'advice.html'}")
