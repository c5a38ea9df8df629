"""Open a model with its tokenizer or image processor, or say in one line why it cannot be opened.

Weights come from safetensors only; a pickle is never read. A model is loaded in float32 unless told otherwise: these
are the master weights, and reduced precision is a matter of the forward pass.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.core.errors import UserError, did_you_mean, missing_extra
from luthier.core.registry import NUMBER_TASKS, TOKEN_TASKS
from luthier.core.rng import derive_seed
from luthier.models.info import TASKS, ModelInfo, adapter_base, fingerprint, inspect, read_json, resolve
from luthier.models.quiet import quiet
from luthier.models.shards import Shards

__all__ = [
    "AUTO_CLASSES",
    "TASKS",
    "Loaded",
    "ModelInfo",
    "fingerprint",
    "inspect",
    "load",
    "load_processor",
    "resolve",
]

_MAPPINGS = {
    "causal-lm": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "masked-lm": ("AutoModelForMaskedLM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    "sequence-classification": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "sequence-regression": (
        "AutoModelForSequenceClassification",
        "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    ),
    "token-classification": ("AutoModelForTokenClassification", "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES"),
    "image-classification": ("AutoModelForImageClassification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
}
# Task -> the class of transformers that opens it.
AUTO_CLASSES = {task: name for task, (name, _) in _MAPPINGS.items()}
_ACCEPTED = {
    "task": ("auto", *TASKS),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "attention": ("auto", "sdpa", "eager", "flash_attention_2"),
}
# What the one output of a regression is called in config.json.
NUMBER_HEAD = ("value",)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
_PEFT_TASKS = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "sequence-classification", "TOKEN_CLS": "token-classification"}


@dataclass
class Loaded:
    """An opened model.

    Attributes:
        model: in eval mode, on the CPU; a ``peft.PeftModel`` when an adapter was opened.
        processor: the tokenizer, or the image processor for image classification.
        task: one of :data:`TASKS`.
        id: what the user wrote.
        folder: where its files are.
        fingerprint: hash of weights, configuration and tokenizer (of the base too, for an adapter).
        labels: names of the classes in the order of the outputs; empty for causal-lm.
        base: the base's folder when an adapter was opened; None otherwise.
        notes: decisions taken while loading, to be shown to the user.
    """

    model: Any
    processor: Any
    task: str
    id: str
    folder: Path
    fingerprint: str
    labels: tuple[str, ...] = ()
    base: Path | None = None
    notes: tuple[str, ...] = ()


def load(
    spec: str | Path,
    *,
    task: str = "auto",
    revision: str | None = None,
    dtype: str = "auto",
    attention: str = "auto",
    trust_remote_code: bool = False,
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> Loaded:
    """Open a model folder, a hub id, ``lab:<name>`` or a peft adapter folder.

    Args:
        spec: what to open.
        task: one of :data:`TASKS`, or ``auto``: what the checkpoint's architecture says.
        revision: branch, tag or commit of a hub model.
        dtype: ``auto`` is float32.
        attention: implementation of the attention; ``auto`` is the best that is installed.
        trust_remote_code: whether Python code that comes with the model may run.
        labels: class names in the order of the outputs. A checkpoint with the same names in another order is put into
            this order; with other names its head is replaced by a new one.
        seed: seeds the weights that the checkpoint does not have (a new head, added embedding rows).

    Raises:
        UserError: one line with the cause and the way out.
    """
    for name, value in (("task", task), ("dtype", dtype), ("attention", attention)):
        if value not in _ACCEPTED[name]:
            accepted = _ACCEPTED[name]
            hint = did_you_mean(value, accepted)
            raise UserError(f"unknown {name} '{value}'.{hint} Accepted: {', '.join(accepted)}.")
    folder = resolve(spec, revision=revision)
    base = resolve(adapter_base(folder)) if (folder / "adapter_config.json").is_file() else None
    body = base or folder
    info = inspect(body)
    if base:
        recorded = read_json(p) if (p := folder / "luthier.json").is_file() else {}
        labels = labels or recorded.get("labels")
        if task == "auto":
            stated = str(read_json(folder / "adapter_config.json").get("task_type"))
            task = recorded.get("task") or _PEFT_TASKS.get(stated) or task
    chosen = _choose_task(info, task, str(spec))
    processor = load_processor(folder if _has_processor(folder, chosen) else body, chosen, trust_remote_code)
    notes: list[str] = []
    if dtype == "auto" and info.dtype not in ("float32", "float64"):
        notes.append(f"stored as {info.dtype}, loaded as float32 (dtype: auto); dtype: bfloat16 halves the memory")
    from luthier.models.heads import fit_vocabulary, label_names

    with quiet():
        model = _open(info, body, chosen, dtype, attention, trust_remote_code, tuple(labels or ()), seed, notes)
        if chosen != "image-classification" and (added := fit_vocabulary(model, processor, seed)):
            notes.append(f"{added} rows were added to the embedding for tokens of the tokenizer that it did not have")
        # peft writes this name into the adapters it saves: a hub id rather than a place in this machine's cache.
        model.name_or_path = str(spec) if not base and not Path(spec).exists() and ":" not in str(spec) else str(body)
        if base:
            model = _open_adapter(model, folder, base)
    return Loaded(
        model=model.eval(),
        processor=processor,
        task=chosen,
        id=str(spec),
        folder=folder,
        fingerprint=fingerprint(folder),
        labels=() if chosen in (*TOKEN_TASKS, *NUMBER_TASKS) else label_names(model.config),
        base=base,
        notes=tuple(notes),
    )


def _choose_task(info: ModelInfo, task: str, where: str) -> str:
    """The task to load for, checked against what transformers has for this architecture."""
    import transformers
    from transformers.models.auto import configuration_auto, modeling_auto

    known = configuration_auto.CONFIG_MAPPING_NAMES
    possible = [t for t, (_, names) in _MAPPINGS.items() if info.model_type in getattr(modeling_auto, names)]
    if info.model_type not in known:
        if not read_json(info.folder / "config.json").get("auto_map"):
            raise UserError(
                f"unknown architecture '{info.model_type}'.{did_you_mean(info.model_type, known)} transformers "
                f"{transformers.__version__} does not have it; a newer one may.",
                where=where,
            )
        possible = list(TASKS)
    if task == "auto":
        if info.task is None:
            raise UserError(
                f"its config.json names the architecture '{info.architecture}', which tells no task. Set the model's "
                f"`task` to one of: {', '.join(possible) or '(none fits this architecture)'}.",
                where=where,
            )
        task = info.task
    if task not in possible:
        raise UserError(
            f"a model of type '{info.model_type}' cannot do {task}; it can do: {', '.join(possible) or 'none'}.",
            where=where,
        )
    return task


def _has_processor(folder: Path, task: str) -> bool:
    if task == "image-classification":
        return any((folder / n).is_file() for n in ("preprocessor_config.json", "processor_config.json"))
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_processor(folder: str | Path, task: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder, or its image processor (PIL; torchvision is not needed) for image classification.

    Raises:
        UserError: the folder has none, or it needs a package that is not installed.
    """
    import transformers

    folder = Path(folder)
    image = task == "image-classification"
    what, file = ("image processor", "preprocessor_config.json") if image else ("tokenizer", "tokenizer.json")
    if not _has_processor(folder, task):
        raise UserError(f"has no {what} ({file}). Copy it there from the model it was made from.", where=str(folder))
    factory = transformers.AutoImageProcessor if image else transformers.AutoTokenizer
    options = {"backend": "pil"} if image else {}
    try:
        return factory.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise UserError(f"its {what} cannot be opened: {_one_line(error)}", where=str(folder)) from error


def _open(
    info: ModelInfo,
    folder: Path,
    task: str,
    dtype: str,
    attention: str,
    trust_remote_code: bool,
    names: tuple[str, ...],
    seed: int,
    notes: list[str],
) -> Any:
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    from luthier.models.heads import new_head, reorder_labels

    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise missing_extra("flash-attn", "attention: flash_attention_2", "flash-attn")
    if task in TOKEN_TASKS:
        names = ()
    elif task in NUMBER_TASKS:
        names = NUMBER_HEAD
    elif not names and info.task != task:
        raise UserError(f"has no head for {task}; give the class names, so that one can be made.", where=info.id)
    options: dict[str, Any] = {} if attention == "auto" else {"attn_implementation": attention}
    # A head saved with default names (LABEL_0, ...) serves classes that are themselves called 0, 1, ...
    unnamed = {str(i) for i in range(len(read_json(folder / "config.json").get("id2label") or ()))}
    keeps_head = (
        (task in NUMBER_TASKS and info.task == task)
        or not names
        or (info.task == task and set(names) == (set(info.labels) or unnamed))
    )
    if not keeps_head:
        options |= {
            "num_labels": len(names),
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "ignore_mismatched_sizes": True,
            "problem_type": "regression" if task in NUMBER_TASKS else None,
        }
    # Weights the checkpoint lacks are drawn here; the caller's random state stays as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init", "head"))
        try:
            model, loading = getattr(transformers, AUTO_CLASSES[task]).from_pretrained(
                folder,
                dtype=getattr(torch, "float32" if dtype == "auto" else dtype),
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                **options,
            )
        except (OSError, ValueError, ImportError, KeyError, RuntimeError, StrictDataclassError) as error:
            raise UserError(f"cannot be opened for {task}: {_one_line(error)}", where=info.id) from error
        _check_weights(model, loading, info, keeps_head, notes)
        if not keeps_head:
            new_head(model)
            made = "one number" if task in NUMBER_TASKS else f"{len(names)} classes"
            notes.append(f"a new {task} head for {made} was drawn at random")
        elif names and info.labels:
            reorder_labels(model, names)
    if (
        task in ("sequence-classification", "sequence-regression")
        and info.vocabulary
        and model.config.pad_token_id is None
    ):
        # transformers looks for the last token that is not padding, by id.
        eos = model.config.eos_token_id
        model.config.pad_token_id = eos[0] if isinstance(eos, list) else eos
    return model


def _check_weights(model: Any, loading: Any, info: ModelInfo, keeps_head: bool, notes: list[str]) -> None:
    """Absent or misshapen weights are an error, unless they belong to a head that is made new."""
    prefix = model.base_model_prefix + "."

    def is_body(name: str) -> bool:
        return keeps_head or (name.startswith(prefix) and ".pooler." not in name)

    if absent := sorted(filter(is_body, loading["missing_keys"])):
        raise UserError(
            f"its files lack {len(absent)} of the weights that {type(model).__name__} needs, such as '{absent[0]}'. "
            "Fetch or save the model again, or choose the task it was made for.",
            where=info.id,
        )
    if wrong := sorted(k for k, *_ in loading["mismatched_keys"] if is_body(k)):
        raise UserError(f"the shape of '{wrong[0]}' is not what config.json says.", where=info.id)
    if unused := sorted(k for k in loading["unexpected_keys"] if k.startswith(prefix)):
        notes.append(f"{len(unused)} stored tensors are not used by {type(model).__name__}, such as '{unused[0]}'")


def _open_adapter(model: Any, folder: Path, base: Path) -> Any:
    """The base with the adapter in it; every tensor of the adapter must find its place."""
    import peft

    from luthier.models import peft_types

    peft_types.ensure(str(read_json(folder / "adapter_config.json").get("peft_type")))
    stored = set(Shards(folder).names())
    recorded = read_json(p).get("base_fingerprint") if (p := folder / "luthier.json").is_file() else None
    if recorded and recorded != fingerprint(base):
        raise UserError(
            f"was trained on another state of its base {base}: the fingerprints differ. Restore that base, or name the "
            "right one as base_model_name_or_path in adapter_config.json.",
            where=str(folder),
        )
    try:
        adapted = peft.PeftModel.from_pretrained(model, folder)
    except (ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"the adapter does not fit its base {base}: {_one_line(error)}", where=str(folder)) from error
    wanted = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    # Embedding rows may be stored beside the adapter (peft does so when the vocabulary grew).
    lost = sorted((wanted - stored) | {k for k in stored - wanted if "embed" not in k and "lm_head" not in k})
    if lost:
        raise UserError(
            f"{len(lost)} tensors of the adapter and of the model do not match, such as '{lost[0]}'; it belongs to "
            "another base or peft version.",
            where=str(folder),
        )
    return adapted


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
