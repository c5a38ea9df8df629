import pytest
from transformers import AutoTokenizer

from luthier import lab
from luthier.lab.tokenizer import tokenizer
from luthier.lab.words import all_words


@pytest.fixture(scope="module")
def words():
    return tokenizer()


@pytest.mark.parametrize(
    "text", ["12+35=", "reverse avird\n", "Grüße 漢字 🎻", "  two  spaces\tand\r\n", "#### -7.5%", "don't", "\x00\x01"]
)
def test_any_text_comes_back(words, text):
    ids = words(text)["input_ids"]
    assert ids[0] == words.bos_token_id
    assert words.decode(ids[1:]) == text


def test_words_of_the_world_are_one_token_and_others_are_spelled(words):
    for word in all_words():
        assert len(words(f" {word}", add_special_tokens=False)["input_ids"]) == 1
    assert words.tokenize("2048") == ["2", "0", "4", "8"]
    assert words.tokenize(" avird") == ["Ġ", "a", "v", "i", "r", "d"]


def test_saved_and_opened_by_plain_transformers(words, tmp_path):
    words.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    rows = lab.dataset("mixture", n=200)
    texts = [row["prompt"] + row["completion"] for row in rows]
    assert again(texts)["input_ids"] == words(texts)["input_ids"]
    assert (again.pad_token_id, again.bos_token_id, again.eos_token_id, again.mask_token_id) == (0, 1, 2, 3)


def test_a_prompt_is_a_prefix_of_its_row(words):
    for row in lab.dataset("mixture", n=400):
        joined = words(row["prompt"] + row["completion"])["input_ids"]
        prompt = words(row["prompt"])["input_ids"]
        assert joined == prompt + words(row["completion"], add_special_tokens=False)["input_ids"]


def test_rows_of_the_mixture_are_short(words):
    rows = lab.dataset("mixture", n=1000)
    lengths = [len(i) for i in words([r["prompt"] + r["completion"] for r in rows])["input_ids"]]
    assert max(lengths) <= 48
