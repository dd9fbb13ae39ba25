"""Text incrementally: characters and stop strings whole, whatever the pieces."""

import itertools

import numpy as np
import pytest
import tokenizers
from flax import linen as nn
from tokenizers import decoders, models

from vlm_jax.generation import text as module
from vlm_jax.generation.engine import Generated
from vlm_jax.generation.sampling import GenerationError
from vlm_jax.generation.text import RowSettings, TextStream, complete
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.vocabulary import TokenizersVocabulary
from vlm_jax.types import Batch

from ..processors.vocabularies import sentencepiece_model, tiktoken_ranks

SAID = "the dog 🦊 图x世\n\nthe  <|im_end|> dog"


@pytest.fixture(scope="module", params=["sentencepiece", "tiktoken"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "tiktoken":
        (folder / "qwen.tiktoken").write_bytes(tiktoken_ranks())
    else:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return Tokenizer.from_folder(folder)


def said(tokenizer, text, size, stop=()):
    """The pieces that are reported, `size` tokens at a time, and the stream."""
    stream, ids = TextStream(tokenizer, stop), tokenizer.encode(text)
    pieces = [stream.push(ids[start : start + size]) for start in range(0, len(ids), size)]
    return [*pieces, stream.finish()], stream


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_the_pieces_make_up_the_text_and_break_no_character(tokenizer, size):
    pieces, stream = said(tokenizer, SAID, size)
    assert "".join(pieces) == stream.text == tokenizer.decode(tokenizer.encode(SAID))
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert size == 100 or len([piece for piece in pieces if piece]) > 5  # not all at the end


@pytest.mark.parametrize("size", [1, 2, 3, 100])
@pytest.mark.parametrize(
    ("stop", "kept"),
    [
        (["og 🦊"], "the d"),
        (["世\n"], "the dog 🦊 图x"),
        (["zzz", "x", "图x世"], "the dog 🦊 图"),
        (["the"], ""),
        (["dog\n"], None),
    ],
)
def test_a_stop_string_cuts_the_text_before_it_and_no_piece_of_it_is_told(tokenizer, size, stop, kept):
    pieces, stream = said(tokenizer, SAID, size, stop)
    whole = tokenizer.decode(tokenizer.encode(SAID))
    assert stream.stopped == (kept is not None)
    assert "".join(pieces) == stream.text == (whole if kept is None else kept)
    if stream.stopped:  # at the first token that completes it
        ids = tokenizer.encode(SAID)[: stream.length]
        assert any(string in tokenizer.decode(ids) for string in stop)
        assert not any(string in tokenizer.decode(ids[:-1]) for string in stop)


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_none(tokenizer):
    ids = tokenizer.encode("a\nb")
    stream = TextStream(tokenizer, ["\n\n"])
    told = [stream.push([index]) for index in ids]
    assert "".join(told) == stream.text and "\n" in stream.text
    place = next(n for n in range(len(ids)) if "\n" in tokenizer.decode(ids[: n + 1]))
    assert told[place] == "" and told[place + 1].startswith("\n")


def test_an_id_that_is_no_token_takes_no_space_with_it(tokenizer):
    """A model's table may have more rows than the vocabulary has tokens."""
    the, dog = tokenizer.encode("the"), tokenizer.encode("the dog")[len(tokenizer.encode("the")) :]
    stream = TextStream(tokenizer)
    assert "".join(stream.push([index]) for index in [*the, tokenizer.vocab_size + 5, *dog]) == "the dog"


def test_what_stands_before_unfinished_bytes_in_a_token_is_told_and_stops():
    """Pairs of bytes go over the ends of characters, as in a space with the first bytes of a dash."""
    pair, *rest = tokens = ["xâ", "Ģ", "Ķ", "a"]
    backend = tokenizers.Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(TokenizersVocabulary(backend))
    ids = [tokenizer.id_of(token) for token in (pair, *rest)]
    stream = TextStream(tokenizer)
    assert [stream.push([index]) for index in ids] == ["x", "", "\N{EM DASH}", "a"]
    stopped = TextStream(tokenizer, ["x"])
    assert (stopped.push(ids), stopped.length, stopped.stopped) == ("", 1, True)


def test_unfinished_bytes_are_told_at_the_end(tokenizer):
    ids = tokenizer.encode("🦊")[:-1]
    stream = TextStream(tokenizer)
    assert "".join(stream.push([index]) for index in ids).strip() == ""
    assert "\N{REPLACEMENT CHARACTER}" in stream.finish()


@pytest.mark.parametrize("size", [1, 2, 5])
def test_answers_of_a_batch(monkeypatch, tokenizer, size):
    """A stand-in engine says fixed tokens in chunks; rows end by token, by string and by the limit."""
    end = tokenizer.eos_id
    lines = [tokenizer.encode(line) for line in ("the dog", "hello world", "the dog in")]
    lines[0].append(end)
    length = max(map(len, lines))

    def engine(model, params, batch, *, end_ids, watch, pad_id, max_new_tokens, on_prompts):
        lengths = np.zeros(3, np.int32)
        going = np.ones(3, bool)
        tokens = np.full((3, length), pad_id, np.int32)
        for start in range(0, length, size):
            counts = np.asarray([len(ids[start : start + size]) for ids in lines]) * going
            chunk = np.zeros((3, size), np.int32)
            for row, ids in enumerate(lines):
                chunk[row, : counts[row]] = ids[start : start + counts[row]]
            tokens[:, start : start + size] = chunk[:, : length - start]
            lengths += counts
            going &= ~watch(chunk, counts)
        return Generated(tokens, lengths, steps=0, transfers=0)

    monkeypatch.setattr(module, "generate", engine)
    told = {0: [], 1: [], 2: []}
    zeros = np.zeros((3, 1), np.int32)
    answers = complete(
        nn.Module(), {}, Batch(zeros, zeros, zeros + 1, zeros - 1), tokenizer,
        end_ids=[end], stop=["o w"], on_text=lambda row, text: told[row].append(text), max_new_tokens=length,
    )  # fmt: skip
    assert [answer.text for answer in answers] == ["the dog", "hell", "the dog in"]
    assert ["".join(told[row]) for row in range(3)] == [answer.text for answer in answers]
    assert [answer.reason for answer in answers] == ["end", "stop", "length"]
    assert answers[0].tokens == tuple(lines[0])
    assert answers[1].tokens == tuple(lines[1][: len(answers[1].tokens)])
    assert "o w" in tokenizer.decode(answers[1].tokens) and "o w" not in tokenizer.decode(answers[1].tokens[:-1])


@pytest.mark.parametrize(("skip_special", "ends"), [(True, [7]), (False, [7]), (True, [])])
def test_a_stop_string_that_is_a_special_token_ends_a_row(monkeypatch, tokenizer, skip_special, ends):
    """Special tokens are not part of the text, where a string is looked for."""
    special = tokenizer.eos_id
    name = tokenizer.vocabulary.special[special]
    line = tokenizer.encode("the dog")

    def engine(model, params, batch, *, end_ids, watch, **options):
        assert sorted(end_ids) == sorted([*ends, special])
        tokens = np.asarray([[*line, special]])
        watch(tokens, np.asarray([len(line) + 1]))
        return Generated(tokens, np.asarray([len(line) + 1]), steps=0, transfers=0)

    monkeypatch.setattr(module, "generate", engine)
    zeros = np.zeros((1, 1), np.int32)
    (answer,) = complete(
        nn.Module(), {}, Batch(zeros, zeros, zeros + 1, zeros - 1), tokenizer,
        end_ids=ends, stop=["zzz", name], skip_special=skip_special,
    )  # fmt: skip
    assert (answer.text, answer.reason, answer.tokens[-1]) == ("the dog", "stop", special)


@pytest.mark.parametrize(
    ("stop", "message"), [(["a", ""], "expected non-empty strings"), ("ab", r"got the string 'ab'; pass \['ab'\]")]
)
def test_stop_strings_that_would_end_every_answer_are_refused(tokenizer, stop, message):
    zeros = np.zeros((1, 1), np.int32)
    with pytest.raises(GenerationError, match=message):
        complete(nn.Module(), {}, Batch(zeros, zeros, zeros + 1, zeros - 1), tokenizer, end_ids=[], stop=stop)


def test_every_row_has_settings_of_its_own(monkeypatch, tokenizer):
    """Limits, stop strings and special tokens that end one row alone, and a row that leaves; each told at once."""
    special = tokenizer.eos_id
    name = tokenizer.vocabulary.special[special]
    line = tokenizer.encode("the dog in")
    said, happened, left = [*line, special, *line], [], []

    def engine(model, params, batch, *, end_ids, watch, **options):
        assert list(end_ids) == []  # or the token would end other rows too
        ended = np.zeros(5, bool)
        for index in said:
            happened.append("chunk")
            left.append(len(left))
            ended = watch(np.full((5, 1), index, np.int32), 1 - ended.astype(np.int32))
        assert ended.tolist() == [True, True, True, True, False]

    monkeypatch.setattr(module, "generate", engine)
    zeros = np.zeros((5, 1), np.int32)
    settings = [
        RowSettings(max_new_tokens=2),
        RowSettings(stop=["og"]),
        RowSettings(stop=[name]),
        RowSettings(leaves=lambda: len(left) == 3),
        RowSettings(),
    ]
    answers = complete(
        nn.Module(), {}, Batch(zeros, zeros, zeros + 1, zeros - 1), tokenizer, end_ids=[], settings=settings,
        on_answer=lambda row, answer: happened.append((row, answer)), skip_special=False,
    )  # fmt: skip
    ends = [happened.index((row, answer)) for row, answer in enumerate(answers)]
    dog = next(n for n in range(len(line)) if "og" in tokenizer.decode(line[: n + 1]))
    chunks = [happened[:place].count("chunk") for place in ends]
    assert chunks == [2, dog + 1, len(line) + 1, 3, len(said)]
    assert [answer.reason for answer in answers] == ["length", "stop", "stop", "left", "length"]
    assert [answer.tokens for answer in answers] == [tuple(said[:count]) for count in chunks]
    assert [answer.text for answer in answers[:3]] == [tokenizer.decode(line[:2]), "the d", "the dog in"]
    with pytest.raises(GenerationError, match="settings: expected one for each of the 5 rows of the batch, got 4"):
        complete(
            nn.Module(), {}, Batch(zeros, zeros, zeros + 1, zeros - 1), tokenizer, end_ids=[], settings=settings[1:]
        )


def test_a_row_that_is_nan_is_told_and_leaves(monkeypatch, tokenizer):
    ids, happened = tokenizer.encode("the dog"), []

    def engine(model, params, batch, *, end_ids, watch, on_nan, **options):
        watch(np.full((2, 1), ids[0], np.int32), np.ones(2, np.int32))
        on_nan(1, GenerationError("NaN"))
        watch(np.full((2, 1), ids[1], np.int32), np.asarray([1, 0]))

    monkeypatch.setattr(module, "generate", engine)
    zeros = np.zeros((2, 1), np.int32)
    answers = complete(
        nn.Module(), {}, Batch(zeros, zeros, zeros + 1, zeros - 1), tokenizer, end_ids=[],
        on_answer=lambda row, answer: happened.append((row, answer.reason, answer.tokens)),
        on_nan=lambda row, error: happened.append((row, str(error))),
    )  # fmt: skip
    assert happened == [(1, "NaN"), (1, "left", (ids[0],)), (0, "length", tuple(ids[:2]))]
    assert [answer.reason for answer in answers] == ["length", "left"]


def test_every_split_of_a_text_tells_the_same(tokenizer):
    ids = tokenizer.encode("图 dog")
    for cuts in itertools.product([False, True], repeat=len(ids) - 1):
        stream, told, group = TextStream(tokenizer, ["og"]), "", []
        for index, cut in zip(ids, [*cuts, True], strict=True):
            group.append(index)
            if cut:
                told, group = told + stream.push(group), []
        assert told + stream.finish() == "图 d"
