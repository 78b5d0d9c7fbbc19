"""serve.py, asked by the official client: answers are the backbone's, and nobody keeps the decoder busy for long."""

import json
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import uvicorn
from conftest import make_tokenizer, randomise
from transformers import AutoModelForCausalLM

import serve
from common.errors import BadInput
from conversations.prompts import question, tokenise
from conversations.template import ChatTemplate
from decoding.decoder import Decoder
from medusa_model import MedusaConfig, MedusaModel
from serving.text import TextStream

QUESTION = "why is the moon cold"
HEADS = 3


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """A stage 1 directory over a tiny LLaMA that knows 1,024 places."""
    import torch
    from conftest import make_backbone

    torch.manual_seed(3)
    place, tokenizer = tmp_path_factory.mktemp("serve"), make_tokenizer("llama3")
    backbone = make_backbone(max_position_embeddings=1024)
    backbone.generation_config.eos_token_id = tokenizer.eos_token_id
    backbone.save_pretrained(place / "backbone")
    tokenizer.save_pretrained(place / "backbone")
    backbone = AutoModelForCausalLM.from_pretrained(place / "backbone")
    model = MedusaModel.from_backbone(backbone, MedusaConfig(medusa_num_heads=HEADS))
    randomise(model.medusa_heads, 0.05)
    model.freeze_backbone()
    model.save_pretrained(place / "heads")
    return place / "heads"


def build(heads, *flags):
    before, sys.argv = sys.argv, ["serve.py", str(heads), "--name", "tiny", *map(str, flags)]
    try:
        return serve.build(serve.parse_arguments())
    finally:
        sys.argv = before


@pytest.fixture(scope="module")
def server(heads):
    """-> its address. It listens at a free port, in a thread."""
    running = uvicorn.Server(uvicorn.Config(build(heads, "--max_waiting", 150), port=0, log_level="warning"))
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join(10)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client, text=QUESTION, **more):
    asked = {"model": "tiny", "messages": [{"role": "user", "content": text}], "max_tokens": 24}
    return client.chat.completions.create(**asked | more)


@pytest.fixture(scope="module")
def plainly(heads):
    """-> a function that answers without a server or heads, `(text, tokens)`."""
    model = MedusaModel.from_pretrained(heads)
    tokenizer = make_tokenizer("llama3")
    chat, ends = ChatTemplate(tokenizer), {tokenizer.eos_token_id}

    def answer(text, most=24):
        (prompt,) = tokenise([question(text)], chat)
        found = [t for (new,) in Decoder(model, [], 1, 1024).run([prompt], most, ends) for t in new]
        return tokenizer.decode(found, skip_special_tokens=True), found, prompt

    return answer


def test_an_answer_is_the_backbones(client, plainly):
    found = ask(client)
    text, tokens, prompt = plainly(QUESTION)
    assert found.choices[0].message.content == text and found.choices[0].message.role == "assistant"
    ended = tokens[-1] == make_tokenizer("llama3").eos_token_id
    assert found.choices[0].finish_reason == ("stop" if ended else "length")
    assert found.model == "tiny" and found.object == "chat.completion" and found.id.startswith("chatcmpl-")
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(tokens))
    assert usage.total_tokens == len(prompt) + len(tokens) and 1 <= usage.passes <= len(tokens) - 1
    assert [model.id for model in client.models.list()] == ["tiny"]


def test_streamed_it_is_the_same(client, plainly):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    text, tokens, _ = plainly(QUESTION)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    assert next(c.choices[0].delta.role for c in chunks if c.choices) == "assistant"
    assert chunks[-2].choices[0].finish_reason in ("stop", "length")
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == len(tokens)
    assert all(c.usage is None for c in chunks[:-1]) and len({c.id for c in chunks}) == 1


def test_completions(client, plainly):
    text, _, prompt = plainly(QUESTION)
    found = client.completions.create(model="tiny", prompt=prompt, max_tokens=24)
    assert found.choices[0].text == text and found.object == "text_completion"
    words = client.completions.create(model="tiny", prompt=["the moon"], max_tokens=3)
    assert words.usage.completion_tokens == 3 and words.choices[0].finish_reason == "length"
    streamed = client.completions.create(model="tiny", prompt=prompt, max_tokens=24, stream=True)
    assert "".join(c.choices[0].text for c in streamed) == text


def test_stops_and_lengths(client, plainly):
    text, tokens, _ = plainly(QUESTION)
    stop = text[len(text) // 2 :][:3]
    for stream in (False, True):
        found = ask(client, stop=[stop, "never there"], stream=stream)
        if stream:
            chunks = [c.choices[0] for c in found]
            said, reason = "".join(c.delta.content or "" for c in chunks), chunks[-1].finish_reason
        else:
            said, reason = found.choices[0].message.content, found.choices[0].finish_reason
        assert (said, reason) == (text[: text.index(stop)], "stop")
    assert ask(client, max_tokens=None, max_completion_tokens=5).usage.completion_tokens == min(5, len(tokens))
    parts = [{"type": "text", "text": QUESTION[:5]}, {"type": "text", "text": QUESTION[5:]}]
    assert ask(client, text=parts).choices[0].message.content == text


def test_sampling_follows_the_seed_and_greedy_comes_back(client, plainly):
    drawn = [ask(client, temperature=1.5, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2] and drawn[0] != plainly(QUESTION)[0]
    assert ask(client).choices[0].message.content == plainly(QUESTION)[0]


def test_a_hundred_requests_at_once(client, plainly):
    texts = [f"{QUESTION} {'the ' * (i % 7)}" for i in range(100)]
    want = {text: plainly(text, 8)[0] for text in set(texts)}
    with ThreadPoolExecutor(100) as pool:
        found = list(pool.map(lambda text: ask(client, text, max_tokens=8).choices[0].message.content, texts))
    assert found == [want[text] for text in texts] and len(set(found)) > 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_the_decoder(client, server, plainly, stream):
    """It had asked for 900 tokens; the next answer does not wait for them."""
    steps, run = [], Decoder.step

    def slow(self):
        steps.append(time.sleep(0.02))
        return run(self)

    Decoder.step = slow
    try:
        if stream:
            chunks = ask(client, max_tokens=900, stream=True, seed=1, temperature=1.9)
            next(iter(chunks))
            chunks.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                ask(client.with_options(timeout=0.3), max_tokens=900, seed=1, temperature=1.9)
        for _ in range(200):
            if json.load(urllib.request.urlopen(f"{server}/health"))["waiting"] == 0:
                break
            time.sleep(0.02)
        else:
            pytest.fail("the decoder is still busy")
        ask(client, max_tokens=2)
    finally:
        Decoder.step = run
    assert len(steps) < 200  # of some 900 passes


def test_refused_in_the_clients_own_errors(client, server):
    def says(error, code, param, **asked):
        with pytest.raises(error) as raised:
            ask(client, **asked)
        body = raised.value.body
        assert (body["code"], body["param"]) == (code, param) and body["message"]
        return body["message"]

    bad, unsupported = openai.BadRequestError, "unsupported_parameter"
    assert "'other'" in says(openai.NotFoundError, "model_not_found", "model", model="other")
    for name, value in {
        "n": 2, "top_p": 0.5, "logprobs": True, "presence_penalty": 1, "logit_bias": {"5": 1},
        "response_format": {"type": "json_object"},
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    }.items():  # fmt: skip
        assert name in says(bad, unsupported, name, **{name: value})
    says(bad, unsupported, "guided_json", extra_body={"guided_json": {}})
    says(bad, None, "temperature", temperature=3)
    says(bad, None, "max_tokens", max_tokens=0)
    says(bad, None, "stop", stop=["a"] * 5)
    says(bad, None, "messages", messages=[])
    says(
        bad,
        None,
        "messages",
        messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": ""}}]}],
    )
    says(bad, unsupported, "messages", messages=[{"role": "user", "content": "a", "name": "me"}])
    assert "1024" in says(bad, "context_length_exceeded", "messages", text="the " * 2000)
    ask(client, n=1, top_p=1, presence_penalty=0, logprobs=False, user="me", tools=[])  # these change nothing
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(f"{server}/v1/chat/completions", data=b"{")


def test_too_many_wait(heads):
    running = uvicorn.Server(uvicorn.Config(build(heads, "--max_waiting", 0), port=0, log_level="warning"))
    threading.Thread(target=running.run, daemon=True).start()
    while not running.started:
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def one(_):
        try:
            return ask(client, max_tokens=50).object
        except openai.RateLimitError as error:
            return error.body["code"]

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(one, range(12)))
    running.should_exit = True
    assert set(found) == {"chat.completion", "overloaded"}


def test_half_a_character_at_the_end():
    tokenizer = make_tokenizer("llama3")
    ids = tokenizer("moon 🙂", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, [])
    text = "".join(stream.add([token]) for token in ids[:-1]) + stream.end()
    assert text == tokenizer.decode(ids[:-1]) and text.endswith("\N{REPLACEMENT CHARACTER}")


def test_text_of_whole_characters():
    tokenizer = make_tokenizer("llama3")
    ids = tokenizer("cold über salt 🙂 moon", add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer, [])
    pieces = [stream.add([token]) for token in ids]
    assert "".join(pieces) + stream.end() == "cold über salt 🙂 moon"
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    stream = TextStream(tokenizer, ["salty"])  # "salt" could have been its beginning
    pieces = [stream.add([token]) for token in ids]
    assert "".join(pieces) + stream.end() == "cold über salt 🙂 moon" and not stream.stopped


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", 99999], "--port below 65536"),
        (["--max_length", 2000], "--max_length 2000: the backbone knows 1024 positions"),
        (["--adaptive", 4], "--adaptive needs the number of guesses"),
        (["--temperature", -1], "must be 0 or more"),
    ],
)
def test_bad_flags(flags, message, heads):
    with pytest.raises(BadInput, match=message):
        build(heads, *flags)


def test_without_its_packages(heads, monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    monkeypatch.delitem(sys.modules, "serving.app", raising=False)
    with pytest.raises(BadInput, match=r"pip install -r requirements-serve\.txt"):
        build(heads)
