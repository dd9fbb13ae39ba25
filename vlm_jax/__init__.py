"""Vision-language models as an encoder, a connector and a decoder."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_jax.pretrained import from_pretrained

__all__ = ["from_pretrained"]


def __getattr__(name: str) -> Any:
    """Imports exported names on first use, so that `import vlm_jax` is fast."""
    if name == "from_pretrained":
        from vlm_jax.pretrained import from_pretrained

        return from_pretrained
    raise AttributeError(f"module 'vlm_jax' has no attribute '{name}'")
