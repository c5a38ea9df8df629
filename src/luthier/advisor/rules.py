"""The rules: what was found -> what to try, why, and who says so. This table is the whole of the advisor's opinion.

A rule proposes entries in the grammar of ``luthier compare``; ``{low_rate}``, ``{high_rate}`` and ``{large_batch}``
stand for values of the recipe at hand. A rule without entries is a remark: what to mend before training, or a reason
not to train at all. Entries whose methods this installation does not have, or that are not defined for the task, are
left out and named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from luthier.advisor.findings import Findings
from luthier.core import registry
from luthier.functional.continuum import STRONG_FROM, WEAK_UP_TO

Kind = Literal["try", "mend", "do not fine-tune"]


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        name: for reports.
        when: the condition over the findings.
        entries: what to try, the most promising first.
        why: one sentence.
        source: the paper, or whose judgement it is.
        kind: ``try``, or a remark: ``mend`` the data, or ``do not fine-tune``.
    """

    name: str
    when: Callable[[Findings], bool]
    entries: tuple[str, ...]
    why: str
    source: str
    kind: Kind = "try"


def _strong(f: Findings) -> bool:
    # Wrong labels lower the mean probability of the targets; what the base itself gets right on the test rows does not.
    return f.above("mean_probability", STRONG_FROM) or f.above("right_test_answers", STRONG_FROM)


def _weak(f: Findings) -> bool:
    return f.below("mean_probability", WEAK_UP_TO) and not f.above("right_test_answers", WEAK_UP_TO)


def _noisy(f: Findings) -> bool:
    # Contradiction by a base that agrees with most rows; that of a weak one only shows its own errors.
    if f.above("agreement", 0.5) and f.above("label_noise", 0.05, surely=True):
        return True
    # Rows that contradict each other, unless the base contradicts none: then several answers are right.
    return f.above("contradictions", 0.02) and not f.below("label_noise", 0.01)


CONTINUUM = "Beyond Log Likelihood, 2025, arXiv 2510.00526"
RULES: tuple[Rule, ...] = (
    Rule(
        "already right",
        lambda f: f.above("right_test_answers", 0.9) and f.above("right_test_answers", 0.8, surely=True),
        (),
        "The base already answers these questions; training can gain little and costs general ability: prompt it.",
        "Selective Self-to-Supervised Fine-Tuning, 2025, arXiv 2502.08130",
        "do not fine-tune",
    ),
    Rule(
        "a handful of rows",
        lambda f: f.below("rows", 50),
        (),
        "So few rows fit into the prompt as examples, where they need no training and nothing is forgotten.",
        "Language Models are Few-Shot Learners, 2020, arXiv 2005.14165",
        "do not fine-tune",
    ),
    Rule(
        "unknown facts",
        lambda f: (
            _weak(f)
            and f.below("answer_tokens", 64)
            and f.below("largest_class", 0.01)
            and f.below("right_test_answers", 0.05)
        ),
        (),
        "The base knows almost none of these short, ever different answers: if they are facts, not a skill, retrieve "
        "them; fine-tuning learns new facts slowly and invents others.",
        "Fine-Tuning or Retrieval?, 2023, arXiv 2312.05934; Does Fine-Tuning LLMs on New Knowledge Encourage "
        "Hallucinations?, 2024, arXiv 2405.05904",
        "do not fine-tune",
    ),
    Rule(
        "leaked test rows",
        lambda f: f.above("test_in_train", 1e-9) or f.above("test_near_train", 0.02),
        (),
        "Take those rows out of the test set first: every method's score on them is memory.",
        "Language Models are Few-Shot Learners, 2020, arXiv 2005.14165, appendix C",
        "mend",
    ),
    Rule(
        "rows that do not render",
        lambda f: f.above("template_problems", 1e-9),
        (),
        "Mend the template or the rows first; `luthier check` names them. A model that never sees a stop never stops.",
        "this library's judgement",
        "mend",
    ),
    Rule(
        "rows that do not fit",
        lambda f: f.above("too_long", 0.01),
        (),
        "More than one row in a hundred is lost to the length limit: raise data.max_length, or cut them by meaning.",
        "this library's judgement",
        "mend",
    ),
    Rule(
        "one answer for most",
        lambda f: f.above("largest_class", 0.8),
        (),
        "Read F1 over the classes instead of accuracy: a constant answer already scores high.",
        "this library's judgement",
        "mend",
    ),
    Rule(
        "exact copies",
        lambda f: f.above("exact_duplicates", 0.01),
        ("deduplicate",),
        "Copies are memorised, and their share of the epoch teaches nothing new.",
        "Deduplicating Training Data Makes Language Models Better, 2021, arXiv 2107.06499",
    ),
    Rule(
        "near copies",
        lambda f: f.above("near_duplicates", 0.05),
        ("deduplicate(mode=near)", "uds"),
        "Near copies waste steps: leave them out beforehand, or choose diverse rows in every step.",
        "Deduplicating Training Data, 2021, arXiv 2107.06499; Utility-Diversity Sampling, 2025, arXiv 2510.16882",
    ),
    Rule(
        "strong base, doubtful labels",
        lambda f: _strong(f) and _noisy(f),
        (
            "anchored-sft(anchor_weight=0.5)",
            "beyond-log-likelihood(objective=p)[training.learning_rate={low_rate}]",
            "clear-curation",
        ),
        "The base is right more often than some of the labels: losses that trust it, and an anchor to it, leave those "
        "labels alone.",
        f"{CONTINUUM}; Anchored Supervised Fine-Tuning, 2025, arXiv 2509.23753; CLEAR, 2024, arXiv 2403.12776",
    ),
    Rule(
        "doubtful labels",
        lambda f: not _strong(f) and _noisy(f),
        ("procedure:glue-bag-of-tricks(self_calibrated=true)", "clear-curation", "anchored-sft(anchor_weight=0.5)"),
        "Some labels look wrong: correct them by folds, filter them by confidence, or hold the model to its start.",
        "Bag of Tricks for Effective Language Model Pretraining and Downstream Adaptation, 2023, arXiv 2302.09268; "
        "CLEAR, 2024, arXiv 2403.12776; Anchored Supervised Fine-Tuning, 2025, arXiv 2509.23753",
    ),
    Rule(
        "strong base",
        lambda f: _strong(f) and not _noisy(f),
        (
            "sft[training.learning_rate={low_rate}]",
            "beyond-log-likelihood(objective=p)[training.learning_rate={low_rate}]",
            "dynamic-ft[training.learning_rate={low_rate}]",
        ),
        "A strong base gains from losses that trust it, and needs a lower learning rate whatever the loss.",
        f"{CONTINUUM}; On the Generalization of SFT, 2025, arXiv 2508.05629",
    ),
    Rule(
        "weak base",
        _weak,
        ("sft[training.learning_rate={high_rate}]",),
        "A weak base has to learn what it does not know: plain likelihood, and a rate that moves it.",
        CONTINUUM,
    ),
    Rule(
        "neither strong nor weak",
        lambda f: not _strong(f) and not _weak(f) and f.above("mean_probability", 0.0),
        ("beyond-log-likelihood(objective=p)", "anchored-sft"),
        "No loss is predicted to win in between, so both sides are tried.",
        f"{CONTINUUM}; Anchored Supervised Fine-Tuning, 2025, arXiv 2509.23753",
    ),
    Rule(
        "right answers of its own",
        lambda f: f.above("right_answers", 0.3) and f.below("right_answers", 0.9),
        ("s3ft", "selective-self-rehearsal"),
        "Where the base's own answer is right it can stand for the given one: the skill costs less forgetting.",
        "S3FT, 2025, arXiv 2502.08130; Selective Self-Rehearsal, 2024, arXiv 2409.04787",
    ),
    Rule(
        "worked solutions",
        lambda f: f.above("answer_tokens", 40),
        ("masked-thought",),
        "Long solutions teach more when part of their input is hidden.",
        "Masked Thought, 2024, arXiv 2403.02178",
    ),
    Rule(
        "little data for the weights",
        lambda f: f.below("tokens_per_1000_parameters", 100.0) and f.above("rows", 50),
        ("half-ft", "lora", "learning-from-undesirable"),
        "Many weights and few tokens: train half of them, or few, or stay near a twin that went astray.",
        "HFT, 2024, arXiv 2404.18466; LoRA, 2021, arXiv 2106.09685; Learning from the Undesirable, 2025, "
        "arXiv 2511.13052",
    ),
    Rule(
        "enough rows for large batches",
        lambda f: f.above("rows", 1000),
        ("sft[training.batch_rows={large_batch},training.learning_rate={low_rate}]",),
        "Larger batches at a lower rate ended higher than the usual small ones.",
        "Unveiling the Secret Recipe, 2024, arXiv 2412.13337",
    ),
    Rule(
        "always",
        lambda f: f.above("rows", 50),
        ("half-ft",),
        "A candidate that costs nothing extra and forgets less by construction.",
        "HFT, 2024, arXiv 2404.18466",
    ),
)


@dataclass(frozen=True)
class Proposal:
    """An entry of a comparison and the rule that proposes it (the first, where several do)."""

    entry: str
    rule: Rule


@dataclass(frozen=True)
class Advice:
    """What the rules say.

    Attributes:
        candidates: what to race, the most promising first.
        remarks: rules that hold and propose nothing to race.
        left_out: entry -> why it cannot be tried here.
    """

    candidates: tuple[Proposal, ...]
    remarks: tuple[Rule, ...]
    left_out: dict[str, str]


def advise_by_rules(
    findings: Findings, *, task: str, learning_rate: float, batch_rows: int, rules: Sequence[Rule] = RULES
) -> Advice:
    """The candidates and remarks of all rules that hold.

    Args:
        findings: what was measured.
        task: methods that are not defined for it are left out.
        learning_rate: the recipe's.
        batch_rows: the recipe's.
        rules: the table.
    """
    rows = findings["rows"].value or 0
    values = {
        "low_rate": f"{learning_rate / 5:.3g}",
        "high_rate": f"{learning_rate * 3:.3g}",
        # At least 30 steps per epoch must be left: see presets.
        "large_batch": str(max(batch_rows, min(8 * batch_rows, int(rows) // 30))),
    }
    candidates: dict[str, Proposal] = {}
    left_out: dict[str, str] = {}
    holding = [rule for rule in rules if rule.when(findings)]
    for rule in holding:
        for template in rule.entries:
            entry = template.format(**values)
            if reason := _cannot(entry, task):
                left_out[entry] = reason
            else:
                candidates.setdefault(entry, Proposal(entry, rule))
    return Advice(tuple(candidates.values()), tuple(r for r in holding if r.kind != "try"), left_out)


def methods_of(entry: str) -> list[str]:
    """The method names of an entry: ``deduplicate(mode=near)+data:x[seed=1]`` -> deduplicate, x."""
    return [part.strip().rpartition(":")[2] for part in re.sub(r"\([^)]*\)|\[[^\]]*\]", "", entry).split("+")]


def _cannot(entry: str, task: str) -> str:
    for name in methods_of(entry):
        axes = [axis for axis in registry.AXES if name in registry.names(axis)]
        if not axes:
            return f"this installation has no method '{name}'"
        if all((tasks := registry.get(axis, name).tasks) and task not in tasks for axis in axes):
            return f"'{name}' is not defined for {task}"
    return ""
