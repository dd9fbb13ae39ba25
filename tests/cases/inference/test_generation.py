"""Generation settings of a folder, and what a saved folder says of itself."""

import json
import warnings

import jax
import jaxtyping
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import vlm_jax
from vlm_jax.checkpoints.release import with_dtype
from vlm_jax.generation.released import ARGUMENTS, FOLLOWED, NOT_FOLLOWED, SAMPLED, greedy_sampling
from vlm_jax.generation.sampling import GenerationError, Sampling, row_values
from vlm_jax.processors.chat import ChatTemplateError
from vlm_jax.processors.tokenizer import TokenizerError

from .folders import alphabet_folder, edit

ASKED = [{"role": "user", "content": "ab"}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return vlm_jax.from_pretrained(alphabet_folder(tmp_path_factory.mktemp("alphabet")))


def settle(path, **settings):
    for key, value in settings.items():
        edit(path, "generation_config.json", (key,), value)
    return vlm_jax.from_pretrained(path)


def test_15_the_repetition_penalty_of_a_folder(tmp_path):
    """The most likely token after `ab` is c, with a logit of 1; of a penalised one it is 1/2, and of all others 0."""
    path = alphabet_folder(tmp_path)
    again = [{"role": "user", "content": "cab"}]
    assert vlm_jax.from_pretrained(path).generate(again, max_new_tokens=1).text == "c"
    model = settle(path, repetition_penalty=2.0)
    assert model.system.sampling == Sampling(repetition_penalty=2.0)
    own = model.generate(again, max_new_tokens=8)
    given = model.generate(again, max_new_tokens=8, sampling=Sampling(repetition_penalty=2.0))
    assert own.tokens == given.tokens


def test_15_the_ngrams_of_a_folder(tmp_path):
    """The most likely token after `b` is c, which would repeat `bc`."""
    path = alphabet_folder(tmp_path)
    again = [{"role": "user", "content": "bcab"}]
    assert vlm_jax.from_pretrained(path).generate(again, max_new_tokens=1).text == "c"
    model = settle(path, no_repeat_ngram_size=2)
    assert model.system.sampling == Sampling(no_repeat_ngram=2)
    own = model.generate(again, max_new_tokens=8)
    assert own.text[:1] != "c"
    allowed = Sampling(no_repeat_ngram=2, no_repeat_except=(model.tokenizer.id_of("c"),))
    assert model.generate(again, max_new_tokens=1, sampling=allowed).text == "c"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"no_repeat_except": (3,)}, r"no_repeat_except: expected \(\) without no_repeat_ngram, got \(3,\)"),
        ({"no_repeat_ngram": 2, "no_repeat_except": (-1,)}, "no_repeat_except: expected ids of 0 to"),
        ({"no_repeat_ngram": 2, "no_repeat_except": [3]}, r"no_repeat_except: expected a tuple of ids, got \[3\]"),
        ({"no_repeat_ngram": 2, "no_repeat_except": ("a",)}, "no_repeat_except: expected a tuple of ids"),
    ],
)
def test_15_ids_that_may_repeat_an_ngram(monkeypatch, settings, told):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users
    with pytest.raises(GenerationError, match=told):
        Sampling(**settings)


def test_15_rows_have_equally_many_ids_that_may_repeat():
    rows = [Sampling(no_repeat_ngram=2, no_repeat_except=ids) for ids in ((3,), (3, 4))]
    with pytest.raises(GenerationError, match="expected equally many ids in no_repeat_except of every row, got 1, 2"):
        row_values(rows, 2)


def test_15_greedy_answers_of_a_release_that_samples_are_told_once(tmp_path):
    model = settle(alphabet_folder(tmp_path), do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.05)
    told = r"greedy by default, pass sampling=Sampling\(temperature=0.7, top_k=50, top_p=0.8, repetition_penalty=1.05\)"
    with pytest.warns(UserWarning, match=told):
        assert model.generate(ASKED, max_new_tokens=2).text == "cd"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.generate(ASKED, max_new_tokens=2).text == "cd"
    Sampling(temperature=0.7, top_k=50, top_p=0.8, repetition_penalty=1.05)


@pytest.mark.parametrize("key", NOT_FOLLOWED)
def test_15_every_setting_that_is_not_followed_is_told(tmp_path, key):
    (tmp_path / "generation_config.json").write_text(json.dumps({key: 3}))
    with pytest.warns(UserWarning, match=rf"generation_config\.json: {key}=3 is not followed"):
        greedy_sampling(tmp_path)
    for number, neutral in enumerate(NOT_FOLLOWED[key]):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "generation_config.json").write_text(json.dumps({key: neutral}))
        assert greedy_sampling(folder) == Sampling()


def test_15_settings_are_of_one_kind():
    kinds = [*FOLLOWED, *ARGUMENTS, *SAMPLED, *NOT_FOLLOWED]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize("wrong", ["1.05", True, 0, -1.0, [1.05], float("nan")])
def test_15_a_penalty_of_another_type(tmp_path, wrong):
    model = settle(alphabet_folder(tmp_path), repetition_penalty=wrong)
    with pytest.raises(ValueError, match=r"generation_config\.json: repetition_penalty: expected a number above 0"):
        model.generate(ASKED, max_new_tokens=1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        *(({"max_new_tokens": wrong}, "max_new_tokens: expected") for wrong in (True, 0, 10**30)),
        *(({"chunk": wrong}, "chunk: expected") for wrong in (True, 0)),
        ({"stop": "a"}, "stop: expected a list of strings"),
        ({"stop": ["a", 3]}, r"stop: expected a list of strings, got \['a', 3\]"),
        ({"stop_tokens": "a"}, r"stop_tokens: expected a list of strings, got the string 'a'; pass \['a'\]"),
        ({"stop_tokens": 3}, "stop_tokens: expected a list of strings, got 3"),
        ({"stop_tokens": [3]}, r"stop_tokens: expected a list of strings, got \[3\]"),
        ({"sampling": {"temperature": 1.0}}, r"sampling: expected Sampling\(…\), got {'temperature': 1.0}"),
        ({"on_text": "print"}, "on_text: expected a function, got 'print'"),
        ({"processor_options": 3}, "processor_options: expected a dict, got 3"),
        ({"mesh": None}, "mesh: is set by generate"),
        ({"names": ("a",)}, "names: is set by generate"),
    ],
)
def test_15_arguments_of_other_types(monkeypatch, model, options, told):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users
    with pytest.raises(GenerationError, match=told):
        model.generate(ASKED, **{"max_new_tokens": 1, **options})


def test_03_half_of_a_character_is_told(model):
    with pytest.raises(TokenizerError, match="half of a character"):
        model.processor([{"role": "user", "content": "a\ud800"}])


def test_24_functions_as_tools_are_refused(tmp_path):
    path = alphabet_folder(tmp_path)
    source = "{% if tools %}{{ tools | tojson }}{% endif %}{{ messages[0].content }}"
    (path / "chat_template.jinja").write_text(source)
    model = vlm_jax.from_pretrained(path)
    with pytest.raises(ChatTemplateError, match=r"tools\[0\]: expected text, .*; pass its JSON schema"):
        model.processor(ASKED, tools=[test_24_functions_as_tools_are_refused])


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("section", [(), ("text_config",)])
def test_27_a_saved_folder_states_the_dtype_of_its_tensors(tmp_path, key, section):
    """A bfloat16 release that is trained in float32: transformers would else round what was trained."""
    path = alphabet_folder(tmp_path / "released")
    file = path / "model.safetensors"
    tensors = {name: value.astype(ml_dtypes.bfloat16) for name, value in safetensors.numpy.load_file(file).items()}
    safetensors.numpy.save_file(tensors, file)
    edit(path, "config.json", (*section, key), "bfloat16")
    model = vlm_jax.from_pretrained(path, dtype="float32")
    model.save_pretrained(tmp_path / "out", params=jax.tree.map(lambda leaf: leaf * 1.0001, model.params))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for name in section:
        config = config[name]
    assert config[key] == "float32"
    saved = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in saved.values()} == {"float32"}


def test_27_the_widest_dtype_is_stated():
    kept = {"dtype": "bfloat16", "vision_config": {"dtype": "bfloat16"}, "other": {"dtype": 3}}
    dtypes = {np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.int64)}
    found = with_dtype(kept, dtypes)
    assert found == {"dtype": "float32", "vision_config": {"dtype": "float32"}, "other": {"dtype": 3}}
    assert with_dtype(kept, {np.dtype(np.int64)}) is kept
