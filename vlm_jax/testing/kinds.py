"""Shared by the contract tests: the kinds under test, small modules of any kind, and checks of their parameters."""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from vlm_jax import axes
from vlm_jax.decoders.mixed import BlockKind
from vlm_jax.encoders.encoder import ImageEncoder
from vlm_jax.encoders.vit import ViT
from vlm_jax.layers.rope import Rope
from vlm_jax.plugins import PluginError, Registry
from vlm_jax.sharding.rules import RULES

_package = "vlm_jax"

# Values of the fields that kinds have in common. A field without a default that is not here makes the
# suite fail: give it a default, let `for_budget` solve it, or add it.
SIZES = {
    "image_size": (32, 64),
    "patch_size": 8,
    "width": 16,
    "depth": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "mlp_dim": 32,
    "vocab_size": 12,
    "features": 16,
    "layers": (1, 1, 1, 1),
    "base_width": 8,
    "projection_dim": 16,
    "neck_dim": 16,
    "global_blocks": (1,),
    "scales": (1, 2),
    "low_size": 16,
    "combine": "sequence",
    "latent_dim": 8,
    "expert_dim": 8,
    "num_experts": 4,
    "num_selected": 2,
    "kinds": (BlockKind(8, 1, Rope()), BlockKind(12, 2, Rope(100.0, "proportional", rotated_share=0.5), 3, True)),
    "order": (0, 1),
    "mixers": ("delta", "attention"),
    "num_key_heads": 1,
    "num_value_heads": 2,
    "key_dim": 4,
    "value_dim": 6,
    "table_sizes": (9,),
}

# Parts of composite modules that take other inputs than pixels -> their fields.
_PARTS = {"second": {"embeds_patches": False, "patch_size": 1, "image_size": (4, 8)}}


def small(cls: Any, **fields: Any) -> Any:
    """A module of class `cls`: its fields without a default come from `fields` and `SIZES`.

    A composite module gets a small ViT for each part.
    """
    own = [f for f in dataclasses.fields(cls) if f.init and f.name not in ("parent", "name")]
    required = [f.name for f in own if f.default is f.default_factory is dataclasses.MISSING]
    parts = {f.name: small(ViT, **_PARTS.get(f.name, {})) for f in own if f.type is ImageEncoder}
    fields = {**parts, **fields}
    unknown = [name for name in required if name not in fields and name not in SIZES]
    assert not unknown, f"{cls.__name__}.{unknown}: no default, and neither solved nor in SIZES of {__file__}"
    return cls(**{**{name: SIZES[name] for name in required if name in SIZES}, **fields})


def select(package: str) -> None:
    """Sets the package whose kinds are tested; before the modules of tests are imported."""
    global _package
    _package = package


def under_test(table: Registry[Any], function: str) -> list[str]:
    """The kinds of a table that the selected package registers.

    Args:
      table: of the kinds.
      function: that registers them, for errors.

    Raises:
      PluginError: there are none.
    """
    found = table.kinds_of(_package)
    if not found:
        raise PluginError(
            f"the package '{_package}' registers nothing by {function}: install it (pip install -e .), or remove the "
            "import of these tests"
        )
    return found


def leaves(tree: Any) -> dict[str, np.ndarray]:
    """{path: array} of a parameter tree."""
    flat = jax.tree_util.tree_flatten_with_path(nn.meta.unbox(tree))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}


def check_names(tree: Any, depth: int) -> None:
    """Asserts that every dimension of every boxed parameter has a logical axis, which has a rule.

    Args:
      tree: boxed parameters, or their shapes.
      depth: most layers of a stack.
    """
    boxed = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, nn.Partitioned))
    assert boxed
    for path, leaf in boxed:
        where = jax.tree_util.keystr(path)
        assert isinstance(leaf, nn.LogicallyPartitioned), f"{where} has no names; make it with layers.dense.with_axes"
        assert len(leaf.names) == leaf.value.ndim, f"{where}: {leaf.names} for the shape {leaf.value.shape}"
        unknown = set(leaf.names) - set(axes.ALL)
        assert not unknown, f"{where}: {unknown} are no names of vlm_jax/axes.py"
        assert all(name in RULES for name in leaf.names), f"{where}: {leaf.names}"
        if "'layers'" in where:
            assert leaf.names[0] == axes.LAYERS and leaf.value.shape[0] <= depth, where
