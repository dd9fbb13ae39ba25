"""Qwen-VL and Qwen-VL-Chat."""

from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.processing.settings import CLIP_STATISTICS, Folder, end_of_text
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.spelled_prompt import QwenVLPrompt
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.views import NoViews
from vlm_jax.types import Config

# QwenLM/Qwen-VL-Chat, qwen_generation_utils.py, get_stop_words_ids of ChatML, which chat() adds.
END_TOKENS = ("<|im_end|>", "<|im_start|>")
NUM_QUERIES = 256  # of the release's resampler, not in its config


def processor(folder: Folder, config: Config) -> Processor:
    """The processor of a folder; a text-only Qwen has no views."""
    tokenizer = Tokenizer.from_folder(folder)
    if tokenizer.eos_id is None:
        raise PretrainedError(f"{folder}: expected a tokenizer with <|endoftext|>, for padding")
    ends, prompt = (*end_of_text(tokenizer), *END_TOKENS), QwenVLPrompt(tokenizer)
    return Processor(prompt, views(folder, config), tokenizer, tokenizer.eos_id, max_length=None, end_tokens=ends)


def views(folder: Folder, config: Config) -> SquareViews | NoViews:
    """Views of a config, with as many tokens as the resampler has queries; no other file of the folder is read."""
    del folder
    visual = config.get("visual")
    if visual is None:
        return NoViews()
    pixels = Pixels(tuple(CLIP_STATISTICS["image_mean"]), tuple(CLIP_STATISTICS["image_std"]))
    side = visual["image_size"]
    return SquareViews(pixels, (side, side), visual.get("n_queries", NUM_QUERIES), "stretch")
