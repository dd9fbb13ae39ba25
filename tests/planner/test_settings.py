"""Configs of included releases, completed without data, and the systems that they describe."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import siglip_digits
from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.costs.flops import count_flops
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.models.vlm import VLM
from vlm_jax.planner.settings import has_experts, planned, visible_share
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.known_system import known_system
from vlm_jax.train import finetuning

from ..advice import tried


def of_release(name, **values):
    config = finetuning.get_config()
    config.release = name
    for path, value in values.items():
        config.update_from_flattened_dict({path.replace("__", "."): value})
    return config


def test_a_release_at_native_resolution_has_places_for_its_pictures():
    """A quarter of a row is pictures; a token is 2 x 2 patches, in windows of 64 places."""
    config, experiment = planned(of_release("Qwen/Qwen2.5-VL-3B-Instruct", row__length=4096), 16)
    assert experiment.row.length == 4096 and experiment.row.images == 4 * 1024
    batch = experiment.system.example(experiment.row)
    assert batch.positions.shape == (1, 4096, 3) and batch.images.patches.shape == (1, 4096, 1176)
    assert config.stages.instruction.batch_size == 16 and config.dtype == "bfloat16"
    assert config.encoder.remat == config.decoder.remat == "full"
    # Bai et al. 2025, table 1: 3B parameters. The tied embedding table has 0.3B of them, the vision tower 0.67B.
    assert sum(experiment.num_params().values()) == pytest.approx(3.75e9, rel=0.01)


def test_a_budget_bounds_the_places():
    _, experiment = planned(of_release("Qwen/Qwen2.5-VL-3B-Instruct", token_budget=256), 4)
    assert experiment.row.images == 4 * 256


@pytest.mark.parametrize(
    ("name", "length", "tiles"),
    [
        ("OpenGVLab/InternVL3-8B", 4096, 4),  # 1,024 tokens: three tiles of 256 in a row, and the whole
        ("OpenGVLab/InternVL3-8B", 8192, 8),  # 7 tiles are a row of 7, or 8 with the whole
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", 2048, 2),  # of 512 tokens there is none: the least is 1,485
        ("llava-hf/llava-onevision-qwen2-7b-ov-hf", 16384, 5),  # 729 of the whole, and 4 of 729 with newlines
        ("deepseek-ai/DeepSeek-OCR", 4096, 8),
        ("deepseek-ai/DeepSeek-OCR-2", 4096, 6),  # 256 of the whole, and 5 of 144
    ],
)
def test_a_release_with_tiles_has_those_of_a_large_picture(name, length, tiles):
    _, experiment = planned(of_release(name, row__length=length), 4)
    assert experiment.row.images == tiles


@pytest.mark.parametrize("budget", [144, 64])
def test_another_connector_meets_a_budget_on_squares(budget):
    given = {"token_budget": budget, "connector__kind": "pool"}
    _, experiment = planned(of_release("llava-hf/llava-1.5-7b-hf", **given), 4, pictures=2)
    views, model = experiment.system.processor.views, experiment.system.model
    assert views.num_tokens == budget == model.connector.num_tokens(model.encoder.grid(336, 336))
    assert experiment.row.images == 2


def test_masks_of_a_decoder_leave_a_share_of_all_pairs(config):
    """Against the mask itself: a causal block, and blocks with windows of 5 positions, and of more than there are."""
    model = build(config).system.model
    length = 20
    ahead = np.arange(length)[:, None] - np.arange(length)
    causal = ahead >= 0
    assert visible_share(model, length) == pytest.approx(causal.mean())
    windowed = model.clone(decoder=model.decoder.clone(windows=(5, 40)))
    both = [causal & (ahead < window) for window in (5, 40)]
    assert visible_share(windowed, length) == pytest.approx(np.mean(both))
    assert visible_share(build(siglip_digits.get_config()).system.model, length) == 1


def test_a_release_with_experts_has_their_axis_and_the_products_of_the_selected_ones():
    """35B-A3B: 40 layers, of 256 experts of 512 channels 8 to a token of 2048, and a shared one."""
    _, experiment = planned(of_release("Qwen/Qwen3.5-35B-A3B"), 8)
    assert has_experts(experiment.system)
    tokens, decoder = 64, experiment.system.model.decoder
    row = jax.ShapeDtypeStruct((1, tokens), jnp.int32)
    given = jax.ShapeDtypeStruct((1, tokens, decoder.width), jnp.float32), row, row
    params = jax.eval_shape(decoder.init, jax.random.key(0), *given)

    @functools.cache
    def flops(selected):
        return count_flops(decoder.clone(num_selected=selected).apply, params, *given)

    expert = 2 * tokens * 40 * 3 * 2048 * 512
    assert flops(9) - flops(8) == expert and decoder.num_selected == 8
    # 3B active parameters by the name, with the table and the head, which are not in the blocks.
    active = flops(8) / (2 * tokens) + 2 * decoder.vocab_size * decoder.width
    assert active == pytest.approx(3.46e9, rel=0.05)


def test_two_towers_have_their_own_inputs():
    system = known_system("google/siglip-so400m-patch14-384", dtype=jnp.bfloat16, param_dtype=jnp.float32)
    images, texts = system.inputs
    assert isinstance(system.model, TwoTower) and images.shape == (1, 384, 384, 3) and texts.shape == (1, 64)


def test_what_cannot_be_planned_is_named():
    with pytest.raises(ConfigError, match=r"did you mean 'Qwen/Qwen2\.5-VL-7B-Instruct'"):
        planned(of_release("Qwen/Qwen2.5-VL-7B-Instrct"), 4)
    with pytest.raises(
        PretrainedError, match=tried("{facebook/sam-vit-base}: a {} by itself is not trained; name a whole system")
    ):
        known_system("facebook/sam-vit-base", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    whole = known_system("Qwen/Qwen2.5-VL-7B-Instruct", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    assert isinstance(whole.model, VLM)
