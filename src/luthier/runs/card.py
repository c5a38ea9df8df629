"""The model card: ``README.md`` of a run, and beside the weights, written from what was measured.

Texts that come from the recipe, the data or a model's name are escaped, so that they cannot become markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from luthier.core.store import write_atomic
from luthier.models.info import read_json
from luthier.models.save import prompts_of

_PIPELINES = {
    "causal-lm": "text-generation",
    "masked-lm": "fill-mask",
    "sequence-classification": "text-classification",
    "sequence-regression": "text-classification",
    "token-classification": "token-classification",
    "image-classification": "image-classification",
}
_CLASSES = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "sequence-regression": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def write_card(folder: str | Path) -> Path:
    """Write ``README.md`` into a run's folder, and into its ``model`` folder if there is one.

    Args:
        folder: the run's folder with manifest.json, and evaluation.json and recipe.yaml if they were written.

    Returns:
        The card of the run.
    """
    folder = Path(folder)
    text = card(folder)
    if (folder / "model").is_dir():
        write_atomic(folder / "model" / "README.md", text)
    write_atomic(folder / "README.md", text)
    return folder / "README.md"


def card(folder: Path) -> str:
    """The card's text."""
    from luthier.runs import verdict as judging
    from luthier.runs.report import short_name

    manifest = read_json(folder / "manifest.json")
    evaluation = read_json(p) if (p := folder / "evaluation.json").is_file() else {}
    evaluation = judging.with_paired_changes(evaluation)
    recipe = p.read_text(encoding="utf-8") if (p := folder / "recipe.yaml").is_file() else ""
    model = manifest.get("model") or {}
    task, base = str(model.get("task", "")), short_name(str(model.get("id", "unknown")))
    adapter = (folder / "model" / "adapter_config.json").is_file()
    judged = judging.verdict(evaluation)
    parts = [
        front_matter(base, task, adapter=adapter),
        f"# {plain(folder.resolve().name)}",
        f"{plain(base)}, fine-tuned with Luthier: {plain(_methods(manifest))}.",
        f"**{judged.headline}**",
        "\n".join(f"- {plain(c.sentence)}" for c in judged.cards),
        "\n".join(f"- {plain(note)}" for note in manifest.get("notes") or ()),
        _results(evaluation),
        f"## How to use\n\n{fenced(usage(task, base, folder / 'model', adapter=adapter), 'python')}",
        f"## How it was made\n\n{_making(base, manifest, evaluation)}",
        f"The resolved recipe; `luthier train recipe.yaml` runs it again.\n\n{fenced(recipe, 'yaml')}"
        if recipe
        else "",
        "## Limits\n\nThe numbers above were measured on the data of the recipe and say nothing about other uses. "
        "What the base model cannot do or gets wrong, this model inherits unless the table shows otherwise.",
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def plain(text: Any) -> str:
    """Text that Markdown and HTML show as it is, on one line."""
    one_line = re.sub(r"\s+", " ", str(text)).strip()
    return re.sub(r"([\\`*_\[\]|#])", r"\\\1", escape(one_line, quote=False))


def fenced(text: str, language: str) -> str:
    """A code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def front_matter(base: str, task: str, *, adapter: bool = False) -> str:
    """What the hub reads of a card."""
    lines = ["---", f"library_name: {'peft' if adapter else 'transformers'}"]
    if task in _PIPELINES:
        lines.append(f"pipeline_tag: {_PIPELINES[task]}")
    if _HUB_ID.fullmatch(base):
        # JSON text is YAML text, whatever is in it.
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join([*lines, "tags:", "- luthier", "---"])


def _methods(manifest: Mapping[str, Any]) -> str:
    shown = [k for k in manifest.get("methods") or {} if not k.startswith(("decoding:", "reward:", "procedure:sft"))]
    return ", ".join(f"{axis} {slug}" for axis, _, slug in (k.partition(":") for k in shown)) or "plain SFT"


def _results(evaluation: Mapping[str, Any]) -> str:
    from luthier.runs import verdict as judging

    rows = []
    titles = {"target": "Target", "keep": "General ability", "calibration": "Calibration"}
    for group, title in titles.items():
        for change in judging.changes(evaluation, group):
            unit, before = change.unit, change.before or {}
            cells = [
                title,
                change.label,
                _with_interval(judging.text(before.get("value"), unit), judging.interval(before, unit)),
                _with_interval(judging.text(change.after.get("value"), unit), judging.interval(change.after, unit)),
                _with_interval(
                    judging.text(change.value, unit, signed=True), judging.interval(change, unit, signed=True)
                ),
                f"{int(n):,}" if (n := judging.number(change.after.get("n"))) is not None else "–",
            ]
            rows.append("| " + " | ".join(plain(c) for c in cells) + " |")
    if not rows:
        return ""
    head = "| | Metric | Before | After | Change | n |\n|---|---|---|---|---|---|\n"
    return f"## Results\n\nIn brackets: confidence intervals.\n\n{head}" + "\n".join(rows)


def _with_interval(value: str, span: str) -> str:
    return f"{value} ({span})" if span else value


def usage(task: str, base: str, model: Path, *, adapter: bool = False, name: str = "model") -> str:
    """Python that opens the model and asks it something; ``name`` is what its folder is called in the end."""
    place = json.dumps(name)
    opener = _CLASSES.get(task, "AutoModel")
    image = task == "image-classification"
    processor = "AutoImageProcessor" if image else "AutoTokenizer"
    options = ', backend="pil"' if image else ""
    if adapter:
        opening = (
            f"from peft import PeftModel\nfrom transformers import {opener}, {processor}\n\n"
            f"base = {opener}.from_pretrained({json.dumps(base)})  # a hub id, or the folder of the base\n"
            f"model = PeftModel.from_pretrained(base, {place})\n"
        )
    else:
        opening = f"from transformers import {opener}, {processor}\n\nmodel = {opener}.from_pretrained({place})\n"
    opening += f"processor = {processor}.from_pretrained({place}{options})\n"
    if task == "causal-lm":
        # As in training: with the chat template, or with what stands between prompt and answer.
        if (model / "chat_template.jinja").is_file() and prompts_of(model).get("template") != "none":
            inputs = (
                'messages = [{"role": "user", "content": "Your prompt"}]\n'
                "inputs = processor.apply_chat_template(\n"
                '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"\n)\n'
            )
        else:
            prompt = json.dumps("Your prompt" + prompts_of(model).get("separator", ""))
            inputs = f'inputs = processor({prompt}, return_tensors="pt")\n'
        return opening + inputs + ("print(processor.decode(model.generate(**inputs, max_new_tokens=64)[0]))")
    given = 'images=[image], return_tensors="pt"' if image else '"Your text", return_tensors="pt"'
    return opening + f"scores = model(**processor({given})).logits.softmax(-1)\nprint(model.config.id2label, scores)"


def _making(base: str, manifest: Mapping[str, Any], evaluation: Mapping[str, Any]) -> str:
    model, hardware = manifest.get("model") or {}, manifest.get("hardware") or {}
    versions = manifest.get("versions") or {}
    training = {**(evaluation.get("training") or {}), **(manifest.get("result") or {})}
    facts = [
        ("Base", f"{base} ({model.get('parameters', 0):,} weights, fingerprint {model.get('fingerprint')})"),
        *(
            (f"Data, {name}", f"{source.get('rows', 0):,} rows, fingerprint {source.get('fingerprint')}")
            for name, source in (manifest.get("data") or {}).items()
            if isinstance(source, Mapping)
        ),
        ("Steps", f"{training['steps']:,}" if training.get("steps") else ""),
        ("Tokens", f"{training['tokens']:,.0f}" if training.get("tokens") else ""),
        ("Seed", manifest.get("seed")),
        ("Hardware", hardware.get("processor")),
        ("Versions", ", ".join(f"{k} {v}" for k, v in versions.items())),
    ]
    return "\n".join(f"- {plain(name)}: {plain(value)}" for name, value in facts if value not in (None, ""))
