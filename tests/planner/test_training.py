"""Abstract batches against those that the data gives, and the step of a plan against the trainer's."""

import jax
import numpy as np
import pytest

from configs import digits, siglip_digits
from vlm_jax.build import build
from vlm_jax.config import ConfigError, parse
from vlm_jax.planner.training import abstract_batch, training_work
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.objectives.objective import Objective
from vlm_jax.train.stages import parse_schedule

from ..advice import tried


def stage_of(config):
    return parse_schedule(tuple(config.schedule), config.stages)[-1].stage


@pytest.mark.parametrize("module", [digits, siglip_digits], ids=["next_token", "contrastive"])
def test_an_abstract_batch_has_the_shapes_of_the_data(module):
    config = module.get_config()
    experiment, stage = build(config), stage_of(config)
    (sample,) = experiment.open_source().train(stage.stream, 0)[:1]
    given = stage.settings.element(experiment, stage.stream)(sample)
    like = stage.settings.example(experiment, stage.stream)

    def described(tree):
        return jax.tree.map(lambda leaf: (np.shape(leaf), np.dtype(leaf.dtype)), tree)

    assert described(like) == described(given)
    mesh = make_mesh(MeshSettings(data=2, fsdp=4))
    for one, whole in zip(jax.tree.leaves(like), jax.tree.leaves(abstract_batch(like, 16, mesh)), strict=True):
        assert whole.shape == (16 * one.shape[0], *one.shape[1:])
        assert whole.sharding.shard_shape(whole.shape)[0] == 2 * one.shape[0]


def test_an_objective_without_an_abstract_batch_is_named():
    settings, experiment = stage_of(digits.get_config()).settings, build(digits.get_config())
    with pytest.raises(ConfigError, match=tried("cannot be planned without its data; plan another stage")):
        Objective.example(settings, experiment, "questions")
    assert settings.example(experiment, "questions") is not None


def test_two_towers_are_traced_over_all_devices():
    """Every device multiplies its images with the captions of all; each product is counted on every device.

    A product runs once forward and twice backward; that of the patches has no gradient of its input. A block has four
    kernels of attention and two of its MLP; a pooling head has one query.
    """
    config = siglip_digits.get_config()
    mesh = make_mesh(parse(MeshSettings, config.mesh, "config.mesh"))
    work = training_work(config, build(config), mesh)
    rows = stage_of(config).batch_size
    width, hidden, patches, tokens = 96, 192, 4, 5

    def block(length):
        return 2 * length * (4 * width * width + 2 * width * hidden) + 2 * 2 * length * length * width

    def pooling(length):
        return 2 * ((2 + 2 * length) * width * width + 2 * width * hidden) + 2 * 2 * length * width

    embedded = 2 * patches * 12 * 12 * width
    towers = 2 * embedded + 3 * (2 * block(patches) + pooling(patches) + block(tokens) + pooling(tokens))
    assert work.model_flops == rows * towers + 3 * 2 * rows * rows * width
    assert work.rows == rows and work.stage == "train"
    assert {name for name in work.arguments if name.startswith("parameters")} >= {"parameters of image"}
