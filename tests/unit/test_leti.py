"""Learning from textual interactions: sequences, execution feedback, the loss on every token, and the iterations."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import KnownLogp
from scripted import Script, run, same, tensors, tiny

from helpers import make_session, random_rows
from luthier.core.errors import UserError
from luthier.core.protocols import Batch
from luthier.engine import loop
from luthier.evaluation import sandbox
from luthier.functional import execution_feedback as feedback
from luthier.functional.execution_feedback import Outcome, pass_at_k
from luthier.functional.tokens import add_tokens
from luthier.methods.decoding import sample
from luthier.methods.decoding.leti import conditioned
from luthier.methods.objectives.leti import LETI, inside
from luthier.methods.objectives.sft import SupervisedFineTuning
from luthier.methods.procedures.leti import source_of
from luthier.runs import procedure as kept
from luthier.runs.procedure import Alternating

MBPP = Path(__file__).resolve().parents[3] / "shared" / "data" / "mbpp" / "mbpp.jsonl"
ROWS = [{"prompt": f"# add {i}\n", "completion": "pass", "tests": [f"assert f(1) == {i + 1}"]} for i in range(3)]
TEXT = "some ordinary words here "
CONSTANT = {"schedule": "constant", "warmup": 0.0}


def works(sandboxed=True):
    try:
        sandbox.check()
    except UserError:
        return False
    return sandboxed


needs_sandbox = pytest.mark.skipif(not works(), reason="no sandbox can be made here")


# -- sequences and scores


def test_the_sequence_is_reward_feedback_prompt_program():
    good, wrong = Outcome(True, None, "passed"), Outcome(False, "E: no", "E")
    late = Outcome(False, "timeout", "timeout")
    assert feedback.sequence("x", "y", good, textual=True) == ("<|good|>", "xy", "")
    assert feedback.sequence("x", "y", wrong, textual=True) == (
        "<|bad|><|lang_feedback|>E: no<|/lang_feedback|>",
        "xy",
        "",
    )
    assert "".join(feedback.sequence("x", "y", late, textual=True)) == (
        "<|bad|><|lang_feedback|>timeout<|/lang_feedback|>xy"
    )
    assert feedback.sequence("x", "y", wrong, textual=False) == ("<|bad|>", "xy", "")
    assert feedback.sequence("x", "y", wrong, textual=True, position="after") == (
        "<|bad|>",
        "xy",
        "<|lang_feedback|>E: no<|/lang_feedback|>",
    )
    # A program that writes a reward token does not get one.
    assert "<|good|>" not in "".join(feedback.sequence("x", "<|good|>", wrong, textual=True))


def test_a_program_ends_before_the_next_block():
    assert feedback.cut("  return 1\n\nassert f() == 1\n") == "  return 1"
    assert feedback.cut("  if x:\n    return 1\nif x:\n  pass") == "  if x:\n    return 1"
    assert feedback.cut("print(1)\nprint(2)") == "print(1)"
    assert feedback.cut("  printed = 1\nprinted") == "  printed = 1\nprinted"


def test_pass_at_k_by_hand():
    assert pass_at_k(5, 2, 1) == pytest.approx(0.4)
    assert pass_at_k(5, 2, 3) == pytest.approx(0.9)
    assert [pass_at_k(5, 0, k) for k in (1, 3, 5)] == [0.0, 0.0, 0.0]
    assert pass_at_k(3, 3, 2) == 1.0


def test_tests_are_read_from_every_known_column():
    def row(**extra):
        return {"extra": json.dumps(extra)}

    assert source_of(row(tests="assert 1"), "tests") == "assert 1"
    assert source_of(row(test_list=["assert 1", "assert 2"], test_setup_code="import math"), "tests") == (
        "import math\nassert 1\nassert 2"
    )
    assert source_of(row(test="def check(f): pass", entry_point="f"), "tests") == "def check(f): pass\ncheck(f)\n"
    assert source_of(row(), "tests") is None


# -- execution


def executed(program, tests, seconds=2.0, **options):
    verdict = kept.execute([(program, tests)], seconds)[0]
    return feedback.outcome(verdict, program, tests, **{"hide_tests": False, "most": 1000, **options})


@needs_sandbox
def test_an_exception_is_told_by_line_and_source(monkeypatch, tmp_path):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    program = "def f(a):\n    print('noise' * 100)\n    return a / 0\n"
    found = executed(program, "x = 1\nassert f(x) == 1")
    assert found == Outcome(
        False,
        "tests, line 2\n    assert f(x) == 1\nprogram, line 3, in f\n    return a / 0\n"
        "ZeroDivisionError: division by zero",
        "ZeroDivisionError",
    )
    hidden = executed(program, "x = 1\nassert f(x) == 1", hide_tests=True)
    assert hidden.feedback.startswith("the tests fail here\nprogram, line 3")
    wrong = executed("def f(a):\n    return a", "assert f(1) == 2")
    assert wrong.feedback == "tests, line 1\n    assert f(1) == 2\nAssertionError"
    broken = executed("def f(a:\n    pass", "assert f(1)")
    assert broken.reason == "SyntaxError"
    assert broken.feedback.startswith("program, line 1\n    def f(a:\n")
    assert "^" not in broken.feedback  # no column
    assert executed("def f(a):\n    return a + 1", "assert f(1) == 2") == Outcome(True, None, "passed")


@needs_sandbox
def test_endless_programs_and_deleters_are_stopped(monkeypatch, tmp_path):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    started = time.monotonic()
    late = executed("while True:\n    pass", "", seconds=1.0)
    assert late.feedback == late.reason
    assert late.reason in ("timeout", "process timeout")
    asleep = executed("import time\ntime.sleep(60)", "", seconds=1.0)
    assert asleep == Outcome(False, "process timeout", "process timeout")
    assert time.monotonic() - started < 2 * (1.0 + 2.0) + 2.0
    victim = tmp_path / "victim"
    victim.write_text("here")
    assert not executed(f"import os\nos.remove({str(victim)!r})", "").ok
    assert victim.read_text() == "here"


# -- the loss


def batch_of(lengths, spans, weights=None):
    """Rows of which every token but the first is a target."""
    width = max(lengths)
    position, sequence = [], []
    for b, length in enumerate(lengths):
        position += [b * width + t - 1 for t in range(1, length)]
        sequence += [b] * (length - 1)
    n = len(position)
    return Batch(
        inputs={"input_ids": torch.zeros(len(lengths), width, dtype=torch.long)},
        position_N=torch.tensor(position),
        target_N=torch.zeros(n, dtype=torch.long),
        weight_N=torch.ones(n) if weights is None else weights,
        sequence_N=torch.tensor(sequence),
        row_B=torch.arange(len(lengths)),
        columns={"leti_span": spans},
    )


def test_every_token_but_the_first_is_a_target_and_the_first_may_count():
    batch = batch_of([4, 3], [None, None])
    logp = torch.log(torch.tensor([0.5, 0.25, 0.1, 0.2, 0.4], dtype=torch.float64))
    plain = SupervisedFineTuning().loss(KnownLogp(logp), batch, None)
    ctx = SimpleNamespace(totals={})
    loss = LETI().loss(KnownLogp(logp), batch, ctx)
    assert float(loss.sum) == float(plain.sum)
    assert float(loss.weight) == 5
    counted = LETI(count_first_token=True).loss(KnownLogp(logp), batch, ctx)
    assert float(counted.sum / counted.weight) == pytest.approx(-float(logp.sum()) / 7, abs=1e-12)
    # In parts, as the head asks for it, the count is the same.
    parts = [batch.positions(torch.arange(0, 2)), batch.positions(torch.arange(2, 5))]
    weights = [
        float(LETI(count_first_token=True).loss(KnownLogp(logp[i]), p, ctx).weight)
        for p, i in zip(parts, (slice(0, 2), slice(2, 5)), strict=True)
    ]
    assert sum(weights) == 7


def test_the_divergence_is_a_mean_over_instruction_and_program_alone():
    batch = batch_of([4, 3], [[2, 4], None])
    assert inside(batch).tolist() == [False, True, True, False, False]
    rng = np.random.default_rng(0)
    logits, base = (torch.tensor(rng.normal(size=(5, 6))) for _ in range(2))

    class Out:
        logp_N = logits.log_softmax(-1)[:, 0]

        def over_vocabulary(self, fn):
            return fn(logits, torch.arange(5))

    class Base:
        def __init__(self, index):
            self.index = index

        def over_vocabulary(self, fn):
            return fn(base[self.index], self.index)

    method = LETI(kl_weight=0.3)
    assert method.counts(batch, None) == {"leti_span": 2.0}
    ctx = SimpleNamespace(totals={"token": 5.0, "sequence": 2.0, "leti_span": 2.0})
    ctx.forward = lambda part, model: Base(part.part_of[1])
    loss = method.loss(Out(), batch, ctx)
    log_p, log_q = (np.asarray(x - torch.logsumexp(x, -1, keepdim=True)) for x in (base, logits))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    wanted = -np.asarray(log_q)[:, 0].mean() + 0.3 * (kl[1] + kl[2]) / 2
    assert float(loss.sum / loss.weight) == pytest.approx(wanted, abs=1e-9)


def test_the_divergence_is_zero_at_the_start_and_does_not_depend_on_accumulation():
    from helpers import settings, weights

    rows = random_rows(8)
    rows.columns["leti_span"] = [[2, int(n)] for n in rows.lengths]
    found = []
    for accumulation in (1, 2):
        session = make_session(objective=LETI(kl_weight=0.5))
        records = []
        trainer = loop.Trainer(
            session,
            rows,
            settings(epochs=2, accumulation=accumulation, optimizer="sgd", learning_rate=0.1),
            observe=lambda event, record, records=records: records.append(record),
        )
        trainer.run()
        assert records[0]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert records[1]["kl"] > 1e-6
        found.append(weights(session.model))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, atol=1e-6, rtol=1e-5)


# -- tokens, prefixes, the order of steps


def test_new_tokens_have_mean_rows_with_noise_and_are_never_written(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tiny(tmp_path / "m")
    model, words = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    old, before = len(words), model.get_input_embeddings().weight.detach().clone()
    ids = add_tokens(model, words, feedback.TOKENS, torch.Generator().manual_seed(0))
    assert ids == [old, old + 1, old + 2, old + 3]
    after = model.get_input_embeddings().weight.detach()
    assert torch.equal(after[:old], before)
    assert not torch.equal(after[old], after[old + 1])
    assert float((after[old:] - before.mean(0)).abs().max()) < 0.2 * float(before.std())
    assert model.generation_config.suppress_tokens == ids
    assert add_tokens(model, words, feedback.TOKENS) == ids  # and then nothing changes
    assert words("a<|good|>b", add_special_tokens=False)["input_ids"][1] == old


def test_the_reward_token_stands_behind_the_beginning_of_text():
    assert conditioned([1, 5, 6], 9, 1) == [1, 9, 5, 6]
    assert conditioned([5, 6], 9, 1) == [9, 5, 6]
    assert conditioned([5, 6], 9, None) == [9, 5, 6]


def test_two_sets_take_turns_step_by_step():
    from luthier.engine.order import DataOrder

    def order(n):
        return DataOrder(np.full(n, 5), seed=0, batch_rows=2)

    both = Alternating([(order(6), np.arange(6)), (order(2), np.array([6, 7]))])
    assert both.steps(2) == 12
    assert both.steps(2, 5) == 5
    seen = [sorted(both.rows(step)[1].tolist()) for step in range(6)]
    assert [rows == [6, 7] for rows in seen] == [False, True] * 3  # the small set goes round and round
    assert sorted(i for rows in seen[::2] for i in rows) == list(range(6))
    assert [both.locate(step)[0] for step in (0, 5, 6)] == [0, 0, 1]


# -- whole runs with scripted programs


PROGRAMS = {0: "def f(x):\n    return x + 0", 1: "def f(x):\n    return x / 0", 2: "def f(x):\n    return x + 2"}


def programs(prompt, number):
    return PROGRAMS[int(prompt.split("add ")[1][0])]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("models") / "llama", 256)


@pytest.fixture
def script(monkeypatch, tmp_path):
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    made = Script(programs)
    monkeypatch.setattr(sample, "completions", made)
    return made


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "corpus.txt"
    path.write_text("\n".join(f"{TEXT}{i}" for i in range(40)))
    return str(path)


def tune(base, folder, options, rows=ROWS, **more):
    options = {"iterations": 2, "samples": 1, "max_new_tokens": 24, "seconds": 2.0, "pretraining": None, **options}
    training = {**CONSTANT, "batch_rows": 2, **more.pop("training", {})}
    data = {"template": "none", **more.pop("data", {})}
    return run(base, folder, rows, {"leti": options}, training=training, data=data, **more)


def record(made):
    return json.loads((made.folder / "leti.json").read_text())


@needs_sandbox
def test_prompts_sequences_and_steps_of_two_iterations(base, script, corpus, monkeypatch, tmp_path):
    texts, steps = [], []
    real = loop.Trainer._step

    def watched(self):
        rows = self.data.fetch(self.order.rows(self.session.step)[1])
        words = self.session.processor
        texts.append([words.decode(ids) for ids in rows["input_ids"]])
        steps.append(["good|" in t or "bad|" in t for t in texts[-1]])
        assert all(s.tolist() == [1, len(i)] for s, i in zip(rows["spans"], rows["input_ids"], strict=True))
        real(self)

    monkeypatch.setattr(loop.Trainer, "_step", watched)
    made = tune(base, tmp_path / "run", {"pretraining": corpus, "block_tokens": 32})
    # decode() leaves special tokens out of what the script is asked.
    assert script.prompts == ["# add 0\n", "# add 1\n", "# add 2\n"] * 2
    assert [set(flags) for flags in steps] == [{True}, {False}] * 4
    told = record(made)["iterations"]
    assert [t["success"] for t in told] == [pytest.approx(2 / 3)] * 2
    assert told[0]["reasons"] == {"passed": 2, "ZeroDivisionError": 1}
    assert told[0]["perplexity of ordinary text"] > 1
    lines = [json.loads(line) for line in (made.folder / "leti.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines] == ["<|good|>", "<|bad|>", "<|good|>"]
    one = next(t for some in texts for t in some if "bad|" in t)
    assert one.replace(" ", "").count("ZeroDivisionError:divisionbyzero<|/lang_feedback|>#add1") == 1
    assert any("success by iteration 0.67, 0.67" in note for note in json.loads(
        (made.folder / "manifest.json").read_text())["notes"])  # fmt: skip


@needs_sandbox
def test_only_later_prompts_carry_the_good_token(base, script, monkeypatch, tmp_path):
    seen = []

    class Watching(Script):
        def __call__(self, model, prompts, ctx, **settings):
            good = ctx.processor.get_vocab()["<|good|>"]
            seen.append({good in list(p) for p in prompts})
            return super().__call__(model, prompts, ctx, **settings)

    monkeypatch.setattr(sample, "completions", Watching(programs))
    tune(base, tmp_path / "run", {"iterations": 3})
    assert seen == [{False}, {True}, {True}]


@needs_sandbox
def test_the_optimiser_goes_on_and_the_base_stays_the_reference(base, script, monkeypatch, tmp_path):
    states, references = [], []
    real = loop.Trainer.run

    def watched(self, **options):
        state = [float(s["step"]) for s in self.optimizer.state.values()]
        states.append(max(state, default=0.0))
        held = self.session._models.get("reference")
        references.append(None if held is None else held.get_input_embeddings().weight.detach().clone())
        return real(self, **options)

    monkeypatch.setattr(loop.Trainer, "run", watched)
    tune(base, tmp_path / "run", {"iterations": 3}, objective={"leti": {"kl_weight": 0.1}})
    assert states == [0.0, 2.0, 4.0]
    assert all(torch.equal(r, references[0]) for r in references)


@needs_sandbox
def test_evaluation_writes_with_each_reward_token(base, script, tmp_path):
    made = tune(base, tmp_path / "run", {"iterations": 1, "eval_samples": 2}, test=ROWS)
    assert record(made)["test"] == {
        reward: {"pass@1": pytest.approx(2 / 3), "pass@2": pytest.approx(2 / 3)} for reward in ("good", "bad", "none")
    }


@needs_sandbox
def test_killed_at_and_inside_every_stage_it_goes_on_to_the_same_result(base, script, corpus, monkeypatch, tmp_path):
    monkeypatch.setattr(kept, "WRITTEN", 2)
    monkeypatch.setattr(kept, "RUN", 2)
    options = {"pretraining": corpus, "block_tokens": 32}
    training = {"epochs": 1, "save_steps": 1}
    whole = tune(base, tmp_path / "whole", options, training=training)
    asked = len(script.prompts)
    script.prompts.clear()
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "another"))
    left, real_step, real_run = {"step": None, "run": None}, loop.Trainer._step, sandbox.run_many

    def killing(name, real):
        def call(*args, **more):
            if left[name] == 0:
                raise KeyboardInterrupt
            left[name] = None if left[name] is None else left[name] - 1
            return real(*args, **more)

        return call

    monkeypatch.setattr(loop.Trainer, "_step", killing("step", real_step))
    monkeypatch.setattr(sandbox, "run_many", killing("run", real_run))
    # Inside sampling, executing, the first training, sampling again, the second training (4 steps each).
    moments = [("script", 1), ("run", 1), ("step", 2), ("script", 0), ("step", 3), ("step", 0)]
    for number, (name, count) in enumerate(moments):
        script.left = count if name == "script" else None
        left.update({"step": None, "run": None, **({name: count} if name != "script" else {})})
        with pytest.raises(KeyboardInterrupt):
            tune(base, tmp_path / "run", options, training=training, resume=number > 0)
    script.left = None
    left.update({"step": None, "run": None})
    found = tune(base, tmp_path / "run", options, training=training, resume=True)
    assert same(tensors(whole), tensors(found))
    assert record(whole) == record(found)
    assert len(script.prompts) == asked


def test_an_evaluator_of_ones_own_needs_no_sandbox(base, script, tmp_path):
    file = tmp_path / "judge.py"
    file.write_text("def judge(row, text):\n    return '+ 0' in text, 'no zero', 'other'\n")
    rows = [{"prompt": r["prompt"], "completion": "x"} for r in ROWS]
    made = tune(base, tmp_path / "run", {"iterations": 1, "evaluator": f"{file}:judge", "dedup": True}, rows=rows)
    assert record(made)["iterations"][0]["reasons"] == {"other": 3}


def test_what_cannot_work_is_refused_in_one_line(base, script, tmp_path):
    with pytest.raises(UserError, match=r"set training\.schedule: constant"):
        run(base, tmp_path / "a", ROWS, "leti", data={"template": "none"})
    with pytest.raises(UserError, match=r"set data\.template: none"):
        tune(base, tmp_path / "b", {}, data={"template": "chatml"})
    with pytest.raises(UserError, match="the row has no tests under 'tests'"):
        tune(base, tmp_path / "c", {}, rows=[{"prompt": "a", "completion": "b"}] * 2)
    with pytest.raises(UserError, match="does not go with 'lora'"):
        tune(base, tmp_path / "d", {}, parameters=["lora"])


@needs_sandbox
@pytest.mark.skipif(not MBPP.is_file(), reason="its data are not here")
def test_real_programs_meet_real_tests(monkeypatch, tmp_path):
    """Programs of MBPP replayed, half of them with a fault put into them: right ones pass, the others say why."""
    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path / "cache"))
    problems = [json.loads(line) for line in MBPP.read_text(encoding="utf-8").splitlines()[:24]]
    rows = [
        {
            "prompt": f'"""\n{p["text"]}\n{p["test_list"][0]}\n"""\n',
            "completion": "pass",
            "test_list": p["test_list"],
            "test_setup_code": p["test_setup_code"],
        }
        for p in problems
    ]
    code = {p["text"]: p["code"].replace("\r\n", "\n") for p in problems}

    def replay(prompt, number):
        program = next(c for text, c in code.items() if text in prompt)
        return program if number % 2 == 0 else program + "\nraise RuntimeError('planted')\n"

    monkeypatch.setattr(sample, "completions", Script(replay))
    wide = tiny(tmp_path / "wide", 1024)
    made = tune(wide, tmp_path / "run", {"iterations": 1, "samples": 2, "seconds": 5.0}, rows=rows)
    lines = [json.loads(line) for line in (made.folder / "leti.jsonl").read_text().splitlines()]
    right, planted = lines[::2], lines[1::2]
    assert sum(line["reward"] == "<|good|>" for line in right) == 24
    assert all(line["reason"] == "RuntimeError" for line in planted)
    assert all("raise RuntimeError('planted')\nRuntimeError: planted" in line["feedback"] for line in planted)
    assert record(made)["iterations"][0]["success"] == 0.5
