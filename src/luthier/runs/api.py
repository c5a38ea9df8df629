"""The public functions behind the command line and ``import luthier``."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.core import registry
from luthier.core.errors import UserError
from luthier.models.info import model_of, read_json
from luthier.runs.run import Run, execute
from luthier.runs.workshop import Workshop, open_model

__all__ = ["Run", "check", "evaluate", "generate", "merge", "plan_of", "prepare_data", "quickstart", "train", "tune"]


def plan_of(recipe: Any = None, /, *, overrides: Sequence[str] = (), **sections: Any) -> Any:
    """The plan of a recipe file, a mapping, or sections given as keywords (``model=..., data=..., objective=...``)."""
    from luthier.recipe.load import load
    from luthier.recipe.plan import plan

    if recipe is not None and sections and not isinstance(recipe, dict):
        raise UserError("give a recipe file with overrides, or the sections as keywords, not both.")
    source = {**(recipe if isinstance(recipe, dict) else {}), **sections} if recipe is None or sections else recipe
    return plan(load(source, list(overrides)))


def tune(
    recipe: str | Path | dict[str, Any] | None = None,
    /,
    *,
    overrides: Sequence[str] = (),
    resume: bool = False,
    quiet: bool = False,
    **sections: Any,
) -> Run:
    """Fine-tune a model: the Python form of ``luthier train``.

    Args:
        recipe: a recipe file or mapping; or leave it out and give sections.
        overrides: ``key.path=value`` as on the command line.
        resume: continue the run in the output folder.
        quiet: show no progress.
        sections: ``model``, ``data``, ``objective``, ``parameters``, ``transforms``, ``training``, ``output``, ...

    Returns:
        The run: ``.metrics``, ``.model``, ``.processor``, ``.folder``, ``.report()``.

    Raises:
        UserError: the recipe or the data is wrong.

    Example::

        run = luthier.tune(model="lab:nano", data="lab:arithmetic", objective="sft", parameters=["lora"])
        print(run.metrics["after"]["target"]["loss"])
    """
    return execute(plan_of(recipe, overrides=overrides, **sections), resume=resume, quiet=quiet)


def train(plan: Any, *, resume: bool = False, quiet: bool = False) -> Run:
    """Run a plan to its end."""
    return execute(plan, resume=resume, quiet=quiet)


def open_data(plan: Any, *, keep: bool = True, folder: Path | None = None) -> tuple[Any, Any, str]:
    """(data, model info, task) of a plan, without weights."""
    from luthier.models.load import inspect, load_processor
    from luthier.runs import setup

    recipe = plan.recipe
    info = inspect(recipe.model.id, revision=recipe.model.revision)
    task = recipe.model.task if recipe.model.task != "auto" else (info.task or "causal-lm")
    plan.settle_task(task)
    processor = load_processor(info.folder, task, recipe.model.trust_remote_code)
    return setup.load_data(plan, processor, task, folder=folder, keep=keep), info, task


def prepare_data(plan: Any) -> tuple[Any, Any, Any]:
    """(rows, renderer, prepared) of the training data, for looking at it."""
    data, _, _ = open_data(plan, keep=False)
    return data.train.rows, data.renderer, data.train.prepared


def planned(recipe: Any, overrides: Sequence[str] = ()) -> Any:
    """A plan as it is; anything else that names a recipe, or the folder of a run, planned."""
    from luthier.recipe.plan import Plan

    if isinstance(recipe, Plan):
        return recipe
    if isinstance(recipe, str | Path) and (Path(recipe) / "recipe.yaml").is_file():
        recipe = Path(recipe) / "recipe.yaml"
    return plan_of(recipe, overrides=overrides)


def check(recipe: Any, *, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that can fail, checked without training: the Python form of ``luthier check``.

    Args:
        recipe: a recipe file, a mapping, the folder of a run, or a plan.
        overrides: ``key.path=value`` as on the command line.

    Returns:
        ``{"task", "model", "data", "steps", "estimate", "methods", "notes"}``, JSON values.

    Raises:
        UserError: something would stop training.
    """
    from luthier.engine.order import DataOrder
    from luthier.models.estimate import estimate
    from luthier.runs import disk, setup

    plan = planned(recipe, overrides)
    folder = Path(plan.recipe.output)
    notes = []
    if (folder / "recipe.yaml").exists():
        notes.append(f"{folder} already holds a run: train goes on with it (--resume), or takes another output=...")
    else:
        disk.check_folder(plan, folder, resume=False)
    setup.require_tools(plan)
    data, info, task = open_data(plan)
    notes += [text for text in [setup.check_length(plan)] if text]
    stack = setup.build_stack(plan)
    training = plan.recipe.training
    order = DataOrder(
        data.train.prepared.lengths,
        seed=plan.recipe.seed,
        batch_rows=None if training.batch_tokens else training.batch_rows,
        batch_tokens=training.batch_tokens,
        buckets=training.buckets,
        oversample=stack.oversample,
    )
    steps = order.steps(training.epochs, training.max_steps)
    disk.check(plan, info)
    return {
        "task": task,
        "model": {"id": plan.recipe.model.id, "parameters": info.parameters, "max_length": info.max_length},
        "data": data.report(),
        "steps": steps,
        "estimate": estimate(info, plan, data.train.prepared, steps).to_dict(),
        "methods": plan.to_dict(),
        "notes": notes,
    }


def evaluate(
    recipe: Any,
    model_folder: str | Path | None = None,
    harness: Sequence[str] | None = None,
    *,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Measure a model on a recipe's test and keep data: the Python form of ``luthier evaluate``.

    Args:
        recipe: a recipe file, a mapping, the folder of a run, or a plan.
        model_folder: the model to measure; by default the run's ``model`` folder if there is one, else the base.
        harness: tasks of lm-evaluation-harness to run as well.
        overrides: ``key.path=value`` as on the command line.

    Returns:
        ``{"model", "target", "keep", "calibration", "items"}``; with ``harness`` its results; and ``notes``, where the
        run of the model left some.
    """
    from luthier.models.load import load
    from luthier.runs import setup

    plan = planned(recipe, overrides)
    setup.settings(plan)
    setup.require_tools(plan)
    if harness:
        from luthier.evaluation.harness import require

        require()
    data, _, task = open_data(plan)
    trained = Path(plan.recipe.output) / "model"
    spec = model_folder or (trained if trained.exists() else None)
    loaded = open_model(plan, data.labels) if spec is None else load(spec, task=task, labels=data.labels or None)
    shop = Workshop(plan, data, loaded, Path(plan.recipe.output))
    found = {"model": str(spec or plan.recipe.model.id), **shop.evaluate(loaded.model)}
    manifest = Path(spec).parent / "manifest.json" if spec is not None else None
    if manifest is not None and manifest.is_file() and (notes := read_json(manifest).get("notes")):
        found["notes"] = notes
    if harness:
        from luthier.evaluation.harness import run_harness

        found["harness"] = run_harness(loaded.model, loaded.processor, list(harness))
    return found


def generate(
    model: str | Path,
    prompts: Sequence[str | list[dict[str, Any]]],
    *,
    decoding: str = "greedy",
    options: dict[str, Any] | None = None,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> list[str]:
    """Completions of a model, one per prompt: the Python form of ``luthier generate``.

    Prompts are written as in training: a model that Luthier trained on question and answer puts the same line break
    between the two, and the same system message before them.

    Args:
        model: the folder of a run or of a model, a hub id, or ``lab:nano``.
        prompts: each a text, or a list of messages ``{"role", "content"}``.
        decoding: a decoding method.
        options: its options.
        max_new_tokens: the longest answer, in tokens.
        seed: seed of what a sampling method draws.

    Raises:
        UserError: no such model, or one that does not write text.
    """
    from luthier.data.render import Renderer
    from luthier.engine.stack import Setup
    from luthier.models.load import inspect, load
    from luthier.models.save import prompts_of
    from luthier.runs import setup

    setup.quieten()
    model = model_of(model)
    task = inspect(model).task
    if task not in (None, "causal-lm"):
        raise UserError(f"is a model for {task}, which does not write text.", where=str(model))
    loaded = load(model, task="causal-lm")
    written = prompts_of(loaded.folder)
    separator = written.pop("separator", None)
    renderer = Renderer(loaded.processor, task="causal-lm", **written)
    decoder = registry.get("decoding", decoding).build({"max_new_tokens": max_new_tokens, **(options or {})})
    ids = [renderer.prompt_ids(prompt_row(p, separator)) for p in prompts]
    context = Setup(seed=seed, task="causal-lm", processor=loaded.processor, device=loaded.model.device)
    return [c.text for c in decoder.generate(loaded.model, ids, context)]


def merge(
    models: str | Path | Sequence[str | Path],
    folder: str | Path,
    *,
    op: str | dict[str, Any] | Sequence[str | dict[str, Any]] | None = None,
    base: str | Path | None = None,
    dtype: str | None = None,
    rows: Any = None,
    quiet: bool = True,
) -> Any:
    """Merge an adapter into its base, or several models into one: the Python form of ``luthier merge``.

    Without ``op`` the one adapter given is merged into its base. With it the weight operations are run over the models,
    as under ``weights`` in a recipe; adapters among them are merged first.

    Args:
        models: the folder of a run or of a model, or several; or a YAML file with models, base and weights.
        folder: where the merged model goes.
        op: a weight operation by name, ``{name: options}``, or a list of these.
        base: what the models were fine-tuned from, for operations on the change.
        dtype: type of the merged weights; by default float32 for an adapter, for models as they are stored.
        rows: a recipe on whose data an operation chooses (greedy soups, the alpha of LiNeS).
        quiet: show no progress.

    Returns:
        :class:`luthier.models.merge.MergeReport` for an adapter: how far the merged model's logits are from its own;
        :class:`luthier.runs.merging.Merged` for models.

    Raises:
        UserError: no adapter in the folder, or models that do not fit together; names the tensor or file.
        LuthierError: the merged model answers differently from the adapter; nothing is written.

    Example::

        luthier.merge(["runs/a", "runs/b"], "merged", op={"ties": {"density": 0.2}}, base="lab:nano")
    """
    from luthier.runs import merging, setup

    setup.quieten()
    several = [models] if isinstance(models, str | Path) else list(models)
    if len(several) == 1 and Path(several[0]).suffix in (".yaml", ".yml"):
        if op is not None or base is not None or rows is not None:
            raise UserError("a YAML file says all that is to be merged; give no operation, base or rows beside it.")
        given = merging.read_recipe(Path(several[0]))
        return merging.merge_models(folder=folder, quiet=quiet, **{**given, **({"dtype": dtype} if dtype else {})})
    if op is not None:
        weights = [op] if isinstance(op, str | dict) else list(op)
        return merging.merge_models(several, folder, weights, base=base, dtype=dtype, rows=rows, quiet=quiet)
    if len(several) != 1:
        known = ", ".join(registry.names("weights"))
        raise UserError(f"{len(several)} models without an operation to combine them. Operations: {known}.")
    from luthier.models.merge import merge as run

    return run(model_of(several[0]), folder, dtype=dtype or "float32")


def prompt_row(prompt: str | list[dict[str, Any]], separator: str | None = None) -> dict[str, Any]:
    """A canonical row with a prompt and nothing to learn."""
    import json

    if isinstance(prompt, str):
        return {"kind": "pair", "prompt": prompt, "completion": "", "separator": separator}
    return {"kind": "chat", "messages": json.dumps([*prompt, {"role": "assistant", "content": ""}])}


QUICKSTART: dict[str, dict[str, Any]] = {
    "sft": {},
    "half-ft": {"parameters": ["half-ft"]},
    "beyond-log-likelihood": {"objective": "beyond-log-likelihood"},
}


QUICKSTART_DATA = "lab:strings?skill=first,last&difficulty=2"


def quickstart(folder: str | Path = "runs/quickstart", *, quiet: bool = False) -> dict[str, Any]:
    """Build the lab base, fine-tune it three ways and compare.

    Returns:
        ``{"runs": {method: metrics}, "report": path of the plain run's report}``.
    """
    folder = Path(folder)
    if folder.exists():
        other = [p.name for p in folder.iterdir() if not (p / "recipe.yaml").is_file()] if folder.is_dir() else [""]
        if other:  # the old runs are deleted, so nothing else may be in there
            raise UserError(f"'{folder}' holds something else ('{other[0]}'); name a new folder.")
        shutil.rmtree(folder)
    runs: dict[str, Any] = {}
    for name, sections in QUICKSTART.items():
        run = tune(
            {
                "model": "lab:nano",
                "data": {"train": QUICKSTART_DATA, "test": QUICKSTART_DATA, "limit": 2000},
                "training": {"learning_rate": 1e-3, "batch_rows": 16, "epochs": 4, "log_steps": 20, "threads": 1},
                "evaluation": {"max_new_tokens": 32, "limit": 200},
                "output": str(folder / name),
                **sections,
            },
            quiet=quiet,
        )
        runs[name] = run.metrics
    return {"runs": runs, "report": str(folder / "sft" / "report.html")}
