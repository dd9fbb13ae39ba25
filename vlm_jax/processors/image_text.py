"""Images and texts for two-tower models and classifiers, without conversations."""

import dataclasses
import functools
import re
import string
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

from vlm_jax.interpolation import ResizeKind
from vlm_jax.processors.conversation import Picture
from vlm_jax.processors.image import height_and_width, normalize, to_picture
from vlm_jax.processors.naflex import interpolate, size_for_sequence
from vlm_jax.processors.patches import pack_patches, patchify
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tiling import Size
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.views import PictureMismatch, check_list
from vlm_jax.types import ImageTextBatch, PackedPatches

# Texts to the ids of a text tower.
Texts = Callable[[Sequence[str]], Int[np.ndarray, "B T"]]


@runtime_checkable
class ImageInputs(Protocol):
    """Preprocessing of images for an image tower."""

    def __call__(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "B height width channels"] | PackedPatches:
        """Prepares all images, at least one, in the mode of the processor's channels."""
        ...


@dataclasses.dataclass(frozen=True)
class SquareInputs:
    """Images of one size, resized by Pillow: CLIP, SigLIP, ViT; or in floats: DINOv3.

    Attributes:
      views: size, fit and statistics.
      floats: stretches normalised pixels by this kind of interpolation, as torch does with floats; None for 8 bits.
    """

    views: SquareViews
    floats: ResizeKind | None = None

    @property
    def size(self) -> Size:
        """(height, width) of the tiles, in pixels."""
        return self.views.size

    def at(self, size: Size) -> "SquareInputs":
        """The same with another size and the same crop relative to the image."""
        edge, scale = self.views.shortest_edge, min(size) / min(self.size)
        edge = None if edge is None else round(edge * scale)
        return dataclasses.replace(self, views=dataclasses.replace(self.views, size=size, shortest_edge=edge))

    def __call__(self, pictures: Sequence[Image.Image]) -> Float[np.ndarray, "B height width channels"]:
        if self.floats is not None:
            pixels = self.views.pixels
            normalised = functools.partial(normalize, mean=pixels.mean, std=pixels.std)
            return np.stack(
                [interpolate(pixels.array(one), self.size, self.floats, convert=normalised) for one in pictures]
            )
        return np.concatenate([seen.pixels for seen in self.views.images(pictures)])


def _floats(pixels: np.ndarray) -> np.ndarray:
    return pixels.astype(np.float32)


@dataclasses.dataclass(frozen=True)
class TensorFlowInputs:
    """Images of one size, resized as in TensorFlow, in the range [-1, 1]: big_vision, vision_transformer.

    Attributes:
      size: (height, width), in pixels.
      kind: kind of interpolation.
      shortest_edge: length of the shorter side in pixels before the central crop; None where images are
        stretched to the size.
      whole: truncates resized pixels to integers.

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
        top, left = (size[0] - height) // 2, (size[1] - width) // 2
        window = (top, top + height), (left, left + width)
        resized = interpolate(image, size, self.kind, window=window, convert=None if self.whole else _floats)
        return resized.astype(np.float32) / 127.5 - 1


@dataclasses.dataclass(frozen=True)
class NaflexInputs:
    """Patches of images at approximately their own aspect ratio, padded to one length: SigLIP 2 with NaFlex.

    Attributes:
      pixels: filter and statistics.
      patch_size: side of a patch, in pixels.
      max_num_patches: maximum patches of an image, and the padded length.
      floats: resizes normalised pixels as TensorFlow in big_vision; else by Pillow in 8 bits.

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
            mean, std = self.pixels.mean, self.pixels.std
            normalised = functools.partial(normalize, mean=mean, std=std)
            frame = interpolate(self.pixels.array(picture), size, "bilinear_antialias", convert=normalised)
        else:
            frame = self.pixels.tiles([self.pixels.resized(picture, size)])[0]
        patches, grid = patchify(frame[None], patch_size=self.patch_size, channels_last=True)
        return pack_patches(patches, [grid], length=self.max_num_patches)


@dataclasses.dataclass(frozen=True)
class TextInputs:
    """Texts as ids of one length: truncated or padded, with the end token kept as the last one.

    Attributes:
      tokenizer: also adds its start and end tokens.
      length: number of tokens of every text.
      pad_id: id of padding, which is not masked, so that the table needs a row for it.
      lower: converts texts to lower case.
      bare: removes punctuation and repeated spaces.
      end_id: appended to every text instead of the tokenizer's start and end tokens; None for these.
      table_rows: number of tokens in the tower's table; None where a text cannot have others.

    Source: transformers, models/siglip/tokenization_siglip.py, canonicalize_text; big_vision, pp/ops_text.py, tokenize.
    """

    tokenizer: Tokenizer
    length: int
    pad_id: int
    lower: bool = False
    bare: bool = False
    end_id: int | None = None
    table_rows: int | None = None

    def __call__(self, texts: Sequence[str]) -> Int[np.ndarray, "B T"]:
        tokens = np.full((len(texts), self.length), self.pad_id, np.int32)
        for number, (row, text) in enumerate(zip(tokens, texts, strict=True)):
            ids = self.tokenizer.encode(self.cleaned(text), add_special=self.end_id is None)
            ids += [] if self.end_id is None else [self.end_id]
            if len(ids) > self.length:
                end = ids[-1:] if ids[-1] in (self.tokenizer.eos_id, self.end_id) else []
                ids = [*ids[: self.length - len(end)], *end]
            self.tokenizer.check_rows(ids, self.table_rows, f"text {number}")
            row[: len(ids)] = ids
        return tokens

    def cleaned(self, text: str) -> str:
        """The text as passed to the tokenizer."""
        if self.lower:
            text = text.lower()
        if self.bare:
            text = re.sub(r"\s+", " ", text.translate(str.maketrans("", "", string.punctuation))).strip()
        return text


@dataclasses.dataclass(frozen=True)
class ImageTextProcessor:
    """Preprocesses images and texts for two-tower models and classifiers.

    Attributes:
      images: None where the model takes no images.
      texts: None where it takes no texts.
      max_pixels: maximum pixels of an image; more is treated as a decompression bomb.
      channels: of the images: 1 for grey, 3 for RGB.
    """

    images: ImageInputs | None
    texts: Texts | None = None
    max_pixels: int = 100_000_000
    channels: int = 3

    def __call__(
        self, images: Sequence[Picture] = (), texts: Sequence[str] = (), *, allow_network: bool = False
    ) -> ImageTextBatch:
        """Preprocesses any number of images and texts.

        Args:
          images: files or other locations as in `sources.located`, bytes, Pillow images, or uint8 arrays.
          texts: captions or prompts; longer ones than the tower's context are truncated, as in training.
          allow_network: whether images with a web address are downloaded.

        Raises:
          PictureMismatch: both are empty, one is not a list, an item is not a text, or the model does not take it.
          CorruptImage: an image cannot be read, or is too large.
        """
        check_list(images, "images")
        check_list(texts, "texts")
        for number, text in enumerate(texts):
            if not isinstance(text, str):
                raise PictureMismatch(f"texts[{number}]: expected a text, got {text!r}")
        for what, given, reads in (("images", images, self.images), ("texts", texts, self.texts)):
            if given and reads is None:
                raise PictureMismatch(f"this model takes no {what}, got {len(given)}")
        if not images and not texts:
            raise PictureMismatch("expected images or texts, got none; pass images=[…], texts=[…] or both")
        mode = "L" if self.channels == 1 else "RGB"
        read = functools.partial(to_picture, max_pixels=self.max_pixels, mode=mode, allow_network=allow_network)
        pictures = [read(image, name=f"image {number}") for number, image in enumerate(images)]
        return ImageTextBatch(
            self.images(pictures) if self.images is not None and pictures else None,
            self.texts(texts) if self.texts is not None and texts else None,
        )
