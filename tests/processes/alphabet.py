"""A language model that outputs the alphabet: whatever letter it read last, the next one; `<end>` after z.

Its layer adds nothing, its table is the identity, and its head moves one token on.
"""

import json

import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TOKENS = [*LETTERS, "<end>", "<pad>", "<unk>"]
CONFIG = {
    "model_type": "llama",
    "vocab_size": len(TOKENS),
    "hidden_size": len(TOKENS) + 1,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "tie_word_embeddings": False,
}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def write(folder) -> None:
    """Writes the released files of the model."""
    vocab, width = CONFIG["vocab_size"], CONFIG["hidden_size"]
    table = np.eye(vocab, width, dtype=np.float32)
    zeros = np.zeros((width, width), np.float32)
    layer = {
        "input_layernorm.weight": np.ones(width, np.float32),
        "post_attention_layernorm.weight": np.ones(width, np.float32),
        **{f"self_attn.{name}_proj.weight": zeros.copy() for name in "qkvo"},
        **{f"mlp.{name}_proj.weight": np.zeros((4, width), np.float32) for name in ("gate", "up")},
        "mlp.down_proj.weight": np.zeros((width, 4), np.float32),
    }
    tensors = {
        "model.embed_tokens.weight": table,
        "model.norm.weight": np.ones(width, np.float32),
        "lm_head.weight": np.roll(table, 1, axis=0),
        **{f"model.layers.0.{name}": tensor for name, tensor in layer.items()},
    }
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    backend = tokenizers.Tokenizer(models.WordLevel({token: i for i, token in enumerate(TOKENS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<end>", "<pad>", "<unk>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<pad>"}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [TOKENS.index("<end>"), 27]}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
