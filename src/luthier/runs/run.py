"""One run from plan to folder: read, check, load, measure, train, merge, measure again, write.

What it leaves: ``recipe.yaml`` (resolved), ``manifest.json``, ``data.json``, ``metrics.jsonl``, ``checkpoints/``,
``model/``, ``evaluation.json``, ``samples.json``, ``report.html`` and ``README.md``.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from luthier.core.store import write_atomic, write_json
from luthier.engine.distributed import Processes
from luthier.runs import disk, setup
from luthier.runs.analyses import AnalysisContext
from luthier.runs.instruments import Instruments
from luthier.runs.workshop import Workshop, open_model


@dataclass
class Run:
    """A finished run.

    Attributes:
        folder: where everything is.
        model: the trained model, in memory.
        processor: its tokenizer or image processor.
        metrics: ``{"before": ..., "after": ..., "training": ...}``.
        tables: results of the recipe's analyses.
    """

    folder: Path
    model: Any = field(repr=False)
    processor: Any = field(repr=False)
    metrics: dict[str, Any] = field(repr=False)
    tables: list[Any] = field(default_factory=list, repr=False)

    def report(self) -> Path:
        """Write ``report.html`` anew from what the folder holds, and give its path."""
        from luthier.runs.report import write_report

        return write_report(self.folder)


def execute(
    plan: Any,
    *,
    resume: bool = False,
    quiet: bool = False,
    until: int | None = None,
    instruments: Instruments | None = None,
) -> Run:
    """Run a plan to its end.

    Args:
        plan: the plan.
        resume: continue the run in the output folder.
        quiet: show nothing.
        until: stop after this step with a checkpoint, as if asked to.
        instruments: what else to measure.

    Raises:
        Interrupted: stopped before the end, as asked.
        UserError: something in the recipe or the data; raised before weights are loaded wherever that is possible.
        LuthierError: training failed.
    """
    from luthier.models.load import inspect, load_processor
    from luthier.models.save import save
    from luthier.recipe.load import dump
    from luthier.runs.card import write_card
    from luthier.runs.manifest import finish_manifest, write_manifest

    started = time.perf_counter()
    setup.settings(plan)
    setup.require_tools(plan)
    recipe = plan.recipe
    info = inspect(recipe.model.id, revision=recipe.model.revision)
    task = recipe.model.task if recipe.model.task != "auto" else (info.task or "causal-lm")
    plan.facts.add(f"precision:{setup.precision(plan)}")
    plan.settle_task(task)
    folder = Path(recipe.output)
    training = recipe.training
    processes = Processes(training.sharding, trackers=training.trackers, folder=str(folder))
    say = Console(stderr=True, quiet=quiet or not processes.main).print
    if processes.main:
        disk.check_folder(plan, folder, resume=resume)
        if not resume:
            disk.check(plan, info)
    processor = load_processor(info.folder, task, recipe.model.trust_remote_code)
    with processes.accelerator.main_process_first():  # the others find the prepared files
        data = setup.load_data(plan, processor, task, folder=folder)
    loaded = open_model(plan, data.labels)
    for note in loaded.notes:
        say(note)
    shop = Workshop(
        plan,
        data,
        loaded,
        folder,
        processes=processes,
        resume=resume,
        quiet=quiet,
        until=until,
        instruments=instruments,
    )
    say(f"{len(data.train.prepared):,} rows, {int(data.train.prepared.lengths.sum()):,} tokens, {shop.precision}")
    if processes.main:
        # Written only now: a run that its data stops leaves nothing that a second try would have to delete.
        write_atomic(folder / "recipe.yaml", dump(recipe))
        write_json(folder / "data.json", data.report())
        write_manifest(folder, plan, loaded, data)
    evaluation_file = folder / "evaluation.json"
    known = json.loads(evaluation_file.read_text()) if resume and evaluation_file.exists() else {}
    before = known.get("before")
    if before is None and recipe.evaluation.before:
        say("measuring the base model")
        before = shop.evaluate(loaded.model)
        if shop.processes.main:
            write_json(evaluation_file, {"before": before})
    artefact = plan.procedure.build()(shop)
    model = artefact.model
    prompts = data.renderer.prompts(data.train.rows.dataset)
    if data.renderer.template and recipe.data.template:
        loaded.processor.chat_template = data.renderer.template  # so that whoever opens the model writes prompts alike
    if shop.processes.main:
        save(
            model,
            loaded.processor,  # a method may have added a token to it
            folder / "model",
            task=task,
            labels=data.labels,
            base_fingerprint=loaded.fingerprint,
            prompts=prompts,
        )
    if plan.weights:
        from luthier.runs.weights import apply_weights

        model = apply_weights(plan, shop, folder)
    for note in artefact.notes:
        say(note)
    say("measuring the trained model")
    shop.measure.kept = None if instruments is None else instruments.kept
    after = shop.evaluate(model)
    totals = {**artefact.metrics, "wall_seconds": time.perf_counter() - started}
    metrics = {
        "before": before,
        "after": after,
        "training": totals,
        "confidence": recipe.evaluation.confidence,
    }
    run = Run(folder=folder, model=model, processor=processor, metrics=metrics)
    if shop.processes.main:
        write_json(evaluation_file, metrics)
        finish_manifest(folder, artefact.notes, **totals)
        write_json(folder / "samples.json", shop.measure.samples(before, after))
        for choice in plan.analysis:
            run.tables.append(choice.build().run([run], AnalysisContext(shop)))
        if run.tables:
            write_json(folder / "analysis.json", [vars(t) for t in run.tables])
        run.report()
        write_card(folder)
    shop.processes.barrier()
    return run
