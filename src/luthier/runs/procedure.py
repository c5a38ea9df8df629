"""What the calls of a procedure or a data stage give, kept on disk by the content of all that decides it.

A call is cut into pieces, and each is kept as soon as it is there: a run that is killed inside a call loses the piece
it was at, and a second run with the same model, rows and options computes none of them again.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import luthier
from luthier import functional
from luthier.core import registry
from luthier.core.errors import LuthierError
from luthier.core.protocols import Completion
from luthier.core.store import Store, content_hash, write_json

# Prompts, rows or programs of a piece.
WRITTEN, SCORED, JUDGED, RUN = 256, 1024, 256, 64
# Where a row stands decides nothing about it.
PLACE = ("row", "source", "id", "key")


@cache
def code_of(target: Any) -> str:
    """A hash of a method's code: its own file, and the pure functions that any method may stand on."""
    own = Path(inspect.getsourcefile(target) or "")
    return content_hash(luthier.__version__, own, *sorted(Path(functional.__path__[0]).glob("*.py")))


def weights_hash(model: torch.nn.Module) -> str:
    """A hash of every parameter and buffer of a model in memory, by name, type and bytes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        whole = value.detach().cpu().contiguous()
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}".encode())
        digest.update(whole.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]


def _model_key(shop: Any, model: Any) -> list[Any]:
    """What a model's numbers are kept under."""
    untouched = shop.untouched and (model is None or model is shop.loaded.model)
    state = shop.state if untouched and shop.state else weights_hash(_live(shop, model))
    opened = shop.plan.recipe.model
    return [state, opened.dtype, opened.attention, shop.precision]


def _live(shop: Any, model: Any) -> Any:
    return shop.loaded.model if model is None else model


def in_pieces(
    kind: str, shared: Sequence[Any], keys: Sequence[Any], size: int, make: Callable[[range, str], Any], store: Store
) -> list[Any]:
    """Results of consecutive pieces, from the store or made now and then kept, each as one JSON value.

    Args:
        kind: the store's folder.
        shared: JSON values that decide the result of every piece.
        keys: of each item, a JSON value that decides its result.
        size: items of a piece.
        make: ``(items, key) -> JSON`` of a piece; the key is a hash of all that decides it.
        store: where they are kept.
    """
    found = []
    for start in range(0, len(keys), size):
        items = range(start, min(start + size, len(keys)))
        key = content_hash(shared, [keys[i] for i in items])

        def write(folder: Path, items: range = items, key: str = key) -> None:
            write_json(folder / "result.json", make(items, key))

        folder = store.get_or_make(kind, key, write)
        found.append(json.loads((folder / "result.json").read_text(encoding="utf-8")))
    return found


def generate(
    shop: Any, prompts: Sequence[Any], *, model: Any, samples: int, decoding: str | None, options: Mapping[str, Any]
) -> list[list[Completion]]:
    """Completions for prompts, ``samples`` of each; see :meth:`luthier.runs.workshop.Workshop.generate`."""
    ids = [shop.data.renderer.prompt_ids(p) if isinstance(p, dict) else [int(i) for i in p] for p in prompts]
    method = registry.get("decoding", decoding) if decoding else shop.plan.decoding.method
    chosen = {} if decoding else shop.decoder_options
    live = _live(shop, model)
    stops = live.generation_config.eos_token_id
    shared = [_model_key(shop, model), samples, method.slug, {**chosen, **options}, shop.seed, stops]

    def write(items: range, key: str) -> list[Any]:
        session = shop.session(live)
        found = shop.decode(session, [ids[i] for i in items], samples=samples, decoding=decoding, **options)
        return [[vars(c) for c in some] for some in found]

    pieces = in_pieces("completions", [*shared, code_of(method.target)], ids, WRITTEN, write, Store())
    return [[_completion(held) for held in some] for piece in pieces for some in piece]


def _completion(held: Mapping[str, Any]) -> Completion:
    values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in held.items()}
    return Completion(**values)


class Part:
    """Some consecutive rows of prepared data, as a session scores them."""

    def __init__(self, prepared: Any, rows: range) -> None:
        self.prepared, self.rows = prepared, rows

    def __len__(self) -> int:
        return len(self.rows)

    def fetch(self, index: Sequence[int]) -> dict[str, list[Any]]:
        """Columns of rows of this part."""
        return self.prepared.fetch([self.rows[i] for i in index])


def score(shop: Any, prepared: Any, model: Any) -> list[torch.Tensor]:
    """Target log-probabilities of prepared rows, one tensor per row."""
    found: list[torch.Tensor] = []
    store, shared = Store(), [_model_key(shop, model), prepared.task]
    for start in range(0, len(prepared), SCORED):
        rows = range(start, min(start + SCORED, len(prepared)))

        def write(folder: Path, rows: range = rows) -> None:
            some = shop.session(_live(shop, model)).score(Part(prepared, rows))
            counts = torch.tensor([len(s) for s in some])
            save_file({"logp": torch.cat(some).float().contiguous(), "counts": counts}, folder / "scores.safetensors")

        key = content_hash(shared, luthier.__version__, prepared.keys[rows.start : rows.stop])
        held = load_file(store.get_or_make("scores", key, write) / "scores.safetensors")
        found += held["logp"].split(held["counts"].tolist())
    return found


def likelihood(shop: Any, prepared: Any, model: Any) -> tuple[np.ndarray, np.ndarray]:
    """Sum of target log-probabilities (float64 nats) and number of targets of each prepared row, both [R]."""

    def write(rows: range, key: str) -> list[Any]:
        found = shop.session(_live(shop, model)).score(Part(prepared, rows))
        return [[float(s.double().sum()) for s in found], [len(s) for s in found]]

    shared = [_model_key(shop, model), prepared.task, luthier.__version__]
    return _sums(in_pieces("likelihoods", shared, prepared.keys, SCORED, write, Store()))


def _sums(pieces: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    total_R, count_R = ([v for piece in pieces for v in piece[k]] for k in (0, 1))
    return np.asarray(total_R, np.float64), np.asarray(count_R, np.int64)


def row_likelihood(
    shop: Any, rows: Sequence[Mapping[str, Any]], *, ends: bool, last: bool
) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`likelihood` of canonical rows under the base, rendered and masked as in training.

    Args:
        shop: gives model and renderer.
        rows: canonical rows.
        ends: whether the tokens that end an answer count.
        last: only the last answer of a conversation counts.

    Returns:
        Sums and counts [R]; both are 0 for a row that is longer than the model reads or has nothing to score.
    """
    renderer = shop.data.renderer

    def write(items: range, key: str) -> list[Any]:
        rendered = renderer.render_batch([rows[i] for i in items])
        spans = [[] if r.over else _counted(r, set(renderer.stop_ids), ends, last) for r in rendered]
        there = sorted((i for i, s in enumerate(spans) if s), key=lambda i: len(rendered[i].input_ids))
        part = InMemory([rendered[i].input_ids for i in there], [spans[i] for i in there])
        found = dict(zip(there, shop.session(_live(shop, None)).score(part), strict=True))
        none = torch.zeros(0)
        sums = [found.get(i, none) for i in range(len(rendered))]
        return [[float(s.double().sum()) for s in sums], [len(s) for s in sums]]

    shared = [_model_key(shop, None), renderer.fingerprint, ends, last, luthier.__version__]
    keys = [content_hash({k: v for k, v in row.items() if k not in PLACE}) for row in rows]
    return _sums(in_pieces("row-likelihoods", shared, keys, SCORED, write, Store()))


def _counted(rendered: Any, stops: set[int], ends: bool, last: bool) -> list[int]:
    """Flat edges of the spans that count."""
    edges: list[int] = []
    for start, end in rendered.spans[-1:] if last else rendered.spans:
        if not ends and rendered.input_ids[end - 1] in stops:
            end -= 1
        edges += [start, end] if end > start else []
    return edges


class InMemory:
    """Token ids and flat spans of some rows, as a session scores them."""

    def __init__(self, ids: Sequence[Sequence[int]], spans: Sequence[Sequence[int]]) -> None:
        self.ids, self.spans = ids, spans

    def __len__(self) -> int:
        return len(self.ids)

    def fetch(self, index: Sequence[int]) -> dict[str, list[Any]]:
        """Columns of some rows."""
        return {
            "input_ids": [np.asarray(self.ids[i], np.int32) for i in index],
            "spans": [np.asarray(self.spans[i], np.int32) for i in index],
        }


def judge(
    verifier: Any, rows: Sequence[Mapping[str, Any]], completions: Sequence[str], ctx: Any, deciding: Sequence[Any]
) -> list[float | None]:
    """One score per completion by a verifier, kept by rows, completions and the verifier's own code.

    Args:
        verifier: a reward.
        rows: canonical rows.
        completions: one for each.
        ctx: handed to the verifier.
        deciding: JSON values that say which verifier it is, in which state.

    Raises:
        LuthierError: it gives another number of scores, or one that is not a number.
    """

    def write(items: range, key: str) -> list[float | None]:
        found = verifier([rows[i] for i in items], [completions[i] for i in items], ctx)
        if len(found) != len(items):
            raise LuthierError(f"the verifier gave {len(found)} scores for {len(items)} completions.")
        for i, value in zip(items, found, strict=True):
            if value is not None and not np.isfinite(value):
                raise LuthierError(
                    f"the verifier gives {value} for the completion of {rows[i].get('source')}, row "
                    f"{rows[i].get('row')}; it must be a number, or None where it cannot judge."
                )
        return [None if v is None else float(v) for v in found]

    content = ({k: v for k, v in row.items() if k not in PLACE} for row in rows)
    keys = [content_hash(row, text) for row, text in zip(content, completions, strict=True)]
    return [v for piece in in_pieces("verdicts", deciding, keys, JUDGED, write, Store()) for v in piece]


def execute(programs: Sequence[tuple[str, str]], seconds: float) -> list[dict[str, Any]]:
    """What the sandbox says of ``(code, tests)`` pairs, kept by content.

    Raises:
        UserError: no isolation here; nothing has run.
    """
    from luthier.evaluation import sandbox

    sandbox.check()
    limits = sandbox.Limits(cpu_seconds=max(1, math.ceil(seconds)), wall_seconds=seconds + 1.0)

    def run(items: range, key: str) -> list[Any]:
        return [vars(verdict) for verdict in sandbox.run_many([programs[i] for i in items], limits)]

    code = [Path(sandbox.__file__), Path(sandbox.__file__).with_name("sandbox_child.py")]
    pieces = in_pieces("executions", [seconds, content_hash(*code)], [list(p) for p in programs], RUN, run, Store())
    return [verdict for piece in pieces for verdict in piece]


class Alternating:
    """The order of two sets of rows that take turns, step by step; the first set decides how long it lasts.

    Args:
        parts: for either set, its order and which rows of the data its numbers are.
    """

    def __init__(self, parts: Sequence[tuple[Any, np.ndarray]]) -> None:
        self.parts, self.first = parts, parts[0][0]
        self.lengths = np.zeros(sum(len(rows) for _, rows in parts), np.int64)
        for order, rows in parts:
            self.lengths[rows] = order.lengths

    def steps(self, epochs: float, max_steps: int | None = None) -> int:
        """Steps of both sets."""
        whole = 2 * self.first.steps(epochs)
        return whole if max_steps is None else min(whole, max_steps)

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, number within it) of the first set."""
        found: tuple[int, int] = self.first.locate(step // 2)
        return found

    def epoch(self, epoch: int) -> Any:
        """The steps of an epoch of the first set."""
        return self.first.epoch(epoch)

    def rows(self, step: int) -> tuple[int, np.ndarray]:
        """Epoch of the first set, and the rows of a step."""
        order, rows = self.parts[step % 2]
        return self.locate(step)[0], rows[order.rows(step // 2)[1]]


def alternate(trainer: Any, prepared: Any, boundary: int) -> None:
    """Let the rows of a trainer from one canonical row on take turns with those before it."""
    index = np.asarray(prepared.fetch(range(len(prepared)))["index"])
    training, session = trainer.training, trainer.session

    def part(rows: np.ndarray) -> tuple[Any, np.ndarray]:
        order = type(trainer.order)(
            trainer.order.lengths[rows],
            seed=session.seed,
            batch_rows=None if training.batch_tokens else training.batch_rows,
            batch_tokens=training.batch_tokens,
            buckets=training.buckets,
            oversample=session.stack.oversample,
        )
        return order, rows

    trainer.order = Alternating([part(np.flatnonzero(index < boundary)), part(np.flatnonzero(index >= boundary))])
    session.total_steps = trainer.total = trainer.order.steps(training.epochs, training.max_steps)


def continue_optimizer(trainer: Any, folder: Path | None) -> None:
    """Give a trainer the optimiser's state that another one left in ``folder``."""
    from luthier.engine import checkpoint
    from luthier.engine.optimizer import load_optimizer_state

    newest = checkpoint.latest(folder / "checkpoints") if folder is not None else None
    assert newest is not None, "an inner training leaves a checkpoint"
    names = {id(p): n for n, p in trainer.session.model.named_parameters()}
    load_optimizer_state(trainer.optimizer, names, checkpoint.load(newest)[1], trainer.session.processes.like)
