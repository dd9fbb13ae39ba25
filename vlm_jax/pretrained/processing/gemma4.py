"""Gemma 4."""

from PIL import Image

from vlm_jax.pretrained.family import PretrainedError, check_supported, text_section
from vlm_jax.pretrained.processing.settings import (
    Folder,
    image_settings,
    pad_id,
    pixels,
    video_pixels,
    video_settings,
)
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.filled import FilledViews, filled_size
from vlm_jax.processors.native import VideoLimits
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.video import MAX_FRAMES, EveryFrame, FrameSampler, RateSampler
from vlm_jax.types import Config, Fields, PatchFormat

# transformers, models/gemma4/image_processing_pil_gemma4.py.
DEFAULTS: Fields = {
    "image_mean": [0.0, 0.0, 0.0],
    "image_std": [1.0, 1.0, 1.0],
    "do_normalize": False,
    "resample": int(Image.Resampling.BICUBIC),
    "patch_size": 16,
    "pooling_kernel_size": 3,
    "max_soft_tokens": 280,
}
# The same of video_processing_gemma4.py, for a frame.
VIDEO_DEFAULTS: Fields = {"do_normalize": True, "max_soft_tokens": 70, "num_frames": 32}
BUDGETS = (70, 140, 280, 560, 1120)
# Names of special tokens in the tokenizer's files, and the tokens where it has no such name.
NAMES = {"boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>", "video_token": "<|video|>"}


def processor(folder: Folder, config: Config) -> Processor:
    """The processor of a folder.

    The time of every frame of a video is written before it. Where the config says so, the tokens of an image or of a
    frame attend to each other in both directions.
    """
    tokenizer = Tokenizer.from_folder(folder)
    start, image, end, video = (tokenizer.names.get(role, name) for role, name in NAMES.items())
    prompt = TemplatePrompt(
        ChatTemplate.from_folder(folder, tokenizer.names),
        tokenizer,
        marks={"image": image, "video": video},
        tokens={"image": image, "video": video},
        texts={"image": f"{start}{image}{end}", "video": f"{{clock}} {start}{video}{end}"},
        between=" ",
    )
    pad, sampler = pad_id(tokenizer, config), _sampler(folder)
    own = views(folder, config)
    return Processor(prompt, own, tokenizer, pad, grouped=is_grouped(config), frame_sampler=sampler)


def is_grouped(config: Config) -> bool:
    """Whether the tokens of an image attend to each other in both directions."""
    return text_section(config).get("use_bidirectional_attention") == "vision"


def views(folder: Folder, config: Config) -> FilledViews:
    """The views of a folder: images and frames that fill a number of visual tokens."""
    del config
    settings = image_settings(folder, DEFAULTS)
    videos: Fields = {**settings, **VIDEO_DEFAULTS, **video_settings(folder)}
    for kind, given in (("image", settings), ("video", videos)):
        check_supported(given, {"max_soft_tokens": BUDGETS}, f"{folder}: {kind} processor")
    for key in ("patch_size", "pooling_kernel_size"):
        check_supported(videos, {key: (settings[key],)}, f"{folder}: video processor")
    form = PatchFormat(settings["patch_size"], merge_size=settings["pooling_kernel_size"], channels_last=True)
    of_block = form.block_size**2
    most = videos["max_soft_tokens"] * of_block
    return FilledViews(
        _of_tower(pixels(settings)),
        form,
        filled_size,
        0,
        settings["max_soft_tokens"] * of_block,
        video_limits=VideoLimits(0, most),
        video_parts=True,
        video_pixels=_of_tower(video_pixels(folder, {**settings, "do_normalize": videos["do_normalize"]})),
        budgets=BUDGETS,
    )


def _of_tower(given: Pixels) -> Pixels:
    """With the tower's own scaling, 2 x - 1, which the released model applies itself."""
    mean = tuple(mean + std / 2 for mean, std in zip(given.mean, given.std, strict=True))
    return Pixels(mean, tuple(std / 2 for std in given.std), given.resample, given.resizes_as)


def _sampler(folder: Folder) -> FrameSampler:
    """Selects frames of video files as the folder states."""
    videos = video_settings(folder)
    if videos.get("fps") is not None and videos.get("num_frames") is not None:
        raise PretrainedError(f"{folder}: video processor: num_frames and fps exclude each other; state one of them")
    if videos.get("fps") is not None:
        own: Fields = {"fps": videos["fps"], "min_frames": 1, "max_frames": MAX_FRAMES}
    else:
        own = {"nframes": videos.get("num_frames", VIDEO_DEFAULTS["num_frames"])}
    sampler = RateSampler(multiple=1, first_of_parts=True, **own)
    return EveryFrame(sampler) if videos.get("do_sample_frames") is False else sampler
