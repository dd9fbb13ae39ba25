"""Configs with the papers' own settings of every reducer: they leave what the papers say."""

import itertools

import jax.numpy as jnp
import pytest

from configs.papers import PAPERS, VIDEOS
from configs.sweeps import release_reducers
from vlm_jax.build import of_system
from vlm_jax.config import parse
from vlm_jax.pretrained.budgets import with_budget
from vlm_jax.pretrained.known_system import known_system
from vlm_jax.reducers import REDUCERS
from vlm_jax.sweep.evaluation import CONTROLS
from vlm_jax.sweep.points import point_config

# The mean over the 32 layers of LLaVA-1.5-7B, as the papers have it, and how many layers later than they count a drop
# is: SparseVLM counts the layer that ranks with what it leaves.
MEANS = {
    "pyramid_drop": (270, 0),
    **{f"{name}_{mean}": (mean, 1) for name in ("sparsevlm", "sparsevlm_plus") for mean in (192, 128, 64)},
}

# Where the released code prunes behind the projector.
AFTER_THE_CONNECTOR = ("divprune", "holov")


def points(method):
    config = release_reducers.get_config(method)
    return {
        (name, budget): candidate.reducer.to_dict()
        for name, candidate in config.candidates.items()
        if name != "none"
        for budget in candidate.budgets
    }


def test_every_reducer_has_its_papers_settings():
    kinds = {reducer["kind"] for method in PAPERS for reducer in points(method).values()}
    assert kinds == {kind for kind, cls in REDUCERS.items() if cls is not None} - CONTROLS
    with pytest.raises(ValueError, match="takes smoke or a method"):
        release_reducers.get_config("fastw")


@pytest.fixture(scope="module")
def llava():
    return known_system("llava-hf/llava-1.5-7b-hf", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)


@pytest.mark.parametrize("method", sorted(PAPERS.keys() - VIDEOS.keys()))
def test_a_paper_leaves_its_budgets_on_llava(method, llava):
    for (name, budget), reducer in points(method).items():
        cls = REDUCERS[reducer["kind"]]
        if cls.guided_by is not None:  # its CLIP is not here
            kind = reducer.pop("kind")
            made = parse(cls, reducer, "config.reducer", **cls.for_budget(budget, (24, 24), 0))
            assert (made.num_left(576), kind) == (budget, cls.kind)
            continue
        system = with_budget(llava, budget, reducer=reducer)
        drops = system.model.decoder.drops
        if cls.kind in AFTER_THE_CONNECTOR:
            assert system.model.reduce == "tokens"
        if not drops:
            assert system.processor.count_visual_tokens([(336, 336)]) == [budget]
            continue
        left = [576, *(drop.num_left(576) for drop in drops)]
        assert left[-1] == budget
        if name in MEANS:
            expected, later = MEANS[name]
            layers = [0, *(drop.layer - later for drop in drops), 32]
            spans = zip(left, itertools.pairwise(layers), strict=True)
            assert abs(sum(count * (end - start) for count, (start, end) in spans) / 32 - expected) < 1


@pytest.mark.parametrize("method", sorted(VIDEOS))
def test_methods_of_videos_are_those_of_a_system_with_videos(method):
    assert release_reducers.get_config(method).base.release == "Qwen/Qwen2.5-VL-7B-Instruct"
    system = known_system("Qwen/Qwen2.5-VL-7B-Instruct", dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    ((_, budget), reducer) = points(method).popitem()
    reduced = with_budget(system, budget, reducer=reducer)
    config = release_reducers.get_config(method)
    run = point_config(config.base, config.candidates[method], budget, 0, ()).unlock()
    run.data.evaluation_path = "videos.jsonl"
    assert of_system(run, system).system.model.reducer == reduced.model.reducer
    assert budget is None and reduced.model.reducer.reduces_clips and reduced.model.reducer.rule == "as_released"
