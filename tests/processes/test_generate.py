"""`python -m vlm_jax.cli.generate` as a process: what it writes, and user errors."""

import signal
import subprocess

import pytest
from PIL import Image

from .alphabet import LETTERS, write
from .conftest import INTERRUPTIBLE, ROOT, environment


@pytest.fixture
def folder(tmp_path):
    write(tmp_path)
    return tmp_path


@pytest.fixture
def started(folder):
    def start(*arguments):
        """The process, with pipes."""
        words = [*INTERRUPTIBLE, "-m", "vlm_jax.cli.generate", f"--checkpoint={folder}", *arguments]
        words.append("--compilation_cache=")
        return subprocess.Popen(words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    return start


@pytest.fixture
def said(started):
    def run(*arguments):
        """Exit status, standard output and standard error."""
        process = started(*arguments)
        out, errors = process.communicate(timeout=300)
        return process.returncode, out.decode(), errors.decode()

    return run


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["--prompt=d"], LETTERS[4:]),
        (["--prompt=d", "--max_new_tokens=3"], "efg"),
        (["--prompt=d", "--stop=rs", "--stop=no", "--chunk=3"], "efghijklm"),
        (["--prompt=d", "--stop_token=p"], "efghijklmno"),
        (["--prompt=", "--system=x"], "yz"),
        (["--prompt=d", "--temperature=0.01", "--top_k=2", "--seed=3", "--cache_dtype=bfloat16"], LETTERS[4:]),
    ],
)
def test_the_answer_is_written(said, arguments, answer):
    status, out, errors = said(*arguments)
    assert (status, out) == (0, answer + "\n"), errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt=d", "--stop_token=<ende>"], "its vocabulary has no token '<ende>'; did you mean '<end>'?"),
        (["--prompt=d", "--top_p=1.5", "--temperature=1"], "flag --top_p=1.5: expected above 0 and at most 1, got 1.5"),
        (["--prompt=d", "--max_new_tokens=0"], "flag --max_new_tokens=0: expected at least 1, got 0"),
        (["--prompt=abcd", "--cache_length=8"], "GenerationError: prompt: a prompt of 4 tokens"),
        (["--prompt=d", "--image=none.png"], "FileNotFoundError: [Errno 2] No such file or directory: 'none.png'"),
        (["--prompt=d", "--image=a.png", "--draw=nowhere/a.png"], "--draw: there is no folder"),
        (["--prompt=d", "--image=/"], "CorruptImage: /: expected a regular file, got a folder"),
    ],
)
def test_an_error_of_the_user_is_one_message(said, arguments, message):
    status, out, errors = said(*arguments)
    assert status == 1 and out == "", errors
    assert message in errors and "Traceback" not in errors, errors


@pytest.mark.parametrize("what", ["close", "interrupt"])
def test_a_reader_that_has_enough_ends_it_without_a_word(started, folder, what):
    """As `| head` and Ctrl-C do, in the middle of an answer that has no end."""
    (folder / "generation_config.json").unlink()
    with started("--prompt=d", "--chunk=1", "--max_new_tokens=100000") as process:
        assert process.stdout.read(5) == b"efghi"
        if what == "interrupt":
            process.send_signal(signal.SIGINT)
            process.stdout.read()
        process.stdout.close()
        errors = process.stderr.read()
    status = {"close": 128 + signal.SIGPIPE, "interrupt": 128 + signal.SIGINT}[what]
    assert (process.returncode, errors) == (status, b"")


def test_a_picture_for_a_language_model_is_refused(said, folder):
    Image.new("RGB", (4, 4)).save(folder / "a.png")
    status, out, errors = said("--prompt=d", f"--image={folder / 'a.png'}")
    assert status == 1 and out == "" and "PictureMismatch: conversation 0: this model takes only text" in errors, errors


def test_what_the_folder_lacks_is_named(said, folder):
    (folder / "chat_template.jinja").unlink()
    status, _, errors = said("--prompt=d")
    assert status == 1 and "Traceback" not in errors
    assert f"MissingChatTemplate: {folder}: no chat template here; looked for chat_template.jinja" in errors
    (folder / "tokenizer.json").unlink()
    status, _, errors = said("--prompt=d")
    assert status == 1 and f"TokenizerError: {folder}: no tokenizer here; looked for tokenizer.json" in errors
    (folder / "model.safetensors").unlink()
    status, _, errors = said("--prompt=d")
    assert status == 1 and "Traceback" not in errors and "CheckpointFileError" in errors
