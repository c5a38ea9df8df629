"""Scores for preference-oriented SFT: how likely do already aligned models find each answer?

    s_k(x, y) = mean over the answer's tokens of log p_k(token)        model k with its own tokenizer and chat template
    S(x, y)   = the mean over the models; or merge: max, min, the name of one, or a list of weights

Per-token means make models with other tokenizers comparable; ``normalise: char`` divides by the answer's characters
instead, which is safer where vocabularies differ much. S stands in the column ``ref_score``, which the objective of the
same name reads, with a hash of the text it belongs to. Rows without anything to score after cutting at ``max_length``,
or whose score is not finite, are dropped and counted.

``score_targets: assistant`` counts what training with that model would supervise: the answers and the tokens that end
them, so that a model's scores of its own rows are its training likelihoods. ``content``, as the released code, leaves
the end tokens out.

Scores are kept by content (model, texts, options), in pieces, so that a run that was stopped goes on where it was. A
``score_file`` also keeps them where you say, and gives them without the models: lines matched by the rows' ``id`` (by a
hash of their text where they have none). Beside it stands a report, ``<score_file>.report.json``.

Paper: "Preference-Oriented Supervised Fine-Tuning: Favoring Target Model Over Aligned Large Language Models", AAAI
2025, arXiv 2412.12865. Official repository: Savannah120/alignment-handbook-PoFT.

Example::

    data:
      stages:
        - preference-oriented-sft: {scorers: [HuggingFaceH4/zephyr-7b-beta, ./aligned], score_file: scores.jsonl}
    objective: preference-oriented-sft
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.registry import data_stage
from luthier.core.store import Store, content_hash, write_atomic, write_json
from luthier.functional import score_files
from luthier.functional.discriminative import place
from luthier.functional.preference_oriented import (
    COLUMN,
    Score,
    characters,
    merge_weights,
    merged,
    quantiles,
    text_hash,
)
from luthier.functional.sequences import length_groups

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger("luthier")

SLUG = "preference-oriented-sft"
BATCH_ROWS = 1000
PIECE = 1024
Rendered = tuple[list[int], list[tuple[int, int]]]


@data_stage(
    "preference-oriented-sft",
    example={"scorers": ["lab:nano"]},
    tasks=("causal-lm",),
    paper="Preference-Oriented Supervised Fine-Tuning: Favoring Target Model Over Aligned Large Language Models, "
    "AAAI 2025, arXiv 2412.12865",
)
class ScoreWithAlignedModels:
    """Score every answer with already aligned models; the objective asks the trained model to like it better."""

    def __init__(
        self,
        *,
        scorers: Annotated[
            list[str] | None, Field(min_length=1, description="the aligned models: folders, hub ids, lab:nano")
        ] = None,
        score_file: Annotated[
            str | None, Field(min_length=1, description="JSON lines of scores: read where it has them, then written")
        ] = None,
        merge: Annotated[
            str | list[float], Field(description="mean, max, min, one of the models, or a weight for each")
        ] = "mean",
        normalise: Annotated[
            Literal["token", "char"], Field(description="what a score is the mean over; as in the objective")
        ] = "token",
        score_targets: Annotated[
            Literal["assistant", "content"],
            Field(description="tokens that count: answers with their end tokens, or without as the released code"),
        ] = "assistant",
        max_length: Annotated[
            int, Field(ge=2, description="longer rows are cut; a model's own limit if smaller")
        ] = 4096,
        template: Annotated[
            str | None, Field(description="chat template of models that have none: chatml, plain, or a .jinja file")
        ] = None,
        dtype: Annotated[Literal["float32", "bfloat16"], Field(description="type of the weights")] = "float32",
        batch_rows: Annotated[int, Field(ge=1, description="rows scored together")] = 8,
    ) -> None:
        if scorers is None and score_file is None:
            raise UserError(
                f"{SLUG}: name the aligned models (scorers: [...]), or a score_file that holds their scores."
            )
        if len(set(scorers or ())) < len(scorers or ()):
            raise UserError(f"{SLUG}: a model is there twice in scorers; give it once, and a weight in merge.")
        if scorers:
            merge_weights(merge, scorers)
        self.scorers, self.merge, self.normalise, self.score_targets = scorers, merge, normalise, score_targets
        self.max_length, self.template, self.dtype, self.batch_rows = max_length, template, dtype, batch_rows
        self.score_file = None if score_file is None else Path(score_file).expanduser()

    def reads(self, ctx: Any) -> list[str]:
        """The state of each model that is there, and of the score file."""
        folders = [str(Path(name).expanduser()) for name in self.scorers or ()]
        file = [self.score_file] if self.score_file is not None and self.score_file.is_file() else []
        return [content_hash(p) for p in file] + [
            ctx.fingerprint(f) if name.startswith("lab:") or Path(f).is_dir() else name
            for name, f in zip(self.scorers or (), folders, strict=True)
        ]

    def run(self, dataset: Dataset, ctx: Any) -> Dataset:
        """The rows that could be scored, with ``ref_score`` in ``extra``.

        Raises:
            UserError: an id is there twice, a row is no pair or conversation, the score file is of other texts or has
                no model, or a model cannot be opened.
        """
        ids, hashes, sizes, sources = self.known_rows(dataset, ctx)
        path = self.score_file
        held: dict[str, score_files.Line] = {}
        if path is not None and path.is_file():
            with path.open(encoding="utf-8") as handle:
                held = score_files.parse(handle, str(path))
        names = self.scorers or score_files.models(held)
        if not names:
            raise UserError(f"{SLUG}: holds no scores, and no scorers are named.", where=str(path))
        rule = merge_weights(self.merge, names)
        lines = score_files.known(held, ids, hashes, str(path))
        found: dict[str, dict[int, score_files.Raw]] = {}
        for model in names:
            scorer = Scorer(model, self, ctx)
            fresh = self.fresh(scorer, dataset, hashes, lines)
            known = {i: line.scores[model] for i, line in enumerate(lines) if line and model in line.scores}
            found[model] = known | fresh
            for i, raw in fresh.items():
                line = held.setdefault(ids[i], score_files.Line(hashes[i]))
                line.scores[model], line.models[model] = raw, scorer.fingerprint
        if path is not None:
            write_atomic(path, score_files.written(held))

        values = {model: [self.value(raws.get(i), sizes[i]) for i in range(len(ids))] for model, raws in found.items()}
        scores = [merged(row, rule) for row in zip(*values.values(), strict=True)]
        kept = [i for i, s in enumerate(scores) if s is not None]
        report = self.report(values, scores, sources)
        if path is not None:
            write_json(path.with_name(f"{path.name}.report.json"), report)
        logger.info("%s: %s", SLUG, json.dumps(report))
        extra = []
        for i, row in enumerate(_rows(dataset)):
            if (s := scores[i]) is not None:
                score = Score(s, self.normalise, text_hash(row)).to_json()
                extra.append(json.dumps({**json.loads(row["extra"] or "{}"), COLUMN: score}, ensure_ascii=False))
        chosen = dataset if len(kept) == len(dataset) else dataset.select(kept)
        return chosen.remove_columns("extra").add_column("extra", extra).select_columns(dataset.column_names)

    # -- the rows

    def known_rows(self, dataset: Dataset, ctx: Any) -> tuple[list[str], list[str], list[int], list[str]]:
        """Id, hash of the text and of how it is scored, characters and source of each row.

        Raises:
            UserError: an id is there twice, or a row cannot be scored or is scored already.
        """
        ids: list[str] = []
        hashes: list[str] = []
        sizes: list[int] = []
        sources: list[str] = []
        first: dict[str, str] = {}
        shown = [ctx.renderer.system, ctx.renderer.thinking, ctx.renderer.add_eos]
        # A score is one of a text and of how it was taken.
        options = [self.score_targets, self.normalise, self.max_length, self.template, self.dtype]
        for row in _rows(dataset):
            sizes.append(characters(row))
            if COLUMN in json.loads(row["extra"] or "{}"):
                raise UserError(
                    f"the row has a column '{COLUMN}' already; remove the data stage, or that column.", where=place(row)
                )
            if (name := row["id"]) is not None:
                if name in first:
                    raise UserError(
                        f"the id '{name}' is also that of {first[name]}, and scores are matched by it. Make ids "
                        "unique, or name another column in data.columns: {id: ...}.",
                        where=place(row),
                    )
                first[name] = place(row)
            hashes.append(content_hash(text_hash(row), shown, options))
            ids.append(name if name is not None else hashes[-1])
            sources.append(str(row["source"]))
        return ids, hashes, sizes, sources

    def value(self, raw: score_files.Raw, size: int) -> float | None:
        """One model's score of one row."""
        count = size if self.normalise == "char" else (raw[1] if raw else 0)
        return raw[0] / count if raw is not None and count else None

    def report(
        self, values: dict[str, list[float | None]], scores: list[float | None], sources: list[str]
    ) -> dict[str, Any]:
        """Counts and quantiles of the scores by source, of each model and merged."""
        return {
            "rows": len(scores),
            "dropped": sum(s is None for s in scores),
            "merge": self.merge,
            "normalise": self.normalise,
            "score_targets": self.score_targets,
            "models": {
                model: {"unscored": sum(v is None for v in some), "scores": _by_source(some, sources)}
                for model, some in values.items()
            },
            "merged": _by_source(scores, sources),
        }

    # -- the models

    def fresh(
        self, model: Scorer, dataset: Dataset, hashes: list[str], lines: list[score_files.Line | None]
    ) -> dict[int, score_files.Raw]:
        """One model's sums of the rows that the file does not have, from the store or computed piece by piece.

        Raises:
            UserError: the scores of the file are those of another state of the model.
        """
        name = model.name
        states = {line.models[name] for line in lines if line is not None and name in line.scores}
        # A model of the hub is not fetched for this, and one that is gone cannot be compared.
        if states and Path(name).expanduser().is_dir() and states != {model.fingerprint}:
            raise UserError(
                f"its scores by {name} are those of another state of that model. Remove the file to score anew, or "
                "name another score_file.",
                where=str(self.score_file),
            )
        open_rows = [i for i, line in enumerate(lines) if line is None or name not in line.scores]
        found: dict[int, score_files.Raw] = {}
        if not open_rows or self.scorers is None:
            return found
        logger.info("%s: scores of %d rows by %s", SLUG, len(open_rows), name)
        for start in range(0, len(open_rows), PIECE):
            piece = open_rows[start : start + PIECE]
            key = content_hash(model.fingerprint, [hashes[i] for i in piece], "v1")

            def make(folder: Path, piece: list[int] = piece) -> None:
                raws = model.sums(list(_rows(dataset.select(piece))))
                write_json(folder / "scores.json", [score_files.as_json(raw) for raw in raws])

            folder = Store().get_or_make("preference-scores", key, make)
            held = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
            found |= {i: (h["logp"], h["tokens"]) if h else None for i, h in zip(piece, held, strict=True)}
        return found


class Scorer:
    """An aligned model, opened when a score is not there yet.

    Args:
        name: a folder, a hub id, or one of the lab.
        stage: the options.
        ctx: the run, for what the rows are shown with (system message, reasoning).
    """

    def __init__(self, name: str, stage: ScoreWithAlignedModels, ctx: Any) -> None:
        self.name, self.stage, self.base, self.ctx = name, stage, ctx.renderer, ctx

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the model's files."""
        return str(self.ctx.fingerprint(self.name))

    @cached_property
    def session(self) -> Any:
        """The model with its tokenizer and task."""
        return self.ctx.other(self.name, dtype=self.stage.dtype)

    @cached_property
    def renderer(self) -> Any:
        """The rendering path with the model's own tokenizer and template."""
        from luthier.data.render import Renderer
        from luthier.models.load import inspect

        processor = self.session.processor
        own = getattr(processor, "chat_template", None)
        limits = [n for n in (self.stage.max_length, inspect(self.name).max_length) if n]
        return Renderer(
            processor,
            task="causal-lm",
            template=None if own else self.stage.template,
            system=self.base.system,
            thinking=self.base.thinking,
            max_length=min(limits),
            truncation="keep_start",
            add_eos=self.base.add_eos and self.stage.score_targets == "assistant",
        )

    def rendered(self, rows: Sequence[dict[str, Any]]) -> list[Rendered]:
        """Token ids of each row and the spans that count; no span for a row that cannot be scored.

        Raises:
            UserError: the model has no template for conversations, or its tokenizer tells no places.
        """
        renderer = self.renderer
        if renderer.chat is None and any(row["kind"] == "chat" for row in rows):
            raise UserError(
                f"{SLUG}: the tokenizer of {self.name} has no chat template, and the rows are conversations. Set the "
                "stage's template to chatml, plain, or a .jinja file."
            )
        if self.stage.score_targets == "content" and renderer.chat is not None:
            return [self.content(row) for row in rows]
        found = renderer.render_batch(rows)
        # Characters are those of the whole answer, so a part of it has no mean over them.
        partly = self.stage.normalise == "char"
        return [(r.input_ids, [] if partly and r.lost else r.spans) for r in found]

    def content(self, row: dict[str, Any]) -> Rendered:
        """As :meth:`rendered`, of the words of the assistant alone: no template's tokens, no end of a turn."""
        renderer = self.renderer
        if not renderer.encoder.has_offsets:
            raise UserError(f"{SLUG}: score_targets: content needs a fast tokenizer (tokenizer.json).", where=self.name)
        messages, tools = renderer.messages_of(row, "messages")
        text, turns, _ = renderer.chat.locate(messages, tools)
        encoded = renderer.encoder.encode([text])[0]
        said = [m for m in messages if m["role"] == "assistant" and m.get("weight", 1)]
        spans, at = [], 0
        for message in said:
            words = (message.get("content") or "").strip()
            at = max(at, next((start for start, end in turns if end > at), at))
            start = text.find(words, at) if words else -1
            if start < 0:
                continue
            at = start + len(words)
            # A token that holds the last letter counts, also one that reaches beyond it or begins within it.
            last = max(encoded.token_at(at), encoded.token_at(at - 1) + 1)
            spans.append((max(encoded.token_at(start), 1), last))
        limit = renderer.max_length
        cut = [(s, min(e, limit)) for s, e in spans if s < min(e, limit)]
        whole = cut == spans
        return encoded.ids[:limit], cut if whole or self.stage.normalise == "token" else []

    @torch.no_grad()
    def sums(self, rows: Sequence[dict[str, Any]]) -> list[score_files.Raw]:
        """Sum of log-probabilities and number of tokens of each row."""
        rendered = self.rendered(rows)
        found: list[score_files.Raw] = [None] * len(rows)
        there = [i for i, (_, spans) in enumerate(rendered) if spans]
        for group in length_groups([len(rendered[i][0]) for i in there], self.stage.batch_rows):
            index = [there[g] for g in group]
            for i, raw in zip(index, self.forward([rendered[i] for i in index]), strict=True):
                found[i] = raw if raw is not None and math.isfinite(raw[0]) else None
        return found

    def forward(self, rendered: Sequence[Rendered]) -> list[score_files.Raw]:
        """One pass over some rows; the logits of few positions exist at a time."""
        columns = {
            "input_ids": [np.asarray(ids, dtype=np.int32) for ids, _ in rendered],
            "spans": [np.asarray(spans, dtype=np.int32).reshape(-1) for _, spans in rendered],
        }
        session = self.session
        batch = session.to_device(session.task.collate(columns, range(len(rendered))))
        logp_N = session.forward(batch, grad=False).logp_N.double().cpu()
        batch.sequence_N = batch.sequence_N.cpu()
        total_B = torch.zeros(len(rendered), dtype=torch.float64).index_add(0, batch.sequence_N, logp_N)
        count_B = torch.bincount(batch.sequence_N, minlength=len(rendered))
        return list(zip(total_B.tolist(), count_B.tolist(), strict=True))


def _rows(dataset: Dataset) -> Iterator[dict[str, Any]]:
    for table in dataset.with_format("arrow").iter(BATCH_ROWS):
        yield from table.to_pylist()


def _by_source(values: Sequence[float | None], sources: Sequence[str]) -> dict[str, dict[str, float]]:
    there = [(v, s) for v, s in zip(values, sources, strict=True) if v is not None]
    return quantiles([v for v, _ in there], [s for _, s in there])
