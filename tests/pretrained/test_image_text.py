"""Processors of folders that transformers does not write: open_clip, big_vision, vision_transformer."""

import json
import shutil

import numpy as np
import pytest
import sentencepiece
from PIL import Image

import vlm_jax
from tests.golden.conftest import DATA
from tests.processors.vocabularies import sentencepiece_model
from vlm_jax.checkpoints.hub import CheckpointFileError
from vlm_jax.layers.mesh_axes import active_mesh
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.processors.tokenizer import TokenizerError
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.system import UnsupportedError

from ..advice import tried

OTHER_TOKENIZER = tried("expected {} tokens, as the text tower, got {}; use the tokenizer of its training: c4_en")


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 32, 3), np.uint8))


def copied(name, folder, **changes):
    """A golden folder, with other entries of its config."""
    shutil.copytree(DATA / name, folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return vlm_jax.from_pretrained(folder)


def test_open_clip_by_its_own_settings(tmp_path, picture):
    settings = {"mean": 0.5, "std": 0.25, "interpolation": "bilinear"}
    scale = 1 / 255
    wide = {}
    for mode in ("shortest", "squash", "longest"):
        cfg = {**settings, "resize_mode": mode, "fill_color": 10}
        wide[mode] = copied("open_clip_vit", tmp_path / mode, preprocess_cfg=cfg).processor([picture]).images[0]
        wide[mode] = (wide[mode] * 0.25 + 0.5) / scale
    np.testing.assert_allclose(wide["shortest"], np.asarray(picture)[8:40], atol=1e-3)
    squashed = picture.resize((32, 32), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(wide["squash"], np.asarray(squashed), atol=1e-3)
    small = np.asarray(picture.resize((21, 32), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(wide["longest"][:, 5:26], small, atol=1e-3)
    np.testing.assert_allclose(wide["longest"][:, [0, 4, 26, 31]], 10, atol=1e-3)
    with pytest.raises(PretrainedError, match="resize_mode"):
        _ = copied("open_clip_vit", tmp_path / "bad", preprocess_cfg={"resize_mode": "diagonal"}).processor


@pytest.mark.parametrize(
    ("name", "resample"), [("random", Image.Resampling.BICUBIC), ("bilinear", Image.Resampling.BILINEAR)]
)
def test_filters_of_open_clip(tmp_path, picture, name, resample):
    """A random filter is for training; open_clip then evaluates with a bicubic one."""
    cfg = {"mean": 0, "std": 1, "interpolation": name, "resize_mode": "squash", "size": [32], "mode": "RGB"}
    found = copied("open_clip_vit", tmp_path, preprocess_cfg=cfg).processor([picture]).images[0]
    np.testing.assert_allclose(found * 255, np.asarray(picture.resize((32, 32), resample)), atol=1e-3)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"interpolation": "lanczos"}, "interpolation: expected 'bicubic' or 'bilinear' or 'random', got 'lanczos'"),
        ({"size": 48}, r"have images of \(48, 48\) pixels, but the model needs \(32, 32\)"),
        ({"size": [32, 48]}, r"images of \(32, 48\) pixels"),
        ({"size": [3, 32, 32]}, "preprocess_cfg.size: expected a whole number"),
        ({"mean": [0.5, 0.5]}, "preprocess_cfg.mean: expected a number"),
        ({"mode": "L"}, "mode: expected 'RGB'"),
        ({"crop_pct": 0.9}, "preprocess_cfg: crop_pct: not supported"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_settings_of_open_clip_that_are_refused(tmp_path, setting, message):
    with pytest.raises((PretrainedError, CheckpointFileError), match=message):
        _ = copied("open_clip_vit", tmp_path, preprocess_cfg=setting).processor


def filled_up(size, **settings):
    """A SentencePiece model of exactly so many pieces."""
    few = {"vocab_size": size, "byte_fallback": False, "pad_id": 0, "eos_id": 1, **settings}
    found = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(**few)).get_piece_size()
    spare = [f"<unused{number}>" for number in range(size - found)]
    return sentencepiece_model(**few, user_defined_symbols=spare)


def siglip_model(size):
    """As in c4_en and mc4: no start token, padding and an end token."""
    return filled_up(size, model_type="unigram", unk_id=2, bos_id=-1, remove_extra_whitespaces=True)


def gemma_model(size):
    """As Gemma's: other names, a start, spaces as they are and none before a text."""
    names = {"eos_piece": "<eos>", "bos_piece": "<bos>", "add_dummy_prefix": False}
    return filled_up(size, bos_id=2, unk_id=3, **names)


def test_pictures_without_a_tokenizer(tmp_path, picture):
    """Released archives of big_vision have none: images are read, texts are rejected by name."""
    ours = copied("bv_siglip", tmp_path)
    side = ours.module.image.image_size
    (found,) = ours.processor([picture]).images
    assert found.shape == (*side, 3)
    assert ours.encode_images([picture]).shape == (1, 32)
    with pytest.raises(TokenizerError, match=r"2 texts cannot be encoded: .*no tokenizer here"):
        ours.encode_texts(["a", "b"])
    (tmp_path / "spiece.model").write_bytes(siglip_model(60))
    again = vlm_jax.from_pretrained(tmp_path)
    assert again.logits(again.processor([picture], ["the dog", "a fox"])).shape == (1, 2)
    with pytest.raises(PretrainedError, match=tried("need images and texts; pass the processor both")):
        again.logits(again.processor([picture]))
    told = tried("a {TwoTower} has no conversations; call processor(images=…, texts=…) and logits, encode_images or")
    with pytest.raises(UnsupportedError, match=told):
        again.generate([{"role": "user", "content": "a"}], max_new_tokens=2)
    assert again.encode_images([picture]).shape == (1, 32) == again.encode_texts(["a fox"]).shape


@pytest.mark.parametrize(
    ("release", "made", "cleaned", "pad", "file"),
    [
        ("bv_siglip", siglip_model, "the dog by the fox s dog", 1, "spiece.model"),
        ("bv_siglip", siglip_model, "the dog by the fox s dog", 1, "tokenizer.model"),
        ("bv_siglip2", gemma_model, "the dog,  by the fox! 's dog", 0, "tokenizer.model"),
    ],
)
def test_texts_of_big_vision(tmp_path, release, made, cleaned, pad, file):
    """Compared with SentencePiece itself, as the demos of both releases tokenize, whatever the file is called."""
    rows = json.loads((DATA / release / "config.json").read_text())["model"]["text"]["vocab_size"]
    model = made(rows)
    ours = copied(release, tmp_path)
    (tmp_path / file).write_bytes(model)
    spelt = sentencepiece.SentencePieceProcessor(model_proto=model)
    length = ours.module.text.context_length
    texts = {"The DOG,  by the fox! 's dog": cleaned, "Dog": "dog", "": ""}
    expected = [spelt.encode(text) for text in texts.values()]
    assert len(expected[0]) >= length  # cut, and its end stays
    expected = [[*ids[: length - 1], 1, *[pad] * (length - 1 - len(ids))] for ids in expected]
    np.testing.assert_array_equal(ours.processor(texts=list(texts)).tokens, expected)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda rows: sentencepiece_model(vocab_size=rows, byte_fallback=False), r"expected .*SigLIP .*at \(None, 2\)"),
        (lambda rows: siglip_model(rows - 10), OTHER_TOKENIZER),
        (lambda rows: gemma_model(rows + 101), OTHER_TOKENIZER),
    ],
)
def test_tokenizers_of_other_models_are_refused_for_texts_alone(tmp_path, picture, model, message):
    ours = copied("bv_siglip", tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(model(60))
    assert len(ours.processor([picture]).images) == 1
    with pytest.raises(TokenizerError, match=f"1 texts cannot be encoded: .*{message}"):
        ours.processor(texts=["the dog"])
    (tmp_path / "tokenizer.model").write_bytes(siglip_model(60))  # the tokenizer of its training
    assert vlm_jax.from_pretrained(tmp_path).processor(texts=["the dog"]).tokens.shape[0] == 1


def test_classifiers_of_vision_transformer_and_big_vision(tmp_path, picture):
    plain = copied("vit_jax_token", tmp_path / "vit")
    batch = plain.processor([picture])
    assert plain.logits(batch).shape == (1, 7)
    with pytest.raises(PretrainedError, match="id2label"):
        _ = plain.labels
    names = [f"class {number}" for number in range(7)]
    named = copied("vit_jax_token", tmp_path / "named", id2label=dict(enumerate(names)))
    assert named.labels == tuple(names)
    ours = copied("bv_vit_map_learn", tmp_path / "bv")
    assert ours.logits(ours.processor([picture])).shape == (1, 9)


def test_a_tower_without_a_table_is_told_the_size_of_pictures(tmp_path, picture):
    """At load or by the config, which is written; others say what is missing."""
    with pytest.raises(
        PretrainedError, match=tried("pass image_size in pixels to from_pretrained, or add it to config.json")
    ):
        _ = vlm_jax.from_pretrained(DATA / "bv_vit_gap_sincos_scan").processor
    asked = vlm_jax.from_pretrained(DATA / "bv_vit_gap_sincos_scan", image_size=24)
    found = asked.processor([picture]).images
    assert found.shape == (1, 24, 24, 3)
    asked.save_pretrained(tmp_path / "saved")
    told = copied("bv_vit_gap_sincos_scan", tmp_path / "told", image_size=24)
    for again in (vlm_jax.from_pretrained(tmp_path / "saved"), told):
        np.testing.assert_array_equal(again.processor([picture]).images, found)


def test_open_clip_at_a_size_asked_for_at_load(tmp_path, picture):
    copied("open_clip_vit", tmp_path / "released", preprocess_cfg={"size": [32, 32]})
    asked = vlm_jax.from_pretrained(tmp_path / "released", image_size=48)
    assert asked.processor([picture]).images.shape == (1, 48, 48, 3)
    asked.save_pretrained(tmp_path / "saved")
    assert vlm_jax.from_pretrained(tmp_path / "saved").processor([picture]).images.shape == (1, 48, 48, 3)


def test_towers_over_devices_as_on_one(picture, monkeypatch):
    """Three pictures, which the mesh does not divide; it is set where the tower is traced."""
    mesh, meshes, original = make_mesh(MeshSettings(data=4, tensor=2)), [], TwoTower.encode_image

    def noted(*args, **kwargs):
        meshes.append(active_mesh())
        return original(*args, **kwargs)

    pictures = [picture, picture.transpose(Image.Transpose.ROTATE_90), picture.transpose(Image.Transpose.ROTATE_180)]
    expected = vlm_jax.from_pretrained(DATA / "open_clip_vit").encode_images(pictures)
    monkeypatch.setattr(TwoTower, "encode_image", noted)
    found = vlm_jax.from_pretrained(DATA / "open_clip_vit", mesh=mesh).encode_images(pictures)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert meshes == [mesh.abstract_mesh]
