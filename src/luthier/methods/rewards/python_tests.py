"""Python tests: 1 where the program in the completion passes the row's tests, and 0 elsewhere.

Both run in a sandbox: a process of its own without network, files, processes, environment or open files of ours, within
limits of CPU, memory, output and time (:mod:`luthier.evaluation.sandbox`). Where the system gives no isolation, nothing
runs and the recipe is refused.

The program is the completion's fenced Python blocks, joined, or the whole completion where it has none. The tests are
the row's column ``tests`` (a text or a list of assertions), ``test_list`` with ``test_setup_code`` (MBPP), or ``test``
with ``entry_point`` (HumanEval, whose completions continue the prompt: set ``with_prompt``). A row without tests gives
None.

Example::

    data: {test: mbpp.jsonl, verifier: {python-tests: {cpu_seconds: 5}}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from luthier.core.protocols import Context
from luthier.core.registry import reward
from luthier.functional.answers import code_blocks, column


def source_of_tests(row: Mapping[str, Any], name: str) -> str | None:
    """The tests of a row as one Python source, or None."""
    for key in (name, "test_list"):
        tests = column(row, key)
        if tests:
            lines = [tests] if isinstance(tests, str) else [str(t) for t in tests]
            return "\n".join([str(column(row, "test_setup_code") or ""), *lines])
    tests, entry = column(row, "test"), column(row, "entry_point")
    return f"{tests}\ncheck({entry})\n" if tests and entry else None


def program_of(row: Mapping[str, Any], completion: str, *, with_prompt: bool = False) -> str:
    """The program a completion gives."""
    blocks = code_blocks(completion, ("python", "py", "python3"))
    program = "\n".join(blocks) if blocks else completion
    return f"{row.get('prompt') or ''}{program}" if with_prompt else program


@reward("python-tests")
def python_tests(
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[str],
    ctx: Context | None,
    *,
    tests: Annotated[str, Field(description="column that holds the tests")] = "tests",
    with_prompt: Annotated[bool, Field(description="the completion continues the prompt's program")] = False,
    cpu_seconds: Annotated[int, Field(ge=1, le=600, description="CPU time of one program")] = 5,
    wall_seconds: Annotated[float, Field(gt=0, le=3600, description="time of one program by the clock")] = 10.0,
    memory_mb: Annotated[int, Field(ge=128, description="memory of one program, MiB")] = 1024,
    site_packages: Annotated[bool, Field(description="installed packages may be imported")] = False,
    workers: Annotated[int | None, Field(ge=1, description="programs at a time; by default one per core")] = None,
) -> list[float | None]:
    """Whether the program in the completion passes the row's tests, run in a sandbox."""
    from luthier.evaluation.sandbox import Limits, run_many

    sources = [source_of_tests(row, tests) for row in rows]
    programs = [
        (program_of(row, completion, with_prompt=with_prompt), source)
        for row, completion, source in zip(rows, completions, sources, strict=True)
        if source is not None
    ]
    limits = Limits(
        cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_mb=memory_mb, site_packages=site_packages
    )
    verdicts = iter(run_many(programs, limits, workers=workers))
    return [None if source is None else float(next(verdicts).passed) for source in sources]
