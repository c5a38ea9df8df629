"""The lm-evaluation-harness bridge: its results in our form, refusals, and a real task where it is installed."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from luthier.core.errors import UserError
from luthier.evaluation import harness
from luthier.functional.statistics import proportion

RESULTS = {
    "results": {
        "gsm8k": {
            "alias": "gsm8k",
            "exact_match,strict-match": 0.25,
            "exact_match_stderr,strict-match": 0.05,
            "exact_match,flexible-extract": 0.5,
            "exact_match_stderr,flexible-extract": 0.05,
        },
        "wikitext": {
            "alias": "wikitext",
            "word_perplexity,none": 20.0,
            "word_perplexity_stderr,none": "N/A",
            "bits_per_byte,none": 0.75,
            "bits_per_byte_stderr,none": 0.01,
        },
    },
    "higher_is_better": {
        "gsm8k": {"exact_match": True},
        "wikitext": {"word_perplexity": False, "bits_per_byte": False},
    },
    "n-samples": {"gsm8k": {"original": 1319, "effective": 100}, "wikitext": {"original": 62, "effective": 62}},
}


def test_results_in_our_form() -> None:
    found = harness.as_metrics(RESULTS, 0.95)
    assert set(found["gsm8k"]) == {"exact_match (strict-match)", "exact_match (flexible-extract)"}
    strict, wilson = found["gsm8k"]["exact_match (strict-match)"], proportion(25, 100)
    assert strict == {
        "value": 0.25, "n": 100, "low": wilson.low, "high": wilson.high, "unit": "share", "direction": "higher"
    }  # fmt: skip
    perplexity = found["wikitext"]["word_perplexity"]
    assert (perplexity["value"], perplexity["low"], perplexity["direction"]) == (20.0, None, "lower")
    bits = found["wikitext"]["bits_per_byte"]
    assert bits["low"] == pytest.approx(0.75 - 1.959964 * 0.01, abs=1e-8)
    json.dumps(found, allow_nan=False)


def test_absence_is_one_line_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'luthier\[harness\]'"):
        harness.run_harness(None, None, ["hellaswag"])


@pytest.mark.slow
def test_a_real_task(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<s>": 0, "<?>": 1, "yes": 2, "no": 3, "say": 4}, unk_token="<?>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>", pad_token="<s>")
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).train()
    rows = [{"prompt": "say", "choices": [" yes", " no"], "gold": i % 2} for i in range(6)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    (tmp_path / "echo.yaml").write_text(
        f"""
task: luthier_echo
dataset_path: json
dataset_kwargs: {{data_files: {{test: {tmp_path / "rows.jsonl"}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    )
    found = harness.run_harness(model, tokenizer, ["luthier_ech*"], include=tmp_path)
    assert found["luthier_echo"]["acc"]["value"] == 0.5  # one answer to all, and the two are equally often right
    assert found["luthier_echo"]["acc"]["n"] == 6
    assert model.training
    with pytest.raises(UserError, match=r"no task 'luthier_echoo'.*Did you mean 'luthier_echo'"):
        harness.run_harness(model, tokenizer, ["luthier_echoo"], include=tmp_path)
