"""Adapters compared with peft: folders in both directions, merged weights, and steps of AdamW."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import safetensors.numpy
import torch
from flax import linen as nn
from peft.utils import transformers_weight_conversion

import vlm_jax
from vlm_jax.adapter import LORA, LoraSettings, adapted, merged
from vlm_jax.checkpoints.hub import CheckpointFileError
from vlm_jax.checkpoints.peft import CONFIG, WEIGHTS, save_adapter
from vlm_jax.leaves import flatten
from vlm_jax.optim.adamw import OptimizerSettings, adamw
from vlm_jax.pretrained.module_names import MODULE_NAMES
from vlm_jax.train.objectives.next_token import NextToken
from vlm_jax.train.state import TrainState
from vlm_jax.train.step import train_step
from vlm_jax.types import Batch

from ..advice import tried
from ..parameters import drawn
from .language import check, made, their_logits
from .systems import deepseek_ocr2, gemma3, gemma4, llava, paligemma, qwen2_5_omni_thinker, qwen2_5_vl, qwen3_5
from .test_training import case_of, inputs_of

SYSTEMS = (qwen2_5_vl, qwen2_5_omni_thinker, qwen3_5, llava, gemma3, gemma4, paligemma, deepseek_ocr2)
SETTINGS = LoraSettings(rank=3, alpha=2.0, target=("encoder/blocks", "connector", "decoder"))
WITHIN = ("encoder/blocks/*/mlp", "connector", "decoder/*/down")
# Of a system, what is one module of attention or Gated DeltaNet; of others all of attention is.
SINGLE = {
    "qwen3_5": tuple(f"decoder/*/attention/{name}" for name in ("key", "value", "out"))
    + tuple(f"decoder/*/delta/{name}" for name in ("gate", "rate", "decay", "out"))
}
# Modules that are several of our kernels, with their ranks.
FUSED = {
    "qwen2_5_vl": {("attn.qkv", 9)},
    "qwen3_5": {("attn.qkv", 9), ("linear_attn.in_proj_qkv", 9), ("self_attn.q_proj", 6)},
}
NO_PROJECTION = ("gemma3",)  # which is a parameter of its own there, and no module that peft adapts
# peft 0.21 renames `language_model.layers` of these once more as it reads a folder, so that it misses its own keys too.
RENAMED_TWICE = ("deepseek_ocr2",)
# AdamW turns a gradient of 1e-7, which is rounding, into a whole step unless epsilon is far above it. This epsilon is,
# and it is a tenth of the root mean square of a clipped gradient here (1e-2), so that factors still take large steps.
STEPS, RATE, EPSILON = 4, 1e-2, 1e-3
# peft 0.21 asks transformers 5.24 by a name that it will remove.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@dataclasses.dataclass(frozen=True)
class Adapted:
    """A system with adapters on all of its linear layers but the head and patches."""

    kind: str
    case: object
    given: dict  # the reference's inputs

    @property
    def experiment(self):
        return self.case.experiment

    @property
    def settings(self):
        """Of all linear layers."""
        return self.without(SETTINGS)

    @property
    def plain(self):
        """Of layers that are one module there, whose factors are ours."""
        target = (*WITHIN, *SINGLE.get(self.kind, ("decoder/*/attention",)))
        return self.without(LoraSettings(rank=3, alpha=2.0, target=target))

    def without(self, settings):
        """Without what peft cannot adapt."""
        no = ("connector",) if self.kind in NO_PROJECTION else ()
        return dataclasses.replace(settings, target=tuple(part for part in settings.target if part not in no))

    def params(self, settings, *, start=False):
        """The release's parameters with random adapters; `b` is zero at the start."""
        experiment = dataclasses.replace(self.experiment, lora=settings)
        boxed = experiment.boxed_shapes()
        lora = nn.meta.unbox(drawn({LORA: boxed[LORA]}, 3))
        if start:
            lora = jax.tree_util.tree_map_with_path(lambda path, x: 0 * x if path[-1].key == "lora_b" else x, lora)
        return experiment.system.initial(jax.random.key(0)) | lora

    def logits(self, params):
        """Of the places that are not padding."""
        model, batch = self.experiment.system.model, self.case.batch
        found = jax.jit(lambda params, batch: model.apply({"params": params}, batch))(params, batch)
        return np.asarray(found)[np.asarray(batch.segment_ids) > 0]

    def theirs(self, model):
        with torch.no_grad():
            found = model(**{key: value for key, value in self.given.items() if key != "labels"}).logits
        return found.numpy()[self.given["attention_mask"].numpy() > 0]

    def save(self, folder, params, settings):
        release, names = self.experiment.system.release, MODULE_NAMES.get(self.kind, ())
        shapes = nn.meta.unbox(self.experiment.boxed_shapes())
        adapters = {path: np.asarray(leaf) for path, leaf in flatten(params[LORA])}
        sizes = {path: leaf.shape for path, leaf in flatten(shapes)}
        save_adapter(folder, adapters, settings, release.rules, sizes, names, str(release.folder))
        return folder


@pytest.fixture(scope="module", params=SYSTEMS, ids=lambda made: made.__name__)
def system(request, tmp_path_factory):
    case = case_of(request.param, tmp_path_factory.mktemp("release"))
    return Adapted(request.param.__name__, case, inputs_of(case))


def of(*systems):
    """A test of these alone."""
    return pytest.mark.parametrize("system", systems, indirect=True, ids=lambda made: made.__name__)


def close(got, want, limit=1e-4):
    np.testing.assert_allclose(got, want, atol=limit * np.abs(want).max(), rtol=0)


def read_by_peft(system, folder, monkeypatch, **options):
    """The system's model with the adapter of a folder."""
    if system.kind in RENAMED_TWICE:
        name = "convert_peft_adapter_state_dict_for_transformers"
        monkeypatch.setattr(transformers_weight_conversion, name, lambda adapter_state_dict, **_: adapter_state_dict)
    return peft.PeftModel.from_pretrained(copy.deepcopy(system.case.model), folder, **options)


@pytest.mark.parametrize("rslora", [False, True])
def test_peft_reads_a_folder_of_adapters_as_they_were(system, rslora, tmp_path, monkeypatch):
    settings = dataclasses.replace(system.settings, rslora=rslora)
    params = system.params(settings)
    ours = system.logits(adapted(params, settings))
    base = system.logits({part: tree for part, tree in params.items() if part != LORA})
    assert np.abs(ours - base).max() > 0.1 * np.abs(base).max()  # the adapters matter
    close(system.logits(merged(params, settings)), ours)
    folder = system.save(tmp_path / "adapter", params, settings)
    theirs = read_by_peft(system, folder, monkeypatch)
    close(system.theirs(theirs), ours)
    again = vlm_jax.from_pretrained(system.experiment.system.release.folder, adapter=folder)
    close(system.logits(again.params), ours)
    # Where a released tensor is several of our kernels, their ranks are added.
    ranks = json.loads((folder / CONFIG).read_text())["rank_pattern"]
    found = {(".".join(name.split(".")[-2:]), rank) for name, rank in ranks.items()}
    assert found == FUSED.get(system.kind, set())


def test_an_adapter_of_peft_is_merged_as_peft_does(system, tmp_path):
    qwen = r".*language_model.*(q|v|o|gate)_proj|.*visual\.blocks.*({}|up_proj)|.*merger\.mlp\.[02]"
    names = {
        "qwen2_5_vl": qwen.format("qkv"),
        "qwen2_5_omni_thinker": qwen.format(r"attn\.[qv]"),
        "llava": r".*(q_proj|out_proj|fc1|down_proj)|.*multi_modal_projector.linear_\d",
        "qwen3_5": r".*language_model.*(q_proj|v_proj|in_proj_(qkv|z|b)|up_proj)|.*visual.*(qkv|linear_fc[12])",
        "gemma3": r".*(q_proj|out_proj|o_proj|fc1|down_proj)",
        "gemma4": r".*language_model.*(q|k|o|up)_proj|.*vision_tower.*(q|k|v|up)_proj\.linear|.*embedding_projection",
        "paligemma": r".*(q_proj|out_proj|o_proj|fc1|down_proj)|.*multi_modal_projector.linear",
        "deepseek_ocr2": r".*(qkv|lin\d|q_proj|o_proj|up_proj|down_proj)|.*multi_modal_projector",
    }
    own = {"rank_pattern": {".*layers.1.self_attn.q_proj": 5}, "alpha_pattern": {"up_proj|fc1": 7.0}}
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=names[system.kind], use_rslora=True, **own)
    model = peft.get_peft_model(copy.deepcopy(system.case.model), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3)
    model.save_pretrained(tmp_path)
    ours = vlm_jax.from_pretrained(system.experiment.system.release.folder, adapter=tmp_path)
    close(system.logits(ours.params), system.theirs(model.eval()))


def test_steps_are_those_of_peft(system, tmp_path, monkeypatch):
    plain = system.plain
    params = system.params(plain, start=True)
    folder = system.save(tmp_path / "adapter", params, plain)
    model = read_by_peft(system, folder, monkeypatch, is_trainable=True)
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(learned) == 2 * len(json.loads((folder / CONFIG).read_text())["target_modules"])
    settings = OptimizerSettings(weight_decay=0.1, clip_norm=1.0, epsilon=EPSILON, final_scale=1.0)
    optimizer = torch.optim.AdamW(
        learned, lr=RATE, betas=(settings.b1, settings.b2), eps=settings.epsilon, weight_decay=0.1
    )
    theirs = []
    for _ in range(STEPS):
        loss = model(**system.given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, settings.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        theirs.append(loss.item())

    trained = frozenset(f"{LORA}/{path}" for path, _ in flatten(params[LORA]))
    tx = adamw(settings, dict.fromkeys(trained, RATE), 0, STEPS + 1)
    loss = NextToken().build(dataclasses.replace(system.experiment, lora=plain))
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init({LORA: params[LORA]}))
    step = jax.jit(lambda *given: train_step(*given, objective=loss, tx=tx, trained=trained, lora=plain))
    ours = []
    for _ in range(STEPS):
        state, metrics = step(state, system.case.batch, jax.random.key(0))
        ours.append(float(metrics["loss"]))
    assert theirs[-1] < theirs[0] - 0.1
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    for part in params:
        if part != LORA:
            jax.tree.map(np.testing.assert_array_equal, state.params[part], params[part])
    after = safetensors.numpy.load_file(system.save(tmp_path / "after", state.params, plain) / WEIGHTS)
    model.save_pretrained(tmp_path / "theirs")
    want = safetensors.numpy.load_file(tmp_path / "theirs" / WEIGHTS)
    assert len(after) == len(want)
    for name in after:
        np.testing.assert_allclose(after[name], want[name], rtol=0, atol=5e-5, err_msg=name)


@of(gemma3)
def test_a_projection_that_is_no_module_is_named(system, tmp_path):
    told = r"mm_input_projection_weight \(16, 32\) is not the weight of a linear module"
    with pytest.raises(CheckpointFileError, match=told):
        system.save(tmp_path / "adapter", system.params(SETTINGS), SETTINGS)


@of(qwen2_5_vl, llava)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, r"only LoRA .*use_dora: True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save: \['lm_head'\]"),
        ({"bias": "all"}, r"bias: 'all'"),
        ({"peft_type": "IA3"}, r"peft_type: 'IA3'"),
    ],
)
def test_other_kinds_of_adapters_are_refused(system, change, message, tmp_path):
    folder = system.save(tmp_path / "adapter", system.params(SETTINGS), SETTINGS)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(CheckpointFileError, match=message):
        vlm_jax.from_pretrained(system.experiment.system.release.folder, adapter=folder)


@of(qwen2_5_vl, llava)
def test_factors_that_do_not_fit_are_named(system, tmp_path):
    folder = system.save(tmp_path / "adapter", system.params(SETTINGS), SETTINGS)
    tensors = safetensors.numpy.load_file(folder / WEIGHTS)
    first = next(name for name in tensors if name.endswith("lora_A.weight"))
    tensors[first] = tensors[first][:, :-1].copy()
    tensors["base_model.model.lm_haed.lora_A.weight"] = np.ones((3, 32), np.float32)
    tensors["base_model.model.lm_haed.lora_B.weight"] = np.ones((5, 3), np.float32)
    safetensors.numpy.save_file(tensors, folder / WEIGHTS)
    with pytest.raises(
        CheckpointFileError,
        match=r"(?s)lm_haed: the release has no such weight.*expected factors .*, found lora_A \(3, \d+\) and",
    ):
        vlm_jax.from_pretrained(system.experiment.system.release.folder, adapter=folder)
    with pytest.raises(CheckpointFileError, match=r"lm_haed.lora_A.bias: unknown key"):
        safetensors.numpy.save_file({"base_model.model.lm_haed.lora_A.bias": np.ones(2)}, folder / WEIGHTS)
        vlm_jax.from_pretrained(system.experiment.system.release.folder, adapter=folder)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_an_adapter_of_a_language_model_is_merged(name, tmp_path):
    model = made(name)
    model.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    adapter = peft.get_peft_model(model, config)
    adapter.save_pretrained(tmp_path / "adapter")
    ids = np.arange(14, dtype=np.int32).reshape(2, 7)
    places = np.broadcast_to(np.arange(7, dtype=np.int32), ids.shape)
    batch = Batch(*map(jnp.asarray, (ids, places, np.ones_like(ids), np.full_like(ids, -1))))
    ours = vlm_jax.from_pretrained(tmp_path / "model", adapter=tmp_path / "adapter")
    check(ours.apply(batch), their_logits(adapter.eval(), ids))


def test_an_adapter_of_another_kind_is_merged_by_peft(tmp_path):
    model = made("llama")
    model.save_pretrained(tmp_path / "model")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, use_dora=True)
    adapter = peft.get_peft_model(model, config)
    adapter.save_pretrained(tmp_path / "adapter")
    told = tried("Merge it with peft (merge_and_unload) and load the merged model")
    with pytest.raises(CheckpointFileError, match=told):
        vlm_jax.from_pretrained(tmp_path / "model", adapter=tmp_path / "adapter")
    ids = np.arange(14, dtype=np.int32).reshape(2, 7)
    expected = their_logits(adapter.eval(), ids)
    adapter.merge_and_unload().save_pretrained(tmp_path / "merged")
    places = np.broadcast_to(np.arange(7, dtype=np.int32), ids.shape)
    batch = Batch(*map(jnp.asarray, (ids, places, np.ones_like(ids), np.full_like(ids, -1))))
    check(vlm_jax.from_pretrained(tmp_path / "merged").apply(batch), expected)
