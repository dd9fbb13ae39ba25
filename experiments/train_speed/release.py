"""A random Qwen2.5-VL of 100 M parameters as a released folder, and training rows of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

TEXT = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 10, "num_attention_heads": 12,
        "num_key_value_heads": 4}  # fmt: skip
TOWER = {"hidden_size": 384, "intermediate_size": 1024, "depth": 8, "num_heads": 6, "patch_size": 14,
         "window_size": 112, "fullatt_block_indexes": [3, 7], "out_hidden_size": 768}  # fmt: skip
SIDE, VOCABULARY = 448, 32_000  # pixels of a picture of 256 visual tokens
TINY_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2}  # fmt: skip
TINY_TOWER = {"hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_heads": 2, "patch_size": 4,
              "window_size": 16, "fullatt_block_indexes": [1], "out_hidden_size": 32}  # fmt: skip
TINY_SIDE, TINY_VOCABULARY = 32, 400
TAGS = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% if m['role'] == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write(folder: Path, text: dict[str, Any], tower: dict[str, Any], vocabulary: int, side: int) -> None:
    """Weights and config by `transformers`, and the files of the tokenizer, of bytes, and the processor."""
    import tokenizers
    import torch
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>", *TAGS])
    ids = [backend.token_to_id(tag) for tag in TAGS]
    names = ("vision_start_token_id", "image_token_id", "video_token_id", "vision_end_token_id")
    eighth = text["hidden_size"] // text["num_attention_heads"] // 8
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2 * eighth, eighth, eighth]}
    config = Qwen2_5_VLConfig(
        text_config={**text, "vocab_size": vocabulary, "rope_parameters": rope, "max_position_embeddings": 4096,
                     "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None},
        vision_config=tower,
        tie_word_embeddings=True,
        **dict(zip(names, ids, strict=True)),
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    backend.save(str(folder / "tokenizer.json"))
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    size = {"shortest_edge": side**2 // 64, "longest_edge": side**2}
    images = {"patch_size": tower["patch_size"], "merge_size": 2, "size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))


def sample(seed: int, side: int, text_places: int) -> Any:
    """A conversation about a picture of side x side pixels, with so many places that are not visual tokens."""
    from vlm_jax.types import Sample, Turn, dialogue

    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 255, (side, side, 3), np.uint8)
    answer = "".join(chr(letter) for letter in draw.integers(97, 123, text_places - len("user:What?assistant:") - 3))
    return Sample(str(seed), dialogue([Turn("What?", answer)], num_images=1), (pixels,))


def sizes(tiny: bool) -> tuple[dict[str, Any], dict[str, Any], int, int]:
    """Sections of the config, the side of a picture in pixels, and the vocabulary."""
    return (TINY_TEXT, TINY_TOWER, TINY_SIDE, TINY_VOCABULARY) if tiny else (TEXT, TOWER, SIDE, VOCABULARY)
