"""python -m vlm_jax.cli.generate --checkpoint=DIR --prompt="…" [--image=FILE ...]

Answers a prompt about images and videos with a release; the answer is printed as it is generated.
"""

import dataclasses
import os
import signal
import sys

from absl import app, flags
from etils import epath

import vlm_jax
from vlm_jax.cli import mesh, numbers
from vlm_jax.cli.process import explained, keep_programs, quieten, show_flags
from vlm_jax.generation.engine import CACHE_DTYPES
from vlm_jax.generation.sampling import Sampling
from vlm_jax.generation.text import Completion
from vlm_jax.models.vlm import VLM
from vlm_jax.paths import absolute, is_remote
from vlm_jax.pretrained.loader import DTYPES
from vlm_jax.pretrained.pretrained import Pretrained
from vlm_jax.processors.grounding import draw_boxes
from vlm_jax.processors.image import to_picture
from vlm_jax.ranges import Count, Natural, NonNegative, Positive, PositiveShare, Seed, Size

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "A released folder, or organisation/name on the Hugging Face hub.")
PROMPT = flags.DEFINE_string("prompt", None, "The prompt.")
IMAGE = flags.DEFINE_multi_string("image", [], "An image for the prompt; repeatable, in order.")
VIDEO = flags.DEFINE_multi_string("video", [], "A video for the prompt; repeatable, in order.")
DRAW = flags.DEFINE_string("draw", None, "A PNG to write: the first image with the boxes of the answer.")
SYSTEM = flags.DEFINE_string("system", None, "A system message before the prompt.")
MAX_NEW_TOKENS = numbers.define("max_new_tokens", Size, 512, "Maximum tokens of the answer.")
MAX_VISUAL_TOKENS = numbers.define(
    "max_visual_tokens", Size, None, "Maximum visual tokens of an image; as released if unset."
)
TOKEN_BUDGET = numbers.define(
    "token_budget", Size, None, "Visual tokens of an image: a bound, or with --reducer or --connector an exact number."
)
REDUCER = flags.DEFINE_string("reducer", None, "A training-free token reducer that meets --token_budget.")
CONNECTOR = flags.DEFINE_string(
    "connector", None, "A connector that replaces the release's own; its parameters are random, not trained."
)
ADAPTER = flags.DEFINE_string("adapter", None, "A folder of peft with a LoRA adapter for --checkpoint; merged.")
MAX_VIDEO_TOKENS = numbers.define(
    "max_video_tokens", Size, None, "Maximum visual tokens of a video; as released if unset."
)
DO_PAN_AND_SCAN = flags.DEFINE_boolean(
    "do_pan_and_scan",
    None,
    "Whether crops stand beside an oblong image, in Gemma 3; as the folder's image settings state if unset.",
)
ALLOW_NETWORK = flags.DEFINE_boolean("allow_network", False, "Downloads --image and --video with a web address.")
ENABLE_THINKING = flags.DEFINE_boolean(
    "enable_thinking",
    None,
    "Whether the model may think first, if its chat template has this variable; its default if unset.",
)
TEMPERATURE = numbers.define("temperature", NonNegative, 0.0, "Divisor of the logits; 0 selects the most likely token.")
TOP_K = numbers.define("top_k", Count, None, "Samples among the top_k most likely tokens.")
TOP_P = numbers.define(
    "top_p", PositiveShare, None, "Samples among the most likely tokens that together have this probability."
)
REPETITION_PENALTY = numbers.define(
    "repetition_penalty",
    Positive,
    None,
    "Above 1, tokens that already occurred are less likely; the release's if unset.",
)
NO_REPEAT_NGRAM_SIZE = numbers.define(
    "no_repeat_ngram_size",
    Natural,
    None,
    "Never generates an n-gram of this size that already occurs in the prompt or the answer; 0 for no limit; the "
    "release's if unset.",
)
NO_REPEAT_WINDOW = numbers.define(
    "no_repeat_window",
    Count,
    None,
    "With --no_repeat_ngram_size, counts n-grams among so many last tokens; all if unset.",
)
NO_REPEAT_EXCEPT = flags.DEFINE_multi_string(
    "no_repeat_except", [], "With --no_repeat_ngram_size, the name of a token that may end an n-gram again; repeatable."
)
SEED = numbers.define("seed", Seed, 0, "Random seed.")
STOP = flags.DEFINE_multi_string("stop", [], "A string before which the answer ends; repeatable.")
STOP_TOKEN = flags.DEFINE_multi_string("stop_token", [], "The name of a token that ends the answer; repeatable.")
DTYPE = flags.DEFINE_enum("dtype", "float32", sorted(DTYPES), "Dtype of parameters and computation.")
MESH = mesh.define()
CACHE_DTYPE = flags.DEFINE_enum("cache_dtype", None, sorted(CACHE_DTYPES), "Dtype of the cache; --dtype if unset.")
CACHE_LENGTH = numbers.define("cache_length", Count, None, "Slots of the cache; as many as needed if unset.")
CHUNK = numbers.define("chunk", Count, 16, "Maximum tokens between two pieces of text.")


def main(argv: list[str]) -> None:
    """Answers one prompt; the answer is printed as it is generated."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument: {argv[1]}")
    if DRAW.value is not None and not IMAGE.value:
        raise app.UsageError("--draw: boxes are drawn on the first --image, but none is given")
    if DRAW.value is not None and not is_remote(DRAW.value):
        folder = epath.Path(absolute(DRAW.value)).parent
        if not folder.is_dir():
            raise app.UsageError(f"--draw: there is no folder {folder}; create it, or name another file")
    for name, value in (("no_repeat_window", NO_REPEAT_WINDOW.value), ("no_repeat_except", NO_REPEAT_EXCEPT.value)):
        if value and not NO_REPEAT_NGRAM_SIZE.value:
            raise app.UsageError(f"--{name}: only with --no_repeat_ngram_size; add it, or omit the flag")
    keep_programs()
    quieten()
    with explained(OSError):
        penalty, ngram, window = REPETITION_PENALTY.value, NO_REPEAT_NGRAM_SIZE.value, NO_REPEAT_WINDOW.value
        sampling = Sampling(TEMPERATURE.value, TOP_K.value, TOP_P.value, penalty or 1.0, SEED.value)
        model = vlm_jax.from_pretrained(
            str(CHECKPOINT.value),
            dtype=DTYPE.value,
            mesh=mesh.chosen(MESH.value),
            token_budget=TOKEN_BUDGET.value,
            reducer=REDUCER.value,
            connector=CONNECTOR.value,
            adapter=ADAPTER.value,
        )
        release = model.system.sampling
        sampling = dataclasses.replace(
            sampling,
            repetition_penalty=release.repetition_penalty if penalty is None else penalty,
            no_repeat_ngram=release.no_repeat_ngram if ngram is None else ngram,
            no_repeat_window=window,
            no_repeat_except=tuple(map(model.tokenizer.id_of, NO_REPEAT_EXCEPT.value)),
        )
        # Templates of language models expect strings, multimodal ones lists of content items.
        listed = (isinstance(model.module, VLM) and model.module.encoder is not None) or bool(
            IMAGE.value or VIDEO.value
        )

        def message(role: str, text: str, num_images: int = 0, num_videos: int = 0) -> dict:
            seen = [*[{"type": "image"}] * num_images, *[{"type": "video"}] * num_videos]
            parts = [*seen, {"type": "text", "text": text}]
            return {"role": role, "content": parts if listed else text}

        images, videos = list(IMAGE.value), list(VIDEO.value)
        messages = [message("user", str(PROMPT.value), len(images), len(videos))]
        if SYSTEM.value is not None:
            messages.insert(0, message("system", SYSTEM.value))
        options = {} if MAX_VIDEO_TOKENS.value is None else {"max_video_tokens": MAX_VIDEO_TOKENS.value}
        options |= {"allow_network": True} if ALLOW_NETWORK.value else {}
        options |= {} if DO_PAN_AND_SCAN.value is None else {"do_pan_and_scan": DO_PAN_AND_SCAN.value}
        thinking = {} if ENABLE_THINKING.value is None else {"enable_thinking": ENABLE_THINKING.value}
        answer = model.generate(
            messages,
            images,
            videos,
            max_new_tokens=MAX_NEW_TOKENS.value,
            max_visual_tokens=MAX_VISUAL_TOKENS.value,
            sampling=sampling,
            stop=STOP.value,
            stop_tokens=STOP_TOKEN.value,
            processor_options={**options, **thinking},
            chunk=CHUNK.value,
            cache_dtype=CACHE_DTYPE.value,
            cache_length=CACHE_LENGTH.value,
            on_text=say,
        )
        say("\n")
        if DRAW.value is not None:
            draw(model, answer)


def say(text: str) -> None:
    """Prints a piece of the answer; exits the process if the pipe is closed, as with `| head`."""
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for output that Python flushes at exit
        sys.exit(128 + signal.SIGPIPE)


def draw(model: Pretrained, answer: Completion) -> None:
    """Writes the first image with the boxes of the answer."""
    picture = to_picture(IMAGE.value[0], allow_network=ALLOW_NETWORK.value)
    boxes = model.boxes(answer, picture, max_visual_tokens=MAX_VISUAL_TOKENS.value)
    with epath.Path(absolute(str(DRAW.value))).open("wb") as file:
        draw_boxes(picture, boxes).save(file, "PNG")


if __name__ == "__main__":
    show_flags()
    flags.mark_flags_as_required(["checkpoint", "prompt"])
    app.run(main)
