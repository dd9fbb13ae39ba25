"""A live torch model, through files, rules and back: the tower of the original and of the import agree."""

import jax
import numpy as np
import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from vlm_jax.checkpoints.hub import open_checkpoint, read_config
from vlm_jax.checkpoints.ops import LINEAR, Reshape, fused_bias, fused_linear, patch_linear
from vlm_jax.checkpoints.params import export_params, import_params
from vlm_jax.checkpoints.rules import Rule, prefixed
from vlm_jax.checkpoints.saving import save_checkpoint

LAYERS, WIDTH, HIDDEN, HEADS, PATCH, SIDE = 3, 8, 12, 2, 4, 12


def siglip_rules(config):
    """The table of a SigLIP tower, as a map of the package computes it from a released config."""
    width, patch = config["hidden_size"], config["patch_size"]

    def layer_norm(source, target):
        return [Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")]

    def linear(source, target):
        return [
            Rule(f"{source}.weight", f"{target}/kernel", LINEAR),
            Rule(f"{source}.bias", f"{target}/bias"),
        ]

    layer, blocks = "encoder.layers.{layer}", "encoder/blocks"
    heads = ("head/attention/query", "head/attention/key", "head/attention/value")
    num_patches = (config["image_size"] // patch) ** 2
    positions = Reshape((num_patches, width), (1, num_patches, width))
    return (
        Rule(
            "embeddings.patch_embedding.weight",
            "embed/kernel",
            patch_linear(patch, config["num_channels"], width),
        ),
        Rule("embeddings.patch_embedding.bias", "embed/bias"),
        Rule("embeddings.position_embedding.weight", "positions", positions),
        *layer_norm(f"{layer}.layer_norm1", f"{blocks}/attention_norm"),
        *linear(f"{layer}.self_attn.q_proj", f"{blocks}/attention/query"),
        *linear(f"{layer}.self_attn.k_proj", f"{blocks}/attention/key"),
        *linear(f"{layer}.self_attn.v_proj", f"{blocks}/attention/value"),
        *linear(f"{layer}.self_attn.out_proj", f"{blocks}/attention/out"),
        *layer_norm(f"{layer}.layer_norm2", f"{blocks}/mlp_norm"),
        *linear(f"{layer}.mlp.fc1", f"{blocks}/mlp/up"),
        *linear(f"{layer}.mlp.fc2", f"{blocks}/mlp/down"),
        *layer_norm("post_layernorm", "norm"),
        Rule("head.probe", "head/probe"),
        Rule("head.attention.in_proj_weight", tuple(f"{h}/kernel" for h in heads), fused_linear(*(width,) * 3)),
        Rule("head.attention.in_proj_bias", tuple(f"{h}/bias" for h in heads), fused_bias(*(width,) * 3)),
        *linear("head.attention.out_proj", "head/attention/out"),
        *layer_norm("head.layernorm", "head/mlp_norm"),
        *linear("head.mlp.fc1", "head/mlp/up"),
        *linear("head.mlp.fc2", "head/mlp/down"),
    )


def targets():
    """The shapes of our tree, written down apart from the rules."""

    def shapes(*leading):
        def linear(d_in, d_out):
            return {"kernel": (*leading, d_in, d_out), "bias": (*leading, d_out)}

        norm = {"scale": (*leading, WIDTH), "bias": (*leading, WIDTH)}
        return {
            "attention": {name: linear(WIDTH, WIDTH) for name in ("query", "key", "value", "out")},
            "mlp_norm": norm,
            "mlp": {"up": linear(WIDTH, HIDDEN), "down": linear(HIDDEN, WIDTH)},
        }

    norm = {"scale": (LAYERS, WIDTH), "bias": (LAYERS, WIDTH)}
    tree = {
        "embed": {"kernel": (PATCH * PATCH * 3, WIDTH), "bias": (WIDTH,)},
        "positions": (1, (SIDE // PATCH) ** 2, WIDTH),
        "encoder": {"blocks": {"attention_norm": norm, **shapes(LAYERS)}},
        "norm": {"scale": (WIDTH,), "bias": (WIDTH,)},
        "head": {"probe": (1, 1, WIDTH), **shapes()},
    }
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, np.float32),
        tree,
        is_leaf=lambda leaf: isinstance(leaf, tuple),
    )


def apply_linear(p, x):
    return x @ p["kernel"] + p["bias"]


def apply_norm(p, x):
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def apply_mlp(p, x):
    hidden = apply_linear(p["up"], x)
    gelu = 0.5 * hidden * (1 + np.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
    return apply_linear(p["down"], gelu)


def apply_attention(p, x, context):
    query, key, value = (
        apply_linear(p[name], y).reshape(*y.shape[:2], HEADS, WIDTH // HEADS)
        for name, y in (("query", x), ("key", context), ("value", context))
    )
    logits = np.einsum("bqhd,bkhd->bhqk", query, key) / np.sqrt(WIDTH // HEADS)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights = weights / weights.sum(-1, keepdims=True)
    return apply_linear(p["out"], np.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape))


def tower(params, images):
    """SigLIP in NumPy on [B, height, width, channels]: features and pooled embedding."""
    grid = SIDE // PATCH
    patches = images.reshape(-1, grid, PATCH, grid, PATCH, 3).transpose(0, 1, 3, 2, 4, 5)
    x = apply_linear(params["embed"], patches.reshape(len(images), grid**2, -1)) + params["positions"]
    for layer in range(LAYERS):
        p = jax.tree.map(lambda leaf, layer=layer: leaf[layer], params["encoder"]["blocks"])
        y = apply_norm(p["attention_norm"], x)
        x = x + apply_attention(p["attention"], y, y)
        x = x + apply_mlp(p["mlp"], apply_norm(p["mlp_norm"], x))
    x = apply_norm(params["norm"], x)
    head = params["head"]
    pooled = apply_attention(head["attention"], np.repeat(head["probe"], len(images), 0), x)
    return x, (pooled + apply_mlp(head["mlp"], apply_norm(head["mlp_norm"], pooled)))[:, 0]


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
    )
    model = SiglipVisionModel(config).eval()
    with torch.no_grad():  # biases and scales are constants when fresh, and would hide a mix-up
        for parameter in model.parameters():
            parameter.normal_(std=0.4)
    return model


@pytest.mark.parametrize("max_shard_size", ["5GB", "3KB"])
def test_import_computes_what_torch_computes_and_export_gives_it_back(tmp_path, model, max_shard_size):
    model.save_pretrained(tmp_path / "torch", max_shard_size=max_shard_size)
    checkpoint = open_checkpoint(tmp_path / "torch")
    (prefix,) = {key.split("embeddings.patch_embedding.weight")[0] for key in checkpoint if "patch_embedding.w" in key}
    rules = prefixed(siglip_rules(read_config(tmp_path / "torch")), source=prefix)
    params = jax.tree.map(np.asarray, import_params(rules, checkpoint, targets()))

    images = np.random.default_rng(1).normal(size=(2, SIDE, SIDE, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(images.transpose(0, 3, 1, 2)))
    features, pooled = tower(params, images)
    np.testing.assert_allclose(features, expected.last_hidden_state.numpy(), atol=2e-5)
    np.testing.assert_allclose(pooled, expected.pooler_output.numpy(), atol=2e-5)

    save_checkpoint(tmp_path / "ours", export_params(rules, params), max_shard_bytes=3000)
    model.config.save_pretrained(tmp_path / "ours")
    again = SiglipVisionModel.from_pretrained(tmp_path / "ours")
    original = model.state_dict()
    assert again.state_dict().keys() == original.keys()
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, original[key]), key


def test_bfloat16_of_torch_is_read_bit_by_bit(tmp_path, model):
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    for key, tensor in open_checkpoint(tmp_path).items():
        bits = model.state_dict()[key].contiguous().view(torch.int16).numpy()
        np.testing.assert_array_equal(tensor[...].view(np.int16), bits)
