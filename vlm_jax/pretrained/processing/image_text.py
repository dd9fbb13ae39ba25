"""Processors of two-tower models and classifiers, from the folder's files and the module."""

import functools
from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

from flax import linen as nn
from PIL import Image

from vlm_jax.decoders.text_tower import TextTower
from vlm_jax.encoders.naflex import NaflexViT
from vlm_jax.encoders.resnet import ModifiedResNet
from vlm_jax.encoders.vit import ViT
from vlm_jax.interpolation import ResizeKind
from vlm_jax.models.classifier import Classifier
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.pretrained.family import PretrainedError, check_supported, with_defaults
from vlm_jax.pretrained.processing.settings import (
    CLIP_STATISTICS,
    HALF_STATISTICS,
    IMAGENET_STATISTICS,
    Folder,
    image_settings,
    pad_row,
    pixels,
    square_views,
    tokenizer_settings,
)
from vlm_jax.processors.image_text import (
    ImageTextProcessor,
    NaflexInputs,
    SquareInputs,
    TensorFlowInputs,
    TextInputs,
    Texts,
)
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tokenizer import Tokenizer, TokenizerError
from vlm_jax.types import Config, Fields

# transformers, models/{clip,siglip,siglip2,vit}/image_processing_*.py; sizes missing in files are the tower's.
NAFLEX_DEFAULTS: Fields = {**HALF_STATISTICS, "resample": 2, "patch_size": 16, "max_num_patches": 256}
# open_clip, src/open_clip/transform.py, PreprocessCfg; a missing size is the tower's.
OPEN_CLIP_DEFAULTS: Fields = {
    "size": None,
    "mode": "RGB",
    "mean": CLIP_STATISTICS["image_mean"],
    "std": CLIP_STATISTICS["image_std"],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
    "fill_color": 0,
}
# The same, image_transform: a random filter is only for training; evaluation is bicubic.
_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "random": Image.Resampling.BICUBIC,
}
_FITS = {"shortest": "crop_rounded", "squash": "stretch", "longest": "shrink_rounded"}
HALF = Pixels(tuple(HALF_STATISTICS["image_mean"]), tuple(HALF_STATISTICS["image_std"]))
_SENTINELS = 100  # the number of pieces in mc4's file beyond the tower's rows
# The files of facebook/dinov2-*; tables of positions are of 518 pixels, and interpolated.
DINOV2_DEFAULTS: Fields = {
    **IMAGENET_STATISTICS,
    "size": {"shortest_edge": 256},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
}
# transformers, models/dinov3_vit/image_processing_dinov3_vit.py; the size of images is not the model's.
DINOV3_DEFAULTS: Fields = {**IMAGENET_STATISTICS, "size": {"height": 224, "width": 224}, "resample": 2}
_IN_FLOATS: dict[Image.Resampling, ResizeKind] = {
    Image.Resampling.BILINEAR: "bilinear_antialias",
    Image.Resampling.BICUBIC: "bicubic_antialias",
}
# big_vision's evaluators of ViT: resize_small(256)|central_crop(224), and analogous ones at other sizes.
_EDGE = 256 / 224


def clip(folder: Folder, config: Config, module: nn.Module) -> ImageTextProcessor:
    """CLIP of transformers, both towers or one."""
    del config
    images = None
    if image_tower(module) is not None:
        height, width = _side(module)
        crop = {"crop_size": {"height": height, "width": width}, "do_center_crop": True}
        settings = image_settings(folder, {"size": {"shortest_edge": min(height, width)}, **crop})
        images = SquareInputs(square_views(settings, f"{folder}: image processor", edge=True))
    return ImageTextProcessor(images, _texts(folder, module, _filled))


def siglip(folder: Folder, config: Config, module: nn.Module) -> ImageTextProcessor:
    """SigLIP and SigLIP 2 of transformers, both towers or one."""
    tower, images = image_tower(module), None
    if isinstance(tower, NaflexViT):
        settings = image_settings(folder, NAFLEX_DEFAULTS)
        images = NaflexInputs(pixels(settings), settings["patch_size"], settings["max_num_patches"])
    elif tower is not None:
        images = _stretched(folder, module, HALF_STATISTICS)
    return ImageTextProcessor(images, _siglip_texts(folder, module))


def vit(folder: Folder, config: Config, module: nn.Module) -> ImageTextProcessor:
    """ViT of transformers, with classes or without."""
    del config
    return ImageTextProcessor(_stretched(folder, module, {**HALF_STATISTICS, "resample": 2}))


def dinov2(folder: Folder, config: Config, module: nn.Module) -> ImageTextProcessor:
    """DINOv2 of transformers, whose `BitImageProcessor` resizes the shorter side and crops the centre."""
    del config, module
    settings = image_settings(folder, DINOV2_DEFAULTS)
    return ImageTextProcessor(SquareInputs(square_views(settings, f"{folder}: image processor", edge=True)))


def dinov3(folder: Folder, config: Config, module: nn.Module) -> ImageTextProcessor:
    """DINOv3 of transformers, whose `DINOv3ViTImageProcessor` stretches images in floats.

    Raises:
      PretrainedError: unsupported settings, such as another filter, or a size that keeps the aspect ratio.
    """
    del config, module
    settings, where = image_settings(folder, DINOV3_DEFAULTS), f"{folder}: image processor"
    check_supported(settings, {"resample": tuple(map(int, _IN_FLOATS))}, where)
    views = square_views(settings, where, edge=False)
    if views.fit != "stretch":
        raise PretrainedError(f"{where}: size: expected height and width, got {settings['size']}")
    return ImageTextProcessor(SquareInputs(views, floats=_IN_FLOATS[views.pixels.resample]))


def _stretched(folder: Folder, module: nn.Module, defaults: Config) -> SquareInputs:
    height, width = _side(module)
    settings = image_settings(folder, {"size": {"height": height, "width": width}, **defaults})
    return SquareInputs(square_views(settings, f"{folder}: image processor", edge=False))


def open_clip(folder: Folder, config: Config, module: nn.Module) -> ImageTextProcessor:
    """CLIP of open_clip, whose config has a `preprocess_cfg`; texts are padded with zeros."""
    where = "preprocess_cfg"
    given = {key: value for key, value in (config.get(where) or {}).items() if value is not None}
    if unknown := sorted(given.keys() - OPEN_CLIP_DEFAULTS.keys()):
        raise PretrainedError(f"{where}: {', '.join(unknown)}: not supported; expected {', '.join(OPEN_CLIP_DEFAULTS)}")
    settings = with_defaults(given, OPEN_CLIP_DEFAULTS, where)
    check_supported(settings, {"resize_mode": tuple(_FITS), "interpolation": tuple(_FILTERS), "mode": ("RGB",)}, where)
    mean, std = (tuple(map(float, _repeated(settings[key], 3, f"{where}.{key}"))) for key in ("mean", "std"))
    fill, size = settings["fill_color"], settings["size"]
    views = SquareViews(
        Pixels(mean, std, _FILTERS[settings["interpolation"]]),
        _side(module) if size is None else _repeated(size, 2, f"{where}.size"),
        fit=_FITS[settings["resize_mode"]],  # type: ignore[arg-type]
        background=_repeated(fill, 3, f"{where}.fill_color"),
        min_size=1,
    )
    return ImageTextProcessor(SquareInputs(views), _texts(folder, module, _filled_with_zeros))


def big_vision(folder: Folder, config: Config, module: nn.Module) -> ImageTextProcessor:
    """SigLIP and SigLIP 2 of big_vision, or only its text tower; the tokenizer's file must be in the folder.

    A NaFlex release has one sequence length for all sizes, `max_num_patches` next to `model` in the config, by default
    256.
    """
    tower, images = image_tower(module), None
    if isinstance(tower, NaflexViT):
        images = NaflexInputs(HALF, tower.patch_size, config.get("max_num_patches", 256), floats=True)
    elif tower is not None:
        images = TensorFlowInputs(_side(module, config))
    return ImageTextProcessor(images, _texts(folder, module, _big_vision_texts))


def big_vision_vit(folder: Folder, config: Config, module: nn.Module) -> ImageTextProcessor:
    """ViT of big_vision with the preprocessing of its evaluation configs: area resizing and a central crop."""
    del folder
    size = _side(module, config)
    return ImageTextProcessor(TensorFlowInputs(size, "overlap", shortest_edge=round(min(size) * _EDGE)))


def vit_jax(folder: Folder, config: Config, module: nn.Module) -> ImageTextProcessor:
    """ViT and hybrids of vision_transformer, which stretches images without rounding."""
    del folder, config
    return ImageTextProcessor(TensorFlowInputs(_side(module), whole=False))


def labels(config: Config) -> tuple[str, ...]:
    """Names of a classifier's classes: `id2label` of the config.

    Raises:
      PretrainedError: the release has none, or not from 0 on.
    """
    names = {int(number): str(name) for number, name in (config.get("id2label") or {}).items()}
    if not names or sorted(names) != list(range(len(names))):
        raise PretrainedError(
            f"id2label: expected names of the classes from 0 on in the config, got {sorted(names) or 'none'}"
        )
    return tuple(names[number] for number in range(len(names)))


def image_tower(module: nn.Module) -> ViT | ModifiedResNet | NaflexViT | None:
    """The image tower; None for a text tower."""
    tower = module.image if isinstance(module, TwoTower) else module
    tower = tower.encoder if isinstance(tower, Classifier) else tower
    return tower if isinstance(tower, ViT | ModifiedResNet | NaflexViT) else None


def _side(module: nn.Module, config: Config = MappingProxyType({})) -> tuple[int, int]:
    """(height, width) of a tower's training images, or `image_size` of the config without a position table.

    Raises:
      PretrainedError: neither is available.
    """
    tower = image_tower(module)
    assert isinstance(tower, ViT | ModifiedResNet)
    size = tower.image_size or config.get("image_size")
    if size is None:
        raise PretrainedError(
            "the image size is unknown: this tower has no position table; pass image_size in pixels to "
            "from_pretrained, or add it to config.json, next to model"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _texts(folder: Folder, module: nn.Module, inputs: Callable[[Tokenizer, TextTower], TextInputs]) -> Texts | None:
    """None without a text tower. Without a tokenizer in the folder images still work; texts raise an error."""
    tower = module.text if isinstance(module, TwoTower) else module
    if not isinstance(tower, TextTower):
        return None
    try:
        return inputs(Tokenizer.from_folder(folder), tower)
    except TokenizerError as error:
        return functools.partial(_refuse, str(error))


def _refuse(reason: str, texts: Sequence[str]) -> NoReturn:
    raise TokenizerError(f"{len(texts)} texts cannot be encoded: {reason}")


def _filled(tokenizer: Tokenizer, tower: TextTower, **fields: Any) -> TextInputs:
    if tokenizer.pad_id is None:
        raise TokenizerError(f"{tokenizer.origin}: expected a pad_token in tokenizer_config.json, for padding texts")
    pad_id = pad_row(tokenizer.pad_id, tower.vocab_size, tokenizer.origin, is_masked=False)
    return TextInputs(tokenizer, tower.context_length, pad_id, table_rows=tower.vocab_size, **fields)


def _filled_with_zeros(tokenizer: Tokenizer, tower: TextTower) -> TextInputs:
    return TextInputs(tokenizer, tower.context_length, 0, table_rows=tower.vocab_size)


def _siglip_texts(folder: Folder, module: nn.Module) -> Texts | None:
    """SigLIP was trained on lower case without punctuation; SigLIP 2, whose tokenizer is Gemma's, on lower case."""
    lower = tokenizer_settings(folder).get("do_lower_case", True)
    return _texts(
        folder, module, lambda tokenizer, tower: _filled(tokenizer, tower, lower=lower, bare=not _is_gemma(tokenizer))
    )


def _is_gemma(tokenizer: Tokenizer) -> bool:
    return tokenizer.vocabulary.id_of("<eos>") is not None


def _big_vision_texts(tokenizer: Tokenizer, tower: TextTower) -> TextInputs:
    """Lower case, no start token, an end token also after truncation; the ids depend on the vocabulary.

    Raises:
      TokenizerError: the vocabulary is not SigLIP's (c4_en, mc4) or Gemma's, or its size is not the tower's.

    Source: big_vision, configs/proj/image_text/SigLIP_demo.ipynb, tokenize(model="c4_en", eos="sticky", pad_value=1);
    SigLIP2_demo.ipynb, lower|tok(model="gemma", bos="no", eos="sticky"), padded with the model's padding.
    """
    gemma = _is_gemma(tokenizer)
    ids = tuple(map(tokenizer.vocabulary.id_of, ("<pad>", "<eos>" if gemma else "</s>")))
    if ids != (0, 1):
        raise TokenizerError(
            f"{tokenizer.origin}: expected the SentencePiece model of SigLIP (c4_en or mc4: <pad> 0, </s> 1) or "
            f"that of SigLIP 2 (Gemma's: <pad> 0, <eos> 1), got these at {ids}"
        )
    rows, size = tower.vocab_size, tokenizer.vocab_size
    if not rows <= size <= rows + _SENTINELS:
        raise TokenizerError(
            f"{tokenizer.origin}: expected {rows} tokens, as the text tower, got {size}; use the tokenizer of its "
            "training: c4_en (32000) or mc4 (250000) for SigLIP, Gemma's (256000) for SigLIP 2"
        )
    pad_id = 0 if gemma else 1
    return TextInputs(
        tokenizer, tower.context_length, pad_id, lower=True, bare=not gemma, end_id=1, table_rows=tower.vocab_size
    )


def _repeated(value: Any, count: int, where: str) -> tuple[Any, ...]:
    """`count` numbers, from one number, a list of one, or a list of `count`."""
    values = (value,) if isinstance(value, (int, float)) else tuple(value)
    values = values * count if len(values) == 1 else values
    if len(values) != count:
        raise PretrainedError(f"{where}: expected a number or {count}, got {value!r}")
    return values
