import io
import json
import re
import subprocess
import sys
import time
from collections import Counter, defaultdict

import numpy as np
import pytest
from PIL import Image

from luthier import lab
from luthier.core import registry
from luthier.core.errors import UserError
from luthier.lab.words import FACTS

TASKS = lab.names()
PAIRS = [
    ("arithmetic", {}),
    ("arithmetic", {"steps": False}),
    ("strings", {}),
    ("facts", {"people": "all"}),
    ("sentences", {"layout": "pair"}),
    ("sentences", {"layout": "pair", "label": "topic"}),
    ("text", {"layout": "pair"}),
    ("mixture", {}),
]


def test_import_and_rows_without_torch():
    code = (
        "import sys; from luthier import lab; lab.dataset('mixture', n=50); lab.tasks(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_tasks_of_the_issue_are_there():
    assert {"arithmetic", "strings", "facts", "sentences", "text", "pictures", "mixture"} <= set(TASKS)
    assert list(lab.tasks()) == list(TASKS)


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_a_function_of_the_seed(name):
    first = lab.dataset(name, n=60, seed=3)
    assert first == lab.dataset(name, n=60, seed="3")
    assert first != lab.dataset(name, n=60, seed=4)
    assert first != lab.dataset(name, n=60, seed=3, split="test")


@pytest.mark.parametrize("name", TASKS)
def test_rows_carry_known_skills_and_levels(name):
    task = lab.tasks()[name]
    rows = lab.dataset(name, n=400)
    assert len(rows) == 400
    skills = set(task.skills) if name != "mixture" else {s for t in lab.tasks().values() for s in t.skills}
    assert {row["skill"] for row in rows} <= skills
    assert {row["difficulty"] for row in rows} <= set(task.difficulties)


@pytest.mark.parametrize("name", TASKS)
def test_ten_thousand_rows_in_two_seconds(name):
    lab.dataset(name, n=10)
    start = time.process_time()
    assert len(lab.dataset(name, n=10_000)) == 10_000
    assert time.process_time() - start < 2


def _content(name, row):
    """What a row asks, read off the row itself."""
    if name == "arithmetic":
        numbers = re.findall(r"\d+", row["prompt"])
        if row["skill"] == "chain":
            return row["skill"], re.sub(r"start at|then|,|\n", "", row["prompt"]).replace("plus", "+").replace(
                "add", "+"
            ).replace("minus", "-").replace("take away", "-").replace(" ", "")
        return row["skill"], *sorted(numbers)
    if name == "strings":
        fixed = {"letter", "letters", "write", "each", "twice", "capitals", "backwards", "from", "last", "first", "to"}
        words = set(re.findall(r"[a-z]+", row["prompt"])) - fixed
        return row["skill"], tuple(sorted(words))
    if name == "text":
        return row["text"].partition(".")[0]
    if name == "pictures":
        pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        bright = pixels.max(-1) > 130
        return row["skill"], tuple((pixels[bright].mean(0) / 20).round().astype(int)), bright.tobytes()
    return row["text"] if name == "sentences" else row["prompt"]


@pytest.mark.parametrize("name", ["arithmetic", "strings", "facts", "sentences", "text", "pictures"])
def test_splits_share_no_content_whatever_the_seed(name):
    options = {"facts": {"people": "all"}, "pictures": {"difficulty": 1}}.get(name, {})
    train = {_content(name, row) for row in lab.dataset(name, n=4000, seed=0, **options)}
    for seed in (0, 5):
        test = {_content(name, row) for row in lab.dataset(name, n=600, seed=seed, split="test", **options)}
        assert not train & test


@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_the_reference_verifies_and_others_do_not(name, options):
    rows = lab.dataset(name, n=300, **options)
    assert all(lab.verify(name, row, row["completion"]) for row in rows)
    assert not any(lab.verify(name, row, "no idea") for row in rows)
    wrong = [row for row in rows if row.get("answer")]
    assert not any(lab.verify(name, row, row["answer"] + "1") for row in wrong)


@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_the_named_reward_agrees_with_the_lab(name, options):
    rows = lab.dataset(name, n=120, **options)
    canonical = []
    for row in rows:
        extra = {key: value for key, value in row.items() if key not in ("prompt", "completion")}
        canonical.append({"prompt": row["prompt"], "completion": row["completion"], "extra": json.dumps(extra)})
    for slug in {row["verifier"] for row in rows}:
        chosen = [i for i, row in enumerate(rows) if row["verifier"] == slug]
        judge = registry.get("reward", slug).build({})
        asked = [canonical[i] for i in chosen]
        assert judge(asked, [rows[i]["completion"] for i in chosen], None) == [1.0] * len(chosen)
        assert judge(asked, ["no idea"] * len(chosen), None) == [0.0] * len(chosen)


def test_sums_and_steps_are_right():
    for row in lab.dataset("arithmetic", n=900):
        numbers = [int(x) for x in re.findall(r"\d+", row["prompt"])]
        if row["skill"] != "chain":
            expected = {
                "add": sum(numbers),
                "subtract": abs(numbers[0] - numbers[1]),
                "multiply": numbers[0] * numbers[1],
            }
            assert int(row["completion"]) == expected[row["skill"]]
            continue
        *steps, last = row["completion"].split("\n")
        value = numbers[0]
        assert len(steps) == row["difficulty"] + 1
        for step in steps:
            left, right = step.split("=")
            assert int(re.match(r"\d+", left)[0]) == value
            value = eval(left)
            assert value == int(right) >= 0
        assert last == f"#### {value}"


def test_arithmetic_verifier_reads_the_final_number():
    row = {"answer": "12"}
    assert lab.verify("arithmetic", row, "7+5=12\n#### 12")
    assert lab.verify("arithmetic", row, "it is 12")
    assert lab.verify("arithmetic", row, "15-3=12")
    assert not lab.verify("arithmetic", row, "#### 13 or 12 #### 11")
    assert not lab.verify("arithmetic", row, "-12")


def test_string_operations():
    operations = {
        "reverse": lambda s: "".join(reversed(s)),
        "uppercase": lambda s: "".join(chr(ord(c) - 32) for c in s),
        "count": lambda s: f"{len(list(s))}",
        "first": lambda s: s[:1],
        "last": lambda s: s[-1:],
        "sort": lambda s: "".join(c * s.count(c) for c in "abcdefghijklmnopqrstuvwxyz"),
        "double": lambda s: re.sub("(.)", r"\1\1", s),
    }
    for row in lab.dataset("strings", n=700, difficulty="2,3"):
        # The made-up word is the one that no wording contains.
        others = Counter(re.findall(r"[a-z]+", row["prompt"]))
        assert any(operations[row["skill"]](word) == row["answer"] for word in others)


def test_each_skill_keeps_its_share_even_with_few_distinct_rows():
    rows = lab.dataset("arithmetic", n=4000, difficulty=1)
    assert set(Counter(row["skill"] for row in rows).values()) == {1000}
    assert len({row["prompt"] for row in rows if row["skill"] == "chain"}) == 1000


def test_every_test_fact_was_told_in_another_wording():
    told = defaultdict(set)
    for row in lab.dataset("facts", n=3000, people="all"):
        told[row["prompt"]] = row["answer"]
    answers = defaultdict(set)
    for prompt, answer in told.items():
        person = " ".join(re.findall(r"[A-Z][a-z]+", prompt))
        answers[person].add(answer)
    for row in lab.dataset("facts", n=400, split="test", people="all"):
        assert row["prompt"] not in told
        assert row["answer"] in answers[" ".join(re.findall(r"[A-Z][a-z]+", row["prompt"]))]
        assert row["answer"] in FACTS[row["skill"]]


def test_known_and_new_people_differ():
    def people(which):
        return {" ".join(re.findall(r"[A-Z][a-z]+", r["prompt"])) for r in lab.dataset("facts", n=2000, people=which)}

    known, new = people("known"), people("new")
    assert len(known) == len(new) == 50
    assert not known & new
    assert people("all") == known | new


def test_label_noise_is_what_was_asked_for():
    rows = lab.dataset("sentences", n=4000, noise=0.25)
    wrong = [row for row in rows if row["label"] != row["answer"]]
    # Four standard deviations of a binomial share.
    assert abs(len(wrong) / 4000 - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    assert all(row["noisy"] == (row["label"] != row["answer"]) for row in rows)
    assert not any(row["noisy"] for row in lab.dataset("sentences", n=500, noise=0.25, split="test"))
    topics = lab.dataset("sentences", n=600, noise=1, label="topic")
    assert all(row["label"] != row["answer"] for row in topics)
    assert {row["label"] for row in topics} == {"food", "room", "staff"}


def test_feelings_follow_their_words():
    good = {"good", "lovely", "excellent", "pleasant", "wonderful", "superb", "charming", "perfect"}
    for row in lab.dataset("sentences", n=800):
        said = row["text"].split(" but ")[-1].split()
        opinion = next(w for i, w in enumerate(said) if said[i - 1] in ("was", "not") and w != "not")
        assert row["answer"] == ("positive" if (opinion in good) != ("not" in said) else "negative")


def test_tags_mark_the_person_and_the_inn():
    for row in lab.dataset("sentences", n=200, layout="tags"):
        assert len(row["tokens"]) == len(row["tags"])
        assert row["tags"][:2] == ["B-person", "I-person"]
        assert row["tokens"][row["tags"].index("B-inn") + 1] == "Inn"
        assert set(row["tags"][2:-2]) == {"O"}


def test_the_grammar_judges_agreement():
    row = {"prompt": "the small cats"}
    assert lab.verify("text", row, " near the river see the old dog. they sing under the barn.")
    assert not lab.verify("text", row, " near the river sees the old dog.")
    assert not lab.verify("text", row, " see the old dog. it sings under the barn.")
    assert not lab.verify("text", row, " see the old dog")
    for made in lab.dataset("text", n=300):
        assert lab.verify("text", {}, made["text"])


def test_pictures_show_their_label():
    rows = lab.dataset("pictures", n=300, difficulty=1, label="colour")
    expected = {"red": [0], "green": [1], "blue": [2], "yellow": [0, 1], "purple": [0, 2], "white": [0, 1, 2]}
    for row in rows:
        pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        assert pixels.shape == (16, 16, 3)
        brightest = pixels[pixels.sum(-1) > 0.8 * pixels.sum(-1).max()].mean(0)
        assert list(np.flatnonzero(brightest > 0.7 * brightest.max())) == expected[row["label"]]


def test_a_circle_has_the_pixels_of_a_circle():
    # Lattice points in a circle of radius 5 and 6: 81 and 113.
    rows = lab.dataset("pictures", n=50, difficulty=1, skill="circle")
    for row in rows:
        pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"]))).max(-1) > 130
        assert (pixels.any(0).sum(), pixels.sum()) in {(11, 81), (13, 113)}


def test_the_mixture_has_its_parts_and_no_new_people():
    rows = lab.dataset("mixture", n=1000)
    assert Counter(row["task"] for row in rows) == {
        "arithmetic": 400, "strings": 220, "facts": 240, "text": 80, "sentences": 60,
    }  # fmt: skip
    assert {row["difficulty"] for row in rows if row["task"] in ("arithmetic", "facts", "strings")} == {1}
    assert {row["task"] for row in lab.dataset("mixture", n=40, part="facts,text")} == {"facts", "text"}


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("arithmetics", {}, "Did you mean 'arithmetic'"),
        ("arithmetic", {"dificulty": 1}, "Did you mean 'difficulty'"),
        ("arithmetic", {"difficulty": 4}, "unknown difficulty '4'"),
        ("arithmetic", {"skill": "ad"}, "Did you mean 'add'"),
        ("sentences", {"noise": 1.5}, "noise=1.5"),
        ("sentences", {"layout": "chat"}, "layout='chat'"),
        ("strings", {"n": 0}, "n=0"),
        ("strings", {"n": "many"}, "n='many'"),
        ("strings", {"seed": -1}, "seed=-1"),
        ("strings", {"split": "validation"}, "split 'validation'"),
    ],
)
def test_what_is_not_accepted_is_said_in_one_line(name, options, words):
    with pytest.raises(UserError) as error:
        lab.dataset(name, **options)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_the_lab_reward_refuses_rows_of_others():
    judge = registry.get("reward", "lab").build({})
    with pytest.raises(UserError, match=r"train.jsonl, row 3: .*no 'task'"):
        judge([{"prompt": "a", "extra": None, "source": "train.jsonl", "row": 3}], ["b"], None)
