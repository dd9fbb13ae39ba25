"""The optimizer against its published algorithm, in NumPy and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlm_jax.config import ConfigError
from vlm_jax.leaves import flatten
from vlm_jax.optim.adamw import OptimizerSettings, adamw, decays, schedule

from ..advice import tried

SETTINGS = OptimizerSettings(b1=0.8, b2=0.9, epsilon=1e-3, weight_decay=0.1, clip_norm=1e9, final_scale=0.1)
RATES = {"encoder": 0.01, "decoder": 0.03}
DECAYED = {"kernel", "embedding", "queries"}
STEPS, WARMUP = 6, 2


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)

    def leaf(*shape):
        return (scale * rng.normal(size=shape)).astype(np.float32)

    return {
        "encoder": {"dense": {"kernel": leaf(3, 2), "bias": leaf(2)}, "norm": {"scale": leaf(3)}},
        "decoder": {"embedding": leaf(4, 2), "queries": leaf(2, 2), "positions": {"table": leaf(2, 2)}},
    }


def rate(step, peak):
    """Linear from 0, then half a cosine down to a tenth."""
    if step < WARMUP:
        return peak * step / WARMUP
    share = (step - WARMUP) / (STEPS - WARMUP)
    return peak * (0.1 + 0.9 * (1 + np.cos(np.pi * share)) / 2)


def by_formula(params, gradients, settings=SETTINGS):
    """Loshchilov and Hutter 2019, algorithm 2, leaf by leaf."""
    clipped = []
    for gradient in gradients:
        norm = np.sqrt(sum((np.float64(leaf) ** 2).sum() for leaf in jax.tree.leaves(gradient)))
        clipped.append(jax.tree.map(lambda g, n=norm: np.float64(g) * min(1.0, settings.clip_norm / n), gradient))

    def leaf_of(path, parameter, *gradients):
        p, m, v = np.float64(parameter), 0.0, 0.0
        for step, g in enumerate(gradients):
            m, v = settings.b1 * m + (1 - settings.b1) * g, settings.b2 * v + (1 - settings.b2) * g**2
            m_hat, v_hat = m / (1 - settings.b1 ** (step + 1)), v / (1 - settings.b2 ** (step + 1))
            decay = settings.weight_decay * p if path[-1].key in DECAYED else 0.0
            p = p - rate(step, RATES[path[0].key]) * (m_hat / (np.sqrt(v_hat) + settings.epsilon) + decay)
        return p

    return jax.tree_util.tree_map_with_path(leaf_of, params, *clipped)


def by_leaf(rates):
    return {path: rates[path.split("/")[0]] for path, _ in flatten(tree(0)) if path.split("/")[0] in rates}


def run(settings, gradients):
    tx = adamw(settings, by_leaf(RATES), WARMUP, STEPS)
    params = jax.tree.map(jnp.asarray, tree(0))
    state = tx.init(params)
    update = jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("clip_norm", [1e9, 1.5])
def test_steps_follow_the_algorithm(clip_norm):
    settings = OptimizerSettings(b1=0.8, b2=0.9, epsilon=1e-3, weight_decay=0.1, clip_norm=clip_norm, final_scale=0.1)
    gradients = [tree(seed, scale) for seed, scale in ((1, 1.0), (2, 0.01), (3, 3.0), (4, 1.0))]
    expected = by_formula(tree(0), gradients, settings)
    jax.tree.map(lambda got, want: np.testing.assert_allclose(got, want, atol=1e-6), run(settings, gradients), expected)


def test_decay_alone_shrinks_kernels_and_nothing_else():
    zeros = jax.tree.map(np.zeros_like, tree(0))
    got = run(SETTINGS, [zeros, zeros])
    for path, leaf in jax.tree_util.tree_leaves_with_path(got):
        before = tree(0)[path[0].key]
        for key in path[1:]:
            before = before[key.key]
        # The first step has a rate of 0, the second half the peak.
        factor = 1 - RATES[path[0].key] / 2 * 0.1 if path[-1].key in DECAYED else 1.0
        np.testing.assert_allclose(leaf, factor * before, rtol=1e-6)


def test_which_leaves_decay():
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree(0))]
    assert {path[-1].key for path in paths if decays(path)} == DECAYED


@pytest.mark.parametrize("warmup", [0, 2])
def test_the_schedule_ends_where_it_should(warmup):
    rates = schedule(0.5, warmup, 10, 0.1)
    if warmup:
        assert rates(0) == 0.0 and rates(1) == pytest.approx(0.25)
    assert rates(warmup) == pytest.approx(0.5)
    assert rates((warmup + 10) // 2) == pytest.approx(0.275)  # half-way of the cosine
    assert rates(10) == pytest.approx(0.05) and rates(100) == pytest.approx(0.05)


def test_a_step_leaves_a_parameter_at_most_its_limit():
    """As if `optax.adamw` were followed by the minimum with the limit."""
    settings = OptimizerSettings(weight_decay=0.0, clip_norm=1e9, final_scale=1.0)
    tx = adamw(settings, {"log_scale": 0.3, "bias": 0.3}, 0, 9, {"log_scale": 1.0})
    plain = optax.adamw(0.3, b1=settings.b1, b2=settings.b2, eps=settings.epsilon, weight_decay=0.0)
    params = expected = {"log_scale": jnp.float32(0.5), "bias": jnp.float32(0.5)}
    state, other = tx.init(params), plain.init(params)
    found = []
    for gradient in (-1.0, -1.0, -1.0, 5.0):
        gradients = {"log_scale": jnp.float32(gradient), "bias": jnp.float32(gradient)}
        updates, state = tx.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        updates, other = plain.update(gradients, other, expected)
        expected = optax.apply_updates(expected, updates)
        expected["log_scale"] = jnp.minimum(expected["log_scale"], 1.0)
        np.testing.assert_allclose([*params.values()], [*expected.values()], rtol=1e-6)
        found.append(float(params["log_scale"]))
    assert found[1:3] == [1.0, 1.0] and found[3] < 1.0 < float(params["bias"])


def test_a_parameter_without_a_rate_is_an_error():
    with pytest.raises(ValueError, match="connector/kernel"):
        adamw(SETTINGS, by_leaf(RATES), 0, 4).init({**tree(0), "connector": {"kernel": np.ones(2)}})


@pytest.mark.parametrize(("warmup", "steps"), [(4, 4), (5, 4), (0, 0)])
def test_a_warmup_as_long_as_the_stage_is_refused(warmup, steps):
    with pytest.raises(ConfigError, match=f"warmup_steps: expected fewer than the {steps} steps .* got {warmup}"):
        adamw(SETTINGS, RATES, warmup, steps)


FLAT = {"b1": 0.9, "weight_decay": 0.0, "clip_norm": 1e9, "final_scale": 1.0}


def steady(settings, gradient, steps, dtype):
    """The last update and the state after `steps` of a constant gradient."""
    tx = adamw(settings, {"decoder/kernel": 1e-3}, 0, steps + 1)
    params = {"decoder": {"kernel": jnp.ones((4,), dtype)}}
    gradients = {"decoder": {"kernel": jnp.full((4,), gradient, dtype)}}

    def body(state, _):
        updates, state = tx.update(gradients, state, params)
        return state, updates["decoder"]["kernel"][0]

    state, updates = jax.jit(lambda state: jax.lax.scan(body, state, None, length=steps))(tx.init(params))
    return updates[-1], state


def moment(state, name):
    (leaf,) = [x for path, x in jax.tree_util.tree_leaves_with_path(state) if f".{name}" in jax.tree_util.keystr(path)]
    return leaf


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_moments_follow_their_decay_for_parameters_of_any_dtype(dtype):
    steps = 3000
    update, state = steady(OptimizerSettings(b2=0.999, **FLAT), 1.0, steps, dtype)
    assert moment(state, "mu").dtype == moment(state, "nu").dtype == update.dtype == jnp.float32
    np.testing.assert_allclose(moment(state, "nu"), 1 - 0.999**steps, rtol=1e-3)  # 0.950
    np.testing.assert_allclose(moment(state, "mu"), 1.0, rtol=1e-3)
    assert update == pytest.approx(-1e-3, rel=1e-3)  # bias-corrected, both moments are 1


@pytest.mark.parametrize("kept", ["first_moment", "second_moment"])
def test_a_moment_kept_in_bfloat16_is_within_a_tenth(kept):
    settings = OptimizerSettings(b2=0.95, **FLAT, **{kept: "bfloat16"})
    _, state = steady(settings, 3.0, 200, jnp.float32)
    dtypes = {"first_moment": moment(state, "mu").dtype, "second_moment": moment(state, "nu").dtype}
    assert [name for name, dtype in dtypes.items() if dtype == jnp.bfloat16] == [kept]
    np.testing.assert_allclose(np.float32(moment(state, "mu")), 3.0, rtol=0.1)
    np.testing.assert_allclose(np.float32(moment(state, "nu")), 9.0, rtol=0.1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"b2": 0.999, "second_moment": "bfloat16"}, r"second_moment: an average with b2=0\.999 .*b2 to at most 0\.96"),
        (
            {"b1": 0.99, "first_moment": "bfloat16"},
            tried("are less than half of the spacing of its values; set {first_moment} to float32"),
        ),
        ({"second_moment": "bf16"}, r"second_moment: no kind 'bf16'; did you mean 'bfloat16'"),
    ],
)
def test_a_dtype_in_which_a_moment_stands_still_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        OptimizerSettings(**settings)
    if "stands still" in str(caught.value):
        decay, kept = settings
        most = float(str(caught.value).rsplit("to at most ", 1)[1])
        assert OptimizerSettings(**{**settings, kept: "float32"})
        assert OptimizerSettings(**{**settings, decay: most})
