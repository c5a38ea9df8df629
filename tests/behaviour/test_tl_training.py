"""TL-Training in a small world of tools: which call is made first, after learning from dialogues of which a quarter failed.

Ten tools whose names share beginnings (get_weather, get_weather_alerts, ...), and `finish`. A dialogue offers four of the ten and
`finish`; the user asks for one of the four, the assistant calls it, is told "ok" and finishes. In a quarter of the dialogues a wrong
first call comes before: in half of these another offered tool, of the same beginning where there is one, in half an argument that
does not exist; an error follows, then the right call. A chat template names the offered tools in a line and writes calls as
name(argument=json), so that a row has some 60 tokens. The base, a Llama of width 64 with 3 layers over a vocabulary of words, has
learnt 2,000 dialogues without errors in one wording per tool (1,000 steps of 16 dialogues at 3e-3); what it can do is stated.
It is tuned on 800 dialogues in three other wordings: 200 steps of 16 turns at 3e-4, for all arms alike, three seeds of data and
order.

Arms: plain fine-tuning on all turns (sft); without the calls that led to errors (mae); key-token weights, largest 9, on all turns
(pkt); both (mae+pkt); and the mean of turns without key-token weights (mae, mean of turns), which is what the weighted objective is
at weight 1. The third stage, rollouts with a reward, is not part of this. Measured on the first call to 200 new questions in the
three wordings, written greedily: accuracy of tool, argument names, argument values and whole call, the graded reward, the share of
each of seven kinds of error, and the divergence from the base at the last step. Asked of the method: tool accuracy of sft < mae <
mae+pkt, and sft < pkt.

The design was fixed before any arm was run. Two bases were tried before this one, with tools as stubs in the prompt (some 210
tokens a row): after 400 and 600 steps they could not copy a place from the question, so the short form above was taken. With it
the base answers all questions in its own wording and about one in eight in the others.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import luthier
from luthier.functional import tool_calls as calls
from luthier.runs import api

RESULT = Path(__file__).resolve().parents[2] / "docs" / "measured" / "tl-training.json"
QUIET = {"before": False, "generate": False, "calibration": False}
FILTER, ALL_TURNS = ({"tl-training": {"rendering": "template", "drop_errors": drop}} for drop in (True, False))
WHOLE = {"tl-training": {"rendering": "template", "layout": "masked_dialogue"}}
BASE_STEPS = 1000
ARMS = {
    "sft": (ALL_TURNS, "sft"),
    "mae": (FILTER, "sft"),
    "pkt": (ALL_TURNS, {"tl-training": {"max_weight": 9}}),
    "mae+pkt": (FILTER, {"tl-training": {"max_weight": 9}}),
    "mae, mean of turns": (FILTER, {"tl-training": {"max_weight": 1}}),
}
FAILING = 0.25
TEMPLATE = (
    "{{ bos_token }}{% if tools %}Tools:{% for t in tools %} {{ t.function.name }}{% endfor %}\n{% endif %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}Assistant:{% generation %} {{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({% for k, v in c.function.arguments.items() %}{{ k }}={{ v | tojson }}{% endfor %})"
    "{% endfor %}{{ eos_token }}{% endgeneration %}\n"
    "{% else %}{{ m.role | capitalize }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
# Tool -> its argument, and four wordings; the first is the base's.
WORLD = {
    "get_weather": ("city", "what is the weather in", "tell me how the weather is in", "weather now in", "the sky over"),
    "get_weather_alerts": ("city", "any weather alerts in", "tell me the warnings in", "alerts now in", "a storm over"),
    "get_weather_history": ("city", "what was the weather in", "tell me how the weather was in", "weather before in",
                            "the past sky over"),
    "get_time": ("city", "what is the time in", "tell me the time in", "time now in", "how late is it in"),
    "get_time_zone": ("city", "what is the time zone of", "tell me the zone of", "zone now in", "which zone has"),
    "search": ("topic", "look up", "tell me about", "find", "what is"),
    "search_news": ("topic", "look up news of", "tell me the news about", "find news of", "what is new about"),
    "search_images": ("topic", "look up images of", "show me", "find images of", "what looks like"),
    "book_flight": ("city", "book a flight to", "i fly to", "get me a seat to", "one way to"),
    "book_flight_return": ("city", "book a return flight to", "i fly there and back to", "get me two seats to",
                           "both ways to"),
}  # fmt: skip
PLACES = [
    "rome",
    "oslo",
    "lima",
    "accra",
    "hanoi",
    "quito",
    "paris",
    "delhi",
    "cairo",
    "dakar",
    "tunis",
    "sofia",
    "minsk",
    "riga",
    "turin",
    "porto",
    "malmo",
    "bergen",
    "gdansk",
    "leeds",
    "essen",
    "lyon",
    "basel",
    "graz",
    "split",
    "varna",
    "izmir",
    "basra",
    "herat",
    "kyoto",
    "osaka",
    "busan",
    "davao",
    "perth",
    "hobart",
    "suva",
    "apia",
    "lagos",
    "abuja",
    "harare",
]
FINISH = ("finish", "answer")


def tool(name, argument):
    parameters = {"type": "object", "properties": {argument: {"type": "string"}}, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": "", "parameters": parameters}}


def called(name, **arguments):
    return {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


def questions(rng, count, wordings, taken=()):
    """``count`` questions (tool, wording, place) that are not in ``taken``."""
    every = [(name, w, p) for name in WORLD for w in wordings for p in PLACES if (name, w, p) not in taken]
    return [every[i] for i in rng.choice(len(every), size=count, replace=count > len(every))]


def offered(rng, name):
    """Four tools, the right one and one that shares its beginning among them, and finish; in random order."""
    others = [n for n in WORLD if n != name]
    kin = [n for n in others if n.split("_")[0] == name.split("_")[0]]
    near = str(rng.choice(kin))
    rest = rng.choice([n for n in others if n != near], size=2, replace=False)
    names = [name, near, *map(str, rest)]
    chosen = [tool(n, WORLD[n][0]) for n in names] + [tool(*FINISH)]
    return [chosen[i] for i in rng.permutation(len(chosen))], near


def dialogue(rng, question, *, failing):
    """A row with messages and tools."""
    name, wording, place = question
    tools, near = offered(rng, name)
    argument = WORLD[name][0]
    messages = [{"role": "user", "content": f"{WORLD[name][1 + wording]} {place}"}]
    if rng.random() < failing:
        if rng.random() < 0.5:
            messages += [called(near, **{WORLD[near][0]: place}), {"role": "tool", "content": '{"error": "no data"}'}]
        else:
            told = "TypeError: unexpected keyword argument 'place'"
            messages += [called(name, place=place), {"role": "tool", "content": told}]
    messages += [called(name, **{argument: place}), {"role": "tool", "content": "ok"}, called("finish", answer=place)]
    return {"messages": messages, "tools": tools}


def words():
    """A vocabulary of the world's words and of single bytes."""
    text = [w for about in WORLD.values() for wording in about for w in wording.split()]
    text += [*PLACES, *FINISH, *(part for name in WORLD for part in name.split("_"))]
    text += [
        "Function",
        "def",
        "string",
        "Args",
        "place",
        "TypeError",
        "unexpected",
        "keyword",
        "argument",
        "error",
        "no",
        "data",
        "ok",
    ]
    text += ["System", "User", "Assistant", "Output", '"""']
    whole = sorted({form for word in text for form in (word, f"Ġ{word}")} | {"Ċ", "ĠĠĠĠ"})
    special = ["<pad>", "<bos>", "<eos>"]
    tokens = dict.fromkeys([*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), *whole])
    core = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=[], ignore_merges=True))
    split = pre_tokenizers.Split(Regex(r'"""| {4}| ?[A-Za-z]+|\s|[^\sA-Za-z]'), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = TEMPLATE
    return made


def untrained(folder):
    """A Llama that has learnt nothing, with its tokenizer, on disk."""
    tokenizer = words()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tuned(folder, model, rows, stage, objective, *, seed, steps, rate):
    """The model's folder, and the divergence from its start at the last step."""
    run = luthier.tune(
        model=str(model),
        data={"train": rows, "keep": "none", "stages": [stage]},
        objective=objective,
        training={
            "epochs": 100,
            "max_steps": steps,
            "batch_rows": 16,
            "learning_rate": rate,
            "log_steps": max(steps // 4, 1),
        },
        evaluation=QUIET,
        output=str(folder),
        seed=seed,
        quiet=True,
    )
    lines = (Path(run.folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Path(run.folder) / "model", json.loads(lines[-1]).get("kl_to_base")


def measured(model, asked):
    """The summary of the first calls to questions (given as dialogues)."""
    prompts, wanted, known = [], [], []
    for row in asked:
        tools = calls.read_tools(row["tools"])
        # What the template makes of the tools, which prompts given as messages have no place for.
        offer = {"role": "tools", "content": " ".join(t.name for t in tools)}
        prompts.append([offer, row["messages"][0]])
        wanted.append(calls.read_call(row["messages"][1]["tool_calls"][0]))
        known.append(tools)
    texts = api.generate(model, prompts, max_new_tokens=24)
    return calls.summary([calls.judge_text(t, w, k) for t, w, k in zip(texts, wanted, known, strict=True)])


def experiment(folder, seeds=(0, 1, 2), *, lessons=2000, base_steps=BASE_STEPS, dialogues=800, steps=200, asked=200):
    """Every arm at every seed, with what was asked of them."""
    rng = np.random.default_rng(100)
    clean = [dialogue(rng, q, failing=0.0) for q in questions(rng, lessons, (0,))]
    start = untrained(folder / "untrained")
    base, _ = tuned(folder / "base", start, clean, WHOLE, "sft", seed=0, steps=base_steps, rate=3e-3)
    own = [dialogue(rng, q, failing=0.0) for q in questions(rng, asked, (0,))]
    found: dict[str, dict[str, dict]] = {arm: {} for arm in ("base", *ARMS)}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        test = questions(rng, asked, (1, 2, 3))
        rows = [dialogue(rng, q, failing=FAILING) for q in questions(rng, dialogues, (1, 2, 3), set(test))]
        test = [dialogue(rng, q, failing=0.0) for q in test]
        found["base"][str(seed)] = measured(base, test)
        for i, (arm, (stage, objective)) in enumerate(ARMS.items()):
            begun = time.perf_counter()
            place = folder / f"{seed}-{i}"
            model, kl = tuned(place, base, rows, stage, objective, seed=seed, steps=steps, rate=3e-4)
            found[arm][str(seed)] = {
                **measured(model, test),
                "kl_to_base": kl,
                "seconds": round(time.perf_counter() - begun, 1),
            }

    def of(arm, key="tool_accuracy"):
        return np.array([found[arm][str(seed)][key] for seed in seeds])

    pairs = (("mae", "sft"), ("pkt", "sft"), ("mae+pkt", "mae"), ("mae+pkt", "mae, mean of turns"))
    claims = {}
    for better, other in pairs:
        claims[f"tool accuracy of {better} above {other}, mean"] = bool(of(better).mean() > of(other).mean())
        claims[f"tool accuracy of {better} above {other}, seeds"] = int((of(better) > of(other)).sum())
    names = (*found["base"][str(seeds[0])],)
    return {
        "method": "tl-training",
        "design": __doc__,
        "seeds": list(seeds),
        "lessons": lessons,
        "base_steps": base_steps,
        "dialogues": dialogues,
        "steps": steps,
        "asked": asked,
        "base_in_its_own_wording": measured(base, own),
        "arms": found,
        "claims": claims,
        "mean": {
            arm: {name: float(of(arm, name).mean()) for name in (*names, *(() if arm == "base" else ("kl_to_base",)))}
            for arm in found
        },
    }


def test_calls_that_failed_are_not_learnt_and_key_tokens_are_weighted(tmp_path):
    found = experiment(tmp_path)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    assert found["base_in_its_own_wording"]["call_accuracy"] > 0.8
    assert found["mean"]["base"]["tool_accuracy"] < 0.5
    assert found["mean"]["sft"]["tool_accuracy"] > found["mean"]["base"]["tool_accuracy"]
    assert all(np.isfinite(run["kl_to_base"]) for arm in ARMS for run in found["arms"][arm].values())
