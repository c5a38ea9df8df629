"""Self-calibrated and transductive fine-tuning of a classifier: two tricks around the training, each with its switch.

``self_calibrated`` (labels are noisy)::

    1  split the rows into k folds, equal texts together; train without each fold, predict it: q(x) out of fold
    2  T = the temperature that fits these predictions to the given labels;  q_T = softmax(logits / T)
    3  y~ = (1 - a) onehot(y) + a q_T(x),   a = a_max * max(0, q_T[argmax] - q_T[y])
       or drop: rows with q_T[y] < 0.1 go;  or down_weight: a row counts q_T[y]^0.5
    4  train from the base on y~
    5  after all training, T on the rows of data.select; the calibration error before and after is reported

``transductive`` (the INPUTS of data.test are learnt from, never its labels)::

    1  train teachers (on y~ if self_calibrated), predict the test inputs: p(x), the mean over the teachers
    2  keep max p >= threshold, of each class at most a share
    3  train from the base:  L = CE(labelled) + rho_r CE(pseudo-labelled),  target p(x), or its class
    4  again with what was trained as teacher; where data.select gets worse, stop and keep the model before

Both CE are means over their set: of N = N_l + N_p rows a labelled one counts N / N_l and a pseudo-labelled one
rho N / N_p, which rises from 0 (the objective's ``pseudo_ramp``). Every inner training uses the recipe's objective,
parameters and training section, and lies in ``stages/``. The objective must be the one of the same name, since it reads
targets and factors; with ``adversarial_weight: 0`` it adds nothing of its own.

Where labels are numbers (sequence-regression), y~ = (1 - a) y + a f(x) with a = a_max min(1, |f - y| / (3 sd)), sd that
of the out-of-fold errors, without T, drop and down_weight; and a test input is kept whose predictions by the teachers
(two or more) have a standard deviation of at most ``largest_deviation``; its target is their mean.

Labels of ``data.select`` are used to end rounds (of more than one) and for the last temperature, and for nothing else.

Paper: "Bag of Tricks for Effective Language Model Pretraining and Downstream Adaptation: A Case Study on GLUE", 2023,
arXiv 2302.09268. It has no code and names the tricks without their inner working: both are this library's design.

Example::

    objective: {glue-bag-of-tricks: {adversarial_weight: 0}}
    procedure: {glue-bag-of-tricks: {self_calibrated: true, transductive: true}}
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.protocols import Artefact
from luthier.core.registry import NUMBER_TASKS, procedure
from luthier.core.rng import derive_seed, numpy_stream
from luthier.core.store import write_json
from luthier.functional.calibration import expected_calibration_error
from luthier.functional.label_calibration import calibrated_numbers, calibrated_targets, disagreement, folds
from luthier.functional.pseudo_labels import PSEUDO, TARGET, WEIGHT, confident
from luthier.functional.rows import prepared_rows, replaced, with_columns
from luthier.functional.temperature import fit_temperature, log_softmax

SLUG = "glue-bag-of-tricks"
RECORD = "glue-bag-of-tricks.json"
Mode = Literal["soft_targets", "drop", "down_weight"]

# With mode drop: the least calibrated probability of its label that a row may have.
LEAST = 0.1


@dataclass(frozen=True)
class Labelled:
    """Labelled rows, and how each is learnt from.

    Attributes:
        rows: canonical rows.
        targets: class probabilities (or a number) in place of the label; None where the label stands as it is.
        weights: [N] the row's factor.
    """

    rows: Any
    targets: list[Any]
    weights: np.ndarray


@procedure(
    "glue-bag-of-tricks",
    identity={},
    example={"self_calibrated": True, "transductive": True, "folds": 2},
    tasks=("sequence-classification", "sequence-regression"),
    conflicts={"weighted_sum": "only the objective of the same name reads the targets and factors of its rows"},
    requires={
        "objective:glue-bag-of-tricks": "it reads the targets and factors of the rows (and no more than that with "
        "adversarial_weight: 0)"
    },
    paper="Bag of Tricks for Effective Language Model Pretraining and Downstream Adaptation: A Case Study on GLUE, "
    "2023, arXiv 2302.09268",
)
def glue_bag_of_tricks(
    ctx: Any,
    *,
    self_calibrated: Annotated[bool, Field(description="correct labels by what models say that have not seen them")] = (
        False
    ),
    folds: Annotated[int, Field(ge=2, description="k, parts of the training rows that are predicted in turn")] = 5,
    largest_share: Annotated[
        float, Field(ge=0, le=1, description="a_max, most that a prediction may count in a target")
    ] = 0.5,
    mode: Annotated[Mode, Field(description="what happens to rows whose label is doubted")] = "soft_targets",
    transductive: Annotated[
        bool, Field(description="learn from the inputs of data.test with predicted labels; the run says so")
    ] = False,
    threshold: Annotated[float, Field(ge=0, le=1, description="least probability of a pseudo-label")] = 0.9,
    largest_deviation: Annotated[
        float, Field(ge=0, description="regression: of the teachers' predictions, most that a pseudo-label may have")
    ] = 0.05,
    class_share: Annotated[
        float, Field(gt=0, le=1, description="of the predictions of a class at most this share, the most confident")
    ] = 1.0,
    targets: Annotated[
        Literal["soft", "hard"], Field(description="pseudo-labels are probabilities, or the likeliest class")
    ] = "soft",
    pseudo_weight: Annotated[
        float, Field(ge=0, description="rho, weight of the pseudo-labelled rows against the labelled ones; 0: none")
    ] = 0.5,
    rounds: Annotated[int, Field(ge=1, description="how often test inputs are labelled anew, 1 to 3")] = 1,
    teachers: Annotated[int, Field(ge=1, description="models whose mean prediction labels, one seed each")] = 1,
) -> Artefact:
    """Train a classifier on labels that its own folds have corrected, and on test inputs with predicted labels."""
    transductive = transductive and pseudo_weight > 0
    check(ctx, transductive, teachers)
    numbers = ctx.plan.task in NUMBER_TASKS
    record: dict[str, Any] = {}
    rows = prepared_rows(ctx.data.train)
    refuse_columns(rows)
    labelled = Labelled(rows, [None] * len(rows), np.ones(len(rows)))
    if self_calibrated and not (mode == "soft_targets" and largest_share == 0):
        if numbers and mode != "soft_targets":
            raise UserError(f"{SLUG}: mode: {mode} goes by the probability of the label, and labels here are numbers.")
        corrected = calibrate_numbers(ctx, rows, folds, largest_share) if numbers else None
        labelled, record["self_calibration"] = corrected or calibrate(ctx, rows, folds, largest_share, mode)
    if transductive:
        guess = (
            partial(guessed_numbers, largest_deviation=largest_deviation)
            if numbers
            else partial(guessed_classes, ctx.data.labels, threshold, class_share, targets == "soft")
        )
        made, record["transductive"] = rounds_of_pseudo_labels(ctx, labelled, guess, pseudo_weight, rounds, teachers)
    else:
        made = ctx.train(labelled_source(ctx, labelled))
    if self_calibrated and ctx.data.select is not None and not numbers:
        record["temperature"] = final_temperature(ctx, made.model)
    if ctx.processes.main:
        if record:
            write_json(ctx.folder / RECORD, record)
        if made.folder is not None and made.folder != ctx.folder:
            # What the run shows of its training is that of the model it leaves.
            for file in ("metrics.jsonl", "methods.json"):
                if (made.folder / file).is_file():
                    shutil.copyfile(made.folder / file, ctx.folder / file)
    return replace(made, folder=ctx.folder, metrics={**made.metrics, SLUG: record}, notes=(*made.notes, *notes(record)))


def check(ctx: Any, transductive: bool, teachers: int) -> None:
    """Refuse what cannot work before anything is trained.

    Raises:
        UserError: no test inputs, test labels that would decide when training stops, or one teacher of numbers.
    """
    if transductive and ctx.plan.task in NUMBER_TASKS and teachers < 2:
        raise UserError(f"{SLUG}: how sure a predicted number is tells the spread of several models: set teachers: 2.")
    if transductive and ctx.data.test is None:
        raise UserError(f"{SLUG} with transductive: true learns from the inputs of data.test; name some.", where="data")
    if transductive and ctx.data.select is None and ctx.plan.recipe.training.early_stopping is not None:
        raise UserError(
            f"early_stopping would look at the labels of data.test, whose inputs {SLUG} learns from. Name other rows "
            "under data.select, or remove it.",
            where="training.early_stopping",
        )


def refuse_columns(rows: Any) -> None:
    """Stop where a row has one of the columns that are written here.

    Raises:
        UserError: it has.
    """
    for row in rows:
        if taken := [c for c in (TARGET, WEIGHT, PSEUDO) if c in json.loads(row["extra"] or "{}")]:
            raise UserError(
                f"the row has a column '{taken[0]}' already, which the procedure {SLUG} writes. Rename it, or train "
                "with procedure: sft, and the objective alone reads it.",
                where=f"{row['source']}, row {row['row']}",
            )


# -- self-calibrated fine-tuning


def calibrate(ctx: Any, rows: Any, k: int, largest_share: float, mode: Mode) -> tuple[Labelled, dict[str, Any]]:
    """The rows with what out-of-fold predictions make of their labels, and what was found.

    Raises:
        UserError: fewer different texts than folds, or ``drop`` leaves nothing.
    """
    label_N = labels_of(ctx, rows)
    logits_NC = out_of_fold(ctx, rows, k)
    temperature = fit_temperature(logits_NC, label_N)
    q_NC = np.exp(log_softmax(logits_NC, temperature))
    own_N, share_N = q_NC[np.arange(len(rows)), label_N], disagreement(q_NC, label_N, largest_share)
    weights_N = np.ones(len(rows))
    targets: list[list[float] | None] = [None] * len(rows)
    kept_N = np.ones(len(rows), bool)
    if mode == "soft_targets":
        soft_NC = calibrated_targets(q_NC, label_N, largest_share)
        targets = [soft_NC[i].tolist() if share_N[i] > 0 else None for i in range(len(rows))]
    elif mode == "drop":
        kept_N = own_N >= LEAST
    else:
        weights_N = np.sqrt(own_N)
    if not kept_N.any():
        raise UserError(f"{SLUG}: mode drop leaves no row, every label has less than {LEAST}; use mode: soft_targets.")
    kept = np.flatnonzero(kept_N).tolist()
    found = {
        "rows": len(rows),
        "out_of_fold_temperature": temperature,
        "out_of_fold_agreement": float((q_NC.argmax(-1) == label_N).mean()),
        "doubted": int((share_N > 0).sum()),
        "dropped": len(rows) - len(kept),
        "mean_probability_of_label": float(own_N.mean()),
        "mean_share": float(share_N.mean()) if mode == "soft_targets" else 0.0,
    }
    return Labelled(rows.select(kept), [targets[i] for i in kept], weights_N[kept_N]), found


def calibrate_numbers(ctx: Any, rows: Any, k: int, largest_share: float) -> tuple[Labelled, dict[str, Any]]:
    """The same where labels are numbers: each is drawn to its prediction the more, the larger the error.

    Raises:
        UserError: fewer different texts than folds.
    """
    label_N = np.array([float(text) for text in rows["label"]])
    predicted_N = out_of_fold(ctx, rows, k)
    targets_N = calibrated_numbers(predicted_N, label_N, largest_share)
    found = {
        "rows": len(rows),
        "out_of_fold_error": float(np.square(predicted_N - label_N).mean()),
        "mean_correction": float(np.abs(targets_N - label_N).mean()),
    }
    return Labelled(rows, targets_N.tolist(), np.ones(len(rows))), found


def out_of_fold(ctx: Any, rows: Any, k: int) -> np.ndarray:
    """Predictions (logits [N, C] or numbers [N]) of each row by a model trained without all rows of its text."""
    try:
        fold_N = folds(rows["text"], k, numpy_stream(ctx.seed, "data", SLUG))
    except ValueError as error:
        raise UserError(f"{SLUG}: {error}. Lower `folds`, or add rows.", where="data.train") from error
    found: np.ndarray | None = None
    for number in range(k):
        inside, outside = np.flatnonzero(fold_N == number), np.flatnonzero(fold_N != number)
        made = ctx.train(ctx.source(rows.select(outside), f"without fold {number + 1}"), stage=f"fold-{number + 1}")
        held_out = ctx.source(rows.select(inside), f"fold {number + 1}")
        predicted = ctx.predict(held_out.prepared, made.model)
        found = np.empty((len(rows), *predicted.shape[1:])) if found is None else found
        found[inside] = predicted
    assert found is not None
    return found


def labels_of(ctx: Any, rows: Any) -> np.ndarray:
    """[N] the class number of each row's label."""
    number = {name: i for i, name in enumerate(ctx.data.labels)}
    return np.array([number[name] for name in rows["label"]])


def final_temperature(ctx: Any, model: Any) -> dict[str, float]:
    """The temperature that fits ``data.select``, and the expected calibration error there before and after."""
    prepared = ctx.data.select.prepared
    logits_NC, label_N = ctx.predict(prepared, model), np.asarray(prepared.fetch(range(len(prepared)))["label"])
    temperature = fit_temperature(logits_NC, label_N)

    def error(t: float) -> float:
        log_p = log_softmax(logits_NC, t)
        return expected_calibration_error(np.exp(log_p.max(-1)), log_p.argmax(-1) == label_N)

    return {"temperature": temperature, "ece_before": error(1.0), "ece_after": error(temperature)}


# -- transductive fine-tuning


@dataclass(frozen=True)
class Guess:
    """Pseudo-labels.

    Attributes:
        kept: numbers of the rows that have one.
        labels: the label of each kept row.
        targets: class probabilities in its place, or None.
        told: what is known about them, for the record.
    """

    kept: np.ndarray
    labels: list[str]
    targets: list[Any]
    told: dict[str, Any]


def guessed_classes(
    labels: Sequence[str], threshold: float, class_share: float, soft: bool, predicted_MNC: np.ndarray
) -> Guess:
    """The classes of which the mean prediction of M models is certain enough."""
    p_NC = np.exp([log_softmax(logits_NC) for logits_NC in predicted_MNC]).mean(0)
    kept = confident(p_NC, threshold, class_share)
    class_K = p_NC[kept].argmax(-1)
    told = {"classes": histogram(labels, class_K), "highest": float(p_NC.max())}
    return Guess(kept, [labels[c] for c in class_K], [p.tolist() if soft else None for p in p_NC[kept]], told)


def guessed_numbers(predicted_MN: np.ndarray, *, largest_deviation: float) -> Guess:
    """The mean predictions about which M models agree."""
    mean_N, deviation_N = predicted_MN.mean(0), predicted_MN.std(0)
    kept = np.flatnonzero(deviation_N <= largest_deviation)
    labels = [repr(float(number)) for number in mean_N[kept]]
    return Guess(kept, labels, [None] * len(kept), {"lowest_deviation": float(deviation_N.min())})


def rounds_of_pseudo_labels(
    ctx: Any, labelled: Labelled, guess: Callable[[np.ndarray], Guess], pseudo_weight: float, rounds: int, teachers: int
) -> tuple[Artefact, dict[str, Any]]:
    """The model after the last round that did not lower the score on ``data.select``, and what happened."""
    unlabelled = prepared_rows(ctx.data.test)
    source = labelled_source(ctx, labelled)
    seeds = [None, *(derive_seed(ctx.seed, "init", SLUG, i) for i in range(1, teachers))]
    models = [ctx.train(source, stage=f"teacher-{i + 1}", seed=seed) for i, seed in enumerate(seeds)]
    # One round needs no stopping, so that then no label of data.select decides anything.
    watched = rounds > 1 and ctx.data.select is not None
    made, score = models[0], goodness(ctx, models[0].model) if watched else None
    found: dict[str, Any] = {"inputs": len(unlabelled), "teacher_score": score, "rounds": [], "model": "teacher-1"}
    for number in range(1, rounds + 1):
        guessed = guess(np.stack([ctx.predict(ctx.data.test.prepared, m.model) for m in models]))
        found["rounds"].append({"kept": len(guessed.kept), **guessed.told})
        if len(guessed.kept) == 0:
            break
        source = ctx.source(both(labelled, unlabelled, guessed, pseudo_weight), f"round {number}")
        last = number == rounds
        models = [
            ctx.train(source, stage=None if last else f"round-{number}-{i + 1}", seed=seed)
            for i, seed in enumerate(seeds[:1] if last else seeds)
        ]
        if watched:
            before, score = score, goodness(ctx, models[0].model)
            found["rounds"][-1]["score"] = score
            if before is not None and score < before:
                break
        made, found["model"] = models[0], f"round {number}"
    return made, found


def both(labelled: Labelled, unlabelled: Any, guess: Guess, pseudo_weight: float) -> Any:
    """Labelled and pseudo-labelled rows, each set weighted so that its loss is a mean over it.

    Of a pseudo-labelled row only what the model reads is taken over: its further columns may tell the label.
    """
    from datasets import concatenate_datasets

    count = len(labelled.rows) + len(guess.kept)
    known = with_columns(
        labelled.rows,
        [
            {TARGET: target, WEIGHT: float(weight * count / len(labelled.rows))}
            for target, weight in zip(labelled.targets, labelled.weights, strict=True)
        ],
    )
    weight = pseudo_weight * count / len(guess.kept)
    extra = [{TARGET: target, WEIGHT: weight, PSEUDO: True} for target in guess.targets]
    rows = unlabelled.select(guess.kept.tolist())
    guessed = replaced(rows, label=guess.labels, extra=[json.dumps(e) for e in extra])
    return concatenate_datasets([known, guessed])


def goodness(ctx: Any, model: Any) -> float:
    """Share of the rows of ``data.select`` that the model gets right; of a regression minus the squared error."""
    prepared = ctx.data.select.prepared
    label_N = np.asarray(prepared.fetch(range(len(prepared)))["label"])
    if ctx.plan.task in NUMBER_TASKS:
        return -float(np.square(ctx.predict(prepared, model) - label_N).mean())
    return float((ctx.predict(prepared, model).argmax(-1) == label_N).mean())


# -- rows


def labelled_source(ctx: Any, labelled: Labelled) -> Any:
    """The labelled rows as a source: the recipe's own where nothing about them has changed."""
    changed = any(t is not None for t in labelled.targets) or bool((labelled.weights != 1).any())
    if not changed and len(labelled.rows) == len(ctx.data.train.prepared):
        return ctx.data.train
    extra = [
        {TARGET: target, WEIGHT: float(weight)}
        for target, weight in zip(labelled.targets, labelled.weights, strict=True)
    ]
    return ctx.source(with_columns(labelled.rows, extra), "calibrated")


def histogram(labels: Sequence[str], class_K: np.ndarray) -> dict[str, int]:
    """How often each class occurs."""
    return dict(zip(labels, np.bincount(class_K, minlength=len(labels)).tolist(), strict=True))


def notes(record: dict[str, Any]) -> tuple[str, ...]:
    """What whoever reads the run's numbers must know."""
    said = []
    if found := record.get("transductive"):
        last = found["rounds"][-1]
        classes = ", ".join(f"{name} {count}" for name, count in last.get("classes", {}).items())
        said.append(
            f"transductive: yes. The inputs of data.test (not its labels) were used to train: {last['kept']} of "
            f"{found['inputs']} had a pseudo-label in round {len(found['rounds'])}"
            + (f" ({classes})" if classes else "")
            + ". Numbers measured on it are not those of unseen inputs."
        )
        if last["kept"] == 0 and "lowest_deviation" in last:
            said.append(
                f"The teachers agreed on no prediction of round {len(found['rounds'])} (the smallest deviation was "
                f"{last['lowest_deviation']:.3g}), so the model is that of {found['model']}; raise `largest_deviation`."
            )
        elif last["kept"] == 0:
            said.append(
                f"No prediction of round {len(found['rounds'])} was certain enough (the highest was "
                f"{last['highest']:.2f}), so the model is that of {found['model']}; lower `threshold`."
            )
        elif found["model"] != f"round {len(found['rounds'])}":
            said.append(
                f"Round {len(found['rounds'])} lowered the score on data.select, so the model is that of "
                f"{found['model']}."
            )
    if found := record.get("temperature"):
        said.append(
            f"temperature: {found['temperature']:.3g}, fitted on data.select, where dividing the logits by it takes "
            f"the expected calibration error from {found['ece_before']:.3f} to {found['ece_after']:.3f}. The saved "
            "model's logits are not divided."
        )
    return tuple(said)
