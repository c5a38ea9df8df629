"""Early-exit decoding against runs without cache, and the acceptance rule against the distribution it must keep."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM as Auto
from transformers import Gemma2Config, GPT2Config, LlamaConfig, OPTConfig, Qwen3Config

from luthier.core import registry
from luthier.core.errors import UserError
from luthier.functional.early_exit import agreement, calibrate, distribution, dynamic, speculative, verify
from luthier.functional.exits import Blocks, first_blocks

END = 2
SIZES = {
    "vocab_size": 24,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "initializer_range": 0.4,
}
IDS = {"bos_token_id": 1, "eos_token_id": END, "pad_token_id": 0}
WIDE = {"intermediate_size": 48, "max_position_embeddings": 64}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, **WIDE, **IDS),
    "gpt2": GPT2Config(vocab_size=24, n_embd=32, n_layer=4, n_head=4, n_positions=64, initializer_range=0.4, **IDS),
    "gemma2": Gemma2Config(
        **SIZES, **WIDE, **IDS, num_key_value_heads=2, head_dim=8, sliding_window=5, final_logit_softcapping=5.0,
        tie_word_embeddings=False,
    ),
    "qwen3": Qwen3Config(**SIZES, **WIDE, **IDS, num_key_value_heads=2, head_dim=8),
    "opt": OPTConfig(
        vocab_size=24, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, ffn_dim=48, init_std=0.4,
        max_position_embeddings=64, word_embed_proj_dim=32, dropout=0.0, **IDS,
    ),
}  # fmt: skip


def tiny(kind="llama", seed=0):
    torch.manual_seed(seed)
    return Auto.from_config(CONFIGS[kind]).eval()


class Tokenizer:
    eos_token_id, pad_token_id = END, 0

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(str(i) for i in ids if not (skip_special_tokens and i in (0, 1, END)))


def context():
    return SimpleNamespace(
        processor=Tokenizer(), device=torch.device("cpu"), rng=lambda name, *keys: torch.Generator().manual_seed(5)
    )


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [[1, *rng.integers(3, 24, size=int(rng.integers(1, 9))).tolist()] for _ in range(count)]


def build(**options):
    return registry.get("decoding", "sorted-ft").build({"max_new_tokens": 16, **options})


def texts(model, asked, **options):
    return [c.token_ids for c in build(**options).generate(model, asked, context())]


def greedy(model, asked, most=16):
    writer = registry.get("decoding", "greedy").build({"max_new_tokens": most})
    return [c.token_ids for c in writer.generate(model, asked, context())]


def peak(logits_V):
    return int(logits_V.argmax())


# -- running a range of blocks


@pytest.mark.parametrize("kind", CONFIGS)
def test_an_exit_is_the_model_cut_there(kind):
    model = tiny(kind)
    ids = torch.tensor([[1, 5, 9, 13, 4, 4, 7, 20, 11]])
    with torch.no_grad():
        whole = model(ids).logits
        wanted = first_blocks(model, 2)(ids).logits
        with Blocks(model) as blocks:
            logits, left = blocks.run(0, 2, ids, logits=9)
            again, _ = blocks.run(2, 4, entering=left, logits=9)
        torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(again, whole, atol=1e-5, rtol=0)
        assert torch.equal(model(ids).logits, whole)  # left as it was


@pytest.mark.parametrize("kind", CONFIGS)
def test_ranges_with_a_cache_in_pieces(kind):
    """The first blocks run ahead token by token, the others follow in two pieces, after a cut."""
    model = tiny(kind)
    ids = torch.tensor([[1, 5, 9, 13, 4, 4, 7, 20, 11]])
    with torch.no_grad(), Blocks(model) as blocks:
        whole = model(ids).logits
        cache = blocks.cache()
        left = [blocks.run(0, 2, ids[:, :3], cache=cache)[1]]
        blocks.run(0, 2, torch.tensor([[17, 18]]), cache=cache)
        cache.cut(3)
        left += [blocks.run(0, 2, ids[:, i : i + 1], cache=cache)[1] for i in range(3, 9)]
        assert cache.held(1) == 9
        assert cache.held(2) == 0
        joint = torch.cat(left, 1)
        first, _ = blocks.run(2, 4, entering=joint[:, :4], cache=cache, logits=4)
        second, _ = blocks.run(2, 4, entering=joint[:, 4:], cache=cache, logits=5)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=5e-5, rtol=0)


def test_storing_makes_the_keys_of_a_block_from_a_given_state():
    model = tiny()
    ids, state = torch.tensor([[1, 5, 9]]), torch.randn(1, 2, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), Blocks(model) as blocks:
        cache = blocks.cache()
        blocks.run(0, 4, ids, cache=cache)
        blocks.store(2, 4, state, cache)
        for index in (2, 3):
            block = model.model.layers[index]
            normed = block.input_layernorm(state)
            heads = (1, 2, 4, 8)
            key = block.self_attn.k_proj(normed).view(heads).transpose(1, 2)
            value = block.self_attn.v_proj(normed).view(heads).transpose(1, 2)
            cos, sin = model.model.rotary_emb(state, torch.tensor([[3, 4]]))
            turned = torch.cat([-key[..., 4:], key[..., :4]], -1)
            torch.testing.assert_close(cache.layers[index].keys[..., 3:, :], key * cos[:, None] + turned * sin[:, None])
            torch.testing.assert_close(cache.layers[index].values[..., 3:, :], value)


def test_deeper_blocks_take_no_cache_and_no_time():
    model = tiny()
    ran = []
    for index, block in enumerate(model.model.layers):
        block.mlp.register_forward_hook(lambda *_, index=index: ran.append(index))
    with torch.no_grad(), Blocks(model) as blocks:
        blocks.stop = 2
        cache = model(torch.tensor([[1, 5]]), use_cache=True).past_key_values
    assert ran == [0, 1]
    assert [layer.keys is not None for layer in cache.layers] == [True, True, False, False]


# -- static


@pytest.mark.parametrize("kind", CONFIGS)
def test_static_writes_what_the_cut_model_writes(kind):
    model, asked = tiny(kind), prompts(6)
    assert texts(model, asked, mode="static", exit=2) == greedy(first_blocks(model, 2), asked)
    assert texts(model, asked) == greedy(model, asked)


# -- speculative


@pytest.mark.parametrize(("exit", "count"), [(1, 50), (3, 10)])
def test_speculative_greedy_is_greedy_on_fifty_prompts(exit, count):
    model, asked = tiny(), prompts(count)
    decoder = build(mode="speculative", exit=exit, draft_length=3)
    assert [c.token_ids for c in decoder.generate(model, asked, context())] == greedy(model, asked)
    assert 0 < decoder.report["accepted_share"] < 1


@pytest.mark.parametrize("kind", CONFIGS)
def test_speculative_greedy_for_other_architectures(kind):
    model, asked = tiny(kind), prompts(6, seed=1)
    assert texts(model, asked, mode="speculative", exit=2, draft_length=4) == greedy(model, asked)


def test_drafting_less_when_unsure_changes_only_the_speed():
    model, asked = tiny(), prompts(8)
    found = {c: build(mode="speculative", exit=2, draft_confidence=c) for c in (0.0, 0.4, 1.0)}
    written = {c: [x.token_ids for x in d.generate(model, asked, context())] for c, d in found.items()}
    assert written[0.0] == written[0.4] == written[1.0] == greedy(model, asked)
    assert found[1.0].report["tokens_per_pass"] == 1.0


def test_acceptance_keeps_the_full_models_distribution():
    full = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]], dtype=torch.float64)
    draft = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    generator, first, second = torch.Generator().manual_seed(0), Counter(), Counter()
    accepted, n = 0, 8000
    for _ in range(n):
        token = int(torch.multinomial(draft, 1, generator=generator))
        stood, after = verify(full, [draft], [token], generator)
        first[token if stood else after] += 1
        if stood:
            accepted += 1
            second[after] += 1
    assert chisquare([first[t] for t in range(4)], full[0].numpy() * n).pvalue > 0.01
    assert chisquare([second[t] for t in range(4)], full[1].numpy() * accepted).pvalue > 0.01
    assert accepted / n == pytest.approx(float(torch.minimum(full[0], draft).sum()), abs=0.02)


def test_speculative_sampling_is_distributed_as_the_model():
    model = tiny(seed=3)
    prompt, generator, n = torch.tensor([[1, 5, 9]]), torch.Generator().manual_seed(0), 600
    with torch.no_grad():
        p1 = distribution(model(prompt).logits[0, -1], 2.0)
        likely = int(p1.argmax())
        p2 = distribution(model(torch.cat([prompt, torch.tensor([[likely]])], 1)).logits[0, -1], 2.0)
    first, second = Counter(), Counter()
    with Blocks(model) as blocks:
        for _ in range(n):
            a, b = speculative(
                blocks, prompt, exit=1, draft_length=2, temperature=2.0, generator=generator, most=2, stop=()
            ).ids
            first[a] += 1
            if a == likely:
                second[b] += 1
    for counted, wanted in ((first, p1), (second, p2)):
        expected = wanted.numpy() * sum(counted.values())
        seen = np.array([counted[t] for t in range(24)])
        big = expected >= 5
        grouped = np.append(seen[big], seen[~big].sum()), np.append(expected[big], expected[~big].sum())
        keep = grouped[1] > 0
        assert chisquare(grouped[0][keep], grouped[1][keep]).pvalue > 0.01


# -- dynamic


def by_hand(model, prompt, exits, thresholds, most):
    """Exact early exit without cache: the whole prefix through every block at each token."""
    cuts = [first_blocks(model, n) for n in exits]
    written, depths = [], []
    while len(written) < most and END not in written:
        ids = torch.tensor([prompt + written])
        for cut, threshold in zip(cuts, [*thresholds, 0.0], strict=True):
            with torch.no_grad():
                p = cut(ids).logits[0, -1].softmax(-1)
            if float(p.max()) >= threshold:
                break
        written.append(int(p.argmax()))
        depths.append(cut.config.num_hidden_layers)
    return written, depths


def between(values):
    """A threshold in the widest gap among the middle values, so that rounding decides nothing."""
    middle = np.sort(values)[len(values) // 3 : -len(values) // 5]
    wide = int(np.diff(middle).argmax())
    return float(middle[wide : wide + 2].mean())


@pytest.mark.parametrize("kind", CONFIGS)
def test_recomputed_keys_are_exact(kind):
    model, asked = tiny(kind), prompts(5)
    given = {"exits": (1, 2, 4), "choose": peak, "most": 12, "stop": (END,), "propagate": False}
    sure, found = ([], []), []
    with Blocks(model) as blocks:
        for prompt in asked:
            dynamic(
                blocks, torch.tensor([prompt]), thresholds=(2, 2), **given,
                observe=lambda exit, confidence, top: exit < 2 and sure[exit].append(confidence),
            )  # fmt: skip
        thresholds = [between(some) for some in sure]
        found = [dynamic(blocks, torch.tensor([p]), thresholds=thresholds, **given) for p in asked]
    assert [(w.ids, w.depths) for w in found] == [by_hand(model, p, (1, 2, 4), thresholds, 12) for p in asked]
    assert {d for w in found for d in w.depths} == {1, 2, 4}


@pytest.mark.filterwarnings("ignore:this model's configuration")
@pytest.mark.parametrize("kv", ["propagate", "recompute"])
def test_the_ends_of_the_threshold(kv):
    model, asked = tiny(), prompts(8)
    assert texts(model, asked, mode="dynamic", exits=[1, 3, 4], thresholds=0.0, kv=kv) == texts(model, asked, exit=1)
    assert texts(model, asked, mode="dynamic", exits=[4], kv=kv) == greedy(model, asked)
    with Blocks(model) as blocks:
        found = [
            dynamic(
                blocks, torch.tensor([p]), exits=(1, 3, 4), thresholds=(1.01, 1.01), choose=peak, most=16, stop=(END,),
                propagate=kv == "propagate",
            )
            for p in asked
        ]  # fmt: skip
    assert [tuple(w.ids) for w in found] == greedy(model, asked)
    assert {d for w in found for d in w.depths} == {4}


def test_propagated_keys_come_from_the_exit():
    """Two tokens leave after block 1, the third goes to the end; the second's keys are then made from its exit."""
    model = tiny()
    prompt = torch.tensor([[1, 5, 9]])
    thresholds, stored, left = [0.0, 2.0], [], []
    with Blocks(model) as blocks:
        run, store = blocks.run, blocks.store

        def noted_run(first, last, *args, **kwargs):
            found = run(first, last, *args, **kwargs)
            left.append((first, last, found[1]))
            return found

        def noted_store(first, last, state, cache):
            stored.append((first, last, state))
            store(first, last, state, cache)

        def choose(logits_V):
            thresholds[0] = 2.0 if len(left) == 2 else 0.0
            return peak(logits_V)

        blocks.run, blocks.store = noted_run, noted_store
        found = dynamic(blocks, prompt, exits=(1, 3, 4), thresholds=thresholds, choose=choose, most=3, stop=())
    assert found.depths == [1, 1, 4]
    # The prompt and the second token through block 1; then the third token catches up with the prompt.
    ranges = [(first, last, state.shape[1]) for first, last, state in left if state is not None]
    assert ranges[:3] == [(0, 1, 3), (0, 1, 1), (0, 1, 1)]
    assert [(first, last) for first, last, _ in stored] == [(1, 3), (3, 4)]
    for _, _, state in stored:  # both segments take the state with which the second token left block 1
        assert torch.equal(state, left[1][2])


@pytest.mark.filterwarnings("ignore:this model's configuration")
def test_rows_have_their_own_depths_and_the_mean_is_reported():
    model, asked = tiny(), prompts(8)
    decoder = build(mode="dynamic", exits=[1, 2, 4], thresholds=[0.6, 0.5])
    together = [c.token_ids for c in decoder.generate(model, asked, context())]
    assert 1 < decoder.report["mean_depth"] < 4
    assert together == [texts(model, [p], mode="dynamic", exits=[1, 2, 4], thresholds=[0.6, 0.5])[0] for p in asked]


def test_thresholds_by_hand():
    confidence = np.array([[0.9, 0.5], [0.8, 0.9], [0.3, 0.7], [0.2, 0.1]])
    agrees = np.array([[True, True], [False, True], [False, True], [True, False]])
    # Leaving at: 0 -> rows at exit 1: T F F T = 0.5; from 0.3 row 4 goes on to the end: T F F T(full).
    assert agreement(confidence, agrees, [0.0, 0.0]) == 0.5
    assert agreement(confidence, agrees, [0.3, 0.3]) == 0.5
    assert agreement(confidence, agrees, [0.5, 0.5]) == 0.75
    assert agreement(confidence, agrees, [0.9, 0.9]) == 1.0
    assert calibrate(confidence, agrees, 0.5) == [0.0, 0.0]
    assert calibrate(confidence, agrees, 0.75) == [0.5, 0.5]
    assert calibrate(confidence, agrees, 1.0) == [0.9, 0.9]
    assert calibrate(confidence, agrees, 0.9, each=True) == [0.9, 0.5]
    assert calibrate(np.array([[1.0]]), np.array([[False]]), 0.5)[0] > 1


@pytest.mark.filterwarnings("ignore:this model's configuration")
@pytest.mark.parametrize("calibration", ["one", "each"])
def test_target_agreement_is_met_on_the_calibration_prompts(calibration):
    model, asked = tiny(), prompts(12)
    decoder = build(
        mode="dynamic", exits=[1, 2, 4], target_agreement=1.0, calibration=calibration, calibration_prompts=12,
        kv="recompute",
    )  # fmt: skip
    found = [c.token_ids for c in decoder.generate(model, asked, context())]
    assert found == greedy(model, asked)  # full agreement on the very prompts
    loose = build(mode="dynamic", exits=[1, 2, 4], target_agreement=0.3, calibration=calibration)
    loose.generate(model, asked, context())
    assert loose.report["mean_depth"] <= decoder.report["mean_depth"]


def test_after_sorted_fine_tuning_drafts_are_accepted_and_the_text_is_greedy():
    from helpers import make_session, random_rows, settings
    from luthier.engine.loop import Trainer
    from luthier.methods.objectives.sorted_ft import SortedFineTuning

    objective = SortedFineTuning(exits=[1, 2, 4])
    torch.manual_seed(0)
    model = Auto.from_config(LlamaConfig(**(SIZES | {"vocab_size": 64}), **WIDE, **IDS))
    asked = prompts(6)

    def tokens_per_pass():
        decoder = build(mode="speculative")
        assert [c.token_ids for c in decoder.generate(model.eval(), asked, context())] == greedy(model, asked)
        return decoder.report["tokens_per_pass"]

    before = tokens_per_pass()
    session = make_session(model, objective=objective)
    Trainer(session, random_rows(), settings(epochs=15)).run()
    objective.finish_model(model, None)
    assert tokens_per_pass() > max(before, 1.0)
    exact = build(mode="dynamic", target_agreement=1.0, kv="recompute")
    assert [c.token_ids for c in exact.generate(model, asked, context())] == greedy(model, asked)
    assert exact.report["mean_depth"] < 4


# -- context, warnings and refusals


@pytest.mark.filterwarnings("ignore:this model's configuration")
@pytest.mark.parametrize("mode", ["static", "dynamic", "speculative"])
def test_a_completion_ends_where_the_context_does(mode):
    model = tiny()
    long = [1, *([5] * 60)]
    found = build(mode=mode).generate(model, [long, [1] * 64, [1, 5]], context())
    assert len(found[0].token_ids) <= 3
    assert (found[1].token_ids, found[1].finished) == ((), False)
    assert found[2].token_ids


def test_an_untrained_model_is_warned_of_and_a_sorted_one_knows_its_exits():
    model, asked = tiny(), prompts(2)
    with pytest.warns(UserWarning, match="how sure an untrained exit is means nothing"):
        texts(model, asked, mode="dynamic")
    model.config.sorted_exits = [2, 4]
    decoder = build(mode="dynamic", thresholds=0.0)
    decoder.generate(model, asked, context())
    assert decoder.report["mean_depth"] == 2


def test_the_model_is_left_in_training_mode_and_whole():
    model = tiny().train()
    texts(model, prompts(2), mode="speculative", exit=1)
    assert model.training
    assert all("forward" not in vars(block) for block in model.model.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exits": [2, 2]}, "increase strictly"),
        ({"exits": [0, 4]}, "increase strictly"),
        ({"exits": [1, 2, 4], "thresholds": [0.5]}, "1 thresholds for 3 exits"),
        ({"target_agreement": 0.9, "thresholds": 0.5}, "remove one of the two"),
    ],
    ids=str,
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        build(mode="dynamic", **options)


@pytest.mark.parametrize("thresholds", [1.5, -0.1, [0.5, 1.5]])
def test_thresholds_outside_zero_and_one_are_refused(thresholds):
    with pytest.raises(ValueError, match="thresholds"):
        build(mode="dynamic", thresholds=thresholds)


def test_beams_are_no_setting_of_it():
    with pytest.raises(ValueError, match="num_beams"):
        build(mode="dynamic", num_beams=4)


@pytest.mark.filterwarnings("ignore:this model's configuration")
def test_exits_must_fit_the_model():
    with pytest.raises(UserError, match="exit: 5 lies beyond the last block; the model has 4 blocks"):
        texts(tiny(), prompts(1), exit=5)
    with pytest.raises(UserError, match="would draft with the whole model of 4 blocks; choose 1 to 3"):
        texts(tiny(), prompts(1), mode="speculative", exit=4)
    with pytest.raises(UserError, match="the last exit, 6, lies beyond the last block"):
        texts(tiny(), prompts(1), mode="dynamic", exits=[2, 6])
    with pytest.raises(UserError, match="2 thresholds for the exits"):
        texts(tiny(), prompts(1), mode="dynamic", thresholds=[0.5, 0.5])
    with pytest.raises(UserError, match="prompt 2 has no token"):
        texts(tiny(), [[1], []])
