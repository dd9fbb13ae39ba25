import pytest

from .files import write_files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Files to train on; tests change none of them."""
    made = tmp_path_factory.mktemp("files")
    write_files(made)
    return made
