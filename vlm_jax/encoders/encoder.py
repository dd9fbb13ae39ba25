"""The contract of encoders, which `encoders/__init__.py` registers."""

from typing import Any, Protocol, TypeVar, runtime_checkable

from jaxtyping import Array, Float

from vlm_jax.types import Grid, PackedPatches, PatchFormat, VisualFeatures

Kind = TypeVar("Kind")  # the class of a module; beartype reads no `Self` here


@runtime_checkable
class Encoder(Protocol):
    """A Linen module that turns images into features; a part of `models.vlm.VLM`.

    Attributes:
      features: output width D_v.
      num_blocks: transformer blocks that are built, for reducers that work inside them; 0 where there are none that
        are alike, or several encoders have their own.
    """

    @property
    def features(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of the features of an image of `height` x `width` pixels; callable before `init`."""
        ...

    def clone(self: Kind, **fields: Any) -> Kind:
        """The encoder with other values of its fields."""
        ...

    def __call__(self, images: Any, /) -> VisualFeatures | tuple[VisualFeatures, VisualFeatures]:
        """Features of what the kind reads: pixels, `PackedPatches` or `TwoSizes`. Two encoders may give two."""
        ...


@runtime_checkable
class ImageEncoder(Encoder, Protocol):
    """An encoder of images of one size: the contract of `ENCODERS`."""

    def __call__(self, images: Float[Array, "B height width channels"], /) -> VisualFeatures:
        """Features of normalised pixels, in row-major order of `grid`."""
        ...


@runtime_checkable
class PackedEncoder(Encoder, Protocol):
    """An encoder of images of any size that share a sequence: the contract of `PACKED_ENCODERS`.

    Attributes:
      patch_format: how the processor cuts and packs images.
    """

    @property
    def patch_format(self) -> PatchFormat: ...

    def __call__(self, packed: PackedPatches, /) -> VisualFeatures:
        """Features of packed patches, in blocks (`VisualFeatures.block`)."""
        ...
