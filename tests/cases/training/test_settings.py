"""Numbers that mean "never", "none" or "drawn" elsewhere: refused, with the key, before anything is built."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.optim.adamw import OptimizerSettings, adamw
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.check import check_config
from vlm_jax.train.loop import Trainer

from .files import config_of


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer__clip_norm": 0.0}, r"optimizer\.clip_norm: expected above 0 \(inf for no clipping\), got 0\.0"),
        ({"optimizer__clip_norm": -1.0}, r"optimizer\.clip_norm: expected above 0"),
        ({"optimizer__epsilon": -1.0}, r"optimizer\.epsilon: expected above 0, got -1"),
    ],
)
def test_01_a_number_that_turns_the_steps_off_or_around_is_refused(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_config(config_of(folder, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loop__save_every": 0}, r"loop\.save_every: expected at least 1, got 0"),
        ({"loop__save_every": -1}, r"loop\.save_every: expected at least 1, got -1"),
        ({"loop__log_every": 0}, r"loop\.log_every: expected at least 1, got 0"),
        ({"evaluation__every": 0}, r"evaluation\.every: expected at least 1, or None, got 0"),
        ({"evaluation__every": float("nan")}, r"evaluation\.every: expected int \| None, got nan"),
    ],
)
def test_02_a_cadence_of_none_is_refused(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_config(config_of(folder, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, r"config\.seed: expected at least 0, got -1"),
        ({"seed": 20261128152254}, r"config\.seed: expected .* at most 4,294,967,295, got 20261128152254"),
    ],
)
def test_04_a_seed_out_of_range_is_one_message(folder, changes, message):
    with pytest.raises(ConfigError, match=message):
        check_config(config_of(folder, **changes))


def test_01_the_way_to_no_clipping_is_one():
    """`inf`, which the message names, leaves gradients as they are."""
    settings = OptimizerSettings(clip_norm=float("inf"), weight_decay=0.0)
    tx = adamw(settings, {"decoder/kernel": 1.0}, 0, 9)
    params = {"decoder": {"kernel": jnp.zeros(4)}}
    gradient = {"decoder": {"kernel": jnp.full(4, 1e6)}}
    updates, _ = tx.update(gradient, tx.init(params), params)
    np.testing.assert_allclose(updates["decoder"]["kernel"], -1.0, rtol=1e-5)


def test_21_the_second_moment_of_bfloat16_parameters_follows_its_decay():
    """1 - 0.999^n of a constant gradient of 1 after n steps; in bfloat16 it would stand still at a few per cent."""
    steps = 3000
    tx = adamw(
        OptimizerSettings(b2=0.999, weight_decay=0.0, clip_norm=float("inf")), {"decoder/kernel": 1e-3}, 0, steps + 1
    )
    params = {"decoder": {"kernel": jnp.ones(4, jnp.bfloat16)}}

    def step(carry, _):
        params, state = carry
        updates, state = tx.update({"decoder": {"kernel": jnp.ones(4, jnp.bfloat16)}}, state, params)
        return (optax.apply_updates(params, updates), state), None

    (_, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, None, steps))((params, tx.init(params)))
    found = optax.tree.get(state, "nu")["decoder"]["kernel"]
    np.testing.assert_allclose(np.asarray(found, np.float32), 1 - 0.999**steps, rtol=0.01)


def test_15_a_batch_that_the_devices_do_not_divide_is_named(folder, tmp_path):
    mesh = make_mesh(MeshSettings(data=4), jax.devices()[:4])
    config = config_of(folder, stages__tuning__batch_size=6)
    with pytest.raises(ConfigError, match=r"stages\.tuning: .* 6 rows \(batch_size .* divided over 4"):
        Trainer(config, build(config), mesh, tmp_path / "run")
    assert not (tmp_path / "run").exists()
