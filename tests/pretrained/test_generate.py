"""`Pretrained.generate` with a model that outputs the alphabet: ends, options, devices, and error messages."""

import json
import re
import shutil

import numpy as np
import pytest

import vlm_jax
from vlm_jax.generation import engine
from vlm_jax.generation.sampling import GenerationError, Sampling
from vlm_jax.layers.mesh_axes import active_mesh
from vlm_jax.layers.per_layer import has_per_layer
from vlm_jax.models.vlm import VLM
from vlm_jax.processors.chat import ChatTemplateError
from vlm_jax.processors.tokenizer import TokenizerError
from vlm_jax.sharding.mesh import MeshSettings, make_mesh

from ..advice import tried
from ..processes.alphabet import CONFIG, LETTERS, write

ASKED = [{"role": "user", "content": "ab"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("alphabet")
    write(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return vlm_jax.from_pretrained(folder)


def test_an_answer_its_tokens_and_what_ended_it(model):
    told = []
    answer = model.generate(ASKED, max_new_tokens=40, on_text=told.append, chunk=4)
    assert answer.text == "".join(told) == LETTERS[2:]
    assert answer.tokens == tuple(range(2, 27)) and answer.reason == "end"
    assert len(told) > 5
    cut = model.generate(ASKED, max_new_tokens=40, stop=["hi", "gh"], chunk=4)
    assert (cut.text, cut.reason, cut.tokens[-1]) == ("cdef", "stop", LETTERS.index("h"))
    assert model.generate(ASKED, max_new_tokens=2).reason == "length"
    assert model.generate(ASKED, max_new_tokens=40, stop_tokens=["f"]).text == "cde"
    drawn = model.generate(ASKED, max_new_tokens=3, sampling=Sampling(temperature=0.01, seed=1))
    assert drawn.text == "cde"


def test_options_of_the_processor(tmp_path):
    write(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}{% if enable_thinking %}x{% endif %}")
    model = vlm_jax.from_pretrained(tmp_path)
    assert model.generate(ASKED, max_new_tokens=3).text == "cde"
    assert model.generate(ASKED, max_new_tokens=3, processor_options={"enable_thinking": True}).text == "yz"


@pytest.mark.parametrize(
    ("files", "config", "ids"),
    [
        ({"generation_config.json": {"eos_token_id": [26, 5]}}, {"eos_token_id": 3}, (26, 5)),
        ({"generation_config.json": {"eos_token_id": 4}}, {}, (4,)),
        ({"generation_config.json": {}}, {"eos_token_id": 3}, (3,)),
        ({}, {"text_config": {"eos_token_id": [7]}}, (7,)),
        ({"tokenizer_config.json": {"eos_token": "<end>"}}, {}, (26,)),
        ({"generation_config.json": {"eos_token_id": [26, 151645]}}, {}, (26, 151645)),
        ({"tokenizer_config.json": {"eos_token": "<end>"}}, {"eos_token_id": 151645}, (26,)),
        ({}, {}, ()),
    ],
)
def test_where_the_end_tokens_are_stated(tmp_path, files, config, ids):
    write(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert vlm_jax.from_pretrained(tmp_path, config={**CONFIG, **config}).end_ids == ids


def test_an_end_that_the_model_cannot_say_ends_nothing(tmp_path, model):
    write(tmp_path)
    stated = model.end_ids
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [*stated, 151645]}))
    assert vlm_jax.from_pretrained(tmp_path).generate(ASKED, max_new_tokens=30) == model.generate(
        ASKED, max_new_tokens=30
    )


def test_over_devices_as_on_one(folder, model):
    shared = vlm_jax.from_pretrained(folder, mesh=make_mesh(MeshSettings(data=4, tensor=2)))
    options = {"max_new_tokens": 30, "chunk": 7, "stop": ["xy"]}
    assert shared.generate(ASKED, **options) == model.generate(ASKED, **options)


def test_logits_over_devices_as_on_one(folder, model, monkeypatch):
    """One row, which the mesh does not divide; the mesh is set where the model is traced."""
    mesh, meshes, original = make_mesh(MeshSettings(data=4, tensor=2)), [], VLM.__call__

    def noted(*args, **kwargs):
        meshes.append(active_mesh())
        return original(*args, **kwargs)

    shared, batch = vlm_jax.from_pretrained(folder, mesh=mesh), model.processor(ASKED)
    expected = model.logits(batch)
    monkeypatch.setattr(VLM, "__call__", noted)
    np.testing.assert_allclose(shared.logits(batch), expected, rtol=1e-5, atol=1e-5)
    assert meshes == [mesh.abstract_mesh]


def test_a_mesh_that_shards_the_sequence_is_refused(folder, model):
    mesh = make_mesh(MeshSettings(data=4, context=2))
    shared, expected = vlm_jax.from_pretrained(folder, mesh=mesh), model.generate(ASKED, max_new_tokens=3)
    with pytest.raises(GenerationError, match="mesh: generation does not shard the sequence; expected context=1"):
        shared.generate(ASKED, max_new_tokens=3)
    # An evaluation in training goes on without the mesh.
    options = {"max_new_tokens": 3, "names": ["prompt"]}
    (answer,) = model.system.complete(shared.params, model.processor(ASKED), **options)
    assert answer == expected


def test_errors(folder, model, tmp_path):
    with pytest.raises(TokenizerError, match=r"no token '<ent>'; did you mean '<end>'\?"):
        model.generate(ASKED, max_new_tokens=3, stop_tokens=["<ent>"])
    with pytest.raises(GenerationError, match="prompt: a prompt of 2 tokens"):
        model.generate(ASKED, max_new_tokens=8, cache_length=8)
    write(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    lacks = tried(
        "no chat template here; looked for {}, {}/*.jinja. Put the release's template into chat_template.jinja"
    )
    with pytest.raises(ChatTemplateError, match=re.escape(str(tmp_path)) + ": " + lacks):
        vlm_jax.from_pretrained(tmp_path).generate(ASKED, max_new_tokens=3)
    shutil.copy(folder / "chat_template.jinja", tmp_path)
    expected = model.generate(ASKED, max_new_tokens=3)
    assert vlm_jax.from_pretrained(tmp_path).generate(ASKED, max_new_tokens=3).tokens == expected.tokens
    with pytest.raises(GenerationError, match=tried("{names}: is set by generate; remove it")):
        model.generate(ASKED, max_new_tokens=3, names=["a"])
    with pytest.raises(
        GenerationError,
        match=tried("{stop_tokens}: expected a list of strings, got the string {'<end>'}; pass [{'<end>'}]"),
    ):
        model.generate(ASKED, max_new_tokens=3, stop_tokens="<end>")
    assert model.generate(ASKED, max_new_tokens=3, stop_tokens=["<end>"]).text in expected.text


def test_layers_are_taken_apart_for_generation_once(folder, monkeypatch):
    model, copied, of_params = vlm_jax.from_pretrained(folder), [], engine.layers_apart

    def counted(params):
        copied.append(not has_per_layer(params))
        return of_params(params)

    monkeypatch.setattr(engine, "layers_apart", counted)
    for _ in range(2):
        model.generate(ASKED, max_new_tokens=2)
        assert copied.count(True) == 1
