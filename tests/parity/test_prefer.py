"""DPO on two pairs of answers about pictures, compared with TRL's formula on live models of transformers."""

import copy
import json

import jax
import numpy as np
import pytest
import torch
from PIL import Image

import vlm_jax
from configs import finetune
from vlm_jax.build import build
from vlm_jax.checkpoints.params import export_params
from vlm_jax.data.loader import batch_at
from vlm_jax.train.input import rows
from vlm_jax.train.stages import parse_schedule

from .processors import pictures
from .systems import llava
from .test_contrastive import released_gradients
from .test_learned import TEMPLATE

BETA, LENGTH = 0.7, 96
PAIRS = (("What is this?", "A cat.", "A dog, surely."), ("And the colour?", "It is grey like a stone.", "Red."))


@pytest.fixture(scope="module")
def policy_and_reference(tmp_path_factory):
    """A folder of preference pairs and a release, and one of another release of the same tower; their torch models."""
    folder, other = tmp_path_factory.mktemp("policy"), tmp_path_factory.mktemp("reference")
    with pytest.MonkeyPatch.context() as patch:
        # Processors with videos check their parts against classes that only torchvision brings.
        patch.setattr("transformers.ProcessorMixin.check_argument_for_proper_class", lambda *_: None)
        processor, model, _ = llava(folder)
    reference = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if "vision_tower" not in name:
                parameter += 0.03 * torch.randn_like(parameter)
    reference.save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        if (folder / name).exists():
            (other / name).write_bytes((folder / name).read_bytes())
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", "<image>\n"))
    records = []
    for number, (picture, (prompt, chosen, rejected)) in enumerate(zip(pictures(2), PAIRS, strict=True)):
        Image.fromarray(np.asarray(picture)).save(folder / f"{number}.png")
        said = [{"role": "user", "content": f"<image>{prompt}"}]
        answers = [[{"role": "assistant", "content": text}] for text in (chosen, rejected)]
        record = {"prompt": said, "chosen": answers[0], "rejected": answers[1], "images": [f"{number}.png"]}
        records.append({"id": str(number), **record})
    for name in ("train", "evaluation"):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder, other, processor, model, reference


def log_probs(model, batch, pixels):
    """TRL's `selective_log_softmax` of the labels, summed over the completion."""
    ids = torch.from_numpy(np.asarray(batch.tokens)).long()
    mask = torch.from_numpy((np.asarray(batch.segment_ids) > 0).astype(np.int64))
    logits = model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits
    targets = torch.from_numpy(np.asarray(batch.targets)).long()
    per_token = torch.gather(logits.log_softmax(-1), 2, targets[..., None])[..., 0]
    return (per_token * torch.from_numpy(np.asarray(batch.loss_weights))).sum(-1)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_rewards_and_gradients(policy_and_reference, tmp_path, smoothing):
    folder, other, _, model, held = policy_and_reference
    config = finetune.get_config().unlock()
    config.release, config.dtype = str(folder), "float32"
    config.row.update({"length": LENGTH, "images": 1})
    config.data.update({f"{name}_path": str(folder / f"{name}.jsonl") for name in ("train", "evaluation")})
    config.stages.instruction = {
        "objective": "prefer", "stream": "preferences", "beta": BETA, "label_smoothing": smoothing,
        "logits_bytes": 2000,  # several blocks of the vocabulary
        "steps": 2, "batch_size": 2, "warmup_steps": 0, "learning_rates": {"connector": 1e-3, "decoder": 1e-3},
    }  # fmt: skip
    experiment = build(config)
    (span,) = parse_schedule(("instruction",), config.stages)
    batch = batch_at(rows(experiment, span.stage, 0), 2, 0)
    assert batch.tokens.shape == (4, LENGTH)
    texts = [experiment.system.processor.tokenizer.decode(row[kept > 0]) for row, kept in zip(
        np.asarray(batch.targets), np.asarray(batch.loss_weights), strict=True)]  # fmt: skip
    order = [0, 1] if texts[0].startswith(PAIRS[0][1]) else [1, 0]
    assert [text.strip() for text in texts] == [PAIRS[pair][answer] for pair in order for answer in (1, 2)]

    ours, theirs = vlm_jax.from_pretrained(folder), vlm_jax.from_pretrained(other)
    reference = {part: theirs.params[part] for part in ("connector", "decoder")}
    loss = span.stage.settings.build(experiment)
    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, metrics), grads = run(ours.params, batch, jax.random.key(0), 1.0, reference)

    pixels = torch.from_numpy(np.asarray(batch.images)[:, 0].transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        base = log_probs(held, batch, pixels)
    model.zero_grad()
    policy = log_probs(model, batch, pixels)
    # TRL, trainer/dpo_trainer.py: logits = (policy chosen - rejected) - (reference chosen - rejected).
    logits = (policy[0::2] - policy[1::2]) - (base[0::2] - base[1::2])
    sigmoid = torch.nn.functional.logsigmoid
    expected = (-sigmoid(BETA * logits) * (1 - smoothing) - sigmoid(-BETA * logits) * smoothing).mean()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    rewards = (BETA * (policy - base)).detach()
    assert rewards.abs().min() > 0.01
    np.testing.assert_allclose(metrics["reward_chosen"], rewards[0::2].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["reward_rejected"], rewards[1::2].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["reward_margin"], (rewards[0::2] - rewards[1::2]).mean(), rtol=1e-4)
    assert metrics["accuracy"] == (logits > 0).float().mean().item()

    expected.backward()
    wanted = released_gradients(model, tmp_path / "gradients")
    found = export_params(ours.release.rules, grads)
    largest = max(np.abs(leaf).max() for leaf in wanted.values())
    assert set(found) <= set(wanted)
    for name, leaf in found.items():
        if "vision" not in name:
            np.testing.assert_allclose(leaf, wanted[name], atol=1e-5 * largest, rtol=1e-4, err_msg=name)
