"""CLIP, SigLIP and SigLIP 2 under the names of transformers, which are shared by their towers."""

from vlm_jax.checkpoints.maps.torch_layers import conv, fused, layer_norm, linear
from vlm_jax.checkpoints.ops import CONV2D, LINEAR, Op, Reshape, Split, patch_linear
from vlm_jax.checkpoints.rules import Rule

_TARGET = "blocks/layers"
_HEADS = ("head/attention/query", "head/attention/key", "head/attention/value")


def block_rules(source: str = "encoder.layers.{layer}") -> tuple[Rule, ...]:
    """The blocks of any of the towers."""
    names = {
        "self_attn.q_proj": "attention/query",
        "self_attn.k_proj": "attention/key",
        "self_attn.v_proj": "attention/value",
        "self_attn.out_proj": "attention/out",
        "mlp.fc1": "mlp/up",
        "mlp.fc2": "mlp/down",
    }
    rules = [
        *layer_norm(f"{source}.layer_norm1", f"{_TARGET}/attention_norm"),
        *layer_norm(f"{source}.layer_norm2", f"{_TARGET}/mlp_norm"),
    ]
    for released, ours in names.items():
        rules += linear(f"{source}.{released}", f"{_TARGET}/{ours}")
    return tuple(rules)


def class_position_op(num_patches: int) -> Op:
    """A position table whose first row is the class token's -> that row, and the patches' rows."""
    return Split(0, (1, num_patches))


def clip_vision_rules(width: int, num_patches: int) -> tuple[Rule, ...]:
    """CLIP's ViT, after `vision_model.`."""
    return (
        Rule("embeddings.patch_embedding.weight", "patch_embed/kernel", CONV2D),
        Rule("embeddings.class_embedding", "class_token", Reshape((width,), (1, width))),
        Rule(
            "embeddings.position_embedding.weight",
            ("class_position", "positions/table"),
            class_position_op(num_patches),
        ),
        *layer_norm("pre_layrnorm", "pre_norm"),
        *block_rules(),
        *layer_norm("post_layernorm", "final_norm"),
    )


def clip_text_rules() -> tuple[Rule, ...]:
    """CLIP's text tower, after `text_model.`."""
    return (
        Rule("embeddings.token_embedding.weight", "embedding/embedding"),
        Rule("embeddings.position_embedding.weight", "positions"),
        *block_rules(),
        *layer_norm("final_layer_norm", "final_norm"),
    )


def map_head_rules(width: int) -> tuple[Rule, ...]:
    """SigLIP's attention-pooling head."""
    return (
        Rule("head.probe", "head/probe", Reshape((1, 1, width), (1, width))),
        *fused("head.attention", _HEADS, width, weight=".in_proj_weight", bias_name=".in_proj_bias"),
        *linear("head.attention.out_proj", "head/attention/out"),
        *layer_norm("head.layernorm", "head/norm"),
        *linear("head.mlp.fc1", "head/mlp/up"),
        *linear("head.mlp.fc2", "head/mlp/down"),
    )


def siglip_tower_rules() -> tuple[Rule, ...]:
    """SigLIP's ViT without its head, after `vision_model.`."""
    return (
        *conv("embeddings.patch_embedding", "patch_embed", bias=True),
        Rule("embeddings.position_embedding.weight", "positions/table"),
        *block_rules(),
        *layer_norm("post_layernorm", "final_norm"),
    )


def siglip_vision_rules(width: int) -> tuple[Rule, ...]:
    """SigLIP's ViT, after `vision_model.`."""
    return (*siglip_tower_rules(), *map_head_rules(width))


def siglip2_vision_rules(width: int) -> tuple[Rule, ...]:
    """SigLIP 2's NaFlex ViT, whose patches are flattened before they are embedded."""
    return (
        *linear("embeddings.patch_embedding", "patch_embed"),
        Rule("embeddings.position_embedding.weight", "positions"),
        *block_rules(),
        *layer_norm("post_layernorm", "final_norm"),
        *map_head_rules(width),
    )


def idefics2_vision_rules(width: int, patch_size: int, channels: int) -> tuple[Rule, ...]:
    """Idefics2's SigLIP of native resolution, after `vision_model.`: SigLIP's convolution, for flattened patches."""
    return (
        Rule("embeddings.patch_embedding.weight", "patch_embed/kernel", patch_linear(patch_size, channels, width)),
        Rule("embeddings.patch_embedding.bias", "patch_embed/bias"),
        Rule("embeddings.position_embedding.weight", "positions"),
        *block_rules(),
        *layer_norm("post_layernorm", "final_norm"),
    )


def siglip_text_rules() -> tuple[Rule, ...]:
    """SigLIP's text tower, after `text_model.`."""
    return (*clip_text_rules(), *linear("head", "projection"))


def clip_rules() -> tuple[Rule, ...]:
    """CLIP's parameters outside its towers: projections and the logarithm of the scale."""
    return (
        Rule("logit_scale", "log_scale"),
        Rule("visual_projection.weight", "image/projection/kernel", LINEAR),
        Rule("text_projection.weight", "text/projection/kernel", LINEAR),
    )


def siglip_rules() -> tuple[Rule, ...]:
    """SigLIP's parameters outside its towers: the logarithm of the scale, and the bias."""
    one = Reshape((1,), ())
    return (Rule("logit_scale", "log_scale", one), Rule("logit_bias", "bias", one))
