"""Models that are already there made into one: the Python and command-line form of the weight operations."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from luthier.core import registry
from luthier.core.errors import UserError, did_you_mean
from luthier.core.store import atomic_folder, write_atomic, write_json
from luthier.models.info import adapter_base, inspect, known_fingerprint, model_of, read_json, resolve
from luthier.models.save import RECORD
from luthier.models.shards import Shards
from luthier.models.sources import ModelSource
from luthier.runs.progress import MergeProgress
from luthier.runs.weights import WeightContext, chain

KEYS = ("models", "base", "weights", "dtype", "rows")
DTYPES = ("float32", "bfloat16", "float16")
# Models up to this size in bytes are hashed for the manifest even if nothing else asks for it.
HASHED = 1_000_000_000
# Written beside the merged model: with it the same merge can be run again.
RECIPE = "merge.yaml"


@dataclass(frozen=True)
class Merged:
    """What a merge of models made.

    Attributes:
        folder: the merged model.
        models: what it was made from, in order.
        base: the base they come from, if one was named.
        operations: per operation its name, its options and what it chose or found.
        tensors: how many were written.
        bytes: their size.
        seconds: how long it took.
    """

    folder: str
    models: list[str]
    base: str | None
    operations: list[dict[str, Any]] = field(repr=False)
    tensors: int
    bytes: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


def read_recipe(file: Path) -> dict[str, Any]:
    """The arguments of :func:`merge_models` from a small YAML file with the keys of :data:`KEYS`.

    Raises:
        UserError: no such file, not YAML, or a key that a merge does not have.
    """
    from luthier.recipe.source import parse

    if not file.is_file():
        raise UserError(f"there is no file '{file}'.")
    value, places = parse(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(value, Mapping):
        raise UserError(f"must hold the keys {', '.join(KEYS)}.", where=str(file))
    for key in value:
        if key not in KEYS:
            raise UserError(
                f"unknown key '{key}'.{did_you_mean(str(key), KEYS)} A merge has: {', '.join(KEYS)}.",
                where=places.get((key,), str(file)),
            )
    for key in ("models", "weights"):
        if not isinstance(value.get(key), list) or not value[key]:
            raise UserError(f"'{key}' must be a list with at least one entry.", where=places.get((key,), str(file)))
    return dict(value)


def planned(weights: Sequence[Any]) -> list[tuple[str, dict[str, Any], Any]]:
    """(name, options, built operation) of each entry: a name, or a one-key mapping from the name to options.

    Raises:
        UserError: no such operation or option.
    """
    from luthier.recipe.plan import method_options

    found = []
    for number, entry in enumerate(weights):
        options: dict[str, Any] = {}
        if isinstance(entry, str):
            slug = entry
        elif isinstance(entry, Mapping) and len(entry) == 1:
            slug, options = next((str(k), dict(v or {})) for k, v in entry.items())
        else:
            raise UserError(f"weights[{number}] must be a name, or a mapping from one name to its options.")
        method = registry.get("weights", slug)
        checked = method_options(method, options, path=("weights", number, slug))
        found.append((slug, options, method.build(checked)))
    return found


def merge_models(
    models: Sequence[str | Path],
    folder: str | Path,
    weights: Sequence[Any],
    *,
    base: str | Path | None = None,
    dtype: str | None = None,
    rows: Any = None,
    quiet: bool = True,
) -> Merged:
    """Run weight operations over models and save a plain model.

    Args:
        models: folders of runs or models, or hub ids; an adapter is merged into its base first.
        folder: where the result goes; whole or absent.
        weights: the operations in order, as in a recipe.
        base: what the models were fine-tuned from.
        dtype: type of the result; by default as stored.
        rows: a recipe whose data an operation chooses by.
        quiet: show no progress.

    Raises:
        UserError: models that do not fit together; names the tensor or the file.
    """
    started = time.perf_counter()
    folder = Path(folder)
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"unknown dtype '{dtype}'.{did_you_mean(dtype, DTYPES)} Accepted: {', '.join(DTYPES)}.")
    ops = planned(weights)
    labels = [str(model) for model in models]
    if doubled := next((label for label in labels if labels.count(label) > 1), None):
        raise UserError(f"the model '{doubled}' is named twice.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        sources = {label: _open(label, folder, stack) for label in labels}
        origin = ModelSource(resolve(model_of(base))) if base is not None else None
        _check_disk(folder, next(iter(sources.values())))
        progress = stack.enter_context(MergeProgress(quiet=quiet))
        made = stack.enter_context(atomic_folder(folder))
        context = _context(rows, origin, next(iter(sources.values())))
        records = chain(
            [(slug, op) for slug, _, op in ops], sources, origin, context, made, dtype=dtype, observe=progress.operation
        )
        operations = [
            {"op": slug, "options": options, "found": {k: v for k, v in record.items() if k != "op"}}
            for (slug, options, _), record in zip(ops, records, strict=True)
        ]
        prints = {label: _fingerprint(source) for label, source in _with(sources, origin)}
        _describe(made, folder.name, sources, origin, prints, operations, weights, dtype=dtype, rows=rows, base=base)
        shards = Shards(made)
        return Merged(
            folder=str(folder),
            models=labels,
            base=None if base is None else str(base),
            operations=operations,
            tensors=len(shards.header),
            bytes=shards.nbytes,
            seconds=time.perf_counter() - started,
        )


def _open(label: str, beside: Path, stack: ExitStack) -> ModelSource:
    folder = resolve(model_of(label))
    if not (folder / "adapter_config.json").is_file():
        return ModelSource(folder, label)
    from luthier.models.merge import merge

    merged = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=beside.parent, prefix=".adapter-"))) / "model"
    merge(folder, merged)
    source = ModelSource(merged, label)
    recorded = read_json(p) if (p := folder / RECORD).is_file() else {}
    origin = ModelSource(resolve(adapter_base(folder)))
    source.base_fingerprint = recorded.get("base_fingerprint") or origin.fingerprint
    return source


def _with(sources: Mapping[str, ModelSource], origin: ModelSource | None) -> list[tuple[str, ModelSource]]:
    return [*sources.items(), *([("base", origin)] if origin is not None else [])]


def _fingerprint(source: ModelSource) -> str | None:
    """The hash of a model's files; None where they are large and were never hashed, which takes as long as a merge."""
    return source.fingerprint if source.shards.nbytes < HASHED else known_fingerprint(source.folder)


def _check_disk(folder: Path, source: ModelSource) -> None:
    there = next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())
    free, wanted = shutil.disk_usage(there).free, source.shards.nbytes
    if free < wanted:
        raise UserError(f"about {wanted / 1e9:.2f} GB will be written to {folder}, where {free / 1e9:.2f} GB are free.")


def _context(
    rows: Any, origin: ModelSource | None, first: ModelSource
) -> Callable[[Mapping[str, ModelSource], Path], WeightContext]:
    """What makes the context of an operation: with the rows of a recipe, where one is named."""
    if rows is None:
        return lambda models, folder: WeightContext(models)
    from luthier.models.load import load
    from luthier.runs import api, setup
    from luthier.runs.workshop import Workshop

    plan = api.planned(rows)
    setup.settings(plan)
    data, _, task = api.open_data(plan)
    loaded = load((origin or first).folder, task=task, labels=data.labels or None)
    shop = Workshop(plan, data, loaded, Path(plan.recipe.output))
    return lambda models, folder: WeightContext(models, shop, load(folder, task=task).model)


def _describe(
    made: Path,
    name: str,
    sources: Mapping[str, ModelSource],
    origin: ModelSource | None,
    hashes: Mapping[str, str | None],
    operations: list[dict[str, Any]],
    weights: Sequence[Any],
    **given: Any,
) -> None:
    """The record, the manifest, the recipe to run it again, and the card."""
    from luthier.recipe.load import dump_yaml
    from luthier.runs.manifest import versions

    known = {s.base_fingerprint for s in sources.values() if s.base_fingerprint}
    # A transferred model stands on another base than its own: what it was fine-tuned from is not told.
    transferred = any("target" in o["options"] for o in operations)
    base = hashes.get("base") or (known.pop() if len(known) == 1 else None)
    record = read_json(p) if (p := made / RECORD).is_file() else {}
    record["base_fingerprint"] = None if transferred else base
    if record := {k: v for k, v in record.items() if v}:
        write_json(made / RECORD, record)
    else:
        (made / RECORD).unlink(missing_ok=True)
    recipe = {"models": list(sources), "base": given["base"], "weights": list(weights), "dtype": given["dtype"]}
    recipe["rows"] = str(given["rows"]) if isinstance(given["rows"], str | Path) else None
    text = dump_yaml({k: str(v) if isinstance(v, Path) else v for k, v in recipe.items() if v is not None})
    write_atomic(made / RECIPE, text)
    write_json(
        made / "manifest.json",
        {
            "luthier": 1,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "models": {label: {"fingerprint": hashes[label]} for label in sources},
            "base": None if origin is None else {"id": str(given["base"]), "fingerprint": hashes["base"]},
            "operations": operations,
            "versions": versions(),
        },
    )
    write_atomic(made / "README.md", _card(made, name, list(sources), given["base"], operations, text))


def _card(made: Path, name: str, models: list[str], base: Any, operations: list[dict[str, Any]], recipe: str) -> str:
    from luthier.runs.card import fenced, front_matter, plain, usage
    from luthier.runs.report import short_name

    task = inspect(made).task or "" if (made / "config.json").is_file() else ""
    how = ", then ".join(o["op"] for o in operations)
    lines = [f"- {plain(short_name(model))}" for model in models]
    if base is not None:
        lines.append(f"- base: {plain(short_name(str(base)))}")
    parts = [
        front_matter(str(base or ""), task),
        f"# {plain(name)}",
        f"Made with Luthier by {plain(how)} from:\n\n" + "\n".join(lines),
        f"## How to use\n\n{fenced(usage(task, str(base or ''), made, name=name), 'python')}",
        f"## How it was made\n\n`luthier merge {RECIPE} FOLDER` makes it again.\n\n{fenced(recipe, 'yaml')}",
        "## Limits\n\nNothing was measured when the weights were combined; `luthier evaluate` measures the result.",
    ]
    return "\n\n".join(parts) + "\n"
