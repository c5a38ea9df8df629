"""The contract suite: every registered method, automatically. A method that is not here does not exist."""

from __future__ import annotations

import json

import pytest
import torch

from helpers import BEDS, PROCESSOR, make_session, random_rows, settings, stack_with, tiny_llama, weights
from luthier.core import registry
from luthier.core.errors import UserError
from luthier.engine.loop import Trainer

# A method without its optional package is refused by the plan (tests/unit/test_recipe_plan.py).
ALL = [m for m in registry.all_methods() if not m.missing]
TRAINING = [m for m in ALL if m.axis in ("objective", "transform", "selection", "parameters")]
# These train modules of their own, which an adapter would leave frozen, and say so.
WHOLE_MODEL = {"glue-pretraining"}
SGD = {"optimizer": "sgd", "learning_rate": 0.1, "schedule": "constant"}


def name(method):
    return f"{method.axis}:{method.slug}"


def bed(method):
    """The task a method is tried on: language modelling where it is defined for it."""
    return next(task for task in BEDS if not method.tasks or task in method.tasks)


def session_with(method, options, task=None, **more):
    return make_session(task=task or bed(method), **stack_with(method, options), **more)


def run(method, options, folder=None, stop=None, resume=False, task=None, **values):
    session = session_with(method, options, task)

    def kill(event, record):
        if event in ("step", "tick") and record["step"] == stop:
            raise KeyboardInterrupt

    records = []

    def observe(event, record):
        if event == "step":
            records.append(record)
        kill(event, record)

    oversample = session.stack.oversample
    rows = random_rows(24 * oversample)
    trainer = Trainer(session, rows, settings(**{"epochs": 2, **values}), folder=folder, observe=observe)
    try:
        trainer.run(resume=resume)
        session.stack.call("finish_model", session.model, session.processor)
    except KeyboardInterrupt:
        assert stop is not None
    return session, records


def assert_same(a, b, tolerance=None):
    assert a.keys() == b.keys()
    for key in a:
        if tolerance is None:
            assert torch.equal(a[key], b[key]), key
        else:
            torch.testing.assert_close(a[key], b[key], atol=tolerance, rtol=1e-3)


@pytest.mark.parametrize("method", TRAINING, ids=name)
def test_trains_two_steps_and_logs_the_plain_loss(method):
    session, records = run(method, method.example, max_steps=2)
    assert [r["step"] for r in records] == [1, 2]
    for record in records:
        assert all(value == value for value in record.values() if isinstance(value, float)), record
        assert record["nll"] > 0
        assert 0 < record["mean_probability"] < 1
    base = weights(BEDS[bed(method)][0]())
    changed = [k for k, v in weights(session.model).items() if k not in base or not torch.equal(v, base[k])]
    assert changed


@pytest.mark.parametrize("method", TRAINING, ids=name)
def test_resumes_twice_bit_equal(method, tmp_path):
    whole, _ = run(method, method.example, save_steps=1)
    run(method, method.example, tmp_path, stop=2, save_steps=1)
    run(method, method.example, tmp_path, stop=4, resume=True, save_steps=1)
    last, _ = run(method, method.example, tmp_path, resume=True, save_steps=1)
    assert last.step == whole.step == 6
    assert_same(weights(whole.model), weights(last.model))


@pytest.mark.parametrize("method", TRAINING, ids=name)
def test_accumulation_does_not_change_the_trajectory(method):
    one, _ = run(method, method.example, **SGD)
    four, _ = run(method, method.example, accumulation=4, **SGD)
    assert_same(weights(one.model), weights(four.model), tolerance=2e-5)


@pytest.mark.parametrize("method", [m for m in TRAINING if m.identity is not None], ids=name)
def test_identity_setting_is_plain_sft_bit_for_bit(method):
    plain, _ = run(registry.get("objective", "sft"), {}, task=bed(method))
    same, _ = run(method, method.identity)
    assert_same(weights(plain.model), weights(same.model))


@pytest.mark.parametrize("method", TRAINING, ids=name)
def test_state_survives_json_and_safetensors(method):
    from luthier.engine.checkpoint import pack, unpack

    session, _ = run(method, method.example, max_steps=2)
    tensors = {}
    plain = json.loads(json.dumps(pack(session.stack.state(), tensors)))
    session.stack.load(unpack(plain, tensors))


@pytest.mark.parametrize("method", [m for m in TRAINING if m.axis != "parameters"], ids=name)
def test_trains_an_adapter_and_leaves_its_base_alone(method):
    places = {"causal-lm": ["q_proj", "v_proj"], "masked-lm": ["query", "value"]}[bed(method)]
    adapter = registry.get("parameters", "lora").build({"rank": 2, "target_modules": places})
    session = session_with(method, method.example, parameters=[adapter])
    before = weights(session.model)
    rows = random_rows(24 * session.stack.oversample)
    if method.slug in WHOLE_MODEL:
        with pytest.raises(UserError, match=method.slug):
            Trainer(session, rows, settings(max_steps=2))
        return
    Trainer(session, rows, settings(max_steps=2)).run()
    changed = {k for k, v in weights(session.model).items() if not torch.equal(v, before[k])}
    # Some add a module that is trained beside the adapter and taken away at the end, and say so by their groups.
    others = [m for m in session.stack.named.values() if m is not adapter and hasattr(m, "groups")]
    own = {id(p) for m in others for group in m.groups(session.model) for p in group["params"]}
    added = {k for k, p in session.model.named_parameters() if id(p) in own}
    assert changed - added
    assert all("lora_" in k for k in changed - added)


@pytest.mark.parametrize("method", [m for m in ALL if m.axis == "parameters"], ids=name)
def test_frozen_tensors_stay_bit_identical(method):
    session = session_with(method, method.example)
    frozen = {n: p.detach().clone() for n, p in session.model.named_parameters() if not p.requires_grad}
    Trainer(session, random_rows(), settings(weight_decay=0.1)).run()
    now = weights(session.model)
    for key, value in frozen.items():
        assert torch.equal(value, now[key]), key


@pytest.mark.parametrize("method", [m for m in ALL if m.axis == "parameters"], ids=name)
def test_exports_a_model_that_plain_transformers_or_peft_opens(method, tmp_path):
    from luthier.models.save import save

    session, _ = run(method, method.example, max_steps=2)
    model = session.model
    for part in session.stack.parameters:
        model = part.export(model)
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    if hasattr(model, "peft_config"):
        for config in model.peft_config.values():
            config.base_model_name_or_path = str(tmp_path / "base")
    save(model, None, tmp_path / "model")
    ids = torch.arange(3, 11)[None]
    model.eval()
    wanted = model(input_ids=ids).logits
    if hasattr(model, "peft_config"):
        from peft import AutoPeftModelForCausalLM as Opener
    else:
        from transformers import AutoModelForCausalLM as Opener
    opened = Opener.from_pretrained(tmp_path / "model").eval()
    torch.testing.assert_close(opened(input_ids=ids).logits, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", ALL, ids=name)
def test_options_are_described_and_strict(method):
    schema = method.options.model_json_schema()
    assert schema.get("additionalProperties") is False
    missing = [n for n, p in schema.get("properties", {}).items() if "description" not in p]
    assert missing == []
    assert len(method.title) > 15
    with pytest.raises(ValueError, match="surely_no_such_option"):
        method.build({**method.example, "surely_no_such_option": 1})


@pytest.mark.parametrize("method", ALL, ids=name)
def test_bounds_are_enforced(method):
    for key, about in method.options.model_json_schema().get("properties", {}).items():
        below = about.get("minimum", about.get("exclusiveMinimum"))
        if below is not None:
            with pytest.raises(ValueError, match=key):
                method.build({**method.example, key: type(below)(below - 1)})


def test_overlapping_claims_are_refused_by_name():
    full = registry.get("parameters", "full")
    with pytest.raises(UserError, match="parameters#0 and parameters#1 both claim the tensor"):
        make_session(parameters=[full.build(), full.build()])


def test_processor_of_the_helpers_is_complete():
    assert PROCESSOR.eos_token_id in PROCESSOR.all_special_ids
