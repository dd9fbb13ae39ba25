"""Language models: embeddings in, hidden states and logits out.

Interface: a Linen module with `embed(tokens)`, `__call__(embeddings, positions,
segment_ids, cache=None, branch_ids=None) -> (hidden, cache)`, `logits(hidden)`, `width`, `vocab_size` and
`init_cache(batch_size, length, dtype=None)`.
"""

from collections.abc import Mapping

from vlm_jax.decoders.decoder import Decoder
from vlm_jax.decoders.deepseek import Deepseek
from vlm_jax.decoders.hybrid import Hybrid
from vlm_jax.decoders.mixed import MixedTransformer
from vlm_jax.decoders.transformer import Transformer

DECODERS: Mapping[str, type[Decoder]] = {
    "deepseek": Deepseek,
    "hybrid": Hybrid,
    "mixed": MixedTransformer,
    "transformer": Transformer,
}
