"""The Q-Formers of BLIP-2 and InstructBLIP, in released files under `qformer.`, with their queries and projection."""

from vlm_jax.checkpoints.maps.torch_layers import Where, layer_norm, linear
from vlm_jax.checkpoints.ops import Reshape
from vlm_jax.checkpoints.rules import Rule

_ATTENTION = {"attention": "attention", "crossattention": "cross_attention"}
_FEED_FORWARD = {"_query": "mlp", "": "text_mlp"}


def qformer_rules(depth: int, every: int, *, instruction: bool) -> tuple[Rule, ...]:
    """A `Blip2QFormerModel` or an `InstructBlipQFormerModel`.

    Args:
      depth: number of layers.
      every: interval of the layers with cross-attention.
      instruction: whether it takes an instruction (InstructBLIP).
    """
    embeddings = "embeddings." if instruction else ""
    rules = [*layer_norm(f"{embeddings}layernorm", "norm")]
    if instruction:
        rules.append(Rule("embeddings.word_embeddings.weight", "words/embedding"))
        rules.append(Rule("embeddings.position_embeddings.weight", "positions"))
    stacked = depth // every * every
    for i in range(min(every, stacked)):
        rules += _layer_rules("{layer}", f"groups/layer_{i}", i == 0, instruction, {"layer": range(i, stacked, every)})
    for i in range(depth - stacked):
        rules += _layer_rules(str(stacked + i), f"rest/layer_{i}", i == 0, instruction, {})
    return tuple(rules)


def _layer_rules(number: str, target: str, reads_features: bool, instruction: bool, where: Where) -> list[Rule]:
    source, rules = f"encoder.layer.{number}", []
    for released, ours in list(_ATTENTION.items())[: 1 + reads_features]:
        for name in ("query", "key", "value"):
            rules += linear(f"{source}.{released}.attention.{name}", f"{target}/{ours}/{name}", where=where)
        rules += linear(f"{source}.{released}.output.dense", f"{target}/{ours}/out", where=where)
        rules += layer_norm(f"{source}.{released}.output.LayerNorm", f"{target}/{ours}_norm", where=where)
    for released, ours in list(_FEED_FORWARD.items())[: 1 + instruction]:
        rules += linear(f"{source}.intermediate{released}.dense", f"{target}/{ours}/up", where=where)
        rules += linear(f"{source}.output{released}.dense", f"{target}/{ours}/down", where=where)
        rules += layer_norm(f"{source}.output{released}.LayerNorm", f"{target}/{ours}_norm", where=where)
    return rules


def connector_rules(num_queries: int, width: int) -> tuple[Rule, ...]:
    """A full model's parameters outside its Q-Former: the queries and the layer to the decoder's width."""
    queries = Reshape((1, num_queries, width), (num_queries, width))
    return (Rule("query_tokens", "queries", queries), *linear("language_projection", "projection"))
