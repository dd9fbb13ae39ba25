"""InternVL in the format of its release."""

import math

from vlm_jax.pretrained.family import PretrainedError, check_supported, one_side, with_defaults
from vlm_jax.pretrained.internvl import VISION_DEFAULTS
from vlm_jax.pretrained.processing.settings import IMAGENET_STATISTICS, Folder, chat_template, pad_id
from vlm_jax.processors import as_released
from vlm_jax.processors.learned import Learned
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.templates import IM_END, INTERNVL, PHI3_END
from vlm_jax.processors.tiles import InternVLViews
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.video import SegmentSampler
from vlm_jax.types import Config, Fields

# OpenGVLab/InternVL, configuration_internvl_chat.py.
DEFAULTS: Fields = {
    "template": None,
    "force_image_size": None,
    "downsample_ratio": 0.5,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
    "pad2square": False,
}
# OpenGVLab/InternVL, internvl/train/dataset.py, preprocess_internvl2_5 and its like.
LEARNED = Learned(crossing=False)
START, END, CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"


def processor(folder: Folder, config: Config) -> Processor:
    """The processor of a folder, with the template named in its config, or the folder's own."""
    tokenizer = Tokenizer.from_folder(folder)
    name = config.get("template")
    if name is not None and name not in INTERNVL:
        raise PretrainedError(f"internvl_chat.template: expected one of {', '.join(INTERNVL)}, got {name!r}")
    released = as_released.INTERNVL.get(name or "")
    tagged = f"{START}{CONTEXT}{END}"
    prompt = TemplatePrompt(
        chat_template(folder, tokenizer, INTERNVL.get(name or ""), own_first=name is None),
        tokenizer,
        marks={"image": "<image>", "video": "<video>"},
        tokens={"image": CONTEXT, "video": CONTEXT},
        texts={"image": tagged, "video": f"Frame{{number}}: {tagged}"},
        joined="\n",
        learned=LEARNED,
        released=None if released is None else released(),
    )
    # modeling_internvl_chat.py, chat: the separator of the template.
    ends = () if name is None else (PHI3_END,) if name == "phi3-chat" else (IM_END,)
    pad = pad_id(tokenizer, config)
    return Processor(prompt, views(folder, config), tokenizer, pad, end_tokens=ends, frame_sampler=SegmentSampler())


def views(folder: Folder, config: Config) -> InternVLViews:
    """Views of a config: one tile, or dynamic tiles; no other file of the folder is read."""
    del folder
    settings = with_defaults(config, DEFAULTS, "internvl_chat")
    check_supported(settings, {"pad2square": (False,)}, "internvl_chat")
    vision = with_defaults(settings["vision_config"], VISION_DEFAULTS, "internvl_chat.vision_config")
    side = settings["force_image_size"] or one_side(vision["image_size"], "internvl_chat.vision_config.image_size")
    dynamic = settings["dynamic_image_size"]
    patches = side // one_side(vision["patch_size"], "internvl_chat.vision_config.patch_size")
    return InternVLViews(
        Pixels(tuple(IMAGENET_STATISTICS["image_mean"]), tuple(IMAGENET_STATISTICS["image_std"])),
        side,
        int(math.pow(patches, 2) * settings["downsample_ratio"] ** 2),
        settings["min_dynamic_patch"] if dynamic else 1,
        settings["max_dynamic_patch"] if dynamic else 1,
        settings["use_thumbnail"],
    )
