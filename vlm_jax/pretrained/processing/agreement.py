"""A processor's places are a model's tokens: what the one writes of the other, compared before anything runs."""

from typing import Any

from flax import linen as nn
from PIL import Image

from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.processors.native import NativeViews
from vlm_jax.processors.seen import NoViews
from vlm_jax.processors.system import Processor


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


def num_learned_rows(module: Any) -> int | None:
    """Rows of the visual table before those of images; None where the module has no table."""
    if not hasattr(module, "learned_rows"):
        return None
    rows = module.learned_rows
    if rows is None:
        return 0
    return module.connector.num_indicators if rows == "connector" else len(rows.names)
