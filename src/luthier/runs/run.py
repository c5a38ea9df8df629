"""One run from plan to folder: read, check, load, measure, train, merge, measure again, write.

What it leaves: ``recipe.yaml`` (resolved), ``manifest.json``, ``data.json``, ``metrics.jsonl``, ``checkpoints/``,
``model/``, ``evaluation.json``, ``samples.json``, ``report.html`` and ``README.md``.
"""

from __future__ import annotations

import copy
import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from luthier.core import registry
from luthier.core.errors import UserError
from luthier.core.protocols import Artefact, Completion
from luthier.core.registry import TOKEN_TASKS
from luthier.core.store import write_atomic, write_json
from luthier.data.prepare import prepare
from luthier.engine.distributed import Processes
from luthier.functional.tying import is_tied
from luthier.runs import disk, setup
from luthier.runs.analyses import AnalysisContext
from luthier.runs.measure import Measure, quick_loss
from luthier.runs.progress import TrainProgress
from luthier.tasks import get_task


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


class Workshop:
    """The context of a procedure: its data, and the calls a procedure is built from.

    Args:
        plan: the plan, its task settled.
        data: the prepared data.
        loaded: the base model.
        folder: the run's folder.
        processes: the process group.
        resume: continue from the newest checkpoint.
        quiet: show nothing.
    """

    def __init__(
        self,
        plan: Any,
        data: setup.Data,
        loaded: Any,
        folder: Path,
        *,
        processes: Processes | None = None,
        resume: bool = False,
        quiet: bool = True,
    ) -> None:
        self.plan, self.data, self.loaded, self.folder = plan, data, loaded, folder
        self.resume, self.quiet = resume, quiet
        self.processes = processes or Processes(plan.recipe.training.sharding)
        self.precision = setup.precision(plan)
        self.decoder = _decoder(plan)
        self.measure = Measure(plan, data, self.decoder)
        self.seed: int = plan.recipe.seed
        self.trainings = 0
        self.tied = is_tied(loaded.model)
        if plan.task == "causal-lm":
            # Generation ends where the rendered answers end, here and in whatever opens the saved model.
            own = loaded.model.generation_config.eos_token_id
            known = [own] if isinstance(own, int) else list(own or [])
            stops = list(dict.fromkeys([*known, *data.renderer.stop_ids]))
            loaded.model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops or None

    # -- sessions

    def _decode(
        self, session: Any, prompts: Any, *, samples: int = 1, decoding: str | None = None, **options: Any
    ) -> list[list[Completion]]:
        ids = [self.data.renderer.prompt_ids(p) if isinstance(p, dict) else list(p) for p in prompts]
        decoder = self.decoder
        if decoding is not None:
            decoder = registry.get("decoding", decoding).build(options)
        elif options:
            decoder = self.plan.decoding.method.build({**self.plan.decoding.options, **options})
        found = decoder.generate(session.model, [p for p in ids for _ in range(samples)], session)
        return [found[i : i + samples] for i in range(0, len(found), samples)]

    def _render(self, rows: Any) -> Any:
        """A batch of canonical rows, rendered as the training rows are."""
        rendered = self.data.renderer.render_batch(rows)
        columns = {
            "input_ids": [np.asarray(r.input_ids, dtype=np.int32) for r in rendered],
            "spans": [np.asarray(r.spans, dtype=np.int32).reshape(-1) for r in rendered],
        }
        return get_task(self.plan.task, self.loaded.processor).collate(columns, range(len(rendered)))

    def session(self, model: Any, stack: Any = None, *, seed: int | None = None) -> Any:
        """A session over a model; without methods it serves evaluation alone."""
        from luthier.engine.session import Session
        from luthier.engine.stack import Stack
        from luthier.methods.objectives.sft import SupervisedFineTuning

        training = self.plan.recipe.training
        return Session(
            model=model,
            task=get_task(self.plan.task, self.loaded.processor),
            processor=self.loaded.processor,
            stack=stack or Stack(objective=SupervisedFineTuning()),
            processes=self.processes,
            seed=self.seed if seed is None else seed,
            precision=self.precision,
            head_chunk=training.head_chunk,
            head_backend=training.head,
            fingerprint=self.loaded.fingerprint,
            decode=self._decode,
            render=self._render,
            wrap=stack is not None,
        )

    # -- the calls of a procedure

    def source(self, rows: Any, name: str) -> setup.Source:
        """Canonical rows (a ``Dataset``) made by a procedure, rendered and prepared as the training rows are."""
        columns = tuple(dict.fromkeys(c for choice in self.plan.choices() for c in choice.needs.columns))
        prepared = prepare(
            rows, self.data.renderer, labels=self.data.labels, columns=columns, bad_rows=self.plan.recipe.data.bad_rows
        )
        return setup.Source(name, replace(self.data.train.rows, dataset=rows), prepared)

    def train(
        self,
        source: setup.Source,
        *,
        stage: str | None = None,
        seed: int | None = None,
        given: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> Artefact:
        """Train the base model on a source with the recipe's objective, transforms, selection and parameters.

        Args:
            source: the rows.
            stage: the name of an inner training. It starts from a copy of the base and leaves its checkpoints and
                metrics in ``stages/<stage>``, so that a resumed run has it again without training; the base that the
                last training takes stays as it is.
            seed: of order, noise and dropout, where it is not the run's.
            given: what the methods of this training are told, by slug (``ctx.given`` when parameters are opened).
            training: keys of the recipe's training section that are otherwise in this training.
        """
        from luthier.engine.loop import Trainer
        from luthier.engine.optimizer import open_parameters
        from luthier.engine.stack import Setup
        from luthier.evaluation.divergence import DivergenceFromBase
        from luthier.runs.verify import verify_head

        settings = self.plan.recipe.training
        if training:
            settings = type(settings).model_validate({**settings.model_dump(), **training})
        stack = setup.build_stack(self.plan)
        folder = self.folder if stage is None else self.folder / "stages" / stage
        seed = self.seed if seed is None else seed
        base = self.loaded.model if stage is None else copy.deepcopy(self.loaded.model)
        model: Any = base.to(self.processes.device)
        from_base = DivergenceFromBase(self.session(model), source.prepared)
        context = Setup(
            seed=seed,
            task=self.plan.task,
            processor=self.loaded.processor,
            stage=self.trainings,
            given=given or {},
        )
        self.trainings += 1
        stack.call("prepare_model", model, self.loaded.processor)
        model = open_parameters(model, stack, context)
        if settings.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        session = self.session(model, stack, seed=seed)
        if self.plan.task in TOKEN_TASKS and not self.processes.sharded:
            verify_head(session)
        watched, rows = self.data.select or self.data.test, self.plan.recipe.evaluation.batch_rows
        evaluate: Callable[[], dict[str, float]] | None = None
        if watched is not None:
            evaluate = lambda: quick_loss(session, watched.prepared, rows)  # noqa: E731
        rows_read = source.prepared.only((*session.task.reads, *stack.needs.columns))
        trainer = Trainer(session, rows_read, settings, folder=folder, evaluate=evaluate, watch=from_base)
        tracked = bool(settings.trackers) and stage is None
        if tracked:
            self.processes.accelerator.init_trackers(self.folder.name)
        with TrainProgress(trainer.total, quiet=self.quiet or not self.processes.main) as progress:

            def observe(event: str, values: dict[str, Any]) -> None:
                progress(event, values)
                if tracked and event in ("step", "evaluation"):
                    prefix = "train" if event == "step" else "eval"
                    shown = {
                        f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, int | float) and k != "step"
                    }
                    self.processes.accelerator.log(shown, step=values["step"])

            trainer.observe = observe
            totals = trainer.run(resume=self.resume)
        if tracked:
            self.processes.accelerator.end_training()
        trained = _whole_model(self, session, context)
        self._keep_delta(stack, trained, folder)
        for method in stack.parameters:
            trained = method.export(trained)
        stack.call("finish_model", trained, self.loaded.processor)
        records = {name: m.record() for name, m in stack.named.items() if hasattr(m, "record")}
        if records and self.processes.main:
            write_json(folder / "methods.json", records)
        return Artefact(model=trained, metrics=totals, folder=folder)

    def _keep_delta(self, stack: Any, model: Any, folder: Path) -> None:
        """What the methods say they changed, with the fingerprint of the base, as ``delta/``."""
        from luthier.models.delta import Delta

        told = [m.delta(model) for m in stack.named.values() if hasattr(m, "delta")]
        if told and self.processes.main:
            about = {"untied": self.tied and not is_tied(model)}
            delta = reduce(add, (Delta(self.loaded.fingerprint, *parts, about) for parts in told))
            delta.save(folder / "delta")

    def evaluate(self, model: Any) -> dict[str, Any]:
        """Target, keep and calibration metrics of a model."""
        return self.measure(self.session(model))

    def predict(self, prepared: Any, model: Any = None) -> np.ndarray:
        """Logits [N, C] of a classifier over every supervised position of prepared rows, in their order."""
        session = self.session(model if model is not None else self.loaded.model)
        session.model.eval()
        found: list[Any] = []

        def keep(logits_CV: Any, index_C: Any) -> Any:
            found.append(logits_CV.float().cpu().numpy())
            return index_C

        size = self.plan.recipe.evaluation.batch_rows
        for start in range(0, len(prepared), size):
            index_B = np.arange(start, min(start + size, len(prepared)))
            batch = session.task.collate(prepared.fetch(index_B), index_B)
            session.evaluate_batch(batch, ()).over_vocabulary(keep)
        return np.concatenate(found)

    def generate(self, prompts: Any, *, model: Any = None, samples: int = 1, **options: Any) -> list[list[Completion]]:
        """Completions for prompts (token ids or canonical rows), by the base unless a model is given."""
        session = self.session(model if model is not None else self.loaded.model)
        return self._decode(session, prompts, samples=samples, **options)

    def score(self, prepared: Any, model: Any = None) -> Any:
        """Target log-probabilities of prepared rows, one tensor per row."""
        return self.session(model if model is not None else self.loaded.model).score(prepared)


def _decoder(plan: Any) -> Any:
    """The recipe's decoder, writing no more than ``evaluation.max_new_tokens``."""
    options = dict(plan.decoding.options)
    if "max_new_tokens" in options:
        options["max_new_tokens"] = min(options["max_new_tokens"], plan.recipe.evaluation.max_new_tokens)
    return plan.decoding.method.build(options)


def _whole_model(shop: Workshop, session: Any, context: Any) -> Any:
    """The trained model with whole tensors: sharded ones are gathered into a freshly opened base."""
    if not shop.processes.sharded:
        return session.model
    from luthier.engine.optimizer import open_parameters

    fresh = open_model(shop.plan, shop.data.labels).model
    stack = setup.build_stack(shop.plan)
    stack.call("prepare_model", fresh, shop.loaded.processor)
    fresh = open_parameters(fresh, stack, context)
    trained = dict(session.model.named_parameters())
    for name, parameter in fresh.named_parameters():
        parameter.data.copy_(shop.processes.whole(trained[name].detach()))
    return fresh.eval()


def open_model(plan: Any, labels: tuple[str, ...] = ()) -> Any:
    """The base model of a plan."""
    from luthier.models.load import load

    model = plan.recipe.model
    return load(
        model.id,
        task=model.task,
        revision=model.revision,
        dtype=model.dtype,
        attention=model.attention,
        trust_remote_code=model.trust_remote_code,
        labels=labels or None,
        seed=plan.recipe.seed,
    )


def check_folder(plan: Any, folder: Path, *, resume: bool) -> None:
    """Whether the run's folder can be had: new or, with ``resume``, the one of the same recipe.

    Raises:
        UserError: it cannot be written, it already holds a run, or the run in it has another recipe.
    """
    from luthier.recipe.load import dump

    place = plan.recipe.where(("output",))
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir():
        raise UserError(f"output: '{there}' is a file, not a folder. Choose another place with output=...", where=place)
    if not os.access(there, os.W_OK):
        raise UserError(f"output: '{there}' cannot be written. Choose another place with output=...", where=place)
    held = folder / "recipe.yaml"
    if held.exists():
        text = dump(plan.recipe)
        if not resume:
            raise UserError(
                f"{folder} already holds a run. Continue it with --resume, choose another place with "
                "output=..., or delete the folder."
            )
        if held.read_text(encoding="utf-8") != text:
            raise UserError(
                f"the run in {folder} was made by another recipe, so it cannot be continued with this one. Resume "
                f"with {held}, or choose another place with output=..."
            )


def execute(plan: Any, *, resume: bool = False, quiet: bool = False) -> Run:
    """Run a plan to its end.

    Raises:
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
        check_folder(plan, folder, resume=resume)
        if not resume:
            disk.check(plan, info)
    processor = load_processor(info.folder, task, recipe.model.trust_remote_code)
    with processes.accelerator.main_process_first():  # the others find the prepared files
        data = setup.load_data(plan, processor, task, folder=folder)
    loaded = open_model(plan, data.labels)
    for note in loaded.notes:
        say(note)
    shop = Workshop(plan, data, loaded, folder, processes=processes, resume=resume, quiet=quiet)
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
