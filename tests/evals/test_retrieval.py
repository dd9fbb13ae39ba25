"""Recall against a full sort in NumPy and sklearn, and against cases whose answer is known."""

import numpy as np
import pytest
from sklearn.metrics import top_k_accuracy_score

from vlm_jax.evals.retrieval import retrieval_recall

from ..advice import tried


def features(count, seed, width=16):
    values = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


@pytest.mark.parametrize("block_size", [7, 1024])
def test_several_texts_an_image_against_a_full_sort(block_size):
    text_image = np.random.default_rng(2).permutation(np.concatenate([np.arange(30), np.arange(30), [3, 3, 4]]))
    images = features(30, 0)
    texts = images[text_image] + 2.0 * features(len(text_image), 1)
    got = retrieval_recall(images, texts, text_image, ks=(1, 5), block_size=block_size)
    order = np.argsort(-(images.astype(np.float64) @ texts.T), axis=1)
    for k in (1, 5):
        hits = [i in text_image[order[i, :k]] for i in range(30)]
        assert 0 < np.mean(hits) < 1
        assert got[f"image_to_text/recall@{k}"] == pytest.approx(np.mean(hits))
        expected = top_k_accuracy_score(text_image, texts.astype(np.float64) @ images.T, k=k)
        assert got[f"text_to_image/recall@{k}"] == pytest.approx(expected)


def test_pairs_in_order_need_no_index():
    images = features(20, 0)
    texts = images + 1.5 * features(20, 1)
    got = retrieval_recall(images, texts, ks=(1, 3))
    for k in (1, 3):
        expected = top_k_accuracy_score(np.arange(20), images.astype(np.float64) @ texts.T, k=k)
        assert 0 < expected < 1
        assert got[f"image_to_text/recall@{k}"] == pytest.approx(expected)


def test_equal_features_retrieve_nothing():
    same = np.ones((6, 4), np.float32)
    assert set(retrieval_recall(same, same, ks=(1, 5)).values()) == {0.0}
    assert set(retrieval_recall(same, same, ks=(6,)).values()) == {1.0}


def test_images_without_a_text_are_removed_and_the_image_of_each_text_is_passed():
    given = np.array([0, 1, 2, 2, 1])
    assert retrieval_recall(features(3, 0), features(5, 1), given, ks=(5,))["image_to_text/recall@5"] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text_features": features(5, 1, 8)}, r"\(4, 16\) and \(5, 8\)"),
        (
            {"text_image": None},
            tried("expected as many texts as images without text_image, got {5} texts and {4} images; pass text_image"),
        ),
        ({"text_image": np.arange(4)}, r"shape \(5,\)"),
        ({"text_image": np.array([0, 1, 2, 3, 4])}, "got 4 for text 4"),
        (
            {"text_image": np.array([0, 1, 2, 2, 1])},
            tried("expected a text for every image, got none for image {3} ({1} such); remove it"),
        ),
        (
            {"image_features": np.full((4, 16), np.nan, np.float32)},
            "image features, got infinity or nan in row 0",
        ),
        ({"ks": (0,)}, "at least 1"),
        ({"block_size": 0}, "at least 1"),
    ],
)
def test_errors(change, message):
    arguments = {
        "image_features": features(4, 0),
        "text_features": features(5, 1),
        "text_image": np.array([0, 1, 2, 3, 3]),
    }
    with pytest.raises(ValueError, match=message):
        retrieval_recall(**arguments | change)
