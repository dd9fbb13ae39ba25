"""python -m vlm_jax.cli.serve --release=DIR [--port=8000] [--token_budget=64 --reducer=visionzip]

Answers OpenAI's chat completions with a release, at a budget of visual tokens that a request may set.
"""

import importlib
import logging
import os
from typing import Any

from absl import app, flags

import vlm_jax
from vlm_jax.cli import mesh, numbers
from vlm_jax.cli.process import explained, keep_programs, quieten, show_flags
from vlm_jax.config import ConfigError
from vlm_jax.generation.engine import CACHE_DTYPES
from vlm_jax.paths import absolute
from vlm_jax.pretrained.loader import DTYPES
from vlm_jax.ranges import Bytes, Count, Natural, NonNegative, Positive, Size
from vlm_jax.serve.service import ServeSettings, Service

RELEASE = flags.DEFINE_string("release", None, "A released folder, or organisation/name on the Hugging Face hub.")
NAME = flags.DEFINE_string("name", None, "The model's name in requests; --release if unset, of a folder its own name.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "The address to listen on; 0.0.0.0 for all, without a password.")
PORT = numbers.define("port", Natural, 8000, "The port to listen on; 0 for a free one, which is printed.")
DTYPE = flags.DEFINE_enum("dtype", "float32", sorted(DTYPES), "Dtype of parameters and computation.")
MESH = mesh.define()
CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", None, sorted(CACHE_DTYPES), "Dtype of the cache; --dtype if unset.")
ADAPTER = flags.DEFINE_string("adapter", None, "A folder of peft with a LoRA adapter for --release; merged.")
TOKEN_BUDGET = numbers.define(
    "token_budget", Size, None, "Visual tokens of an image, for requests without their own: see --reducer."
)
REDUCER = flags.DEFINE_string(
    "reducer",
    None,
    "A training-free token reducer that meets --token_budget exactly, for requests without their own; without one it "
    "is a bound.",
)
MAX_BUDGETS = numbers.define("max_budgets", Count, 8, "Different pairs of token_budget and reducer of requests.")
MAX_NEW_TOKENS = numbers.define("max_new_tokens", Size, 512, "Tokens of an answer, for requests without max_tokens.")
MAX_LENGTH = numbers.define("max_length", Size, 16384, "Maximum tokens of a prompt with its answer, images included.")
ENABLE_THINKING = flags.DEFINE_boolean(
    "enable_thinking",
    None,
    "Whether the model may think first, if its chat template has this variable; its default if unset.",
)
MAX_BATCH = numbers.define("max_batch", Size, 8, "Maximum answers that are generated together.")
NUM_BATCHES = numbers.define(
    "num_batches", Count, None, "Batches that are generated at once; 2 if unset; on several devices (--mesh) only 1."
)
BATCH_WAIT = numbers.define("batch_wait", NonNegative, 0.01, "Seconds that a request waits for others in its batch.")
CHUNK = numbers.define("chunk", Count, 8, "Maximum tokens between two pieces of a stream, and until a request leaves.")
MAX_REQUESTS = numbers.define("max_requests", Count, 128, "Maximum open requests; others get status 429.")
MAX_BODY_BYTES = numbers.define("max_body_bytes", Bytes, 32 * 2**20, "Maximum size of a request, and of a download.")
MAX_MEDIA = numbers.define("max_media", Count, 16, "Maximum images and videos of a request.")
MAX_PIXELS = numbers.define("max_pixels", Count, 50_000_000, "Maximum pixels of an image.")
IMAGE_HOSTS = flags.DEFINE_list(
    "image_hosts", [], "Hosts from which images of requests are downloaded; * for any, also of your own network."
)
DOWNLOAD_SECONDS = numbers.define("download_seconds", Positive, 10.0, "Seconds for a download.")
REQUEST_SECONDS = numbers.define(
    "request_seconds", Positive, 600.0, "Seconds from a request's arrival to the end of its answer; then status 504."
)
SHUTDOWN_SECONDS = numbers.define(
    "shutdown_seconds", Count, 30, "Seconds for open requests after Ctrl-C or SIGTERM; none is accepted any more."
)


def main(argv: list[str]) -> None:
    """Loads the release, and answers requests until it is interrupted."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument: {argv[1]}")
    keep_programs()
    quieten()
    with explained(OSError):
        uvicorn, endpoints = libraries()
        release = str(RELEASE.value)
        settings = ServeSettings(
            token_budget=TOKEN_BUDGET.value,
            reducer=REDUCER.value,
            max_new_tokens=MAX_NEW_TOKENS.value,
            max_length=MAX_LENGTH.value,
            max_batch=MAX_BATCH.value,
            num_batches=NUM_BATCHES.value,
            batch_wait=BATCH_WAIT.value,
            chunk=CHUNK.value,
            max_requests=MAX_REQUESTS.value,
            max_body_bytes=MAX_BODY_BYTES.value,
            max_media=MAX_MEDIA.value,
            max_pixels=MAX_PIXELS.value,
            image_hosts=tuple(IMAGE_HOSTS.value),
            download_seconds=DOWNLOAD_SECONDS.value,
            request_seconds=REQUEST_SECONDS.value,
            max_budgets=MAX_BUDGETS.value,
            enable_thinking=ENABLE_THINKING.value,
        )
        devices = mesh.chosen(MESH.value)
        settings.batches_on(devices)  # before weights are read
        model = vlm_jax.from_pretrained(release, dtype=DTYPE.value, mesh=devices, adapter=ADAPTER.value)
        service = Service(NAME.value or named(release), model, settings, cache_dtype=CACHE_DTYPE.value)
        logging.getLogger("vlm_jax").info("the model's name is '%s'", service.name)
        config = uvicorn.Config(
            endpoints.make_app(service),
            host=HOST.value,
            port=PORT.value,
            server_header=False,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS.value,
        )
        uvicorn.Server(config).run()


def libraries() -> tuple[Any, Any]:
    """The modules `uvicorn` and `serve.app`; raises a ConfigError where the extra is not installed."""
    try:
        return importlib.import_module("uvicorn"), importlib.import_module("vlm_jax.serve.app")
    except ModuleNotFoundError as error:
        told = f"cli.serve: {error.name} is not installed: pip install 'vlm_jax[serve]'"
        raise ConfigError(told) from error


def named(release: str) -> str:
    """The name of a release: of a local folder its last part."""
    path = absolute(release)
    return os.path.basename(path) if os.path.exists(path) else release


if __name__ == "__main__":
    show_flags()
    flags.mark_flags_as_required(["release"])
    app.run(main)
