"""Prismatic beside what all systems are tested for: strategies of resizing, one tower, turns, labels, and refusals."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import sentencepiece
import torch

import vlm_jax
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.known import describe_known
from vlm_jax.pretrained.prismatic import BACKBONES, MODELS, sizes_of, towers

from ..advice import tried
from ..processors.vocabularies import sentencepiece_model
from .prismatic import PLACE, REGISTRY, PrismaticProcessor, prismatic
from .processors import SIZES, conversation, official, pictures

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)


@pytest.fixture(scope="module")
def fused(tmp_path_factory):
    return prismatic(tmp_path_factory.mktemp("fused"))


@pytest.mark.parametrize("strategy", ["letterbox", "resize-crop"])
def test_pixels_by_strategy(tmp_path, strategy):
    """Sides whose difference is odd have a canvas that is not square."""
    theirs = PrismaticProcessor(strategy)
    _, _, ours = prismatic(tmp_path, strategy)
    images = pictures(len(SIZES))
    assert any((height - width) % 2 for height, width in SIZES)
    wanted = np.stack([theirs.pixels(image).numpy() for image in images]).transpose(0, 2, 3, 1)
    tiles = ours.processor.views.images(images)
    found = np.concatenate([np.concatenate([one.pixels, one.low], axis=-1) for one in tiles])
    np.testing.assert_allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("name", ["dinov2", "siglip"])
def test_one_tower(tmp_path, name):
    """Two layers in its projector; with the statistics of SigLIP, as the release's processor has by default."""
    theirs, model, ours = prismatic(tmp_path, "letterbox", (name,))
    inputs = official(theirs, conversation(1), pictures(1))
    batch = ours.processor(conversation(1), pictures(1))
    np.testing.assert_array_equal(batch.tokens, inputs["input_ids"])
    np.testing.assert_allclose(batch.images[0], np.moveaxis(inputs["pixel_values"], 1, -1), atol=1e-5)
    with torch.no_grad():
        expected = model(**{key: torch.from_numpy(value) for key, value in inputs.items()}).logits.numpy()
    found = np.asarray(ours.logits(batch))
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    ours.save_pretrained(tmp_path / "ours")
    again, report = type(model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    for key, tensor in again.language_model.state_dict().items():
        assert torch.equal(tensor, model.language_model.state_dict()[key])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama2-7b-pure", "In: What is é this? 12\nOut: A cat.</s>In: Sure?\nOut:"),
        ("vicuna-v15-7b", f"{SYSTEM} USER: What is é this? 12 ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"),
        ("mistral-v0.1-7b-pure", "In: What is é this? 12\nOut: A cat.</s>In: Sure?\nOut:"),
        ("mistral-v0.1-7b-instruct", "[INST] What is é this? 12 [/INST] A cat.</s>[INST] Sure? [/INST]"),
        (
            "llama2-13b-chat",
            "[INST] <<SYS>\nYou are a helpful language and vision assistant. You are able to understand the visual "
            "content that the user provides, and assist the user with a variety of tasks using natural language.\n"
            "<</SYS>>\n\nWhat is é this? 12 [/INST] A cat.</s><s>[INST] Sure? [/INST]",
        ),
    ],
)
def test_turns_of_each_language_model(fused, tmp_path, name, expected):
    """The prompts of the release's builders, as its scripts write them, with the images after the start token."""
    ours = _copied(fused[2], tmp_path, llm_backbone_id=name)
    tokens = ours.processor(conversation(1), pictures(1)).tokens[0].tolist()
    ids = fused[0].tokenizer(expected)["input_ids"]
    assert tokens == [ids[0], *[PLACE] * 25, *ids[1:]]
    assert ours.processor(conversation(0)).tokens[0].tolist() == ids


def test_a_config_without_a_language_model_has_vicunas_turns(fused, tmp_path):
    """The default of configuration_prismatic.py."""
    _copied(fused[2], tmp_path)
    path = tmp_path / "config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "llm_backbone_id"}))
    tokens = vlm_jax.from_pretrained(tmp_path).processor([{"role": "user", "content": "Why?"}]).tokens[0].tolist()
    assert tokens == fused[0].tokenizer(f"{SYSTEM} USER: Why? ASSISTANT:")["input_ids"]


def test_a_prompt_of_openvla_ends_with_a_space(fused, tmp_path):
    """Which `predict_action` appends as the token `▁`, where the prompt does not end with it."""
    plain, ours = fused[2], _copied(fused[2], tmp_path, model_type="openvla")
    asked, images = conversation(1), pictures(1)
    prompt = plain.processor(asked, images).tokens[0].tolist()
    space = fused[0].tokenizer(" ", add_special_tokens=False)["input_ids"]
    assert ours.processor(asked, images).tokens[0].tolist() == [*prompt, *space]
    answered = [one.processor.batch([asked[:2]], [images], targets=True) for one in (plain, ours)]
    np.testing.assert_array_equal(answered[0].tokens, answered[1].tokens)
    # By a tokenizer as Llama's, whose texts begin with a space of their own.
    model = sentencepiece_model()
    for file in tmp_path.glob("*token*.json"):
        file.unlink()
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<unk>"}))
    spell = sentencepiece.SentencePieceProcessor(model_proto=model)
    processor = dataclasses.replace(vlm_jax.from_pretrained(tmp_path).processor, table_rows=None)
    tokens = processor(asked[2:]).tokens[0].tolist()
    assert tokens == [spell.bos_id(), *spell.encode("In: Sure?\nOut:"), spell.piece_to_id("▁")]


def test_a_system_message(fused, tmp_path):
    said = [{"role": "system", "content": " Be kind. "}, {"role": "user", "content": "Why?"}]
    for name, expected in (
        ("vicuna-v15-7b", "Be kind. USER: Why? ASSISTANT:"),
        ("llama2-7b-chat", "[INST] <<SYS>\nBe kind.\n<</SYS>>\n\nWhy? [/INST]"),
    ):
        (tmp_path / name).mkdir()
        ours = _copied(fused[2], tmp_path / name, llm_backbone_id=name)
        assert ours.processor(said).tokens[0].tolist() == fused[0].tokenizer(expected)["input_ids"]
    with pytest.raises(ValueError, match=tried("put its text in the first question")):
        fused[2].processor(said)
    fused[2].processor([{**said[1], "content": "Be kind. Why?"}])


def test_answers_and_their_end_are_learned(fused):
    """The labels of the release's dataset: a turn's own ids, of answers only."""
    theirs, _, ours = fused
    messages = [*conversation(1)[:2], *conversation(0)[2:], {"role": "assistant", "content": "  No. "}]
    batch = ours.processor.batch([messages], [pictures(1)], targets=True)
    turns = ["In: What is é this? 12\nOut:", " A cat.</s>", "In: Sure?\nOut:", " No.</s>"]
    labels, ids = [], []
    for number, turn in enumerate(turns):
        own = theirs.tokenizer(turn, add_special_tokens=number == 0)["input_ids"]
        own = [own[0], *[PLACE] * 25, *own[1:]] if number == 0 else own
        ids += own
        labels += own if number % 2 else [-100] * len(own)
    np.testing.assert_array_equal(batch.tokens[0], ids)
    found = np.where(batch.loss_weights[0, :-1] > 0, batch.targets[0, :-1], -100)
    np.testing.assert_array_equal(found, labels[1:])


def test_features_are_chosen_by_a_reducer(fused):
    """Of two towers those that compare features; the others ask for the attention of one."""
    ours = fused[2].with_budget(9, reducer="divprune")
    batch = ours.processor(conversation(1), pictures(1))
    assert (np.asarray(batch.visual_index) >= 0).sum() == 9
    logits = jax.jit(lambda p, b: ours.module.apply({"params": p}, b))(ours.params, batch)
    assert np.isfinite(logits).all()


def test_the_released_towers():
    """Each name of the release has sizes; both towers of a pair have one grid."""
    for name, (names, side) in BACKBONES.items():
        settings = {"model_type": "prismatic", "vision_backbone_id": name}
        assert towers(settings, "prismatic") == tuple(
            (tower, side, "quick_gelu" if "_clip_" in tower else None) for tower in names
        )
        patches = {sizes_of(tower, settings, "prismatic")["patch_size"] for tower in names}
        assert len(patches) == 1 and set(names) <= MODELS.keys()
    module = describe_known("openvla/openvla-7b").module
    assert module.encoder.grid(224, 224) == (16, 16) and module.encoder.features == 1024 + 1152


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vision_backbone_id": "dino", "timm_model_ids": None}, "vision_backbone_id: unknown 'dino'"),
        ({"image_sizes": [20, 24]}, "image_sizes: expected one size for both towers"),
        ({"image_sizes": [3, 3]}, "image_sizes: expected at least a patch, 4, got 3"),
        ({"use_fused_vision_backbone": False}, "timm_model_ids: expected 1 where use_fused_vision_backbone is false"),
        ({"llm_backbone_id": "opt-1b"}, "llm_backbone_id: expected a name of llama2"),
        ({"timm_override_act_layers": ["tanh", None]}, "timm_override_act_layers: expected"),
        ({"model_registry": {**REGISTRY, "siglip": {"patch_size": 4}}}, "siglip: expected the keys width, depth"),
        ({"model_registry": {**REGISTRY, "siglip": {"colour": 4}}}, "siglip.colour"),
        (
            {"model_registry": {**REGISTRY, "siglip": {**REGISTRY["siglip"], "patch_size": 5}}},
            "expected two towers with the same grid",
        ),
    ],
)
def test_other_configs_are_refused(fused, tmp_path, settings, message):
    with pytest.raises(PretrainedError, match=message):
        _copied(fused[2], tmp_path, **settings)


def test_sizes_of_a_tower_that_is_not_known(fused, tmp_path):
    names = ["dinov2", "siglip_tiny"]
    with pytest.raises(PretrainedError, match=tried("add them, as fields of ViT, under model_registry")):
        _copied(fused[2], tmp_path, timm_model_ids=names)
    again = _copied(
        fused[2], tmp_path, timm_model_ids=names, model_registry={**REGISTRY, "siglip_tiny": REGISTRY["siglip"]}
    )
    assert again.module == fused[2].module


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_resize_strategy": "shrink"}, "image_resize_strategy: expected"),
        ({"tvf_do_letterbox": True}, "tvf_do_letterbox: expected False"),
        ({"input_sizes": [[3, 24, 24]]}, r"input_sizes: expected \[3, 20, 20\], as in the model"),
        ({"interpolations": ["bicubic", "bilinear"]}, "interpolations: expected one filter for both towers"),
        ({"tvf_normalize_params": None, "means": [[0.5] * 3]}, "means: expected those of 2 towers, got 1"),
    ],
)
def test_other_image_processors_are_refused(fused, tmp_path, settings, message):
    path = tmp_path / "preprocessor_config.json"
    _copied(fused[2], tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    with pytest.raises(PretrainedError, match=message):
        vlm_jax.from_pretrained(tmp_path).processor(conversation(1), pictures(1))


def _copied(ours, folder, **settings):
    """The folder of a model with other settings, loaded."""
    for file in ours.folder.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return vlm_jax.from_pretrained(folder)
