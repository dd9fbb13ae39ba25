"""Training of whole systems of transformers compared with ours: loss, gradients and five steps, from one saved folder.

The references' gradients and trained weights are written as a checkpoint and read by the release's own map, so that
nothing here knows a system.
"""

import copy
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import linen as nn

from configs import finetune
from vlm_jax.build import Experiment, build
from vlm_jax.checkpoints.hub import open_checkpoint
from vlm_jax.data.loader import join
from vlm_jax.leaves import flatten
from vlm_jax.optim.adamw import OptimizerSettings, adamw, decays
from vlm_jax.sharding.rules import distribute, placed
from vlm_jax.train.objectives.next_token import NextToken
from vlm_jax.train.state import TrainState, init_boxed
from vlm_jax.train.step import compile_step
from vlm_jax.types import Batch, Params, RowShape, Sample, SampleSizes

from .prismatic import prismatic
from .processors import pictures
from .systems import (
    deepseek_ocr2,
    deepseek_vl,
    deepseek_vl_hybrid,
    gemma3,
    gemma4,
    gemma4_moe,
    gemma4_shared,
    idefics3,
    internvl,
    llava,
    llava_next,
    llava_onevision,
    minicpm_v,
    ovis2,
    paligemma,
    paligemma2,
    qwen2_5_omni_thinker,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_5,
    qwen3_5_moe,
    qwen3_vl,
    qwen3_vl_moe,
    smolvlm,
)

SYSTEMS = (
    llava,
    llava_next,
    llava_onevision,
    minicpm_v,
    deepseek_ocr2,
    deepseek_vl,
    deepseek_vl_hybrid,
    gemma3,
    gemma4,
    gemma4_moe,
    gemma4_shared,
    idefics3,
    internvl,
    ovis2,
    paligemma,
    paligemma2,
    prismatic,
    qwen2_vl,
    qwen2_5_omni_thinker,
    qwen2_5_vl,
    qwen3_5,
    qwen3_5_moe,
    qwen3_vl,
    qwen3_vl_moe,
    smolvlm,
)
STEPS, RATE = 5, 1e-3
SETTINGS = OptimizerSettings(weight_decay=0.5, clip_norm=1.0)
IMAGE = {"type": "image"}


def asked(text, *images):
    return {"role": "user", "content": [*images, {"type": "text", "text": text}]}


def answered(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


CONVERSATIONS = (
    (
        [asked("What is é this? 12", IMAGE, IMAGE), answered("A cat."), asked("Sure?"), answered("No, two dogs.")],
        (0, 1),
    ),
    ([asked("Hello."), answered("Hi!"), asked("And that?", IMAGE), answered("Rain")], (2,)),
)


# Of systems without a chat template, which take one question.
QUESTIONS = (
    ([asked("What is é this? 12", IMAGE, IMAGE), answered("No, two dogs.")], (0, 1)),
    ([asked("And that?", IMAGE), answered("<loc0004><loc1023><loc0000><loc0512> rain")], (2,)),
)


class Trained(NamedTuple):
    """Losses before each step and after the last, gradients of the first, parameters after the last."""

    losses: list[float]
    gradients: Params
    params: Params


@dataclasses.dataclass(frozen=True)
class Case:
    """A system with the batch that both train on."""

    processor: object
    model: torch.nn.Module
    experiment: Experiment
    batch: Batch

    def through_map(self, model, folder) -> Params:
        """What a model of transformers holds as weights, as the tree of our parameters."""
        model.save_pretrained(folder)
        release = self.experiment.system.release
        shapes = nn.meta.unbox(self.experiment.boxed_shapes())
        return dataclasses.replace(release, checkpoint=open_checkpoint(folder)).read(shapes)


def case_of(made, folder) -> Case:
    processor, model, ours = made(folder)
    conversations = QUESTIONS if processor.chat_template is None else CONVERSATIONS
    config = finetune.get_config()
    with config.unlocked():
        config.release, config.dtype = str(ours.folder), "float32"
        config.row.update({"length": 2048, "images": 1024})
    experiment, images = build(config), [np.asarray(picture) for picture in pictures(3)]
    loads = [
        experiment.measure(SampleSizes("", tuple(messages), tuple(images[i].shape[:2] for i in numbers)))
        for messages, numbers in conversations
    ]
    shape = RowShape(max(load.length for load in loads), max(load.images for load in loads))
    samples = [Sample("", tuple(messages), tuple(images[i] for i in numbers)) for messages, numbers in conversations]
    return Case(processor, model, experiment, join([experiment.training_row(one, shape=shape) for one in samples]))


def inputs_of(case: Case):
    """The reference's inputs by its own processor, and our labels: that of position t + 1 is the target of t."""
    theirs, batch = case.processor, case.batch
    if theirs.chat_template is None:
        return prefixed_inputs(theirs, batch)
    end = theirs.tokenizer.eos_token  # most templates here write none after a last answer
    texts = [theirs.apply_chat_template(messages) for messages, _ in CONVERSATIONS]
    texts = [text if text.endswith(("<end_of_turn>\n", end)) else text.rstrip() + end for text in texts]
    images = [[pictures(3)[i] for i in numbers] for _, numbers in CONVERSATIONS]
    special = not texts[0].startswith(theirs.tokenizer.bos_token)
    padded = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    given = theirs(images=images, text=texts, add_special_tokens=special, **padded)
    real = np.asarray(batch.segment_ids) > 0
    np.testing.assert_array_equal(real, given["attention_mask"])
    np.testing.assert_array_equal(np.asarray(batch.tokens)[real], given["input_ids"].numpy()[real])
    labels = np.full(real.shape, -100)
    labels[:, 1:] = np.where(batch.loss_weights[:, :-1] > 0, batch.targets[:, :-1], -100)
    assert set(np.unique(batch.loss_weights)) == {0.0, 1.0} and not batch.loss_weights[:, -1].any()
    return {**given, "labels": torch.tensor(labels)}


def prefixed_inputs(theirs, batch):
    """The same of questions and answers, whose labels the reference's processor gives too."""
    images = [[pictures(3)[i] for i in numbers] for _, numbers in QUESTIONS]
    texts = ["<image>" * len(numbers) + messages[0]["content"][-1]["text"] for messages, numbers in QUESTIONS]
    suffix = [messages[1]["content"][0]["text"] for messages, _ in QUESTIONS]
    padded = {"padding": True, "padding_side": "right", "return_tensors": "np"}
    given = theirs(images=images, text=texts, suffix=suffix, **padded)
    real = np.asarray(batch.segment_ids) > 0
    np.testing.assert_array_equal(real, given["attention_mask"])
    np.testing.assert_array_equal(np.asarray(batch.tokens)[real], given["input_ids"][real])
    np.testing.assert_array_equal((batch.group_ids > 0)[real], given["token_type_ids"][real] == 0)
    labels = np.where(batch.loss_weights > 0, batch.targets, -100)
    np.testing.assert_array_equal(labels[:, :-1], given["labels"][:, 1:])
    return {name: torch.from_numpy(np.asarray(value)) for name, value in given.items()}


def theirs_trained(case: Case, folder) -> Trained:
    model, given = copy.deepcopy(case.model), inputs_of(case)
    shapes = nn.meta.unbox(case.experiment.boxed_shapes())
    marks = jax.tree_util.tree_map_with_path(lambda path, leaf: np.full(leaf.shape, decays(path), np.float32), shapes)
    case.experiment.system.save_pretrained(folder / "decayed", marks)
    marks = dict(type(model).from_pretrained(folder / "decayed").named_parameters())
    groups = [
        {
            "params": [own for name, own in model.named_parameters() if bool(marks[name].any()) == on],
            "weight_decay": decay,
        }
        for on, decay in ((True, SETTINGS.weight_decay), (False, 0.0))
    ]
    betas = (SETTINGS.b1, SETTINGS.b2)
    optimizer = torch.optim.AdamW(groups, lr=RATE, betas=betas, eps=SETTINGS.epsilon)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS + 1)
    losses, gradients = [], None
    for step in range(STEPS + 1):
        loss = model(**given).loss
        losses.append(loss.item())
        if step == STEPS:
            break
        optimizer.zero_grad()
        loss.backward()
        if gradients is None:
            held = copy.deepcopy(model)
            with torch.no_grad():
                for into, own in zip(held.parameters(), model.parameters(), strict=True):
                    into.copy_(torch.zeros_like(own) if own.grad is None else own.grad)
                for stored in held.buffers():  # which are not learned
                    stored.zero_()
            gradients = case.through_map(held, folder / "gradients")
        torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_norm)
        optimizer.step()
        cosine.step()
    return Trained(losses, gradients, case.through_map(model, folder / "trained"))


def kept_gradients() -> optax.GradientTransformation:
    """Changes nothing; its state is the last gradients."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, state, params=None: (updates, updates)
    )


def ours_trained(case: Case, mesh) -> Trained:
    experiment, objective, boxed = case.experiment, NextToken().build(case.experiment), case.experiment.boxed_shapes()
    parts = frozenset(path for path, _ in flatten(boxed))
    tx = optax.chain(kept_gradients(), adamw(SETTINGS, dict.fromkeys(parts, RATE), 0, STEPS + 1))
    like = placed(jax.eval_shape(lambda params: init_boxed(params, tx, parts), boxed), mesh)
    params = experiment.initial(jax.random.key(0), mesh)
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    state = jax.tree.map(lambda leaf, other: jax.device_put(leaf, other.sharding), state, like)
    batch = distribute(case.batch, mesh)
    program = compile_step(like, batch, mesh, objective=objective, tx=tx, trained=parts)
    losses, gradients = [], None
    for _ in range(STEPS + 1):
        params = jax.tree.map(np.array, state.params)
        state, metrics = program(state, batch, jax.random.key(0))
        gradients = jax.tree.map(np.array, state.opt_state[0]) if gradients is None else gradients
        losses.append(float(metrics["loss"]))
    return Trained(losses, gradients, params)


@pytest.mark.parametrize("made", SYSTEMS, ids=lambda made: made.__name__)
def test_five_steps(made, one_device, tmp_path):
    case = case_of(made, tmp_path / "model")
    theirs, ours = theirs_trained(case, tmp_path), ours_trained(case, one_device)
    assert ours.losses[0] == pytest.approx(theirs.losses[0], abs=1e-5)
    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=0, atol=1e-4)
    assert theirs.losses[0] - theirs.losses[-1] > 0.01  # a hundred times the tolerance
    for part in theirs.gradients:
        largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(theirs.gradients[part]))
        assert largest > 0

        def check(path, gradient, wanted, found, param, largest=largest, part=part):
            gradient, param = np.asarray(gradient), np.asarray(param)
            name = part + jax.tree_util.keystr(path)
            assert np.abs(gradient - wanted).max() <= 1e-4 * largest, name
            learned = np.abs(gradient) > 1e-6 * largest
            assert np.abs(param - found)[learned].max(initial=0) <= 1e-4, name

        jax.tree_util.tree_map_with_path(
            check, theirs.gradients[part], ours.gradients[part], ours.params[part], theirs.params[part]
        )
