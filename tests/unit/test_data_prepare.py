"""Prepared rows on disk: what is kept, what is counted, what is refused, and how it is fetched."""

import json
from pathlib import Path

import numpy as np
import pytest
from data_tokenizers import byte_level, word_piece
from datasets import Dataset

from luthier.core.errors import UserError
from luthier.data import prepare as prepare_module
from luthier.data.inspect import coloured, spans_json
from luthier.data.layouts import SCHEMA
from luthier.data.prepare import prepare
from luthier.data.read import read
from luthier.data.render import Renderer
from luthier.data.templates import BUILT_IN

SHARED = Path(__file__).resolve().parents[3] / "shared"
ROWS = [{"prompt": f"What is {i}+1?\n", "completion": f"{i + 1}", "answer": i + 1} for i in range(2500)]


def ready(tmp_path, rows, tokenizer=None, *, task="causal-lm", columns=(), labels=None, **options):
    found = read(rows, task=task, cache=tmp_path / "cache", progress=False)
    renderer = Renderer(tokenizer or byte_level(bos=True), task=task, **options)
    made = prepare(found, renderer, columns=columns, labels=labels, cache=tmp_path / "cache", progress=False)
    return made, found, renderer


def test_rows_are_what_the_renderer_gives(tmp_path):
    made, found, renderer = ready(tmp_path, ROWS)
    assert len(made) == 2500
    picked = [2499, 0, 1234]
    batch = made.fetch(picked)
    for place, index in enumerate(picked):
        rendered = renderer.render(found.dataset[index])
        assert batch["input_ids"][place].tolist() == rendered.input_ids
        assert batch["spans"][place].tolist() == [edge for span in rendered.spans for edge in span]
        assert batch["length"][place] == len(rendered.input_ids) == made.lengths[index]
        assert batch["key"][place] == made.keys[index]
        assert made.canonical(index)["prompt"] == ROWS[index]["prompt"]
    assert batch["input_ids"][0].dtype == np.int32
    assert made.lengths.dtype == np.int32
    with pytest.raises(IndexError):
        made.fetch([2500])


def test_the_report_counts_tokens(tmp_path):
    made, found, renderer = ready(tmp_path, ROWS[:50])
    rendered = renderer.render_batch([found.dataset[i] for i in range(50)])
    lengths = sorted(len(r.input_ids) for r in rendered)
    report = made.report
    assert (report.rows, report.kept) == (50, 50)
    assert report.tokens == sum(lengths)
    assert report.supervised_tokens == sum(r.supervised for r in rendered)
    assert report.lengths["max"] == lengths[-1]
    assert report.lengths["p50"] in lengths
    assert report.stop_tokens == ["</s>"]
    assert json.dumps(report.to_dict())


def test_the_cache_is_by_content_tokenizer_and_options(tmp_path, monkeypatch):
    first = ready(tmp_path, ROWS[:20])[0]
    made = []
    real = prepare_module._Maker
    monkeypatch.setattr(prepare_module, "_Maker", lambda *a: made.append(a) or real(*a))
    assert ready(tmp_path, ROWS[:20])[0].fingerprint == first.fingerprint
    assert not made
    others = [
        ready(tmp_path, ROWS[:21])[0],
        ready(tmp_path, ROWS[:20], byte_level())[0],
        ready(tmp_path, ROWS[:20], template="chatml")[0],
        ready(tmp_path, ROWS[:20], template="plain")[0],
        ready(tmp_path, ROWS[:20], add_eos=False)[0],
        ready(tmp_path, ROWS[:20], max_length=500)[0],
        ready(tmp_path, ROWS[:20], columns=["answer"])[0],
    ]
    assert len({p.fingerprint for p in (first, *others)}) == len(others) + 1 == len(made) + 1


def test_a_key_is_of_the_tokens_and_targets(tmp_path):
    rows = [{"prompt": "a", "completion": "b"}] * 2 + [{"prompt": "ab", "completion": "c"}]
    one, two = ready(tmp_path, rows)[0].keys, ready(tmp_path, rows, add_eos=False)[0].keys
    assert one[0] == one[1] != one[2]
    assert one[0] != two[0]


def test_a_plain_dataset_in_the_canonical_schema(tmp_path):
    made, found, renderer = ready(tmp_path, ROWS[:30])
    part = found.dataset.select([5, 3])
    again = prepare(part, renderer, cache=tmp_path / "cache", progress=False)
    assert again.keys == [made.keys[5], made.keys[3]]
    assert again.canonical(0)["prompt"] == ROWS[5]["prompt"]
    _, found, _ = ready(tmp_path, ROWS[:30])
    fresh = found.dataset.select([5, 3])
    assert prepare(fresh, renderer, cache=tmp_path / "cache", progress=False).fingerprint == again.fingerprint
    changed = Dataset.from_list([{**r, "prompt": "x"} for r in part.to_list()], features=part.features)
    assert prepare(changed, renderer, cache=tmp_path / "cache", progress=False).keys[0] != again.keys[0]
    assert part.features.arrow_schema.names == SCHEMA.names


def test_further_columns_come_along(tmp_path):
    made, _, _ = ready(tmp_path, [*ROWS[:3], {"prompt": "x", "completion": "y"}], columns=["answer", "prompt"])
    batch = made.fetch([1, 3])
    assert batch["answer"] == [2, None]
    assert batch["prompt"] == ["What is 1+1?\n", "x"]


def test_long_rows_are_refused_cut_or_dropped(tmp_path):
    rows = [*ROWS[:30], {"prompt": "q", "completion": "7 " * 100}]
    with pytest.raises(UserError) as caught:
        ready(tmp_path, rows, max_length=40)
    assert "1 of 31 rows are longer than the 40 tokens that" in str(caught.value)
    assert "the longest, rows:31, has" in str(caught.value)
    assert "drop (leave them out) or keep_start (cut them)" in str(caught.value)
    whole = ready(tmp_path, rows)[0]
    cut = ready(tmp_path, rows, max_length=40, truncation="keep_start")[0]
    assert cut.report.truncated == 1
    assert cut.report.supervised_lost == whole.lengths[30] - 40
    assert cut.lengths.max() == 40
    assert cut.report.unsupervised_stop == 0
    dropped = ready(tmp_path, rows, max_length=40, truncation="drop")[0]
    assert (len(dropped), dropped.report.dropped) == (30, 1)
    assert dropped.report.examples == {"dropped": ["rows:31"]}


def test_over_long_prompts_leave_nothing_to_learn(tmp_path):
    """Neither an empty data set nor a loss of zero: both would pass without a word."""
    long = {"prompt": "7 " * 100, "completion": "x"}
    with pytest.raises(UserError, match=r"3 of 3 rows have nothing to learn.*rows:1.*within max_length 40"):
        ready(tmp_path, [long] * 3, max_length=40, truncation="keep_start")
    with pytest.raises(UserError, match="0 of 3 rows have nothing to learn and 3 are too long"):
        ready(tmp_path, [long] * 3, max_length=40, truncation="drop")
    made = ready(tmp_path, [*ROWS[:20], long], max_length=40, truncation="keep_start")[0]
    assert (len(made), made.report.nothing_to_learn) == (20, 1)
    assert made.canonical(19)["prompt"] == ROWS[19]["prompt"]


def test_an_unsupervised_stop_token_is_counted(tmp_path):
    assert ready(tmp_path, ROWS[:5])[0].report.unsupervised_stop == 0
    assert ready(tmp_path, ROWS[:5], add_eos=False)[0].report.unsupervised_stop == 5
    assert ready(tmp_path, ROWS[:5], template="chatml")[0].report.unsupervised_stop == 0


def test_rows_that_the_template_refuses_can_be_skipped(tmp_path):
    template = "{{ raise_exception('no') if messages[0].content == 'bad' }}" + BUILT_IN["chatml"]
    found = read([*ROWS[:5], {"prompt": "bad", "completion": "x"}], cache=tmp_path / "cache", progress=False)
    renderer = Renderer(byte_level(), task="causal-lm", template=template)
    with pytest.raises(UserError, match="rows, row 6: the chat template refuses"):
        prepare(found, renderer, cache=tmp_path / "cache", progress=False)
    made = prepare(found, renderer, bad_rows="skip", cache=tmp_path / "cache", progress=False)
    assert (len(made), made.report.refused) == (5, 1)
    assert list(made.report.refusals.values()) == ["rows:6"]


def test_a_doubled_bos_is_counted(tmp_path):
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}"
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "<s>a", "completion": "b"}]
    made = ready(tmp_path, rows, template=template)[0]
    assert made.report.doubled_bos == 1
    assert made.report.examples["doubled_bos"] == ["rows:2"]


def test_preferences_have_both_sides(tmp_path):
    made, found, renderer = ready(tmp_path, [{"prompt": "a\n", "chosen": "b", "rejected": "c d e"}])
    batch, rendered = made.fetch([0]), renderer.render(found.dataset[0])
    assert batch["rejected_ids"][0].tolist() == rendered.rejected.input_ids
    assert batch["rejected_spans"][0].tolist() == [e for s in rendered.rejected.spans for e in s]
    assert batch["length"][0] == len(rendered.rejected.input_ids)


def test_sentences_with_the_labels_of_the_training_data(tmp_path):
    rows = [{"text": "good film", "label": "pos"}, {"text": "bad film", "label": "neg"}]
    made = ready(tmp_path, rows, word_piece(), task="sequence-classification")[0]
    assert made.labels == ["neg", "pos"]
    assert made.fetch([0, 1])["label"] == [1, 0]
    assert made.report.labels == {"neg": 1, "pos": 1}
    test = ready(tmp_path, rows[:1], word_piece(), task="sequence-classification", labels=["pos", "neg"])[0]
    assert test.fetch([0])["label"] == [0]
    with pytest.raises(UserError, match="rows, row 1, field 'label': the label 'pos' is not among"):
        ready(tmp_path, rows[:1], word_piece(), task="sequence-classification", labels=["neg", "post"])


def test_tags(tmp_path):
    rows = [{"tokens": ["Kim", "left", "Nairobi"], "tags": ["B-PER", "O", "B-LOC"]}]
    made = ready(tmp_path, rows, word_piece(), task="token-classification")[0]
    batch = made.fetch([0])
    assert made.labels == ["B-LOC", "B-PER", "O"]
    assert batch["positions"][0].tolist() == [1, 2, 3]
    assert batch["tags"][0].tolist() == [1, 2, 0]


def test_images(tmp_path):
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    rows = [{"image": {"bytes": data, "path": None}, "label": "red"}]
    found = read(rows, task="image-classification", cache=tmp_path / "cache", progress=False)
    made = prepare(found, Renderer(None, task="image-classification"), cache=tmp_path / "cache", progress=False)
    batch = made.fetch([0])
    assert batch["image"][0]["bytes"] == data
    assert (batch["label"], made.labels) == ([0], ["red"])


@pytest.mark.parametrize("template", ["none", "chatml"])
def test_tokens_can_be_looked_at(tmp_path, template):
    _, found, renderer = ready(tmp_path, [{"question": "Qu'est-ce? é 漢字", "answer": "C'est ça"}], template=template)
    about = spans_json(renderer, found.dataset[0])
    json.dumps(about)
    assert "".join(t["text"] for t in about["tokens"] if t["supervised"]).startswith("C'est ça")
    assert about["supervised"] == sum(t["supervised"] for t in about["tokens"])
    assert all(t["origin"] for t in about["tokens"])
    shown = coloured(renderer, found.dataset[0]).plain
    assert "rows, row 1 (pair)" in shown
    assert "C'est ça" in shown


def test_looking_at_preferences_and_tags(tmp_path):
    _, found, renderer = ready(tmp_path, [{"prompt": "a\n", "chosen": "b", "rejected": "c"}])
    assert "rejected" in spans_json(renderer, found.dataset[0])
    assert "rejected:" in coloured(renderer, found.dataset[0]).plain
    rows = [{"tokens": ["Kim", "left"], "tags": ["B-PER", "O"]}]
    _, found, renderer = ready(tmp_path, rows, word_piece(), task="token-classification")
    assert spans_json(renderer, found.dataset[0])["tags"][0] == {"position": 1, "word": "Kim", "tag": "B-PER"}
    assert "B-PER" in coloured(renderer, found.dataset[0]).plain


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data here")
@pytest.mark.parametrize(
    ("file", "task", "layout", "rows"),
    [
        ("gsm8k/test.jsonl", "causal-lm", "pair", 1319),
        ("mbpp/mbpp.jsonl", "causal-lm", "pair", 974),
        ("finetune-bench/coding_generalization.csv", "causal-lm", "pair", 218),
        ("tinyshakespeare/input.txt", "causal-lm", "text", 7222),
        ("masakhaner/swa/dev.txt", "token-classification", "tags", 942),
    ],
)
def test_real_files(tmp_path, file, task, layout, rows):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "stories260k")
    found = read(SHARED / "data" / file, task=task, cache=tmp_path / "cache", progress=False)
    assert (found.layout, len(found)) == (layout, rows)
    renderer = Renderer(tokenizer, task=task, max_length=512, truncation="keep_start")
    made = prepare(found, renderer, cache=tmp_path / "cache", progress=False)
    assert made.report.kept + made.report.nothing_to_learn == rows
    assert made.report.unsupervised_stop == made.report.doubled_bos == 0


@pytest.mark.skipif(not SHARED.is_dir(), reason="no shared data here")
def test_a_real_file_of_no_known_layout_is_told_its_columns(tmp_path):
    with pytest.raises(UserError, match=r"eval_real.json, row 1: the columns \(Name, Description"):
        read(SHARED / "data/toolalpaca/eval_real.json", cache=tmp_path / "cache", progress=False)


def test_a_hundred_thousand_short_rows_are_read_in_bounded_time(tmp_path):
    import time

    path = tmp_path / "many.jsonl"
    with path.open("w") as file:
        for i in range(100_000):
            file.write(
                json.dumps(
                    {"messages": [{"role": "user", "content": f"{i}+1?"}, {"role": "assistant", "content": str(i + 1)}]}
                )
                + "\n"
            )
    start = time.perf_counter()
    found = read(path, cache=tmp_path / "cache", progress=False)
    assert len(found) == 100_000
    assert time.perf_counter() - start < 20
