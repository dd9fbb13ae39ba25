"""Settings of training-free reducers as their papers and released code have them, for LLaVA-1.5-7B with 576 tokens.

`configs/sweeps/release_reducers.py:METHOD` evaluates one of them. `rule = as_released` has the counts, the order and
the extra tokens of the released code; the budget is then the number of tokens that it leaves. What methods of videos
leave depends on the video, so they have no budget, and are of Qwen2.5-VL-7B. Files are those of the released code that
the reducer's docstring names.
"""

from typing import Any

_RELEASED = {"rule": "as_released"}
_CLIP = {"text_model": "openai/clip-vit-large-patch14-336"}  # the tower of LLaVA-1.5


def _points(kind: str, *budgets: int | None, **settings: Any) -> dict[str, Any]:
    return {"budgets": budgets, "reducer": {"kind": kind, **settings}}


# {method: {candidate: its budgets and its reducer}}
PAPERS: dict[str, dict[str, dict[str, Any]]] = {
    # Table 1: K = 2, R = 50%; fastv_kvcache.py and the llava-hf fork keep round(576 * (1 - R)).
    "fastv": {"fastv": _points("fastv", 288, layer=2, ratio=0.5, **_RELEASED)},
    # Section 4.1: lambda = 0.5 after each of four stages; scripts/v1_5/pdrop_eval: --layer_list '[8,16,24]'
    # --image_token_ratio_list '[0.5,0.25,0.125]'.
    "pyramid_drop": {
        "pyramid_drop": _points("pyramid_drop", 72, layers=(8, 16, 24), ratios=(0.5, 0.25, 0.125), **_RELEASED)
    },
    # score.py: counts of RETAIN_TOKN=192, 128 and 64, the mean over layers, without merged tokens; layers 2, 6 and 15
    # of both versions.
    "sparsevlm": {
        "sparsevlm_192": _points("sparsevlm", 113, layers=(2, 6, 15), counts=(300, 200, 110), **_RELEASED),
        "sparsevlm_128": _points("sparsevlm", 39, layers=(2, 6, 15), counts=(303, 110, 36), **_RELEASED),
        "sparsevlm_64": _points("sparsevlm", 18, layers=(2, 6, 15), counts=(66, 30, 17), **_RELEASED),
    },
    # USE_VERSION=2_0: 14 heads, no merged tokens.
    "sparsevlm_plus": {
        f"sparsevlm_plus_{mean}": _points(
            "sparsevlm", counts[-1], layers=(2, 6, 15), version="2.0", num_heads=14, counts=counts, **_RELEASED
        )
        for mean, counts in ((192, (300, 200, 118)), (128, (238, 108, 60)), (64, (66, 34, 20)))
    },
    # scripts/v1_5/eval of ZichenWen1/DART: --pruned_layer 2 --pivot_image_token 4 --pivot_text_token 4, README:
    # reduction_ratio 0.778; every pivot takes int(576 * 0.222 / 8) = 15 besides the image's four.
    "dart": {
        "dart": _points("dart", 124, layer=2, image_pivots=4, text_pivots=4, ratio=0.778, **_RELEASED)
    },
    # Section 4.1, README: dominant 54, 108 and 162 (the class token is one of them), contextual 10, 20 and 30.
    "visionzip": {"visionzip": _points("visionzip", 192, 128, 64, contextual_share=10 / 64, **_RELEASED)},
    # Table 1: all 5.5% of the tokens, 32, that section 3.2 finds as outliers on average; 32 neighbours of
    # clip_encoder.py, token_prune_merge_advanced; one more token for all that are dropped.
    "prumerge": {"prumerge": _points("prumerge", 33, num_neighbors=32, ratio=1 / 18, **_RELEASED)},
    # token_prune_merge_advanced_plus, the tower as it is released: every int(int(18) / 3)-th token beside, adaptive.
    "prumerge_plus": {
        "prumerge_plus": _points(
            "prumerge", 129, num_neighbors=32, ratio=1 / 18, spatial_share=1.0, adaptive=True, **_RELEASED
        )
    },
    # Section 4.1, README: SUBSET_RATIO=0.098.
    "divprune": {"divprune": _points("divprune", 56, ratio=0.098, **_RELEASED)},
    # Section 4.2: 50%, 75%, 90% and 95% of the tokens are dropped.
    "fastervlm": {"fastervlm": _points("fastervlm", 288, 144, 58, 29, **_RELEASED)},
    # README: scripts/v1_5/eval/vqav2.sh 128 0.5.
    "vispruner": {"vispruner": _points("vispruner", 128, 64, 32, important_share=0.5, **_RELEASED)},
    # llava/model/utils.py: 16 crops, alpha 0.09.
    "holov": {"holov": _points("holov", 192, 128, 64, num_crops=16, variety=0.09, **_RELEASED)},
    # README: scripts/v1_5/eval/gqa.sh 128.
    "cdpruner": {"cdpruner": _points("cdpruner", 128, 64, 32, **_CLIP, **_RELEASED)},
    # TextSim+:0.2 of multimodal_encoder/clip_encoder.py, and one token for all that are dropped.
    "trim": {"trim": _points("trim", 116, ratio=0.2, **_CLIP, **_RELEASED)},
    # Section 3: as many tokens are merged in every block; no paper sets it for LLaVA-1.5.
    "tome": {"tome": _points("tome", 192, 128, 64, **_RELEASED)},
    # README: dycoke_k=0.7; the choice among cached tokens at every step (dycoke_l, dycoke_p) is left out.
    "dycoke": {"dycoke": _points("dycoke", None, merging_ratio=0.7, **_RELEASED)},
    # scripts/eval.sh: --tau 0.8 --temporal_segment_ratio 0.25 --cluster_ratio 0.5; k = 7.
    "prunevid": {
        "prunevid": _points(
            "prunevid", None, threshold=0.8, segment_ratio=0.25, cluster_ratio=0.5, num_neighbors=7, **_RELEASED
        )
    },
    # fastvid_qwen25vl/scripts/eval.sh: DySeg_c 8, tau 0.84, ignore 0.95; STPrune_d 0.4; DTM_p 4, beta 0.6; 27%.
    "fastvid": {
        "fastvid": _points(
            "fastvid", None, num_segments=8, threshold=0.84, still=0.95, context_share=0.4, anchor_step=4,
            least_weight=0.6, ratio=0.27, **_RELEASED,
        )
    },
    # README: RETAIN_RATIO=0.15 T=0.80; Beta 0.6 and K 7 of holitom/llava_arch.py. The merging in a layer (HOLITOM_k,
    # HOLITOM_r) is left out.
    "holitom": {
        "holitom": _points("holitom", None, threshold=0.8, ratio=0.15, center_weight=0.6, num_neighbors=7, **_RELEASED)
    },
}  # fmt: skip
# Methods of videos, and the release that they are evaluated on.
VIDEOS = {name: "Qwen/Qwen2.5-VL-7B-Instruct" for name in ("dycoke", "prunevid", "fastvid", "holitom")}
