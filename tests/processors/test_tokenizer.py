"""Tokenizers of checkpoint folders: each kind of file, special tokens, and what a folder lacks."""

import json
import re

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from vlm_jax.processors.digits_vocabulary import digits_tokenizer
from vlm_jax.processors.documents_vocabulary import documents_tokenizer
from vlm_jax.processors.tokenizer import Tokenizer, TokenizerError

from ..advice import tried
from .vocabularies import TEXTS, sentencepiece_model, tiktoken_ranks

LINES = ["hello world", "the dog\n\nin  the image", "", "图片 é 🦊!", "x"]


@pytest.fixture(scope="module")
def model():
    return sentencepiece_model()


def pairs():
    """A byte-level tokenizer with a BOS, as Llama 3 has it."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return backend


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_bytes(content) if isinstance(content, bytes) else path.write_text(json.dumps(content))
    return folder


@pytest.fixture
def llama(tmp_path, model):
    """A folder as LLaVA's: a model and its settings."""
    return write(tmp_path, tokenizer__model=model, tokenizer_config__json={"legacy": False, "pad_token": "<unk>"})


@pytest.fixture
def qwen(tmp_path):
    return write(tmp_path, qwen__tiktoken=tiktoken_ranks())


def test_a_tokenizer_json_with_the_tokens_that_its_settings_add(tmp_path):
    pairs().save(str(tmp_path / "tokenizer.json"))
    settings = {
        "bos_token": {"content": "<|begin|>", "lstrip": False},
        "eos_token": "<|end|>",
        "added_tokens_decoder": {"300": {"content": "<tool>", "special": False}},
        "additional_special_tokens": ["<image>"],
        "unk_token": None,
    }
    write(tmp_path, tokenizer_config__json=settings)
    tokenizer = Tokenizer.from_folder(tmp_path)
    base = pairs().get_vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (0, 1, None)
    assert (tokenizer.id_of("<tool>"), tokenizer.id_of("<image>"), tokenizer.vocab_size) == (base, base + 1, base + 2)
    assert tokenizer.names == {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    plain = tokenizer.encode("the dog")
    assert tokenizer.encode("the dog", add_special=True) == [0, *plain]
    assert tokenizer.encode("the dog<image><|end|>") == [*plain, base + 1, 1]
    assert tokenizer.decode([0, *plain, base, base + 1, 1]) == "the dog<tool>"
    assert tokenizer.decode([0, *plain, base + 1, 1], skip_special=False) == "<|begin|>the dog<image><|end|>"


@pytest.mark.parametrize("line", LINES)
def test_texts_come_back_from_a_tokenizer_json(tmp_path, line):
    pairs().save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode(line)) == line


@pytest.mark.parametrize("line", LINES)
def test_a_sentencepiece_model_spells_as_its_library_does(llama, model, line):
    tokenizer = Tokenizer.from_folder(llama)
    ids = sentencepiece.SentencePieceProcessor(model_proto=model).encode(line)
    assert tokenizer.encode(line) == ids
    assert tokenizer.encode(line, add_special=True) == [1, *ids]
    assert tokenizer.decode([1, *ids, 2]) == line
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)


def test_the_space_that_a_text_begins_with_stands_before_it_alone_or_before_every_stretch(llama, model):
    """Of `the` in the middle of a text, where legacy tokenizers write `▁the`."""
    spell = sentencepiece.SentencePieceProcessor(model_proto=model)
    with_space, bare = spell.encode("the"), spell.encode("\nthe")[len(spell.encode("\n")) :]
    assert with_space != bare
    assert Tokenizer.from_folder(llama).encode("the</s>the") == [*with_space, 2, *bare]
    assert Tokenizer.from_folder(llama).encode("<s>the") == [1, *bare]
    write(llama, tokenizer_config__json={})
    assert Tokenizer.from_folder(llama).encode("the</s>the") == [*with_space, 2, *with_space]


@pytest.mark.parametrize("text", [b"a\xe2\x8b\x0f\xc8", b"the\xf0\x9f\xa6", b"\xfd\x07\xf0\x97b", b"\xed\xa0\x80x"])
def test_bytes_that_are_no_character_are_told_as_its_library_does(llama, model, text):
    spell = sentencepiece.SentencePieceProcessor(model_proto=model)
    ids = [spell.piece_to_id(f"<0x{byte:02X}>") for byte in text]
    assert Tokenizer.from_folder(llama).decode(ids) == spell.decode(ids)


def test_tokens_beside_a_sentencepiece_model(llama, model):
    size = sentencepiece.SentencePieceProcessor(model_proto=model).get_piece_size()
    special = {"eos_token": "<end>", "additional_special_tokens": ["<image>", {"content": "<pad>", "rstrip": True}]}
    write(
        llama,
        tokenizer_config__json={"add_bos_token": False, "add_eos_token": True},
        added_tokens__json={"<end>": size + 3, "<tool>": size + 2},
        special_tokens_map__json=special,
    )
    tokenizer = Tokenizer.from_folder(llama)
    assert tokenizer.id_of("<tool>") == size + 2 and tokenizer.eos_id == size + 3
    assert tokenizer.id_of("<image>") == size + 4 and tokenizer.vocab_size == size + 6
    the = tokenizer.encode("the")
    assert tokenizer.encode("the<tool><pad>  the", add_special=True) == [*the, size + 2, size + 5, *the, size + 3]
    assert tokenizer.decode([*the, size + 2, size + 5, size + 3]) == "the<tool>"
    assert tokenizer.decode([*the, size + 5], skip_special=False) == "the<pad>"


def test_qwens_ranks_are_followed_by_its_special_tokens(qwen):
    tokenizer = Tokenizer.from_folder(qwen)
    ranks = 263
    assert tokenizer.encode("the dog") == [257, 260]
    assert tokenizer.encode("<|im_start|>the<|im_end|><ref>") == [ranks + 1, 257, ranks + 2, ranks + 208]
    assert tokenizer.vocab_size == ranks + 217 and tokenizer.id_of("<imgpad>") == ranks + 216
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, ranks)
    assert tokenizer.decode([257, 260, ranks, 5000]) == "the dog"
    assert tokenizer.encode("e\u0301") == list("é".encode())  # composed first
    write(qwen, config__json={"model_type": "qwen"})
    assert Tokenizer.from_folder(qwen).vocab_size == ranks + 208  # a Qwen without vision has no tags


@pytest.mark.parametrize("line", LINES)
def test_texts_come_back_from_qwens_ranks(qwen, line):
    tokenizer = Tokenizer.from_folder(qwen)
    assert tokenizer.decode(tokenizer.encode(line)) == line


def test_qwen2s_two_files(tmp_path):
    vocabulary = {
        token: index for index, token in enumerate([*sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the"])
    }
    settings = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}
    write(tmp_path, vocab__json=vocabulary, tokenizer_config__json=settings)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\nth e\n")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("the<|im_end|>") == [257, 258]
    assert all(tokenizer.decode(tokenizer.encode(line)) == line for line in LINES)
    write(tmp_path, tokenizer_config__json={"tokenizer_class": "GPT2Tokenizer"})
    advised = tried("tokenizer_config.json has {GPT2Tokenizer}; save the tokenizer as a tokenizer.json")
    with pytest.raises(TokenizerError, match=advised):
        Tokenizer.from_folder(tmp_path)
    whole = tokenizers.Tokenizer(models.BPE(vocabulary, [("t", "h"), ("th", "e")]))
    whole.save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.from_folder(tmp_path).encode("the") == [257]


def test_what_a_folder_lacks_is_named(tmp_path, qwen):
    with pytest.raises(TokenizerError, match=r"has no token '<\|im_ende\|>'; did you mean '<\|im_end\|>'\?"):
        Tokenizer.from_folder(qwen).id_of("<|im_ende|>")
    (qwen / "qwen.tiktoken").unlink()
    files = "tokenizer.json, tokenizer.model, spiece.model, qwen.tiktoken"
    message = re.escape(f"{tmp_path}: no tokenizer here; looked for {files}")
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: not JSON"):
        Tokenizer.from_folder(tmp_path)


def test_the_digits_vocabulary_is_specials_words_digits_and_marks():
    tokenizer = digits_tokenizer()
    assert tokenizer.vocab_size == 26  # by hand: 5 special tokens, 6 task words, 10 digits, 5 marks of a box
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.id_of("<image>")) == (0, 1, 2, 3)
    assert tokenizer.encode("read transcribe count locate row column") == [5, 6, 7, 8, 9, 10]
    assert tokenizer.encode("0123456789") == list(range(11, 21))
    assert tokenizer.encode("<box></box>(),") == [21, 22, 23, 24, 25]


@pytest.mark.parametrize(
    "text",
    [
        "<box>(12,30),(450,999)</box>",
        "<box>(0,0),(999,999)</box>",
        "7419",
        "0",
        "12",
        "read row 2 column 3",
        "read row 12 column 10",
        "transcribe row 2",
        "count 7",
        "locate 0",
    ],
)
def test_canonical_texts_of_the_digit_pages_come_back_exactly(text):
    tokenizer = digits_tokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_each_digit_is_one_token_and_spaces_between_them_are_dropped():
    tokenizer = digits_tokenizer()
    assert tokenizer.encode("7 4 1 9") == tokenizer.encode("7419") == [18, 15, 12, 20]
    assert len(tokenizer.encode("<box>(12,30),(450,999)</box>")) == 19


def test_the_vocabulary_of_pages_of_text_is_specials_words_and_characters():
    tokenizer = documents_tokenizer()
    assert tokenizer.vocab_size == 45  # by hand: 5 special tokens, 4 words, 26 letters, 10 digits
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.id_of("<image>")) == (0, 1, 2, 3)
    assert tokenizer.encode("READ LINE OF BY") == [5, 6, 7, 8]
    assert tokenizer.encode("az09") == [9, 34, 35, 44]
    assert tokenizer.encode("read7by4") == [26, 13, 9, 12, 42, 10, 33, 39]  # letters of a page are no words
    for text in ("READ 8 BY 16", "READ LINE 3 OF 8 BY 16", "READ LINE 12 OF 16 BY 16", "read7by4", "x"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_left_out_of_decoded_text():
    tokenizer = digits_tokenizer()
    ids = [tokenizer.bos_id, *tokenizer.encode("count 7"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "count 7"


def test_the_ids_of_a_text_are_the_callers_own():
    tokenizer = digits_tokenizer()
    tokenizer.encode("count 7").append(99)
    assert tokenizer.encode("count 7") == [7, 18]


def test_a_tokenizer_file_is_read_with_its_own_names(tmp_path):
    vocabulary = {"[PAD]": 0, "[S]": 1, "[E]": 2, "[I]": 3, "[U]": 4, "a": 5, "cat": 6}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[U]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[PAD]", "[S]", "[E]", "[I]", "[U]"])
    path = tmp_path / "tokenizer.json"
    backend.save(str(path))
    names = {"pad_token": "[PAD]", "bos_token": "[S]", "eos_token": "[E]", "image_token": "[I]"}
    tokenizer = Tokenizer.from_file(path, names)
    assert tokenizer.encode("a cat") == [5, 6]
    assert tokenizer.decode([1, 5, 6, 2]) == "a cat"
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.unknown_id) == (0, 1, 2, 4)
    assert tokenizer.id_of(tokenizer.names["image_token"]) == 3
    with pytest.raises(
        TokenizerError, match=tried("{bos_token '<s>', eos_token '<eos>'} not in its vocabulary; use the names in")
    ):
        Tokenizer.from_file(path, {**names, "bos_token": "<s>", "eos_token": "<eos>"})


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text('{"model": 3}')
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: not a tokenizer\.json of the tokenizers library"):
        Tokenizer.from_file(path, {})
