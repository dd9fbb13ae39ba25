"""Runs with adapters and moving averages, and what is read and exported of them."""

import dataclasses
import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from ml_collections import ConfigDict

import vlm_jax
from tests.golden.conftest import DATA
from vlm_jax.adapter import LORA, LoraSettings, adapted, merged
from vlm_jax.build import build
from vlm_jax.checkpoints.hub import CheckpointFileError, open_checkpoint
from vlm_jax.checkpoints.orbax import CHECKPOINTS, RunCheckpoints
from vlm_jax.checkpoints.peft import save_adapter
from vlm_jax.checkpoints.verification import CheckpointError
from vlm_jax.config import ConfigError
from vlm_jax.layers.dense import Dense
from vlm_jax.layers.lora import lora_shapes
from vlm_jax.leaves import flatten
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.convert import open_conversion, write_adapter
from vlm_jax.pretrained.family import PretrainedError, marker
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.loop import Trainer
from vlm_jax.train.state import TrainState

from ..advice import tried
from ..parameters import drawn
from .conftest import tiny_config
from .stepping import assert_close, steps
from .test_accumulate import batch_of, experiment_of
from .test_config_release import config_of, folder  # noqa: F401 (a fixture)

SETTINGS = LoraSettings(rank=2, alpha=3.0, target=("encoder", "connector", "decoder"))
EMA = 0.7


@pytest.fixture(scope="module")
def run(folder, one_device, tmp_path_factory):  # noqa: F811
    """A run of adapters on a release with moving averages; the states after each step."""
    lora = {**dataclasses.asdict(SETTINGS), "target": ("encoder/blocks", "connector", "decoder"), "dropout": 0.1}
    config = config_of(folder, lora=lora)
    with config.unlocked():
        config.stages.instruction.learning_rates = ConfigDict({"lora": 1e-2})
        config.stages.instruction.steps = 4
        config.loop.update({"save_every": 1, "keep": 10})
        config.optimizer.ema = EMA
    experiment, workdir = build(config), tmp_path_factory.mktemp("run") / "run"
    trainer = Trainer(config, experiment, one_device, workdir)
    first = trainer._first_state(trainer._spans[0]).params
    outcome = trainer.run()
    checkpoints = RunCheckpoints(workdir / CHECKPOINTS, 10)
    like = trainer._abstract_state(trainer._spans[0])
    states = [checkpoints.restore(step, like)[0] for step in range(1, 5)]
    checkpoints.close()
    return config, experiment, workdir, first, states, outcome


def test_only_adapters_learn_and_the_average_follows_them(run):
    _, experiment, _, first, states, outcome = run
    average = {path: np.asarray(leaf) for path, leaf in flatten(first[LORA])}
    for state in states:
        assert set(state.ema) == {LORA}
        for path, leaf in flatten(state.params[LORA]):
            average[path] = EMA * average[path] + (1 - EMA) * np.asarray(leaf)
        for path, leaf in flatten(state.ema[LORA]):
            np.testing.assert_allclose(leaf, average[path], atol=1e-7)
    last = states[-1]
    moved = [
        np.abs(np.asarray(leaf) - np.asarray(dict(flatten(first[LORA]))[path])).max()
        for path, leaf in flatten(last.params[LORA])
    ]
    assert min(moved) > 1e-4
    for part in first:
        if part != LORA:
            jax.tree.map(np.testing.assert_array_equal, last.params[part], first[part])
    # Moments of the adapters alone.
    moments = sum(leaf.size for leaf in jax.tree.leaves(last.opt_state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(first[LORA]))
    assert LORA not in outcome.params
    assert_close(outcome.params, merged(last.averaged, experiment.lora))


def test_a_workdir_and_its_exports_have_the_merged_averages(run, folder, tmp_path):  # noqa: F811
    _, experiment, workdir, _, _, outcome = run
    assert_close(dict(vlm_jax.from_pretrained(workdir).params), outcome.params)
    experiment.system.save_pretrained(tmp_path / "saved", outcome.params)
    assert_close(dict(vlm_jax.from_pretrained(tmp_path / "saved").params), outcome.params)
    open_conversion(folder, FAMILIES, run=workdir).write(tmp_path / "exported")
    assert_close(dict(vlm_jax.from_pretrained(tmp_path / "exported").params), outcome.params)
    write_adapter(folder, FAMILIES, workdir, tmp_path / "adapter")
    with pytest.raises(PretrainedError, match=tried("not a model; load it with from_pretrained('{}', adapter='{}')")):
        vlm_jax.from_pretrained(tmp_path / "adapter")
    with pytest.raises(PretrainedError, match=tried("{adapter}: {} is a run, which has its own; pass a release")):
        vlm_jax.from_pretrained(workdir, adapter=tmp_path / "adapter")
    with_adapter = vlm_jax.from_pretrained(folder, adapter=tmp_path / "adapter")
    assert_close(dict(with_adapter.params), outcome.params)
    without = dict(vlm_jax.from_pretrained(folder).params)
    assert (
        np.abs(
            outcome.params["decoder"]["blocks"]["layers"]["mlp"]["up"]["kernel"]
            - without["decoder"]["blocks"]["layers"]["mlp"]["up"]["kernel"]
        ).max()
        > 1e-4
    )
    with pytest.raises(CheckpointFileError, match=tried("{} is not empty: write to another folder")):
        write_adapter(folder, FAMILIES, workdir, tmp_path / "adapter")
    names = [path.name for path in write_adapter(folder, FAMILIES, workdir, tmp_path / "another")]
    assert names == [path.name for path in sorted((tmp_path / "adapter").iterdir())]


def test_what_an_adapter_folder_lacks_is_exported_whole(run, folder, tmp_path):  # noqa: F811
    _, _, workdir, _, _, outcome = run
    stated = json.loads((workdir / "config.json").read_text())
    learned = {"instruction": {**stated["stages"]["instruction"], "learning_rates": {"lora": 1e-2, "connector": 1e-3}}}
    plain = tmp_path / "plain"
    checkpoints = RunCheckpoints(plain / CHECKPOINTS, 1)
    checkpoints.save(4, TrainState(jnp.zeros((), jnp.int32), outcome.params, None), {"position": 0})
    checkpoints.close()
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / CHECKPOINTS).symlink_to(workdir / CHECKPOINTS)
    started = tried("{}: this run started from {elsewhere}, whose parameters an adapter folder does not have; export")
    for given, changes, told in (
        (tmp_path / "own", {"init_from": "elsewhere"}, started),
        (
            tmp_path / "own",
            {"stages": learned},
            tried("{}: this run also trained {connector}, which an adapter folder does not have; export it whole"),
        ),
        (plain, {}, tried("{}: this run has no adapters; train with config.lora, or export it whole")),
    ):
        (given / "config.json").write_text(json.dumps(stated | changes))
        with pytest.raises((CheckpointError, CheckpointFileError), match=told):
            write_adapter(folder, FAMILIES, given, tmp_path / "adapter")
        target = tmp_path / f"whole{len(list(tmp_path.iterdir()))}"
        open_conversion(folder, FAMILIES, run=given).write(target)
        assert_close(dict(vlm_jax.from_pretrained(target).params), outcome.params)
    assert write_adapter(folder, FAMILIES, workdir, tmp_path / "adapter")  # of a run with config.lora


def test_kernels_of_other_modules_have_no_adapter_folder(tmp_path):
    source = DATA / "open_clip_vit"
    model = vlm_jax.from_pretrained(source)
    config, dtypes = (
        json.loads((source / "config.json").read_text()),
        {"dtype": jnp.float32, "param_dtype": jnp.float32},
    )
    description = FAMILIES[marker(config)](config, open_checkpoint(source), **dtypes)
    boxed = description.boxed_shapes()
    shapes = {path: tuple(leaf.shape) for path, leaf in flatten(nn.meta.unbox(boxed))}

    def saved(target):
        settings = dataclasses.replace(SETTINGS, target=target)
        lora = nn.meta.unbox(drawn(lora_shapes(boxed, settings)))
        adapters = {path: np.asarray(leaf) for path, leaf in flatten(lora[LORA])}
        learned = merged({**model.params, **lora}, settings)
        return learned, lambda: save_adapter(
            tmp_path / "adapter", adapters, settings, description.rules, shapes, (), str(source)
        )

    learned, save = saved(("image/blocks",))
    with pytest.raises(CheckpointFileError, match=tried("take it out of config.lora.target, or export the run as a")):
        save()
    model.save_pretrained(tmp_path / "whole", params=learned)
    assert_close(dict(vlm_jax.from_pretrained(tmp_path / "whole").params), learned)
    learned, save = saved(("image/blocks/*/mlp",))
    save()
    assert_close(dict(vlm_jax.from_pretrained(source, adapter=tmp_path / "adapter").params), learned)


def test_a_run_resumes_with_its_adapters_and_averages(run, one_device):
    config, experiment, workdir, _, _, outcome = run
    again = Trainer(config, experiment, one_device, workdir)
    assert again.finished()
    assert_close(again.run().params, outcome.params)


def test_accumulation_and_devices_give_the_same_numbers(one_device):
    experiment = dataclasses.replace(experiment_of(packed=True), lora=SETTINGS)
    batch = batch_of(experiment, 16, packed=True)
    whole, params, _ = steps(experiment, batch, one_device, 1)
    assert params[LORA]
    parts, accumulated, _ = steps(experiment, batch, make_mesh(MeshSettings(data=2, fsdp=2, tensor=2)), 4)
    assert_close(parts, whole)
    assert_close(accumulated, params)


def test_what_can_have_an_adapter():
    boxed = experiment_of(packed=False).boxed_shapes()
    found = {path for path, _ in flatten(lora_shapes(boxed, SETTINGS)[LORA])}
    kernels = {path.removesuffix("/kernel") for path, _ in flatten(boxed) if path.endswith("/kernel")}
    assert {path.rpartition("/")[0] for path in found} == kernels - {"decoder/head", "encoder/patch_embed"}
    for target in ("decoder/head", "encoder/patch_embed", "decoder/embedding", "*norm*", "encodr"):
        message = (
            rf"no linear layer matches '{target.replace('*', '.')}'; those .* (decoder|encoder)/blocks/layers/attention"
        )
        with pytest.raises(ConfigError, match=message):
            lora_shapes(boxed, dataclasses.replace(SETTINGS, target=(target,)))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 2}, "need a rank and a target"),
        ({"target": ("decoder",)}, "need a rank and a target"),
        ({"rank": -1}, "rank: expected at least 0"),
        ({"rank": 2, "target": ("decoder",), "dropout": 1.0}, "dropout: expected at least 0 and below 1"),
    ],
)
def test_settings_that_make_no_adapters_are_refused(lora, message):
    with pytest.raises(ConfigError, match=message):
        LoraSettings(**lora)


def test_dropout_zeroes_inputs_of_adapters_alone():
    rng = np.random.default_rng(0)
    x, kernel, a, b = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((400, 16), (16, 8), (16, 2), (2, 8))
    )
    settings = LoraSettings(rank=2, alpha=3.0, dropout=0.25, target=("m",))
    params = {"m": {"kernel": kernel}, LORA: {"m": {"lora_a": a, "lora_b": b}}}
    dense = Dense(8, ("embed", "mlp"), use_bias=False)

    def run(key):
        return dense.apply({"params": adapted(params, settings, key)["m"]}, x)

    plain = x @ kernel + 1.5 * (x @ a @ b)
    np.testing.assert_allclose(run(None), plain, atol=1e-4)
    dropped = jax.vmap(run)(jax.random.split(jax.random.key(0), 500))
    np.testing.assert_allclose(dropped.mean(0), plain, atol=1.5)
    # Of an input, a quarter is zeroed and the others are divided by three quarters: a variance of x^2 / 3 each.
    variance = (x**2 / 3) @ (1.5 * a @ b) ** 2
    np.testing.assert_allclose(dropped.var(0).mean(), variance.mean(), rtol=0.05)


def test_an_average_starts_the_next_stage(one_device, tmp_path):
    config = tiny_config()
    with config.unlocked():
        config.optimizer.ema = 0.5
        for label in ("seeing", "answering"):
            config.stages[label].update({"steps": 2, "warmup_steps": 0})
        config.stages.answering.learning_rates = ConfigDict({"decoder": 1e-3})
        config.loop.update({"save_every": 1, "keep": 10})
    trainer = Trainer(config, build(config), one_device, tmp_path / "run")
    first = trainer._first_state(trainer._spans[0]).params["encoder"]
    outcome = trainer.run()
    checkpoints = RunCheckpoints(tmp_path / "run" / CHECKPOINTS, 10)
    after_1, after_2 = (
        checkpoints.restore(step, trainer._abstract_state(trainer._spans[step > 1]))[0] for step in (1, 2)
    )
    checkpoints.close()
    # Step 2 is stored as the start of the second stage: its encoder is the average.
    middle = jax.tree.map(lambda start, one: 0.5 * start + 0.5 * one, first, after_1.params["encoder"])
    assert_close(after_1.ema["encoder"], middle)
    jax.tree.map(np.testing.assert_array_equal, outcome.params["encoder"], after_2.params["encoder"])
    assert set(after_2.ema) == {"decoder"}


def test_what_is_frozen_is_logged(one_device, tmp_path, caplog):
    config = tiny_config()
    with config.unlocked():
        config.lora.update({"rank": 2, "target": ("decoder/*/attention",)})
        config.stages.answering.learning_rates = ConfigDict({"lora": 1e-3, "connector/mlp/down": 2e-3})
    trainer = Trainer(config, build(config), one_device, tmp_path / "run")
    with caplog.at_level(logging.INFO):
        trainer._first_state(trainer._spans[1])
    lines = [record.getMessage() for record in caplog.records if "parameters" in record.getMessage()]
    sizes = {path: np.prod(leaf.shape) for path, leaf in flatten(trainer._boxed)}
    adapters = sum(int(size) for path, size in sizes.items() if path.startswith(LORA))
    assert f"stage answering: lora: {adapters:,} parameters at 0.001" in lines
    assert any("connector:" in line and "at 0.002" in line and "frozen" in line for line in lines)
    assert any(line.startswith("stage answering: encoder:") and line.endswith("parameters frozen") for line in lines)


def test_adapters_that_no_stage_trains_are_refused(one_device, tmp_path):
    config = tiny_config()
    with config.unlocked():
        config.lora = ConfigDict({"rank": 2, "target": ("decoder",)})
    with pytest.raises(ConfigError, match=r"config\.lora: no stage trains the adapters; add 'lora'"):
        Trainer(config, build(config), one_device, tmp_path)
