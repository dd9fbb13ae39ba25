"""A small release with random weights, in the format of LLaVA on the Hugging Face hub, for trying the commands."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import linen as nn
from tokenizers import decoders, models, pre_tokenizers

from vlm_jax.checkpoints.params import export_params
from vlm_jax.checkpoints.saving import check_vacant, save_checkpoint
from vlm_jax.pretrained import llava_hf
from vlm_jax.types import Tree

WIDTH, IMAGE_SIZE, PATCH_SIZE = 64, 32, 4
SPECIAL = ("<s>", "</s>", "<pad>", "<image>")
BOXES = ("<box>", "</box>")
VOCABULARY = 320  # 256 bytes, the tokens above, words, and rows that no token has
CONFIG: dict[str, Any] = {
    "model_type": "llava",
    "image_token_index": 256 + SPECIAL.index("<image>"),
    "tie_word_embeddings": False,
    "vision_config": {
        "model_type": "clip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    },
    "text_config": {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 1024,
    },
}
# As LLaVA-1.5 asks and answers; `generation` marks what is learned.
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] | upper }}:{% if m['role'] == 'assistant' %}{% generation %}"
    "{% for c in m['content'] %} {{ c['text'] }}{% endfor %}</s>{% endgeneration %}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}"
    "{% endfor %}{% endif %} {% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def write_small_release(folder: str | os.PathLike[str], *, words: tuple[str, ...] = (), seed: int = 0) -> Path:
    """Writes a LLaVA of three layers in the tower and in the language model, 64 visual tokens, and random weights.

    Its vocabulary is bytes, the tags of boxes and `words`, each a token.

    Args:
      folder: created if missing; must not contain a checkpoint.
      words: that are tokens, such as those of the questions that it will be trained on.
      seed: of the weights.

    Returns:
      The folder, for `from_pretrained`, `--checkpoint` and `--release`.

    Raises:
      CheckpointFileError: the folder contains a checkpoint.
      ValueError: more words than the vocabulary has rows for.
    """
    folder = Path(folder)
    check_vacant(folder)
    room = VOCABULARY - 256 - len(SPECIAL) - len(BOXES)
    if len(words) > room:
        raise ValueError(f"words: expected at most {room}, got {len(words)}; pass fewer")
    folder.mkdir(parents=True, exist_ok=True)
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    files = {
        "config.json": CONFIG,
        "preprocessor_config.json": {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": size},
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    _tokenizer(words).save(str(folder / "tokenizer.json"))
    empty = {"vision_tower.vision_model.embeddings.class_embedding": (WIDTH,)}
    empty |= {"multi_modal_projector.linear_2.weight": (WIDTH, WIDTH)}
    empty |= {"language_model.model.embed_tokens.weight": (1, 1), "language_model.lm_head.weight": (1, 1)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in empty.items()}
    described = llava_hf.describe(CONFIG, tensors, dtype=jnp.float32, param_dtype=jnp.float32)
    rng = np.random.default_rng(seed)

    def drawn(path: tuple[Any, ...], leaf: Tree) -> np.ndarray:
        if jax.tree_util.keystr(path).endswith("['scale']"):
            return np.ones(leaf.shape, np.float32)
        return rng.normal(scale=0.1, size=leaf.shape).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(drawn, nn.meta.unbox(described.boxed_shapes()))
    save_checkpoint(folder, export_params(described.rules, params))
    return folder


def _tokenizer(words: tuple[str, ...]) -> tokenizers.Tokenizer:
    """Bytes, special tokens, tags of boxes and words."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(models.BPE(alphabet, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    made.add_special_tokens(list(SPECIAL))
    made.add_tokens([*BOXES, *words])
    head = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    made.post_processor = head  # type: ignore[assignment]
    return made
