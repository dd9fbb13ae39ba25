"""The guide of a reducer that chooses by the question, against CLIP of transformers as CDPruner's release uses it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import linen as nn

from vlm_jax.checkpoints.params import import_params
from vlm_jax.models.guide import Guide
from vlm_jax.pretrained import clip
from vlm_jax.pretrained.guide import clip_guide
from vlm_jax.processors.question import QuestionTexts
from vlm_jax.types import VisualFeatures

from .test_image_text import LENGTH, TEXTS
from .test_image_text import clip as save_clip


def of_release(theirs, tokenizer, hidden, text):
    """clip_encoder.py, forward: patches of a hidden state, and segments of the text, embedded."""
    ids = tokenizer(text=text, return_tensors="pt").input_ids
    short = -ids.shape[1] % LENGTH
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, short)).reshape(-1, LENGTH)
    ids = torch.nn.functional.pad(ids, (0, short)).reshape(-1, LENGTH)
    with torch.no_grad():
        image = theirs.visual_projection(theirs.vision_model.post_layernorm(torch.tensor(hidden)))
        text = theirs.text_projection(theirs.text_model(input_ids=ids, attention_mask=mask).pooler_output)
    return image.numpy(), text.numpy()


@pytest.mark.parametrize("text", [TEXTS[0], TEXTS[2]], ids=["one segment", "several"])
def test_embeddings_are_those_of_the_release(text, tmp_path):
    save_clip(tmp_path)
    theirs = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    config = theirs.config.to_dict()
    encoder = clip.vision_tower(config["vision_config"], "test", select_layer=-2, pooling="none", final_norm="none")
    found = clip_guide(encoder, str(tmp_path), {}, tmp_path, kind="cdpruner", path="config.reducer")
    assert isinstance(found.module, Guide)
    texts = QuestionTexts(found.tokenizer, found.module.text.context_length, "first", found.module.text.vocab_size)
    hidden = np.random.default_rng(0).normal(size=(1, 16, 16)).astype(np.float32)
    features = VisualFeatures(jnp.asarray(hidden), jnp.ones((1, 16), bool), (4, 4))
    (segments,) = texts([{"role": "user", "content": text}], (), [0], "question")
    question = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), texts.batched([[segments]], 1, static=False))
    shapes = jax.eval_shape(found.module.init, jax.random.key(0), features, question)
    targets = {found.borrowed.part: nn.meta.unbox(shapes)["params"]}
    params = import_params(found.borrowed.rules, found.borrowed.checkpoint, targets)["guide"]
    ours = jax.jit(found.module.apply)({"params": params}, features, question)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    image, embedded = of_release(theirs, tokenizer, hidden, text)
    np.testing.assert_allclose(ours.image, image, atol=1e-5)
    assert ours.mask.sum() == len(embedded) == len(segments)
    np.testing.assert_allclose(ours.text[0][ours.mask[0]], embedded, atol=1e-5)
