"""From pydantic's errors to one line each: the key, what is wrong, what is accepted, and what was probably meant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from luthier.core.errors import UserError, did_you_mean
from luthier.recipe.schema import KeyPath, Recipe

# What other trainers call a key -> where Luthier keeps it. Also what ``luthier migrate`` renames.
FOREIGN: Mapping[str, str] = {
    "model_name_or_path": "model.id",
    "model_name": "model.id",
    "base_model": "model.id",
    "model_revision": "model.revision",
    "torch_dtype": "model.dtype",
    "dtype": "model.dtype",
    "attn_implementation": "model.attention",
    "trust_remote_code": "model.trust_remote_code",
    "dataset": "data.train",
    "dataset_name": "data.train",
    "dataset_path": "data.train",
    "train_file": "data.train",
    "validation_file": "data.test",
    "test_file": "data.test",
    "eval_dataset": "data.test",
    "max_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_seq_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length",
    "max_samples": "data.limit",
    "chat_template": "data.template",
    "num_train_epochs": "training.epochs",
    "num_epochs": "training.epochs",
    "max_steps": "training.max_steps",
    "learning_rate": "training.learning_rate",
    "lr": "training.learning_rate",
    "lr_scheduler_type": "training.schedule",
    "lr_scheduler": "training.schedule",
    "warmup_ratio": "training.warmup",
    "warmup_steps": "training.warmup",
    "weight_decay": "training.weight_decay",
    "adam_beta1": "training.beta1",
    "adam_beta2": "training.beta2",
    "adam_epsilon": "training.epsilon",
    "max_grad_norm": "training.max_grad_norm",
    "gradient_clipping": "training.max_grad_norm",
    "optim": "training.optimizer",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "gradient_accumulation_steps": "training.accumulation",
    "per_device_train_batch_size": "training.batch_rows",
    "micro_batch_size": "training.batch_rows",
    "batch_size": "training.batch_rows",
    "per_device_eval_batch_size": "evaluation.batch_rows",
    "save_steps": "training.save_steps",
    "save_total_limit": "training.keep_checkpoints",
    "eval_steps": "training.eval_steps",
    "logging_steps": "training.log_steps",
    "report_to": "training.trackers",
    "group_by_length": "training.buckets",
    "output_dir": "output",
    "loss": "objective",
    "loss_type": "objective",
    "max_new_tokens": "evaluation.max_new_tokens",
}

_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "dict_type": "a mapping of keys to values",
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "dataclass_type": "a mapping of keys to values",
    "none_required": "null",
}

_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


class RecipeError(UserError):
    """One or more problems of a recipe, in the order of its lines; ``str()`` is the first, on one line.

    Attributes:
        problems: every problem as a line of its own.
    """

    def __init__(self, problems: Sequence[UserError]) -> None:
        first = problems[0]
        self.problems = [str(problem) for problem in problems]
        super().__init__(first.message, where=first.where)


def key_text(path: Iterable[str | int]) -> str:
    """``("objective", 0, "sft")`` -> ``objective[0].sft``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def explain(
    error: ValidationError,
    schema: type[BaseModel],
    where: Callable[[KeyPath], str | None],
    *,
    prefix: KeyPath = (),
    known: Callable[[KeyPath], bool] = lambda _: True,
) -> RecipeError:
    """The :class:`RecipeError` of a validation error.

    Args:
        error: what pydantic found.
        schema: the model it validated.
        where: the place of a key path.
        prefix: the path of the validated value inside the recipe.
        known: whether the recipe has this key path; others (names of union members) are dropped from the text.
    """
    problems = []
    for item in error.errors(include_url=False):
        kind = item["type"]
        inside = (*item["loc"], *item.get("ctx", {}).get("key", ()))
        if kind not in {"missing", "extra_forbidden"}:
            while inside and not known((*prefix, *inside)):
                inside = inside[:-1]
        path: KeyPath = (*prefix, *inside)
        place = where(path[:-1] if kind == "missing" else path)
        text = _text(kind, item, schema, inside)
        problems.append(UserError(f"{key_text(path)}: {text}" if path else text, where=place))
    return RecipeError(_by_line(problems))


def _by_line(problems: list[UserError]) -> list[UserError]:
    unique = list({str(problem): problem for problem in problems}.values())

    def line(problem: UserError) -> int:
        tail = (problem.where or "").rpartition(":")[2]
        return int(tail) if tail.isdigit() else 0

    return sorted(unique, key=line)


def _text(kind: str, item: Mapping[str, Any], schema: type[BaseModel], inside: KeyPath) -> str:
    given, context = item["input"], item.get("ctx") or {}
    if kind == "recipe":
        return str(context["text"])
    if kind == "extra_forbidden":
        return _unknown_key(str(inside[-1]), _model_at(schema, inside[:-1]), schema, top=len(inside) == 1)
    if kind == "missing":
        return f"is missing.{_meaning(_model_at(schema, inside[:-1]), str(inside[-1]))}"
    if kind in {"literal_error", "enum"}:
        return _not_accepted(given, str(context["expected"]))
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return f"must be {words} {context[name]}, not {_shown(given)}"
    if kind in {"string_too_short", "too_short"}:
        return f"must not be empty (at least {context['min_length']}), not {_shown(given)}"
    if kind in {"string_too_long", "too_long"}:
        return f"is longer than {context['max_length']}"
    if kind == "string_pattern_mismatch":
        return f"must match the pattern {context['pattern']}, not {_shown(given)}"
    if kind in _KINDS:
        return f"must be {_KINDS[kind]}, not {_shown(given)}{_type_hint(_KINDS[kind], given)}"
    text = str(item["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{text[:1].lower()}{text[1:]} (given: {_shown(given)})"


def _unknown_key(key: str, model: type[BaseModel] | None, schema: type[BaseModel], *, top: bool) -> str:
    accepted = list(model.model_fields) if model else []
    near = did_you_mean(key, accepted)
    if schema is Recipe and key in FOREIGN:
        near = f" Luthier's key for it is '{FOREIGN[key]}'."
    elif schema is Recipe and top and not near:
        owners = [
            f"{outer}.{key}"
            for outer, info in Recipe.model_fields.items()
            if (inner := _models_in(info.annotation)) and key in inner[0].model_fields
        ]
        near = f" Did you mean '{owners[0]}'?" if owners else ""
    listed = ", ".join(accepted) if accepted else "none, it has no options"
    return f"unknown key.{near} Accepted: {listed}."


def _not_accepted(given: Any, expected: str) -> str:
    words = [w.strip() for w in expected.replace(" or ", ", ").split(",")]
    words = [{"True": "true", "False": "false", "None": "null"}.get(w, w.strip("'")) for w in words]
    return f"{_shown(given)} is not accepted.{did_you_mean(str(given), words)} Accepted: {', '.join(words)}."


def _meaning(model: type[BaseModel] | None, key: str) -> str:
    info = model.model_fields.get(key) if model else None
    return f" It is {info.description}." if info is not None and info.description else ""


def _type_hint(wanted: str, given: Any) -> str:
    if not isinstance(given, str):
        return ""
    if wanted == "true or false" and given.lower() in {"yes", "no", "on", "off", "true", "false"}:
        return "; in YAML 1.2 that is written true or false"
    try:
        float(given)
    except ValueError:
        return ""
    return "; remove the quotes" if "number" in wanted else ""


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    text = f"'{value}'" if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:77] + "..."


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]


def _model_at(schema: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    model: type[BaseModel] | None = schema
    for part in path:
        info = model.model_fields.get(str(part)) if model else None
        inner = _models_in(info.annotation) if info else []
        model = inner[0] if inner else None
    return model
