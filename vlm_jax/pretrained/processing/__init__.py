"""Processors of released systems, configured by the files of a checkpoint folder; one file per family.

For conversations a function of the folder and its config returns a `processors.processor.Processor`; for
two-tower models and classifiers it also takes the module, and returns a `processors.image_text.ImageTextProcessor`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol, runtime_checkable

from flax import linen as nn

from vlm_jax.checkpoints.hub import read_config
from vlm_jax.encoders.encoder import PackedEncoder
from vlm_jax.encoders.naflex import NaflexViT
from vlm_jax.encoders.resnet import ModifiedResNet
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.vlm import VLM
from vlm_jax.plugins import Registry, lacking_of_function
from vlm_jax.pretrained.big_vision_paligemma import MARKER
from vlm_jax.pretrained.family import PretrainedError, marker, system_section, text_section
from vlm_jax.pretrained.processing import (
    deepseek,
    deepseek_hf,
    deepseek_ocr,
    deepseek_ocr2,
    gemma3,
    gemma4,
    idefics3,
    image_text,
    internvl,
    internvl_hf,
    llava,
    llava_hf,
    minicpm_v4_6,
    ovis,
    ovis2_hf,
    paligemma,
    prismatic,
    qwen,
    qwen_hf,
    text,
)
from vlm_jax.pretrained.processing.settings import Folder, pad_row
from vlm_jax.processors.image_text import ImageTextProcessor, NaflexInputs, SquareInputs, TensorFlowInputs
from vlm_jax.processors.mosaic import MosaicViews
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.views import NoViews, Tiles, Views
from vlm_jax.types import Config


@runtime_checkable
class MakesProcessor(Protocol):
    """Makes the processor of a system with conversations."""

    def __call__(self, folder: Folder, config: Config, /) -> Processor: ...


class MakesViews(Protocol):
    """Makes the views of a system with conversations, without its tokenizer and template."""

    def __call__(self, folder: Folder, config: Config, /) -> Views: ...


@runtime_checkable
class MakesImageTextProcessor(Protocol):
    """Makes the processor of a two-tower model or a classifier."""

    def __call__(self, folder: Folder, config: Config, model: nn.Module, /) -> ImageTextProcessor: ...


def _llava(folder: Folder, config: Config) -> Processor:
    """For the release's own format or that of transformers, which have the same model type."""
    return (llava if "mm_vision_tower" in config else llava_hf).processor(folder, config)


# Model type of a released config (`family.marker`) -> function that creates its processor.
_CONVERSATIONS: Mapping[str, MakesProcessor] = {
    "DeepseekOCR2": deepseek_ocr2.processor_release,
    MARKER: paligemma.processor_big_vision,
    "LLaVAOneVision1_5_text": text.processor,
    "deepseek_v2": text.processor,
    "deepseek_ocr": deepseek_ocr.processor,
    "deepseek_ocr2": deepseek_ocr2.processor,
    "deepseek_vl": deepseek_hf.processor,
    "deepseek_vl_hybrid": deepseek_hf.processor_hybrid,
    "deepseek_vl_v2": deepseek.processor2,
    "gemma": text.processor,
    "gemma2": text.processor,
    "gemma3": gemma3.processor,
    "gemma3_text": text.processor,
    "gemma4": gemma4.processor,
    "gemma4_text": text.processor,
    "idefics3": idefics3.processor,
    "internlm2": text.processor,
    "internvl": internvl_hf.processor,
    "internvl_chat": internvl.processor,
    "llama": text.processor,
    "llava": _llava,
    "llava_llama": llava.processor,
    "llava_next": llava_hf.processor_next,
    "llava_onevision": llava_hf.processor_onevision,
    "llavaonevision1_5": qwen_hf.processor_of_frames,
    "minicpmv4_6": minicpm_v4_6.processor,
    "mistral": text.processor,
    "mobilevlm": llava.processor,
    "multi_modality": deepseek.processor,
    "openvla": prismatic.processor,
    "ovis": ovis.processor2,
    "ovis2": ovis2_hf.processor,
    "ovis2_5": ovis.processor2_5,
    "paligemma": paligemma.processor,
    "prismatic": prismatic.processor,
    "qwen": qwen.processor,
    "qwen2": text.processor,
    "qwen2_5_omni": qwen_hf.processor_omni,
    "qwen2_5_omni_text": text.processor,
    "qwen2_5_omni_thinker": qwen_hf.processor_omni,
    "qwen2_vl": qwen_hf.processor,
    "qwen2_5_vl": qwen_hf.processor,
    "qwen2_5_vl_text": text.processor,
    "qwen2_vl_text": text.processor,
    "qwen3": text.processor,
    "qwen3_5": qwen_hf.processor3,
    "qwen3_5_moe": qwen_hf.processor3,
    "qwen3_5_moe_text": text.processor,
    "qwen3_5_text": text.processor,
    "qwen3_moe": text.processor,
    "qwen3_vl": qwen_hf.processor3,
    "qwen3_vl_moe": qwen_hf.processor3,
    "qwen3_vl_moe_text": text.processor,
    "qwen3_vl_text": text.processor,
    "smolvlm": idefics3.processor_smolvlm,
}
# The same for the views of included configs, which are of the format of transformers where there are two.
_VIEWS: Mapping[str, MakesViews] = {
    "DeepseekOCR2": deepseek_ocr2.views_release,
    "deepseek_ocr": deepseek_ocr.views,
    "deepseek_ocr2": deepseek_ocr2.views,
    "deepseek_vl": deepseek_hf.views,
    "deepseek_vl_hybrid": deepseek_hf.views_hybrid,
    "deepseek_vl_v2": deepseek.views2,
    "gemma3": gemma3.views,
    "gemma4": gemma4.views,
    "idefics3": idefics3.views,
    "internvl": internvl_hf.views,
    "internvl_chat": internvl.views,
    "llava": llava_hf.views,
    "llava_next": llava_hf.views_next,
    "llava_onevision": llava_hf.views_onevision,
    "llavaonevision1_5": qwen_hf.views_of_frames,
    "minicpmv4_6": minicpm_v4_6.views,
    "mobilevlm": llava.views,
    "multi_modality": deepseek.views,
    "openvla": prismatic.views,
    "ovis": ovis.views2,
    "ovis2": ovis2_hf.views,
    "ovis2_5": ovis.views2_5,
    "paligemma": paligemma.views,
    "prismatic": prismatic.views,
    "qwen": qwen.views,
    "qwen2_5_omni": qwen_hf.views_omni,
    "qwen2_5_omni_thinker": qwen_hf.views_omni,
    "qwen2_vl": qwen_hf.views,
    "qwen2_5_vl": qwen_hf.views,
    "qwen3_5": qwen_hf.views3,
    "qwen3_5_moe": qwen_hf.views3,
    "qwen3_vl": qwen_hf.views3,
    "qwen3_vl_moe": qwen_hf.views3,
    "smolvlm": idefics3.views_smolvlm,
}
# The processors of two-tower models and classifiers, which have no conversations.
_IMAGE_TEXT: Mapping[str, MakesImageTextProcessor] = {
    "big_vision.proj.image_text.text_transformer": image_text.big_vision,
    "big_vision.proj.image_text.two_towers": image_text.big_vision,
    "big_vision.vit": image_text.big_vision_vit,
    "clip": image_text.clip,
    "clip_text_model": image_text.clip,
    "clip_vision_model": image_text.clip,
    "dinov2": image_text.dinov2,
    "dinov2_with_registers": image_text.dinov2,
    "dinov3_vit": image_text.dinov3,
    "open_clip": image_text.open_clip,
    "siglip": image_text.siglip,
    "siglip_text_model": image_text.siglip,
    "siglip_vision_model": image_text.siglip,
    "siglip2": image_text.siglip,
    "siglip2_text_model": image_text.siglip,
    "siglip2_vision_model": image_text.siglip,
    "vit": image_text.vit,
    "vit_jax": image_text.vit_jax,
}
# Of these, towers that transformers runs on images of any size: it interpolates their table, or they have none.
ANY_SIZE = frozenset({"dinov2", "dinov2_with_registers", "dinov3_vit"})
# Included systems whose processor may be `grouped`: tokens of an image, or of a prompt, attend to each other both ways.
_GROUPED: Mapping[str, Callable[[Config], bool]] = {
    "gemma3": lambda config: True,
    "gemma4": gemma4.is_grouped,
    "paligemma": lambda config: True,
}
# With those that `register_family` of vlm_jax.pretrained adds.
PROCESSORS = Registry("register_family", _CONVERSATIONS, lacking_of_function(MakesProcessor))
IMAGE_TEXT_PROCESSORS = Registry("register_family", _IMAGE_TEXT, lacking_of_function(MakesImageTextProcessor))


def has_image_text_processor(name: str) -> bool:
    """Whether a model type has no conversations; of own model types it loads no plug-in."""
    return name not in PROCESSORS.own and name in IMAGE_TEXT_PROCESSORS


def is_grouped(config: Config) -> bool:
    """Whether the processor of an included system is `grouped`."""
    name = marker(config)
    return name in _GROUPED and _GROUPED[name](config)


def read_processor(
    folder: Path, config: Config, model: nn.Module, image_size: int | None
) -> Processor | ImageTextProcessor:
    """The processor of a release, configured by its own files.

    Args:
      folder: with the files of tokenizer and processor.
      config: the released settings.
      model: of the same release.
      image_size: side in pixels of images for two-tower models and classifiers; that of the files when None.

    Raises:
      PretrainedError: there is none for the release, or its files have unsupported settings, or do not
        fit the model.
      TokenizerError, ChatTemplateError: the folder has no tokenizer, or no chat template.
    """
    name = marker(config)
    if has_image_text_processor(name):
        made = IMAGE_TEXT_PROCESSORS[name](folder, config, model)
        if image_size is not None and isinstance(made.images, SquareInputs):
            made = dataclasses.replace(made, images=made.images.at((image_size, image_size)))
        if name not in ANY_SIZE:
            check_image_text(made, model)
        return made
    if name not in PROCESSORS:
        registered = sorted((*PROCESSORS, *IMAGE_TEXT_PROCESSORS))
        raise PretrainedError(f"no processor is registered for '{name}'; registered: {', '.join(registered)}")
    processor = PROCESSORS[name](folder, config)
    if isinstance(model, VLM):
        check_conversations(processor, model)
        if model.decoder is not None:
            rows = model.decoder.vocab_size
            pad_id = pad_row(processor.pad_id, rows, processor.tokenizer.origin, is_masked=True)
            processor = dataclasses.replace(processor, table_rows=rows, pad_id=pad_id)
    return processor


def read_views(folder: Path, config: Config, model: VLM) -> Views:
    """The views of a system with conversations, without its tokenizer and template.

    Args:
      folder: with the files of the image processor, where it has any; it need not exist.
      config: the released settings.
      model: of the same release.

    Raises:
      PretrainedError: the files have unsupported settings, or do not fit the model.
    """
    views = _VIEWS[marker(config)](folder, config)
    check_views(views, model)
    return views


def check_conversations(processor: Processor, model: VLM) -> None:
    """Raises unless `check_views` passes and both have the same number of learned rows."""
    check_views(processor.views, model)
    if model.decoder is not None and model.num_learned_rows != processor.num_learned:
        raise PretrainedError(
            f"the processor has {processor.num_learned} learned rows, but the model {model.num_learned_rows}"
        )


def check_views(views: Views, model: VLM) -> None:
    """Raises unless the reserved positions equal the model's visual tokens, and patch formats are equal."""
    encoder, connector = model.encoder, model.connector
    if isinstance(views, NoViews) or encoder is None or connector is None:
        return
    if isinstance(views, NativeViews):
        assert isinstance(encoder, PackedEncoder)
        if views.format != encoder.patch_format:
            raise PretrainedError(
                f"the processor has the patch format {views.format}, but the model {encoder.patch_format}"
            )
    if isinstance(views, Tiles):
        height, width, _ = views.tile_shape
        tokens, reserved = connector.num_tokens(encoder.grid(height, width)), views.tile_tokens
        if reserved != tokens:
            raise PretrainedError(
                f"a tile of {height}x{width} pixels has {reserved} tokens by the processor's files, but {tokens} "
                "in the model; fix image_seq_length, image_seq_len, num_image_tokens or the image size in "
                "the files"
            )
    if isinstance(views, MosaicViews) and views.mosaic is not None:
        mosaic = views.mosaic
        if (found := encoder.grid(mosaic.side, mosaic.side)) != mosaic.tokens:
            raise PretrainedError(
                f"a tile of {mosaic.side}x{mosaic.side} pixels has {mosaic.tokens} tokens by the processor's files, "
                f"but {found} in the model"
            )


def check_image_text(processor: ImageTextProcessor, model: nn.Module) -> None:
    """Raises unless the image size, or the patch size, is that of the tower."""
    tower, inputs = image_text.image_tower(model), processor.images
    told = tower.image_size if isinstance(tower, ViT | ModifiedResNet) else None
    if isinstance(inputs, NaflexInputs) and isinstance(tower, NaflexViT):
        told, found, what = tower.patch_size, inputs.patch_size, "patches"
    elif isinstance(inputs, SquareInputs | TensorFlowInputs):
        found, what = inputs.size, "images"
    else:
        return
    if told is not None and told != found:
        raise PretrainedError(
            f"the folder's files have {what} of {found} pixels, but the model needs {told}; set size and "
            "crop_size, or patch_size, in preprocessor_config.json, or size in open_clip's preprocess_cfg, to the "
            "model's"
        )


def end_ids(folder: Path, config: Config, model: nn.Module) -> tuple[int, ...]:
    """Tokens that end an answer: those of `generation_config.json`, and those of the processor.

    Where both have none, those of the config that are in the model's vocabulary, since they may be a class's
    defaults; else that of the tokenizer.

    Raises:
      TokenizerError: the vocabulary lacks one of the processor's.
    """
    name, path = marker(config), folder / "generation_config.json"
    has_none = has_image_text_processor(name) or name not in PROCESSORS
    processor = None if has_none else PROCESSORS[name](folder, config)
    tokenizer = Tokenizer.from_folder(folder) if processor is None else processor.tokenizer
    stated = read_config(folder, name=path.name) if path.exists() else {}
    own = () if processor is None else processor.end_tokens
    ids = (*_stated_ends(stated), *map(tokenizer.id_of, own))
    if not ids:
        last = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        size = model.decoder.vocab_size if isinstance(model, VLM) and model.decoder is not None else None
        found = _stated_ends(system_section(config)) or _stated_ends(text_section(config))
        ids = tuple(index for index in found if size is None or index < size) or last
    return tuple(dict.fromkeys(ids))


def _stated_ends(config: Config) -> tuple[int, ...]:
    """`eos_token_id` as a tuple: one number, several, or none."""
    found = config.get("eos_token_id")
    return () if found is None else tuple(found) if isinstance(found, list) else (found,)
