"""InternVL in the format of transformers."""

from vlm_jax.pretrained.family import check_supported
from vlm_jax.pretrained.processing.internvl import LEARNED
from vlm_jax.pretrained.processing.settings import (
    Folder,
    height_and_width,
    image_settings,
    pad_id,
    pixels,
    processor_settings,
    video_pixels,
    video_settings,
)
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.tiles import InternVLViews
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.video import EveryFrame, FrameSampler, MiddleSampler, SegmentSampler
from vlm_jax.types import Config, Fields

# transformers, models/got_ocr2/image_processing_got_ocr2.py; the processor itself enables tiles.
DEFAULTS: Fields = {"size": {"height": 384, "width": 384}, "min_patches": 1, "max_patches": 12}
NAMES = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}


def processor(folder: Folder, config: Config) -> Processor:
    """The processor of a folder."""
    tokenizer = Tokenizer.from_folder(folder)
    start, end, context = (tokenizer.names.get(role, name) for role, name in NAMES.items())
    tagged = f"{start}{context}{end}"
    prompt = TemplatePrompt(
        ChatTemplate.from_folder(folder, tokenizer.names),
        tokenizer,
        marks={"image": context, "video": tokenizer.names.get("video_token", "<video>")},
        tokens={"image": context, "video": context},
        texts={"image": tagged, "video": f"Frame{{number}}: {tagged}"},
        learned=LEARNED,
    )
    pad = pad_id(tokenizer, config)
    return Processor(prompt, views(folder, config), tokenizer, pad, frame_sampler=_sampler(folder))


def views(folder: Folder, config: Config) -> InternVLViews:
    """The views of a folder: dynamic tiles."""
    settings = image_settings(folder, DEFAULTS)
    side, _ = height_and_width(settings["size"], f"{folder}: image processor")
    return InternVLViews(
        pixels(settings),
        side,
        processor_settings(folder).get("image_seq_length", config.get("image_seq_length", 256)),
        settings["min_patches"],
        settings["max_patches"],
        order="port",
        video_pixels=video_pixels(folder, settings),
    )


def _sampler(folder: Folder) -> FrameSampler:
    """Selects frames of video files as the folder states, by default as the release's model cards do."""
    videos = video_settings(folder)
    check_supported(videos, {"initial_shift": (True,)}, f"{folder}: video processor")
    if "num_frames" in videos:
        sampler = MiddleSampler(videos["num_frames"])
    else:
        sampler = MiddleSampler(fps=videos["fps"]) if "fps" in videos else SegmentSampler()
    return EveryFrame(sampler) if videos.get("do_sample_frames") is False else sampler
