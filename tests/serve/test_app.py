"""The server as clients see it: answers, streams, many requests at once, and requests that are not answered."""

import asyncio
import contextlib
import http.client
import json
import re
import threading

import numpy as np
import openai
import pytest
import safetensors.numpy

import vlm_jax
from vlm_jax.config import ConfigError
from vlm_jax.generation import engine
from vlm_jax.generation.sampling import Sampling
from vlm_jax.serve.batcher import Batcher
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.system import System

from ..advice import tried
from ..processes.alphabet import LETTERS, write
from .conftest import NAME, PNG, asked, sent, serving, shown, until

CHAT = [{"role": "user", "content": "ab"}]


@pytest.fixture(scope="module")
def site(alphabet):
    with serving(alphabet, max_batch=8, chunk=4, max_length=200, max_new_tokens=40, max_body_bytes=20_000) as found:
        yield found


@pytest.mark.parametrize(
    ("options", "text", "reason", "num_tokens"),
    [
        ({}, LETTERS[2:], "stop", 25),
        ({"max_tokens": 3}, "cde", "length", 3),
        ({"max_completion_tokens": 24}, LETTERS[2:], "length", 24),
        ({"stop": "hi"}, "cdefg", "stop", 7),
        ({"stop": ["zz", "f"], "temperature": 0, "top_p": 1, "user": "me", "frequency_penalty": 0}, "cde", "stop", 4),
        ({"stop": ["<end>"], "n": None, "tools": None}, LETTERS[2:], "stop", 25),
    ],
)
def test_an_answer_with_its_end_and_its_counts(site, options, text, reason, num_tokens):
    answer = site.client.chat.completions.create(model=NAME, messages=CHAT, **options)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", text, reason)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, num_tokens)
    assert answer.usage.total_tokens == 2 + num_tokens and answer.usage.visual_tokens == []
    assert (answer.model, answer.object) == (NAME, "chat.completion")


def test_a_stream_has_the_same_answer_in_pieces(site):
    chunks = list(
        site.client.chat.completions.create(
            model=NAME, messages=CHAT, stream=True, stream_options={"include_usage": True}, stop=["xy"]
        )
    )
    *parts, last = chunks
    pieces = [part.choices[0].delta.content for part in parts[1:-1]]
    assert "".join(pieces) == LETTERS[2:23] and len(pieces) > 4
    assert parts[0].choices[0].delta.role == "assistant" and parts[-1].choices[0].finish_reason == "stop"
    assert [part.choices[0].finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
    assert last.choices == [] and last.usage.completion_tokens == 23
    assert len({chunk.id for chunk in chunks}) == 1


def test_models_and_health(site):
    assert [model.id for model in site.client.models.list()] == [NAME]
    assert site.client.models.retrieve(NAME).object == "model"
    with pytest.raises(openai.NotFoundError, match="this server has the model 'alphabet', got 'other/model'"):
        site.client.models.retrieve("other/model")
    until(lambda: sent(site, b"", "GET", "/health") == (200, {"status": "ok", "open_requests": 0}))


def test_draws_are_those_of_the_seed_and_the_choice(site, alphabet):
    answer = site.client.chat.completions.create(
        model=NAME, messages=CHAT, n=3, temperature=1.5, top_p=0.9, seed=7, max_tokens=12
    )
    alone = [
        alphabet.generate(CHAT, max_new_tokens=12, sampling=Sampling(1.5, top_p=0.9, seed=7), rows=[choice])
        for choice in range(3)
    ]
    assert [choice.message.content for choice in answer.choices] == [one.text for one in alone]
    assert [choice.index for choice in answer.choices] == [0, 1, 2] and len({one.text for one in alone}) == 3


def test_fifty_requests_at_once(alphabet, monkeypatch):
    """Half of them as streams, with limits and stop strings of their own, next to broken ones, in five batches."""
    sizes, generate = [], Batcher._generate

    def counted(batcher, jobs):
        sizes.append(len(jobs))
        generate(batcher, jobs)

    monkeypatch.setattr(Batcher, "_generate", counted)

    async def one(client, number):
        start, limit = number % 20, 1 + number % 7
        end = LETTERS[start + 4]
        options = {"max_tokens": limit, "stop": [end], **asked(LETTERS[start])}
        if number % 2:
            answer = await client.chat.completions.create(**options)
            return answer.choices[0].message.content
        stream = await client.chat.completions.create(**options, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def broken(client, body):
        with pytest.raises(openai.BadRequestError):
            await client.chat.completions.create(**body)

    async def all_of_them(port):
        url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=600) as client:
            wrong = [broken(client, asked("a", max_tokens=number)) for number in (0, -1, 10**9, 2**24)]
            return (await asyncio.gather(*(one(client, number) for number in range(50)), *wrong))[:50]

    with serving(alphabet, max_batch=10, batch_wait=60.0) as site:
        answers = asyncio.run(all_of_them(site.port))
    starts = [number % 20 + 1 for number in range(50)]
    assert answers == [LETTERS[start : start + min(1 + number % 7, 3)] for number, start in enumerate(starts)]
    assert sizes == [10] * 5


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"{", 400, "request: expected JSON in UTF-8, got JSONDecodeError"),
        (b"\xff", 400, "request: expected JSON in UTF-8"),
        (b"[" * 10_000, 400, "request: expected JSON in UTF-8, got RecursionError"),
        (b"[1]", 400, "request: expected a JSON object, got a value of type list"),
        (asked("a\ud800"), 400, "request: expected JSON in UTF-8, got UnicodeEncodeError"),
        (b'{"temperature": NaN}', 400, "the constant NaN"),
        ({"model": NAME}, 400, "request.messages: missing"),
        ({"model": NAME, "messages": []}, 400, "request.messages: expected at least one message, got none"),
        ({"model": NAME, "messages": "a"}, 400, "request.messages: expected a list, got a value of type str"),
        ({"model": NAME, "messages": ["a"]}, 400, "message 0: expected an object with role and content, got 'a'"),
        ({"model": NAME, "messages": [{"content": "a"}]}, 400, "message 0: role: expected a text such as 'user'"),
        ({"model": NAME, "messages": [{"role": "user", "content": 3}]}, 400, "message 0: content: expected a text or"),
        (asked("a", temprature=1), 400, "request.temprature: unknown or unused key; did you mean 'temperature'"),
        (asked("a", temperature=-1), 400, "request.temperature: expected at least 0, got -1"),
        (asked("a", temperature="hot"), 400, "request.temperature: expected float, got 'hot'"),
        (asked("a", top_p=0.5), 400, "top_p: is unused at temperature 0; set a temperature above 0"),
        (asked("a", max_tokens=3, max_completion_tokens=3), 400, "request.max_tokens: .* got both"),
        (asked("a", max_tokens=2.5), 400, "request.max_tokens: expected int"),
        (asked("a", stop=[""]), 400, "request.stop: expected at most 16 strings that are not empty"),
        (asked("a", n=9), 400, "request.n: expected at most 8, got 9"),
        (asked("a", stream_options={}), 400, "request.stream_options: expected them with stream=true only"),
        (asked("a", stream=True, stream_options={"x": 1}), 400, "request.stream_options.x: unknown"),
        (asked("a", logprobs=True), 400, "request.logprobs: is not supported"),
        (asked("a", presence_penalty=False), 400, "request.presence_penalty: is not supported"),
        (asked("a", token_budget=4), 400, "request.token_budget: this model has no encoder"),
        (asked("a" * 190, max_tokens=40), 400, "messages: a prompt of 190 tokens and 40 new tokens are over"),
        ({**asked("a"), "model": "gpt"}, 404, "request.model: this server has the model 'alphabet', got 'gpt'"),
        (asked("a" * 30_000), 413, "the body is over the limit of 20000 bytes"),
        (asked([shown(PNG)]), 400, "messages: this model takes only text"),
    ],
)
def test_a_broken_request_is_named(site, body, status, message):
    found, content = sent(site, body)
    assert (found, set(content)) == (status, {"error"}), content
    assert set(content["error"]) == {"message", "type", "param", "code"}
    assert content["error"]["type"] == "invalid_request_error"
    assert re.search(message, content["error"]["message"]), content
    key = re.match(r"request\.(\w+)", content["error"]["message"])
    assert content["error"]["param"] == (key[1] if key else content["error"]["param"])
    assert sent(site, asked("w"))[1]["choices"][0]["message"]["content"] == "xyz"


def test_the_model_thinks_or_not(tmp_path):
    write(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{% if enable_thinking %}x{% endif %}")
    model = vlm_jax.from_pretrained(tmp_path)
    for settings, text in (({}, "bc"), ({"enable_thinking": True}, "yz")):
        with serving(model, **settings) as made:
            answer = made.client.chat.completions.create(**asked("a", max_tokens=2))
            assert answer.choices[0].message.content == text


def test_other_paths_and_methods_have_errors_too(site):
    assert sent(site, b"", "GET", "/v1/other")[0] == 404
    status, content = sent(site, b"", "GET")
    assert status == 405 and content["error"]["message"] == "GET /v1/chat/completions: Method Not Allowed"


def test_what_is_changed_as_said_is_answered(site):
    def refused(body, told):
        error = sent(site, body)[1]["error"]["message"]
        assert re.search(told, error), error

    body = asked("w", logit_bias={"3": 1})
    refused(body, tried("{request.logit_bias}: is not supported by this server; remove it"))
    assert sent(site, {**body, "logit_bias": {}})[0] == 200
    long = asked("a" * 190, max_tokens=11)
    told = tried("are over the limit of {200}; shorten the messages, or reduce max_tokens")
    refused(long, told)
    assert sent(site, {**long, "max_tokens": 10})[0] == 200 and sent(site, asked("a" * 189, max_tokens=11))[0] == 200
    assert sent(site, asked("w" * 190))[1]["usage"]["completion_tokens"] == 4  # as many as there is room for
    large = asked("w", metadata={"image": "a" * 20_000})
    refused(large, tried("the body is over the limit of {20000} bytes; reduce its images"))
    assert sent(site, asked("w"))[0] == 200


def test_a_body_without_a_stated_length_is_limited_too(site):
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)) as connection:
        connection.request("POST", "/v1/chat/completions", (b" " * 1000 for _ in range(21)), encode_chunked=True)
        assert connection.getresponse().status == 413


@pytest.fixture
def gate(monkeypatch):
    """Decoding waits for it; `gate.waiting` is set while it does."""
    gate, decode = threading.Event(), engine.decode
    gate.waiting = threading.Event()

    def waits(*args, **kwargs):
        gate.waiting.set()
        assert gate.wait(60)
        return decode(*args, **kwargs)

    monkeypatch.setattr(engine, "decode", waits)
    yield gate
    gate.set()


def asking(letter, jobs):
    """The job with this prompt."""
    (found,) = [job for job in list(jobs) if list(job.example.pieces[0].ids) == [LETTERS.index(letter)]]
    return found


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_is_gone_leaves_the_batch_and_the_others_stay(alphabet, gate, monkeypatch, stream, opened):
    completions, complete = [], System.complete

    def kept(*args, **kwargs):
        completions.extend(complete(*args, **kwargs))

    monkeypatch.setattr(System, "complete", kept)
    with serving(alphabet, max_batch=2, batch_wait=60.0, chunk=3, num_batches=1) as site:
        gone = opened(site, asked("a", stream=stream, max_tokens=20))
        stays = opened(site, asked("d", max_tokens=20))
        assert gate.waiting.wait(60)
        if stream:
            assert gone.getresponse().read(6) == b"data: "
        leaving = asking("a", site.service.batcher._running)
        gone.close()
        until(leaving.is_cancelled)
        gate.set()
        answer = json.loads(stays.getresponse().read())
        assert answer["choices"][0]["message"]["content"] == LETTERS[4:24]
        until(lambda: completions)
        left, stayed = sorted(completions, key=lambda one: len(one.tokens))
        assert (left.reason, left.text) == ("left", "bcde") and stayed.reason == "length"
        assert sent(site, b"", "GET", "/health")[1]["open_requests"] == 0


def test_a_client_that_is_gone_leaves_the_queue(alphabet, gate, opened):
    with serving(alphabet, max_batch=1, num_batches=1, batch_wait=0.0) as site:
        first = opened(site, asked("w"))
        assert gate.waiting.wait(60)
        waiting = [opened(site, asked(letter)) for letter in "abc"]
        until(lambda: len(site.service.batcher._waiting) == 3)
        leaving = asking("b", site.service.batcher._waiting)
        waiting[1].close()
        until(leaving.is_cancelled)
        gate.set()
        assert json.loads(first.getresponse().read())["choices"][0]["message"]["content"] == "xyz"
        assert [waiting[n].getresponse().status for n in (0, 2)] == [200, 200]
        until(lambda: sent(site, b"", "GET", "/health")[1]["open_requests"] == 0)


def test_a_limit_of_open_requests(alphabet, gate, opened):
    with serving(alphabet, max_requests=2, max_batch=1, num_batches=1, batch_wait=0.0) as site:
        waiting = [opened(site, asked("w")) for _ in range(2)]
        until(lambda: sent(site, b"", "GET", "/health")[1]["open_requests"] == 2)
        status, content = sent(site, asked("w"))
        told = tried("the server has {2} open requests, its limit; wait and ask again")
        assert status == 429 and re.search(told, content["error"]["message"])
        assert content["error"]["type"] == "rate_limit_error"
        gate.set()
        assert [one.getresponse().status for one in waiting] == [200, 200]
        assert sent(site, asked("w"))[1]["choices"][0]["message"]["content"] == "xyz"


def test_a_request_that_takes_too_long_leaves_its_batch(alphabet, gate):
    with serving(alphabet, request_seconds=0.5) as site:
        status, content = sent(site, asked("a"))
        assert (status, content["error"]["type"]) == (504, "timeout_error")
        assert "within 0.5 seconds, the limit of this server" in content["error"]["message"]
        gate.set()
        until(lambda: not site.service.batcher._running)
        assert sent(site, b"", "GET", "/health")[1]["open_requests"] == 0


def test_a_body_that_does_not_come_is_given_up(alphabet):
    with serving(alphabet, request_seconds=0.3) as site:
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest("POST", "/v1/chat/completions")
            connection.putheader("Content-Length", "100")
            connection.endheaders(b"{")
            answer = connection.getresponse()
            assert answer.status == 504 and b"the body was not received within 0.3 seconds" in answer.read()


def test_nan_of_one_request_is_its_own_error(tmp_path, opened):
    write(tmp_path)
    tensors = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    table = tensors["model.embed_tokens.weight"].copy()
    table[LETTERS.index("q")] = np.nan
    tensors["model.embed_tokens.weight"] = table
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors")
    with serving(vlm_jax.from_pretrained(tmp_path), max_batch=2, batch_wait=60.0) as site:
        nan, fine = opened(site, asked("n")), opened(site, asked("r"))
        assert json.loads(fine.getresponse().read())["choices"][0]["message"]["content"] == LETTERS[18:]
        answer = nan.getresponse()
        error = json.loads(answer.read())["error"]
        assert (answer.status, error["type"]) == (500, "server_error")
        assert "the request: the logits of its new token 3 (from 0) are NaN" in error["message"]


def test_a_batch_that_fails_is_an_error_and_the_next_is_answered(alphabet, monkeypatch):
    complete, failing = System.complete, [RuntimeError("out of memory")]

    def fails(*args, **kwargs):
        if failing:
            raise failing.pop()
        return complete(*args, **kwargs)

    monkeypatch.setattr(System, "complete", fails)
    with serving(alphabet) as site:
        status, content = sent(site, asked("w"))
        assert status == 500 and "out of memory" not in content["error"]["message"]
        assert sent(site, asked("w"))[1]["choices"][0]["message"]["content"] == "xyz"


def test_open_requests_are_told_that_the_server_ends(alphabet, gate, opened):
    with serving(alphabet, max_batch=1, num_batches=1, batch_wait=0.0) as site:
        running = opened(site, asked("a", stream=True))
        assert gate.waiting.wait(60)
        waiting = opened(site, asked("a"))
        until(lambda: site.service.batcher._waiting)
        stopping = threading.Thread(target=site.service.batcher.stop)
        stopping.start()
        answer = waiting.getresponse()
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert b"the server is shutting down" in running.getresponse().read()
        gate.set()
        stopping.join(60)
        assert not stopping.is_alive()
        assert sent(site, asked("a"))[0] == 503


def test_on_several_devices_one_batch_is_generated_at_once(tmp_path):
    write(tmp_path)
    shared = vlm_jax.from_pretrained(tmp_path, mesh=make_mesh(MeshSettings(data=8)))
    words = tried("expected 1 on the {} devices of --mesh, got {}; set --max_batch for more answers at once")
    with pytest.raises(ConfigError, match=words), serving(shared, num_batches=2):
        pass
    with serving(shared, max_batch=8, max_new_tokens=40) as site:
        answers = site.client.chat.completions.create(model=NAME, messages=CHAT, n=3)
    assert [choice.message.content for choice in answers.choices] == [LETTERS[2:]] * 3
