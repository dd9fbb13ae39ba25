"""Vision-language models as an encoder, a connector and a decoder."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_jax.connectors import register_connector
    from vlm_jax.pretrained import from_pretrained, register_family
    from vlm_jax.reducers import register_reducer

__all__ = ["from_pretrained", "register_connector", "register_family", "register_reducer"]
_MODULES = {
    "from_pretrained": "vlm_jax.pretrained",
    "register_connector": "vlm_jax.connectors",
    "register_family": "vlm_jax.pretrained",
    "register_reducer": "vlm_jax.reducers",
}


def __getattr__(name: str) -> Any:
    """Imports exported names on first use, so that `import vlm_jax` is fast."""
    if name in _MODULES:
        return getattr(importlib.import_module(_MODULES[name]), name)
    raise AttributeError(f"module 'vlm_jax' has no attribute '{name}'")
