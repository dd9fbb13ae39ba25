"""Qwen2-VL, Qwen2.5-VL, Qwen2.5-Omni, Qwen3-VL and Qwen3.5, and LLaVA-OneVision 1.5, which has their processor."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vlm_jax.encoders.packed import window_in_blocks
from vlm_jax.pretrained.family import PretrainedError, check_supported, system_section
from vlm_jax.pretrained.processing.settings import (
    HALF_STATISTICS,
    Folder,
    image_settings,
    pad_id,
    pixels,
    video_pixels,
    video_settings,
)
from vlm_jax.processors import as_released
from vlm_jax.processors.boxes import SCALE
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.learned import Learned
from vlm_jax.processors.native import NativeViews, VideoLimits, VolumeLimits
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import Kind, TemplatePrompt
from vlm_jax.processors.smart_resize import qwen_size
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.video import EveryFrame, FrameSampler, RateSampler
from vlm_jax.types import Config, Fields, PatchFormat

# transformers, models/qwen2_vl/image_processing_qwen2_vl.py and video_processing_qwen2_vl.py.
DEFAULTS: Fields = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
IMAGE_PIXELS = {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280}
VIDEO_PIXELS = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
# Maximum tokens of a video: Wang et al. 2024, section 3.2, and Bai et al. 2025, section 2.1.3.
QWEN2_5_VIDEO_TOKENS = 24576
VIDEO_TOKENS = {"qwen2_vl": 16384, "qwen2_5_vl": QWEN2_5_VIDEO_TOKENS}
# transformers, models/qwen3_vl/video_processing_qwen3_vl.py.
QWEN3_VIDEO_PIXELS = {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32}
QWEN3_VIDEO_TOKENS = 768
# transformers, models/qwen2_5_vl/configuration_qwen2_5_vl.py, Qwen2_5_VLVisionConfig.
QWEN2_5_DEFAULTS = {"tokens_per_second": 4, "window_size": 112}
# transformers, models/qwen2_5_omni/configuration_qwen2_5_omni.py, Qwen2_5OmniThinkerConfig.
OMNI_POSITIONS_PER_SECOND = 25
# qwen-omni-utils, v2_5/vision_process.py, VIDEO_TOTAL_PIXELS.
OMNI_VIDEO_TOKENS = 115_200
TOKENS: dict[Kind, str] = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
# Names of Qwen2.5-Omni's tokens in the tokenizer's files, and the tokens where it has no such name.
OMNI_NAMES: dict[Kind, tuple[str, str]] = {"image": ("image_token", "<|IMAGE|>"), "video": ("video_token", "<|VIDEO|>")}
# The template's own tags stay around all parts of a video: processing_qwen3_vl.py, replace_video_token.
QWEN3_PART = "<{seconds} seconds><|vision_start|><|video_pad|><|vision_end|>"
# generation_config.json of Qwen3-VL: the end of a turn, and of a text.
END_TOKENS = ("<|im_end|>", "<|endoftext|>")
# QwenLM/Qwen3-VL, qwen-vl-finetune, data_processor.py, preprocess_qwen_visual.
LEARNED = Learned(end="<|im_end|>\n", crossing=False)


def processor(folder: Folder, config: Config) -> Processor:
    """The processor of a folder of Qwen2-VL or Qwen2.5-VL."""
    return _processor(folder, config, views(folder, config), released=as_released.Qwen25VL())


def views(folder: Folder, config: Config) -> NativeViews:
    """Views of a folder of Qwen2-VL or Qwen2.5-VL."""
    kind, vision = config["model_type"], config["vision_config"]
    fields: Fields = {"max_tokens": VIDEO_TOKENS[kind], "rotary_3d": True}
    if kind == "qwen2_5_vl":
        fields["tokens_per_second"] = float(vision.get("tokens_per_second", QWEN2_5_DEFAULTS["tokens_per_second"]))
        fields["window_size"] = vision.get("window_size", QWEN2_5_DEFAULTS["window_size"])
    return _views(folder, DEFAULTS, **fields)


def processor_omni(folder: Folder, config: Config) -> Processor:
    """The processor of a folder of Qwen2.5-Omni, for texts, images and videos without their sound.

    Times of a video file count with the rate that was asked for, as in the processor of transformers.
    """
    tokenizer = Tokenizer.from_folder(folder)
    tokens: dict[Kind, str] = {kind: tokenizer.names.get(role, name) for kind, (role, name) in OMNI_NAMES.items()}
    made = _processor(folder, config, views_omni(folder, config), tokens=tokens)
    return dataclasses.replace(made, rate_as_asked=True)


def views_omni(folder: Folder, config: Config) -> NativeViews:
    """Views of a folder of Qwen2.5-Omni.

    Frames of videos have the limits of its processor in transformers, which overrides those that files state.
    """
    thinker = system_section(config)
    vision = thinker.get("vision_config") or {}
    return _views(
        folder,
        DEFAULTS,
        max_tokens=OMNI_VIDEO_TOKENS,
        rotary_3d=True,
        tokens_per_second=float(thinker.get("position_id_per_seconds", OMNI_POSITIONS_PER_SECOND)),
        seconds_first=True,
        window_size=vision.get("window_size", QWEN2_5_DEFAULTS["window_size"]),
        video_size=VIDEO_PIXELS,
    )


def processor_of_frames(folder: Folder, config: Config) -> Processor:
    """The processor of a folder of LLaVA-OneVision 1.5: Qwen2.5-VL's, with patches of one frame.

    Positions have one axis. Training learns the answers, as in ds/src/dataset/sft_dataset.py.
    """
    return _processor(folder, config, views_of_frames(folder, config))


def views_of_frames(folder: Folder, config: Config) -> NativeViews:
    """Views of a folder of LLaVA-OneVision 1.5.

    Raises:
      PretrainedError: patches of several frames.
    """
    del config
    defaults: Fields = {**DEFAULTS, "temporal_patch_size": 1}
    check_supported(image_settings(folder, defaults), {"temporal_patch_size": (1,)}, f"{folder}: image processor")
    return _views(folder, defaults, max_tokens=QWEN2_5_VIDEO_TOKENS, class_tokens=True)


def _processor(
    folder: Folder,
    config: Config,
    own: NativeViews,
    *,
    released: as_released.Released | None = None,
    tokens: Mapping[Kind, str] = TOKENS,
) -> Processor:
    """With the template of a folder, and frames of video files selected as it states."""
    tokenizer = Tokenizer.from_folder(folder)
    template = ChatTemplate.from_folder(folder, tokenizer.names)
    prompt = TemplatePrompt(template, tokenizer, marks=tokens, tokens=tokens, learned=LEARNED, released=released)
    pad, sampler = pad_id(tokenizer, config), _sampler(video_settings(folder), folder)
    return Processor(prompt, own, tokenizer, pad, rotary_3d=own.rotary_3d, frame_sampler=sampler)


def _views(
    folder: Folder,
    defaults: Config,
    *,
    max_tokens: int,
    rotary_3d: bool = False,
    window_size: int | None = None,
    tokens_per_second: float | None = None,
    seconds_first: bool = False,
    class_tokens: bool = False,
    video_size: Mapping[str, int] | None = None,
) -> NativeViews:
    """Images, and videos whose frames each are bounded, as the files of a folder state over `defaults`.

    Args:
      folder: of the checkpoint.
      defaults: settings of images that no file states.
      max_tokens: of a video.
      rotary_3d, tokens_per_second, seconds_first: as in `NativeViews`.
      window_size: side of an attention window, in pixels.
      class_tokens: as in `PatchFormat`.
      video_size: limits of the pixels of a frame, whatever the files state; None for those of the files.
    """
    settings, videos = image_settings(folder, defaults), video_settings(folder)
    least, most = _limits(settings, IMAGE_PIXELS)
    frames = _limits(videos, VIDEO_PIXELS) if video_size is None else _limits({}, video_size)
    patch, merge = settings["patch_size"], settings["merge_size"]
    window = None if window_size is None else window_in_blocks(window_size, patch, merge)
    return NativeViews(
        pixels(settings),
        PatchFormat(patch, settings["temporal_patch_size"], merge, window, class_tokens=class_tokens),
        qwen_size,
        least,
        most,
        video_limits=VideoLimits(*frames, max_tokens),
        video_pixels=video_pixels(folder, settings),
        rotary_3d=rotary_3d,
        tokens_per_second=tokens_per_second,
        seconds_first=seconds_first,
    )


def processor3(folder: Folder, config: Config) -> Processor:
    """The processor of a folder of Qwen3-VL or Qwen3.5, which write the time of every temporal patch of a video.

    An answer ends at the end of a turn too: `config.json` of Qwen3.5 states the end of a text alone.
    """
    tokenizer = Tokenizer.from_folder(folder)
    prompt = TemplatePrompt(
        ChatTemplate.from_folder(folder, tokenizer.names),
        tokenizer,
        marks=TOKENS,
        tokens=TOKENS,
        texts={"video": QWEN3_PART},
        between="",
        learned=LEARNED,
        released=as_released.Qwen25VL(),
    )
    sampler, pad = _sampler(video_settings(folder), folder, multiple=1, first_of_parts=False), pad_id(tokenizer, config)
    return Processor(
        prompt,
        views3(folder, config),
        tokenizer,
        pad,
        rotary_3d=True,
        end_tokens=tuple(token for token in END_TOKENS if tokenizer.vocabulary.id_of(token) is not None),
        frame_sampler=sampler,
    )


def views3(folder: Folder, config: Config) -> NativeViews:
    """Views of a folder of Qwen3-VL or Qwen3.5: every temporal patch of a video is a part of its own."""
    del config
    settings, videos = image_settings(folder, DEFAULTS), video_settings(folder)
    least, most = _limits(settings, IMAGE_PIXELS)
    capped = videos.get("max_video_tokens", QWEN3_VIDEO_TOKENS) if videos.get("cap_pixels_per_frame") else None
    return NativeViews(
        pixels(settings),
        PatchFormat(settings["patch_size"], settings["temporal_patch_size"], settings["merge_size"]),
        qwen_size,
        least,
        most,
        video_limits=VolumeLimits(*_limits(videos, QWEN3_VIDEO_PIXELS), capped),
        video_parts=True,
        video_pixels=video_pixels(folder, {**settings, **HALF_STATISTICS}),
        box_scale=SCALE,
        rotary_3d=True,
    )


def _sampler(videos: Config, folder: Folder, **rounding: Any) -> FrameSampler:
    """Selects frames of video files as the folder states, by default as qwen-vl-utils does; `rounding` for others."""
    names = {"fps": "fps", "num_frames": "nframes", "min_frames": "min_frames", "max_frames": "max_frames"}
    given: Fields = {name: videos[key] for key, name in names.items() if key in videos}
    if "nframes" in given and "fps" in given:
        raise PretrainedError(f"{folder}: video processor: num_frames and fps exclude each other; state one of them")
    stated = videos.get("do_sample_frames")
    released = {"multiple": videos.get("temporal_patch_size", 2), "first_of_parts": stated is not None}
    sampler = RateSampler(**given, **(rounding or released))
    return EveryFrame(sampler) if stated is False else sampler


def _limits(settings: Config, defaults: Mapping[str, int]) -> tuple[int, int]:
    """Minimum and maximum pixels; in older files the keys are `min_pixels` and `max_pixels`."""
    size = {**defaults, **(settings.get("size") or {})}
    least, most = settings.get("min_pixels"), settings.get("max_pixels")
    return size["shortest_edge"] if least is None else least, size["longest_edge"] if most is None else most
