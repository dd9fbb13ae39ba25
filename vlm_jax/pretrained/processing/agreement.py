"""A processor's places are a model's tokens: what the one writes of the other, compared before anything runs."""

from typing import Any

from flax import linen as nn
from PIL import Image

from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.processors.image_text import ImageTextProcessor, NaflexInputs, SquareInputs, TensorFlowInputs
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.views import NoViews


def check_agreement(processor: Processor, module: nn.Module) -> None:
    """Compares the tokens of a tile, or how patches are cut, and the number of learned rows.

    Args:
      processor: of a folder.
      module: of the same, with an `encoder` and a `connector` where it sees.

    Raises:
      PretrainedError: they differ; the message has both numbers.
    """
    views, encoder, connector = processor.views, getattr(module, "encoder", None), getattr(module, "connector", None)
    if isinstance(views, NoViews) or encoder is None or connector is None:
        return
    if isinstance(views, NativeViews):
        if views.format != encoder.patch_format:
            raise PretrainedError(
                f"the processor cuts patches as {views.format}, the model reads {encoder.patch_format}"
            )
    else:
        (seen,) = views.images([Image.new("RGB", (64, 64))])
        tiles, height, width = seen.pixels.shape[:3]
        tokens = connector.num_tokens(encoder.grid(height, width))
        if seen.num_rows != tiles * tokens:
            raise PretrainedError(
                f"a tile of {height}x{width} pixels takes {seen.num_rows // tiles} places by the processor's files, "
                f"and the model makes {tokens} tokens of it; set the files' image_seq_length or num_image_tokens, or "
                "their size of images"
            )
    learned = num_learned_rows(module)
    if learned is not None and learned != processor.num_learned:
        raise PretrainedError(f"the processor lays out {processor.num_learned} learned rows, the model has {learned}")


def check_image_text(processor: ImageTextProcessor, module: nn.Module) -> None:
    """Compares the size of tiles with the tower's position table, or the sides of patches.

    Args:
      processor: of a folder.
      module: of the same: two towers, a classifier, or one tower.

    Raises:
      PretrainedError: they differ; the message has both.
    """
    tower = next((getattr(module, name) for name in ("image", "encoder") if hasattr(module, name)), module)
    told, inputs = getattr(tower, "image_size", None), processor.images
    if isinstance(inputs, NaflexInputs):
        told, found, what = tower.patch_size, inputs.patch_size, "patches"  # type: ignore[attr-defined]
    elif isinstance(inputs, SquareInputs | TensorFlowInputs):
        found, what = inputs.size, "pictures"
    else:
        return
    if told is not None and told != found:
        raise PretrainedError(
            f"the processor makes {what} of {found} pixels by the folder's files, the model reads {told}; set size and "
            "crop_size, or patch_size, in preprocessor_config.json, or size in open_clip's preprocess_cfg, to the "
            "model's"
        )


def num_learned_rows(module: Any) -> int | None:
    """Rows of the visual table before those of images; None where the module has no table."""
    if getattr(module, "decoder", None) is None:
        return None
    rows = module.learned_rows
    if rows is None:
        return 0
    return module.connector.num_indicators if rows == "connector" else len(rows.names)
