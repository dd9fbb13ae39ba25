"""Shared by the contract tests: copies of kinds, and the modules that a table must list."""

import dataclasses
import importlib
import inspect
import pkgutil

from flax import linen as nn

from vlm_jax.encoders.encoder import ImageEncoder
from vlm_jax.testing.kinds import SIZES as SIZES
from vlm_jax.testing.kinds import leaves as leaves
from vlm_jax.testing.kinds import small as small


def cloned(module, **fields):
    """The module with other values of its fields, and with parts that have them; what has parts may lack the fields."""
    own = {f.name for f in dataclasses.fields(module)}
    names = [f.name for f in dataclasses.fields(module) if f.type is ImageEncoder]
    parts = {name: cloned(getattr(module, name), **fields) for name in names}
    kept = {name: value for name, value in fields.items() if name in own} if parts else fields
    return module.clone(**parts, **kept)


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
