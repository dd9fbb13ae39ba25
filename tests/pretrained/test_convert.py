"""A released folder as Orbax arrays and back: the same bits, the same answers, and every tensor's way."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy

import vlm_jax
from tests.golden.conftest import DATA
from vlm_jax.checkpoints import arrays, hub
from vlm_jax.checkpoints.hub import CheckpointFileError, open_checkpoint
from vlm_jax.checkpoints.orbax import CHECKPOINTS, RunCheckpoints
from vlm_jax.checkpoints.verification import CheckpointError
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.convert import Conversion, open_conversion
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.state import TrainState
from vlm_jax.types import Batch

from ..advice import tried
from ..processes.alphabet import CONFIG, LETTERS, write

# Stacks of layers and of experts, fused and permuted rows, tensors that nothing reads, towers of two kinds, archives.
FOLDERS = (
    "deepseek_vl2_ext",
    "internvl15_internlm2",
    "internvl2_qwen2",
    "llava16_anyres",
    "open_clip_rn",
    "ovis2_5_window",
    "ovis2_hf",
    "qwen_vl_v1",
    "vit_jax_token",
    "bv_vit_gap_sincos_scan",
)


def convert(source, target, **options):
    conversion = open_conversion(source, FAMILIES, **options)
    conversion.write(target)
    return conversion


def copied(name, folder):
    """A golden folder; LLaVA's tower has its config next to it."""
    shutil.copytree(DATA / name, folder)
    tower = folder / "vision_tower_config.json"
    if tower.exists():
        config = json.loads((folder / "config.json").read_text())
        config["vision_tower_config"] = json.loads(tower.read_text())
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@dataclasses.dataclass(frozen=True)
class Converted:
    """A golden folder, the Orbax arrays made of it, and their conversion."""

    released: pathlib.Path
    orbax: pathlib.Path
    conversion: Conversion

    @functools.cached_property
    def model(self):
        return vlm_jax.from_pretrained(self.released)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """A folder of tests/golden by its name, converted once; tests only read it."""

    @functools.cache
    def converted(name):
        folder = tmp_path_factory.mktemp(name)
        released = copied(name, folder / "released")
        return Converted(released, folder / "orbax", convert(released, folder / "orbax"))

    return converted


def bits(tensor):
    values = np.ascontiguousarray(tensor[...])
    return values.shape, values.dtype, values.tobytes()


@pytest.mark.parametrize("name", FOLDERS)
def test_there_and_back_bit_for_bit(name, golden, tmp_path):
    released, there = golden(name).released, golden(name).conversion
    back = convert(golden(name).orbax, tmp_path / "back")
    assert (there.direction, back.direction) == ("Hugging Face -> Orbax", "Orbax -> Hugging Face")
    before, after = open_checkpoint(released), open_checkpoint(tmp_path / "back")
    assert before.archive == after.archive
    assert before.keys() == after.keys()
    for key in before:
        assert bits(before[key]) == bits(after[key]), key
    for file in (tmp_path / "back").iterdir():  # the files next to the weights
        if file.name not in ("model.safetensors", "model.npz"):
            assert file.read_bytes() == (released / file.name).read_bytes(), file.name
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (released / file).exists() == (tmp_path / "back" / file).exists()


@pytest.mark.parametrize("name", ["deepseek_vl2_ext", "llava16_anyres", "ovis2_hf", "vit_jax_hybrid"])
def test_every_tensor_has_one_line_and_none_is_read(name, golden, tmp_path, monkeypatch):
    keys = list(open_checkpoint(golden(name).released))
    there = golden(name).conversion

    def read(self, index):
        raise AssertionError("a tensor is read")

    monkeypatch.setattr(hub.LazyTensor, "__getitem__", read)
    back = open_conversion(golden(name).orbax, FAMILIES)
    assert [way.split(" ")[0] for way in there.ways()] == keys
    assert [re.search(r"-> (\S+) \([\d, ]*\) \S+( \(\d of \d\))?$", way)[1] for way in back.ways()] == keys
    counted = re.fullmatch(r"(\d+) released tensors, (\d+) arrays of [\d,]+ parameters, (\d+) without .*", there.total)
    assert int(counted[1]) == len(keys) and there.total == back.total
    with pytest.raises(AssertionError, match="a tensor is read"):
        there.write(tmp_path / "out")
    assert not any((tmp_path).glob("*out*"))


def test_what_a_line_says():
    lines = list(open_conversion(DATA / "ovis2", FAMILIES, dtype="bfloat16").ways())
    assert (
        "llm.model.layers.1.mlp.up_proj.weight (80, 48) float32 -> Transpose(axes=(1, 0)) -> "
        "params/decoder/blocks/layers/mlp/up/kernel[1] (2, 48, 80) bfloat16 [layers, embed, mlp]"
    ) in lines
    ignored = [line for line in lines if "-> carried/" in line]
    assert len(ignored) == 1 and re.search(r" bfloat16 \(ignored: .+\)$", ignored[0]), ignored


def test_the_parameters_are_an_orbax_checkpoint_of_our_tree(golden):
    restored = ocp.StandardCheckpointer().restore(golden("internvl2_qwen2").orbax / "params")
    loaded = golden("internvl2_qwen2").model.params
    assert jax.tree.structure(restored) == jax.tree.structure(loaded)
    jax.tree.map(np.testing.assert_array_equal, restored, loaded)


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory):
    """A model that outputs the alphabet, released and as Orbax arrays."""
    folder = tmp_path_factory.mktemp("alphabet")
    (folder / "released").mkdir()
    write(folder / "released")
    return Converted(folder / "released", folder / "orbax", convert(folder / "released", folder / "orbax"))


def test_orbax_arrays_are_loaded_as_the_release_is(alphabet):
    mesh = make_mesh(MeshSettings(data=2, fsdp=2, tensor=2))
    released = alphabet.model
    ids = jnp.arange(4)[None]
    batch = Batch(ids, ids, jnp.ones_like(ids), jnp.full_like(ids, -1))
    asked = [{"role": "user", "content": "ab"}]
    logits, answer = released.logits(batch), released.generate(asked, max_new_tokens=30)
    assert answer.text == LETTERS[2:]
    for placed in (None, mesh):
        ours = vlm_jax.from_pretrained(alphabet.orbax, mesh=placed)
        np.testing.assert_array_equal(ours.logits(batch), logits)
        assert ours.generate(asked, max_new_tokens=30) == answer
        assert ours.config == released.config
    kernel = ours.params["decoder"]["head"]["kernel"]
    assert kernel.sharding.mesh.shape == mesh.shape and not kernel.sharding.is_fully_replicated


def test_a_layer_is_read_by_itself_and_once_for_all_devices(golden, monkeypatch):
    orbax = golden("internvl2_qwen2").orbax
    sizes = {}
    reader = arrays._reader

    def counted(stored, name, directory):
        read = reader(stored, name, directory)

        def block(index):
            values = read(index)
            sizes.setdefault(name, []).append(values.size)
            return values

        return block

    monkeypatch.setattr(arrays, "_reader", counted)
    loaded = vlm_jax.from_pretrained(orbax, mesh=make_mesh(MeshSettings(data=4, tensor=2)))
    kernel = loaded.params["decoder"]["blocks"]["layers"]["mlp"]["down"]["kernel"]
    layers, *_ = kernel.shape
    assert sizes["decoder.blocks.layers.mlp.down.kernel"] == [kernel[0].size] * layers


def test_what_was_loaded_from_orbax_is_written_back(golden, tmp_path):
    loaded = vlm_jax.from_pretrained(golden("ovis2").orbax)
    loaded.save_pretrained(tmp_path / "back")
    before, after = open_checkpoint(DATA / "ovis2"), open_checkpoint(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(bits(before[key]) == bits(after[key]) for key in before)
    assert not (tmp_path / "back" / hub.MAP_FILE).exists()
    assert (tmp_path / "back" / "tokenizer.json").exists()
    own = sorted(path.name for path in golden("ovis2").orbax.iterdir())
    with pytest.raises(CheckpointFileError, match=r"checkpoint_map\.json exists: write to another folder"):
        loaded.save_pretrained(golden("ovis2").orbax)
    assert sorted(path.name for path in golden("ovis2").orbax.iterdir()) == own


def test_a_cast(alphabet, tmp_path):
    before = open_checkpoint(alphabet.released)
    for source in (alphabet.released, alphabet.orbax):
        convert(source, tmp_path / f"{source.name}16", dtype="bfloat16")
    convert(tmp_path / "released16", tmp_path / "back")
    for folder in ("orbax16", "back"):
        after = open_checkpoint(tmp_path / folder)
        for key, tensor in before.items():
            assert after[key].dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(after[key][...], tensor[...].astype(ml_dtypes.bfloat16))


def test_dtypes_that_differ_from_layer_to_layer_come_back(tmp_path):
    released = tmp_path / "released"
    released.mkdir()
    write(released)
    tensors = {key: tensor[...] for key, tensor in open_checkpoint(released).items()}
    for layer, dtype in enumerate((np.float16, ml_dtypes.bfloat16)):
        for key in [key for key in tensors if ".layers.0." in key]:
            drawn = np.random.default_rng(layer).normal(size=tensors[key].shape).astype(dtype)
            tensors[key.replace(".0.", f".{layer}.")] = drawn
    tensors["model.rotary_emb.inv_freq"] = np.zeros((0, 3), np.float64)  # carried, and without elements
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.arange(3.0)
    safetensors.numpy.save_file(tensors, released / "model.safetensors")
    (released / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 2}))
    convert(released, tmp_path / "orbax")
    assert any("is empty" in way for way in open_conversion(tmp_path / "orbax", FAMILIES).ways())
    convert(tmp_path / "orbax", tmp_path / "back")
    after = open_checkpoint(tmp_path / "back")
    assert after.keys() == tensors.keys()
    assert all(bits(after[key]) == bits(tensor) for key, tensor in tensors.items())


def trained(folder, params):
    """A workdir with one checkpoint of a run, as the trainer saves it."""
    checkpoints = RunCheckpoints(folder / CHECKPOINTS, 1)
    checkpoints.save(3, TrainState(jnp.zeros((), jnp.int32), params, None), {"position": 0})
    checkpoints.close()
    return folder


@pytest.mark.parametrize("side", ["released", "orbax"])
def test_a_run_is_written_as_a_release(side, golden, tmp_path):
    released, loaded = golden("llava16_anyres").released, golden("llava16_anyres").model
    source = getattr(golden("llava16_anyres"), side)
    parts = {part: jax.tree.map(lambda x: x + 1, loaded.params[part]) for part in ("encoder", "connector", "decoder")}
    workdir = trained(tmp_path / "run", {**parts, "cell_head": {"kernel": jnp.ones(3)}})
    conversion = convert(source, tmp_path / "out", run=workdir)
    assert conversion.direction == "run -> Hugging Face"
    lines = [way for way in conversion.ways() if way.endswith(f": as in {source}")]
    kept = {line.split(" ")[0] for line in lines}
    before, after = open_checkpoint(released), open_checkpoint(tmp_path / "out")
    assert before.keys() == after.keys()
    assert "model.image_newline" in kept and len(kept) < len(before) // 2
    for key in before:
        np.testing.assert_array_equal(after[key][...], before[key][...] + (key not in kept), err_msg=key)
    again = vlm_jax.from_pretrained(tmp_path / "out").params
    jax.tree.map(np.testing.assert_array_equal, {part: again[part] for part in parts}, parts)


def test_a_run_of_another_model_is_refused(alphabet, tmp_path):
    with pytest.raises(CheckpointError, match=tried("no complete checkpoint in {}; train that run to its end first")):
        open_conversion(alphabet.released, FAMILIES, run=tmp_path / "none")
    params = alphabet.model.params
    assert open_conversion(alphabet.released, FAMILIES, run=trained(tmp_path / "none", params)).ways()
    other = {**params["decoder"], "head": {"kernel": jnp.ones((30, 31))}}
    workdir = trained(tmp_path / "run", {"decoder": other})
    message = r"of another model:\n  it has params/decoder/head/kernel \(30, 31\), expected \(30, 29\)$"
    with pytest.raises(CheckpointError, match=message):
        open_conversion(alphabet.released, FAMILIES, run=workdir)


def test_a_parameter_more_or_less_is_another_model(alphabet, tmp_path):
    decoder = alphabet.model.params["decoder"]
    more = trained(tmp_path / "more", {"decoder": {**decoder, "head": {**decoder["head"], "bias": jnp.ones(29)}}})
    with pytest.raises(CheckpointError, match=r"params/decoder/head/bias \(29,\), which the model does not have$"):
        open_conversion(alphabet.released, FAMILIES, run=more)
    less = trained(tmp_path / "less", {"decoder": {key: decoder[key] for key in decoder if key != "head"}})
    with pytest.raises(CheckpointError, match=r"it lacks params/decoder/head/kernel \(30, 29\)$"):
        open_conversion(alphabet.released, FAMILIES, run=less)
    seeing = trained(tmp_path / "seeing", {"decoder": decoder, "encoder": {"bias": jnp.ones(2)}})
    with pytest.raises(CheckpointError, match=r"it has params/encoder/bias \(2,\), which the model does not have$"):
        open_conversion(alphabet.released, FAMILIES, run=seeing)


@pytest.mark.parametrize("same", [True, False])
def test_a_head_beside_a_tied_table(same, tmp_path):
    released = tmp_path / "released"
    released.mkdir()
    write(released)
    tensors = {key: tensor[...] for key, tensor in open_checkpoint(DATA / "ovis2_hf").items()}
    config = json.loads((DATA / "ovis2_hf" / "config.json").read_text())
    (table,) = (key for key in tensors if key.endswith("embed_tokens.weight") and "language" in key)
    (head,) = {key for key in tensors if key.endswith("lm_head.weight")} or {"lm_head.weight"}
    tensors[head] = tensors[table] if same else tensors[table] + 1
    safetensors.numpy.save_file(tensors, released / "model.safetensors")
    (released / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    there = convert(released, tmp_path / "orbax")
    assert any("Shared(count=2)" in way for way in there.ways()) is same
    loaded = vlm_jax.from_pretrained(tmp_path / "orbax")
    assert ("head" in loaded.params["decoder"]) is not same
    convert(tmp_path / "orbax", tmp_path / "back")
    after = open_checkpoint(tmp_path / "back")
    assert all(bits(after[key]) == bits(tensor) for key, tensor in tensors.items())


def test_targets_and_sources_that_are_refused(alphabet, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "note").write_text("mine")
    for side in ("released", "orbax"):
        with pytest.raises(CheckpointFileError, match=tried("{} exists; pass another --target, or remove it")):
            convert(getattr(alphabet, side), tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["note"]
    convert(alphabet.orbax, tmp_path / "another")
    shutil.rmtree(tmp_path / "full")
    convert(alphabet.orbax, tmp_path / "full")
    assert open_checkpoint(tmp_path / "full").keys() == open_checkpoint(tmp_path / "another").keys()
    with pytest.raises(CheckpointFileError, match=r"no model\.safetensors, model\.safetensors\.index\.json or \.npz"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "config.json").write_text(json.dumps(CONFIG))
        open_conversion(tmp_path / "empty", FAMILIES)
    with pytest.raises(CheckpointFileError, match=tried("{}: released files are written to a local folder; pass one")):
        open_conversion(alphabet.orbax, FAMILIES).write("gs://bucket/out")
    convert(alphabet.released, tmp_path / "empty2")
    (tmp_path / "empty3").mkdir()
    convert(alphabet.orbax, tmp_path / "empty3")  # an empty folder is as good as none


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "params"), tried("{}: not a complete Orbax checkpoint; write it again")),
        (
            lambda folder: shutil.rmtree(folder / "params" / "d"),
            tried("{} in {} cannot be read ({}); write it again"),
        ),
        (lambda folder: (folder / hub.MAP_FILE).write_text("{}"), r"checkpoint_map\.json: was modified or damaged"),
        (lambda folder: (folder / hub.MAP_FILE).write_text("{"), r"checkpoint_map\.json: not JSON"),
        (lambda folder: renamed(folder, "model.norm.weight"), r"was modified or damaged: model\.norm\.weight"),
    ],
)
def test_a_damaged_folder_is_named(alphabet, tmp_path, damage, message):
    shutil.copytree(alphabet.orbax, tmp_path / "orbax")
    damage(tmp_path / "orbax")
    with pytest.raises(CheckpointFileError, match=message):
        convert(tmp_path / "orbax", tmp_path / "out")
    assert [file.name for file in tmp_path.iterdir()] == ["orbax"]
    shutil.rmtree(tmp_path / "orbax")
    convert(alphabet.released, tmp_path / "orbax")
    convert(tmp_path / "orbax", tmp_path / "out")
    assert open_checkpoint(tmp_path / "out").keys() == open_checkpoint(alphabet.released).keys()


def renamed(folder, key):
    path = folder / hub.MAP_FILE
    stored = json.loads(path.read_text())
    stored["tensors"][f"{key}s"] = stored["tensors"].pop(key)
    path.write_text(json.dumps(stored))


def test_what_fails_on_the_way_leaves_nothing(alphabet, tmp_path, monkeypatch):
    for side in ("released", "orbax"):
        conversion = open_conversion(getattr(alphabet, side), FAMILIES)
        monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
        full = tried("was removed ({}); free space, fix the permissions, or pass another --target")
        with pytest.raises(CheckpointFileError, match=full) as caught:
            conversion.write(tmp_path / "out")
        assert "no space left" in str(caught.value) and "bytes, 0 are free" in str(caught.value)
        assert not list(tmp_path.iterdir())
        monkeypatch.undo()
        conversion.write(tmp_path / "out")
        assert list((tmp_path / "out").iterdir())
        shutil.rmtree(tmp_path / "out")
