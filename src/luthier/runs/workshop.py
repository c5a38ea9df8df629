"""The context of a procedure: its data, its models, and the calls it is built from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import numpy as np

from luthier.core import registry, rng
from luthier.core.protocols import Artefact, Completion
from luthier.core.registry import NUMBER_TASKS, TOKEN_TASKS
from luthier.core.store import write_json
from luthier.data.prepare import prepare
from luthier.data.read import read
from luthier.engine.distributed import Processes
from luthier.functional.tokens import add_tokens
from luthier.functional.tying import is_tied
from luthier.recipe.plan import choice_of
from luthier.runs import backends, setup
from luthier.runs import procedure as kept
from luthier.runs.instruments import Instruments
from luthier.runs.measure import Measure, Verifier, quick_loss
from luthier.runs.progress import TrainProgress
from luthier.tasks import get_task
from luthier.tasks.base import ROW_WEIGHT


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
        self.trainings = 0
        self.tied = is_tied(loaded.model)
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

    def session(
        self,
        model: Any,
        stack: Any = None,
        *,
        seed: int | None = None,
        models: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
    ) -> Any:
        """A session over a model; without methods it serves evaluation alone.

        Args:
            model: the model.
            stack: the methods.
            seed: where it is not the run's.
            models: further frozen models by name.
            fingerprint: a hash of the model's weights, where it is not the base.
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
            fingerprint=self.state if fingerprint is None else fingerprint,
            models=models,
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

    def rows(self, spec: Any, *, limit: int | None = None) -> Any:
        """Canonical rows of the training part of a further source."""
        return read(
            spec, task=self.plan.task, split="train", limit=limit, bad_rows=self.plan.recipe.data.bad_rows
        ).dataset

    def train(
        self,
        source: setup.Source,
        *,
        stage: str | None = None,
        seed: int | None = None,
        given: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
        start: Artefact | None = None,
        keep_optimizer: bool = False,
        alternate: int | None = None,
        best: bool = False,
        plain: bool = False,
        models: Mapping[str, Any] | None = None,
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
            start: an inner training to go on from, in place of the base; its model stays as it is, and is the
                reference of methods that have one, unless ``models`` names another.
            keep_optimizer: go on with the state of its optimiser, too.
            alternate: canonical rows from this one on are not mixed with those before them, but have steps of their
                own: one after each step of the others, as often as it takes.
            best: give the model of the best checkpoint by the evaluations on the way, where there were any.
            plain: train the recipe's parameters by the plain loss, without its objective, transforms and selection.
            models: further frozen models by the names under which methods ask for them.
        """
        from luthier.engine.loop import Trainer
        from luthier.engine.optimizer import open_parameters
        from luthier.engine.stack import Setup
        from luthier.evaluation.divergence import DivergenceFromBase
        from luthier.runs.verify import verify_head

        settings = self.plan.recipe.training
        if training:
            settings = type(settings).model_validate({**settings.model_dump(), **training})
        stack = setup.build_stack(self.plan, plain=plain)
        folder = self.folder if stage is None else self.folder / "stages" / stage
        seed = self.seed if seed is None else seed
        fresh = stage is None and start is None
        base = self.loaded.model if fresh else copy.deepcopy(self.loaded.model if start is None else start.model)
        self.untouched = self.untouched and not fresh
        model: Any = base.to(self.processes.device)
        from_base = None  # numbers have no divergence
        if self.plan.task not in NUMBER_TASKS:
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
        asked = {name: m for name, m in (models or {}).items() if name in stack.needs.models}
        # What is kept of a reference is kept under its own weights.
        reference = asked.get("reference", None if start is None else start.model)
        state = None if reference is None or reference is self.loaded.model else kept.weights_hash(reference)
        session = self.session(model, stack, seed=seed, models=asked, fingerprint=state)
        if self.plan.task in TOKEN_TASKS and not self.processes.sharded:
            verify_head(session)
        watched, rows = self.data.select or self.data.test, self.plan.recipe.evaluation.batch_rows
        evaluate: Callable[[], dict[str, float]] | None = None
        if watched is not None:
            evaluate = lambda: quick_loss(session, watched.prepared, rows)  # noqa: E731
        rows_read = source.prepared.only((*session.task.reads, *stack.needs.columns))
        trainer = Trainer(session, rows_read, settings, folder=folder, evaluate=evaluate, watch=from_base)
        if alternate is not None:
            kept.alternate(trainer, source.prepared, alternate)
        if start is not None and keep_optimizer:
            kept.continue_optimizer(trainer, start.folder)
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
            if self.instruments is not None:
                self.instruments.begin(trainer)
            totals = trainer.run(resume=self.resume, until=self.until if stage is None else None)
        if best and (chosen := folder / "checkpoints" / "best").exists():
            trainer.load(chosen)
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
            delta = reduce(add, (Delta(self.loaded.fingerprint, parts, absolute, about) for parts, absolute in told))
            delta.save(folder / "delta")

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
        """Logits [N, C] of all supervised positions of prepared rows, in their order; numbers [N] of a regression."""
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
            out = session.evaluate_batch(batch, ())
            if self.plan.task in NUMBER_TASKS:
                found.append(out.numbers().float().cpu().numpy())
            else:
                out.over_vocabulary(keep)
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
        if model is None and self.plan.recipe.generation is not None:
            return backends.write(self, prompts, samples=samples, decoding=decoding, **options)
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
