"""DeepSeek-OCR 2 in the format of its release, with the weights of a model of transformers."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import DeepseekOcr2ImageProcessorPil

import vlm_jax
from vlm_jax.generation.sampling import Sampling

from .processors import same_wholes_and_tiles, tokenizer
from .systems import SAM, TEXT, calmed, randomised

PAD = "<｜▁pad▁｜>"
WIDTH = 64  # one head, as the release's code has heads of 64
QUESTION = [{"role": "user", "content": "<image>\nFree OCR. "}]
EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
SIZES = {**TEXT, **EXPERTS, "num_hidden_layers": 3}


def port():
    """A processor and a model of transformers in the sizes that the release's code fixes."""
    processor = transformers.DeepseekOcr2Processor(
        DeepseekOcr2ImageProcessorPil(), tokenizer(PAD, image_token="<image>"), chat_template=None
    )
    tower = {
        "sam_config": {**SAM, "num_hidden_layers": 2, "image_size": 1024, "patch_size": 16, "window_size": 14}
        | {"global_attn_indexes": [1], "downsample_channels": [12, WIDTH]},
        "encoder_config": {
            "hidden_size": WIDTH,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "vocab_size": 1,
        },
    }
    kinds = ["dense", "sparse", "sparse"]
    config = transformers.DeepseekOcr2Config(
        vision_config=tower,
        text_config={**SIZES, "vocab_size": len(processor.tokenizer), "mlp_layer_types": kinds},
        image_token_id=processor.image_token_id,
    )
    return processor, calmed(randomised(transformers.DeepseekOcr2ForConditionalGeneration(config)))


def released(vocabulary):
    """The config of the release for these sizes; its number of channels has no effect, as its code has another."""
    sam = {"width": SAM["hidden_size"], "layers": 2, "heads": 2, "global_attn_indexes": [1]}
    return {
        "architectures": ["DeepseekOCR2ForCausalLM"],
        "model_type": "deepseek_vl_v2",
        "tile_tag": "2D",
        "vision_config": {
            "image_size": 1024,
            "model_name": "deepencoderv2",
            "width": {"qwen2-0-5b": {"dim": WIDTH}, "sam_vit_b": {**sam, "downsample_channels": [512, 1024]}},
        },
        "projector_config": {"input_dim": WIDTH, "n_embed": TEXT["hidden_size"], "projector_type": "linear"},
        **{key: value for key, value in SIZES.items() if value is not None},
        "vocab_size": vocabulary,
        "first_k_dense_replace": 1,
        "use_mla": False,
        "kv_lora_rank": None,
        "q_lora_rank": None,
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Their processor and model, and ours from the same tensors with a config of the release."""
    folder = tmp_path_factory.mktemp("release")
    processor, model = port()
    model.save_pretrained(folder / "saved")
    processor.tokenizer.save_pretrained(folder)
    shutil.copy(folder / "saved" / "model.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(released(len(processor.tokenizer))))
    return processor, model, vlm_jax.from_pretrained(folder)


@pytest.mark.parametrize("size", [(700, 1400), (768, 512)], ids=["two tiles", "no tiles"])
def test_the_release_from_an_image_to_an_answer(pair, size):
    """Pads are even, for which both formats round alike; the prompt is stripped, as by the release's code."""
    processor, model, ours = pair
    draw = np.random.default_rng(0).integers(0, 255, (size[0] // 20, size[1] // 20, 3), np.uint8)
    picture = Image.fromarray(draw).resize(size[::-1])
    inputs = processor(images=picture, text="<image>\nFree OCR.", return_tensors="pt")
    batch = ours.processor(QUESTION, [picture])
    np.testing.assert_array_equal(batch.tokens, inputs["input_ids"])
    same_wholes_and_tiles(batch, inputs)
    with torch.no_grad():
        expected = model(**inputs).logits.numpy()
        said = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    found = np.asarray(ours.logits(batch))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    answer = ours.generate(QUESTION, [picture], max_new_tokens=8)
    assert list(answer.tokens) == said[0, inputs["input_ids"].shape[1] :].tolist()


def test_ngrams_are_repeated_unless_asked(pair):
    """The release's `infer` asks `generate` for 20, without a window; its files and those for transformers do not."""
    processor, model, ours = pair
    picture = Image.new("RGB", (512, 768), "gray")
    inputs = processor(images=picture, text="<image>\nFree OCR.", return_tensors="pt")
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert ours.system.sampling == Sampling()
    found = {}
    for size in (0, 2):
        sampling = Sampling(no_repeat_ngram=size) if size else None
        found[size] = list(ours.generate(QUESTION, [picture], max_new_tokens=12, sampling=sampling).tokens)
        said = model.generate(**inputs, **options, no_repeat_ngram_size=size)
        assert found[size] == said[0, inputs["input_ids"].shape[1] :].tolist()
    assert found[0] != found[2]
