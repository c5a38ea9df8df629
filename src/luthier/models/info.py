"""What a model is, read from its configuration and the headers of its weights; no weight is loaded."""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from luthier.core.errors import UserError, did_you_mean
from luthier.core.registry import NUMBER_TASKS, TOKEN_TASKS
from luthier.core.store import cache_folder, content_hash, write_json
from luthier.models.shards import INDEX, SINGLE, Shards

TASKS = (
    "causal-lm",
    "sequence-classification",
    "sequence-regression",
    "token-classification",
    "image-classification",
    "masked-lm",
)
# How the architectures of transformers are named, by task.
_SUFFIXES = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForConditionalGeneration": "causal-lm",
    "ForMaskedLM": "masked-lm",
    "ForSequenceClassification": "sequence-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}
# Files below this size are hashed anew each time.
_SMALL = 1_000_000
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_MAX_LENGTH_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len")
_ROTARY_KEYS = ("rope_parameters", "rope_theta", "rope_scaling", "rotary_dim", "rotary_pct", "rotary_emb_base")
_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


@dataclass(frozen=True)
class ModelInfo:
    """A model as described by its files.

    Attributes:
        id: what the user wrote.
        folder: where its files are.
        model_type, architecture: from config.json (of the base, for an adapter).
        task: one of :data:`TASKS`, or None where the architecture names none of them.
        parameters: number of weights, tied ones counted once.
        bytes: size of the weights as stored.
        dtype: type most weights are stored in (``float32``, ``bfloat16``, ...).
        vocabulary: rows of the embedding by config.json; None for models without tokens.
        tokenizer_size: largest token id of tokenizer.json plus one; None when it cannot be told.
        max_length: positions the model was made for (the tokenizer's limit where smaller); None when unbounded.
        hidden, layers, heads, key_value_heads, intermediate: sizes of the transformer; 0 where config.json is silent.
        labels: names of the classes, in the order of the outputs; empty for other tasks and for default names.
        special_tokens: ids of ``bos``, ``eos``, ``pad``; eos may be a list.
        chat_template: whether the tokenizer has one.
        tied: whether input and output embeddings are one tensor.
        adapter: the adapter's type (``LORA``, ...) when the folder is an adapter; None otherwise.
        base: the adapter's base model.
        rotary: whether positions are rotations, which exist beyond ``max_length``, or a table that ends there.
    """

    id: str
    folder: Path
    model_type: str
    architecture: str
    task: str | None
    parameters: int
    bytes: int
    dtype: str
    vocabulary: int | None
    tokenizer_size: int | None
    max_length: int | None
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    labels: tuple[str, ...]
    special_tokens: dict[str, Any]
    chat_template: bool
    tied: bool
    adapter: str | None = None
    base: str | None = None
    rotary: bool = True

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return {**asdict(self), "folder": str(self.folder), "labels": list(self.labels)}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a model's folder.

    Raises:
        UserError: the file is no JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"is not valid JSON ({error}).", where=str(file)) from error
    if not isinstance(value, dict):
        raise UserError("must hold a JSON object.", where=str(file))
    return value


def resolve(spec: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a model: a folder, ``lab:<name>``, or a hub id (fetched into the hub's cache).

    Raises:
        UserError: no such folder, not a model folder, or the hub cannot give it.
    """
    text = str(spec)
    if text.startswith("lab:"):
        from luthier.lab import base

        return base(text.removeprefix("lab:"))
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            inner = sorted(p.parent.name for p in folder.glob("*/config.json"))
            hint = f" Did you mean {folder / inner[0]}?" if inner else ""
            raise UserError(
                f"is not a model folder: it has no config.json and no adapter_config.json.{hint}", where=text
            )
        return folder
    if folder.is_file():
        raise UserError("is a file; a model is a folder with config.json and safetensors.", where=text)
    looks_local = isinstance(spec, Path) or text.startswith((".", "/", "~")) or text.count("/") > 1
    if looks_local or not _HUB_ID.fullmatch(text):
        siblings = [p.name for p in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"no such model folder.{did_you_mean(folder.name, siblings)}", where=text)
    return _from_hub(text, revision)


def model_of(spec: str | Path) -> str | Path:
    """The model inside the folder of a run; anything else as it is."""
    inside = Path(spec).expanduser() / "model"
    held = any((inside / name).is_file() for name in ("config.json", "adapter_config.json"))
    return str(inside) if held else spec


def _from_hub(name: str, revision: str | None) -> Path:
    from huggingface_hub import constants, errors, snapshot_download

    place = f"model {name}"
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise UserError(
            "is neither a folder here nor a model on the hub (or it is private: log in with `hf auth login`).",
            where=place,
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"has no revision '{revision}' on the hub.", where=place) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, errors.HfHubHTTPError, OSError) as error:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub could not be reached"
        raise UserError(
            f"there is no folder of that name here, it is not in the hub's cache, and {why}. Give a folder, "
            "`lab:nano`, or fetch it where there is a network: hf download " + name,
            where=place,
        ) from error


def _config(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    # Vision-language and audio-language models keep the language model's sizes one level down.
    return {**config, **config.get("text_config", {}), "architectures": config.get("architectures")}


def _task(architecture: str) -> str | None:
    return next((task for suffix, task in _SUFFIXES.items() if architecture.endswith(suffix)), None)


def _labels(config: dict[str, Any]) -> tuple[str, ...]:
    mapping = config.get("id2label") or {}
    names = tuple(str(mapping[k]) for k in sorted(mapping, key=int))
    return () if all(re.fullmatch(r"LABEL_\d+", n) for n in names) else names


def _tokenizer_size(folder: Path) -> int | None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        return None
    content = read_json(file)
    vocabulary = content.get("model", {}).get("vocab", ())
    largest = max(vocabulary.values(), default=-1) if isinstance(vocabulary, dict) else len(vocabulary) - 1
    return max([largest, *(token["id"] for token in content.get("added_tokens") or ())]) + 1


def inspect(spec: str | Path, *, revision: str | None = None) -> ModelInfo:
    """Describe a model from config.json, tokenizer files and safetensors headers, without loading weights.

    Raises:
        UserError: there is no such model, or its files are not what they should be.
    """
    folder = resolve(spec, revision=revision)
    adapter = base = None
    config_folder = folder
    shards = Shards(folder)
    parameters, size = shards.numel, shards.nbytes
    if (folder / "adapter_config.json").is_file():
        settings = read_json(folder / "adapter_config.json")
        adapter, base = str(settings.get("peft_type")), str(adapter_base(folder))
        config_folder = resolve(base)
        shards = Shards(config_folder)
        parameters, size = parameters + shards.numel, size + shards.nbytes
    config = _config(config_folder)
    architecture = str((config.get("architectures") or ["unknown"])[0])
    tokens = read_json(p) if (p := folder / "tokenizer_config.json").is_file() else {}
    limits = [int(config[k]) for k in _MAX_LENGTH_KEYS if isinstance(config.get(k), int) and config[k] > 0][:1]
    if 0 < (limit := tokens.get("model_max_length") or 0) < 10**9:
        limits.append(int(limit))
    by_type: dict[str, int] = {}
    for info in shards.header.values():
        by_type[info.dtype] = by_type.get(info.dtype, 0) + info.numel
    stored = max(by_type, key=by_type.__getitem__, default="F32")
    task = _task(architecture)
    if task == "sequence-classification" and config.get("problem_type") == "regression":
        task = "sequence-regression"

    def size_of(*keys: str) -> int:
        value = next((config[k] for k in keys if config.get(k) is not None), 0)
        # Some architectures give one size per layer; the largest is what memory is for.
        value = max(value) if isinstance(value, list) and value else value
        if not isinstance(value, int):
            raise UserError(
                f"{keys[0]} must be a whole number, not {value!r}.", where=str(config_folder / "config.json")
            )
        return value

    heads = size_of("num_attention_heads", "n_head")
    return ModelInfo(
        id=str(spec),
        folder=folder,
        model_type=str(config.get("model_type", "unknown")),
        architecture=architecture,
        task=task,
        parameters=parameters,
        bytes=size,
        dtype=_DTYPES.get(stored, stored.lower()),
        vocabulary=config.get("vocab_size"),
        tokenizer_size=_tokenizer_size(folder) or _tokenizer_size(config_folder),
        max_length=min(limits, default=None),
        rotary=any(config.get(key) is not None for key in _ROTARY_KEYS),
        hidden=size_of("hidden_size", "n_embd", "d_model"),
        layers=size_of("num_hidden_layers", "n_layer"),
        heads=heads,
        key_value_heads=size_of("num_key_value_heads") or heads,
        intermediate=size_of("intermediate_size", "n_inner"),
        labels=() if task in (None, *TOKEN_TASKS, *NUMBER_TASKS) else _labels(config),
        special_tokens={k: config.get(f"{k}_token_id") for k in ("bos", "eos", "pad")},
        chat_template=bool(tokens.get("chat_template")) or (folder / "chat_template.jinja").is_file(),
        tied=bool(config.get("tie_word_embeddings", True)) and not any("lm_head" in n for n in shards.header),
        adapter=adapter,
        base=base,
    )


def base_folder(info: ModelInfo) -> Path:
    """Where config.json is: the model's folder, or that of an adapter's base."""
    return resolve(info.base) if info.base else info.folder


def adapter_base(folder: Path) -> str | Path:
    """The base of an adapter folder: as written, or relative to the adapter when such a folder is there.

    Raises:
        UserError: the adapter names no base.
    """
    named = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not named:
        raise UserError("names no base model (base_model_name_or_path).", where=str(folder / "adapter_config.json"))
    beside = folder / str(named)
    return beside if not Path(str(named)).is_absolute() and beside.is_dir() else str(named)


def fingerprint(folder: str | Path) -> str:
    """32 hexadecimal digits over the bytes of a model's weights, configuration and tokenizer.

    The folder's place and times do not count. The hash of each weight file is remembered under the cache folder by
    path, size, time and inode, because hashing gigabytes again for every run would be slow. An adapter's fingerprint
    covers its base.
    """
    folder = Path(folder)
    parts: list[Any] = []
    for file in sorted(p for p in folder.iterdir() if _counts(p)):
        parts += [file.name, _file_hash(file)]
    if (folder / "adapter_config.json").is_file():
        parts.append(fingerprint(resolve(adapter_base(folder))))
    return content_hash(*parts)


def known_fingerprint(folder: Path) -> str | None:
    """The fingerprint, where no large file has to be read for it because its hash is remembered; else None."""
    large = (p for p in folder.iterdir() if _counts(p) and p.stat().st_size >= _SMALL)
    return fingerprint(folder) if all(_remembered(p).is_file() for p in large) else None


def _counts(file: Path) -> bool:
    known = {"config.json", "adapter_config.json", INDEX, SINGLE, "vocab.json", "merges.txt", "vocab.txt"}
    return file.is_file() and (
        file.suffix in (".safetensors", ".jinja", ".model", ".tiktoken")
        or file.name in known
        or file.name.startswith(("tokenizer", "preprocessor", "special_tokens", "added_tokens"))
    )


def _remembered(file: Path) -> Path:
    status = file.stat()
    identity = [str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]
    return cache_folder() / "fingerprints" / f"{content_hash(identity)}.json"


def _file_hash(file: Path) -> str:
    if file.stat().st_size < _SMALL:
        return content_hash(file)
    remembered = _remembered(file)
    if remembered.is_file():
        return str(read_json(remembered)["hash"])
    value = content_hash(file)
    write_json(remembered, {"hash": value, "bytes": os.path.getsize(file)})
    return value
