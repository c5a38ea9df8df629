"""Paired rows: roles, what is translated and what is not, which translations go, and the ways to get them."""

from __future__ import annotations

import json
import logging
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest
from data_tokenizers import byte_level
from datasets import Dataset

from luthier.core.errors import UserError
from luthier.data.layouts import SCHEMA
from luthier.data.render import Renderer
from luthier.functional.cross_lingual import Turn, fault, kept_parts, pieces, preferences, translated, word_by_word
from luthier.methods.data.cross_lingual_optimization import TranslatePairs

WORDS = {"where": "wapi", "is": "ni", "the": "le", "cat": "paka", "dog": "mbwa", "house": "nyumba", "in": "katika"}
ANIMALS = ("cat", "dog", "house")


def dataset(*items):
    import pyarrow as pa

    base = {"kind": "pair", "source": "x.jsonl", "key": "k"}
    rows = [{**base, "row": i + 1, **item} for i, item in enumerate(items)]
    return Dataset(pa.table({name: [row.get(name) for row in rows] for name in SCHEMA.names}, schema=SCHEMA))


def pair(prompt, answer, **extra):
    return {"prompt": prompt, "completion": answer, "extra": json.dumps(extra) if extra else None}


def context(**options):
    return SimpleNamespace(
        renderer=Renderer(byte_level(template=options.pop("template", None)), task="causal-lm", **options)
    )


def columns(*pairs):
    """Rows of (x_en, y_en, x_l, y_l)."""
    return dataset(*(pair(x, y, target_prompt=xl, target_answer=yl) for x, y, xl, yl in pairs))


def stage(**options):
    return TranslatePairs(**{"identify": "none", **options})


SOUND = [(f"where is {a}", f"the {a} is in", f"wapi ni {WORDS[a]}", f"le {WORDS[a]} ni katika") for a in ANIMALS]


def further(row):
    return {k: v for k, v in json.loads(row["extra"]).items() if k not in ("target_prompt", "target_answer")}


def test_an_example_becomes_one_row_for_both_directions_or_two_rows():
    data = columns(*SOUND)
    together = stage().run(data, context())
    assert together.column_names == data.column_names
    assert together.data.table.cast(SCHEMA).num_rows == 3
    roles = []
    for row, (x, y, xl, yl) in zip(together, SOUND, strict=True):
        assert (row["prompt"], row["completion"]) == (xl, yl)
        assert further(row) == {"prompt_language": "target", "other_answer": y, "english_prompt": x}
        roles += preferences(row, "target", y, x)
    wanted = [
        role for x, y, xl, yl in SOUND for role in (("target", xl, yl, y), ("english", x, y, yl))
    ]  # n examples, 2n preference rows
    assert roles == wanted
    apart = stage(paired_batches=False).run(data, context())
    found = [
        preferences(r, *(further(r).get(k) for k in ("prompt_language", "other_answer", "english_prompt")))
        for r in apart
    ]
    assert [role for some in found for role in some] == wanted
    assert len({*together["key"], *apart["key"], "k"}) == 3 + 3 + 1  # a target row is the same in both


def test_conversations_keep_their_system_message_and_several_turns_go(caplog):
    def chat(*contents, system=None):
        roles = ("user", "assistant") * (len(contents) // 2)
        turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=True)]
        before = [{"role": "system", "content": system}] if system else []
        return {"kind": "chat", "messages": json.dumps([*before, *turns])}

    template = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    data = dataset(
        chat("the cat", "the dog", system="be kind"), chat("a", "b", "c", "d"), {"kind": "text", "text": "t"}
    )
    found = stage(translator="dictionary", dictionary=WORDS).run(data, context(template=template))
    assert len(found) == 1
    assert [m["content"] for m in json.loads(found[0]["messages"])] == ["be kind", "le paka", "le mbwa"]
    assert further(found[0])["english_prompt"] == "the cat"
    assert "2 of 3 rows are left out: 2 not one question with one answer" in caplog.text


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (("where", "the cat", "wapi", " "), "empty answer"),
        (("where", "Mira", "wapi", "Mira "), "same answer in both languages"),
        (("12", "the cat", "12", "le paka"), "same prompt in both languages"),
        (("where", "the cat", "wapi", "le"), "length of the answer"),
        (("is", "the cat", "wapi ni le", "le paka"), "length of the prompt"),
        (("{name} is", "the cat", "{jina} ni", "le paka"), "changed code or placeholder in the prompt"),
        (("where", "the `cat`", "wapi", "le `paka`"), "changed code or placeholder in the answer"),
    ],
)
def test_bad_translations_are_left_out_and_counted(broken, reason, caplog):
    found = stage().run(columns(*SOUND, broken), context())
    assert found["completion"][:] == [yl for *_, yl in SOUND]
    assert f"1 of 4 rows are left out: 1 {reason}" in caplog.text
    assert fault(Turn(*broken[:2]), Turn(*broken[2:]), 0.3, 3.0) == reason
    with pytest.raises(UserError, match=f"no row is left of 1: 1 {reason}"):
        stage().run(columns(broken), context())


def test_the_ratio_of_lengths_is_inclusive():
    english = Turn("0123456789", "0123456789")
    for size, wrong in ((2, True), (3, False), (30, False), (31, True)):
        assert (fault(english, Turn("a" * 10, "a" * size), 0.3, 3.0) is not None) == wrong


def test_answers_in_another_language_are_found_without_their_own_help(caplog):
    # "dog cat is in the house": English words in another order than any English answer here.
    sound = [(f"{x} {i}", f"{y} {i}", f"{xl} {i}", f"{yl} {i}") for i in range(4) for x, y, xl, yl in SOUND]
    wrong = ("where is house", "the dog is in", "wapi ni nyumba", "in the house is the dog")
    found = TranslatePairs().run(columns(*sound, wrong), context())
    assert len(found) == 12
    assert "1 answer in another language" in caplog.text
    with pytest.raises(UserError, match=r"there are 3\. Give language_samples, or set identify: none"):
        TranslatePairs().run(columns(*SOUND), context())


def test_samples_of_the_language_take_the_place_of_the_translations(tmp_path):
    (tmp_path / "sw.txt").write_text("le paka ni katika nyumba\nwapi ni le mbwa\n", encoding="utf-8")
    method = TranslatePairs(language_samples=str(tmp_path / "sw.txt"))
    wrong = ("where is house", "the dog is in", "wapi ni nyumba", "in the house is the dog")
    assert len(method.run(columns(*SOUND, wrong), context())) == 3
    with pytest.raises(UserError, match=r"language_samples: cannot read 'nowhere'"):
        TranslatePairs(language_samples="nowhere").run(columns(*SOUND), context())


def test_an_installed_library_may_judge(monkeypatch, caplog):
    class Code:
        EN, SW = SimpleNamespace(name="EN"), SimpleNamespace(name="SW")

        def __class_getitem__(cls, name):
            return {"EN": cls.EN, "SW": cls.SW}[name]

    def language_of(text):
        return SimpleNamespace(iso_code_639_1=Code.SW if text.startswith("le") else Code.EN)

    class Builder:
        @staticmethod
        def from_iso_codes_639_1(*codes):
            assert codes == (Code.EN, Code.SW)
            return SimpleNamespace(build=lambda: SimpleNamespace(detect_language_of=language_of))

    fake = ModuleType("lingua")
    fake.IsoCode639_1, fake.LanguageDetectorBuilder = Code, Builder
    monkeypatch.setitem(sys.modules, "lingua", fake)
    method = TranslatePairs(identify="lingua", language="sw")
    assert len(method.run(columns(*SOUND, ("where is", "the cat", "wapi ni", "paka the")), context())) == 3
    assert "1 answer in another language" in caplog.text
    with pytest.raises(UserError, match="lingua does not know the language 'XX'"):
        TranslatePairs(identify="lingua", language="xx").run(columns(*SOUND), context())
    monkeypatch.setitem(sys.modules, "lingua", None)
    with pytest.raises(UserError, match="pip install 'lingua-language-detector'"):
        method.run(columns(*SOUND), context())


def test_sequences_longer_than_a_row_may_be_leave_the_example_out(caplog):
    long = ("where is " * 6, "the cat", "wapi", "le paka ni")
    data = columns(*SOUND, long)
    lengths = [len(r.input_ids) for r in context().renderer.render_batch(list(data))]
    found = stage(min_length_ratio=0.0).run(data, context(max_length=lengths[-1] - 1))
    assert len(found) == 3
    assert "1 longer than data.max_length" in caplog.text


# -- translators


def test_code_placeholders_and_lines_are_translated_around():
    text = "  See `the cat` at https://a.b/cat?x=1 for {name}, <b>dog</b>\n\n```\nthe house\n```\n 12 + 5\nthe %s"
    cut = pieces(text)
    assert "".join(piece for piece, _ in cut) == text
    assert [piece for piece, open_ in cut if open_] == ["See", "at", "for", "dog", "the"]
    assert kept_parts(text) == Counter(
        ["`the cat`", "https://a.b/cat?x=1", "{name}", "<b>", "</b>", "```\nthe house\n```", "%s"]
    )
    asked = []
    assert translated([text, "dog"], lambda texts: asked.extend(texts) or [t.upper() for t in texts])[1] == "DOG"
    assert asked == ["See", "at", "for", "dog", "the"]
    with pytest.raises(ValueError, match="gave 0 texts for 1"):
        translated(["a"], lambda texts: [])


def test_words_are_looked_up_with_their_capitals():
    assert word_by_word(WORDS)(["The cat, the CAT's 2 dog-house in Mira!"]) == [
        "Le paka, le CAT's 2 dog-house katika Mira!"
    ]


def test_dictionary_file_and_function(tmp_path):
    english = dataset(*(pair(x, y) for x, y, _, _ in SOUND))
    (tmp_path / "words.json").write_text(json.dumps(WORDS), encoding="utf-8")
    (tmp_path / "mine.py").write_text(
        "def turned(texts):\n    return [t[::-1] for t in texts]\n\ndef one(texts):\n    return texts[:1]\n",
        encoding="utf-8",
    )
    given = stage(translator="dictionary", dictionary=str(tmp_path / "words.json")).run(english, context())
    assert given["completion"][:] == [yl for *_, yl in SOUND]
    turned = stage(translator="function", function=f"{tmp_path / 'mine.py'}:turned").run(english, context())
    assert turned["prompt"][:] == [x[::-1] for x, *_ in SOUND]
    for name, problem in (("one", "the translator gave 1 texts for 6"), ("truned", "Did you mean 'turned'")):
        with pytest.raises(UserError, match=problem):
            stage(translator="function", function=f"{tmp_path / 'mine.py'}:{name}").run(english, context())
    for place in ("no_such_module:f", "nowhere.py:f"):
        with pytest.raises(UserError, match=r"function: (cannot import|no file)"):
            stage(translator="function", function=place).run(english, context())
    (tmp_path / "words.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(UserError, match="not a mapping from words to words"):
        stage(translator="dictionary", dictionary=str(tmp_path / "words.json")).run(english, context())


def test_a_sequence_to_sequence_model_translates_every_piece(tmp_path):
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer = byte_level()
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    special = {
        "pad_token_id": 2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
        "forced_eos_token_id": None,
    }
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    config = BartConfig(vocab_size=len(tokenizer), **sizes, **special, **heads)
    model = BartForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    options = {"num_beams": 2, "max_new_tokens": 6}
    method = stage(translator="model", model=str(tmp_path), beams=2, max_new_tokens=6, batch_rows=2)
    texts = ["where is the cat", "hello", "the world"]
    found = method._model()(texts)
    for text, made in zip(texts, found, strict=True):
        ids = model.generate(**tokenizer(text, return_tensors="pt"), **options)
        assert made == tokenizer.decode(ids[0], skip_special_tokens=True).strip()
    with pytest.raises(UserError, match="model: cannot open"):
        stage(translator="model", model=str(tmp_path / "nothing")).run(dataset(pair("a", "b")), context())


def test_models_of_many_languages_are_told_theirs():
    ids = {"__en__": 5, "__sw__": 6, "swh_Latn": 7, "eng_Latn": 8}

    def tokenizer(**about):
        return SimpleNamespace(
            src_lang="", unk_token_id=3, all_special_tokens=["eng_Latn", "swh_Latn"],
            convert_tokens_to_ids=lambda token: ids.get(token, 3), **about,
        )  # fmt: skip

    many = tokenizer(lang_code_to_token={"en": "__en__", "sw": "__sw__"})
    method = stage(translator="model", model="m", language="sw")
    assert method._codes(many) == {"forced_bos_token_id": 6}
    assert many.src_lang == "en"
    nllb = stage(translator="model", model="m", english="eng_Latn", language="swh_Latn")
    assert nllb._codes(tokenizer()) == {"forced_bos_token_id": 7}
    with pytest.raises(UserError, match=r"english: 'm' has no language 'en'\."):
        method._codes(tokenizer())
    with pytest.raises(UserError, match=r"language: 'm' has no language 'None'"):
        stage(translator="model", model="m")._codes(many)
    assert method._codes(SimpleNamespace()) == {}


# -- the rest


def test_twenty_pairs_are_there_for_a_look(tmp_path, caplog):
    many = [(f"{x} {i}", f"{y} {i}", f"{xl} {i}", f"{yl} {i}") for i in range(20) for x, y, xl, yl in SOUND]
    with caplog.at_level(logging.INFO, logger="luthier"):
        stage(sample_file=str(tmp_path / "pairs.jsonl")).run(columns(*many), context())
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(lines) == 20
    assert [line["row"] for line in lines] == list(range(1, 61, 3))
    assert lines[1] == {"row": 4, "prompt": many[3][2], "answer": many[3][3], "english": many[3][1]}
    assert sum("wapi" in record.message for record in caplog.records) == 20


def test_bad_settings_and_rows_get_one_line():
    for options, problem in (
        ({"translator": "dictionary"}, "translator: dictionary needs the option 'dictionary'"),
        ({"model": "m"}, "translator: columns does not read 'model'"),
        ({"identify": "lingua"}, "ISO 639-1"),
        ({"language_samples": "f"}, "language_samples is read by identify: own"),
        ({"min_length_ratio": 3.0}, "min_length_ratio must be below"),
    ):
        with pytest.raises(UserError, match=problem):
            stage(**options)
    with pytest.raises(
        UserError, match=r"^x\.jsonl, row 1: there is no text in the column 'target_prompt'.*'target_promt'"
    ):
        stage().run(dataset(pair("a", "b", target_promt="c")), context())
    with pytest.raises(UserError, match=r"^x\.jsonl, row 1: the row has a column 'other_answer' already"):
        stage().run(dataset(pair("a", "b", other_answer="c")), context())


def test_several_target_languages_make_an_example_each():
    data = dataset(
        *(
            pair(x, y, x_sw=xl, y_sw=yl, x_up=x.upper(), y_up=y.upper())
            for x, y, xl, yl in SOUND
        )
    )  # fmt: skip
    languages = {code: {"target_prompt": f"x_{code}", "target_answer": f"y_{code}"} for code in ("sw", "up")}
    made = stage(languages=languages).run(data, context())
    extra = [json.loads(row["extra"]) for row in made]
    assert [e["target_language"] for e in extra] == ["sw"] * 3 + ["up"] * 3
    assert [row["completion"] for row in made] == [yl for *_, yl in SOUND] + [y.upper() for _, y, *_ in SOUND]
    assert [e["other_answer"] for e in extra] == [y for _, y, *_ in SOUND] * 2
    assert len(set(made["key"])) == 6
    # Each is what the stage makes of its language alone.
    alone = stage(**languages["up"]).run(data, context())
    assert [row["completion"] for row in alone] == [row["completion"] for row in made][3:]
    assert list(alone["key"]) == list(made["key"])[3:]


def test_a_dictionary_for_each_language():
    languages = {"sw": {"dictionary": WORDS}, "xx": {"dictionary": {w: w[::-1] for w in WORDS}}}
    made = stage(translator="dictionary", dictionary={"one": "moja"}, languages=languages).run(
        dataset(pair("where is the cat", "the cat is in the house")), context()
    )
    assert list(made["completion"]) == ["le paka ni katika le nyumba", "eht tac si ni eht esuoh"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"language": "sw", "languages": {"sw": {}, "yo": {}}}, "remove the option 'language'"),
        (
            {"languages": {"sw": {"target_promt": "x"}, "yo": {}}},
            r"sw: there is no option 'target_promt'.*target_prompt",
        ),
        ({"languages": {"sw": {"beams": 0}, "yo": {}}}, r"sw\.beams: "),
        ({"languages": {"sw": {"translator": "model"}, "yo": {}}}, "needs the option 'model'"),
    ],
)
def test_bad_languages_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        stage(**options)
