"""What a model is used for: collation, the forward pass down to flat outputs, and the default objective and metrics."""

from __future__ import annotations

from luthier.core.errors import UserError, did_you_mean
from luthier.tasks.base import Encoded, Task
from luthier.tasks.causal_lm import CausalLM
from luthier.tasks.classification import ImageClassification, SequenceClassification, TokenClassification
from luthier.tasks.masked_lm import MaskedLM
from luthier.tasks.regression import SequenceRegression

TASKS: dict[str, type[Task]] = {
    "causal-lm": CausalLM,
    "masked-lm": MaskedLM,
    "sequence-classification": SequenceClassification,
    "sequence-regression": SequenceRegression,
    "token-classification": TokenClassification,
    "image-classification": ImageClassification,
}


def get_task(name: str, processor: object) -> Task:
    """The task of that name over a tokenizer or image processor."""
    if name not in TASKS:
        raise UserError(f"unknown task '{name}'.{did_you_mean(name, TASKS)} Accepted: {', '.join(TASKS)}.")
    return TASKS[name](processor)


__all__ = ["TASKS", "CausalLM", "Encoded", "MaskedLM", "Task", "get_task"]
