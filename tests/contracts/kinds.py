"""Shared by the contract tests: small kinds of any table, and the modules that a table must list."""

import dataclasses
import importlib
import inspect
import pkgutil

import jax
import numpy as np
from flax import linen as nn

from vlm_jax.encoders.encoder import ImageEncoder
from vlm_jax.encoders.vit import ViT

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
}


def small(cls, **fields):
    """A module of class `cls`: its fields without a default come from `fields` and `SIZES`.

    A composite module gets a small ViT for each part.
    """
    own = [f for f in dataclasses.fields(cls) if f.init and f.name not in ("parent", "name")]
    required = [f.name for f in own if f.default is f.default_factory is dataclasses.MISSING]
    fields = {**{f.name: small(ViT) for f in own if f.type is ImageEncoder}, **fields}
    unknown = [name for name in required if name not in fields and name not in SIZES]
    assert not unknown, f"{cls.__name__}.{unknown}: no default, and neither solved nor in SIZES of {__file__}"
    return cls(**{**{name: SIZES[name] for name in required if name in SIZES}, **fields})


def cloned(module, **fields):
    """The module with other values of its fields, or with parts that have them where it has none such."""
    names = [f.name for f in dataclasses.fields(module) if f.type is ImageEncoder]
    parts = {name: cloned(getattr(module, name), **fields) for name in names}
    return module.clone(**(parts or fields))


def defined(package, method):
    """Every Linen module with `method` that a file of `package` defines, private ones aside."""
    found = []
    for info in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        module = importlib.import_module(info.name)
        for name, cls in inspect.getmembers(module, inspect.isclass):
            own = cls.__module__ == info.name and not name.startswith("_")
            if own and issubclass(cls, nn.Module) and hasattr(cls, method):
                found.append(cls)
    return found


def leaves(tree):
    """{path: array} of a parameter tree."""
    flat = jax.tree_util.tree_flatten_with_path(nn.meta.unbox(tree))[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in flat}
