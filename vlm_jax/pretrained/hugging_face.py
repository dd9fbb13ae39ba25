"""Settings that configs of transformers share across families."""

from collections.abc import Mapping

import numpy as np

from vlm_jax.checkpoints.maps.torch_layers import linear
from vlm_jax.checkpoints.maps.transformer import vocabulary_rules
from vlm_jax.checkpoints.rules import Rule, SourceTensor
from vlm_jax.pretrained.family import ACTIVATIONS, PretrainedError, check_supported, find_prefix, one_side
from vlm_jax.types import Config, Fields

_LAST_LAYER = "multi_modal_projector.linear_2.weight"


def block_fields(settings: Config, where: str) -> Fields:
    """Sizes, activation and epsilon of the blocks, as fields of `Trunk` and of `TextTower`.

    Args:
      settings: a section with its defaults.
      where: name of the section for errors.

    Raises:
      PretrainedError: an unsupported activation.
    """
    check_supported(settings, {"hidden_act": tuple(ACTIVATIONS)}, where)
    return {
        "width": settings["hidden_size"],
        "depth": settings["num_hidden_layers"],
        "num_heads": settings["num_attention_heads"],
        "mlp_dim": settings["intermediate_size"],
        "activation": ACTIVATIONS[settings["hidden_act"]],
        "norm_epsilon": settings["layer_norm_eps"],
    }


def text_sizes(settings: Config, where: str) -> tuple[int, int, int]:
    """Query heads, key and value heads, and the head width of a language model's config with its defaults.

    Raises:
      PretrainedError: sizes that are not positive integers, or heads that do not divide each other or the width.
    """
    optional = {key: settings[key] for key in ("num_key_value_heads", "head_dim") if settings.get(key) is not None}
    needed = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    needed += ("intermediate_size",) if "intermediate_size" in settings else ()  # none where every layer has experts
    sizes = {key: settings[key] for key in needed} | optional
    wrong = {key: size for key, size in sizes.items() if type(size) is not int or size < 1}
    if wrong:
        messages = (f"{where}.{key}: expected a positive integer, got {size!r}" for key, size in wrong.items())
        raise PretrainedError("\n".join(messages))
    heads, width = sizes["num_attention_heads"], sizes["hidden_size"]
    kv_heads = sizes.get("num_key_value_heads", heads)
    if heads % kv_heads:
        raise PretrainedError(
            f"{where}.num_key_value_heads: expected a divisor of num_attention_heads, {heads}, got {kv_heads}"
        )
    if "head_dim" not in sizes and width % heads:
        raise PretrainedError(
            f"{where}.num_attention_heads: expected a divisor of hidden_size, {width}, or the key head_dim, got {heads}"
        )
    head_dim = sizes.get("head_dim", width // heads)
    if head_dim % 2:
        raise PretrainedError(f"{where}.head_dim: expected an even number, for rotary positions, got {head_dim}")
    return heads, kv_heads, head_dim


def vit_fields(settings: Config, where: str) -> Fields:
    """Fields of a ViT with learned position embeddings, which transformers interpolates bicubically.

    Raises:
      PretrainedError: as `block_fields`, or images or patches that are not square.
    """
    side = one_side(settings["image_size"], f"{where}.image_size")
    return {
        **block_fields(settings, where),
        "image_size": (side, side),
        "patch_size": one_side(settings["patch_size"], f"{where}.patch_size"),
        "position_interpolation": "bicubic",
    }


def projector(checkpoint: Mapping[str, SourceTensor], where: str) -> tuple[str, int, tuple[Rule, ...]]:
    """The two linear layers of a `multi_modal_projector`.

    Args:
      checkpoint: provides the prefix of the keys, and the decoder's width, which text configs may omit.
      where: name of the config for errors.

    Returns:
      The prefix of the projector's keys, its output width, and its rules for an `Mlp` named `mlp`.

    Raises:
      PretrainedError: there is no such projector.
    """
    prefix = find_prefix(checkpoint, _LAST_LAYER)
    if prefix + _LAST_LAYER not in checkpoint:
        raise PretrainedError(f"{where}: expected a tensor named {_LAST_LAYER}, which gives the width of the decoder")
    names = f"{prefix}multi_modal_projector."
    rules = (*linear(f"{names}linear_1", "mlp/up"), *linear(f"{names}linear_2", "mlp/down"))
    return names, checkpoint[prefix + _LAST_LAYER].shape[0], rules


def vocabulary(
    embedding: str, head: str, checkpoint: Mapping[str, SourceTensor], where: str, *, tied: bool
) -> tuple[Rule, ...]:
    """The rules of the embedding table and the head, by their full released keys.

    A tied checkpoint may store its table a second time as the head; it is then also written twice.

    Raises:
      PretrainedError: the two differ although the config ties them.
    """
    stored = head in checkpoint
    if (
        tied
        and stored
        and embedding in checkpoint
        and not np.array_equal(checkpoint[embedding][...], checkpoint[head][...])
    ):
        raise PretrainedError(
            f"{where}.tie_word_embeddings: expected {head} to be {embedding}, but they differ; set it to false"
        )
    return vocabulary_rules(embedding, head, tied=tied, stored=stored)


def expert_width(settings: Config, where: str) -> int:
    """Hidden width of an expert; raises a PretrainedError where it is null, as in files of dense models."""
    if settings["moe_intermediate_size"] is None:
        raise PretrainedError(f"{where}.moe_intermediate_size: expected the width of an expert, got None")
    return settings["moe_intermediate_size"]
