"""PaliGemma and PaliGemma 2 of big_vision: an `.npz` with `img/` and `llm/`, whose tensors tell its sizes.

The files are released without a config. In the schema of big_vision's own configs it is `model_name` and `model` with
the sections `img` and `llm`, and `image_size` next to them; `completed` fills what is not given.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

from vlm_jax.checkpoints.maps import big_vision as maps
from vlm_jax.checkpoints.ops import Shape
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.connectors.mlp import MlpConnector
from vlm_jax.decoders.transformer import Transformer
from vlm_jax.pretrained.big_vision import VARIANTS, VIT_DEFAULTS, names_prefix, tower_settings, vision_tower
from vlm_jax.pretrained.composition import composed, visual_half
from vlm_jax.pretrained.family import (
    REQUIRED,
    Description,
    LanguageModel,
    PretrainedError,
    check_supported,
    marker,
    one_side,
    square_root,
    with_defaults,
)
from vlm_jax.pretrained.rope import ROPE_DEFAULTS, released_rope
from vlm_jax.pretrained.tables import image_shape
from vlm_jax.types import Config, Dtype, Fields

MODEL_NAME = "proj.paligemma.paligemma"
MARKER = f"big_vision.{MODEL_NAME}"
TABLE = "llm/embedder/input_embedding"
# big_vision, models/proj/paligemma/paligemma.py, and the image section of its configs (configs/proj/paligemma).
_DEFAULTS: Fields = {"img_model": "vit", "llm_model": "proj.paligemma.gemma_bv", "img": {}, "llm": {}}
_TOWER: Fields = {"pool_type": "none"}
# models/ppp/gemma.py, `get_config` and the defaults of `Model`.
GEMMA_VARIANTS: dict[str, maps.GemmaSizes] = {
    "gemma_2b": maps.GemmaSizes(2048, 18, 16_384, 8, 1, 256),
    "gemma_7b": maps.GemmaSizes(3072, 28, 24_576, 16, 16, 256),
    "gemma2_2b": maps.GemmaSizes(2304, 26, 9216, 8, 4, 256),
    "gemma2_9b": maps.GemmaSizes(3584, 42, 14_336, 16, 8, 256),
    "gemma2_27b": maps.GemmaSizes(4608, 46, 36_864, 32, 16, 128),
}
_HEAD_SCALE, _WIDTH_SCALE = "rsqrt_head_dim", "rsqrt_emb_per_head"
_OF_VARIANT: dict[str, Fields] = {"gemma2_27b": {"query_pre_attn_norm": _WIDTH_SCALE}}
_GEMMA2: Fields = {"post_norms": True, "attn_logits_softcap": 50.0, "final_logits_softcap": 30.0}
_GEMMA_DEFAULTS: Fields = {
    **dict.fromkeys(maps.GemmaSizes._fields, REQUIRED),
    "vocab_size": 256_000,
    "query_pre_attn_norm": _HEAD_SCALE,
    "final_logits_softcap": None,
    "attn_logits_softcap": None,
    "post_norms": False,
    "scan": True,
}
_EPSILON = 1e-6  # of its RMSNorm, whatever `norm_eps` states


def is_paligemma(checkpoint: Mapping[str, SourceTensor]) -> bool:
    """Whether tensors have the names of this family."""
    prefix = names_prefix(checkpoint)
    return f"{prefix}{TABLE}" in checkpoint and any(key.startswith(f"{prefix}img/") for key in checkpoint)


def completed(config: Config, checkpoint: Mapping[str, SourceTensor]) -> Fields:
    """The config with what its tensors tell where it does not; configs of other families are returned unchanged.

    Names and shapes tell everything but the softcaps and the scale of queries. These are Gemma 2's where there are
    norms behind attention and feed-forward, and those of the variant whose sizes the tensors have.

    Args:
      config: with `model_name`.
      checkpoint: of the same release.

    Raises:
      PretrainedError: tensors of another model, without those that tell the sizes, or an `image_size` that is not
        that of the position table.
    """
    if marker(config) != MARKER:
        return dict(config)
    if not is_paligemma(checkpoint):
        raise PretrainedError(
            f"{MODEL_NAME}: expected tensors named img/… and {TABLE}, got {', '.join(list(checkpoint)[:3]) or 'none'}"
        )
    prefix = names_prefix(checkpoint)
    shapes = {key.removeprefix(prefix): tensor.shape for key, tensor in checkpoint.items()}
    tower, language = _blocks(shapes, "img/Transformer/encoderblock", "_"), _blocks(shapes, "llm/layers", "/")
    found = _found(shapes, tower, language)
    model = config.get("model") or {}
    img = _merged(model.get("img") or {}, _tower_section(found, tower))
    rows, patch = found.positions[1], tower_settings(img, VIT_DEFAULTS, "model.img")["patch_size"]
    side = one_side(patch, "model.img.patch_size") * square_root(rows, f"{prefix}img/pos_embedding")
    if (stated := one_side(config.get("image_size", side), "image_size")) != side:
        raise PretrainedError(
            f"image_size: expected {side}, the side of {rows} patches of {patch} pixels "
            f"({prefix}img/pos_embedding), got {stated}"
        )
    llm = _merged(model.get("llm") or {}, _language_section(found, language, shapes))
    return {**config, "image_size": side, "model": {**model, "img": img, "llm": llm}}


def tokens_of(config: Config) -> tuple[int, int]:
    """The side of images in pixels, and their tokens, of a `completed` config."""
    side = one_side(config["image_size"], "image_size")
    patch = tower_settings(config["model"]["img"], VIT_DEFAULTS, "model.img")["patch_size"]
    return side, (side // one_side(patch, "model.img.patch_size")) ** 2


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """Both towers, with the tower's head as connector.

    Blocks of Gemma 2 have no window, as in big_vision: there all of them see the whole sequence.
    """
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}
    model = with_defaults(completed(config, checkpoint)["model"], _DEFAULTS, "model")
    check_supported(model, {key: (_DEFAULTS[key],) for key in ("img_model", "llm_model")}, "model")
    tower = tower_settings(model["img"], VIT_DEFAULTS, "model.img")
    unread = {"pool_type": ("none",), "posemb": ("learn",), "rep_size": (False, None)}
    check_supported(tower, unread, "model.img")
    prefix = names_prefix(checkpoint)
    vit, rules = vision_tower(model["img"], checkpoint, f"{prefix}img/", "model.img", **dtypes)
    language = _gemma(model["llm"], f"{prefix}llm/", **dtypes)
    visual = visual_half(
        vit,
        MlpConnector(language.decoder.width, depth=1, **dtypes),
        image_shape(vit, 3),
        (
            *prefixed(rules, f"{prefix}img/", "encoder/"),
            *prefixed(maps.dense("head", "connector/mlp/down"), f"{prefix}img/"),
        ),
    )
    return composed(visual, language)


def _gemma(section: Config, prefix: str, **dtypes: Dtype) -> LanguageModel:
    """Gemma or Gemma 2 of an `llm` section with sizes or a variant."""
    where = "model.llm"
    settings = with_defaults({**_variant(section, where), **section}, _GEMMA_DEFAULTS, where)
    check_supported(settings, {"query_pre_attn_norm": (_HEAD_SCALE, _WIDTH_SCALE)}, where)
    sizes = maps.GemmaSizes(*(settings[name] for name in maps.GemmaSizes._fields))
    per_head = sizes.width // sizes.num_heads if settings["query_pre_attn_norm"] == _WIDTH_SCALE else sizes.head_dim
    decoder = Transformer(
        vocab_size=settings["vocab_size"],
        width=sizes.width,
        depth=sizes.depth,
        num_heads=sizes.num_heads,
        num_kv_heads=sizes.num_kv_heads,
        mlp_dim=sizes.mlp_dim,
        head_dim=sizes.head_dim,
        activation="gelu_tanh",
        rope=released_rope(ROPE_DEFAULTS, where, sizes.head_dim),
        norm="rms_from_one",
        norm_epsilon=_EPSILON,
        post_norm=settings["post_norms"],
        qk_scale=per_head**-0.5,
        attention_softcap=settings["attn_logits_softcap"] or None,
        logit_softcap=settings["final_logits_softcap"] or None,
        embedding_scale=sizes.width**0.5,
        **dtypes,
    )
    rules = maps.gemma_rules(sizes, post_norms=settings["post_norms"], scanned=settings["scan"])
    return LanguageModel(decoder, prefixed(rules, prefix))


def _variant(section: Config, where: str) -> Fields:
    """The settings of the section's variant; none without one."""
    name = section.get("variant")
    if name is None:
        return {}
    if name not in GEMMA_VARIANTS:
        raise PretrainedError(f"{where}.variant: unknown '{name}'; expected one of {', '.join(GEMMA_VARIANTS)}")
    second = _GEMMA2 if name.startswith("gemma2") else {}
    return {**GEMMA_VARIANTS[name]._asdict(), **second, **_OF_VARIANT.get(name, {})}


def _merged(given: Config, found: Fields) -> Fields:
    """A section over what the tensors tell; a given variant has the sizes. Stacked blocks are those of the file."""
    kept = {"vocab_size", "scan", *_TOWER} if "variant" in given else found.keys()
    return {**{key: value for key, value in found.items() if key in kept}, **given, "scan": found["scan"]}


class _Blocks(NamedTuple):
    """Name of the first of a tower's blocks, their number where they are not stacked, and the axes before their own."""

    name: str
    count: int
    lead: int


def _blocks(shapes: Mapping[str, Shape], name: str, separator: str) -> _Blocks:
    """The blocks of a tower: `NAME/…` stacked, else `NAME`, the separator and a number."""
    pattern = re.compile(rf"{re.escape(name + separator)}(\d+)/")
    numbers = [int(match[1]) for key in shapes if (match := pattern.match(key))]
    return _Blocks(f"{name}{separator}0", max(numbers) + 1, 0) if numbers else _Blocks(name, 0, 1)


class _Shapes(NamedTuple):
    """Shapes of the tensors that tell the sizes, with the axis of the blocks where these are stacked.

    Attributes:
      patches: convolution of the patches.
      positions: the tower's table.
      tower_mlp, tower_query: of a block of the tower.
      table: embeddings of text.
      mlp: second layer of a feed-forward.
      query: kernels of queries, or of queries, keys and values where these have as many heads.
      key_value: kernels of keys and values; that of `query` where it has them.
    """

    patches: Shape
    positions: Shape
    tower_mlp: Shape
    tower_query: Shape
    table: Shape
    mlp: Shape
    query: Shape
    key_value: Shape


def _found(shapes: Mapping[str, Shape], tower: _Blocks, language: _Blocks) -> _Shapes:
    """Raises for all that are missing, or that have other axes, at once."""
    query = key_value = (f"{language.name}/attn/qkv_einsum/w", 4 + language.lead)
    if query[0] not in shapes:
        query = (f"{language.name}/attn/q_einsum/w", 3 + language.lead)
        key_value = (f"{language.name}/attn/kv_einsum/w", 4 + language.lead)
    wanted = (
        ("img/embedding/kernel", 4),
        ("img/pos_embedding", 3),
        (f"{tower.name}/MlpBlock_0/Dense_0/kernel", 2 + tower.lead),
        (f"{tower.name}/MultiHeadDotProductAttention_0/query/kernel", 3 + tower.lead),
        (TABLE, 2),
        (f"{language.name}/mlp/linear", 2 + language.lead),
        query,
        key_value,
    )
    if missing := [key for key, _ in dict.fromkeys(wanted) if key not in shapes]:
        raise PretrainedError(
            f"{MODEL_NAME}: the checkpoint lacks {', '.join(missing)}, which tell its sizes; download it again"
        )
    wrong = [
        f"{key}: expected {axes} axes, got the shape {shapes[key]}"
        for key, axes in dict.fromkeys(wanted)
        if len(shapes[key]) != axes
    ]
    if wrong:
        raise PretrainedError(f"{MODEL_NAME}: " + "\n".join(wrong))
    return _Shapes(*(shapes[key] for key, _ in wanted))


def _depth(blocks: _Blocks, shape: Shape) -> int:
    return shape[0] if blocks.lead else blocks.count


def _tower_section(found: _Shapes, blocks: _Blocks) -> Fields:
    rows, cols, _, width = found.patches
    sizes = (width, _depth(blocks, found.tower_mlp), found.tower_mlp[-1], found.tower_query[-2])
    own = {**_TOWER, "scan": bool(blocks.lead)}
    name = next((name for name, known in VARIANTS.items() if known == sizes), None)
    if name is not None and rows == cols:
        return {"variant": f"{name}/{rows}", **own}
    fields = dict(zip(("width", "depth", "mlp_dim", "num_heads"), sizes, strict=True))
    return {**fields, "patch_size": [rows, cols], **own}


def _language_section(found: _Shapes, blocks: _Blocks, shapes: Mapping[str, Shape]) -> Fields:
    *_, heads, width, head_dim = found.query
    mlp_dim, kv_heads = found.mlp[-2], found.key_value[-3]
    sizes = maps.GemmaSizes(width, _depth(blocks, found.mlp), mlp_dim, heads, kv_heads, head_dim)
    second = f"{blocks.name}/post_attention_norm/scale" in shapes
    own = {"vocab_size": found.table[0], "scan": bool(blocks.lead)}
    name = next((name for name, known in GEMMA_VARIANTS.items() if known == sizes), None)
    if name is not None and name.startswith("gemma2") == second:
        return {"variant": name, **own}
    return {**sizes._asdict(), **(_GEMMA2 if second else {}), **own}
