"""What messages of modules advise works: a model that cannot be run, the message, and the output after its fix."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.budget import InfeasibleGrid
from vlm_jax.connectors.concat import Concat
from vlm_jax.connectors.hybrid_mlp import HybridMlp
from vlm_jax.connectors.pixel_shuffle import PixelShuffle
from vlm_jax.connectors.pool import Pool
from vlm_jax.connectors.qformer import QFormer
from vlm_jax.connectors.visual_vocabulary import VisualVocabulary
from vlm_jax.decoders.deepseek import Deepseek
from vlm_jax.encoders.hybrid import Hybrid
from vlm_jax.encoders.qwen_vit import QwenViT
from vlm_jax.encoders.vit import ViT
from vlm_jax.layers.scan import LOSSES
from vlm_jax.models.vlm import VLM
from vlm_jax.processors.patches import pack_patches
from vlm_jax.reducers.behind_connector import block_means
from vlm_jax.reducers.tome import ToMe
from vlm_jax.reducers.uniform_stride import UniformStride
from vlm_jax.reducers.visionzip import VisionZip
from vlm_jax.types import Drop, Instruction, PackedImages, VisualFeatures, VisualPlaces, VisualTokens

from ..advice import tried
from ..parameters import drawn

WIDTH, KEPT = 8, 3
BLOCKS = {"patch_size": 4, "width": 8, "depth": 1, "num_heads": 2, "mlp_dim": 8}
VIT = ViT(image_size=(8, 16), **BLOCKS)
IMAGES = np.random.default_rng(0).normal(size=(2, 8, 16, 3)).astype(np.float32)
CONNECTED = HybridMlp(WIDTH)


def made(module, *inputs, **options):
    """Parameters of a module."""
    init = functools.partial(module.init, jax.random.key(0), **options)
    return drawn(jax.eval_shape(init, *inputs))


def run(module, *inputs, params=None, **options):
    """A module's output, by parameters of its own unless some are given."""
    params = made(module, *inputs, **options) if params is None else params
    return jax.jit(functools.partial(module.apply, **options))(params, *inputs)


def seen(model, images=IMAGES, params=None) -> VisualTokens:
    return run(model, images, params=params, method="visual_tokens")


def shape(module, *inputs, **options):
    """The shape of a module's tokens, which are not computed."""
    found, _ = jax.eval_shape(functools.partial(module.init_with_output, jax.random.key(0), **options), *inputs)
    return found.tokens.shape


def shape_seen(model):
    return shape(model, IMAGES, method="visual_tokens")


def test_a_reducer_acts_on_two_encoders_that_are_joined():
    pair = Hybrid(VIT, VIT.clone(image_size=(4, 8), patch_size=2), low_size=4, combine="tuple")
    told = tried("returns those of two; set its combine to 'feature'")
    with pytest.raises(ValueError, match=told):
        shape_seen(VLM(pair, CONNECTED, reducer=UniformStride(num_kept=KEPT)))
    joined = pair.clone(combine="feature")
    params = made(VLM(joined, CONNECTED), IMAGES, method="visual_tokens")
    whole, kept = seen(VLM(joined, CONNECTED), params=params), [0, 8 // KEPT, 2 * 8 // KEPT]
    left = seen(VLM(joined, CONNECTED, reducer=UniformStride(num_kept=KEPT)), params=params)
    np.testing.assert_allclose(left.tokens, whole.tokens[:, kept], atol=1e-5)


def test_two_encoders_have_one_grid():
    pair = Hybrid(VIT, VIT.clone(image_size=(4, 8)), low_size=4, combine="tuple")
    told = tried("(low); change an encoder's image or patch size")
    with pytest.raises(InfeasibleGrid, match=told):
        shape_seen(VLM(pair, CONNECTED))
    of_size, of_patch = pair.clone(low=VIT, low_size=8), pair.clone(low=VIT.clone(image_size=(4, 8), patch_size=2))
    for fixed in (of_size, of_patch):
        assert shape_seen(VLM(fixed, CONNECTED)) == (2, 8, WIDTH)


def test_a_reducer_acts_on_packed_images_behind_the_connector():
    tower = QwenViT(**{**BLOCKS, "patch_size": 2}, temporal_patch_size=1)
    patches = np.random.default_rng(1).normal(size=(16 + 12, 12)).astype(np.float32)
    packed = pack_patches(patches, [(1, 4, 4), (1, 2, 6)], merge_size=2, length=32)
    places = PackedImages(np.array([[0, 4]], np.int32), np.array([[4, 3]], np.int32), 4)
    images = dataclasses.replace(packed, images=places)
    before = VLM(tower, Concat(WIDTH, 2), reducer=UniformStride(num_kept=2))
    told = tried("several are packed in a row; set reduce to 'tokens', so that it acts after the connector")
    with pytest.raises(ValueError, match=told):
        seen(before, images)
    params = made(before.clone(reducer=None), images, method="visual_tokens")
    whole = seen(before.clone(reducer=None), images, params)
    left = seen(before.clone(reduce="tokens"), images, params)
    np.testing.assert_allclose(left.tokens[0, :4], whole.tokens[0, [0, 2, 4, 5]], atol=1e-5)
    np.testing.assert_array_equal(np.flatnonzero(left.mask[0]), np.arange(4))


def test_tokens_are_merged_in_the_encoder():
    reducer = ToMe(num_kept=6, merged=(2,))
    model = VLM(VIT.clone(**reducer.required_fields()["encoder"]), Concat(WIDTH, 1), reducer=reducer, reduce="tokens")
    with pytest.raises(
        ValueError, match=tried("{tome} works in the {encoder}, not on tokens; set reduce to 'features'")
    ):
        shape_seen(model)
    assert shape_seen(model.clone(reduce="features")) == (2, 6, WIDTH)


def features(**fields):
    """Of two images, 2x4 each."""
    tokens = np.random.default_rng(2).normal(size=(2, 8, 6)).astype(np.float32)
    return VisualFeatures(jnp.asarray(tokens), jnp.ones((2, 8), bool), (2, 4), **fields)


def test_an_instruction_is_passed_where_there_is_a_vocabulary():
    plain = QFormer(features=WIDTH, num_queries=3, width=8, depth=1, num_heads=2, mlp_dim=8)
    words = Instruction(jnp.arange(8).reshape(2, 4), jnp.ones((2, 4), bool))
    instructed = plain.clone(vocab_size=8)
    with pytest.raises(ValueError, match=tried("pass one")):
        shape(instructed, features(), deterministic=True)
    assert shape(instructed, features(), deterministic=True, instruction=words) == (2, 3, WIDTH)
    with pytest.raises(ValueError, match=tried("leave it out")):
        shape(plain, features(), deterministic=True, instruction=words)
    assert shape(plain, features(), deterministic=True) == (2, 3, WIDTH)


def test_tokens_of_packed_features_stand_for_squares():
    packed = features(block=2)
    told = tried("use a connector of squares (concat, pixel_shuffle, visual_vocabulary)")
    with pytest.raises(InfeasibleGrid, match=told):
        block_means(packed, Pool(WIDTH, (1, 3)).token_grid(packed.grid))
    for connector in (Concat(WIDTH, 2), PixelShuffle(WIDTH, 2), VisualVocabulary(WIDTH, vocab_size=7, factor=2)):
        means = block_means(packed, connector.token_grid(packed.grid))
        np.testing.assert_allclose(means, packed.tokens.reshape(2, 2, 4, 6).mean(axis=2), atol=1e-6)


def test_an_encoder_gives_what_a_reducer_needs():
    reducer = VisionZip(KEPT, contextual_share=0.0)
    with pytest.raises(ValueError, match=tried("{visionzip} needs features with saliency and keys: set {}, as build")):
        shape_seen(VLM(VIT, Concat(WIDTH, 1), reducer=reducer))
    encoder = VIT.clone(**reducer.required_fields()["encoder"])
    params = made(VLM(VIT, Concat(WIDTH, 1)), IMAGES, method="visual_tokens")
    found = run(encoder, IMAGES, params={"params": params["params"]["encoder"]})
    left = seen(VLM(encoder, Concat(WIDTH, 1), reducer=reducer), params=params)
    np.testing.assert_array_equal(left.kept, np.sort(np.argsort(found.saliency, axis=1)[:, -KEPT:]))


def test_the_rule_of_the_release_needs_a_class_token():
    reducer = VisionZip(KEPT, contextual_share=0.0, rule="as_released")
    encoder = VIT.clone(class_token=True, saliency="heads")
    with pytest.raises(ValueError, match=tried("{}: the rule 'as_released' needs a class token: set {}")):
        shape_seen(VLM(encoder, Concat(WIDTH, 1), reducer=reducer))
    fixed = VLM(encoder.clone(**reducer.required_fields()["encoder"]), Concat(WIDTH, 1), reducer=reducer)
    np.testing.assert_array_equal(seen(fixed).kept[:, 0], 0)  # the class token


def test_experts_are_balanced_where_no_token_is_dropped():
    sizes = {"vocab_size": 7, "width": 16, "depth": 2, "num_heads": 2, "mlp_dim": 8, "latent_dim": None}
    decoder = Deepseek(**sizes, expert_dim=8, num_experts=4, num_selected=2, drops=(Drop(1, 2, 0),))
    x = np.random.default_rng(4).normal(size=(1, 6, 16)).astype(np.float32)
    row = np.arange(6, dtype=np.int32)[None], np.ones((1, 6), np.int32)
    places = VisualPlaces(jnp.array([[[1, 2, 3, 4]]]), jnp.asarray(row[0] == 5))
    params = made(decoder, x, *row)

    def trained(decoder, places):
        (hidden, _), sown = run(decoder, x, *row, params=params, mutable=[LOSSES], places=places)
        return hidden, sum(leaf.sum() for leaf in jax.tree.leaves(sown))

    with pytest.raises(
        ValueError, match=tried("set config.decoder.balance_weight to 0, or choose a reducer that acts before the")
    ):
        trained(decoder, places)
    hidden, balance = trained(decoder.clone(balance_weight=0.0), places)
    assert balance == 0 and (np.abs(hidden[0]).sum(axis=1) == 0).sum() == 2  # two of four tokens are left
    hidden, balance = trained(decoder.clone(drops=()), None)  # as with a reducer before the decoder
    assert balance > 0 and np.abs(hidden[0]).sum(axis=1).all()
