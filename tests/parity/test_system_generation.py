"""Whole systems of transformers beside ours: a folder, messages and pictures in, the same answer out."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

import vlm_jax
from vlm_jax.budget import InfeasibleBudget
from vlm_jax.generation.text import complete

from .test_processors import (
    VISION,
    conversation,
    llava_next_processor,
    official,
    pictures,
    qwen,
    save,
    template,
    tokenizer,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
NEW = 32
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": None,
    "bos_token_id": None,
}


def randomised(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name and name.endswith("weight")), std=0.3)
    model.generation_config.eos_token_id = None
    return model.eval()


CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    **VISION,
}


def llava(folder):
    processor = transformers.LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        tokenizer(image_token="<image>"),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )
    config = transformers.LlavaConfig(
        vision_config=CLIP,
        text_config={"model_type": "llama", "vocab_size": len(processor.tokenizer), **TEXT},
        image_token_id=processor.image_token_id,
    )
    return saved(folder, processor, transformers.LlavaForConditionalGeneration(config))


def llava_next(folder):
    processor = llava_next_processor()
    config = transformers.LlavaNextConfig(
        vision_config=CLIP,
        text_config={"model_type": "mistral", "vocab_size": len(processor.tokenizer), **TEXT},
        image_token_id=processor.image_token_id,
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
    )
    return saved(folder, processor, transformers.LlavaNextForConditionalGeneration(config))


def internvl(folder):
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    processor = transformers.InternVLProcessor(
        GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=6),
        tokenizer(**names, video_token="<video>"),
        None,
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>"),
    )
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [28, 28],
        "patch_size": [7, 7],
    }
    config = transformers.InternVLConfig(
        vision_config=vision,
        text_config={"model_type": "qwen2", "vocab_size": len(processor.tokenizer), **TEXT},
        image_token_id=processor.image_token_id,
    )
    return saved(folder, processor, transformers.InternVLForConditionalGeneration(config))


def qwen_vl(folder, kind, config, model, vision):
    processor, _, _ = qwen(kind, folder)
    ids = {
        name: processor.tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        }.items()
    }
    text = {
        "vocab_size": len(processor.tokenizer),
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1000.0},
        **TEXT,
    }
    vision = {"depth": 2, "num_heads": 2, "patch_size": 4, **vision}
    return saved(folder, processor, model(config(text_config=text, vision_config=vision, **ids)))


def qwen2_vl(folder):
    vision = {"embed_dim": 16, "mlp_ratio": 2, "hidden_size": 32}
    classes = transformers.Qwen2VLConfig, transformers.Qwen2VLForConditionalGeneration
    return qwen_vl(folder, "qwen2_vl", *classes, vision)


def qwen2_5_vl(folder):
    vision = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "out_hidden_size": 32,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    classes = transformers.Qwen2_5_VLConfig, transformers.Qwen2_5_VLForConditionalGeneration
    return qwen_vl(folder, "qwen2_5_vl", *classes, vision)


def saved(folder, processor, model):
    save(processor, folder)
    randomised(model).save_pretrained(folder)
    return processor, model, vlm_jax.from_pretrained(folder)


@pytest.fixture(
    scope="module", params=[llava, llava_next, internvl, qwen2_vl, qwen2_5_vl], ids=lambda made: made.__name__
)
def system(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # Processors with videos check their parts against classes that only torchvision brings.
        patch.setattr(transformers.ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
        return request.param(tmp_path_factory.mktemp(request.param.__name__))


def said(system, messages, images):
    processor, model, _ = system
    inputs = official(processor, messages, images)
    inputs = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
    ends = {"eos_token_id": processor.tokenizer.eos_token_id}  # no config names another
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": processor.tokenizer.pad_token_id, **ends}
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return ids.tolist(), processor.tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_an_answer_about_pictures(system, count):
    ids, text = said(system, conversation(count), pictures(count))
    answer = system[2].generate(conversation(count), pictures(count), max_new_tokens=NEW, chunk=9)
    assert list(answer.tokens) == ids and answer.text == text
    assert len(set(ids)) > 2


def test_a_budget_of_visual_tokens(system):
    ours = system[2]
    with pytest.raises(InfeasibleBudget):
        ours.generate(conversation(1), pictures(1), max_new_tokens=1, max_visual_tokens=0)
    answer = ours.generate(conversation(1), pictures(1), max_new_tokens=4, max_visual_tokens=10**6)
    assert answer.tokens == ours.generate(conversation(1), pictures(1), max_new_tokens=4).tokens


def test_answers_of_a_ragged_batch(system):
    ours = system[2]
    given = [(conversation(1), pictures(1)), (conversation(1), pictures(3)[2:])]
    batch = ours.processor.batch(*zip(*given, strict=True))
    answers = complete(ours.module, ours.params, batch, ours.tokenizer, end_ids=ours.end_ids, max_new_tokens=NEW)
    assert [list(answer.tokens) for answer in answers] == [said(system, *each)[0] for each in given]


def test_the_command_line(system, tmp_path):
    """A process for each system: pictures from files, the answer on standard output."""
    images = pictures(2)
    for name, image in zip("ab", images, strict=True):
        image.save(tmp_path / f"{name}.png")
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    _, text = said(system, [{"role": "user", "content": content}], images)
    words = [sys.executable, "-m", "vlm_jax.cli.generate", "--checkpoint", str(system[2].folder), "--prompt", "What?"]
    words += ["--image", "a.png", "--image", "b.png", "--max_new_tokens", str(NEW), "--compilation_cache", ""]
    words += ["--draw", "out.png"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert done.stdout.decode() == text + "\n", done.stderr.decode()
    # The answer of a random model has no box.
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(images[0]))
