"""Processors of folders that transformers does not write: open_clip, big_vision, vision_transformer."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import vlm_jax
from tests.golden.conftest import DATA
from tests.processors.vocabularies import sentencepiece_model
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.processors.tokenizer import TokenizerError


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


def test_pictures_without_a_tokenizer(tmp_path, picture):
    """Released archives of big_vision have none: pictures are read, texts are refused by name."""
    ours = copied("bv_siglip", tmp_path)
    side = ours.module.image.image_size
    (found,) = ours.processor([picture]).images
    assert found.shape == (*side, 3)
    assert ours.encode_images([picture]).shape == (1, 32)
    with pytest.raises(TokenizerError, match=r"2 texts cannot be read: .*no tokenizer here"):
        ours.encode_texts(["a", "b"])
    model = sentencepiece_model(model_type="unigram", vocab_size=60, byte_fallback=False, pad_id=0, eos_id=1,
                                unk_id=2, bos_id=-1, remove_extra_whitespaces=True)  # fmt: skip
    (tmp_path / "spiece.model").write_bytes(model)
    again = vlm_jax.from_pretrained(tmp_path)
    tokens = np.asarray(again.processor(texts=["The dog!", "the dog"]).tokens)
    assert tokens.shape == (2, ours.module.text.context_length)
    np.testing.assert_array_equal(tokens[0], tokens[1])
    assert (tokens[:, -1] == 1).all()  # the end fills texts up
    assert again.logits(again.processor([picture], ["the dog"])).shape == (1, 1)


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
