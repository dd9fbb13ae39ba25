"""python -m vlm_jax.cli.demo --release=DIR [--port=7860] [--token_budget=64 --reducer=visionzip]

Shows a page in the browser that asks a release about a picture, at a budget of visual tokens and at the full one.
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
from vlm_jax.demo.trial import Trial
from vlm_jax.generation.engine import CACHE_DTYPES
from vlm_jax.paths import absolute
from vlm_jax.pretrained.loader import DTYPES
from vlm_jax.ranges import Bytes, Count, Natural, Positive, Size
from vlm_jax.serve.service import ServeSettings

RELEASE = flags.DEFINE_string("release", None, "A released folder, or organisation/name on the Hugging Face hub.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "The address to listen on; 0.0.0.0 for all, without a password.")
PORT = numbers.define("port", Natural, 7860, "The port to listen on; 0 for a free one, which is printed.")
DTYPE = flags.DEFINE_enum("dtype", "float32", sorted(DTYPES), "Dtype of parameters and computation.")
MESH = mesh.define()
CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", None, sorted(CACHE_DTYPES), "Dtype of the cache; --dtype if unset.")
ADAPTER = flags.DEFINE_string("adapter", None, "A folder of peft with a LoRA adapter for --release; merged.")
TOKEN_BUDGET = numbers.define(
    "token_budget", Size, None, "What the slider shows first; a ninth of a picture's visual tokens if unset."
)
REDUCER = flags.DEFINE_string("reducer", None, "What the menu shows first; visionzip if unset, where it suits.")
MAX_NEW_TOKENS = numbers.define("max_new_tokens", Size, 128, "Maximum tokens of an answer.")
MAX_LENGTH = numbers.define(
    "max_length", Size, 16384, "Maximum tokens of a prompt with its answer, the image included."
)
CHUNK = numbers.define("chunk", Count, 4, "Maximum tokens between two pieces of an answer, and until Stop has effect.")
MAX_QUESTIONS = numbers.define("max_questions", Count, 32, "Maximum questions that wait; they are answered in order.")
MAX_BUDGETS = numbers.define("max_budgets", Count, 128, "Different pairs of token_budget and reducer until it ends.")
MAX_FILE_BYTES = numbers.define("max_file_bytes", Bytes, 32 * 2**20, "Maximum size of a picture's file.")
MAX_PIXELS = numbers.define("max_pixels", Count, 50_000_000, "Maximum pixels of a picture.")
ANSWER_SECONDS = numbers.define("answer_seconds", Positive, 600.0, "Seconds for an answer.")
SHUTDOWN_SECONDS = numbers.define("shutdown_seconds", Count, 3, "Seconds for open questions after Ctrl-C or SIGTERM.")


def main(argv: list[str]) -> None:
    """Loads the release, and shows the page until it is interrupted."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument: {argv[1]}")
    keep_programs()
    quieten()
    with explained(OSError):
        uvicorn, pages = libraries()
        release = str(RELEASE.value)
        settings = ServeSettings(
            max_new_tokens=MAX_NEW_TOKENS.value,
            max_length=MAX_LENGTH.value,
            max_batch=1,
            num_batches=1,
            batch_wait=0.0,
            chunk=CHUNK.value,
            max_requests=MAX_QUESTIONS.value,
            max_body_bytes=MAX_FILE_BYTES.value,
            max_pixels=MAX_PIXELS.value,
            request_seconds=ANSWER_SECONDS.value,
            max_budgets=MAX_BUDGETS.value,
        )
        model = vlm_jax.from_pretrained(release, dtype=DTYPE.value, mesh=mesh.chosen(MESH.value), adapter=ADAPTER.value)
        trial = Trial(os.path.basename(absolute(release)), model, settings, cache_dtype=CACHE_DTYPE.value)
        made = pages.make_app(trial, token_budget=TOKEN_BUDGET.value, reducer=REDUCER.value)
        logging.getLogger("vlm_jax").info("the page's reducers: %s", ", ".join(trial.choices.reducers))
        config = uvicorn.Config(
            made,
            host=HOST.value,
            port=PORT.value,
            timeout_graceful_shutdown=SHUTDOWN_SECONDS.value,
            server_header=False,
        )
        try:
            uvicorn.Server(config).run()
        finally:
            trial.service.batcher.stop()


def libraries() -> tuple[Any, Any]:
    """The modules `uvicorn` and `demo.page`; raises a ConfigError where the extra is not installed."""
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        return importlib.import_module("uvicorn"), importlib.import_module("vlm_jax.demo.page")
    except ModuleNotFoundError as error:
        told = f"cli.demo: {error.name} is not installed: pip install 'vlm_jax[demo]'"
        raise ConfigError(told) from error


if __name__ == "__main__":
    show_flags()
    flags.mark_flags_as_required(["release"])
    app.run(main)
