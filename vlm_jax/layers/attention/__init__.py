"""Attention: one function for every model, the kernels behind it, and the multi-head module around it."""

from vlm_jax.layers.attention.context import Context as Context
from vlm_jax.layers.attention.context import KeyValue as KeyValue
from vlm_jax.layers.attention.context import SharedKeyValue as SharedKeyValue
from vlm_jax.layers.attention.context import allowed as allowed
from vlm_jax.layers.attention.entry import attention as attention
from vlm_jax.layers.attention.entry import choose_implementation as choose_implementation
from vlm_jax.layers.attention.entry import is_written_out as is_written_out
from vlm_jax.layers.attention.entry import written_out as written_out
from vlm_jax.layers.attention.multi_head import HEADS as HEADS
from vlm_jax.layers.attention.multi_head import MultiHeadAttention as MultiHeadAttention
from vlm_jax.layers.attention.multi_head import last as last
