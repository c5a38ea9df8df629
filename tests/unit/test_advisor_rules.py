"""The rule table: what is proposed for which findings, and that everything it names can exist."""

from __future__ import annotations

import pytest

from luthier.advisor.findings import Finding, Findings, counted
from luthier.advisor.presets import PRESETS, check_steps, study
from luthier.advisor.rules import RULES, advise_by_rules, methods_of
from luthier.core import registry
from luthier.core.errors import UserError

STRONG = {"rows": 500, "mean_probability": 0.9, "label_noise": 0.0, "agreement": 0.8, "right_test_answers": 0.8}
# Named before this library has them; left out by name until it does.
AWAITED = {"s3ft", "selective-self-rehearsal", "clear-curation"}


def findings(**values):
    return Findings([counted(n, v, 100, "", "") if not isinstance(v, Finding) else v for n, v in values.items()])


def advice(task="causal-lm", **values):
    return advise_by_rules(findings(**values), task=task, learning_rate=1e-3, batch_rows=16)


def entries(**values):
    return [p.entry for p in advice(**values).candidates]


def remarks(**values):
    return [r.name for r in advice(**values).remarks]


def test_a_strong_base_gets_losses_that_trust_it_at_a_fifth_of_the_rate():
    assert entries(**STRONG)[:3] == [
        "sft[training.learning_rate=0.0002]",
        "beyond-log-likelihood(objective=p)[training.learning_rate=0.0002]",
        "dynamic-ft[training.learning_rate=0.0002]",
    ]


def test_a_strong_base_with_doubtful_labels_is_anchored():
    made = advice(**STRONG | {"label_noise": 0.25, "mean_probability": 0.6})
    assert made.candidates[0].entry == "anchored-sft(anchor_weight=0.5)"
    assert made.candidates[0].rule.name == "strong base, doubtful labels"
    assert "strong base" not in {p.rule.name for p in made.candidates}


def test_a_weak_base_gets_plain_likelihood_at_a_higher_rate_and_its_errors_are_no_noise():
    weak = {"rows": 500, "mean_probability": 0.2, "label_noise": 0.4, "agreement": 0.05, "right_test_answers": 0.1}
    assert entries(**weak)[0] == "sft[training.learning_rate=0.003]"
    assert not any("anchored" in e or "likelihood" in e for e in entries(**weak))


def test_uncertain_noise_is_no_noise():
    unsure = Finding("label_noise", 0.1, 20, 0.03, 0.3, "share", "")
    assert "strong base" in {p.rule.name for p in advice(**STRONG | {"label_noise": unsure}).candidates}


def test_rows_that_contradict_each_other_are_doubtful_unless_several_answers_are_right():
    torn = STRONG | {"contradictions": 0.2, "mean_probability": 0.6}
    assert {p.rule.name for p in advice(**torn | {"label_noise": 0.03}).candidates} & {"strong base, doubtful labels"}
    assert not {p.rule.name for p in advice(**torn | {"label_noise": 0.0}).candidates} & {
        "strong base, doubtful labels"
    }


def test_copies_are_left_out():
    assert entries(rows=500, exact_duplicates=0.3)[0] == "deduplicate"
    assert entries(rows=500, near_duplicates=0.2)[:2] == ["deduplicate(mode=near)", "uds"]
    assert "deduplicate" not in entries(rows=500, exact_duplicates=0.001)


def test_reasons_not_to_train():
    right = Finding("right_test_answers", 0.98, 64, 0.92, 1.0, "share", "")
    assert remarks(rows=500, right_test_answers=right) == ["already right"]
    few_judged = Finding("right_test_answers", 1.0, 5, 0.57, 1.0, "share", "")
    assert remarks(rows=500, right_test_answers=few_judged) == []
    assert remarks(rows=20) == ["a handful of rows"]
    facts = {"mean_probability": 0.1, "answer_tokens": 6, "largest_class": 0.001, "right_test_answers": 0.0}
    assert remarks(rows=500, **facts) == ["unknown facts"]
    assert remarks(rows=500, **facts | {"largest_class": 0.5}) == []


def test_what_to_mend_comes_as_remarks():
    bad = {"test_in_train": 0.01, "template_problems": 0.2, "too_long": 0.05, "largest_class": 0.9}
    assert remarks(rows=500, **bad) == [
        "leaked test rows",
        "rows that do not render",
        "rows that do not fit",
        "one answer for most",
    ]


def test_a_large_batch_leaves_thirty_steps_per_epoch():
    assert "sft[training.batch_rows=50,training.learning_rate=0.0002]" in entries(rows=1500)
    assert "sft[training.batch_rows=128,training.learning_rate=0.0002]" in entries(rows=100_000)


def test_methods_of_another_task_or_not_installed_are_named_not_raced():
    made = advice(task="sequence-classification", rows=500, answer_tokens=100, right_answers=0.5)
    assert made.left_out["masked-thought"] == "'masked-thought' is not defined for sequence-classification"
    absent = [n for n in ("s3ft", "selective-self-rehearsal") if all(n not in registry.names(a) for a in registry.AXES)]
    assert all(made.left_out[n] == f"this installation has no method '{n}'" for n in absent)
    assert not {p.entry for p in made.candidates} & {"masked-thought", *absent}


def test_every_entry_names_methods_that_exist_or_are_awaited_and_options_they_have():
    named = {name for rule in RULES for entry in rule.entries for name in methods_of(entry)}
    known = {slug for axis in registry.AXES for slug in registry.names(axis)}
    assert named - known <= AWAITED
    assert "beyond-log-likelihood" in named
    registry.get("objective", "beyond-log-likelihood").build({"objective": "p"})
    registry.get("objective", "anchored-sft").build({"anchor_weight": 0.5})
    registry.get("data", "deduplicate").build({"mode": "near"})


def test_every_rule_says_why_and_who_says_so():
    assert len({r.name for r in RULES}) == len(RULES)
    for rule in RULES:
        assert rule.why.endswith(".")
        assert rule.source
        assert bool(rule.entries) == (rule.kind == "try")
        assert not rule.when(Findings([])), f"{rule.name} holds without a finding"


def test_methods_of_an_entry():
    assert methods_of("deduplicate(mode=near)+half-ft[seed=1,training.epochs=2]") == ["deduplicate", "half-ft"]


def test_presets_scale_to_the_rows():
    assert PRESETS["tulu"].training() == {
        "batch_rows": 128, "learning_rate": 2e-5, "schedule": "linear", "warmup": 0.03, "beta2": 0.95,
    }  # fmt: skip
    assert PRESETS["recipe"].scale_to(1_000_000).batch_rows == 3840
    assert PRESETS["recipe"].scale_to(1000).batch_rows == 33
    assert PRESETS["recipe"].scale_to(1000, devices=4).batch_rows == 32
    assert PRESETS["recipe"].scale_to(1000).learning_rate == 2e-5
    with pytest.raises(UserError, match="29 rows are too few"):
        PRESETS["recipe"].scale_to(29)


def test_fewer_than_ten_steps_are_refused():
    assert check_steps(5000, 500, 1.0) == 10
    with pytest.raises(UserError, match="make 2 steps in 1 epochs; at least 10"):
        check_steps(5000, 3840, 1.0)


def test_the_study_is_entries_evaluated_at_equal_samples():
    made = study(4096, batches=(8, 64), rates=(1e-3, 1e-4), evaluations=8)
    assert made == [
        "sft[training.learning_rate=0.001,training.batch_rows=8,training.eval_steps=64]",
        "sft[training.learning_rate=0.0001,training.batch_rows=8,training.eval_steps=64]",
        "sft[training.learning_rate=0.001,training.batch_rows=64,training.eval_steps=8]",
        "sft[training.learning_rate=0.0001,training.batch_rows=64,training.eval_steps=8]",
    ]
    with pytest.raises(UserError, match="meet first after 1,001 samples"):
        study(500, batches=(7, 11, 13), rates=(1e-3,), evaluations=2)
