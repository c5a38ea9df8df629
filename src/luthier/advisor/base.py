"""What the base makes of the rows, before any training: probabilities, contradictions, and its own answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from luthier.advisor.findings import Finding, counted, estimated, unmeasured
from luthier.advisor.rows import share
from luthier.core.registry import TOKEN_TASKS
from luthier.functional.confident_learning import confident_disagreement, contradicted, cross_validated
from luthier.functional.continuum import diagnose
from luthier.functional.statistics import ClusteredMean, score_mean
from luthier.runs.measure import Verifier, wants_generation

STATISTICS = ("logp", "entropy", "top1", "top1_logp")
# Rows whose answers may be longer have many right wordings: contradiction then says nothing about the label.
SHORT_ANSWER = 64
CONFIDENCE = 0.8
FOLDS = 5
ZONES = {
    "strong": "The base is strong here: losses that trust its own beliefs can win, and a lower learning rate fits.",
    "weak": "The base is weak here: plain likelihood teaches most, and losses that trust the base learn slowly.",
    "intermediate": "Between strong and weak no loss is predicted to win: compare.",
}


@dataclass(frozen=True)
class Scores:
    """Per supervised position of a sample of rows: what the base predicts, flat over N; ``row_N`` counts from 0."""

    logp_N: np.ndarray
    entropy_N: np.ndarray
    top1_N: np.ndarray
    top1_logp_N: np.ndarray
    target_N: np.ndarray
    row_N: np.ndarray


def sample(rows: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """Row numbers drawn without replacement, in order."""
    return np.sort(rng.choice(rows, size=min(rows, wanted), replace=False))


def score(session: Any, prepared: Any, index_R: np.ndarray, batch_rows: int) -> Scores:
    """Score some prepared rows, those of similar length together."""
    by_length = index_R[np.argsort(prepared.lengths[index_R], kind="stable")]
    place = {int(row): i for i, row in enumerate(index_R)}
    parts: list[tuple[np.ndarray, ...]] = []
    session.model.eval()
    for start in range(0, len(by_length), batch_rows):
        index_B = by_length[start : start + batch_rows]
        batch = session.to_device(session.task.collate(prepared.fetch(index_B), index_B))
        out = session.evaluate_batch(batch, STATISTICS)
        row_B = np.array([place[int(i)] for i in index_B])
        found = (out.logp_N, out.entropy_N, out.top1_N, out.top1_logp_N, batch.target_N, batch.sequence_N)
        *values, sequence_N = [t.detach().cpu().numpy() for t in found]
        parts.append((*values, row_B[sequence_N]))
    flat = [np.concatenate(column) for column in zip(*parts, strict=True)]
    order = np.argsort(flat[-1], kind="stable")
    return Scores(*(column[order] for column in flat))


def features(session: Any, prepared: Any, index_R: np.ndarray, batch_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean of the base's last hidden states [R, H], labels [R]) of some rows of a classification task."""
    found, labels = [], []
    session.model.eval()
    for start in range(0, len(index_R), batch_rows):
        index_B = index_R[start : start + batch_rows]
        batch = session.to_device(session.task.collate(prepared.fetch(index_B), index_B))
        with torch.no_grad(), session.autocast():
            encoded = session.task.encode(session.model, batch, hidden=True)
        found.append(encoded.layers(-1).float().cpu().numpy())
        labels.append(batch.target_N.cpu().numpy())
    return np.concatenate(found), np.concatenate(labels)


def probabilities(scores: Scores) -> list[Finding]:
    """Mean probability of the targets (the zone of the capability continuum) and entropy of the predictions."""
    found = diagnose(scores.logp_N, scores.row_N)
    rows = int(scores.row_N[-1]) + 1
    low = max(0.0, found.mean_p - 1.96 * found.standard_error)
    high = min(1.0, found.mean_p + 1.96 * found.standard_error)
    sentence = (
        f"The base gives the targets a mean probability of {found.mean_p:.3f} ({low:.3f} to {high:.3f}; {found.n:,} "
        f"tokens of {rows:,} rows): {found.position}."
    )
    entropy = ClusteredMean()
    counts_R = np.bincount(scores.row_N)
    entropy.add(np.bincount(scores.row_N, weights=scores.entropy_N), counts_R)
    uncertain = entropy.estimate()
    return [
        Finding("mean_probability", found.mean_p, found.n, low, high, "probability", sentence, ZONES[found.position]),
        estimated(
            "entropy",
            uncertain,
            "nats",
            f"Its predictions there have a mean entropy of {uncertain.value:.3f} nats.",
            "Low entropy beside a low probability of the targets means that the base is sure of something else.",
        ),
    ]


def noise_in_text(scores: Scores) -> list[Finding]:
    """Contradicted rows of a task of tokens, and rows on which base and label agree throughout."""
    counts_R = np.bincount(scores.row_N)
    if np.median(counts_R) > SHORT_ANSWER:
        why = f"half of the answers have more than {SHORT_ANSWER} tokens, and such answers have many right wordings."
        return [unmeasured("label_noise", why), unmeasured("agreement", why)]
    agreed_R, against_R = contradicted(
        scores.top1_N, scores.top1_logp_N, scores.target_N, scores.row_N, confidence=CONFIDENCE
    )
    rows, against, agreed = len(agreed_R), int(against_R.sum()), int(agreed_R.sum())
    return [
        share(
            "label_noise",
            against,
            rows,
            f"The base contradicts {against:,} of {rows:,} answers ({against / rows:.1%}) with a probability of "
            f"{CONFIDENCE} or more for another token.",
            "Where the base is good elsewhere these are suspects for wrong labels; where it is not, its own errors.",
        ),
        share(
            "agreement",
            agreed,
            rows,
            f"It would write {agreed:,} of {rows:,} answers ({agreed / rows:.1%}) token by token itself.",
            "What it would write itself teaches little, and its own words may stand for the label.",
        ),
    ]


def noise_in_labels(feature_RH: np.ndarray, label_R: np.ndarray, classes: int, seed: int) -> list[Finding]:
    """Contradicted labels of a classification task by a cross-validated probe on the base's features."""
    if len(label_R) < 10 * classes or len(label_R) < 2 * FOLDS:
        why = f"{len(label_R):,} rows are too few to probe {classes} classes."
        return [unmeasured("label_noise", why), unmeasured("agreement", why)]
    p_RC = cross_validated(feature_RH, label_R, classes, folds=FOLDS, seed=seed)
    against_R = confident_disagreement(p_RC, label_R)
    agreed_R = p_RC.argmax(axis=1) == label_R
    rows, against, agreed = len(label_R), int(against_R.sum()), int(agreed_R.sum())
    return [
        share(
            "label_noise",
            against,
            rows,
            f"A probe on the base's features contradicts {against:,} of {rows:,} labels ({against / rows:.1%}) with "
            "confidence.",
            "Where the probe is good elsewhere these are suspects for wrong labels; where it is not, its own errors.",
        ),
        share(
            "agreement",
            agreed,
            rows,
            f"The probe gives {agreed:,} of {rows:,} rows ({agreed / rows:.1%}) their label, each unseen.",
            "The classes are already there to be read off the base's features."
            if agreed > 0.8 * rows
            else "The base's features do not separate the classes by themselves.",
        ),
    ]


def own_answers(name: str, shop: Any, session: Any, source: Any, index_R: np.ndarray, whose: str) -> Finding:
    """The share of the base's own greedy answers that the verifier finds right."""
    plan = shop.plan
    if plan.task != "causal-lm":
        return unmeasured(name, f"a {plan.task} model writes no answers.")
    verifier = Verifier(plan.verifier)
    if not wants_generation(plan, source, verifier.choice):
        return unmeasured(name, "there is no verifier for these answers (data.verifier), and they are not short.")
    rows = [source.prepared.canonical(int(i)) for i in index_R]
    rows = [row for row in rows if row["kind"] in ("pair", "chat")]
    if not rows:
        return unmeasured(name, "plain text asks nothing.")
    session.model.eval()
    completions = shop.decoder.generate(session.model, [shop.data.renderer.prompt_ids(r) for r in rows], session)
    found = verifier(rows, [c.text for c in completions], session)
    judged = [s for s in found if s is not None]
    if not judged:
        return unmeasured(name, "the verifier could judge none of the answers.")
    estimate = score_mean(judged)
    return estimated(
        name,
        estimate,
        "share of answers",
        f"The base answers {estimate.value:.1%} of {len(judged):,} {whose} questions right by itself.",
        _rehearsal(estimate.value) if name == "right_answers" else _room(estimate.value),
    )


def _rehearsal(value: float) -> str:
    if value < 0.05:
        return "It cannot rehearse itself: there are hardly any right answers of its own to train on."
    return "Its own right answers can stand for the given ones where it has them, which costs less forgetting."


def _room(value: float) -> str:
    return "Little is left to gain by training." if value >= 0.9 else "There is something to gain."


def answer_length(scores: Scores) -> Finding:
    """The median number of supervised tokens of a row."""
    tokens_R = np.bincount(scores.row_N)
    middle = float(np.median(tokens_R))
    return counted(
        "answer_tokens",
        middle,
        len(tokens_R),
        "tokens",
        f"The median answer has {middle:g} tokens (of {len(tokens_R):,} rows).",
        "Long answers, such as worked solutions, can be corrupted in training to learn more from each."
        if middle >= 40
        else "Short answers can be compared as a whole.",
    )


def has_trained_head(loaded: Any) -> bool:
    """Whether the base's own outputs mean something for these labels: those of a head drawn at random do not."""
    return loaded.task in TOKEN_TASKS or not any(note.startswith(f"a new {loaded.task} head") for note in loaded.notes)
