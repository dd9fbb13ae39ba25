"""Ovis 2 and Ovis 2.5 in the format of their releases."""

from vlm_jax.pretrained.ovis import (
    AIMV2_DEFAULTS,
    NAVIT_DEFAULTS,
    NUM_INDICATORS,
    NUM_INDICATORS_2_5,
    TOKENIZER_DEFAULTS,
)
from vlm_jax.pretrained.processing.settings import Folder, chat_template, end_of_text, image_settings, pad_id, pixels
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.learned import Learned
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.smart_resize import ovis_size
from vlm_jax.processors.templates import OVIS2, OVIS2_5, OVIS2_5_TRAINING
from vlm_jax.processors.tiles import Ovis2Views
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.views import Views
from vlm_jax.types import Config, PatchFormat

# AIDC-AI/Ovis, conversation_formatter.py, QwenConversationFormatter and Qwen3ConversationFormatter.
LEARNED = Learned(crossing=False)
LEARNED_2_5 = Learned(crossing=False, drops_rest=True)
MAX_PARTS = 9  # of the release's example
MIN_PIXELS, MAX_PIXELS = 448 * 448, 1792 * 1792  # of Ovis 2.5-9B's preprocess_inputs


def processor2(folder: Folder, config: Config) -> Processor:
    """Ovis 2's processor."""
    return _processor(folder, config, views2(folder, config), OVIS2, NUM_INDICATORS)


def views2(folder: Folder, config: Config) -> Ovis2Views:
    """Ovis 2's views: tiles that cover an image."""
    tokenizer = {**TOKENIZER_DEFAULTS, **config["visual_tokenizer_config"]}
    vision = {**AIMV2_DEFAULTS, **tokenizer["backbone_config"]}
    rows = -(-(vision["image_size"] // vision["patch_size"]) // tokenizer["hidden_stride"])
    return Ovis2Views(pixels(image_settings(folder, {})), vision["image_size"], rows * rows, MAX_PARTS)


def processor2_5(folder: Folder, config: Config) -> Processor:
    """Ovis 2.5's processor."""
    return _processor(folder, config, views2_5(folder, config), OVIS2_5, NUM_INDICATORS_2_5, OVIS2_5_TRAINING)


def views2_5(folder: Folder, config: Config) -> NativeViews:
    """Ovis 2.5's views, of native resolution."""
    vision = {**NAVIT_DEFAULTS, **config["vit_config"]}
    patch, stride = vision["patch_size"], vision["hidden_stride"]
    window = None
    if vision["fullatt_block_indexes"] is not None:
        window = vision["window_size"] // stride // patch
    return NativeViews(
        pixels(image_settings(folder, {"resample": 2})),
        PatchFormat(patch, vision["temporal_patch_size"], stride, window),
        ovis_size,
        MIN_PIXELS,
        MAX_PIXELS,
        image_edges=(0, 1),
        video_edges=(2, 3),
    )


def _processor(
    folder: Folder,
    config: Config,
    views: Views,
    template: str,
    num_learned: int,
    training: str | None = None,
) -> Processor:
    tokenizer = Tokenizer.from_folder(folder)
    holder = tokenizer.names["pad_token"]  # the release has negative ids here, which are not tokens
    prompt = TemplatePrompt(
        chat_template(folder, tokenizer, template, own_first=False),
        tokenizer,
        marks={"image": "<image>", "video": "<video>"},
        tokens={"image": holder, "video": holder},
        split=True,
        joined="\n",
        learned=LEARNED if training is None else LEARNED_2_5,
        training=None if training is None else ChatTemplate(training, tokenizer.names),
    )
    # The release's examples pass the EOS of its text tokenizer to generate().
    ends = end_of_text(tokenizer)
    return Processor(prompt, views, tokenizer, pad_id(tokenizer, config), num_learned=num_learned, end_tokens=ends)
