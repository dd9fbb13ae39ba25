"""What `cli.convert` gives back is reloaded by transformers: shards, a tied head, the same logits."""

import pytest
import torch
import transformers

from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.convert import open_conversion

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"num_key_value_heads": 1, "vocab_size": 32, "max_position_embeddings": 32}


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, False), (torch.bfloat16, True)])
def test_transformers_reloads_what_was_converted_there_and_back(dtype, tied, tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SIZES, tie_word_embeddings=tied)
    model = transformers.Qwen2ForCausalLM(config).to(dtype).eval()
    model.save_pretrained(tmp_path / "released", max_shard_size="4KB")
    assert (tmp_path / "released" / "model.safetensors.index.json").exists()
    open_conversion(tmp_path / "released", FAMILIES).write(tmp_path / "orbax")
    open_conversion(tmp_path / "orbax", FAMILIES).write(tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back").eval()
    assert type(again) is type(model) and again.dtype == dtype
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
