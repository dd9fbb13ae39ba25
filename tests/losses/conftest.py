"""The two-tower losses and their gradients in float64 NumPy, written from the papers, and the comparison."""

import jax
import numpy as np
import pytest

SCALE, TEACHER_SCALE = np.float32(12.0), np.float32(20.0)
BIAS = {"sigmoid": np.float32(-6.0), "softmax": np.float32(0.5), "distillation": np.float32(-0.5)}
WEIGHTS = {"sigmoid": (1.5,), "softmax": (0.75,), "distillation": (0.75, 2.0)}


def softmax(logits, axis):
    exponentials = np.exp(logits - logits.max(axis=axis, keepdims=True))
    return exponentials / exponentials.sum(axis=axis, keepdims=True)


def log_softmax(logits, axis):
    shifted = logits - logits.max(axis=axis, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=axis, keepdims=True))


def cross_entropy(logits, targets):
    """Mean of the row and column cross-entropies towards (row, column) targets, and its gradient."""
    value, gradient = 0.0, np.zeros_like(logits)
    for axis, target in zip((1, 0), targets, strict=True):
        value -= (target * log_softmax(logits, axis)).sum() / (2 * len(logits))
        gradient += (softmax(logits, axis) - target) / (2 * len(logits))
    return value, gradient


def reference(loss, weights, image, text, scale, bias, teacher_image=None, teacher_text=None, teacher_scale=None):
    """(parts, gradients of `sum(weights * parts)` for image, text, scale and bias)."""
    image, text = np.float64(image), np.float64(text)
    products = image @ text.T
    logits, same = scale * products + bias, np.eye(len(image))
    if loss == "sigmoid":
        sign = 2 * same - 1
        parts = [
            (
                np.logaddexp(0, -sign * logits).sum() / len(image),
                -sign / (1 + np.exp(sign * logits)) / len(image),
            )
        ]
    else:
        parts = [cross_entropy(logits, (same, same))]
    if loss == "distillation":
        taught = teacher_scale * np.float64(teacher_image) @ np.float64(teacher_text).T
        parts.append(cross_entropy(logits, (softmax(taught, 1), softmax(taught, 0))))
    gradient = sum(weight * part[1] for weight, part in zip(weights, parts, strict=True))
    gradients = (
        scale * gradient @ text,
        scale * gradient.T @ image,
        (gradient * products).sum(),
        gradient.sum(),
    )
    return [part[0] for part in parts], gradients


def example(batch, width=24, seed=0):
    """Normalised float32 features of both towers and of a teacher of another width; pairs are related."""
    rng = np.random.default_rng(seed)

    def towers(width):
        image = rng.normal(size=(batch, width))
        text = image + rng.normal(size=(batch, width))
        return [np.float32(x / np.linalg.norm(x, axis=1, keepdims=True)) for x in (image, text)]

    return (*towers(width), *towers(width + 8))


@pytest.fixture
def compare():
    """Compares a loss's values and gradients with the reference; returns (values, gradients)."""

    def run(name, function, batch, *, seed=0, prepare=lambda x: x, locked=False, atol=1e-5):
        image, text, *teacher = example(batch, seed=seed)
        weights = WEIGHTS[name]
        extra = {}
        if name == "distillation":
            names = ("teacher_image_features", "teacher_text_features", "teacher_scale")
            extra = dict(zip(names, (*map(prepare, teacher), TEACHER_SCALE), strict=True))

        def total(image, text, scale, bias):
            parts = function(image, text, scale=scale, bias=bias, **extra)
            parts = parts if isinstance(parts, tuple) else (parts,)
            return sum(weight * part for weight, part in zip(weights, parts, strict=True)), parts

        step = jax.jit(jax.value_and_grad(total, argnums=(0, 1, 2, 3), has_aux=True))
        (_, parts), gradients = step(prepare(image), prepare(text), SCALE, BIAS[name])
        taught = (*teacher, TEACHER_SCALE) if extra else ()
        expected, expected_gradients = reference(name, weights, image, text, SCALE, BIAS[name], *taught)
        np.testing.assert_allclose(parts, expected, rtol=0, atol=atol)
        if locked:
            expected_gradients = (np.zeros_like(image), *expected_gradients[1:])
        for label, got, wanted in zip(("image", "text", "scale", "bias"), gradients, expected_gradients, strict=True):
            np.testing.assert_allclose(got, wanted, rtol=0, atol=atol, err_msg=label)
        return parts, gradients

    return run
