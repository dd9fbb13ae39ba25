"""AIMv2 in Ovis 2, under the names of the release and of transformers."""

from vlm_jax.checkpoints.maps.torch_layers import conv, fused, linear, rms_norm
from vlm_jax.checkpoints.ops import Reshape
from vlm_jax.checkpoints.rules import Rule

_BLOCKS = "blocks/layers"
_HEADS = tuple(f"{_BLOCKS}/attention/{name}" for name in ("query", "key", "value"))


def encoder_rules(*, width: int, num_patches: int, qkv_bias: bool, use_bias: bool) -> tuple[Rule, ...]:
    """The names of AIDC-AI/Ovis2, after `visual_tokenizer.backbone.`; its `post_trunk_norm` is never used.

    Args:
      width: residual width.
      num_patches: rows of the position table.
      qkv_bias: whether query, key and value have biases.
      use_bias: whether the blocks' other linear layers have biases.
    """
    block = "trunk.blocks.{layer}"
    positions = Reshape((1, num_patches, width), (num_patches, width))
    return (
        *conv("preprocessor.patchifier.proj", "patch_embed", bias=True),
        *rms_norm("preprocessor.patchifier.norm", "patch_norm"),
        Rule("preprocessor.pos_embed", "positions/table", positions),
        *rms_norm(f"{block}.norm_1", f"{_BLOCKS}/attention_norm"),
        *fused(f"{block}.attn.qkv", _HEADS, width, bias=qkv_bias),
        *linear(f"{block}.attn.proj", f"{_BLOCKS}/attention/out", bias=use_bias),
        *rms_norm(f"{block}.norm_2", f"{_BLOCKS}/mlp_norm"),
        *linear(f"{block}.mlp.fc1", f"{_BLOCKS}/mlp/gate", bias=use_bias),
        *linear(f"{block}.mlp.fc3", f"{_BLOCKS}/mlp/up", bias=use_bias),
        *linear(f"{block}.mlp.fc2", f"{_BLOCKS}/mlp/down", bias=use_bias),
    )


def hf_encoder_rules(*, bias: bool) -> tuple[Rule, ...]:
    """The names of transformers, after `model.vision_tower.transformer.`.

    Args:
      bias: whether the blocks' linear layers have biases.
    """
    block = "encoder.layers.{layer}"
    names = {
        "attention.q_proj": "attention/query",
        "attention.k_proj": "attention/key",
        "attention.v_proj": "attention/value",
        "attention.out_proj": "attention/out",
        "ffn.gate_proj": "mlp/gate",
        "ffn.up_proj": "mlp/up",
        "ffn.down_proj": "mlp/down",
    }
    rules = [
        *conv("embeddings.patch_embedding", "patch_embed", bias=True),
        *rms_norm("embeddings.rms_norm", "patch_norm"),
        Rule("embeddings.position_embedding.weight", "positions/table"),
        *rms_norm(f"{block}.rms_norm1", f"{_BLOCKS}/attention_norm"),
        *rms_norm(f"{block}.rms_norm2", f"{_BLOCKS}/mlp_norm"),
        *rms_norm("rms_norm", "final_norm"),
    ]
    for released, ours in names.items():
        rules += linear(f"{block}.{released}", f"{_BLOCKS}/{ours}", bias=bias)
    return tuple(rules)
