r"""TruthRL: a correct answer earns 1, "I don't know" 0, a wrong one -1.

    r = +1 correct,  0 (``abstain``) abstention,  -1 wrong or without a final answer

Inside a group in which nothing is correct abstaining has a positive advantage; in one with correct answers it has a
negative one: the credit of abstaining follows what the model can answer. ``variant``::

    ternary     as above
    binary      abstention earns -1 too, the usual reward
    knowledge   questions flagged ``out_of_knowledge`` (the data stage of the same name): abstention +1, all else -1;
                other questions as ternary (``known: binary``: abstention -1)

``reasoning`` names a reward that judges the reasoning, q in {0, 1}, and adds ``reasoning_weight`` q: always
(``additive``), only to correct answers (``when_correct``), or to all but wrong ones (``conditional``, this library's).

The final answer is the first ``\boxed{}``, or ``<answer></answer>``, or all of the text (``form``). It is normalised
(case, punctuation, articles, space; so "don't" is "dont"); abstention is looked for first, so "Paris. I don't know" is
one. An answer that equals no gold answer is put to the ``verifier``, any reward; ``judge`` asks a language model. A
string match alone punishes correct paraphrases, which drove the paper's model to abstain everywhere.

Paper: "TruthRL: Incentivizing Truthful LLMs via Reinforcement Learning", 2025, arXiv 2509.25760. Official repository:
facebookresearch/TruthRL (its reward was read in a fork).

Example::

    objective: {grpo: {beta: 0.001}}
    transforms: [rollouts: {reward: {truth-rl: {variant: ternary}}, samples: 8}]
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import Field

from luthier.core.errors import UserError
from luthier.core.registry import reward
from luthier.functional.answers import column, reference_texts
from luthier.functional.discriminative import place
from luthier.functional.judging import RewardSpec, built
from luthier.functional.truthfulness import PHRASES, Form, Label, label

SLUG, FLAG = "truth-rl", "out_of_knowledge"
WATCHED, FEW_ABSTENTIONS, LONG_GOLD = 200, 0.01, 3


@reward("truth-rl", paper="TruthRL: Incentivizing Truthful LLMs via Reinforcement Learning, 2025, arXiv 2509.25760")
class TruthReward:
    """TruthRL: a correct answer earns 1, saying that one does not know 0, a wrong answer -1."""

    def __init__(
        self,
        *,
        variant: Annotated[
            Literal["ternary", "binary", "knowledge"], Field(description="what an abstention earns, see above")
        ] = "ternary",
        abstain: Annotated[float, Field(ge=-1, le=1, description="ternary: reward of an abstention")] = 0.0,
        known: Annotated[
            Literal["ternary", "binary"], Field(description="knowledge: reward of questions within knowledge")
        ] = "ternary",
        verifier: Annotated[RewardSpec, Field(description="a reward that judges answers no gold answer equals")] = (
            "normalised"
        ),
        answer: Annotated[str, Field(description="column with the gold answer or a list of them")] = "answer",
        form: Annotated[Form, Field(description="where the final answer stands")] = "boxed",
        phrases: Annotated[
            list[str] | None, Field(min_length=1, description="what an abstention says; I don't know by default")
        ] = None,
        invalid: Annotated[str | None, Field(description="a canned reply that counts as wrong")] = None,
        reasoning: Annotated[RewardSpec | None, Field(description="a reward that judges the reasoning")] = None,
        reasoning_weight: Annotated[float, Field(ge=0, description="s, weight of the reasoning's reward")] = 0.1,
        combine: Annotated[
            Literal["additive", "when_correct", "conditional"], Field(description="which answers it is added to")
        ] = "additive",
    ) -> None:
        self.variant, self.abstain, self.known, self.answer = variant, abstain, known, answer
        self.form: Form = form
        self.phrases, self.invalid = list(phrases or PHRASES), invalid
        self.verifier_name, self.verifier = built(verifier, SLUG)
        self.reasoning = None if reasoning is None else built(reasoning, SLUG)[1]
        self.reasoning_weight, self.combine = reasoning_weight, combine
        self._known: dict[tuple[str, str, str], bool] = {}
        self._seen, self._abstained, self._warned = 0, 0, False

    def __call__(self, rows: Sequence[Mapping[str, Any]], completions: Sequence[str], ctx: Any) -> list[float | None]:
        """One reward per completion.

        Raises:
            UserError: a row has no gold answer, or no flag where ``variant: knowledge`` needs one.
        """
        labels = self.labels(rows, completions, ctx)
        rewards = [self.outcome(one, self._flag(row)) for one, row in zip(labels, rows, strict=True)]
        if self.reasoning is not None:
            found = self.reasoning(rows, completions, ctx)
            for i, (q, one) in enumerate(zip(found, labels, strict=True)):
                counts = {"additive": True, "when_correct": rewards[i] == 1, "conditional": rewards[i] >= 0}[
                    self.combine
                ]
                rewards[i] += self.reasoning_weight * (q or 0.0) * (counts and one != "no_answer")
        self._watch(labels, rows, ctx)
        return list(rewards)

    def labels(self, rows: Sequence[Mapping[str, Any]], completions: Sequence[str], ctx: Any) -> list[Label]:
        """What each completion is: correct, abstain, wrong or no_answer."""
        return [self._label(row, text, ctx) for row, text in zip(rows, completions, strict=True)]

    def outcome(self, one: Label, out_of_knowledge: bool = False) -> float:
        """The reward of a label."""
        if self.variant == "knowledge" and out_of_knowledge:
            return 1.0 if one == "abstain" else -1.0
        if one == "abstain":
            binary = self.variant == "binary" or (self.variant == "knowledge" and self.known == "binary")
            return -1.0 if binary else self.abstain
        return 1.0 if one == "correct" else -1.0

    def _label(self, row: Mapping[str, Any], text: str, ctx: Any) -> Label:
        golds = [gold for gold in reference_texts(row, self.answer) if gold.strip()]
        if not golds:
            raise UserError(f"{SLUG}: the row has no gold answer in the column '{self.answer}'.", where=place(row))

        def verify(gold: str, said: str) -> bool:
            key = (str(row.get("prompt") or row.get("messages")), gold, said)
            if key not in self._known:
                asked = {**row, "completion": gold, "extra": {"answer": gold}}
                self._known[key] = (self.verifier([asked], [said], ctx)[0] or 0.0) >= 1.0
            return self._known[key]

        return label(text, golds, verify, form=self.form, phrases=self.phrases, invalid=self.invalid)

    def _flag(self, row: Mapping[str, Any]) -> bool:
        if self.variant != "knowledge":
            return False
        flag = column(row, FLAG)
        if not isinstance(flag, bool):
            raise UserError(
                f"{SLUG}: variant: knowledge needs the column '{FLAG}' (true or false). Put the data stage '{SLUG}' "
                "into data.stages.",
                where=place(row),
            )
        return flag

    def _watch(self, labels: Sequence[Label], rows: Sequence[Mapping[str, Any]], ctx: Any) -> None:
        """Log what the groups are made of; warn where abstaining cannot be learnt, or a string match is too strict."""
        if ctx is not None and hasattr(ctx, "log") and labels:
            groups = [
                {one for one, _ in group}
                for _, group in groupby(zip(labels, rows, strict=True), key=lambda x: id(x[1]))
            ]
            ctx.log(
                **{
                    f"truth_rl_all_{name}": sum(g <= kinds for g in groups) / len(groups)
                    for name, kinds in (
                        ("correct", {"correct"}),
                        ("abstain", {"abstain"}),
                        ("wrong", {"wrong", "no_answer"}),
                    )
                }
            )
        if self._warned:
            return
        self._seen += len(labels)
        self._abstained += sum(one == "abstain" for one in labels)
        if self._seen < WATCHED:
            return
        self._warned = True
        if self._abstained < FEW_ABSTENTIONS * self._seen and self.variant != "binary":
            warnings.warn(
                f"{SLUG}: {self._abstained} of the first {self._seen} answers abstain. A model that never does cannot "
                f"learn to: ask for it in the prompt ('{self.phrases[0]}'), or train on a few abstentions first.",
                stacklevel=3,
            )
        long = sum(len(gold.split()) > LONG_GOLD for row in rows for gold in reference_texts(row, self.answer))
        if self.verifier_name in ("exact", "normalised") and long > len(rows) / 2:
            warnings.warn(
                f"{SLUG}: most gold answers have more than {LONG_GOLD} words, and the verifier '{self.verifier_name}' "
                "takes every paraphrase for wrong: the model may learn to abstain everywhere. Use judge.",
                stacklevel=3,
            )
