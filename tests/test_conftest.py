import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax._src.lru_cache import LRUCache

import vlm_jax.types
from tests import conftest

NOT_RUN = {
    "skip mark": "@pytest.mark.skip(reason='later')\ndef test(): pass",
    "skip call": "def test(): pytest.skip('later')",
    "skip in a fixture": "@pytest.fixture\ndef a(): pytest.skip('later')\ndef test(a): pass",
    "missing module": "pytest.importorskip('no_such_module', reason='later')\ndef test(): pass",
    "expected failure": "@pytest.mark.xfail(reason='later')\ndef test(): assert False",
    "expected failure that passes": "@pytest.mark.xfail(reason='later', strict=False)\ndef test(): pass",
}


def test_tests_see_eight_cpu_devices():
    assert [device.platform for device in jax.devices()] == ["cpu"] * 8


def test_ranks_are_not_promoted():
    with pytest.raises(ValueError, match="rank"):
        jnp.ones((2, 3)) + jnp.ones(3)


def test_annotations_are_checked():
    with pytest.raises(TypeError, match="mask"):
        vlm_jax.types.VisualTokens(tokens=jnp.ones((2, 3, 4)), mask=jnp.ones((2, 5), bool))


@pytest.mark.parametrize("body", NOT_RUN.values(), ids=NOT_RUN)
def test_a_test_that_does_not_run_fails(body: str, tmp_path: pathlib.Path):
    (tmp_path / "conftest.py").write_text(pathlib.Path(conftest.__file__).read_text())
    (tmp_path / "test_file.py").write_text("import pytest\n" + body)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0, done.stdout
    assert "No test is skipped here" in done.stdout
    assert "later" in done.stdout


def test_an_entry_of_the_compilation_cache_is_written_once_and_whole(tmp_path: pathlib.Path):
    cache = LRUCache(str(tmp_path), max_size=-1)
    cache.put("program", b"first")
    cache.put("program", b"second")
    assert cache.get("program") == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["program-cache"]  # and not part of one
