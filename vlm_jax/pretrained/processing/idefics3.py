"""Idefics3 and SmolVLM."""

from typing import Any

from PIL import Image

from vlm_jax.pretrained.family import PretrainedError
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
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt, TiledText, VideoText
from vlm_jax.processors.split_tiles import SplitViews
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.video import EveryFrame, FrameSampler, SpreadSampler
from vlm_jax.types import Config, Fields

# transformers, models/idefics3/image_processing_pil_idefics3.py; models/smolvlm has the same.
DEFAULTS: Fields = {
    **HALF_STATISTICS,
    "size": {"longest_edge": 4 * 364},
    "max_image_size": {"longest_edge": 364},
    "do_image_splitting": True,
    "resample": int(Image.Resampling.LANCZOS),
}
SAMPLING: Fields = {"max_frames": 64, "fps": 1}  # `video_sampling` of the releases
NUM_TOKENS = 169  # image_seq_len
# Names of special tokens in the tokenizer's files, and the tokens where it has no such name.
NAMES = {
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "video_token": "<video>",
}
# transformers, models/smolvlm/processing_smolvlm.py: whatever template the folder has.
VIDEO_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'] is string %}"
    "{{': ' + message['content']}}{% else %}{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}"
    "{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}{% endif %}"
    "{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
VIDEO_START = "You are provided the following series of {count} frames from a {duration} [H:MM:SS] video.\n"
FRAME = "\nFrame from {clock}:"
VIDEO_END = "\n\n"


def processor(folder: Folder, config: Config) -> Processor:
    """The processor of a folder of Idefics3, which has no videos."""
    tokenizer = Tokenizer.from_folder(folder)
    roles = {role: name for role, name in NAMES.items() if role != "video_token"}
    return Processor(_prompt(folder, tokenizer, roles), views(folder, config), tokenizer, pad_id(tokenizer, config))


def processor_smolvlm(folder: Folder, config: Config) -> Processor:
    """The processor of a folder of SmolVLM, whose videos are frames with their times.

    Raises:
      PretrainedError: tiles of images and of frames have different sizes.
    """
    tokenizer = Tokenizer.from_folder(folder)
    roles = {role: tokenizer.names.get(role, name) for role, name in NAMES.items()}
    stated = _video_settings(folder)
    return Processor(
        _prompt(folder, tokenizer, roles),
        views_smolvlm(folder, config),
        tokenizer,
        pad_id(tokenizer, config),
        frame_sampler=sampler(stated),
    )


def views(folder: Folder, config: Config) -> SplitViews:
    """Views of a folder of Idefics3."""
    del config
    return _views(folder)


def views_smolvlm(folder: Folder, config: Config) -> SplitViews:
    """Views of a folder of SmolVLM, of videos too.

    Raises:
      PretrainedError: tiles of images and of frames have different sizes.
    """
    del config
    images, stated = image_settings(folder, DEFAULTS), _video_settings(folder)
    edge = stated.get("size") or (stated.get("video_sampling") or {}).get("video_size") or DEFAULTS["size"]
    where = f"{folder}: video processor"
    found = _views(folder, video_pixels=video_pixels(folder, images), video_edge=_edge({"size": edge}, "size", where))
    if "max_image_size" in stated and (side := _edge(stated, "max_image_size", where)) != found.side:
        raise PretrainedError(
            f"{where}: max_image_size: expected that of the image processor, {found.side}, got {side}"
        )
    return found


def _video_settings(folder: Folder) -> Fields:
    """The settings of videos; where a folder has none, those of images are read for them."""
    return video_settings(folder) or image_settings(folder, DEFAULTS)


def sampler(videos: Config) -> FrameSampler:
    """Selects frames of video files as the settings of videos state, by default as those of the releases.

    Where a rate or a number is stated, `do_sample_frames` is without effect, and `video_sampling` takes precedence.

    Source: transformers, models/smolvlm: processing_smolvlm.py, apply_chat_template; video_processing_smolvlm.py,
    SmolVLMVideoProcessor.__init__.
    """
    stated = {"fps": videos.get("fps"), "max_frames": videos.get("num_frames"), **(videos.get("video_sampling") or {})}
    given = {key: stated[key] for key in SAMPLING if stated.get(key) is not None}
    found = SpreadSampler(**{**SAMPLING, **given})
    return EveryFrame(found) if videos.get("do_sample_frames") is False and not given else found


def _views(folder: Folder, **videos: Any) -> SplitViews:
    settings, where = image_settings(folder, DEFAULTS), f"{folder}: image processor"
    return SplitViews(
        pixels(settings),
        _edge(settings, "max_image_size", where),
        processor_settings(folder).get("image_seq_len", NUM_TOKENS),
        _edge(settings, "size", where),
        settings["do_image_splitting"],
        **videos,
    )


def _edge(settings: Config, key: str, where: str) -> int:
    """The `longest_edge` of a setting.

    Raises:
      PretrainedError: it has none.
    """
    size = settings[key]
    if not isinstance(size, dict) or not isinstance(size.get("longest_edge"), int):
        raise PretrainedError(f"{where}: {key}: expected an object with longest_edge, got {size!r}")
    return size["longest_edge"]


def _prompt(folder: Folder, tokenizer: Tokenizer, roles: Config) -> TemplatePrompt:
    image, fake, whole = (roles[role] for role in ("image_token", "fake_image_token", "global_image_token"))
    text = f"{fake}{whole}{image}{fake}"
    marks, of_videos = {"image": image}, None
    if "video_token" in roles:
        marks["video"] = roles["video_token"]
        of_videos = ChatTemplate(VIDEO_TEMPLATE, tokenizer.names)
    return TemplatePrompt(
        ChatTemplate.from_folder(folder, tokenizer.names),
        tokenizer,
        marks=marks,  # type: ignore[arg-type]
        tokens=dict.fromkeys(marks, image),  # type: ignore[arg-type]
        texts={"image": text, "video": f"{FRAME}{text}"},
        tiled=TiledText(f"{fake}<row_{{row}}_col_{{column}}>{image}", "\n", "\n"),
        around_video=VideoText(VIDEO_START, VIDEO_END) if "video" in marks else None,
        between="",
        of_videos=of_videos,
    )
