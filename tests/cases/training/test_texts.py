"""Text is text: encodings, forms of JSON, brackets in names, Unicode forms, placeholders."""

import gzip
import io
import json

import pytest
import rich.console
from etils import epath
from tokenizers import normalizers

from vlm_jax.build import build
from vlm_jax.cli import progress
from vlm_jax.cli.process import EXPLAINED
from vlm_jax.config import ConfigError
from vlm_jax.data.conversations import Conversations
from vlm_jax.data.record_files import open_records
from vlm_jax.data.stores import MalformedRecords
from vlm_jax.evals.metrics import METRICS, Response
from vlm_jax.evals.metrics.text import same_text
from vlm_jax.evals.vqa import judged
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.sweep.failures import Failures

from .files import SPECIAL, config_of, records, write, write_tokenizer

ASKED = [{**row, "question": "caf\u00e9?"} for row in records(8)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ASKED)


def number_of_records(path):
    rules = Conversations(train_path=str(path), held_out=1, channels=1).rules()
    return len(open_records(str(path), rules, "train_path"))


@pytest.mark.parametrize(
    "content",
    [LINES.encode("utf-8-sig"), gzip.compress(LINES.encode()), LINES.replace("\n", "\r\n").encode()],
    ids=["byte order mark", "gzip", "CRLF"],
)
def test_10_common_encodings_are_read(tmp_path, content):
    (tmp_path / "train.jsonl").write_bytes(content)
    assert number_of_records(tmp_path / "train.jsonl") == 8


@pytest.mark.parametrize("indent", [2, None])
def test_30_an_array_is_read(tmp_path, indent):
    (tmp_path / "train.jsonl").write_text(json.dumps(records(8), indent=indent))
    assert number_of_records(tmp_path / "train.jsonl") == 8


@pytest.mark.parametrize("encoding", ["utf-16", "latin-1"])
def test_10_another_encoding_is_named_with_the_file_and_the_way_on(tmp_path, encoding):
    path = tmp_path / "train.jsonl"
    path.write_bytes(LINES.encode(encoding))
    with pytest.raises(MalformedRecords, match=rf"{path}:1: expected UTF-8 text.*") as caught:
        number_of_records(path)
    # The fix: the same text in UTF-8, as `iconv` writes it.
    assert "iconv -f" in str(caught.value)
    path.write_bytes(LINES.encode(encoding).decode(encoding).encode())
    assert number_of_records(path) == 8


def test_10_a_folder_is_named_with_a_pattern_that_works(tmp_path):
    write(tmp_path / "train.jsonl", records(8))
    with pytest.raises(
        ConfigError, match=r"train_path: .* is a folder; name a file of records, or a pattern such as "
    ) as caught:
        number_of_records(tmp_path)
    pattern = str(caught.value).rsplit("such as ", 1)[1]
    assert number_of_records(pattern) == 8


@pytest.mark.parametrize(
    ("normalizer", "reference"),
    [
        (normalizers.NFC(), "cafe\u0301"),
        (normalizers.Lowercase(), "No"),
        (normalizers.NFKC(), "\uff11"),
        (None, "caf\u00e9"),
    ],
    ids=["NFC", "lower case", "NFKC", "none"],
)
def test_27_a_perfect_answer_in_the_tokenizers_own_spelling_is_right(tmp_path, normalizer, reference):
    path = write_tokenizer(tmp_path, normalizer)
    tokenizer = Tokenizer.from_file(str(path), {f"{token[1:-1]}_token": token for token in SPECIAL})
    perfect = tokenizer.decode(tokenizer.encode(reference))
    assert is_right(tokenizer, perfect, reference)
    assert not is_right(tokenizer, perfect + "a", reference) and not is_right(tokenizer, "", reference)


def is_right(tokenizer, answer, reference):
    return judged(METRICS["exact"], tokenizer, Response(answer, (reference,)))[0]


def test_27_composed_and_decomposed_characters_are_equal():
    assert same_text("cafe\u0301", "caf\u00e9") and same_text("caf\u00e9 ", "cafe\u0301")
    assert not same_text("cafe", "caf\u00e9")


def test_27_a_reference_that_the_tokenizer_cannot_write_is_not_answered_by_nothing(tmp_path):
    path = write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(path), {f"{token[1:-1]}_token": token for token in SPECIAL})
    assert tokenizer.decode(tokenizer.encode("\u4f60")) == ""
    assert not is_right(tokenizer, "", "\u4f60")


@pytest.mark.parametrize("name", ["[ocr]", "[/ocr]", "run[lr=1e-3]"])
def test_25_brackets_in_names_are_printed_as_they_are(monkeypatch, capsys, tmp_path, name):
    for is_terminal in (False, True):
        monkeypatch.setattr(progress.sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
        with progress.open_progress() as shown:
            shown.tell(1, [f"{name}: 0.500"])
        assert f"{name}: 0.500\n" in capsys.readouterr().out
    console = rich.console.Console(file=io.StringIO(), width=200)
    Failures(epath.Path(tmp_path), console).add(name, f"ConfigError: {name}")
    assert f"{name}: failed: ConfigError: {name}\n" in console.file.getvalue()


def test_12_a_placeholder_in_a_question_is_named_with_its_record(folder, tmp_path):
    bad = {"id": 9, "image": f"{folder}/1.png", "question": "<image>\nwhat?", "answer": "a"}
    config = config_of(folder, data__train_path=write(tmp_path / "train.jsonl", [bad]))
    told = rf"{tmp_path}/train\.jsonl:1: <image> in the text '<image>\\nwhat\?' of the user stands for an image"
    assert issubclass(MalformedRecords, EXPLAINED)
    with pytest.raises(MalformedRecords, match=told):
        build(config).open_source()
