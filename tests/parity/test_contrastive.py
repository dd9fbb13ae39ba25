"""Released CLIP, SigLIP, SigLIP 2 and ViT trained on captions: loss and gradients of transformers' models."""

import copy
import json

import jax
import numpy as np
import pytest
import torch
import transformers
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import vlm_jax
from configs import finetune_towers
from vlm_jax.build import build
from vlm_jax.checkpoints.params import export_params
from vlm_jax.data.loader import batch_at
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.input import rows
from vlm_jax.train.loop import Trainer
from vlm_jax.train.stages import parse_schedule

from .processors import pictures
from .test_image_text import BLOCKS, TEXTS, clip, official, saved, siglip, siglip2

NAMES = ("cat", "dog")


def config_of(folder, captions, **stage):
    records = []
    for number, (picture, caption) in enumerate(zip(pictures(4), captions, strict=True)):
        Image.fromarray(np.asarray(picture)).save(folder / f"{number}.png")
        records.append({"id": str(number), "image": f"{number}.png", "caption": caption})
    for name in ("train", "evaluation"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    config = finetune_towers.get_config().unlock()
    config.release = str(folder)
    config.data.update({f"{name}_path": str(folder / f"{name}.jsonl") for name in ("train", "evaluation")})
    config.stages.pairs.update({"steps": 2, "batch_size": 4, "warmup_steps": 0, **stage})
    config.mesh.update({"data": 1, "fsdp": 1})
    return config


def minimised(experiment, stage):
    """The first batch, its loss, and the gradients under the released names."""
    batch = batch_at(rows(experiment, stage, 0), 4, 0)
    mesh = make_mesh(MeshSettings(data=1), jax.devices()[:1])
    params = experiment.initial(jax.random.key(0), mesh)
    loss = stage.settings.build(experiment, tuple(params))
    (value, metrics), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, jax.random.key(0))
    return batch, value, metrics, export_params(experiment.system.release.rules, grads)


def released_gradients(model, folder):
    """The gradients of a model under the names of its files, which are not those of its modules; 0 without one."""
    holder = copy.deepcopy(model)
    with torch.no_grad():
        for target, source in zip(holder.parameters(), model.parameters(), strict=True):
            target.copy_(torch.zeros_like(source) if source.grad is None else source.grad)
    holder.save_pretrained(folder)
    return load_file(folder / "model.safetensors")


def compare(model, expected, value, grads, folder):
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    expected.backward()
    theirs = released_gradients(model, folder / "gradients")
    largest = max(np.abs(leaf).max() for leaf in theirs.values())
    assert set(theirs) == set(grads) and largest > 1e-3
    for name, leaf in theirs.items():
        np.testing.assert_allclose(grads[name], leaf, atol=1e-4 * largest, rtol=0, err_msg=name)


def order_of(sources, batch):
    """Which of the records each row of a batch is."""
    return [next(i for i, row in enumerate(sources) if np.array_equal(row, other)) for other in batch]


@pytest.mark.parametrize(("made", "loss"), [(clip, "softmax"), (siglip, "sigmoid"), (siglip2, "sigmoid")])
def test_loss_and_gradients_of_captions(tmp_path, made, loss):
    processor, model, ours = made(tmp_path)
    config = config_of(tmp_path, TEXTS, loss=loss)
    experiment = build(config)
    (span,) = parse_schedule(("pairs",), config.stages)
    batch, value, _, grads = minimised(experiment, span.stage)
    order = order_of(ours.processor(texts=TEXTS).tokens, batch.tokens)
    assert sorted(order) == [0, 1, 2, 3]
    inputs = official(processor, [pictures(4)[i] for i in order], [TEXTS[i] for i in order])
    compare(model, model(**{**inputs, "attention_mask": None}, return_loss=True).loss, value, grads, tmp_path)


def test_a_trained_release_answers_from_its_workdir_and_its_saved_folder(tmp_path, one_device):
    _, _, released = clip(tmp_path)
    config = config_of(tmp_path, TEXTS, loss="softmax")
    config.stages.pairs.learning_rates = ConfigDict({"image": 1e-3, "text": 1e-3, "log_scale": 1e-3})
    outcome = Trainer(config, build(config), one_device, tmp_path / "run").run()
    again = vlm_jax.from_pretrained(tmp_path / "run")
    jax.tree.map(np.testing.assert_array_equal, again.params, dict(outcome.params))
    batch = again.processor(images=pictures(4), texts=TEXTS)
    again.save_pretrained(tmp_path / "saved")
    saved = vlm_jax.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(saved.logits(batch), again.logits(batch))
    assert np.abs(np.asarray(saved.logits(batch)) - np.asarray(released.logits(batch))).max() > 1e-3


def to_classify(config, smoothing=0.0):
    """Replaces the stage of pairs by one of classes."""
    config.stages.pairs = ConfigDict(
        {
            "objective": "classify", "stream": "captions", "label_smoothing": smoothing, "steps": 2, "batch_size": 4,
            "warmup_steps": 0, "accumulate": 1, "learning_rates": {"encoder": 1e-3, "head": 1e-3},
        }
    )  # fmt: skip
    config.evaluation = ConfigDict({"batch_size": 3})


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_of_classes(tmp_path, smoothing):
    settings = transformers.ViTConfig(**BLOCKS, image_size=16, patch_size=4, id2label=dict(enumerate(NAMES)))
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    _, model, _ = saved(tmp_path, processor, transformers.ViTForImageClassification(settings))
    captions = [NAMES[number % 3 == 0] for number in range(4)]
    config = config_of(tmp_path, captions)
    to_classify(config, smoothing)
    experiment = build(config)
    assert experiment.labels == NAMES
    (span,) = parse_schedule(("pairs",), config.stages)
    batch, value, metrics, grads = minimised(experiment, span.stage)
    given = processor(pictures(4), return_tensors="pt")["pixel_values"]
    order = [
        int(np.abs(given.numpy().transpose(0, 2, 3, 1) - row).max(axis=(1, 2, 3)).argmin()) for row in batch.images
    ]
    labels = torch.tensor([NAMES.index(captions[i]) for i in order])
    logits = model(given[order]).logits
    np.testing.assert_array_equal(batch.labels, labels)
    np.testing.assert_allclose(metrics["accuracy"], (logits.argmax(-1) == labels).float().mean())
    compare(model, torch.nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing), value, grads, tmp_path)


def test_a_head_of_other_classes_is_saved_as_the_release_saves_its_own(tmp_path, one_device):
    settings = transformers.ViTConfig(**BLOCKS, image_size=16, patch_size=4, id2label=dict(enumerate(NAMES)))
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    saved(tmp_path, processor, transformers.ViTForImageClassification(settings))
    names = ("none", "one", "two")
    config = config_of(tmp_path, [names[number % 3] for number in range(4)])
    to_classify(config)
    config.decoder = ConfigDict({"kind": "class_head", "names": names})
    experiment = build(config)
    assert experiment.labels == names and experiment.system.release.unnamed == ()
    Trainer(config, experiment, one_device, tmp_path / "run").run()
    ours = vlm_jax.from_pretrained(tmp_path / "run")
    assert ours.labels == names
    ours.save_pretrained(tmp_path / "out")
    assert vlm_jax.from_pretrained(tmp_path / "out").labels == names
    theirs = transformers.ViTForImageClassification.from_pretrained(tmp_path / "out").eval()
    assert theirs.config.id2label == dict(enumerate(names)) and theirs.config.num_labels == 3
    given = processor(pictures(4), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = theirs(given).logits
    np.testing.assert_allclose(ours.logits(ours.processor(pictures(4))), expected, atol=1e-5)
