"""Perceiver and Q-Formers compared with transformers: connectors alone, their numbers and their masks."""

import functools

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    Idefics2Config,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
)
from transformers.models.idefics2.modeling_idefics2 import Idefics2Connector

from vlm_jax.checkpoints.maps.perceiver import perceiver_rules
from vlm_jax.checkpoints.maps.qformer import qformer_rules
from vlm_jax.checkpoints.params import import_params
from vlm_jax.connectors.perceiver import Perceiver
from vlm_jax.connectors.qformer import QueryTransformer
from vlm_jax.types import Instruction, VisualFeatures

BATCH, COUNT, WIDTH = 3, 11, 24


def randomised(module):
    """Values everywhere: fresh norms and queries are constants, and hide a mix-up."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3 if parameter.ndim > 1 else 0.5)
    return module.eval()


def features(masked, width=WIDTH):
    rng = np.random.default_rng(0)
    tokens = rng.normal(size=(BATCH, COUNT, width)).astype(np.float32)
    mask = np.ones((BATCH, COUNT), bool)
    if masked:
        mask = rng.uniform(size=mask.shape) < 0.6
        mask[:, 0] = True
    return VisualFeatures(jnp.asarray(tokens), jnp.asarray(mask), (1, COUNT))


def torch_inputs(given):
    return torch.from_numpy(np.array(given.tokens)), torch.from_numpy(np.array(given.mask))


def loaded(module, rules, torch_module, *inputs, **options):
    """Parameters of our module with the values of the torch one."""
    source = {key: value.numpy() for key, value in torch_module.state_dict().items()}
    shapes = jax.eval_shape(functools.partial(module.init, **options), jax.random.key(0), *inputs)["params"]
    return import_params(rules, source, flax.linen.meta.unbox(shapes))


def outputs_of(layers):
    """What each torch layer returns, filled when the model runs."""
    states = []
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: states.append(output.detach().numpy()))
    return states


def error(ours, theirs):
    theirs = theirs.numpy() if isinstance(theirs, torch.Tensor) else theirs
    return np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()


def run(module, params, *inputs, **options):
    """The result, and everything that submodules gave."""
    apply = functools.partial(module.apply, capture_intermediates=True, mutable=["intermediates"], **options)
    out, state = jax.jit(apply)({"params": params}, *inputs)
    return out, state["intermediates"]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_idefics2_connector(masked, kv_heads):
    config = Idefics2Config(
        vision_config={"hidden_size": WIDTH},
        text_config={"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 4, "rms_norm_eps": 1e-5},
        perceiver_config={
            "hidden_size": 32,
            "resampler_n_latents": 5,
            "resampler_depth": 3,
            "resampler_n_heads": 4,
            "resampler_head_dim": 6,
            "num_key_value_heads": kv_heads,
        },
    )
    theirs = randomised(Idefics2Connector(config))
    ours = Perceiver(
        features=32, num_queries=5, depth=3, num_heads=4, num_kv_heads=kv_heads, head_dim=6, projection_dim=40
    )
    given = features(masked)
    params = loaded(ours, perceiver_rules(), theirs, given, deterministic=True)
    states = outputs_of(theirs.perceiver_resampler.layers)
    with torch.no_grad():
        expected = theirs(*torch_inputs(given))
    out, inside = run(ours, params, given, deterministic=True)
    layers = inside["layers"]["__call__"][0][0]
    assert error(layers[0], states[0]) <= 1e-5
    assert error(out.tokens, expected) <= 1e-4
    assert out.mask.all()


class FlamingoLayer(nn.Module):
    """Alayrac et al. 2022, figure 5, with the norms and the feed-forward that the appendix gives."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.media, self.latents, self.after = (nn.LayerNorm(width) for _ in range(3))
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, latents, media, mask):
        x = self.latents(latents)
        keys = torch.cat([self.media(media), x], dim=1)
        seen = torch.cat([mask, torch.ones(x.shape[:2], dtype=torch.bool)], dim=1)[:, None, None]
        q, k, v = (
            product(y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for product, y in ((self.q, x), (self.k, keys), (self.v, keys))
        )
        read = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)
        latents = latents + self.o(read)
        return latents + self.down(functional.gelu(self.up(self.after(latents))))


def test_flamingos_perceiver():
    width, heads = 16, 4
    ours = Perceiver(width, 5, 2, heads, norm="layer", activation="gelu", gated=False, norm_epsilon=1e-5)
    given = features(masked=True, width=WIDTH)
    layers = [randomised(FlamingoLayer(width, heads)) for _ in range(2)]
    torch.manual_seed(1)
    shapes = jax.eval_shape(functools.partial(ours.init, deterministic=True), jax.random.key(0), given)["params"]
    params = jax.tree.map(lambda leaf: torch.randn(leaf.shape).numpy() * 0.3, flax.linen.meta.unbox(shapes))
    names = {
        "media": ("feature_norm",),
        "latents": ("query_norm",),
        "after": ("mlp_norm",),
        "q": ("attention", "query"),
        "k": ("attention", "key"),
        "v": ("attention", "value"),
        "o": ("attention", "out"),
        "up": ("mlp", "up"),
        "down": ("mlp", "down"),
    }
    for name, path in names.items():
        target = params["layers"]
        for part in path:
            target = target[part]
        modules = [getattr(layer, name) for layer in layers]
        if isinstance(modules[0], nn.LayerNorm):
            target["scale"] = np.stack([m.weight.detach().numpy() for m in modules])
            target["bias"] = np.stack([m.bias.detach().numpy() for m in modules])
        else:
            target["kernel"] = np.stack([m.weight.detach().numpy().T for m in modules])
    tokens, mask = torch_inputs(given)
    tokens = torch.where(mask[..., None], tokens, 0.0)
    up, down = (torch.from_numpy(params["projection"][name]["kernel"]) for name in ("up", "down"))
    with torch.no_grad():
        media = functional.gelu(tokens @ up) @ down
        latents = torch.from_numpy(params["queries"]).expand(BATCH, -1, -1)
        for layer in layers:
            latents = layer(latents, media, mask)
        scale, bias = (torch.from_numpy(params["final_norm"][name]) for name in ("scale", "bias"))
        expected = functional.layer_norm(latents, (width,), scale, bias)
    out = jax.jit(functools.partial(ours.apply, deterministic=True))({"params": params}, given)
    assert error(out.tokens, expected) <= 1e-5


QFORMER = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "encoder_hidden_size": WIDTH,
    "vocab_size": 20,
    "max_position_embeddings": 9,
}


def query_transformer(config, **fields):
    return QueryTransformer(
        width=32,
        depth=config.num_hidden_layers,
        num_heads=4,
        mlp_dim=48,
        cross_attention_every=config.cross_attention_frequency,
        **fields,
    )


def stacked(inside, depth, every):
    """Queries after every layer, out of what the submodules gave."""
    whole = depth // every
    states = []
    for layer in range(depth):
        group = inside["groups"] if layer // every < whole else inside["rest"]
        state = group[f"layer_{layer % every}"]["__call__"][0][0]
        states.append(state[layer // every] if layer // every < whole else state)
    return states


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("depth", "every"), [(4, 2), (3, 2), (2, 1), (2, 3)])
def test_blip2_qformer(masked, depth, every):
    config = Blip2QFormerConfig(**QFORMER, num_hidden_layers=depth, cross_attention_frequency=every)
    theirs = randomised(Blip2QFormerModel(config))
    ours, given = query_transformer(config), features(masked)
    queries = np.random.default_rng(1).normal(size=(BATCH, 5, 32)).astype(np.float32)
    params = loaded(ours, qformer_rules(depth, every, instruction=False), theirs, queries, given)
    states = outputs_of(theirs.encoder.layer)
    tokens, mask = torch_inputs(given)
    with torch.no_grad():
        theirs(torch.from_numpy(queries), encoder_hidden_states=tokens, encoder_attention_mask=mask)
    out, inside = run(ours, params, queries, given)
    errors = [error(*pair) for pair in zip(stacked(inside, depth, every), states, strict=True)]
    assert errors[0] <= 1e-5 and errors[-1] <= 1e-4
    np.testing.assert_array_equal(out, stacked(inside, depth, every)[-1])


@pytest.mark.parametrize(("depth", "every"), [(4, 2), (3, 2)])
def test_instructblip_qformer(depth, every):
    config = InstructBlipQFormerConfig(**QFORMER, num_hidden_layers=depth, cross_attention_frequency=every)
    theirs = randomised(InstructBlipQFormerModel(config))
    ours, given = query_transformer(config, vocab_size=20, max_length=9), features(masked=True)
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(BATCH, 5, 32)).astype(np.float32)
    ids, real = rng.integers(0, 20, size=(BATCH, 7)), np.arange(7)[None] < np.array([[7], [3], [1]])
    instruction = Instruction(jnp.asarray(ids, jnp.int32), jnp.asarray(real))
    params = loaded(ours, qformer_rules(depth, every, instruction=True), theirs, queries, given, instruction)
    states = outputs_of(theirs.encoder.layer)
    tokens, mask = torch_inputs(given)
    seen = torch.cat([torch.ones(BATCH, 5, dtype=torch.long), torch.from_numpy(real).long()], dim=1)
    with torch.no_grad():
        theirs(torch.from_numpy(ids), seen, None, torch.from_numpy(queries), tokens, mask)
    out, inside = run(ours, params, queries, given, instruction)
    errors = [error(ours, state[:, :5]) for ours, state in zip(stacked(inside, depth, every), states, strict=True)]
    assert errors[0] <= 1e-5 and errors[-1] <= 1e-4

    padding = Instruction(jnp.where(instruction.mask, instruction.tokens, 19), instruction.mask)
    np.testing.assert_array_equal(jax.jit(ours.apply)({"params": params}, queries, given, padding), out)


def test_an_instruction_wants_a_vocabulary_and_a_place():
    given, queries = features(False), np.zeros((BATCH, 5, 32), np.float32)
    instruction = Instruction(jnp.zeros((BATCH, 10), jnp.int32), jnp.ones((BATCH, 10), bool))
    config = Blip2QFormerConfig(**QFORMER, num_hidden_layers=1)

    def init(*inputs, **fields):
        return jax.eval_shape(query_transformer(config, **fields).init, jax.random.key(0), queries, given, *inputs)

    with pytest.raises(ValueError, match="vocab_size is None, but got an instruction"):
        init(instruction)
    with pytest.raises(ValueError, match="vocab_size is 20, but got no instruction"):
        init(vocab_size=20)
    with pytest.raises(ValueError, match="max_length is 9, but got an instruction of 10 tokens"):
        init(instruction, vocab_size=20, max_length=9)
