"""One run from plan to folder: read, check, load, measure, train, merge, measure again, write.

What it leaves: ``recipe.yaml`` (resolved), ``manifest.json``, ``data.json``, ``metrics.jsonl``, ``checkpoints/``,
``model/``, ``evaluation.json``, ``samples.json``, ``report.html`` and ``README.md``.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from luthier.core import registry, rng
from luthier.core.protocols import Artefact, Completion
from luthier.core.registry import TOKEN_TASKS
from luthier.core.store import write_atomic, write_json
from luthier.data.prepare import prepare
from luthier.data.read import read
from luthier.engine.distributed import Processes
from luthier.functional.tokens import add_tokens
from luthier.recipe.plan import choice_of
from luthier.runs import disk, setup
from luthier.runs import procedure as kept
from luthier.runs.analyses import AnalysisContext
from luthier.runs.instruments import Instruments
from luthier.runs.measure import Measure, Verifier, quick_loss
from luthier.runs.progress import TrainProgress
from luthier.tasks import get_task
from luthier.tasks.base import ROW_WEIGHT


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
        until: stop the run's own training after this step, with a checkpoint.
        instruments: what else to measure.
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
        until: int | None = None,
        instruments: Instruments | None = None,
    ) -> None:
        self.plan, self.data, self.loaded, self.folder = plan, data, loaded, folder
        self.resume, self.quiet, self.until, self.instruments = resume, quiet, until, instruments
        self.processes = processes or Processes(plan.recipe.training.sharding)
        self.precision = setup.precision(plan)
        self.decoder_options = setup.decoder_options(plan)
        self.decoder = plan.decoding.method.build(self.decoder_options)
        # Whether the base is still as it was loaded; the last training changes it in place.
        self.untouched = True
        # A hash of the base as it is, under which what is computed from it is kept.
        self.state: str = loaded.fingerprint
        self.measure = Measure(plan, data, self.decoder)
        self.seed: int = plan.recipe.seed
        if plan.task == "causal-lm":
            # Generation ends where the rendered answers end, here and in whatever opens the saved model.
            own = loaded.model.generation_config.eos_token_id
            known = [own] if isinstance(own, int) else list(own or [])
            stops = list(dict.fromkeys([*known, *data.renderer.stop_ids]))
            loaded.model.generation_config.eos_token_id = stops[0] if len(stops) == 1 else stops or None

    # -- sessions

    def decode(
        self, session: Any, prompts: Any, *, samples: int = 1, decoding: str | None = None, **options: Any
    ) -> list[list[Completion]]:
        """What a session's model writes for prompts (token ids or canonical rows); nothing is kept on disk."""
        ids = [self.data.renderer.prompt_ids(p) if isinstance(p, dict) else list(p) for p in prompts]
        decoder = self.decoder
        if decoding is not None:
            decoder = registry.get("decoding", decoding).build(options)
        elif options:
            decoder = self.plan.decoding.method.build({**self.decoder_options, **options})
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

    def session(self, model: Any, stack: Any = None, *, seed: int | None = None, reference: Any = None) -> Any:
        """A session over a model; without methods it serves evaluation alone.

        Args:
            model: the model.
            stack: the methods.
            seed: where it is not the run's.
            reference: what methods get as their reference, where it is not the model as it is now.
        """
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
            fingerprint=self.state,
            models={} if reference is None else {"reference": reference},
            decode=self.decode,
            render=self._render,
            wrap=stack is not None,
        )

    # -- the calls of a procedure

    def source(self, rows: Any, name: str, *, ends: bool = True, cut: bool = False) -> setup.Source:
        """Canonical rows (a ``Dataset``) made by a procedure, rendered and prepared as the training rows are.

        Of their further columns ``answer_ids`` are the tokens of the last answer, used in place of its text, and
        ``row_weight`` is what the row counts in the loss.

        Args:
            rows: the rows.
            name: how they are called in reports.
            ends: raw text is ended with the end token.
            cut: rows that are too long are cut, whatever the recipe does with them.
        """
        columns = tuple(dict.fromkeys(c for choice in self.plan.choices() for c in choice.needs.columns))
        if any(f'"{ROW_WEIGHT}"' in (text or "") for text in rows["extra"]):
            columns = (*columns, ROW_WEIGHT)
        renderer = self.data.renderer.with_answer_ids()
        renderer.add_eos = renderer.add_eos and ends
        renderer.truncation = "keep_start" if cut else renderer.truncation
        prepared = prepare(
            rows, renderer, labels=self.data.labels, columns=columns, bad_rows=self.plan.recipe.data.bad_rows
        )
        return setup.Source(name, replace(self.data.train.rows, dataset=rows), prepared)

    def train(
        self,
        source: setup.Source,
        *,
        stage: str | None = None,
        seed: int | None = None,
        start: Artefact | None = None,
        alternate: int | None = None,
    ) -> Artefact:
        """Train the base model on a source with the recipe's objective, transforms, selection and parameters.

        Args:
            source: the rows.
            stage: the name of an inner training. It starts from a copy of the base and leaves its checkpoints and
                metrics in ``stages/<stage>``, so that a resumed run has it again without training; the base that the
                last training takes stays as it is.
            seed: of order, noise and dropout, where it is not the run's.
            start: an inner training to go on from, in place of the base: with its weights and its optimiser's state.
                The reference of methods that have one stays the base.
            alternate: canonical rows from this one on are not mixed with those before them, but have steps of their
                own: one after each step of the others, as often as it takes.
        """
        from luthier.engine.loop import Trainer
        from luthier.engine.optimizer import open_parameters
        from luthier.engine.stack import Setup
        from luthier.evaluation.divergence import DivergenceFromBase
        from luthier.runs.verify import verify_head

        training = self.plan.recipe.training
        stack = setup.build_stack(self.plan)
        folder = self.folder if stage is None else self.folder / "stages" / stage
        seed = self.seed if seed is None else seed
        fresh = stage is None and start is None
        base = self.loaded.model if fresh else copy.deepcopy(self.loaded.model if start is None else start.model)
        self.untouched = self.untouched and not fresh
        model: Any = base.to(self.processes.device)
        from_base = DivergenceFromBase(self.session(model), source.prepared)
        context = Setup(seed=seed, task=self.plan.task, processor=self.loaded.processor)
        stack.call("prepare_model", model, self.loaded.processor)
        model = open_parameters(model, stack, context)
        if training.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        reference = self.loaded.model if start is not None and "reference" in stack.needs.models else None
        session = self.session(model, stack, seed=seed, reference=reference)
        if self.plan.task in TOKEN_TASKS and not self.processes.sharded:
            verify_head(session)
        watched, rows = self.data.select or self.data.test, self.plan.recipe.evaluation.batch_rows
        evaluate: Callable[[], dict[str, float]] | None = None
        if watched is not None:
            evaluate = lambda: quick_loss(session, watched.prepared, rows)  # noqa: E731
        rows_read = source.prepared.only((*session.task.reads, *stack.needs.columns))
        trainer = Trainer(session, rows_read, training, folder=folder, evaluate=evaluate, watch=from_base)
        if alternate is not None:
            kept.alternate(trainer, source.prepared, alternate)
        if start is not None:
            kept.continue_optimizer(trainer, start.folder)
        tracked = bool(training.trackers) and stage is None
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
            if self.instruments is not None:
                self.instruments.begin(trainer)
            totals = trainer.run(resume=self.resume, until=self.until if stage is None else None)
        if tracked:
            self.processes.accelerator.end_training()
        trained = setup.whole_model(self, session)
        for method in stack.parameters:
            trained = method.export(trained)
        stack.call("finish_model", trained, self.loaded.processor)
        records = {name: m.record() for name, m in stack.named.items() if hasattr(m, "record")}
        if records and self.processes.main:
            write_json(folder / "methods.json", records)
        return Artefact(model=trained, metrics=totals, folder=folder)

    def add_tokens(self, names: Any) -> list[int]:
        """Give tokenizer and base special tokens that neither has; their ids (see :mod:`luthier.functional.tokens`)."""
        ids = add_tokens(self.loaded.model, self.loaded.processor, names, rng.stream(self.seed, "init", *names))
        self.data.renderer.processor.add_tokens(list(names), special_tokens=True)  # rows are rendered with its own
        self.state = kept.weights_hash(self.loaded.model)
        return ids

    def read(self, spec: Any, name: str = "text") -> setup.Source:
        """Rows of a further source, its training part, rendered and prepared."""
        rows = read(spec, task=self.plan.task, split="train", bad_rows=self.plan.recipe.data.bad_rows)
        return self.source(rows.dataset, name, cut=True)

    def execute(self, programs: Any, *, seconds: float = 5.0) -> list[dict[str, Any]]:
        """Run ``(code, tests)`` pairs in the sandbox: ``{passed, reason, output}`` of each, kept by content."""
        return kept.execute(programs, seconds)

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

    # The calls below keep what they found by the content of all that decides it (:mod:`luthier.runs.procedure`).

    def generate(
        self, prompts: Any, *, model: Any = None, samples: int = 1, decoding: str | None = None, **options: Any
    ) -> list[list[Completion]]:
        """Completions for prompts (token ids or canonical rows), by the base unless a model is given.

        Args:
            prompts: the prompts.
            model: the model that writes.
            samples: completions of each prompt.
            decoding: a decoder by name; by default the recipe's.
            options: of the decoder.
        """
        return kept.generate(self, prompts, model=model, samples=samples, decoding=decoding, options=options)

    def score(self, prepared: Any, model: Any = None) -> Any:
        """Target log-probabilities of prepared rows, one tensor per row, by the base unless a model is given."""
        return kept.score(self, prepared, model)

    def likelihood(self, prepared: Any, model: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Sum of target log-probabilities and number of targets of each prepared row, by the base unless told."""
        return kept.likelihood(self, prepared, model)

    def row_likelihood(self, rows: Any, *, ends: bool = True, last: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`likelihood` of canonical rows by the base; see :func:`luthier.runs.procedure.row_likelihood`."""
        return kept.row_likelihood(self, rows, ends=ends, last=last)

    def judge(self, rows: Any, completions: Any, verifier: Any = None) -> list[float | None]:
        """One score per completion; None where it cannot be judged.

        Args:
            rows: canonical rows.
            completions: their texts.
            verifier: a reward as a recipe writes it; by default the recipe's verifier, or the one each row names.

        Raises:
            UserError: there is no such verifier, or its options are wrong.
            LuthierError: it gives another number of scores, or one that is not a number.
        """
        chosen = self.measure.verifier if verifier is None else Verifier(choice_of("reward", verifier))
        return kept.judge(chosen, rows, completions, self, chosen.deciding(rows))


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
