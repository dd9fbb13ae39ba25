"""Paths that name no regular file, in every place that reads one."""

import os
import socket

import pytest

from vlm_jax.checkpoints.hub import CheckpointFileError, open_checkpoint, read_config
from vlm_jax.config import ConfigError
from vlm_jax.data.record_files import RecordFile, Rules
from vlm_jax.data.stores import MalformedRecords
from vlm_jax.processors.chat import ChatTemplate, ChatTemplateError
from vlm_jax.processors.image import CorruptImage, image_size, open_image, to_picture
from vlm_jax.processors.tokenizer import Tokenizer, TokenizerError
from vlm_jax.processors.video import RateSampler, read_video, video_size

KINDS = {"folder": "a folder", "pipe": "a named pipe", "socket": "a socket", "device": "a device"}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """Makes a file of another kind at a path; from inside its folder, since the path of a socket must be short."""
    monkeypatch.chdir(tmp_path)
    sockets = []

    def make(kind, path):
        if kind == "folder":
            os.mkdir(path)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            os.symlink("/dev/zero", path)
        else:
            sockets.append(socket.socket(socket.AF_UNIX))
            sockets[-1].bind(os.path.basename(path))
        return os.path.join(tmp_path, path)

    yield make
    for one in sockets:
        one.close()


READERS = {
    "open_image": (open_image, CorruptImage),
    "image_size": (image_size, CorruptImage),
    "to_picture": (to_picture, CorruptImage),
    "read_video": (lambda path: read_video(path, RateSampler()), CorruptImage),
    "video_size": (lambda path: video_size(path, RateSampler()), CorruptImage),
    "records": (lambda path: RecordFile(path, Rules(("vqa",)), "train_path"), (MalformedRecords, ConfigError)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_regular_file_is_refused_before_it_is_read(reader, kind, made):
    read, error = READERS[reader]
    expected = "is a folder" if (reader, kind) == ("records", "folder") else f"one: .*got {KINDS[kind]}"
    with pytest.raises(error, match=expected):
        read(made(kind, "one"))


@pytest.mark.parametrize("path", ["a\x00b.png", "a" * 5000, f"/{'a/' * 2500}b"], ids=["nul", "long", "deep"])
@pytest.mark.parametrize("reader", READERS)
def test_a_text_that_no_file_can_have_as_its_path_is_refused(reader, path):
    read, error = READERS[reader]
    with pytest.raises(error, match=r"expected the path of a file|there is no file") as caught:
        read(path)
    assert reader == "records" or len(str(caught.value)) < 300


FILES = {
    "model.safetensors": (open_checkpoint, CheckpointFileError),
    "model.safetensors.index.json": (open_checkpoint, CheckpointFileError),
    "model.npz": (open_checkpoint, CheckpointFileError),
    "config.json": (read_config, CheckpointFileError),
    "chat_template.jinja": (ChatTemplate.from_folder, ChatTemplateError),
    "tokenizer_config.json": (ChatTemplate.from_folder, ChatTemplateError),
    "tokenizer.json": (Tokenizer.from_folder, TokenizerError),
    "tokenizer.model": (Tokenizer.from_folder, TokenizerError),
    "qwen.tiktoken": (Tokenizer.from_folder, TokenizerError),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FILES)
def test_a_folder_of_files_that_are_not_regular_is_refused(name, kind, made, tmp_path):
    read, error = FILES[name]
    made(kind, name)
    with pytest.raises(error, match=f"got {KINDS[kind]}"):
        read(tmp_path)


@pytest.mark.parametrize("path", ["a\x00b", "a" * 5000], ids=["nul", "long"])
def test_no_checkpoint_has_an_impossible_path(path):
    with pytest.raises(CheckpointFileError, match="not a file or folder"):
        open_checkpoint(path)
