"""What a model's targets depend on: the question, tokens further back, and whether an irrelevant sentence disturbs it.

    fall = mean over targets n of  log p(x_n | x_<n) - log p(x_n | x'_<n)              nats, larger is more dependent

``x'`` is the row with some inputs replaced, labels as they are. Three replacements are measured:

- ``question_share`` of the question's tokens, for all targets;
- one token of the row, ``places`` times; its targets are grouped by how many tokens stand between (the falls at small
  distances say how much a model copies from nearby, those at large ones how much it looks back);
- an irrelevant sentence before the last one of the question, which should change nothing. Where answers are judged, the
  share of right answers is given with and without it.

Base and tuned model, and every run, see the same replacements: they are a function of ``seed`` and of the row alone.
The replacing token is a random ordinary one, or a mask token, which a model trained with it knows and others do not.

Paper: "Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning of Language
Models", 2024, arXiv 2403.02178 (ACL 2024); irrelevant sentences as in GSM-IC, arXiv 2302.00093.

Example::

    transforms: [masked-thought]
    analysis: [masked-thought]
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Outputs, Table
from luthier.core.registry import analysis
from luthier.core.rng import stream
from luthier.functional.input_corruption import corrupt, distances
from luthier.functional.mask_tokens import mask_token_id
from luthier.functional.questions import numbers, with_question, with_sentence
from luthier.functional.statistics import ClusteredMean, score_mean

COLUMNS = ("run", "model", "quantity", "condition", "value", "n", "low", "high", "unit")
SENTENCES = (
    "A grey cat slept on the wall for 3 hours.",
    "The train to the coast has 9 carriages.",
    "Last year the library bought 12 new lamps.",
    "The baker's shoe size is 8.",
)
Models = Mapping[str, Any]


def ranges(ends: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of distances up to each end: [1, 2, 4] gives (1, 1), (2, 2), (3, 4)."""
    return [(low + 1, high) for low, high in pairwise([0, *ends])]


def question(batch: Batch) -> torch.Tensor:
    """Bool [B, T], tokens before the first target of their row that may be replaced."""
    assert batch.supervised_BT is not None
    assert batch.adjustable_BT is not None
    return batch.adjustable_BT & (batch.supervised_BT.long().cumsum(1) == 0)


class _Falls:
    """Means of falls by model and condition, clustered by row."""

    def __init__(self) -> None:
        self.means: dict[tuple[str, str, str], ClusteredMean] = {}

    def add(self, key: tuple[str, str, str], value_N: torch.Tensor, sequence_N: torch.Tensor, examples: int) -> None:
        """Add one value per target."""
        owner_N = sequence_N.numpy()
        sum_B = np.bincount(owner_N, value_N.numpy(), minlength=examples)
        self.means.setdefault(key, ClusteredMean()).add(sum_B, np.bincount(owner_N, minlength=examples))


@analysis(
    "masked-thought",
    example={"places": 1, "distances": [1, 4], "answers": False},
    tasks=("causal-lm",),
    paper="Masked Thought: Simply Masking Partial Reasoning Steps Can Improve Mathematical Reasoning Learning of "
    "Language Models, 2024, arXiv 2403.02178",
)
class Dependence:
    """What a model's targets depend on: the question, tokens further back; and what irrelevant sentences do to it."""

    def __init__(
        self,
        *,
        question_share: Annotated[float, Field(gt=0, le=1, description="share of the question that is replaced")] = 0.5,
        distances: Annotated[
            list[int] | None, Field(min_length=1, description="upper ends of the ranges of distances, in tokens")
        ] = None,
        places: Annotated[int, Field(ge=0, description="single tokens replaced in each row, one at a time")] = 4,
        corruption: Annotated[
            Literal["random", "mask"], Field(description="what replaces a token: a random one, or a mask token")
        ] = "random",
        mask_token: Annotated[
            str, Field(description="corruption: mask, the token: auto (mask token, else pad), pad, or an existing one")
        ] = "auto",
        sentences: Annotated[
            list[str] | None, Field(description="irrelevant sentences, one for each row; an empty list leaves them out")
        ] = None,
        answers: Annotated[bool, Field(description="let base and tuned model answer with and without them")] = True,
        rows: Annotated[int, Field(ge=1, description="test rows whose answers are judged")] = 100,
        confidence: Annotated[float, Field(gt=0, lt=1, description="of the intervals")] = 0.95,
        seed: Annotated[int, Field(ge=0, description="another draw of the replacements")] = 0,
    ) -> None:
        self.ends = [1, 2, 4, 8, 16, 32] if distances is None else list(distances)
        if self.ends[0] < 1 or any(b <= a for a, b in pairwise(self.ends)):
            raise UserError(f"masked-thought: distances: {self.ends} must increase strictly from 1, such as [1, 2, 4].")
        self.question_share, self.places, self.corruption = question_share, places, corruption
        self.mask_token, self.answers, self.rows = mask_token, answers, rows
        self.sentences = list(SENTENCES) if sentences is None else list(sentences)
        self.confidence, self.seed = confidence, seed
        self._allowed: torch.Tensor | None = None

    def run(self, runs: Iterable[Any], ctx: Any) -> Table:
        """One table over all runs.

        Args:
            runs: finished runs; each has a ``folder``, whose name stands in the table, and a ``model``.
            ctx: gives ``both(run)``, batches of held-out rows with the outputs of base and tuned model; ``base``, the
                base's session, and ``shop.session(model)``, that of another model, which evaluate further batches.
        """
        rows: list[tuple[Any, ...]] = []
        notes: list[str] = []
        for run in runs:
            models = {"base": ctx.base, "tuned": ctx.shop.session(run.model)}
            falls, left_out = self._falls(run, models, ctx)
            for (model, quantity, condition), mean in falls.means.items():
                if mean.clusters:
                    found = numbers(mean.estimate(self.confidence))
                    rows.append((run.folder.name, model, quantity, condition, *found, "nats"))
            if left_out:
                notes.append(
                    f"{run.folder.name}: {left_out} rows have no question, or other targets with a sentence in it, and "
                    "are left out of that measure"
                )
            if self.answers and self.sentences and ctx.data.test is not None:
                rows += [(run.folder.name, *row) for row in self._answers(models, ctx)]
        return Table(
            title="What the targets depend on",
            columns=COLUMNS,
            rows=tuple(rows),
            units={"value": "see unit", "n": "targets or answers"},
            notes=tuple(notes),
        )

    # -- log-probabilities

    @torch.no_grad()
    def _falls(self, run: Any, models: Models, ctx: Any) -> tuple[_Falls, int]:
        falls, left_out = _Falls(), 0
        for batch, *outputs in ctx.both(run):
            clean = {name: _logp(out) for name, out in zip(models, outputs, strict=True)}
            examples, owner_N = batch.examples, batch.sequence_N
            for name, logp_N in clean.items():
                falls.add((name, "log-probability", "clean"), logp_N, owner_N, examples)

            changed = self._replaced(batch, question(batch), self.question_share, "question", ctx)
            condition = f"{100 * self.question_share:g}% of the question"
            for name, session in models.items():
                fall_N = clean[name] - _logp(session.evaluate_batch(changed, ("logp",)))
                falls.add((name, "fall of log-probability", condition), fall_N, owner_N, examples)

            for number in range(self.places):
                place_B = self._places(batch, number)
                changed = self._replaced(batch, _only(batch, place_B), 1.0, f"place {number}", ctx)
                away_N = distances(batch.position_N, owner_N, place_B, batch.inputs["input_ids"].shape[1])
                for name, session in models.items():
                    fall_N = clean[name] - _logp(session.evaluate_batch(changed, ("logp",)))
                    for low, high in ranges(self.ends):
                        inside = (away_N >= low) & (away_N <= high)
                        condition = f"a token {low} back" if low == high else f"a token {low} to {high} back"
                        key = (name, "fall of log-probability", condition)
                        falls.add(key, fall_N[inside], owner_N[inside], examples)

            if self.sentences:
                left_out += self._sentence_falls(falls, batch, clean, models, ctx)
        return falls, left_out

    def _sentence_falls(self, falls: _Falls, batch: Batch, clean: Any, models: Models, ctx: Any) -> int:
        """Add the falls behind an inserted sentence; gives the number of rows that had to be left out."""
        made = {b: self._disturbed(ctx.data.test.prepared.canonical(i), i) for b, i in enumerate(batch.row_B.tolist())}
        kept = [b for b, row in made.items() if row is not None]
        if not kept:
            return batch.examples
        changed = ctx.base.render([made[b] for b in kept])
        owner_N, target_N = changed.sequence_N.cpu(), changed.target_N.cpu()
        same = [
            torch.equal(target_N[owner_N == at], batch.target_N[batch.sequence_N == b]) for at, b in enumerate(kept)
        ]
        for name, session in models.items():
            after_N = _logp(session.evaluate_batch(changed, ("logp",)))
            key = (name, "fall of log-probability", "an irrelevant sentence")
            for at, b in enumerate(kept):
                if same[at]:
                    fall_n = clean[name][batch.sequence_N == b] - after_N[owner_N == at]
                    falls.add(key, fall_n, torch.zeros(len(fall_n)).long(), 1)
        return batch.examples - sum(same)

    def _places(self, batch: Batch, number: int) -> torch.Tensor:
        """One token of each row [B], drawn from those before its last target that may be replaced."""
        assert batch.adjustable_BT is not None
        assert batch.supervised_BT is not None
        later_BT = batch.supervised_BT.flip(1).long().cumsum(1).flip(1) - batch.supervised_BT.long() > 0
        found = []
        for row, allowed_T in zip(batch.row_B.tolist(), batch.adjustable_BT & later_BT, strict=True):
            place_n = allowed_T.nonzero().squeeze(1)
            drawn = torch.randint(max(len(place_n), 1), (), generator=self._stream("place", number, row))
            found.append(int(place_n[drawn]) if len(place_n) else -1)
        return torch.tensor(found)

    def _replaced(self, batch: Batch, candidates_BT: torch.Tensor, share: float, what: str, ctx: Any) -> Batch:
        """The batch with a share of the candidates replaced, a function of seed and row alone."""
        ids_BT = batch.inputs["input_ids"]
        uniform_BT, other_BT = torch.ones(ids_BT.shape), ids_BT.clone()
        allowed = self._tokens(ctx.base.processor)
        for b, row in enumerate(batch.row_B.tolist()):
            place_n = candidates_BT[b].nonzero().squeeze(1)
            generator = self._stream(what, row)
            uniform_BT[b, place_n] = torch.rand(len(place_n), generator=generator)
            other_BT[b, place_n] = allowed[torch.randint(len(allowed), (len(place_n),), generator=generator)]
        return batch.with_inputs(input_ids=corrupt(ids_BT, candidates_BT, uniform_BT, share, other_BT)[0])

    def _tokens(self, processor: Any) -> torch.Tensor:
        """The ids that may stand for a token."""
        if self._allowed is None:
            if self.corruption == "mask":
                found = [mask_token_id(processor, self.mask_token)]
            else:
                special = set(processor.all_special_ids)
                found = [i for i in range(len(processor)) if i not in special]
            self._allowed = torch.tensor(found)
        return self._allowed

    # -- answers

    def _disturbed(self, row: Mapping[str, Any], number: int) -> dict[str, Any] | None:
        """The row with an irrelevant sentence in its question."""
        drawn = int(torch.randint(len(self.sentences), (), generator=self._stream("sentence", number)))
        return with_question(row, lambda text: with_sentence(text, self.sentences[drawn]) if text.strip() else None)

    def _answers(self, models: Models, ctx: Any) -> list[tuple[Any, ...]]:
        """The share of right answers with and without an irrelevant sentence."""
        prepared = ctx.data.test.prepared
        count = min(self.rows, len(prepared))
        spaced = np.unique(np.linspace(0, len(prepared) - 1, count).astype(np.int64)).tolist()
        made = [(prepared.canonical(i), self._disturbed(prepared.canonical(i), i)) for i in spaced]
        sides = {
            "clean": [row for row, other in made if other is not None],
            "an irrelevant sentence": [other for _, other in made if other is not None],
        }
        found = []
        for condition, rows in sides.items():
            for name, session in models.items():
                session.model.eval()
                texts = [one[0].text for one in session.generate(rows)] if rows else []
                scores = [s for s in ctx.shop.measure.verifier(sides["clean"], texts, None) if s is not None]
                if scores:
                    found.append(
                        (name, "right answers", condition, *numbers(score_mean(scores, self.confidence)), "share")
                    )
        return found

    def _stream(self, *keys: object) -> torch.Generator:
        return stream(self.seed, "noise", "masked-thought analysis", *keys)


def _only(batch: Batch, place_B: torch.Tensor) -> torch.Tensor:
    """Bool [B, T], true at one place of each row; at none where it is negative."""
    return torch.arange(batch.inputs["input_ids"].shape[1]) == place_B[:, None]


def _logp(out: Outputs) -> torch.Tensor:
    """Log-probabilities of the targets, [N] in float64 on the CPU, where batches are made."""
    return out.logp_N.double().cpu()
