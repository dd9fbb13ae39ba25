"""The router against NumPy, token by token as the papers write it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.layers.router import Router
from vlm_jax.layers.scan import LOSSES

BATCH, LENGTH, WIDTH, EXPERTS = 2, 9, 6, 12
SETTINGS = [
    {"num_selected": 3},
    {"num_selected": 3, "normalize": True, "scale": 1.5},
    {"num_selected": 2, "scoring": "sigmoid", "normalize": True},
    {"num_selected": 1, "normalize": True, "scale": 2.0},  # the weight is 2
    {"num_selected": 3, "selection": "group_limited_greedy", "num_groups": 4, "num_selected_groups": 2, "scale": 16.0},
    {"num_selected": 3, "selection": "noaux_tc", "scoring": "sigmoid", "normalize": True, "scale": 2.0},
    {
        "num_selected": 3,
        "selection": "noaux_tc",
        "scoring": "sigmoid",
        "num_groups": 4,
        "num_selected_groups": 2,
        "scale": 1.3,
    },
]
every_setting = pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "-".join(map(str, s.values())))


def scores_of(x, kernel, scoring):
    logits = x.astype(np.float64) @ kernel.astype(np.float64)
    if scoring == "sigmoid":
        return 1 / (1 + np.exp(-logits))
    e = np.exp(logits - logits.max())
    return e / e.sum()


def routed(x, params, settings):
    """Experts (as a set) and the weight of every expert for one token."""
    scores = scores_of(x, params["kernel"], settings.get("scoring", "softmax"))
    ranking, selection = scores.copy(), settings.get("selection", "greedy")
    if selection != "greedy":
        ranking = ranking + params.get("bias", 0)
        groups = np.split(np.arange(EXPERTS), settings.get("num_groups", 1))
        of_group = 2 if selection == "noaux_tc" else 1
        best = [np.sort(ranking[group])[-of_group:].sum() for group in groups]
        for closed in np.argsort(best)[: len(groups) - settings.get("num_selected_groups", 1)]:
            ranking[groups[closed]] = 0
    chosen = np.argsort(ranking)[-settings["num_selected"] :]
    weights = np.zeros(EXPERTS)
    weights[chosen] = scores[chosen]
    if settings.get("normalize"):
        weights /= weights.sum()
    return weights * settings.get("scale", 1.0), scores


@pytest.fixture
def given():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
    params = {
        "kernel": rng.normal(size=(WIDTH, EXPERTS)).astype(np.float32) * 0.6,
        "bias": rng.normal(size=EXPERTS).astype(np.float32) * 0.3,
    }
    return x, params


def run(settings, x, params, **fields):
    router = Router(EXPERTS, **settings, **fields)
    if settings.get("selection") != "noaux_tc":
        params = {"kernel": params["kernel"]}
    return router.apply({"params": params}, jnp.asarray(x), mutable=[LOSSES])


@every_setting
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_experts_and_weights(given, settings, dtype):
    x, params = given
    x = np.asarray(jnp.asarray(x, dtype).astype(jnp.float32))
    (expert, weight), _ = run(settings, jnp.asarray(x, dtype), params)
    assert weight.dtype == jnp.float32  # scores are, whatever the dtype of the activations
    if settings.get("selection") != "noaux_tc":
        params = {"kernel": params["kernel"]}
    for b, t in np.ndindex(BATCH, LENGTH):
        expected, _ = routed(x[b, t], params, settings)
        got = np.zeros(EXPERTS)
        got[np.asarray(expert[b, t])] = weight[b, t]
        assert (got > 0).sum() == settings["num_selected"]
        np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("over", ["sequence", "batch"])
@pytest.mark.parametrize("settings", SETTINGS[:3])
def test_the_balance_loss(given, settings, over):
    x, params = given
    _, sown = run(settings, x, params, balance_weight=0.01, balance_over=over)
    rows = x if over == "sequence" else x.reshape(1, -1, WIDTH)
    losses = []
    for row in rows:
        pairs = [routed(token, {"kernel": params["kernel"]}, settings) for token in row]
        share = np.mean([weights > 0 for weights, _ in pairs], axis=0) * EXPERTS / settings["num_selected"]
        losses.append((share * np.mean([scores for _, scores in pairs], axis=0)).sum())
    (balance,) = sown[LOSSES]["balance"]
    np.testing.assert_allclose(balance, 0.01 * np.mean(losses), rtol=1e-5)


def test_the_balance_loss_has_the_gradient_of_the_scores_alone(given):
    x, params = given

    def loss(kernel):
        return run({"num_selected": 2}, x, {"kernel": kernel}, balance_weight=1.0)[1][LOSSES]["balance"][0]

    (expert, _), _ = run({"num_selected": 2}, x, params)
    share = np.stack([np.bincount(row.ravel(), minlength=EXPERTS) for row in np.asarray(expert)])
    share = share * EXPERTS / (LENGTH * 2)

    def expected(kernel):
        return (share[:, None] * jax.nn.softmax(jnp.asarray(x) @ kernel)).sum(-1).mean()

    got, wanted = (jax.grad(function)(jnp.asarray(params["kernel"])) for function in (loss, expected))
    np.testing.assert_allclose(got, wanted, atol=1e-6)


def test_no_balance_loss_without_a_weight_or_a_listener(given):
    x, params = given
    assert not run({"num_selected": 2}, x, params, balance_weight=0.0)[1]
    boxed = Router(EXPERTS, 2).init(jax.random.key(0), jnp.asarray(x))
    assert set(boxed) == {"params"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_selected": 13}, "1 to 12"),
        ({"num_selected": 2, "num_groups": 5}, "groups of equal size"),
        ({"num_selected": 2, "num_groups": 3, "num_selected_groups": 4}, "at most as many"),
        ({"num_selected": 4, "selection": "group_limited_greedy", "num_groups": 4}, "1 to 3"),
        ({"num_selected": 1, "selection": "noaux_tc", "num_groups": 12}, "at least 2 experts"),
    ],
)
def test_settings_that_cannot_be(given, settings, message):
    with pytest.raises(ValueError, match=message):
        run(settings, *given)
