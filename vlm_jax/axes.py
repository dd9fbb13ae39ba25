"""The logical axis names.

A parameter or an activation is annotated with these names and never with a mesh
axis; `vlm_jax.sharding.rules` maps the names to mesh axes.
"""

# Parameters.
LAYERS = "layers"  # stacked by `nn.scan`
EMBED = "embed"  # width of a residual stream
MLP = "mlp"  # hidden width of a feed-forward
HEADS = "heads"  # query heads, flattened with their head_dim
KV_HEADS = "kv_heads"  # key and value heads, flattened with their head_dim
HEAD_DIM = "head_dim"  # per-head vectors, as in q/k norms
VOCAB = "vocab"  # text or visual vocabulary
POSITION = "position"  # rows of a learned position table
QUERY = "query"  # learned queries of a resampler
PATCH = "patch"  # the flattened pixels of a patch, and convolution windows
CHANNELS_IN = "channels_in"  # what a projection reads when it is not a residual stream
CLASSES = "classes"  # outputs of a classification head, or of a router
EXPERT = "expert"  # experts of a mixture
LATENT = "latent"  # a low-rank bottleneck, such as that of compressed keys and values
RANK = "rank"  # of an adapter
NORM = "norm"  # scales and biases, replicated

# Activations.
BATCH = "batch"
LENGTH = "length"
ACTIVATION_EMBED = "activation_embed"

ALL = tuple(value for key, value in sorted(globals().items()) if key.isupper() and isinstance(value, str))
