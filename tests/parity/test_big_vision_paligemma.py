"""PaliGemma's `.npz` of big_vision compared with the model of transformers that it is made of."""

import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch

import vlm_jax
from vlm_jax.checkpoints.hub import open_checkpoint

from .big_vision import paligemma_arrays
from .processors import pictures
from .systems import paligemma

NEW = 32
OPTIONS = {"max_new_tokens": NEW, "chunk": 9}
QUESTION = "What is é this? 12"
# As big_vision's own: no window, the scale of queries by the width of a head, and the caps of Gemma 2.
GEMMA2 = {"model_type": "gemma2", "num_hidden_layers": 3, "sliding_window": 4096, "query_pre_attn_scalar": 12}
KINDS = {
    "gemma": {"num_key_value_heads": 1},
    "gemma_all_heads": {"num_key_value_heads": 4},
    "gemma2": {**GEMMA2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
}


def folder_of(system, folder, name="pali.npz", **options):
    """An `.npz` beside the files of a processor."""
    _, model, ours = system
    for path in ours.folder.iterdir():
        if path.name not in ("config.json", "generation_config.json") and path.suffix != ".safetensors":
            shutil.copy(path, folder / path.name)
    np.savez(folder / name, **paligemma_arrays(model, **options))
    return folder / name


@pytest.fixture(scope="module", params=KINDS)
def system(request, tmp_path_factory):
    return paligemma(tmp_path_factory.mktemp(request.param), **KINDS[request.param])


@pytest.fixture(scope="module")
def ours(system, tmp_path_factory):
    return vlm_jax.from_pretrained(folder_of(system, tmp_path_factory.mktemp("npz")))


def asked(text, count):
    return [{"role": "user", "content": [*[{"type": "image"}] * count, {"type": "text", "text": text}]}]


def official(system, images):
    given = system[0](images=[images], text=["<image>" * len(images) + QUESTION], return_tensors="np")
    del given["labels"]
    return {name: torch.from_numpy(np.asarray(value)) for name, value in given.items()}


def close(found, expected):
    return np.abs(np.asarray(found) - expected).max() <= 1e-4 * np.abs(expected).max()


def logits_of(model, given):
    with torch.no_grad():
        return model(**given).logits.numpy()


@pytest.mark.parametrize("count", [1, 2])
def test_from_a_question_to_the_answer(system, ours, count):
    processor, model, _ = system
    given, batch = official(system, pictures(count)), ours.processor(asked(QUESTION, count), pictures(count))
    image = given["input_ids"].numpy() == processor.image_token_id
    np.testing.assert_array_equal(np.where(image, 0, batch.tokens), np.where(image, 0, given["input_ids"]))
    assert set(np.asarray(batch.tokens)[image]) == {ours.processor.pad_id}
    np.testing.assert_allclose(batch.images[0], given["pixel_values"].numpy().transpose(0, 2, 3, 1), atol=1e-5)
    found = ours.logits(batch)
    assert found.dtype == np.float32 and close(found, logits_of(model, given))
    ends = {"eos_token_id": processor.tokenizer.eos_token_id, "pad_token_id": processor.tokenizer.pad_token_id}
    said = model.generate(**given, max_new_tokens=NEW, do_sample=False, **ends)[0, given["input_ids"].shape[1] :]
    assert list(ours.generate(asked(QUESTION, count), pictures(count), **OPTIONS).tokens) == said.tolist()


def test_the_way_back(ours, tmp_path):
    """The same names and bits, and a config with what the tensors told."""
    ours.save_pretrained(tmp_path / "out")
    written, read = (dict(np.load(path)) for path in (tmp_path / "out" / "model.npz", ours.checkpoint.origin))
    assert written.keys() == read.keys()
    jax.tree.map(np.testing.assert_array_equal, written, read)
    again = vlm_jax.from_pretrained(tmp_path / "out")
    assert again.config == ours.config and again.module == ours.module
    batches = [one.processor(asked(QUESTION, 1), pictures(1)) for one in (ours, again)]
    np.testing.assert_array_equal(ours.logits(batches[0]), again.logits(batches[1]))


def test_parameters_are_those_of_the_folder_of_transformers(system, ours):
    """Bit for bit, so that loss, gradients and training are those of `test_training`."""
    jax.tree.map(np.testing.assert_array_equal, ours.params, system[2].params)


def test_blocks_in_arrays_of_their_own(system, ours, tmp_path):
    """And without `params/`, as in older files."""
    path = folder_of(system, tmp_path, stacked=False, prefix="")
    other = vlm_jax.from_pretrained(path)
    jax.tree.map(np.testing.assert_array_equal, other.params, ours.params)
    other.save_pretrained(tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").keys() == open_checkpoint(path).keys()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(system, ours, tmp_path, dtype):
    """bfloat16 is two raw bytes in NumPy's format."""
    arrays = {name: array.astype(dtype) for name, array in paligemma_arrays(system[1]).items()}
    np.savez(tmp_path / "pali.npz", **arrays)
    if dtype is ml_dtypes.bfloat16:
        assert np.load(tmp_path / "pali.npz")["params/img/head/bias"].dtype == np.dtype("V2")
    half = vlm_jax.from_pretrained(tmp_path / "pali.npz")
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, np.asarray(y).astype(dtype)), half.params, ours.params)
    stored = vlm_jax.from_pretrained(tmp_path / "pali.npz", dtype=np.dtype(dtype).name)
    assert {leaf.dtype for leaf in jax.tree.leaves(stored.params)} == {jnp.dtype(dtype)}
    stored.save_pretrained(tmp_path / "out")
    assert {tensor.dtype for tensor in open_checkpoint(tmp_path / "out").values()} == {np.dtype(dtype)}


def test_what_tensors_do_not_tell_is_in_the_config(tmp_path_factory):
    """Other caps, and the scale of queries by the width of the residual, as in Gemma 2 27B."""
    caps = {"attn_logit_softcapping": 0.3, "final_logit_softcapping": 8.0}
    made = paligemma(tmp_path_factory.mktemp("hf"), **{**GEMMA2, "query_pre_attn_scalar": 8, **caps})
    path = folder_of(made, tmp_path_factory.mktemp("npz"))
    given = official(made, pictures(1))
    expected = logits_of(made[1], given)
    model = {"llm": {"attn_logits_softcap": 0.3, "final_logits_softcap": 8.0}}
    model["llm"]["query_pre_attn_norm"] = "rsqrt_emb_per_head"
    stated = vlm_jax.from_pretrained(path, config={"model_name": "proj.paligemma.paligemma", "model": model})
    batch = stated.processor(asked(QUESTION, 1), pictures(1))
    assert close(stated.logits(batch), expected)
    assert not close(vlm_jax.from_pretrained(path).logits(batch), expected)


def test_images_as_in_big_vision(system, tmp_path):
    """Without files of an image processor: resized with antialiasing, and truncated."""
    path = folder_of(system, tmp_path)
    (tmp_path / "preprocessor_config.json").unlink(missing_ok=True)
    (tmp_path / "processor_config.json").unlink(missing_ok=True)
    found = vlm_jax.from_pretrained(path).processor(asked(QUESTION, 2), pictures(2)).images[0]
    for picture, ours in zip(pictures(2), found, strict=True):
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
        resized = torch.nn.functional.interpolate(pixels, (24, 24), mode="bilinear", antialias=True)[0]
        expected = np.trunc(resized.numpy()).transpose(1, 2, 0) / 127.5 - 1
        difference = np.abs(ours - expected)
        assert difference.max() <= 1 / 127.5 + 1e-6 and (difference < 1e-5).mean() > 0.99  # sums that are whole numbers
