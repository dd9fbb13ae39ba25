"""Tokenizer files of a few hundred pieces, made on the spot."""

import base64
import io

import sentencepiece

TEXTS = (
    "the quick brown fox jumps over the lazy dog",
    "hello world, hello there",
    "the dog in the image",
    "你好 世界 图片",
    "a  b   c\n\nd",
)


def sentencepiece_model(**settings) -> bytes:
    """Trained as Llama's was: pairs, bytes for what it lacks, spaces as they are."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        **{
            "vocab_size": 350,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "hard_vocab_limit": False,
            "allow_whitespace_only_pieces": True,
            "character_coverage": 1.0,
            "minloglevel": 2,
            **settings,
        },
    )
    return model.getvalue()


def tiktoken_ranks() -> bytes:
    """The 256 bytes, and pairs that spell `the` and ` dog`."""
    tokens = [bytes([value]) for value in range(256)]
    tokens += [b"th", b"the", b" d", b"og", b" dog", "图".encode()[:2], "图".encode()]
    return b"\n".join(base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens))
