"""Generation back-ends: what is kept, what a failing server leaves, and what each one writes."""

from __future__ import annotations

import json
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from test_decoding import PROMPTS, Tokenizer, by_hand, tiny

from luthier.core.errors import LuthierError, UserError
from luthier.core.protocols import Completion
from luthier.core.store import Store
from luthier.generation import Kept, Settings, kept, open_writer
from luthier.generation.endpoint import Endpoint
from luthier.generation.local import Local
from luthier.generation.scripted import Scripted


class Counting:
    """Writes the prompt back, and fails after some prompts."""

    takes, fingerprint = ("ids", "text"), "counting"

    def __init__(self, fails_after=None):
        self.fails_after, self.asked = fails_after, []

    def write(self, prompts, settings, *, samples=1):
        for index, prompt in enumerate(prompts):
            if len(self.asked) == self.fails_after:
                raise LuthierError("the power went.")
            self.asked.append(prompt)
            yield index, [Completion(f"{prompt} {k}", (k, 7), True, (-0.5, -0.25)) for k in range(samples)]


def texts(found):
    return [[c.text for c in some] for some in found]


# -- what is kept


def test_nothing_is_written_twice(tmp_path):
    store, prompts = Store(tmp_path), ["a", "b", "a", "c"]
    first, again = Counting(), Counting()
    found = kept(first, prompts, Settings(), samples=2, store=store)
    assert first.asked == ["a", "b", "c"]
    assert texts(found) == [["a 0", "a 1"], ["b 0", "b 1"], ["a 0", "a 1"], ["c 0", "c 1"]]
    held = kept(again, prompts, Settings(), samples=2, store=store)
    assert again.asked == []
    assert [vars(c) for some in held for c in some] == [vars(c) for some in found for c in some]


def test_a_failure_leaves_what_was_done_and_the_next_run_goes_on(tmp_path):
    store, prompts = Store(tmp_path), list("abcde")
    with pytest.raises(LuthierError, match=r"the power went. 2 of 5 prompts are done and kept: run the same again"):
        kept(Counting(fails_after=2), prompts, Settings(), store=store)
    second = Counting()
    assert texts(kept(second, prompts, Settings(), store=store)) == [[f"{p} 0"] for p in prompts]
    assert second.asked == list("cde")


def test_a_line_cut_short_by_a_kill_is_written_anew(tmp_path):
    store = Store(tmp_path)
    kept(Counting(), ["a", "b"], Settings(), store=store)
    file = Kept(Counting(), store).file(Settings(), 1)
    file.write_bytes(file.read_bytes()[:-9])
    for wanted in (["b"], []):
        writer = Counting()
        assert texts(kept(writer, ["a", "b"], Settings(), store=store)) == [["a 0"], ["b 0"]]
        assert writer.asked == wanted


def test_other_settings_and_samples_are_other_completions(tmp_path):
    store = Store(tmp_path)
    for settings, samples in ((Settings(), 1), (Settings(seed=1), 1), (Settings(temperature=0.5), 1), (Settings(), 2)):
        writer = Counting()
        kept(writer, ["a"], settings, samples=samples, store=store)
        assert writer.asked == ["a"]


def test_a_prompt_of_a_form_that_is_not_taken(tmp_path):
    with pytest.raises(UserError, match="prompt 2 is given as messages, and this back-end takes ids or text"):
        kept(Counting(), ["a", [{"role": "user", "content": "b"}]], Settings(), store=Store(tmp_path))


# -- a model in this process


def test_a_model_writes_what_one_prompt_at_a_time_writes():
    writer = Local(tiny(), Tokenizer(), fingerprint="x", batch_rows=2)
    found = dict(writer.write(PROMPTS, Settings(temperature=0, max_new_tokens=7)))
    assert [found[i][0].token_ids for i in range(len(PROMPTS))] == [by_hand(tiny(), p, 7) for p in PROMPTS]


def test_samples_of_a_prompt_do_not_depend_on_its_neighbours():
    writer, settings = Local(tiny(), Tokenizer(), fingerprint="x"), Settings(max_new_tokens=6, seed=3)
    whole = dict(writer.write(PROMPTS, settings, samples=3))
    lone = dict(writer.write(PROMPTS[2:3], settings, samples=3))
    assert whole[2] == lone[0]
    assert len({c.token_ids for c in whole[1]}) > 1
    assert dict(writer.write(PROMPTS[2:3], Settings(max_new_tokens=6, seed=4), samples=3)) != lone
    assert all(len(c.token_logp) == len(c.token_ids) for c in whole[0])


# -- a script


def test_a_script_replays_and_says_what_it_lacks(tmp_path):
    file = tmp_path / "script.jsonl"
    lines = [{"prompt": "a", "completions": ["1", "2"]}, {"prompt": [5, 6], "completions": ["3"]}]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    writer = open_writer({"scripted": {"file": str(file)}})
    assert texts(dict(writer.write(["a"], Settings(), samples=2)).values()) == [["1", "2"]]
    assert texts(dict(writer.write([[5, 6]], Settings())).values()) == [["3"]]
    with pytest.raises(UserError, match="the script has 1 completions for prompt 1; 2 are asked for"):
        list(writer.write([[5, 6]], Settings(), samples=2))
    file.write_text('{"prompt": "a"}')
    with pytest.raises(UserError, match="line 1"):
        Scripted.read(file)


# -- a server


class Server(ThreadingHTTPServer):
    """Answers with what ``answer(body, number of the request)`` gives: (status, JSON)."""

    def __init__(self, answer):
        self.answer, self.bodies, self.paths, self.keys = answer, [], [], []
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.bodies.append(body)
            self.server.paths.append(self.path)
            self.server.keys.append(self.headers.get("Authorization"))
            status, value = self.server.answer(body, len(self.server.bodies))
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_): ...


def echo(body, number):
    said = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    if "messages" in body:
        choices = [{"message": {"content": f"{said}!"}, "finish_reason": "stop"}] * body["n"]
    else:
        choices = [{"text": f"{said}!", "finish_reason": "length", "logprobs": {"token_logprobs": [-1.0]}}] * body["n"]
    return 200, {"choices": choices}


def test_texts_ids_and_conversations_go_to_a_server(monkeypatch):
    monkeypatch.setenv("SOME_KEY", "secret")
    with Server(echo) as server:
        writer = Endpoint(server.url + "/", "m", api_key_variable="SOME_KEY", parallel=1)
        settings = Settings(temperature=0.5, top_k=7, max_new_tokens=9, stop=("\n",), logp=True)
        found = dict(writer.write(["x", [4, 5], [{"role": "user", "content": "y"}]], settings, samples=2))
    assert texts(found[i] for i in range(3)) == [["x!"] * 2, ["[4, 5]!"] * 2, ["y!"] * 2]
    assert [found[i][0].finished for i in range(3)] == [False, False, True]
    assert found[0][0].token_logp == (-1.0,)
    assert server.paths == ["/v1/completions", "/v1/completions", "/v1/chat/completions"]
    assert server.keys == ["Bearer secret"] * 3
    sent = server.bodies[0]
    assert (sent["model"], sent["n"], sent["temperature"], sent["top_k"]) == ("m", 2, 0.5, 7)
    assert (sent["max_tokens"], sent["stop"], "min_p" in sent) == (9, ["\n"], False)


def test_a_server_that_stumbles_is_asked_again():
    def answer(body, number):
        return (503, {"error": "busy"}) if number < 3 else echo(body, number)

    with Server(answer) as server:
        found = dict(Endpoint(server.url, "m", pause=0.01).write(["x"], Settings()))
    assert found[0][0].text == "x!"
    assert len(server.bodies) == 3


def test_a_server_that_gives_one_at_a_time_is_asked_for_the_rest():
    with Server(lambda body, number: echo({**body, "n": 1}, number)) as server:
        found = dict(Endpoint(server.url, "m").write(["x"], Settings(), samples=3))
    assert len(found[0]) == 3
    assert len({b["seed"] for b in server.bodies}) == 3


def test_a_server_that_breaks_down_leaves_what_it_gave(tmp_path):
    def answer(body, number):
        return echo(body, number) if body["prompt"] in ("a", "b", "c") else (500, {"error": "on fire"})

    store = Store(tmp_path)
    with Server(answer) as server:
        writer = Endpoint(server.url, "m", parallel=1, tries=2, pause=0.01)
        with pytest.raises(LuthierError, match=r"after 2 tries: 500 .*on fire.*3 of 5 prompts are done and kept"):
            kept(writer, list("abcde"), Settings(), store=store)
        server.answer = echo
        asked = len(server.bodies)
        assert texts(kept(writer, list("abcde"), Settings(), store=store)) == [[f"{p}!"] for p in "abcde"]
        assert len(server.bodies) == asked + 2


def test_a_server_that_is_not_there(tmp_path):
    with Server(echo) as server:
        url = server.url
    with pytest.raises(LuthierError, match=r"cannot be reached .* after 2 tries: .*0 of 1 prompts are done"):
        kept(Endpoint(url, "m", tries=2, pause=0.01), ["a"], Settings(), store=Store(tmp_path))


@pytest.mark.parametrize(
    ("answer", "error", "message"),
    [
        ((401, {"error": "no key"}), UserError, r"refuses the request \(401\): .*no key"),
        ((200, {"choices": []}), LuthierError, "without completions"),
        ((200, {"detail": "?"}), LuthierError, "without completions"),
    ],
)
def test_a_server_that_refuses_is_not_asked_again(answer, error, message):
    with Server(lambda body, number: answer) as server, pytest.raises(error, match=message):
        list(Endpoint(server.url, "m", pause=0.01).write(["x"], Settings()))
    assert len(server.bodies) == 1


# -- vLLM


def test_vllm_gets_token_ids_and_settings(monkeypatch):
    class LLM:
        def __init__(self, model):
            self.model = model

        def generate(self, prompts, params, use_tqdm):
            self.seen = (prompts, params)
            step = {9: types.SimpleNamespace(logprob=-0.5)}
            out = types.SimpleNamespace(text="t", token_ids=[9], finish_reason="stop", logprobs=[step])
            return [types.SimpleNamespace(outputs=[out] * p.n) for p in params]

    fake = types.SimpleNamespace(__version__="0", LLM=LLM, SamplingParams=lambda **v: types.SimpleNamespace(**v))
    monkeypatch.setitem(sys.modules, "vllm", fake)
    writer = open_writer({"vllm": {"model": "folder"}}, fingerprint="f")
    found = dict(writer.write([[1, 2], "x"], Settings(max_new_tokens=3, min_p=0.1, logp=True), samples=2))
    assert found[0] == [Completion("t", (9,), True)] * 2
    assert found[0][0].token_logp == (-0.5,)
    prompts, params = writer._engine.seen
    assert prompts == [{"prompt_token_ids": [1, 2]}, {"prompt": "x"}]
    assert (params[0].max_tokens, params[0].top_k, params[0].min_p, params[0].n) == (3, -1, 0.1, 2)
    assert params[0].seed != params[1].seed


def test_back_ends_that_are_not_there(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(UserError, match="pip install 'vllm'"):
        open_writer({"vllm": {"model": "folder"}})
    with pytest.raises(UserError, match="Did you mean 'endpoint'"):
        open_writer({"endpoints": {}})
    with pytest.raises(UserError, match=r"generation back-end endpoint: .*'model'"):
        open_writer({"endpoint": {"url": "http://x"}})
    with pytest.raises(UserError, match="begins with http"):
        open_writer({"endpoint": {"url": "localhost:8000", "model": "m"}})


def test_torch_is_not_left_in_another_state():
    before = torch.random.get_rng_state()
    list(Local(tiny(), Tokenizer(), fingerprint="x").write([[1, 5]], Settings(max_new_tokens=3)))
    assert torch.equal(before, torch.random.get_rng_state())


# -- the recipe's back-end


class Renderer:
    """Prompts as text for servers that know conversations, else as token ids."""

    chat = None

    def prompt_ids(self, row):
        return [1, len(row["prompt"])]

    def messages_of(self, row, column):
        return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": "known"}], None


def workshop(tmp_path, decoding, renderer, spec):
    choice = types.SimpleNamespace(slug=decoding, options={"max_new_tokens": 5, "batch_rows": 4})
    recipe = types.SimpleNamespace(generation=spec)
    return types.SimpleNamespace(
        plan=types.SimpleNamespace(recipe=recipe, decoding=choice), seed=3,
        loaded=types.SimpleNamespace(folder=tmp_path, fingerprint="f"), data=types.SimpleNamespace(renderer=renderer),
    )  # fmt: skip


def test_a_recipe_may_name_who_writes(tmp_path, monkeypatch):
    from luthier.runs import backends

    monkeypatch.setenv("LUTHIER_CACHE", str(tmp_path))
    renderer = Renderer()
    with Server(echo) as server:
        shop = workshop(tmp_path, "greedy", renderer, {"endpoint": {"url": server.url, "model": "m"}})
        found = backends.write(shop, [{"prompt": "abc"}, [4]], samples=1)
        assert texts(found) == [["[1, 3]!"], ["[4]!"]]
        assert {b["temperature"] for b in server.bodies} == {0.0}
        assert {b["max_tokens"] for b in server.bodies} == {5}
        renderer.chat = object()
        found = backends.write(shop, [{"prompt": "abc"}], samples=2, decoding="sample", temperature=0.7)
        assert texts(found) == [["abc!"] * 2]
        assert (server.bodies[-1]["temperature"], server.bodies[-1]["max_tokens"]) == (0.7, 256)
        shop.plan.decoding.slug = "sorted-ft"
        with pytest.raises(UserError, match="writes by greedy or sample, not by 'sorted-ft'"):
            backends.write(shop, [[4]], samples=1)
