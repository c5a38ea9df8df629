"""How sure a model is that a GIVEN answer is right, from answers of its own and from asking it (BSDetector).

    o_j = alpha * s_j + (1 - alpha) * r_j          O = mean_j o_j        observed consistency
    c   = beta * O + (1 - beta) * S                                      confidence

The given answer is held fixed; y_1 .. y_k are the model's own. s_j is the similarity of the given answer and y_j in
[0, 1], r_j whether they are equal after normalisation, S in [0, 1] what the model says of the given answer when asked.

Source: "Quantifying Uncertainty in Answers from any Language Model and Enhancing their Trustworthiness", 2023, arXiv
2308.16175. There s comes from the contradiction probability of a language-inference model; here from what similarity is
named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from luthier.core.errors import UserError
from luthier.functional.answers import chosen_label, final_number, parse_json
from luthier.functional.discriminative import given_answer, place, with_answer
from luthier.functional.score_table import blocks
from luthier.functional.target_rewriting import asked, filled, question_of

Similarity = Literal["jaccard", "json", "numeric", "positions", "exact"]
Reflection = Literal["options", "ask"]
BLOCK = 256
OPTIONS = {"A": 1.0, "B": 0.0, "C": 0.5}
QUESTION = (
    "Question: {question}\nProposed answer: {answer}\nIs the proposed answer: (A) Correct (B) Incorrect (C) I am not "
    "sure. The answer is: "
)
AGAIN = (
    "{before}\nAre you really sure that the proposed answer is right? Choose again: (A) Correct (B) Incorrect (C) I am "
    "not sure. The answer is: "
)


def words(text: str) -> list[str]:
    """The words of a text without case; punctuation stays, for it may be a decimal point."""
    return text.casefold().split()


def same(a: str, b: str) -> bool:
    """Whether two answers are equal but for case and blanks; JSON is compared as its value."""
    if a.strip()[:1] in ("{", "["):
        try:
            return bool(parse_json(a) == parse_json(b))
        except ValueError:
            return False
    return words(a) == words(b)


def jaccard(a: str, b: str) -> float:
    """Shared words over all words, as multisets; 1 where neither has any."""
    one, other = Counter(words(a)), Counter(words(b))
    union = sum((one | other).values())
    return sum((one & other).values()) / union if union else 1.0


def json_fields(a: str, b: str) -> float:
    """Mean over the fields of either object of the words their values share; 0 where one is no JSON."""
    try:
        one, other = parse_json(a), parse_json(b)
    except ValueError:
        return 0.0
    if not isinstance(one, dict) or not isinstance(other, dict):
        return float(one == other)
    fields = [*one, *(f for f in other if f not in one)]
    if not fields:
        return 1.0
    shared = [jaccard(str(one[f]), str(other[f])) if f in one and f in other else 0.0 for f in fields]
    return sum(shared) / len(fields)


def positions(a: str, b: str) -> float:
    """Share of the longer text's characters at which both are equal, white space around them aside."""
    a, b = a.strip(), b.strip()
    longest = max(len(a), len(b))
    return sum(x == y for x, y in zip(a, b, strict=False)) / longest if longest else 1.0


def numeric(a: str, b: str) -> float:
    """1 where both give the same final number."""
    one, other = final_number(a), final_number(b)
    return float(one is not None and one == other)


SIMILARITIES: dict[str, Callable[[str, str], float]] = {
    "jaccard": jaccard,
    "json": json_fields,
    "numeric": numeric,
    "positions": positions,
    "exact": lambda a, b: float(same(a, b)),
}


def consistency(similar_K: np.ndarray, equal_K: np.ndarray, alpha: float) -> float:
    """O, the mean over the samples of alpha s + (1 - alpha) r."""
    return float(np.mean(alpha * similar_K + (1 - alpha) * equal_K))


def observed(given: str, samples: Sequence[str], similarity: Similarity, alpha: float) -> float:
    """O of a given answer beside the model's own."""
    like = SIMILARITIES[similarity]
    similar_K = np.array([like(given, text) for text in samples])
    return consistency(similar_K, np.array([float(same(given, text)) for text in samples]), alpha)


def agreement(samples: Sequence[str], similarity: Similarity) -> float:
    """Mean similarity of the samples with each other: what the model itself is sure of."""
    pairs = [(a, b) for i, a in enumerate(samples) for b in samples[i + 1 :]]
    return float(np.mean([SIMILARITIES[similarity](a, b) for a, b in pairs])) if pairs else 1.0


def combined(observed_N: np.ndarray, reflected_N: np.ndarray | None, beta: float) -> np.ndarray:
    """C [N]; without reflection it is O."""
    return observed_N if reflected_N is None else beta * observed_N + (1 - beta) * reflected_N


def threshold_of(confidence_N: np.ndarray, least: float | None, fraction: float | None) -> float:
    """gamma: the number given, that which keeps a share of the rows, or the median."""
    if least is not None:
        return least
    if fraction is None:
        return float(np.median(confidence_N))
    kept = max(1, int(np.ceil(fraction * len(confidence_N))))
    return float(np.sort(confidence_N)[::-1][kept - 1])


# -- asking the model


@dataclass(frozen=True)
class Confidence:
    """How the confidence of given answers is measured.

    Attributes:
        k: answers of the model to each prompt.
        similarity: of two answers.
        alpha: share of similarity against equality.
        beta: share of consistency against what the model says; 1 does not ask it.
        reflection: how it is asked.
        sampling: options of the decoder that samples.
        batch_rows: prompts completed together.
    """

    k: int
    similarity: Similarity
    alpha: float
    beta: float
    reflection: Reflection
    sampling: dict[str, Any]
    batch_rows: int

    def samples(self, ctx: Any, rows: Sequence[dict[str, Any]]) -> list[list[str]]:
        """The model's own answers to each row's prompt; kept on disk, so that asking again costs nothing."""
        written = ctx.generate(rows, samples=self.k, decoding="sample", batch_rows=self.batch_rows, **self.sampling)
        return [[c.text for c in some] for some in written]

    def observed(self, given: Sequence[str], written: Sequence[Sequence[str]]) -> np.ndarray:
        """O [N] of given answers beside the model's own."""
        pairs = zip(given, written, strict=True)
        return np.array([observed(g, w, self.similarity, self.alpha) for g, w in pairs], np.float64)

    def measure(self, ctx: Any, dataset: Any) -> dict[str, np.ndarray]:
        """Every number of every row, [N] each, block by block.

        Raises:
            UserError: a row has no response.
        """
        found: dict[str, list[np.ndarray]] = {}
        for _, rows in blocks(dataset, BLOCK):
            check_answerable(rows)
            for name, values in self.block(ctx, rows).items():
                found.setdefault(name, []).append(values)
        return {name: np.concatenate(values) for name, values in found.items()}

    def block(self, ctx: Any, rows: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
        """The numbers of some rows."""
        written, given = self.samples(ctx, rows), [given_answer(row) for row in rows]
        observed_N, reflected_N = self.observed(given, written), None
        unread_N = nothing_N = np.full(len(rows), np.nan)
        if self.beta < 1:
            reflected_N, unread = reflected(ctx, rows, self.reflection, self.batch_rows)
            unread_N = np.full(len(rows), unread / (len(rows) * (2 if self.reflection == "ask" else 1)))
        total_N, count_N = ctx.row_likelihood(rows, last=True)
        return {
            "confidence": combined(observed_N, reflected_N, self.beta),
            "consistency": observed_N,
            "reflection": nothing_N if reflected_N is None else reflected_N,
            "unread": unread_N,
            "agreement": np.array([agreement(w, self.similarity) for w in written]),
            "logp": np.divide(total_N, count_N, out=nothing_N.copy(), where=count_N > 0),
            "characters": np.array([len(g) for g in given], np.float64),
        }


def warnings(measured: Mapping[str, np.ndarray]) -> list[str]:
    """What whoever reads the confidences must know."""
    said = []
    if (measured["consistency"] < 0.1).mean() > 0.5:
        said.append(
            "most given answers have a consistency below 0.1, so the base cannot judge these rows; its samples agree "
            f"with each other by {measured['agreement'].mean():.2f}"
        )
    unread_N = measured["unread"][np.isfinite(measured["unread"])]
    if len(unread_N) and unread_N.mean() > 0.3:
        said.append(f"{unread_N.mean():.0%} of what the base says of answers could not be read; set beta: 1")
    return said


def reflected(ctx: Any, rows: Sequence[dict[str, Any]], how: Reflection, batch_rows: int) -> tuple[np.ndarray, int]:
    """S [N] of the given answers, and how many replies could not be read.

    ``options`` takes the likelihood of the three choices, ``ask`` lets the model write, twice; an unreadable reply
    counts 0.5.
    """
    first = [filled(QUESTION, question=question_of(r), answer=given_answer(r).strip()) for r in rows]
    questions = [asked(r, text) for r, text in zip(rows, first, strict=True)]
    if how == "options":
        shown = [with_answer(q, letter) for q in questions for letter in OPTIONS]
        total, count = ctx.row_likelihood(shown, ends=False, last=True)
        logp_NC = np.where(count > 0, total, -np.inf).reshape(-1, len(OPTIONS))
        return expected_choice(logp_NC), int((~np.isfinite(logp_NC).all(-1)).sum())
    options = {"decoding": "greedy", "max_new_tokens": 8, "batch_rows": batch_rows}
    one = [some[0].text for some in ctx.generate(questions, **options)]
    before = [text + reply.strip() for text, reply in zip(first, one, strict=True)]
    again = [asked(r, filled(AGAIN, before=text)) for r, text in zip(rows, before, strict=True)]
    two = [some[0].text for some in ctx.generate(again, **options)]
    read = [[chosen_label(text, list(OPTIONS)) for text in pair] for pair in zip(one, two, strict=True)]
    scores = np.array([[0.5 if label is None else OPTIONS[label] for label in pair] for pair in read])
    return scores.mean(-1), sum(label is None for pair in read for label in pair)


def expected_choice(logp_NC: np.ndarray) -> np.ndarray:
    """Softmax over the choices A, B, C dotted with (1, 0, 0.5), [N]; 0.5 where a choice has no number."""
    good_N = np.isfinite(logp_NC).all(-1)
    safe_NC = np.where(good_N[:, None], logp_NC, 0.0)
    p_NC = np.exp(safe_NC - safe_NC.max(-1, keepdims=True))
    p_NC /= p_NC.sum(-1, keepdims=True)
    return np.where(good_N, p_NC @ np.array(list(OPTIONS.values())), 0.5)


# -- preferring one of two answers


def decided(kept: bool, verdict: str, confidence: float, least: float) -> str:
    """What becomes of a row: ``corrected``, ``kept`` or ``dropped``.

    Args:
        kept: whether its own answer passed the filter.
        verdict: ``candidate``, ``given`` or ``tie``.
        confidence: c_J of the verdict.
        least: eta; only above it an answer is replaced.
    """
    if verdict == "candidate" and confidence > least:
        return "corrected"
    return "kept" if kept else "dropped"


def by_consistency(given: float, candidate: float) -> tuple[str, float]:
    """The verdict between two answers, and its confidence, from how consistent the same samples find each."""
    verdict = "candidate" if candidate > given else "given" if given > candidate else "tie"
    return verdict, 0.5 + (candidate - given) / 2


def check_answerable(rows: Sequence[dict[str, Any]]) -> None:
    """Refuse rows without an answer.

    Raises:
        UserError: a row has none, or an empty one.
    """
    for row in rows:
        if not given_answer(row).strip():
            raise UserError("the row has no response to judge; remove it.", where=place(row))


def histogram(confidence_N: np.ndarray) -> list[int]:
    """Rows by confidence, in ten equal bins of [0, 1]."""
    return np.histogram(confidence_N, bins=10, range=(0.0, 1.0))[0].tolist()
