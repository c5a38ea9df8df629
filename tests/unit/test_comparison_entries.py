import pytest

from luthier.comparison.entries import parse
from luthier.comparison.trial import check_budget
from luthier.core.errors import UserError

COMMON = {
    "model": {"id": "lab:nano"},
    "data": {"train": "lab:strings", "stages": ["deduplicate"]},
    "parameters": ["lora"],
    "objective": ["dynamic-ft"],
    "transforms": ["masked-thought"],
    "selection": "uds",
    "weights": ["half-reset"],
    "procedure": "sft",
}


def one(text):
    (entry,) = parse([text])
    return entry


def test_an_entry_takes_the_axes_it_names_and_leaves_plain_sft_elsewhere():
    made = one("anchored-sft(anchor_weight=0.1, mode=asft) + half-ft").sections(COMMON)
    assert made["objective"] == [{"anchored-sft": {"anchor_weight": 0.1, "mode": "asft"}}]
    assert made["parameters"] == ["half-ft"]
    assert (made["transforms"], made["selection"], made["weights"]) == ([], None, [])
    assert made["data"]["stages"] == ["deduplicate"]


def test_parameters_of_the_recipe_are_common_ground():
    assert one("uds").sections(COMMON)["parameters"] == ["lora"]
    assert one("uds").sections(COMMON)["objective"] == ["sft"]


def test_recipe_is_the_recipe_with_its_own_methods():
    assert one("recipe").sections(COMMON) == COMMON


def test_lists_in_options_and_changes_to_the_recipe():
    entry = one("lora(rank=4, target_modules=[q_proj, v_proj])[training.learning_rate=1e-4, training.batch_rows=8]")
    assert entry.parts[0].options == {"rank": 4, "target_modules": ["q_proj", "v_proj"]}
    assert entry.overrides == ("training.learning_rate=1e-4", "training.batch_rows=8")


def test_several_in_one_text_and_base_and_sft_come_by_themselves():
    assert [e.name for e in parse(["half-ft, lora(rank=2)", "base", "sft,uds"])] == ["half-ft", "lora(rank=2)", "uds"]


def test_an_axis_may_be_named():
    assert one("transform:masked-thought").parts[0].axis == "transform"
    assert one("objective:sorted-ft+parameters:sorted-ft").sections(COMMON)["parameters"] == ["sorted-ft"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("anchred-sft", "Did you mean 'anchored-sft'"),
        ("lora(rank)", "must be option=value"),
        ("lora(rank=3", "brackets"),
        ("lora)", "brackets"),
        ("lora,lora", "named twice"),
        ("sft[x]", "key.path=value"),
        ("objective:lora", "exists under: parameters"),
        ("lora(rank=[1)", "brackets"),
    ],
)
def test_wrong_entries_are_refused_in_one_line(text, said):
    with pytest.raises(UserError, match=said) as error:
        parse([text])
    assert "\n" not in str(error.value)


def test_budgets():
    assert check_budget("tokens=20000") == {"kind": "tokens", "amount": 20000.0}
    assert check_budget(None) == {"kind": "rows", "amount": None}
    for wrong in ("tokens", "tokens=-1", "hours=3", "flops=inf", "seconds=x"):
        with pytest.raises(UserError, match="--budget"):
            check_budget(wrong)
