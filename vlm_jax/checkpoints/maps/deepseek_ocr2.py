"""DeepSeek-OCR 2's learned queries under the names of its release, which transformers writes too."""

from vlm_jax.checkpoints.maps.transformer import trunk_rules
from vlm_jax.checkpoints.rules import Rule, prefixed

# Released tables of queries, fewest first.
QUERIES = ("query_768", "query_1024")
BLOCKS = "model.model."


def queries_rules() -> tuple[Rule, ...]:
    """The tables of queries, the blocks and their final norm, after `qwen2_model.`."""
    blocks = trunk_rules(qkv_bias=True, out_bias=False, mlp_bias=False, qk_norm=False)
    tables = (Rule(f"{name}.weight", f"queries_{number}") for number, name in enumerate(QUERIES))
    return (*prefixed(blocks, BLOCKS), *tables)
