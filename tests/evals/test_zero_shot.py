"""Prompt ensembling against its formula in NumPy, accuracy against sklearn."""

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from vlm_jax.evals.zero_shot import class_embeddings, top_k_accuracy

NAMES = ["cat", "dog", "teapot"]
TEMPLATES = ["a photo of a {}.", "{}, a drawing", "the {} there"]


def encode(prompts):
    """Features of any length, a function of the prompt alone."""
    seeds = [int.from_bytes(prompt.encode()[:12].ljust(12), "little") for prompt in prompts]
    return np.stack([np.random.default_rng(seed).normal(size=8) * (1 + seed % 5) for seed in seeds])


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_class_embeddings(batch_size):
    sizes = []

    def counted(prompts):
        sizes.append(len(prompts))
        return encode(prompts)

    got = class_embeddings(counted, NAMES, TEMPLATES, batch_size=batch_size)
    assert set(sizes) == {batch_size}
    for name, embedding in zip(NAMES, got, strict=True):
        features = encode([template.replace("{}", name) for template in TEMPLATES])
        mean = (features / np.linalg.norm(features, axis=1, keepdims=True)).mean(axis=0)
        np.testing.assert_allclose(embedding, mean / np.linalg.norm(mean), atol=1e-6)


def test_braces_of_a_class_name_stay():
    seen = []
    class_embeddings(lambda prompts: seen.extend(prompts) or encode(prompts), ["{x}"], ["a {}."], batch_size=1)
    assert seen == ["a {x}."]


@pytest.mark.parametrize("block_size", [9, 8192])
@pytest.mark.parametrize("k", [1, 3])
def test_top_k_accuracy(k, block_size):
    rng = np.random.default_rng(0)
    classes = rng.normal(size=(10, 6)).astype(np.float32)
    labels = np.concatenate([np.arange(10), rng.integers(0, 10, 40)])
    images = (classes[labels] + 2 * rng.normal(size=(50, 6))).astype(np.float32)
    expected = top_k_accuracy_score(labels, images.astype(np.float64) @ classes.T, k=k)
    assert 0.2 < expected < 0.9
    assert top_k_accuracy(images, classes, labels, k=k, block_size=block_size) == pytest.approx(expected)


def test_equal_classes_are_no_hit():
    assert top_k_accuracy(np.ones((3, 2)), np.ones((4, 2)), np.array([0, 1, 2]), k=3) == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": []}, "0 classes"),
        ({"templates": []}, "0 templates"),
        ({"templates": ["a photo"]}, "'a photo'"),
        ({"templates": ["{} and {}"]}, "one {}"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"encode_text": lambda prompts: np.ones((1, 4))}, r"\[2, D\]"),
        ({"encode_text": lambda prompts: np.zeros((2, 4))}, "length 0.0 for 'a photo of a cat.'"),
    ],
)
def test_class_embedding_errors(change, message):
    arguments = {"encode_text": encode, "class_names": NAMES, "templates": TEMPLATES, "batch_size": 2}
    with pytest.raises(ValueError, match=message):
        class_embeddings(**arguments | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"classes": np.ones((4, 3))}, r"\(2, 2\) and \(4, 3\)"),
        ({"labels": np.array([1])}, "each of 2"),
        ({"labels": np.array([1, 4])}, "got 4 for image 1"),
        ({"k": 0}, "at least 1"),
        ({"block_size": 0}, "at least 1"),
        ({"image_features": np.full((2, 2), np.inf)}, "image features"),
    ],
)
def test_accuracy_errors(change, message):
    arguments = {"image_features": np.ones((2, 2)), "classes": np.ones((4, 2)), "labels": np.array([0, 1])}
    with pytest.raises(ValueError, match=message):
        top_k_accuracy(**arguments | change)
