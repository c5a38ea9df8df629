"""The lab's pretrained bases: made here on two CPU cores by the engine, measured, and kept in the user's cache.

A base is neither ignorant nor finished: its competence per task sits inside a stated window, so that fine-tuning it
has something to gain (hard arithmetic, long strings, new people) and something to lose (everything it was taught).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from luthier import lab
from luthier.core.errors import LuthierError, UserError, did_you_mean
from luthier.core.rng import derive_seed
from luthier.core.store import atomic_folder, cache_folder, content_hash, write_json

SEEDS = (0, 1, 2)
COMPETENCE = "competence.json"
# Files other than a base's data that decide what it becomes.
_SHARED = ("drawing", "words")
# Set by launchers of several processes; the making of a base is one process of its own.
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Probe:
    """One measured ability.

    Attributes:
        task: the lab task whose test rows are asked.
        options: its options.
        low, high: the window in which the share of right answers must lie.
        n: how many rows.
    """

    task: str
    options: Mapping[str, Any]
    low: float
    high: float
    n: int = 200


@dataclass(frozen=True)
class Making:
    """How a base is made.

    Attributes:
        task: what it is used for.
        config: sizes of its transformer.
        data: the rows it is trained on.
        files: the files of the lab that these rows come from.
        training: the recipe's ``training`` section.
        probes: what is measured, by name.
        about: parameters and time, for people.
    """

    task: str
    config: Mapping[str, Any]
    data: str | tuple[str, ...]
    files: tuple[str, ...]
    training: Mapping[str, Any]
    probes: Mapping[str, Probe]
    about: str
    version: int = 1  # raised when the same description gives another model (a change of the engine's numbers)
    seeds: tuple[int, ...] = field(default=SEEDS)


_TEXT_FILES = ("mixture", "tokenizer", "arithmetic", "facts", "sentences", "strings", "text")
_EASY_STRINGS = {"difficulty": "1", "skill": "uppercase,count,first,last,reverse"}
_EASY_SUMS = {"difficulty": "1", "skill": "add,subtract,chain"}


def _probes(low: float, high: float) -> dict[str, Probe]:
    """The abilities of a text base; ``low`` and ``high`` bound those it is in the middle of learning."""
    return {
        "easy arithmetic": Probe("arithmetic", _EASY_SUMS, low, high),
        "easy strings": Probe("strings", _EASY_STRINGS, low, high),
        "facts of known people": Probe("facts", {"people": "known"}, low, high),
        "stories": Probe("text", {"layout": "pair"}, 0.4, 1.0, 60),
        "feelings": Probe("sentences", {"layout": "pair", "difficulty": "1,2"}, 0.55, 1.0, 60),
        "two-digit arithmetic": Probe("arithmetic", {"difficulty": "2"}, 0.0, 0.2, 120),
        "three-digit arithmetic": Probe("arithmetic", {"difficulty": "3"}, 0.0, 0.1, 60),
        "long strings": Probe("strings", {"difficulty": "2"}, 0.0, 0.4, 120),
        "facts of new people": Probe("facts", {"people": "new"}, 0.0, 0.3, 120),
    }


MAKINGS: dict[str, Making] = {
    "nano": Making(
        task="causal-lm",
        config={"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 192},
        data="lab:mixture?n=25000",
        files=_TEXT_FILES,
        training={"learning_rate": 3e-3, "batch_tokens": 160, "warmup": 0.05, "beta2": 0.99, "threads": 1},
        probes=_probes(0.25, 0.85),
        about="0.2M parameters, half a minute",
    ),
    "small": Making(
        task="causal-lm",
        config={"hidden_size": 160, "num_hidden_layers": 6, "num_attention_heads": 5, "intermediate_size": 432},
        data="lab:mixture?n=80000",
        files=_TEXT_FILES,
        training={"learning_rate": 1.5e-3, "batch_tokens": 320, "warmup": 0.05, "beta2": 0.99, "threads": 1},
        probes=_probes(0.35, 0.97),
        about="2M parameters, some five minutes",
    ),
    "encoder-nano": Making(
        task="masked-lm",
        config={"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128},
        data=("lab:text?n=8000", "lab:sentences?n=4000"),
        files=("tokenizer", "sentences", "text"),
        training={"learning_rate": 2e-3, "batch_rows": 32, "warmup": 0.1, "epochs": 2, "threads": 1},
        probes={
            "stories of one sentence filled in": Probe("text", {"difficulty": "1"}, 0.4, 0.97),
            "stories of three sentences filled in": Probe("text", {"difficulty": "3"}, 0.3, 0.97),
        },
        about="0.2M parameters, half a minute",
    ),
    "vision-nano": Making(
        task="image-classification",
        config={"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 96},
        data="lab:pictures?n=6000&difficulty=1",
        files=("pictures",),
        training={"learning_rate": 2e-3, "batch_rows": 32, "warmup": 0.1, "epochs": 1.5, "threads": 1},
        probes={
            "clean shapes": Probe("pictures", {"difficulty": "1"}, 0.6, 1.0),
            "shapes in some noise": Probe("pictures", {"difficulty": "2"}, 0.3, 0.85),
            "shapes in strong noise": Probe("pictures", {"difficulty": "3"}, 0.2, 0.7),
        },
        about="0.1M parameters, some seconds",
    ),
}


def _making(name: str) -> Making:
    if name not in MAKINGS:
        raise UserError(
            f"there is no lab base '{name}'.{did_you_mean(name, MAKINGS)} Accepted: "
            f"{', '.join(f'lab:{known}' for known in MAKINGS)}."
        )
    return MAKINGS[name]


@cache
def _key(name: str) -> str:
    making = _making(name)
    here = Path(__file__).parent
    return content_hash(asdict(making), *(here / f"{file}.py" for file in (*_SHARED, *making.files)))[:16]


def folder(name: str) -> Path:
    """Where the base lives in the user's cache (it may not exist yet)."""
    return cache_folder() / "lab" / f"{name}-{_key(name)}"


def base(name: str = "nano", *, refresh: bool = False, progress: bool = True) -> Path:
    """The folder of a lab base, in plain transformers format; made on first use.

    Several processes may ask at once: one makes it, the others wait.

    Args:
        name: ``nano`` (about 0.2M parameters), ``small`` (about 2M), ``encoder-nano`` or ``vision-nano``.
        refresh: make it again.
        progress: say on stderr what is being made.

    Raises:
        UserError: no such base.
        LuthierError: its making failed, or its competence lies outside the stated window.
    """
    import filelock

    making, target = _making(name), folder(name)
    if target.exists() and not refresh:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(str(target) + ".lock"):
        if target.exists() and not refresh:
            return target
        if progress:
            print(f"making lab:{name} ({making.about}), once; it stays in {target}", file=sys.stderr)
        with atomic_folder(target) as aside:
            _in_own_process(name, aside, progress)
    return target


def competence(name: str = "nano") -> dict[str, Any]:
    """What a base can do: ability -> ``{"value", "n", "low", "high", "task", "options"}``, shares of right answers."""
    found: dict[str, Any] = json.loads((base(name) / COMPETENCE).read_text(encoding="utf-8"))
    return found


def _in_own_process(name: str, target: Path, progress: bool) -> None:
    """Make the base in a process of its own, so that its threads, device and random state disturb nobody's."""
    environment = {key: value for key, value in os.environ.items() if key not in _LAUNCHER}
    root = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    environment["CUDA_VISIBLE_DEVICES"] = ""  # the bases are the CPU's on every machine
    # Prepared rows of the making are of no use afterwards, so they do not go to the user's cache.
    with tempfile.TemporaryDirectory(prefix=".cache-", dir=target.parent) as own:
        done = subprocess.run(
            [sys.executable, "-m", "luthier.lab.bases", name, str(target)],
            env={**environment, "LUTHIER_CACHE": own},
            stdout=subprocess.PIPE,
            stderr=None if progress else subprocess.PIPE,
            text=True,
            check=False,
        )
    if done.returncode:
        last = (done.stderr or "its messages are above").strip().splitlines()[-1:]
        raise LuthierError(f"lab:{name} could not be made: {' '.join(last)}")


def fresh(name: str, target: Path, seed: int) -> None:
    """Write the untrained model of a base, a function of the seed, with its tokenizer or image processor."""
    import torch

    from luthier.models.save import save

    making = _making(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "init", name))
        model, processor = _UNTRAINED[making.task](making)
    save(model, processor, target)


def _untrained_text(making: Making) -> tuple[Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier.lab.tokenizer import tokenizer

    words = tokenizer()
    config = LlamaConfig(
        vocab_size=len(words),
        max_position_embeddings=words.model_max_length,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},  # rows are short
        initializer_range=0.04,
        tie_word_embeddings=True,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        **making.config,
    )
    return LlamaForCausalLM(config), words


def _untrained_vision(making: Making) -> tuple[Any, Any]:
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    from luthier.lab.pictures import SHAPES, SIZE

    labels = sorted(SHAPES)
    config = ViTConfig(
        image_size=SIZE,
        patch_size=4,
        initializer_range=0.04,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
        **making.config,
    )
    processor = ViTImageProcessorPil(
        size={"height": SIZE, "width": SIZE}, do_resize=True, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return ViTForImageClassification(config), processor


def _untrained_encoder(making: Making) -> tuple[Any, Any]:
    from transformers import BertConfig, BertForMaskedLM

    from luthier.lab.tokenizer import tokenizer

    words = tokenizer()
    config = BertConfig(
        vocab_size=len(words),
        max_position_embeddings=words.model_max_length,
        initializer_range=0.04,
        type_vocab_size=1,
        pad_token_id=words.pad_token_id,
        **making.config,
    )
    return BertForMaskedLM(config), words


_UNTRAINED = {
    "causal-lm": _untrained_text,
    "masked-lm": _untrained_encoder,
    "image-classification": _untrained_vision,
}


def make(name: str, target: Path) -> None:
    """Train a base through the engine into an empty folder, with the first seed that meets the windows.

    Raises:
        LuthierError: no seed does.
    """
    making = _making(name)
    outside: list[str] = []
    for seed in making.seeds:
        with tempfile.TemporaryDirectory(prefix=".making-", dir=target.parent) as scratch:
            model = _train(name, Path(scratch), seed)
            found = measure(name, model)
            outside = [k for k, v in found.items() if not v["low"] <= v["value"] <= v["high"]]
            if not outside:
                shutil.copytree(model, target, dirs_exist_ok=True)
                write_json(target / COMPETENCE, found)
                return
        print(f"seed {seed}: outside the window: {', '.join(outside)}", file=sys.stderr)
    raise LuthierError(f"its competence lies outside the stated window: {', '.join(outside)}.")


def _train(name: str, scratch: Path, seed: int) -> Path:
    from luthier.recipe.load import load
    from luthier.recipe.plan import plan
    from luthier.runs import api

    making = _making(name)
    fresh(name, scratch / "fresh", seed)
    recipe = {
        "model": {"id": str(scratch / "fresh"), "task": making.task},
        "data": {"train": making.data if isinstance(making.data, str) else list(making.data), "keep": "none"},
        "training": {"precision": "fp32", "log_steps": 50, **making.training},
        "evaluation": {"before": False, "generate": False, "calibration": False},
        "output": str(scratch / "run"),
        "seed": seed,
    }
    return Path(api.train(plan(load(recipe))).folder) / "model"


def measure(name: str, model: Path) -> dict[str, Any]:
    """The competence of a model folder on a base's probes over test rows.

    What is judged: greedy answers, the likeliest class, or a text some of whose tokens were hidden, filled in again.
    """
    making = _making(name)
    rows = {key: lab.dataset(p.task, split="test", n=p.n, **p.options) for key, p in making.probes.items()}
    asked = [row for some in rows.values() for row in some]
    answers = iter(_ANSWERS[making.task](model, asked))
    found = {}
    for key, probe in making.probes.items():
        right = [lab.verify(probe.task, row, next(answers)) for row in rows[key]]
        found[key] = {**asdict(probe), "value": sum(right) / len(right), "n": len(right)}
    return found


def _generated(model: Path, rows: list[lab.Row]) -> list[str]:
    from luthier.runs import api

    return api.generate(model, [row["prompt"] for row in rows], max_new_tokens=48)


def _classified(model: Path, rows: list[lab.Row]) -> list[str]:
    import torch

    from luthier.models.load import load
    from luthier.tasks import get_task

    loaded = load(model, task="image-classification")
    names = loaded.model.config.id2label
    task = get_task("image-classification", loaded.processor)
    batch = task.collate({"image": [row["image"] for row in rows], "label": [0] * len(rows)}, range(len(rows)))
    with torch.no_grad():
        logits_BV = loaded.model.eval()(**batch.inputs).logits
    return [names[i] for i in logits_BV.argmax(-1).tolist()]


def _filled(model: Path, rows: list[lab.Row]) -> list[str]:
    import torch

    from luthier.functional.replaced_tokens import put
    from luthier.models.load import load
    from luthier.tasks import get_task

    loaded = load(model, task="masked-lm")
    ids = [loaded.processor(row["text"], return_tensors="np")["input_ids"][0] for row in rows]
    batch = get_task("masked-lm", loaded.processor).collate({"input_ids": ids}, range(len(rows)))
    with torch.no_grad():
        best_BT = loaded.model.eval()(**batch.inputs).logits.argmax(-1)
    filled_BT = put(batch.inputs["input_ids"], batch.position_N, best_BT.view(-1)[batch.position_N])
    written: list[str] = loaded.processor.batch_decode(filled_BT, skip_special_tokens=True)
    return written


_ANSWERS = {"causal-lm": _generated, "masked-lm": _filled, "image-classification": _classified}


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
