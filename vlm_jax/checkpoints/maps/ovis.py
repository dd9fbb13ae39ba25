"""Ovis's visual vocabulary: the head of its visual tokenizer and the table of its visual words."""

from vlm_jax.checkpoints.maps.torch_layers import layer_norm, linear
from vlm_jax.checkpoints.rules import Rule


def vocabulary_rules(head: str, norm: str, table: str) -> tuple[Rule, ...]:
    """The released names of the head's linear layer, its norm and the table -> `VisualVocabulary`."""
    return (
        *linear(head, "head", bias=False),
        *layer_norm(norm, "head_norm"),
        Rule(f"{table}.weight", "table/embedding"),
    )
