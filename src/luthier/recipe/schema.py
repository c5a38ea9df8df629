"""The schema of a recipe: every key with its type, bounds, default and meaning. No heavy module is imported.

Names of methods are checked later, by :mod:`luthier.recipe.plan`, against the registry: their option schemas are their
signatures. A method is written as its name, or as a one-key mapping from its name to its options.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

VERSION = 1

Task = Literal[
    "causal-lm",
    "sequence-classification",
    "sequence-regression",
    "token-classification",
    "image-classification",
    "masked-lm",
]
TASKS: tuple[str, ...] = get_args(Task)

KeyPath = tuple[str | int, ...]


def _problem(text: str, *key: str) -> PydanticCustomError:
    """The error of a validator; ``key`` is the path to blame, below the validated value."""
    # Braces are the template syntax of pydantic's messages, so the text goes in as a value.
    return PydanticCustomError("recipe", "{text}", {"text": text, "key": key})


def _method(value: Any) -> Any:
    """A method's name, or ``{name: options}``."""
    if isinstance(value, str) and value.strip():
        return value
    if not isinstance(value, dict) or not value:
        raise _problem(f"must be a method's name, or a mapping from its name to its options, not {value!r}")
    if len(value) > 1:
        keys = ", ".join(map(str, value))
        raise _problem(f"names {len(value)} methods ({keys}); a mapping here has one key, the method's name")
    _options(value)
    return value


def _options(value: dict[Any, Any]) -> None:
    for name, options in value.items():
        if not isinstance(name, str):
            raise _problem(f"a method's name is text, not {name!r}")
        if options is not None and not isinstance(options, dict):
            raise _problem(f"the options of '{name}' must be a mapping, such as {{{name}: {{option: value}}}}")


def _objective(value: Any) -> Any:
    """As :func:`_method`, with the term's ``weight`` as an optional second key."""
    if isinstance(value, dict) and "weight" in value:
        weight = value["weight"]
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
            raise _problem(f"the weight of a term must be a number greater than 0, not {weight!r}")
        rest = {k: v for k, v in value.items() if k != "weight"}
        _method(rest)
        return value
    return _method(value)


def _one_or_many(value: Any) -> Any:
    return value if isinstance(value, list) else [value]


def _not_empty(value: list[Any]) -> list[Any]:
    if not value:
        raise _problem("must name at least one method, not an empty list")
    return value


MethodSpec = Annotated[Any, BeforeValidator(_method)]
Term = Annotated[Any, BeforeValidator(_objective)]
MethodList = Annotated[list[MethodSpec], BeforeValidator(_one_or_many)]


def _rows(value: Any) -> Any:
    """A file, folder, hub data set or ``lab:<task>`` by name, or several; from Python also dicts or a ``Dataset``."""
    if isinstance(value, str):
        if not value.strip():
            raise _problem("must name a file, a folder, a hub data set or lab:<task>, not an empty text")
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, list):
        if value and all(isinstance(source, str | Path) and str(source).strip() for source in value):
            return [str(source) for source in value]
        if not value or not all(isinstance(row, dict) for row in value):
            raise _problem("must name a file, folder, hub data set or lab:<task>, or a list of such names")
        return value
    if hasattr(value, "column_names") and hasattr(value, "__len__"):
        return value
    raise _problem(f"must name a file, a folder, a hub data set or lab:<task>, not {value!r}")


def _keep(value: Any) -> Any:
    if value is None or value == "none":
        return None
    if value == "default":
        return value
    if isinstance(value, list) and value and not isinstance(value[0], dict):
        return [_rows(source) for source in value]
    return [_rows(value)]


def _name_as(key: str) -> BeforeValidator:
    """Lets a mapping be written as one text, its most important key."""
    return BeforeValidator(lambda value: {key: str(value)} if isinstance(value, str | Path) else value)


def _section(value: Any) -> Any:
    """A section whose keys are all commented out is empty, not wrong."""
    return {} if value is None else value


def _data_shorthand(value: Any) -> Any:
    return value if isinstance(value, dict | BaseModel) else {"train": value}


def _steps_or_share(value: float) -> float:
    if value >= 1 and value != int(value):
        raise _problem(f"must be a share below 1 or a whole number of steps, not {value}")
    return value


Positive = Annotated[int, Field(ge=1)]
Rows = Annotated[Any, BeforeValidator(_rows)]


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, validate_assignment=False, protected_namespaces=()
    )


class Model(_Strict):
    """The base model."""

    id: str = Field(min_length=1, description="a hub id, a folder, or lab:nano / lab:small")
    revision: str | None = Field(None, description="a branch, tag or commit of the hub")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="type of the weights in memory")
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field("auto", description="attention code")
    task: Literal["auto", Task] = Field("auto", description="what the model is used for; auto reads its config")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class Data(_Strict):
    """Rows to learn from, to test on, and on which forgetting is measured."""

    train: Rows = Field(description="file, folder, hub data set, or lab:<task>")
    test: Annotated[Any, BeforeValidator(lambda v: None if v is None else _rows(v))] = Field(
        None, description="held-out rows of the target task"
    )
    select: Annotated[Any, BeforeValidator(lambda v: None if v is None else _rows(v))] = Field(
        None, description="held-out rows for choices on the way (early stopping, weight operations); test when absent"
    )
    keep: Annotated[Any, BeforeValidator(_keep)] = Field(
        "default", description="general material on which forgetting is measured: default, sources, or none"
    )
    layout: str = Field("auto", min_length=1, description="the layout of the rows; auto looks at their columns")
    columns: dict[str, str] = Field(default_factory=dict, description="our field -> the column that holds it")
    bad_rows: Literal["error", "skip"] = Field("error", description="stop at a bad row, or set it aside and count it")
    template: str | None = Field(None, description="a chat template file; 'none' renders raw text")
    system: str | None = Field(None, description="a system message put before every conversation without one")
    thinking: Literal["keep", "strip"] = Field("keep", description="reasoning parts of past assistant messages")
    max_length: Annotated[int, Field(ge=2)] | None = Field(None, description="tokens per row; null is the model's own")
    truncation: Literal["error", "keep_start", "drop"] = Field(
        "error", description="what happens to rows longer than max_length"
    )
    limit: Positive | None = Field(None, description="only this many training rows")
    test_limit: Positive | None = Field(None, description="only this many test rows")
    keep_limit: Positive | None = Field(None, description="only this many rows of each keep source")
    verifier: Annotated[Any, BeforeValidator(lambda v: None if v is None else _method(v))] = Field(
        None, description="how a generated answer is judged: exact, numeric, choice, ..."
    )
    stages: MethodList = Field(default_factory=list, description="data methods, in order")


class EarlyStopping(_Strict):
    """When to stop before the last step."""

    patience: Positive = Field(3, description="evaluations without improvement before training stops")
    min_delta: float = Field(0.0, ge=0, description="the least fall of the loss that counts, in nats")


TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")


class Training(_Strict):
    """The optimiser and the step loop."""

    epochs: float = Field(1.0, gt=0, description="passes over the training rows")
    max_steps: Positive | None = Field(None, description="stop after this many optimiser steps")
    learning_rate: float = Field(2e-5, gt=0, description="peak learning rate")
    batch_rows: Positive | None = Field(None, description="rows per optimiser step, over all processes")
    batch_tokens: Positive | None = Field(None, description="padded tokens per optimiser step, in place of batch_rows")
    accumulation: Positive = Field(1, description="micro-batches each optimiser step is cut into")
    schedule: Literal["cosine", "linear", "constant", "warmup-stable-decay"] = Field(
        "cosine", description="learning rate over the run"
    )
    warmup: Annotated[float, AfterValidator(_steps_or_share)] = Field(
        0.03, ge=0, description="share of the steps (below 1) or number of steps"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of AdamW's first moment; momentum of SGD")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of AdamW's second moment")
    epsilon: float = Field(1e-8, gt=0, description="added to AdamW's denominator")
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(1.0, description="gradient clipping; null is none")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="optimiser")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="arithmetic; auto is fp32 on a CPU")
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    save_steps: Positive | None = Field(None, description="a checkpoint every so many steps")
    keep_checkpoints: Positive = Field(2, description="how many checkpoints stay on disk")
    eval_steps: Positive | None = Field(None, description="loss on the test rows every so many steps")
    early_stopping: EarlyStopping | None = Field(
        None, description="{patience, min_delta} on the loss of data.select or data.test"
    )
    log_steps: Positive = Field(10, description="metrics every so many steps")
    threads: Positive | None = Field(None, description="CPU threads; null leaves torch's choice")
    buckets: bool = Field(True, description="batches of rows of similar length")
    head: Literal["auto", "torch", "liger", "triton"] = Field("auto", description="log-probability head")
    head_chunk: Positive | None = Field(None, description="positions per chunk of the head; null is chosen by memory")
    trackers: list[Literal[TRACKERS]] = Field(default_factory=list, description="where metrics also go")  # type: ignore[valid-type]
    sharding: Literal["none", "ddp", "fsdp2"] = Field("none", description="how several processes share the work")

    @model_validator(mode="after")
    def _one_batch_size(self) -> Training:
        if self.batch_rows is not None and self.batch_tokens is not None:
            raise _problem("batch_rows and batch_tokens exclude each other; set one of them to null", "batch_tokens")
        if self.batch_rows is None and self.batch_tokens is None:
            self.batch_rows = 16
        return self


class Evaluation(_Strict):
    """What is measured before and after training."""

    before: bool = Field(True, description="also measure the base model")
    generate: Literal["auto", True, False] = Field("auto", description="let the model answer test prompts")
    max_new_tokens: Positive = Field(256, description="longest generated answer, in tokens")
    batch_rows: Positive = Field(32, description="rows per evaluation batch")
    limit: Positive | None = Field(256, description="rows evaluated per source; null is all")
    calibration: bool = Field(True, description="ECE, Brier score and NLL")
    confidence: float = Field(0.95, gt=0, lt=1, description="level of the confidence intervals")
    bootstrap: Annotated[int, Field(ge=100)] = Field(1000, description="resamples of the bootstrap")


class Recipe(_Strict):
    """A whole recipe. Made by :func:`luthier.recipe.load.load`, which knows files, line numbers and overrides.

    Relative paths in a recipe are relative to the current directory; where nothing is there and the recipe file's own
    folder has it, that is taken.
    """

    luthier: Literal[1] = Field(VERSION, description="version of the recipe format")  # type: ignore[arg-type]
    model: Annotated[Model, _name_as("id")] = Field(description="the base model")
    data: Annotated[Data, BeforeValidator(_data_shorthand)] = Field(description="the rows")
    procedure: MethodSpec = Field("sft", description="a multi-stage method")
    objective: Annotated[list[Term], BeforeValidator(_one_or_many), AfterValidator(_not_empty)] = Field(
        default_factory=lambda: ["sft"], description="the loss, or a weighted sum"
    )
    transforms: MethodList = Field(default_factory=list, description="changes to each batch, in order")
    selection: Annotated[Any, BeforeValidator(lambda v: None if v is None else _method(v))] = Field(
        None, description="online batch selection"
    )
    parameters: Annotated[MethodList, AfterValidator(_not_empty)] = Field(
        default_factory=lambda: ["full"], description="what is trained, and how it is parameterised"
    )
    weights: MethodList = Field(default_factory=list, description="weight operations after training, in order")
    decoding: MethodSpec = Field("greedy", description="how answers are generated")
    generation: Annotated[Any, BeforeValidator(lambda v: None if v is None else _method(v))] = Field(
        None, description="what writes for data stages and procedures: endpoint, vllm or scripted; the base when absent"
    )
    analysis: MethodList = Field(default_factory=list, description="analyses of the finished run")
    training: Annotated[Training, BeforeValidator(_section)] = Field(
        default_factory=lambda: Training.model_validate({}), description="the optimiser and the step loop"
    )
    evaluation: Annotated[Evaluation, BeforeValidator(_section)] = Field(
        default_factory=lambda: Evaluation.model_validate({}), description="what is measured before and after training"
    )
    output: str = Field("", description="the run's folder; by default runs/<name of the recipe>")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of every random stream")

    # Where each key stands ("file:line" or the override), and the folder of the recipe file.
    _places: dict[KeyPath, str] = PrivateAttr(default_factory=dict)
    _folder: Path | None = PrivateAttr(None)

    @model_validator(mode="after")
    def _stopping_needs_rows(self) -> Recipe:
        if self.training.early_stopping and self.data.test is None and self.data.select is None:
            raise _problem("watches the loss on data.select or data.test; neither is set", "training", "early_stopping")
        return self

    @property
    def folder(self) -> Path | None:
        """The folder of the recipe file; None for a recipe made in Python."""
        return self._folder

    def where(self, path: KeyPath = ()) -> str | None:
        """``file:line`` of a key, or of the nearest key around it; None for a recipe made in Python."""
        return place_of(self._places, path)


def place_of(places: dict[KeyPath, str], path: KeyPath) -> str | None:
    """The place of the longest recorded prefix of ``path``."""
    for length in range(len(path), -1, -1):
        if path[:length] in places:
            return places[path[:length]]
    return None
