"""The same rows come out of every format, with true row numbers, and mixed numbers of bytes in memory."""

import bz2
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets import Sequence as Repeated

from luthier.core.errors import UserError
from luthier.data import formats, json_files
from luthier.data.read import read
from luthier.data.sources import open_source

ROWS = [{"prompt": f"What is {i}+1?", "completion": str(i + 1), "level": "easy"} for i in range(7)]
TEXT = "".join(json.dumps(r) + "\n" for r in ROWS)


def csv_text(separator):
    return separator.join(ROWS[0]) + "\n" + "".join(separator.join(r.values()) + "\n" for r in ROWS)


def write(path):
    name = path.name
    if name.endswith(".jsonl"):
        path.write_text(TEXT)
    elif name.endswith("array.json"):
        path.write_text(json.dumps(ROWS, indent=2))
    elif name.endswith("object.json"):
        path.write_text(json.dumps({"version": "1.0", "data": ROWS}))
    elif name.endswith("lines.json"):
        path.write_text(TEXT)
    elif name.endswith("bom.csv"):
        path.write_bytes(b"\xef\xbb\xbf" + csv_text(",").encode())
    elif name.endswith(".csv"):
        path.write_text(csv_text(";" if "semicolon" in name else ","))
    elif name.endswith(".tsv"):
        path.write_text(csv_text("\t"))
    elif name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    else:
        pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": pa.Codec("zstd").compress}
        data = pack[path.suffix](TEXT.encode())
        path.write_bytes(data if isinstance(data, bytes) else data.to_pybytes())
    return path


@pytest.mark.parametrize(
    "name",
    [
        *("a.jsonl", "array.json", "object.json", "lines.json", "a.csv", "semicolon.csv", "bom.csv", "a.tsv"),
        *("a.parquet", "a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.xz", "a.jsonl.zst"),
    ],
)
def test_every_format_gives_the_same_rows(tmp_path, name):
    found = read(write(tmp_path / name), cache=tmp_path / "cache", progress=False)
    assert found.dataset["prompt"][:] == [r["prompt"] for r in ROWS]
    assert found.dataset["completion"][:] == [r["completion"] for r in ROWS]
    assert found.dataset["row"][:] == list(range(1, 8))
    assert [json.loads(e) for e in found.dataset["extra"]] == [{"level": "easy"}] * 7
    assert found.layout == "pair"


def test_rows_in_memory_and_datasets(tmp_path):
    for spec in (ROWS, Dataset.from_list(ROWS), DatasetDict({"train": Dataset.from_list(ROWS)})):
        found = read(spec, cache=tmp_path / "cache", progress=False)
        assert found.dataset["completion"][:] == [r["completion"] for r in ROWS]
    with pytest.raises(UserError, match="has no split 'test'; it has: train"):
        open_source(DatasetDict({"train": Dataset.from_list(ROWS)}), split="test")


@pytest.mark.parametrize("size", [3, 64, 1000])
def test_blocks_of_any_size_give_the_same_rows(tmp_path, monkeypatch, size):
    for module in (formats, json_files):
        monkeypatch.setattr(module, "BLOCK_BYTES", size)
        monkeypatch.setattr(module, "ROWS_PER_BLOCK", 2)
    for name in ("a.jsonl", "array.json"):
        blocks = list(open_source(write(tmp_path / name)).batches())
        assert [r for b in blocks for r in b.rows] == ROWS
        numbers = [n for b in blocks for n in (b.numbers or range(b.first_row, b.first_row + len(b.rows)))]
        assert numbers == list(range(1, 8))


def test_a_long_line_across_blocks_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK_BYTES", 100)
    monkeypatch.setattr(formats, "ROW_LIMIT_BYTES", 300)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + json.dumps({"prompt": "x" * 2000}) + "\n" + json.dumps(ROWS[1]))
    blocks = list(open_source(path).batches())
    assert [r for b in blocks for r in b.rows] == ROWS[:2]
    assert [r.row for b in blocks for r in b.rejects] == [2]


def test_text_as_lines_and_paragraphs(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("One line.\nAnother line.\nA third.\n")
    found = read(path, cache=tmp_path / "cache", progress=False)
    assert found.dataset["text"][:] == ["One line.", "Another line.", "A third."]
    path.write_text("King:\nCome here.\n\n\nServant:\nI come.")
    found = read(path, cache=tmp_path / "cache", progress=False)
    assert found.dataset["text"][:] == ["King:\nCome here.", "Servant:\nI come."]
    assert found.dataset["row"][:] == [1, 5]
    found = read(path, layout="lines", cache=tmp_path / "cache", progress=False)
    assert found.dataset["row"][:] == [1, 2, 5, 6]


def test_tagged_tokens(tmp_path):
    path = tmp_path / "ner.txt"
    path.write_text("-DOCSTART- -X- O O\n\nKim NNP B-NP B-PER\nleft VBD B-VP O\n\nNairobi NNP B-NP B-LOC\n")
    found = read(path, task="token-classification", cache=tmp_path / "cache", progress=False)
    assert found.dataset["tokens"][:] == [["Kim", "left"], ["Nairobi"]]
    assert found.dataset["tags"][:] == [["B-PER", "O"], ["B-LOC"]]
    assert found.labels == ["B-LOC", "B-PER", "O"]
    assert found.dataset["row"][:] == [3, 6]


def test_class_names_come_from_the_features(tmp_path):
    features = Features({"tokens": Repeated(Value("string")), "ner_tags": Repeated(ClassLabel(names=["O", "B-PER"]))})
    dataset = Dataset.from_dict({"tokens": [["Kim", "left"]], "ner_tags": [[1, 0]]}, features=features)
    found = read(dataset, task="token-classification", cache=tmp_path / "cache", progress=False)
    assert found.dataset["tags"][0] == ["B-PER", "O"]
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    dataset = Dataset.from_dict({"text": ["good", "bad"], "label": [1, 0]}, features=features)
    dataset.to_parquet(tmp_path / "a.parquet")
    for spec in (dataset, tmp_path / "a.parquet"):
        found = read(spec, task="sequence-classification", cache=tmp_path / "cache", progress=False)
        assert found.dataset["label"][:] == ["pos", "neg"]
        assert found.labels == ["neg", "pos"]


def test_integer_labels_and_tags_without_names(tmp_path):
    rows = [{"text": str(i), "label": i} for i in (10, 2, 1)]
    found = read(rows, task="sequence-classification", cache=tmp_path / "cache", progress=False)
    assert found.labels == ["1", "2", "10"]
    rows = [{"tokens": ["a", "b"], "ner_tags": [3, 0]}]
    found = read(rows, task="token-classification", cache=tmp_path / "cache", progress=False)
    assert found.dataset["tags"][0] == ["3", "0"]


def test_a_folder_takes_the_files_of_the_split(tmp_path):
    for name in ("train.jsonl", "test.jsonl", "README.txt"):
        (tmp_path / name).write_text(TEXT)
    assert open_source(tmp_path, split="test").name == tmp_path.name
    found = read(tmp_path, split="test", cache=tmp_path / "cache", progress=False)
    assert set(found.dataset["source"]) == {"test.jsonl"}
    assert len(found) == 7
    found = read([tmp_path / "train.jsonl", tmp_path / "test.jsonl"], cache=tmp_path / "cache", progress=False)
    assert len(found) == 14
    assert found.report.duplicated_rows == 7


def test_a_dataset_saved_to_disk(tmp_path):
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    assert len(read(tmp_path / "saved", cache=tmp_path / "cache", progress=False)) == 7


def test_images_as_a_folder_paths_and_bytes(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for label, colour in (("red", (255, 0, 0)), ("blue", (0, 0, 255))):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        image.new("RGB", (4, 4), colour).save(tmp_path / "pictures" / label / "1.png")
    found = read(tmp_path / "pictures", task="image-classification", cache=tmp_path / "cache", progress=False)
    assert found.labels == ["blue", "red"]
    assert found.dataset["label"][:] == ["blue", "red"]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"image": "pictures/red/1.png", "label": "red"}) + "\n")
    by_path = read(path, task="image-classification", cache=tmp_path / "cache", progress=False)
    data = (tmp_path / "pictures/red/1.png").read_bytes()
    rows = [{"image": {"bytes": data, "path": None}, "label": "red"}]
    by_bytes = read(rows, task="image-classification", cache=tmp_path / "cache", progress=False)
    assert by_path.dataset[0]["key"] == by_bytes.dataset[0]["key"] == found.dataset[1]["key"]
    from luthier.data.images import open_image

    for value in (by_path.dataset[0]["image"], by_bytes.dataset[0]["image"]):
        assert open_image(value).getpixel((0, 0)) == (255, 0, 0)


def test_the_fingerprint_is_of_the_content(tmp_path):
    path = write(tmp_path / "a.jsonl")
    first = open_source(path).fingerprint()
    path.touch()
    assert open_source(path).fingerprint() == first
    path.write_text(TEXT.replace("easy", "hard"))
    assert open_source(path).fingerprint() != first
    one, two = Dataset.from_list(ROWS), Dataset.from_list([*ROWS, *ROWS]).select(range(7, 14))
    assert open_source(one).fingerprint() == open_source(two).fingerprint()


def test_limit(tmp_path):
    found = read(write(tmp_path / "a.jsonl"), limit=3, cache=tmp_path / "cache", progress=False)
    assert len(found) == 3


def test_a_name_that_is_nowhere(tmp_path):
    with pytest.raises(UserError, match="as a hub dataset it cannot be loaded"):
        open_source("nobody/nothing", base=tmp_path)
