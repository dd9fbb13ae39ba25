"""A server in a thread, on a free port, and clients of it."""

import base64
import contextlib
import http.client
import json
import threading
import time
from types import SimpleNamespace

import openai
import pytest
import uvicorn

import vlm_jax
from vlm_jax.serve.app import make_app
from vlm_jax.serve.service import ServeSettings, Service

from ..processes.alphabet import write

NAME = "alphabet"
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC")


@contextlib.contextmanager
def serving(model, **settings):
    """A server of a model: `service`, `port`, and `client` of the library openai."""
    service = Service(NAME, model, ServeSettings(**settings))
    server = uvicorn.Server(uvicorn.Config(make_app(service), port=0, log_config=None, timeout_graceful_shutdown=10))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        with openai.OpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=600
        ) as client:
            yield SimpleNamespace(service=service, port=port, client=client)
    finally:
        server.should_exit = True
        thread.join()


def sent(site, body, method="POST", path="/v1/chat/completions", **headers):
    """Status and JSON of the answer to a body: bytes, or what is written as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
    with contextlib.closing(connection):
        connection.request(method, path, body if isinstance(body, bytes) else json.dumps(body), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


def asked(text, **more):
    """The arguments of a request with one message."""
    return {"model": NAME, "messages": [{"role": "user", "content": text}], **more}


def shown(content, kind="png"):
    """An item with a picture as a data URL."""
    url = f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def until(condition):
    """Waits until a condition is met, which other threads bring about."""
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("not within a minute")


@pytest.fixture
def opened():
    """Sends a request; its connection may be closed before the answer is read."""
    connections = []

    def opens(site, body):
        connections.append(connection := http.client.HTTPConnection("127.0.0.1", site.port, timeout=60))
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        return connection

    yield opens
    for connection in connections:
        connection.close()


@pytest.fixture(scope="package")
def alphabet(tmp_path_factory):
    """The model that says the alphabet."""
    folder = tmp_path_factory.mktemp("alphabet")
    write(folder)
    return vlm_jax.from_pretrained(folder)
