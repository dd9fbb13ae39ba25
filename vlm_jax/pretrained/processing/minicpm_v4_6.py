"""MiniCPM-V 4.6."""

from PIL import Image

from vlm_jax.pretrained.family import check_supported
from vlm_jax.pretrained.minicpm_v4_6 import DEFAULTS as MODEL_DEFAULTS
from vlm_jax.pretrained.processing.settings import (
    HALF_STATISTICS,
    Folder,
    image_settings,
    pad_id,
    pixels,
    processor_settings,
    video_pixels,
    video_settings,
)
from vlm_jax.processors.boxes import SCALE
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt, TiledText, VideoText
from vlm_jax.processors.sliced import SlicedViews, area_size
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.video import EveryFrame, FrameSampler, SecondSampler
from vlm_jax.types import Config, Fields, PatchFormat

# transformers, models/minicpmv4_6, image_processing_pil_minicpmv4_6.py; video_processing_minicpmv4_6.py has the same.
DEFAULTS: Fields = {
    **HALF_STATISTICS,
    "resample": int(Image.Resampling.BICUBIC),
    "max_slice_nums": 9,
    "scale_resolution": 448,
    "patch_size": 14,
    "slice_mode": True,
    "downsample_mode": "16x",
    "use_image_id": True,
}
VIDEO_DEFAULTS: Fields = {"stack_frames": 1, "max_num_frames": 128}
MERGE_SIZES = {"4x": 2, "16x": 4}  # mode of downsampling -> side of a visual token in patches
# Names of special tokens in the tokenizer's files, and the tokens where it has no such name.
NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


def processor(folder: Folder, config: Config) -> Processor:
    """The processor of a folder.

    An image, or a frame of a video, comes first as a whole, then its slices row by row. Images and videos are numbered
    where the folder says so, each from 0.
    """
    tokenizer = Tokenizer.from_folder(folder)
    named = [tokenizer.names.get(role, name) for role, name in NAMES.items()]
    image, video, start, end, slice_start, slice_end, number_start, number_end = named
    number = f"{number_start}{{index}}{number_end}" if _is_numbered(folder) else ""
    prompt = TemplatePrompt(
        ChatTemplate.from_folder(folder, tokenizer.names),
        tokenizer,
        marks={"image": image, "video": video},
        tokens={"image": image, "video": video},
        texts={"image": f"{number}{start}{image}{end}", "video": f"{start}{video}{end}"},
        tiled=TiledText(f"{slice_start}{{token}}{slice_end}", "", "", "{whole}", between_rows="\n"),
        around_video=VideoText(number, ""),
        between="",
    )
    return Processor(
        prompt,
        views(folder, config),
        tokenizer,
        pad_id(tokenizer, config),
        frame_sampler=sampler(video_settings(folder)),
    )


def views(folder: Folder, config: Config) -> SlicedViews:
    """The views of a folder, in the mode of downsampling of its model.

    Raises:
      PretrainedError: another mode for images or videos than the model's, patches of different sizes, or frames that
        are stacked.
    """
    mode = {**MODEL_DEFAULTS, **config}["downsample_mode"]
    settings = image_settings(folder, DEFAULTS)
    same = {key: settings[key] for key in ("downsample_mode", "patch_size")}  # of the tower
    videos: Fields = {**DEFAULTS, **VIDEO_DEFAULTS, **same, **video_settings(folder)}
    for kind, given in (("image", settings), ("video", videos)):
        where = f"{folder}: {kind} processor"
        check_supported(given, {"downsample_mode": (mode,), "patch_size": (settings["patch_size"],)}, where)
    check_supported(videos, {"stack_frames": (1,)}, f"{folder}: video processor")
    area, video_area = settings["scale_resolution"] ** 2, videos["scale_resolution"] ** 2
    return SlicedViews(
        pixels(settings),
        PatchFormat(settings["patch_size"], merge_size=MERGE_SIZES[mode]),
        area_size,
        0,
        area,
        video_parts=True,
        video_pixels=video_pixels(folder, {**settings, **DEFAULTS}),
        box_scale=SCALE,
        max_slices=max(1, settings["max_slice_nums"]) if settings["slice_mode"] else 1,
        video_area=video_area,
        video_slices=max(1, videos["max_slice_nums"]) if videos["slice_mode"] else 1,
        merge_sizes=tuple(MERGE_SIZES.values()),
    )


def _is_numbered(folder: Folder) -> bool:
    """Whether the number of an image or a video is written; the setting of the whole processor takes precedence."""
    stated = processor_settings(folder).get("use_image_id")
    return image_settings(folder, DEFAULTS)["use_image_id"] if stated is None else stated


def sampler(videos: Config) -> FrameSampler:
    """Selects frames of video files as the folder states."""
    found = SecondSampler({**VIDEO_DEFAULTS, **videos}["max_num_frames"])
    return EveryFrame(found) if videos.get("do_sample_frames") is False else found
