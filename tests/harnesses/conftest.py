"""A small release that the adapters load."""

import numpy as np
import pytest

from tests.contracts import releases

PICTURES = np.random.default_rng(0).integers(0, 255, (8, 20, 28, 3), np.uint8)


@pytest.fixture(scope="package")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    releases.make("llava", folder)
    return folder


def asked(number):
    """The messages of a question about a picture."""
    content = [{"type": "image", "image": PICTURES[number]}, {"type": "text", "text": "Which colour" + "?" * number}]
    return [{"role": "user", "content": content}]
