"""ViT and its hybrids in the format of vision_transformer (vit_jax)."""

from collections.abc import Mapping

from vlm_jax.checkpoints.maps import big_vision as maps
from vlm_jax.checkpoints.rules import SourceTensor, prefixed
from vlm_jax.encoders.trunk import Pooling
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.classifier import Classifier
from vlm_jax.pretrained.family import (
    REQUIRED,
    Description,
    check_supported,
    one_side,
    square_root,
    with_defaults,
)
from vlm_jax.pretrained.tables import image_shape, resizer
from vlm_jax.types import Config, Dtype, Fields

# vision_transformer, vit_jax/configs/models.py; `num_classes` is next to the model's config there.
DEFAULTS: Fields = {
    "patches": REQUIRED,
    "hidden_size": REQUIRED,
    "transformer": REQUIRED,
    "classifier": REQUIRED,
    "representation_size": None,
    "num_classes": None,
    "resnet": None,
}
_POOLING: dict[str, Pooling] = {"token": "token", "gap": "gap", "unpooled": "none", "token_unpooled": "none"}
_ROOT_WIDTH = 64


def describe(
    config: Config, checkpoint: Mapping[str, SourceTensor], *, dtype: Dtype, param_dtype: Dtype
) -> Description:
    """A ViT with its classification head, or without where `num_classes` is None or 0.

    The image size of training is computed from the position table.
    """
    settings = with_defaults(config, DEFAULTS, "the model's config")
    check_supported(settings, {"classifier": tuple(_POOLING)}, "the model's config")
    transformer = settings["transformer"]
    class_token = settings["classifier"] in ("token", "token_unpooled")
    patch = one_side(settings["patches"]["size"], "patches.size")
    stem, step = {}, 1
    if settings["resnet"] is not None:
        layers = tuple(settings["resnet"]["num_layers"])
        stem = {"stem_layers": layers, "stem_width": int(_ROOT_WIDTH * settings["resnet"]["width_factor"])}
        step = 4 * 2 ** max(len(layers) - 1, 0)
    table_key = "Transformer/posembed_input/pos_embedding"
    table = checkpoint.get(table_key)
    rows = class_token + 1 if table is None else table.shape[1]
    side = step * patch * square_root(rows - class_token, table_key)
    vit = ViT(
        image_size=(side, side),
        patch_size=patch,
        width=settings["hidden_size"],
        depth=transformer["num_layers"],
        num_heads=transformer["num_heads"],
        mlp_dim=transformer["mlp_dim"],
        class_token=class_token,
        class_position=class_token,
        position_interpolation="corner_linear",
        pooling=_POOLING[settings["classifier"]],
        keep_class_token=settings["classifier"] == "token_unpooled",
        representation_size=settings["representation_size"],
        dtype=dtype,
        param_dtype=param_dtype,
        **stem,
    )
    sizes = maps.Sizes(vit.width, vit.num_heads)
    rules = maps.vision_transformer_rules(sizes, rows, class_token=class_token)
    if stem:
        stem_rules = maps.resnet_stem_rules(vit.stem_width, len(stem["stem_layers"]))
        rules = (*rules, *prefixed(stem_rules, "", "stem/"))
    image = image_shape(vit, 3)
    if not settings["num_classes"]:
        return Description(vit, (image,), rules, resize=resizer(config, vit, table_key=table_key))
    return Description(
        Classifier(vit, settings["num_classes"]),
        (image,),
        (*prefixed(rules, "", "encoder/"), *maps.dense("head", "head")),
        resize=resizer(config, vit, path=("encoder",), table_key=table_key),
    )
