"""Pictures and texts side by side, for models of two towers and for classifiers: no conversation, no places."""

import dataclasses
import re
import string
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vlm_jax.interpolation import ResizeKind
from vlm_jax.processors.conversation import Picture
from vlm_jax.processors.image import height_and_width, to_picture
from vlm_jax.processors.naflex import interpolate, size_for_sequence
from vlm_jax.processors.patches import pack_patches, patchify
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.views import PictureMismatch, check_list
from vlm_jax.types import ImageTextBatch, PackedPatches

# Texts to the ids that a text tower reads.
Texts = Callable[[Sequence[str]], Int[np.ndarray, "B T"]]


@runtime_checkable
class ImageInputs(Protocol):
    """How pictures become what an image tower reads; one class a way."""

    def __call__(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "B height width channels"] | PackedPatches:
        """All pictures, in RGB, at least one."""
        ...


@dataclasses.dataclass(frozen=True)
class SquareInputs:
    """Tiles of one size by Pillow: CLIP, SigLIP, ViT.

    Attributes:
      views: size, fit and statistics.
    """

    views: SquareViews

    @property
    def size(self) -> Size:
        """(height, width) of the tiles, in pixels."""
        return self.views.size

    def at(self, size: Size) -> "SquareInputs":
        """The same with tiles of another size, cut from as much of a picture."""
        edge, scale = self.views.shortest_edge, min(size) / min(self.size)
        edge = None if edge is None else round(edge * scale)
        return SquareInputs(dataclasses.replace(self.views, size=size, shortest_edge=edge))

    def __call__(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "B height width channels"]:
        return np.concatenate([seen.pixels for seen in self.views.images(pictures)])


@dataclasses.dataclass(frozen=True)
class TensorFlowInputs:
    """Tiles of one size by TensorFlow's resizing, on the range [-1, 1]: big_vision, vision_transformer.

    Attributes:
      size: (height, width), in pixels.
      kind: of interpolation.
      shortest_edge: what the shorter side becomes, in pixels, before the middle is cut out; None where pictures are
        stretched to the size.
      whole: resized pixels lose their fractions.

    Source: big_vision, pp/ops_image.py, resize, resize_small and central_crop; vision_transformer,
    vit_jax/input_pipeline.py.
    """

    size: Size
    kind: ResizeKind = "bilinear"
    shortest_edge: int | None = None
    whole: bool = True

    def __call__(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "B height width channels"]:
        return np.stack([self._one(np.asarray(picture)) for picture in pictures])

    def _one(self, image: np.ndarray) -> np.ndarray:
        size, (height, width) = self.size, self.size
        if self.shortest_edge is not None:
            factor = np.float32(self.shortest_edge) / np.float32(min(image.shape[:2]))
            rows, cols = (int(np.rint(np.float32(side) * factor)) for side in image.shape[:2])
            size = (rows, cols)
        resized = interpolate(image if self.whole else image.astype(np.float32), size, self.kind)
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        return resized[top : top + height, left : left + width].astype(np.float32) / 127.5 - 1


@dataclasses.dataclass(frozen=True)
class NaflexInputs:
    """Patches of pictures at about their own aspect, filled up to one length: SigLIP 2 with NaFlex.

    Attributes:
      pixels: filter and statistics.
      patch_size: side of a patch, in pixels.
      max_num_patches: of a picture, and the length.
      floats: by TensorFlow's resizing of normalised pixels, as big_vision does it; else by Pillow in 8 bits.

    Source: Tschannen et al. 2025 (SigLIP 2), section 2.4.2; transformers,
    models/siglip2/image_processing_siglip2.py; big_vision, pp/proj/image_text/ops_naflex.py.
    """

    pixels: Pixels
    patch_size: int
    max_num_patches: int
    floats: bool = False

    def __call__(self, pictures: Sequence[Image.Image]) -> PackedPatches:
        packed = [self._one(picture) for picture in pictures]
        parts = ("patches", "positions", "sizes", "segment_ids")
        joined = {name: np.concatenate([getattr(part, name) for part in packed]) for name in parts}
        return dataclasses.replace(packed[0], **joined)  # type: ignore

    def _one(self, picture: Image.Image) -> PackedPatches:
        _, size = size_for_sequence(*height_and_width(picture), self.patch_size, self.max_num_patches)
        if self.floats:
            frame = interpolate(self.pixels.tiles([picture])[0], size, "bilinear_antialias")
        else:
            frame = self.pixels.tiles([self.pixels.resized(picture, size)])[0]
        patches, grid = patchify(frame[None], patch_size=self.patch_size, channels_last=True)
        return pack_patches(patches, [grid], length=self.max_num_patches)


@dataclasses.dataclass(frozen=True)
class TextInputs:
    """Texts as ids of one length: cut or filled up, an end kept as the last one.

    Attributes:
      tokenizer: puts its own tokens about a text.
      length: of every text, in tokens.
      pad_id: fills up. Towers read it like any token.
      lower: texts in lower case.
      bare: texts without punctuation and spare spaces.
      end_id: follows every text, instead of the tokenizer's own tokens about it; None for these.

    Source: transformers, models/siglip/tokenization_siglip.py, canonicalize_text; big_vision, pp/ops_text.py, tokenize.
    """

    tokenizer: Tokenizer
    length: int
    pad_id: int
    lower: bool = False
    bare: bool = False
    end_id: int | None = None

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "B T"]:
        tokens = np.full((len(texts), self.length), self.pad_id, np.int32)
        for row, text in zip(tokens, texts, strict=True):
            ids = self.tokenizer.encode(self.cleaned(text), add_special=self.end_id is None)
            ids += [] if self.end_id is None else [self.end_id]
            if len(ids) > self.length:
                end = ids[-1:] if ids[-1] in (self.tokenizer.eos_id, self.end_id) else []
                ids = [*ids[: self.length - len(end)], *end]
            row[: len(ids)] = ids
        return tokens

    def cleaned(self, text: str) -> str:
        """The text as the tokenizer gets it."""
        if self.lower:
            text = text.lower()
        if self.bare:
            text = re.sub(r"\s+", " ", text.translate(str.maketrans("", "", string.punctuation))).strip()
        return text


@dataclasses.dataclass(frozen=True)
class ImageTextProcessor:
    """Pictures and texts to what a model of two towers is given, or one of them alone.

    Attributes:
      images: None where the model reads no pictures.
      texts: None where it reads no texts.
      max_pixels: of a picture; more is refused as a decompression bomb.
    """

    images: ImageInputs | None
    texts: Texts | None = None
    max_pixels: int = 100_000_000

    def __call__(self, images: Sequence[Picture] = (), texts: Sequence[str] = ()) -> ImageTextBatch:
        """Any number of each.

        Args:
          images: files, Pillow's images, or uint8 arrays.
          texts: captions or prompts; longer ones than the tower reads are cut, as it was trained.

        Raises:
          PictureMismatch: neither is given, one stands without a list, or what the model does not read.
          CorruptImage: a picture cannot be read, or is too large.
        """
        if isinstance(texts, str):
            raise PictureMismatch(f"texts: expected a list of texts, got the text {texts!r}; write [{texts!r}]")
        check_list(images, "images")
        for what, given, reads in (("pictures", images, self.images), ("texts", texts, self.texts)):
            if given and reads is None:
                raise PictureMismatch(f"this model reads no {what}, and {len(given)} are given")
        if not images and not texts:
            raise PictureMismatch("neither pictures nor texts are given; pass images=[…], texts=[…] or both")
        pictures = [
            to_picture(image, max_pixels=self.max_pixels, name=f"image {number}") for number, image in enumerate(images)
        ]
        return ImageTextBatch(
            self.images(pictures) if self.images is not None and pictures else None,
            self.texts(texts) if self.texts is not None and texts else None,
        )
