"""Requests with pictures: batches against single prompts, budgets of a request, and pictures that are not read."""

import concurrent.futures
import http.server
import io
import re
import threading

import numpy as np
import openai
import pytest
from PIL import Image

from vlm_jax.processors.image import CorruptImage, to_picture

from ..advice import tried
from ..contracts.releases import make
from .conftest import NAME, PNG, asked, sent, serving, shown

TEXTS = ("Which colour?", "What?", "Say it again, please.", "How many?")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def site(model):
    with serving(model, max_batch=4, batch_wait=1.0, max_media=2, max_pixels=4000, max_budgets=4) as found:
        yield found


@pytest.fixture(scope="module")
def pictures():
    """As bytes of PNG files."""
    found = []
    for seed in range(4):
        pixels, file = np.random.default_rng(seed).integers(0, 256, (20 + seed, 24, 3), np.uint8), io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        found.append(file.getvalue())
    return found


def alone(model, text, picture, **options):
    content = [{"type": "image"}, {"type": "text", "text": text}]
    return model.generate([{"role": "user", "content": content}], [picture], max_new_tokens=6, **options)


def answered(site, text, *items, **more):
    content = [*items, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return site.client.chat.completions.create(model=NAME, messages=messages, max_tokens=6, **more)


def test_answers_of_a_batch_are_those_of_each_request_alone(site, model, pictures):
    expected = [alone(model, text, picture) for text, picture in zip(TEXTS, pictures, strict=True)]
    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        jobs = [
            threads.submit(answered, site, text, shown(picture)) for text, picture in zip(TEXTS, pictures, strict=True)
        ]
        found = [job.result() for job in jobs]
    assert [one.choices[0].message.content for one in found] == [one.text for one in expected]
    assert [tuple(one.usage.visual_tokens) for one in found] == [one.visual_tokens for one in expected] == [(16,)] * 4
    assert [one.usage.completion_tokens for one in found] == [len(one.tokens) for one in expected]
    assert len({one.text for one in expected}) == 4


@pytest.mark.parametrize(
    ("tokens", "reducer", "counts"), [(4, "uniform_stride", (4,)), (8, "fastv", (16, 8)), (None, "none", (16,))]
)
def test_a_request_has_a_budget_of_its_own(site, model, pictures, tokens, reducer, counts):
    other = model if tokens is None else model.with_budget(tokens, reducer=reducer)
    expected = alone(other, TEXTS[0], pictures[0])
    found = answered(site, TEXTS[0], shown(pictures[0]), extra_body={"token_budget": tokens, "reducer": reducer})
    assert found.choices[0].message.content == expected.text
    assert tuple(found.usage.visual_tokens)[: len(counts)] == expected.visual_tokens[: len(counts)] == counts


def test_budgets_that_are_not_met(site, pictures):
    items = [shown(pictures[0]), {"type": "text", "text": "a"}]
    for more, message in (
        ({"token_budget": 17, "reducer": "uniform_stride"}, "request.token_budget|request.reducer"),
        ({"reducer": "fastw"}, "request.reducer.kind: no kind 'fastw'; did you mean 'fastv'"),
        ({"token_budget": 5}, "request.token_budget: .*set a reducer or another connector"),
    ):
        status, content = sent(site, asked(items, **more))
        assert status == 400 and re.search(message, content["error"]["message"]), content
    kept = [(None, None), (4, "fastv"), (8, "fastv"), (16, "fastv")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(site.service, "_systems", dict.fromkeys(kept, site.service.system(None, None)))
        told = tried("the server has all its {4} budgets; use one of them")
        refused = sent(site, asked(items, token_budget=2, reducer="fastv"))[1]["error"]["message"]
        assert re.search(told + ": None with reducer None, 4 with reducer fastv", refused)
        assert sent(site, asked(items, token_budget=4, reducer="fastv", max_tokens=1))[0] == 200


class Web(http.server.BaseHTTPRequestHandler):
    """One picture; `asked` counts requests."""

    asked = 0
    picture = b""

    def do_GET(self):
        Web.asked += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.picture)))
        self.end_headers()
        self.wfile.write(self.picture)

    def log_message(self, format, *args):
        """Nothing."""


@pytest.fixture
def web(pictures):
    Web.picture, Web.asked = pictures[1], 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Web)
    threading.Thread(target=server.serve_forever, args=(0.01,)).start()
    yield f"http://127.0.0.1:{server.server_port}/a.png"
    server.shutdown()
    server.server_close()


def test_addresses_of_allowed_hosts_alone_are_read(site, model, pictures, web):
    item = {"type": "image_url", "image_url": {"url": web, "detail": "auto"}}
    with pytest.raises(openai.BadRequestError, match=r"message 0, item 0: .* the host '127.0.0.1' is not allowed"):
        answered(site, TEXTS[1], item)
    assert Web.asked == 0
    expected = alone(model, TEXTS[1], pictures[1])
    with serving(model, image_hosts=("127.0.0.1",)) as open_site:
        assert answered(open_site, TEXTS[1], item).choices[0].message.content == expected.text
    with serving(model, image_hosts=("*",), max_body_bytes=len(pictures[1]) - 1) as small:
        assert Web.asked == 1
        with pytest.raises(openai.BadRequestError, match=r"a\.png: more than \d+ bytes"):
            small.client.chat.completions.create(**asked([item]))


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (shown(b"no picture"), "messages, image 0: UnidentifiedImageError: unknown image format"),
        (shown(PNG[:40]), "messages, image 0: "),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,%"}}, "message 0, item 0: .*not base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png,a"}}, "message 0, item 0: expected data:…;base64"),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "expected a data URL or a web address, got /etc"),
        ({"type": "image_url", "image_url": "file:///etc/passwd"}, "expected a data URL or a web address, got file:"),
        ({"type": "image", "path": "../a.png"}, "message 0, item 0: expected a data URL or a web address"),
        ({"type": "image", "image": "gs://bucket/a.png"}, "expected a data URL or a web address, got gs://bucket"),
        ({"type": "image", "base64": "%"}, "message 0, item 0: base64: "),
        ({"type": "image"}, "message 0, item 0: expected a data URL or a web address, got a value of type NoneType"),
        ({"type": "video", "video": ["/etc/passwd"]}, "expected a data URL or a web address, got /etc/passwd"),
        ({"type": "image_url", "image_url": {"url": "https://[a"}}, "message 0, item 0: .*not a web address"),
        ({"type": "image_url", "image_url": {"url": shown(PNG)["image_url"]["url"], "detail": "low"}}, "detail is not"),
        ({"type": "input_audio", "input_audio": {}}, "no item of type 'input_audio' is read"),
        ("a", "message 0, item 0: expected a dict"),
    ],
)
def test_what_is_no_picture_is_named(site, item, message):
    status, content = sent(site, asked([item]))
    assert (status, content["error"]["type"], content["error"]["param"]) == (400, "invalid_request_error", "messages")
    assert re.search(message, content["error"]["message"]), content


def test_limits_of_pictures(site, pictures):
    status, content = sent(site, asked([shown(PNG)] * 3))
    assert (status, content["error"]["message"]) == (400, "messages: expected at most 2 images and videos, got 3")
    file = io.BytesIO()
    Image.new("RGB", (64, 63)).save(file, "PNG")
    status, content = sent(site, asked([shown(file.getvalue())]))
    assert status == 400 and "its header claims 63x64 pixels, more than max_pixels=4000" in content["error"]["message"]
    with pytest.raises(CorruptImage, match="63x64"):
        to_picture(file.getvalue(), max_pixels=4000)
