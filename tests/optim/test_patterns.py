"""Learning rates by pattern, and their decay over layers compared with BEiT's formula on a tree without stacks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from tests.parameters import drawn
from vlm_jax.config import ConfigError
from vlm_jax.layers.dense import Named
from vlm_jax.optim.adamw import OptimizerSettings, adamw
from vlm_jax.optim.patterns import by_pattern, describe, leaf_rates

from ..advice import tried

PATHS = [
    "encoder/patch_embed/kernel",
    "encoder/blocks/layers/norm/scale",
    "decoder/layers/mlp/kernel",
    "decoder/norm/scale",
]


def test_a_tie_is_settled_by_a_pattern_that_is_more_specific():
    values = {"decoder/*": 1.0, "*er/norm/*": 2.0}  # eight characters each
    told = tried(
        "both match {decoder/norm/scale}, and neither is more specific (has more characters that are not wildcards)"
    )
    with pytest.raises(ConfigError, match=f"{told}; write one that is"):
        by_pattern(values, PATHS, "rates")
    settled = by_pattern({**values, "decoder/norm": 3.0}, PATHS, "rates")
    assert settled == {PATHS[2]: 1.0, PATHS[3]: 3.0}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"decoder": 1.0}, {2: 1.0, 3: 1.0}),
        ({"encoder/blocks": 1.0}, {1: 1.0}),
        ({"encoder/blocks/*": 2.0, "encoder": 1.0}, {0: 1.0, 1: 2.0}),
        ({"*": 1.0, "*/scale": 0.0}, {0: 1.0, 1: 0.0, 2: 1.0, 3: 0.0}),
        # By the number of letters that are no wildcards, not by the order of the keys.
        ({"*/kernel": 1.0, "decoder": 2.0, "decoder/*/kernel": 3.0}, {0: 1.0, 2: 3.0, 3: 2.0}),
        ({"decoder/*norm/scale": 1.0}, {3: 1.0}),
        ({"*/[np]o*": 1.0, "encoder/*": 1.0}, {0: 1.0, 1: 1.0, 3: 1.0}),
        ({"*/norm": 1.0, "*/scale": 1.0}, {1: 1.0, 3: 1.0}),
    ],
)
def test_the_most_specific_pattern_takes_precedence(values, expected):
    assert by_pattern(values, PATHS, "rates") == {PATHS[index]: value for index, value in expected.items()}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decoder/layer": 1.0}, r"rates\.decoder/layer: no such parameter; did you mean 'decoder/layers'"),
        ({"*/xyz*": 1.0}, r"rates\.\*/xyz\*: no such parameter; the parts are encoder, decoder"),
        ({"decode*": 1.0, "*/kernel": 2.0, "*mlp*": 3.0, "*/m*/scale": 1.0}, r"no such parameter"),
        ({"*/norm/*": 1.0, "*/scale": 2.0}, r"'\*/norm/\*' and '\*/scale' both match encoder/blocks/layers/norm/scale"),
    ],
)
def test_a_pattern_without_a_parameter_or_a_tie_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        by_pattern(values, PATHS, "rates")


def boxed(depth):
    def box(names, *shape):
        return Named(jax.ShapeDtypeStruct(shape, jnp.float32), names)

    return {
        "encoder": {
            "patch_embed": {"kernel": box(("patch", "embed"), 4, 3)},
            "blocks": {"layers": {"mlp": {"kernel": box(("layers", "embed", "mlp"), depth, 3, 3)}}},
            "final_norm": {"scale": box(("norm",), 3)},
        },
        "decoder": {"head": {"kernel": box(("embed", "vocab"), 3, 5)}},
    }


def test_the_decay_over_stacked_layers_is_that_of_separate_layers():
    depth, decay, rate = 4, 0.7, 0.1
    shapes = boxed(depth)
    rates = leaf_rates(shapes, {"encoder": rate, "decoder": 0.02}, {"encoder": decay}, "stage")
    settings = OptimizerSettings(weight_decay=0.1, clip_norm=1e9)
    params, gradients = nn.meta.unbox(drawn(shapes, 0)), nn.meta.unbox(drawn(shapes, 1))
    tx = adamw(settings, rates, 0, 10)
    got, _ = tx.update(gradients, tx.init(params), params)

    # BEiT's scales, for a rate that is the last layer's: decay ** (L - id), id 0 of embeddings, id l + 1 of layer l.
    scales = {
        "patch_embed": decay**depth,
        "final_norm": 1.0,
        **{layer: decay ** (depth - 1 - layer) for layer in range(4)},
    }

    def apart(tree):
        stack = tree["encoder"]["blocks"]["layers"]["mlp"]["kernel"]
        others = {name: tree["encoder"][name] for name in ("patch_embed", "final_norm")}
        return {**others, **dict(enumerate(stack))}

    for name, scale in scales.items():
        value = apart(params)[name]
        decayed = settings.weight_decay if name != "final_norm" else 0.0
        one = optax.adamw(scale * rate, b1=0.9, b2=0.95, weight_decay=decayed)
        want, _ = one.update(apart(gradients)[name], one.init(value), value)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), apart(got)[name], want)
    assert rates["decoder/head/kernel"] == 0.02


@pytest.mark.parametrize(
    ("decay", "message"),
    [
        ({"decoder": 0.9}, tried("there are no layers in it; choose a part with layers, such as a transformer")),
        ({"encodr": 0.9}, r"stage\.layer_decay\.encodr: no such part or module; did you mean 'encoder'"),
        ({"encoder": 1.5}, r"expected above 0 and up to 1, got 1\.5"),
        ({"encoder": 0.9, "encoder/blocks": 0.9}, tried("is also in '{encoder}'; keep one of the two")),
    ],
)
def test_a_decay_that_cannot_be_used_is_refused(decay, message):
    with pytest.raises(ConfigError, match=message):
        leaf_rates(boxed(2), {"encoder": 1.0}, decay, "stage")
    assert leaf_rates(boxed(2), {"encoder": 1.0}, {"encoder": 0.9}, "stage")["encoder/final_norm/scale"] == 1.0


def test_what_learns_at_which_rate_is_counted():
    rates = leaf_rates(boxed(2), {"encoder": 0.1, "encoder/patch_embed": 0.0}, {"encoder/blocks": 0.5}, "stage")
    assert describe(boxed(2), rates) == [
        "decoder: 15 parameters frozen",
        "encoder: 18 parameters at 0.05 to 0.1, 3 parameters at 0.1, 12 parameters frozen",
    ]


def test_several_stacks_have_a_key_each():
    shapes = {"encoder": {name: boxed(2)["encoder"]["blocks"] for name in ("high", "low")}}
    with pytest.raises(
        ConfigError, match=tried("has several stacks of layers ({encoder/high, encoder/low}); give each a key")
    ):
        leaf_rates(shapes, {"encoder": 1.0}, {"encoder": 0.5}, "stage")
    found = leaf_rates(shapes, {"encoder": 1.0}, {"encoder/high": 0.5, "encoder/low": 0.25}, "stage")
    assert found == {"encoder/high/layers/mlp/kernel": (0.5, 1.0), "encoder/low/layers/mlp/kernel": (0.25, 1.0)}


def test_every_nth_layers_are_between_the_others():
    """Layers 0 and 3 are in one stack, 1 and 4, 2 and 5 in the others; layer 6 follows them."""
    blocks = {depth: boxed(depth)["encoder"]["blocks"] for depth in (1, 2)}
    names = {"a_0_every_3": 2, "a_1_every_3": 2, "b_2_every_3": 2, "a_6": 1}
    shapes = {"encoder": {name: blocks[depth] for name, depth in names.items()}}
    found = leaf_rates(shapes, {"encoder": 1.0}, {"encoder": 0.5}, "stage")
    assert [found[f"encoder/{name}/layers/mlp/kernel"] for name in names] == [
        (0.5**6, 0.5**3), (0.5**5, 0.5**2), (0.5**4, 0.5**1), 1.0,
    ]  # fmt: skip
    alone = leaf_rates(shapes, {"encoder": 1.0}, {"encoder/b_2_every_3": 0.5}, "stage")
    assert alone["encoder/b_2_every_3/layers/mlp/kernel"] == (0.5, 1.0)
