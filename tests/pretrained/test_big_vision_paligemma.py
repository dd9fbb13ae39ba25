"""PaliGemma's `.npz` of big_vision: real sizes by name and shape, the tokenizer's file, and what is refused."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from flax import linen as nn
from PIL import Image

import vlm_jax
from tests.processors.vocabularies import sentencepiece_model
from vlm_jax.checkpoints.hub import CheckpointFileError
from vlm_jax.checkpoints.mismatch import CheckpointMismatch
from vlm_jax.checkpoints.plan import plan
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.big_vision_paligemma import GEMMA_VARIANTS, MARKER, completed, tokens_of
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.known import describe_known

from ..advice import tried

CONFIG = {"model_name": "proj.paligemma.paligemma"}
SO400M = (1152, 27, 4304, 16)
TINY = {"tower": (16, 2, 24, 2), "patch": 4, "language": (32, 2, 48, 4, 2, 12), "rows": 400}


def shapes(side, *, patch, tower, language, rows, second):
    """Names and shapes of a released file, by models/vit.py and models/ppp/gemma.py of big_vision."""
    width, depth, hidden, heads = tower
    dim, layers, mlp, queries, keys, head = language
    attention = {f"{name}/kernel": (width, heads, width // heads) for name in ("query", "key", "value")}
    attention |= {f"{name}/bias": (heads, width // heads) for name in ("query", "key", "value")}
    attention |= {"out/kernel": (heads, width // heads, width), "out/bias": (width,)}
    block = {f"MultiHeadDotProductAttention_0/{name}": shape for name, shape in attention.items()}
    block |= {f"LayerNorm_{index}/{name}": (width,) for index in (0, 1) for name in ("scale", "bias")}
    block |= {"MlpBlock_0/Dense_0/kernel": (width, hidden), "MlpBlock_0/Dense_0/bias": (hidden,)}
    block |= {"MlpBlock_0/Dense_1/kernel": (hidden, width), "MlpBlock_0/Dense_1/bias": (width,)}
    layer = {"attn/q_einsum/w": (queries, dim, head), "attn/kv_einsum/w": (2, keys, dim, head)}
    layer |= {"attn/attn_vec_einsum/w": (queries, head, dim), "mlp/gating_einsum": (2, dim, mlp)}
    layer |= {"mlp/linear": (mlp, dim), "pre_attention_norm/scale": (dim,), "pre_ffw_norm/scale": (dim,)}
    if second:
        layer |= {"post_attention_norm/scale": (dim,), "post_ffw_norm/scale": (dim,)}
    found = {"img/embedding/kernel": (patch, patch, 3, width), "img/embedding/bias": (width,)}
    found |= {"img/pos_embedding": (1, (side // patch) ** 2, width)}
    found |= {f"img/Transformer/encoderblock/{name}": (depth, *shape) for name, shape in block.items()}
    found |= {f"img/Transformer/encoder_norm/{name}": (width,) for name in ("scale", "bias")}
    found |= {"img/head/kernel": (width, dim), "img/head/bias": (dim,)}
    found |= {"llm/embedder/input_embedding": (rows, dim), "llm/final_norm/scale": (dim,)}
    found |= {f"llm/layers/{name}": (layers, *shape) for name, shape in layer.items()}
    return {f"params/{name}": shape for name, shape in found.items()}


def described(config, tensors):
    return FAMILIES[MARKER](config, tensors, dtype=jnp.float32, param_dtype=jnp.float32)


@pytest.mark.parametrize("side", [224, 448, 896])
@pytest.mark.parametrize(
    ("known", "variant"),
    [
        ("google/paligemma-3b-pt-224", "gemma_2b"),
        ("google/paligemma2-3b-pt-224", "gemma2_2b"),
        ("google/paligemma2-10b-pt-224", "gemma2_9b"),
        ("google/paligemma2-28b-pt-224", "gemma2_27b"),
    ],
)
def test_real_files(known, variant, side):
    """All of their names are used, and the parameters are those of transformers but for its rows of other tokens."""
    sizes = GEMMA_VARIANTS[variant]
    given = shapes(side, patch=14, tower=SO400M, language=sizes, rows=257_152, second=variant != "gemma_2b")
    tensors = {name: np.broadcast_to(np.zeros((), np.float32), shape) for name, shape in given.items()}
    config = completed(CONFIG, tensors)
    assert config["model"] == {
        "img": {"variant": "So400m/14", "pool_type": "none", "scan": True},
        "llm": {"variant": variant, "vocab_size": 257_152, "scan": True},
    }
    assert tokens_of(config) == (side, (side // 14) ** 2)
    model = described(config, tensors)
    boxed = nn.meta.unbox(model.boxed_shapes())
    plan(model.rules, tensors, boxed, ignore=model.ignore)
    count = sum(leaf.size for leaf in jax.tree.leaves(boxed))
    assert count == sum(map(math.prod, given.values()))
    other = describe_known(known)
    theirs = sum(leaf.size for leaf in jax.tree.leaves(nn.meta.unbox(other.boxed_shapes())))
    assert count == theirs - 64 * sizes.width + ((side // 14) ** 2 - 256) * 1152
    own, released = model.module.decoder, other.module.decoder
    scale = released.qk_scale or released.head_dim**-0.5
    assert own.windows == () and own.qk_scale == scale
    for field in ("attention_softcap", "logit_softcap", "post_norm", "activation", "rope", "norm", "embedding_scale"):
        assert getattr(own, field) == getattr(released, field), field


def arrays(second=True, side=16, **changes):
    draw = np.random.default_rng(0)
    given = shapes(side, **{**TINY, "second": second, **changes})
    return {name: draw.normal(size=shape).astype(np.float32) * 0.2 for name, shape in given.items()}


@pytest.fixture
def folder(tmp_path):
    """As on Kaggle: an `.npz`, and the SentencePiece model with tokens of places."""
    symbols = [f"<loc{index:04d}>" for index in range(4)]
    ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3, "pad_piece": "<pad>"}
    pieces = {"bos_piece": "<bos>", "eos_piece": "<eos>", "user_defined_symbols": symbols, "add_dummy_prefix": False}
    model = sentencepiece_model(**ids, **pieces)
    (tmp_path / "paligemma_tokenizer.model").write_bytes(model)
    np.savez(tmp_path / "pt_16.npz", **arrays())
    return tmp_path


def test_a_folder_of_big_vision(folder):
    spm = sentencepiece.SentencePieceProcessor(model_file=str(folder / "paligemma_tokenizer.model"))  # type: ignore
    model = vlm_jax.from_pretrained(folder)
    question, answer = "detect <loc0002> the dog", "<loc0001><loc0003> dog"
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    batch = model.processor(messages, [picture])
    expected = [*[0] * 16, 2, *spm.encode(question + "\n")]
    assert np.asarray(batch.tokens).tolist() == [expected] and spm.piece_to_id("<loc0002>") in expected
    assert np.asarray(batch.group_ids).tolist() == [[1] * len(expected)]
    learned = model.processor([*messages, {"role": "assistant", "content": answer}], [picture], targets=True)
    kept = np.asarray(learned.loss_weights[0]) > 0
    assert np.asarray(learned.targets)[0][kept].tolist() == [*spm.encode(answer), 1]
    assert model.end_ids == (1,) and model.tokenizer.decode(spm.encode(answer)) == answer
    assert len(model.generate(messages, [picture], max_new_tokens=3).tokens) <= 3
    fewer = model.with_budget(4, reducer={"kind": "visionzip"})
    assert fewer.count_visual_tokens([(20, 30)]) == [4]
    assert np.isfinite(fewer.logits(fewer.processor(messages, [picture]))).all()


def test_a_tensor_without_a_rule_or_a_rule_without_a_tensor(folder):
    given = arrays()
    del given["params/llm/layers/post_ffw_norm/scale"]
    np.savez(folder / "pt_16.npz", **given, **{"params/img/extra": np.zeros(1)})
    with pytest.raises(CheckpointMismatch, match=r"(?s)img/extra.*post_ffw_norm|post_ffw_norm.*img/extra"):
        vlm_jax.from_pretrained(folder)


def test_tensors_that_tell_the_sizes_are_missing(folder):
    given = arrays()
    for name in ("img/embedding/kernel", "llm/layers/attn/q_einsum/w"):
        del given[f"params/{name}"]
    np.savez(folder / "pt_16.npz", **given)
    told = tried("lacks {img/embedding/kernel, llm/layers/attn/q_einsum/w}, which tell its sizes; download it again")
    with pytest.raises(PretrainedError, match=told):
        vlm_jax.from_pretrained(folder)
    np.savez(folder / "pt_16.npz", **arrays())
    vlm_jax.from_pretrained(folder)


def test_axes_of_another_model(folder):
    given = {**arrays(), "params/img/embedding/kernel": np.zeros((48, 16), np.float32)}
    np.savez(folder / "pt_16.npz", **given)
    with pytest.raises(PretrainedError, match=r"img/embedding/kernel: expected 4 axes, got the shape \(48, 16\)"):
        vlm_jax.from_pretrained(folder)


def test_an_npz_of_another_kind(folder):
    tower = {name: array for name, array in arrays().items() if "/img/" in name}
    np.savez(folder / "pt_16.npz", **{name.replace("img/", ""): array for name, array in tower.items()})
    told = tried(
        "{config.json}: no such file, and the names of {pt_16.npz} are not those of PaliGemma, the only .npz that "
        "needs none; write the release's settings to it, or pass config="
    )
    with pytest.raises(CheckpointFileError, match=told):
        vlm_jax.from_pretrained(folder)
    with pytest.raises(
        PretrainedError, match=r"proj.paligemma.paligemma: expected tensors named img/… and llm/embedder"
    ):
        vlm_jax.from_pretrained(folder, config=CONFIG)
    sizes = {"width": 16, "depth": 2, "mlp_dim": 24, "num_heads": 2, "patch_size": 4, "pool_type": "none", "scan": True}
    config = {"model_name": "vit", "num_classes": 32, "model": sizes}
    vlm_jax.from_pretrained(folder, config=config)
    (folder / "config.json").write_text(json.dumps(config))
    vlm_jax.from_pretrained(folder)


def test_a_config_of_transformers_beside_it(folder):
    config = {"model_type": "paligemma", "vision_config": {}, "text_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    told = tried(
        "{paligemma}: the config is one of transformers, but the tensors have names of big_vision; pass "
        "config=dict(model_name='{proj.paligemma.paligemma}')"
    )
    with pytest.raises(PretrainedError, match=told):
        vlm_jax.from_pretrained(folder)
    vlm_jax.from_pretrained(folder, config=CONFIG)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"image_size": 32}, r"image_size: expected 16, the side of 16 patches of 4 pixels .*, got 32"),
        (
            {"model": {"llm": {"variant": "gemma3_4b"}}},
            r"model.llm.variant: unknown 'gemma3_4b'; expected one of gemma_2b",
        ),
        ({"model": {"img": {"pool_type": "map"}}}, "model.img.pool_type: expected 'none', got 'map'"),
        ({"model": {"img": {"posemb": "sincos2d"}}}, "model.img.posemb: expected 'learn', got 'sincos2d'"),
        ({"model": {"llm_model": "proj.paligemma.t5"}}, "model.llm_model: expected 'proj.paligemma.gemma_bv'"),
        ({"model": {"llm": {"query_pre_attn_norm": "none"}}}, "query_pre_attn_norm: expected 'rsqrt_head_dim' or"),
        ({"model": {"llm": {"attn_logits_softcap": -1.0}}}, "attn_logits_softcap: expected a number from 0"),
        ({"model": {"llm": {"num_kv_heads": "2"}}}, "num_kv_heads: expected a whole number"),
    ],
)
def test_settings_that_do_not_fit(folder, given, told):
    with pytest.raises(PretrainedError, match=told):
        vlm_jax.from_pretrained(folder, config={**CONFIG, **given})


def test_the_variant_of_a_config_is_that_of_the_tensors(folder):
    with pytest.raises(CheckpointMismatch, match="q_einsum"):
        vlm_jax.from_pretrained(folder, config={**CONFIG, "model": {"llm": {"variant": "gemma2_2b"}}})


def test_softcaps_are_those_of_gemma_2_or_of_the_config(folder):
    decoder = vlm_jax.from_pretrained(folder).module.decoder
    assert (decoder.attention_softcap, decoder.logit_softcap, decoder.post_norm) == (50.0, 30.0, True)
    config = {**CONFIG, "model": {"llm": {"final_logits_softcap": 0.0}}}  # as after a transfer of big_vision
    decoder = vlm_jax.from_pretrained(folder, config=config).module.decoder
    assert (decoder.attention_softcap, decoder.logit_softcap) == (50.0, None)
    np.savez(folder / "pt_16.npz", **arrays(second=False))
    decoder = vlm_jax.from_pretrained(folder).module.decoder
    assert (decoder.attention_softcap, decoder.logit_softcap, decoder.post_norm) == (None, None, False)


def test_another_size_of_images_is_refused(folder):
    with pytest.raises(PretrainedError, match=r"image_size: .*does not support resizing at load"):
        vlm_jax.from_pretrained(folder, image_size=32)


def test_converted_to_orbax_and_back(folder, tmp_path_factory):
    from vlm_jax.pretrained.convert import open_conversion

    target = tmp_path_factory.mktemp("converted")
    open_conversion(folder, FAMILIES).write(target / "orbax")
    again = vlm_jax.from_pretrained(target / "orbax")
    model = vlm_jax.from_pretrained(folder)
    assert again.config == model.config
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    open_conversion(target / "orbax", FAMILIES).write(target / "back")
    written, read = (dict(np.load(path)) for path in (target / "back" / "model.npz", folder / "pt_16.npz"))
    assert written.keys() == read.keys()
    jax.tree.map(np.testing.assert_array_equal, written, read)
