"""Single-device losses: values and gradients in float64, tiles that do not divide, memory, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlm_jax.losses.two_tower import LOSSES, distillation_loss, locked_image, sigmoid_loss, softmax_loss

FUNCTIONS = {"softmax": softmax_loss, "sigmoid": sigmoid_loss, "distillation": distillation_loss}


def test_every_loss_is_tested():
    assert FUNCTIONS.keys() == LOSSES.keys()


@pytest.mark.parametrize("block_size", [1, 5, 8, 512])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients(compare, name, block_size):
    def loss(*features, **arguments):
        return FUNCTIONS[name](*features, **arguments, block_size=block_size)

    compare(name, loss, 16)


@pytest.mark.parametrize("name", LOSSES)
def test_a_single_pair(compare, name):
    compare(name, FUNCTIONS[name], 1)


@pytest.mark.parametrize("name", LOSSES)
def test_value_without_gradient_is_the_same(compare, name):
    parts, _ = compare(name, FUNCTIONS[name], 12)
    alone = []
    compare(
        name,
        lambda *x, **y: alone.append(FUNCTIONS[name](*x, **y)) or jax.lax.stop_gradient(alone[-1]),
        12,
        atol=9,
    )
    assert alone and len(parts) == (2 if name == "distillation" else 1)


@pytest.mark.parametrize("name", LOSSES)
def test_locked_image_learns_nothing_for_the_image(compare, name):
    _, gradients = compare(name, locked_image(FUNCTIONS[name]), 16, locked=True)
    assert not np.any(gradients[0])


def test_large_logits_stay_finite():
    features = jnp.eye(8, 8)
    for loss in (softmax_loss, sigmoid_loss):
        value, gradient = jax.value_and_grad(lambda x, loss=loss: loss(x, -features, scale=1e4))(features)
        # Every pair's own logit is -10,000 and all others are 0.
        expected = 1e4 + (np.log(7) if loss is softmax_loss else 7 * np.log(2))
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        assert np.all(np.isfinite(gradient))


def test_half_precision_features_keep_their_dtype_and_sum_in_float32():
    rng = np.random.default_rng(0)
    image, text = (jnp.asarray(rng.normal(size=(64, 16)) / 4, jnp.bfloat16) for _ in range(2))
    for loss in (softmax_loss, sigmoid_loss):
        step = jax.value_and_grad(lambda i, t, loss=loss: loss(i, t, scale=10.0), argnums=(0, 1))
        value, gradients = step(image, text)
        expected, wide = step(image.astype(jnp.float32), text.astype(jnp.float32))
        assert value.dtype == jnp.float32
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        for got, wanted in zip(gradients, wide, strict=True):
            assert got.dtype == jnp.bfloat16
            np.testing.assert_array_equal(got, wanted.astype(jnp.bfloat16))


def test_a_one_element_scale_is_a_number():
    features = np.eye(4, dtype=np.float32)
    assert sigmoid_loss(features, features, scale=np.ones(1, np.float32)) == sigmoid_loss(features, features, scale=1.0)


def test_teacher_gets_no_gradient():
    features = jnp.eye(6, 6) + 0.1

    def distilled(teacher):
        return distillation_loss(
            features,
            features,
            scale=5.0,
            teacher_image_features=teacher,
            teacher_text_features=features,
            teacher_scale=3.0,
        )[1]

    assert not np.any(jax.grad(distilled)(features))


@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_temporaries_of_4096_by_768(name):
    features = jax.ShapeDtypeStruct((4096, 768), jnp.float32)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)

    def loss(image, text, scale, bias):
        return FUNCTIONS[name](image, text, scale=scale, bias=bias)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
    compiled = step.lower(features, features, scalar, scalar).compile()
    assert compiled.memory_analysis().temp_size_in_bytes <= 50e6
    assert "4096,4096" not in compiled.as_text()


@pytest.mark.parametrize("name", LOSSES)
def test_one_product_of_two_is_spared_for_a_locked_image(name):
    features = jax.ShapeDtypeStruct((64, 32), jnp.float32)

    def products(loss):
        extra = {}
        if name == "distillation":
            teacher = jnp.eye(64, 32)
            extra = {
                "teacher_image_features": teacher,
                "teacher_text_features": teacher,
                "teacher_scale": 1.0,
            }

        def total(image, text):
            return jnp.sum(jnp.stack(jax.tree.leaves(loss(image, text, scale=2.0, **extra))))

        text = jax.jit(jax.value_and_grad(total, argnums=(0, 1))).lower(features, features).compile().as_text()
        return sum(" dot(" in line for line in text.splitlines())

    assert products(locked_image(FUNCTIONS[name])) == products(FUNCTIONS[name]) - 1


SQUARE = np.eye(4, dtype=np.float32)
TEACHER = {"teacher_image_features": SQUARE, "teacher_text_features": SQUARE, "teacher_scale": 1.0}


@pytest.mark.parametrize(
    ("name", "features", "arguments", "message"),
    [
        ("softmax", (SQUARE, SQUARE[:3]), {}, r"\(4, 4\) and \(3, 4\)"),
        ("sigmoid", (SQUARE, SQUARE[:, :3]), {}, r"\(4, 4\) and \(4, 3\)"),
        ("sigmoid", (SQUARE[0], SQUARE[0]), {}, r"\(4,\) and \(4,\)"),
        ("softmax", (SQUARE, SQUARE), {"scale": np.ones(2)}, r"`scale`, got an array of shape \(2,\)"),
        ("softmax", (SQUARE, SQUARE), {"bias": np.ones(3)}, r"`bias`, got an array of shape \(3,\)"),
        ("sigmoid", (SQUARE, SQUARE), {"block_size": 0}, "block_size of at least 1"),
        (
            "distillation",
            (SQUARE, SQUARE),
            TEACHER | {"teacher_text_features": SQUARE[:3]},
            "teacher image and text",
        ),
        (
            "distillation",
            (SQUARE, SQUARE),
            TEACHER | {"teacher_image_features": SQUARE[:3], "teacher_text_features": SQUARE[:3]},
            "same 4 examples",
        ),
    ],
)
def test_errors(name, features, arguments, message):
    with pytest.raises(ValueError, match=message):
        FUNCTIONS[name](*features, **{"scale": 1.0} | arguments)
