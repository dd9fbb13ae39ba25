"""Making a small release: what is written, when, and what stands in for a release on the hub."""

import json
import logging

import pytest

from vlm_jax import from_pretrained
from vlm_jax.train import small_release
from vlm_jax.train.small_release import hub_or_small, make_small_release


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_small_release(tmp_path_factory.mktemp("made") / "small", pictures=32, steps=2)


def test_only_the_release_is_left_and_it_is_trained(made, tmp_path):
    assert [path.name for path in made.parent.iterdir()] == ["small"]
    random = small_release.write_small_release(tmp_path / "random", words=small_release.WORDS)
    trained, drawn = from_pretrained(made), from_pretrained(random)
    assert json.loads((made / "config.json").read_text()) == json.loads((random / "config.json").read_text())
    for part in ("vision_tower", "multi_modal_projector", "language_model"):  # all three learn
        names = [name for name in drawn.checkpoint if name.startswith(part)]
        assert any((trained.checkpoint[name][...] != drawn.checkpoint[name][...]).any() for name in names), part


def test_one_that_is_there_stays(made):
    before = (made / "config.json").stat().st_mtime_ns
    assert make_small_release(made) == made
    assert (made / "config.json").stat().st_mtime_ns == before


def test_it_stands_in_for_a_release_that_cannot_be_downloaded(made, caplog):
    with caplog.at_level(logging.INFO, "vlm_jax"):
        assert hub_or_small("nobody/nothing", folder=made) == str(made)
    assert "nobody/nothing" in caplog.text and "small release" in caplog.text


def test_a_release_in_reach_is_taken(made, tmp_path):
    assert hub_or_small(str(made), folder=tmp_path / "never") == str(made)
    assert not (tmp_path / "never").exists()
