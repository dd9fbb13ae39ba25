"""Whole systems of transformers compared with ours: one saved folder, one conversation, to the same answer and back."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file, save_file

import vlm_jax
from vlm_jax.budget import InfeasibleBudget
from vlm_jax.generation.text import Completion, complete
from vlm_jax.types import TwoSizes

from .prismatic import prismatic
from .processors import (
    ABOUT_A_VIDEO,
    conversation,
    filled_patches,
    frames,
    llava_processor,
    navit_patches,
    official,
    official_video,
    patches_of,
    pictures,
    same_ids,
    same_two_sizes,
    same_wholes_and_tiles,
    save,
)
from .systems import (
    CLIP,
    TEXT,
    deepseek_ocr2,
    deepseek_vl,
    deepseek_vl_hybrid,
    gemma3,
    gemma4,
    gemma4_moe,
    gemma4_shared,
    idefics3,
    internvl,
    internvl_moe,
    llava,
    llava_next,
    llava_onevision,
    minicpm_v,
    minicpm_v_4x,
    ovis2,
    qwen2_5_omni,
    qwen2_5_omni_thinker,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_5_moe,
    qwen3_vl,
    qwen3_vl_moe,
    smolvlm,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]


NEW = 32


SYSTEMS = (
    llava,
    llava_next,
    llava_onevision,
    deepseek_ocr2,
    deepseek_vl,
    deepseek_vl_hybrid,
    gemma3,
    gemma4,
    gemma4_moe,
    gemma4_shared,
    idefics3,
    internvl,
    internvl_moe,
    minicpm_v,
    minicpm_v_4x,
    ovis2,
    prismatic,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_5,
    qwen3_5_moe,
    qwen2_5_omni,
    qwen2_5_omni_thinker,
    qwen3_vl,
    qwen3_vl_moe,
    smolvlm,
)


VIDEOS = (
    *("gemma4", "internvl", "llava_onevision", "minicpmv4_6", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker"),
    *("qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe"),
    "smolvlm",
)


FPS = 2.0
OPTIONS = {"max_new_tokens": NEW, "chunk": 9, "processor_options": {"fps": FPS}}  # the same for few programs


INPUTS = {
    "text": (conversation(0), [], []),
    "two images": (conversation(2), pictures(2), []),
    # Fewer times than columns: positions after it are equal in the release and the port.
    "a video": (ABOUT_A_VIDEO, [], [frames(4)]),
}


@pytest.fixture(scope="module", params=SYSTEMS, ids=lambda made: made.__name__)
def system(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


def prepared(system, messages, images, videos=()):
    """What their processor makes of a conversation, and what their model is given of it."""
    processor = system[0]
    if videos:
        inputs = official_video(processor, messages, *videos, FPS)
    else:
        inputs = official(processor, messages, images)
    return inputs, {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}


def logits_of(model, given):
    with torch.no_grad():
        return model(**given).logits.numpy()


def said(system, *conversation, **more):
    processor, model, _ = system
    _, inputs = prepared(system, *conversation)
    ends = {"eos_token_id": processor.tokenizer.eos_token_id}  # no config names another
    options = {
        "max_new_tokens": NEW,
        "do_sample": False,
        "pad_token_id": processor.tokenizer.pad_token_id,
        **ends,
        **more,
    }
    ids = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
    return ids.tolist(), processor.tokenizer.decode(ids, skip_special_tokens=True)


def same_pixels(ours, theirs, kind):
    if "high_res_pixel_values" in theirs:
        same_two_sizes(ours, theirs, kind)
    elif places := {"image_position_ids", "video_position_ids"} & set(theirs):
        wanted = filled_patches(theirs, places.pop().removesuffix("_position_ids"), kind.pooling_kernel_size)
        np.testing.assert_allclose(patches_of(ours.images), wanted, atol=1e-5)
    elif places := {"target_sizes", "target_sizes_videos"} & set(theirs):
        medium = "video" if places == {"target_sizes_videos"} else "image"
        wanted = navit_patches(theirs, medium, 2 if kind.downsample_mode == "4x" else 4)
        np.testing.assert_allclose(patches_of(ours.images), wanted, atol=1e-5)
    elif "num_local_patches" in theirs:
        same_wholes_and_tiles(ours, theirs)
    elif isinstance(ours.images, TwoSizes):  # of one size, with the statistics of each tower
        found = np.concatenate([ours.images.high[0], ours.images.low[0]], axis=-1)
        np.testing.assert_allclose(found, np.moveaxis(theirs["pixel_values"], 1, -1), atol=1e-5)
    elif name := {"pixel_values", "pixel_values_videos"} & set(theirs):
        wanted = np.asarray(theirs[name.pop()])
        if wanted.ndim > 2:  # tiles, without the blank ones of LLaVA-NeXT
            wanted = np.moveaxis(wanted.reshape(-1, *wanted.shape[-3:]), 1, -1)
            wanted = wanted[wanted.any((1, 2, 3))]
        found = patches_of(ours.images) if wanted.ndim == 2 else ours.images[0]
        np.testing.assert_allclose(found, wanted, atol=1e-5)
    else:
        assert ours.images is None


@pytest.mark.parametrize("name", INPUTS)
def test_from_a_conversation_to_the_answer(system, name):
    messages, images, videos = INPUTS[name]
    _, model, ours = system
    if videos and model.config.model_type not in VIDEOS:
        with pytest.raises(ValueError, match="does not support videos"):
            ours.processor(messages, images, videos)
        return
    check_answer(system, messages, images, videos)


@pytest.mark.parametrize("system", (llava_onevision,), indirect=True, ids=lambda made: made.__name__)
def test_a_single_image_on_a_canvas_of_fewer_tokens(system):
    """Two images are one tile each in this system."""
    check_answer(system, conversation(1), pictures(1))


def check_answer(system, messages, images, videos=()):
    """Ids, pixels, logits, the answer's ids and its text."""
    theirs, model, ours = system
    inputs, given = prepared(system, messages, images, videos)
    batch = ours.processor(messages, images, videos, fps=FPS)
    same_ids(batch, inputs)
    same_pixels(batch, inputs, theirs.image_processor)
    expected, found = logits_of(model, given), np.asarray(ours.logits(batch))
    assert found.dtype == np.float32 and np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    ids, text = said(system, messages, images, videos)
    answer = ours.generate(messages, images, videos, **OPTIONS)
    assert list(answer.tokens) == ids and answer.text == text
    assert len(set(ids)) > 2


def test_the_way_back(system, tmp_path):
    """What is written is what was read: for transformers, and for us, processor and all."""
    _, model, ours = system
    ours.save_pretrained(tmp_path / "ours")
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    _, given = prepared(system, *INPUTS["two images"])
    np.testing.assert_array_equal(logits_of(again, given), logits_of(model, given))
    reread = vlm_jax.from_pretrained(tmp_path / "ours").processor
    batches = [processor(*INPUTS["two images"]) for processor in (ours.processor, reread)]
    jax.tree.map(np.testing.assert_array_equal, *batches)


@pytest.mark.parametrize("system", (qwen2_5_omni, gemma4_shared), indirect=True, ids=lambda made: made.__name__)
def test_parts_that_are_not_read_are_written_back(system, tmp_path):
    """The audio encoder; of Qwen2.5-Omni the talker and the waveform decoder too."""
    ours = system[2]
    ours.save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (ours.folder, tmp_path))
    unread = {"thinker", "talker", "token2wav"} if system[1].config.model_type != "gemma4" else {"model", "lm_head"}
    assert {key.split(".")[0] for key in before} == unread and after.keys() == before.keys()
    assert any("audio_tower" in key for key in before)
    for key, tensor in before.items():
        np.testing.assert_array_equal(after[key], tensor)
    sound = [{"role": "user", "content": [{"type": "audio", "audio": "a.wav"}]}]
    with pytest.raises(ValueError, match="no item of type 'audio' is read"):
        ours.processor(sound)


def test_a_budget_of_visual_tokens(system):
    ours, (messages, images, _) = system[2], INPUTS["two images"]
    with pytest.raises(InfeasibleBudget):
        ours.generate(messages, images, max_visual_tokens=0, **OPTIONS)
    answer = ours.generate(messages, images, max_visual_tokens=10**6, **OPTIONS)
    assert list(answer.tokens) == said(system, messages, images)[0]


@pytest.mark.parametrize("system", (minicpm_v, minicpm_v_4x), indirect=True, ids=lambda made: made.__name__)
@pytest.mark.parametrize(("mode", "tokens"), [("16x", 5 * 4), ("4x", 5 * 16)])
def test_a_mode_of_downsampling_by_its_budget(system, mode, tokens):
    """As the reference gives where both its processor and its model are told the mode."""
    theirs, model, ours = system
    messages, images, _ = INPUTS["two images"]
    inputs = official(theirs, messages, images, downsample_mode=mode)
    given = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
    chosen = ours.with_budget(tokens)
    batch = chosen.processor(messages, images)
    same_ids(batch, inputs)
    with torch.no_grad():
        expected = model(**given, downsample_mode=mode).logits.numpy()
    assert np.abs(np.asarray(chosen.logits(batch)) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_answers_of_a_ragged_batch(system):
    ours = system[2]
    given = [(conversation(1), pictures(1)), (conversation(2), pictures(3)[1:])]
    batch = ours.processor.batch(*zip(*given, strict=True))
    for row, segments, each in zip(batch.tokens, batch.segment_ids, given, strict=True):
        np.testing.assert_array_equal(row[segments > 0], prepared(system, *each)[0]["input_ids"][0])
    assert (batch.segment_ids == 0).any()
    answers = complete(ours.module, ours.params, batch, ours.tokenizer, end_ids=ours.end_ids, max_new_tokens=NEW)
    assert [list(answer.tokens) for answer in answers] == [said(system, *each)[0] for each in given]


@pytest.mark.parametrize("size", (1, 2))
@pytest.mark.parametrize("system", (llava, deepseek_ocr2), indirect=True, ids=lambda made: made.__name__)
def test_ngrams_of_a_folder_are_not_repeated(system, size, tmp_path):
    """The placeholders of images are tokens of the prompt too."""
    messages, images, _ = INPUTS["two images"]
    shutil.copytree(system[2].folder, tmp_path / "folder")
    settings = {"no_repeat_ngram_size": size}
    (tmp_path / "folder" / "generation_config.json").write_text(json.dumps(settings))
    answer = vlm_jax.from_pretrained(tmp_path / "folder").generate(messages, images, **OPTIONS)
    ids, _ = said(system, messages, images, **settings)
    assert list(answer.tokens) == ids != said(system, messages, images)[0]


@pytest.mark.parametrize("system", (qwen3_vl_moe,), indirect=True, ids=lambda made: made.__name__)
def test_experts_as_the_release_stores_them(system, tmp_path):
    """With [in, out] kernels, and another key of the config; transformers turns both when it reads the release."""
    _, model, ours = system
    tensors = load_file(ours.folder / "model.safetensors")
    experts = [name for name in tensors if ".experts." in name]
    assert len(experts) == 6 and tensors[experts[0]].ndim == 3
    tensors |= {name: np.ascontiguousarray(tensors[name].swapaxes(1, 2)) for name in experts}
    config = json.loads((ours.folder / "config.json").read_text())
    config["text_config"]["num_experts"] = config["text_config"].pop("num_local_experts")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    jax.tree.map(np.testing.assert_array_equal, vlm_jax.from_pretrained(tmp_path).params, ours.params)
    for name, tensor in type(model).from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


@pytest.mark.parametrize("system", (qwen3_5_moe,), indirect=True, ids=lambda made: made.__name__)
def test_experts_in_two_tensors_as_released(system, tmp_path):
    """As [expert, out, in], gate before up; transformers reads them as they are, and writes tensors of each expert."""
    _, model, ours = system
    tensors = load_file(ours.folder / "model.safetensors")
    separate = {name: tensors.pop(name) for name in list(tensors) if ".experts." in name}
    assert len(separate) == 3 * 4 * 3 and not any(name.endswith("gate_up_proj") for name in separate)
    for name in {name.partition("experts.")[0] + "experts" for name in separate}:
        gate, up, down = (
            np.stack([separate[f"{name}.{expert}.{part}_proj.weight"] for expert in range(4)])
            for part in ("gate", "up", "down")
        )
        tensors |= {f"{name}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{name}.down_proj": down}
    shutil.copytree(ours.folder, tmp_path, dirs_exist_ok=True)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    read = vlm_jax.from_pretrained(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, read.params, ours.params)
    for name, tensor in type(model).from_pretrained(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    read.save_pretrained(tmp_path / "back")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor)


@pytest.mark.parametrize("system", (llava_next, qwen2_5_vl), indirect=True, ids=lambda made: made.__name__)
def test_the_command_line(system, tmp_path):
    """A process for tiles and one for packed patches: pictures from files, the answer on standard output."""
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


@pytest.mark.parametrize("system", (qwen3_vl_moe,), indirect=True, ids=lambda made: made.__name__)
def test_boxes_in_thousandths_of_the_image(system):
    """As Qwen3-VL's cookbooks read them, whatever the size of the model's input."""
    ours, picture = system[2], pictures(5)[4]
    text = '[{"bbox_2d": [80, 250, 500, 1000], "label": "a sign"}]'
    (box,) = ours.boxes(Completion(text, tuple(ours.tokenizer.encode(text)), "end"), picture)
    expected = [0.08 * picture.width, 0.25 * picture.height, 0.5 * picture.width, picture.height]
    np.testing.assert_allclose(box.box, expected)


def test_boxes_and_documents_in_pixels_of_what_was_seen(tmp_path):
    """Qwen2.5-VL counts pixels of the image as its processor resized it."""
    processor, _, ours = qwen2_5_vl(tmp_path)
    picture = pictures(5)[4]
    _, rows, cols = official(processor, conversation(1), [picture])["image_grid_thw"][0] * 4
    down, across = picture.height / rows, picture.width / cols
    assert (down, across) != (1, 1)
    text = '[{"bbox_2d": [8, 16, 40, 60], "label": "a sign"}]<p data-bbox="8 16 40 60">Stop</p>'
    answer = Completion(text, tuple(ours.tokenizer.encode(text)), "end")
    expected = [8 * across, 16 * down, 40 * across, 60 * down]
    (box,), (block,) = ours.boxes(answer, picture), ours.document(answer, picture)
    assert (box.name, block.text, block.tag) == ("a sign", "Stop", "p")
    np.testing.assert_allclose(box.box, expected)
    np.testing.assert_allclose(block.box, expected)
    batch = ours.processor(conversation(1), [picture], max_visual_tokens=12)
    rows, cols = 4 * np.asarray(batch.images.sizes)[0, 0]
    (box,) = ours.boxes(answer, picture, max_visual_tokens=12)
    np.testing.assert_allclose(box.box[0::2], np.array([8, 40]) * picture.width / cols)
    np.testing.assert_allclose(box.box[1::2], np.array([16, 60]) * picture.height / rows)


def test_the_boxes_of_an_answer_are_drawn(tmp_path):
    """A process, and a model whose answer is one special token: a box."""
    processor = llava_processor()
    box = "<ref>cat</ref><box>(100,250),(500,750)</box>"
    processor.tokenizer.add_special_tokens({"additional_special_tokens": [box]})
    text = {"model_type": "llama", "vocab_size": len(processor.tokenizer), **TEXT}
    config = transformers.LlavaConfig(vision_config=CLIP, text_config=text, image_token_id=processor.image_token_id)
    model = transformers.LlavaForConditionalGeneration(config)
    after = dict.fromkeys(range(len(processor.tokenizer)), processor.tokenizer.convert_tokens_to_ids(box))
    after[after[0]] = processor.tokenizer.eos_token_id
    torch.manual_seed(0)
    with torch.no_grad():  # layers that add nothing: a token alone says what follows
        for parameter in model.model.language_model.layers.parameters():
            parameter.zero_()
        table = torch.nn.functional.normalize(torch.randn(len(after), TEXT["hidden_size"]), dim=-1)
        model.get_input_embeddings().weight.copy_(table)
        model.lm_head.weight.zero_()
        for token in (processor.tokenizer.convert_tokens_to_ids(":"), after[0]):
            model.lm_head.weight[after[token]] = table[token]
    save(processor, tmp_path)
    model.save_pretrained(tmp_path)
    settings = {"eos_token_id": processor.tokenizer.eos_token_id}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    Image.new("RGB", (100, 80)).save(tmp_path / "a.png")
    words = [sys.executable, "-m", "vlm_jax.cli.generate", "--checkpoint", str(tmp_path), "--prompt", "Where?"]
    words += ["--image", "a.png", "--draw", "out.png", "--compilation_cache", ""]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, b"\n"), done.stderr.decode()
    drawn = np.asarray(Image.open(tmp_path / "out.png"))
    red = (drawn == (255, 0, 0)).all(-1)
    assert red[20, 10:51].all() and red[60, 10:51].all() and red[20:61, 10].all() and red[20:61, 50].all()
    assert not red[:20].any() and not red[61:].any() and not red[:, :10].any() and not red[:, 51:].any()
