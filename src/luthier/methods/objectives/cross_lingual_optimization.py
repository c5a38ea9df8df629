"""Cross-lingual optimization (CLO): answer in the language of the prompt, learnt from English pairs and a translator.

For an English pair (x_en, y_en) and its translation (x_l, y_l), with lp the summed log-probability of an answer's
tokens under the model and lp_ref that under the frozen starting model:

    D(x; a, b) = beta ([lp(a|x) - lp_ref(a|x)] - [lp(b|x) - lp_ref(b|x)])
    L_CL  = - mean log sigmoid D(x_en; y_en, y_l) - mean log sigmoid D(x_l; y_l, y_en)
    L_SFT = token mean of -log p over the tokens of y_l after x_l, and of nothing English
    L     = lambda L_SFT + (1 - lambda) L_CL

Both answers say the same, so the preference teaches which language belongs to which prompt; the likelihood of the
target answers teaches to write in it; English is held by the preference alone, because English likelihood brings the
English bias back (``nll_on: both`` is the paper's ablation). lambda is ``sft_weight``; at 1 the method is plain
fine-tuning on the target rows, at 0 two DPO losses. A direction of which a step has no row counts 0. All means are over
the whole optimiser step.

The data stage of the same name makes the rows: a target row (x_l, y_l) has y_en in the column ``other_answer`` and x_en
in ``english_prompt`` and stands for both directions. Rows without an English prompt stand for one direction, the
target's or, with ``prompt_language: english``, the English one. The row itself is the engine's forward pass; its other
sequences (three where it stands for both directions) go through the model together in a second one.

Several target languages at once are an experimental extension that the paper has not tried: rows tell theirs in the
column ``target_language`` (the data stage writes it). With ``mean_over: rows`` the formula above is over the rows of
all languages; with ``languages`` it is that of each language by itself, and the mean over the languages of the step.

The paper's values of lambda, beta and the learning rate are not known; those here are the library's. With
``length_normalise`` lp and lp_ref are divided by the number of tokens, for languages that a tokenizer cuts finely.

Paper: "Cross-Lingual Optimization for Language Transfer in Large Language Models", ACL 2025, arXiv 2505.14297. No
official code is known.

Example::

    data: {train: english.jsonl, stages: [cross-lingual-optimization: {translator: dictionary, dictionary: words.json}]}
    objective: {cross-lingual-optimization: {sft_weight: 0.5, beta: 0.1}}
    parameters: [attention]
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Batch, Context, Loss, Needs, Outputs
from luthier.core.registry import objective
from luthier.core.store import content_hash
from luthier.functional.cross_lingual import (
    ENGLISH,
    ENGLISH_PROMPT,
    OTHER_ANSWER,
    PROMPT_LANGUAGE,
    TARGET,
    TARGET_LANGUAGE,
    Preference,
    preferences,
    turn_of,
    with_turn,
)
from luthier.functional.discriminative import scores

SLUG = "cross-lingual-optimization"
ROW = ("kind", "prompt", "separator", "completion", "system", "messages", "tools", "source", "row")
SCANNED_ROWS = 1000
PROBE_ROWS = 64
# The base's perplexity per character of target text over that of English text, above which attention is too little.
FOREIGN = 3.0
# A direction and a target language; one language alone is not named.
Group = tuple[str, str]
TOKEN_WEIGHTS = "it weights the tokens of one answer, and the log-probabilities of whole answers are compared"


def margin(
    chosen_R: torch.Tensor,
    rejected_R: torch.Tensor,
    reference_chosen_R: torch.Tensor,
    reference_rejected_R: torch.Tensor,
    beta: float,
) -> torch.Tensor:
    """D of each preference row [R] from the log-probabilities of its two answers under model and reference."""
    return beta * ((chosen_R - reference_chosen_R) - (rejected_R - reference_rejected_R))


def preference_loss(margin_R: torch.Tensor) -> torch.Tensor:
    """-log sigmoid D of each preference row [R]."""
    return -torch.nn.functional.logsigmoid(margin_R)


@dataclass
class Direction:
    """The preference rows of one direction in a micro-batch, R of them.

    Attributes:
        margin_R: D.
        weight_R: weight of each row.
        nll: summed, weighted -log p of the chosen answers.
        tokens: the weight of their tokens.
    """

    margin_R: torch.Tensor
    weight_R: torch.Tensor
    nll: torch.Tensor
    tokens: torch.Tensor


@dataclass
class Opened:
    """The sequences of a micro-batch and what is compared with what.

    Attributes:
        made: those that are not its own, rendered.
        keys: their keys for cached reference scores.
        length_S: tokens to score of each sequence, the batch's own first.
        places: (direction, language) -> (chosen, rejected, example), each [R].
    """

    made: Batch
    keys: list[str]
    length_S: torch.Tensor
    places: dict[Group, tuple[torch.Tensor, ...]]


@objective(
    "cross-lingual-optimization",
    identity={"sft_weight": 1.0},
    # Prompt and answer of any pair can stand for the other language here.
    example={"other_answer": "prompt", "english_prompt": "completion"},
    conflicts={
        "packing": "a packed row holds several answers, and whole answers are compared",
        "transform:masked-thought": "it corrupts one answer of a preference and not the other",
        "transform:tl-training": TOKEN_WEIGHTS,
        "transform:fault-aware-ft": TOKEN_WEIGHTS,
    },
    tasks=("causal-lm",),
    paper="Cross-Lingual Optimization for Language Transfer in Large Language Models, ACL 2025, arXiv 2505.14297",
)
class CrossLingualOptimization:
    """Cross-lingual optimization: prefer the answer in the prompt's language, and learn target-language answers."""

    def __init__(
        self,
        *,
        sft_weight: Annotated[
            float,
            Field(ge=0, le=1, description="lambda: 1 is plain fine-tuning on target rows, 0 the preference alone"),
        ] = 0.5,
        beta: Annotated[float, Field(gt=0, description="scale of the log-probability ratios in the preference")] = 0.1,
        cl_reduction: Annotated[
            Literal["sum", "mean"], Field(description="sum of the two directions' means, or half of it")
        ] = "sum",
        cl_weight_en: Annotated[float, Field(ge=0, description="factor of the English direction")] = 1.0,
        cl_weight_tgt: Annotated[float, Field(ge=0, description="factor of the target direction")] = 1.0,
        nll_on: Annotated[
            Literal["target", "both", "none"], Field(description="whose chosen answers the likelihood term is over")
        ] = "target",
        mean_over: Annotated[
            Literal["rows", "languages"],
            Field(description="several target languages: means over the rows of all, or over each and then over them"),
        ] = "rows",
        length_normalise: Annotated[
            bool, Field(description="divide log-probabilities of answers by their number of tokens")
        ] = False,
        other_answer: Annotated[
            str, Field(min_length=1, description="column of the same answer in the other language")
        ] = OTHER_ANSWER,
        english_prompt: Annotated[
            str, Field(min_length=1, description="column of the English prompt of a target row")
        ] = ENGLISH_PROMPT,
    ) -> None:
        if sft_weight == 1.0 and nll_on == "none":
            raise UserError(
                "cross-lingual-optimization: with sft_weight: 1 and nll_on: none there is no loss; lower sft_weight."
            )
        self.sft_weight, self.beta, self.nll_on = sft_weight, beta, nll_on
        self.scale = 0.5 if cl_reduction == "mean" else 1.0
        self.factors = {ENGLISH: cl_weight_en, TARGET: cl_weight_tgt}
        self.mean_over, self.length_normalise = mean_over, length_normalise
        self.columns = {"language": PROMPT_LANGUAGE, "other": other_answer, "english_prompt": english_prompt}
        self._languages: tuple[str, ...] = ("",)
        self._measured: dict[str, float] = {}
        self._last: list[tuple[int, Batch, Opened]] = []

    @property
    def plain(self) -> bool:
        """Whether it is fine-tuning on the target rows and nothing else."""
        return self.sft_weight == 1.0 and self.nll_on == "target" and self.mean_over == "rows"

    @property
    def needs(self) -> Needs:
        """The row's text and that of the other language; the starting model for the preference."""
        if self.plain:
            return Needs(statistics=("logp",), positionwise=True, columns=(PROMPT_LANGUAGE,))
        return Needs(
            statistics=("logp",),
            models=("reference",) if self.sft_weight < 1 else (),
            columns=(*ROW, *self.columns.values(), TARGET_LANGUAGE),
        )

    # -- hooks of the engine

    def check_data(self, dataset: Any) -> None:
        """Look at all rows.

        Raises:
            UserError: a row has no answer in the other language, or is not one question with one answer.
        """
        if self.plain:
            return
        found = set()
        for start in range(0, len(dataset), SCANNED_ROWS):
            for number, row in _numbered(dataset, range(start, min(start + SCANNED_ROWS, len(dataset)))):
                self._preferences({"row": number + 1, **row})
                found.add(_language(row))
        # All processes count the same groups, whatever rows they have.
        self._languages = tuple(sorted(found))

    def prepare(self, ctx: Context, dataset: Any) -> None:
        """Measure how foreign the target language is to the base.

        Raises:
            UserError: as :meth:`check_data` does; a procedure may have made these rows since.
        """
        if self.plain:
            return
        self.check_data(dataset)
        index = range(0, len(dataset), max(1, len(dataset) // PROBE_ROWS))[:PROBE_ROWS]
        self._measure(ctx, [row for _, row in _numbered(dataset, index)])

    def record(self) -> dict[str, Any]:
        """What the base made of the two languages: perplexity per character of the chosen answers."""
        return {"perplexity_per_character": self._measured}

    # -- the loss

    def loss(self, out: Outputs, batch: Batch, ctx: Context) -> Loss:
        """The sum of both terms, each over its own count of the whole step; the weight is the position weights' sum.

        Raises:
            UserError: a transform changed inputs or token weights.
        """
        if self.plain:
            english_B = self._english(batch)
            weight_N = batch.weight_N
            if english_B is not None:
                weight_N = weight_N * ~english_B.to(weight_N.device)[batch.sequence_N]
            return Loss(sum=-(out.logp_N * weight_N).sum(), weight=weight_N.sum())
        found = self._directions(out, batch, ctx)
        total = ctx.totals["token"]
        likely = [name for name in (ENGLISH, TARGET) if self.nll_on in ("both", name)]
        # A micro-batch that only fills a place has a graph all the same.
        value = out.logp_N.sum() * 0.0
        metrics: dict[str, tuple[Any, Any]] = {}
        for (direction, language), part in found.items():
            loss_R, own = preference_loss(part.margin_R), part.weight_R.sum()
            rows = self._divisor(ctx.totals, "rows", [direction], language)
            tokens = self._divisor(ctx.totals, "tokens", likely, language)
            if rows > 0 and self.sft_weight < 1:
                factor = (1 - self.sft_weight) * self.scale * self.factors[direction] * total / rows
                value = value + factor * (loss_R * part.weight_R).sum()
            if tokens > 0 and direction in likely:
                value = value + self.sft_weight * total / tokens * part.nll
            name = _name(direction, language)
            with torch.no_grad():
                metrics[f"preference_{name}"] = ((loss_R * part.weight_R).sum(), own)
                metrics[f"margin_{name}"] = ((part.margin_R * part.weight_R).sum(), own)
                metrics[f"preferred_{name}"] = (((part.margin_R > 0) * part.weight_R).sum(), own)
                metrics[f"nll_chosen_{name}"] = (part.nll.detach(), part.tokens)
                metrics[f"tokens_{name}"] = (part.tokens, own)
        return Loss(sum=value, weight=batch.weight_N.sum(), metrics=metrics)

    # -- parts

    def counts(self, batch: Batch, ctx: Context) -> dict[str, float]:
        """Rows and tokens of the chosen answers of each direction."""
        if self.plain:
            return {}
        names = [_name(direction, language) for direction in (ENGLISH, TARGET) for language in self._languages]
        found = dict.fromkeys((f"{SLUG}/{what}_{name}" for what in ("rows", "tokens") for name in names), 0.0)
        opened, weight_B = self._opened(batch, ctx), _example_weights(batch)
        for group, (chosen, _, example) in opened.places.items():
            name = _name(*group)
            found[f"{SLUG}/rows_{name}"] = float(weight_B[example].sum())
            found[f"{SLUG}/tokens_{name}"] = float((opened.length_S[chosen] * weight_B[example]).sum())
        return found

    def _divisor(self, totals: dict[str, float], what: str, directions: Sequence[str], language: str) -> float:
        """What a group's sum over ``what`` is divided by, over the whole step."""
        sizes = {
            other: sum(totals[f"{SLUG}/{what}_{_name(direction, other)}"] for direction in directions)
            for other in self._languages
        }
        if self.mean_over == "rows":
            return sum(sizes.values())
        return sizes[language] * sum(size > 0 for size in sizes.values())

    def _directions(self, out: Outputs, batch: Batch, ctx: Context) -> dict[Group, Direction]:
        """Both directions of every language with what they compare; one without a row is left out."""
        opened = self._opened(batch, ctx)
        weight_B, made, length_S = _example_weights(batch), opened.made, opened.length_S

        def scored(logp_N: torch.Tensor, of: Batch) -> torch.Tensor:
            return scores(logp_N, of.sequence_N, of.examples, mean=self.length_normalise)[0]

        made_N = ctx.forward(made).logp_N
        # One list of sequences: the rows' own, then the others.
        lp = torch.cat([scored(out.logp_N, batch), scored(made_N, made)])
        reference = lp.detach()
        if self.sft_weight < 1:
            asked = (batch, replace(made, keys_B=opened.keys))
            started = [ctx.forward(of, "reference").logp_N for of in asked]
            reference = torch.cat([scored(logp_N, of) for logp_N, of in zip(started, asked, strict=True)])
        nll_S = -torch.cat(
            [scores(x, b.sequence_N, b.examples, mean=False)[0] for x, b in ((out.logp_N, batch), (made_N, made))]
        )
        found = {}
        for group, (chosen, rejected, example) in opened.places.items():
            weight_R = weight_B[example]
            found[group] = Direction(
                margin_R=margin(lp[chosen], lp[rejected], reference[chosen], reference[rejected], self.beta),
                weight_R=weight_R,
                nll=(nll_S[chosen] * weight_R).sum(),
                tokens=(length_S[chosen] * weight_R).sum(),
            )
        return found

    def _opened(self, batch: Batch, ctx: Context) -> Opened:
        """What a micro-batch compares; made once, for its counts and for its loss."""
        self._last = [held for held in self._last if held[0] == ctx.step]
        for _, held, opened in self._last:
            if held is batch:
                return opened
        if batch.keys_B is None:
            raise UserError(
                "cross-lingual-optimization: a transform changed the inputs of one answer of each preference and not "
                "of the other. Remove that transform."
            )
        rows = self._rows(batch)
        listed = [self._preferences(row) for row in rows]
        turns: list[dict[str, Any]] = []
        keys: list[str] = []
        # (chosen, rejected, example) of every preference, as places in the list of sequences.
        places: dict[Group, list[tuple[int, int, int]]] = {}
        for b, (row, key, some) in enumerate(zip(rows, batch.keys_B, listed, strict=True)):
            at = batch.examples + len(turns)
            own = [(some[0].prompt, some[0].rejected)]
            language = _language(row)
            places.setdefault((some[0].direction, language), []).append((b, at, b))
            for n, other in enumerate(some[1:]):
                own += [(other.prompt, other.chosen), (other.prompt, other.rejected)]
                places.setdefault((other.direction, language), []).append((at + 1 + 2 * n, at + 2 + 2 * n, b))
            turns += [with_turn(row, *turn) for turn in own]
            # A row's key stands for its tokens; with the texts it tells those of the sequence made from it.
            keys += [content_hash(SLUG, key, *turn) for turn in own]
        made = ctx.render(turns)
        length_S = torch.cat([torch.bincount(b.sequence_N, minlength=b.examples) for b in (batch, made)])
        if bool((length_S == 0).any()):
            raise UserError(
                "cross-lingual-optimization: an answer in the other language has no token left to score; raise "
                "data.max_length, or leave its row out."
            )
        device = length_S.device
        opened = Opened(
            made=made,
            keys=keys,
            length_S=length_S,
            places={group: tuple(torch.tensor(places[group], device=device).T) for group in sorted(places)},
        )
        self._last.append((ctx.step, batch, opened))
        return opened

    def _rows(self, batch: Batch) -> list[dict[str, Any]]:
        names = [name for name in (*ROW, *self.columns.values(), TARGET_LANGUAGE) if name in batch.columns]
        return [{name: batch.columns[name][b] for name in names} for b in range(batch.examples)]

    def _preferences(self, row: dict[str, Any]) -> list[Preference]:
        """The directions of a row.

        Raises:
            UserError: it has no answer in the other language, or a column holds something else.
        """
        where = f"{row.get('source') or 'data.train'}, row {row.get('row', '?')}"
        if turn_of(row) is None:
            raise UserError(
                "cross-lingual-optimization needs one question with one answer in each row; leave this one out.",
                where=where,
            )
        values = {part: row.get(column) for part, column in self.columns.items()}
        if not isinstance(values["other"], str) or not values["other"].strip():
            raise UserError(
                "no answer in the other language: put the data stage 'cross-lingual-optimization' into data.stages, "
                f"or give the rows a column '{self.columns['other']}' with its text.",
                where=where,
            )
        if values["language"] not in (None, ENGLISH, TARGET):
            raise UserError(f"the column '{PROMPT_LANGUAGE}' must be english, target or empty.", where=where)
        if not isinstance(_language(row), str):
            raise UserError(f"the column '{TARGET_LANGUAGE}' must be a text, such as a code, or empty.", where=where)
        prompt = values["english_prompt"]
        if prompt is not None and (not isinstance(prompt, str) or values["language"] == ENGLISH):
            column = self.columns["english_prompt"]
            raise UserError(f"the column '{column}' must be a text, and only a target row may have it.", where=where)
        return preferences(row, values["language"], values["other"], prompt)

    def _english(self, batch: Batch) -> torch.Tensor | None:
        """Which rows are English ones [B]; None where no row says so."""
        languages = batch.columns.get(PROMPT_LANGUAGE)
        if languages is None or ENGLISH not in languages:
            return None
        return torch.tensor([language == ENGLISH for language in languages])

    @torch.no_grad()
    def _measure(self, ctx: Context, probe: list[dict[str, Any]]) -> None:
        """Perplexity per character of chosen answers under the base, by language; not with sharded weights."""
        if any(hasattr(p, "full_tensor") for p in ctx.model.parameters()):
            return
        was_training = ctx.model.training
        ctx.model.eval()
        sums: dict[str, list[float]] = {}
        try:
            for row in probe:
                some = self._preferences(row)
                batch = ctx.render([with_turn(row, p.prompt, p.chosen) for p in some])
                nll = -scores(ctx.forward(batch, grad=False).logp_N, batch.sequence_N, len(some), mean=False)[0]
                for p, value in zip(some, nll.tolist(), strict=True):
                    name = ENGLISH if p.direction == ENGLISH else _name(TARGET, _language(row))
                    slot = sums.setdefault(name, [0.0, 0.0])
                    slot[0] += value
                    slot[1] += len(p.chosen)
        finally:
            ctx.model.train(was_training)
        self._measured = {name: math.exp(min(nll / size, 700.0)) for name, (nll, size) in sums.items()}
        english = self._measured.get(ENGLISH)
        target = max((value for name, value in self._measured.items() if name != ENGLISH), default=0.0)
        if english is None or all(p.requires_grad for p in ctx.model.parameters()):
            return
        if target > FOREIGN * english:
            warnings.warn(
                f"cross-lingual-optimization: the base's perplexity per character is {target:.1f} on target answers "
                f"and {english:.1f} on English ones. It hardly knows the language, so training a part of the model "
                "will teach it little: use parameters: [full].",
                stacklevel=3,
            )


def _language(row: Mapping[str, Any]) -> Any:
    """The target language that the row tells; empty where it tells none."""
    told = row.get(TARGET_LANGUAGE)
    return "" if told is None else told


def _name(direction: str, language: str) -> str:
    """A direction in the names of counts and metrics."""
    return f"{direction}_{language}" if language else direction


def _numbered(dataset: Any, index: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Prepared rows with their numbers."""
    fetched = dataset.fetch(index)
    for b, number in enumerate(index):
        yield number, {name: values[b] for name, values in fetched.items()}


def _example_weights(batch: Batch) -> torch.Tensor:
    """The weight of each example [B].

    Raises:
        UserError: positions of one example have different weights.
    """
    low_B = batch.weight_N.new_full((batch.examples,), torch.inf)
    low_B = low_B.scatter_reduce(0, batch.sequence_N, batch.weight_N, "amin")
    high_B = torch.zeros_like(low_B).scatter_reduce(0, batch.sequence_N, batch.weight_N, "amax")
    if not torch.equal(low_B, high_B):
        raise UserError(
            "cross-lingual-optimization: a transform weights the tokens of an answer, and the log-probabilities of "
            "whole answers are compared. Remove that transform."
        )
    return high_B
