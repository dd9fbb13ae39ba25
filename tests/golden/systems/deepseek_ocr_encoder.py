"""DeepSeek-OCR's encoder: SAM, its neck and convolutions, CLIP behind it, the projector, and the rows of an image."""

import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import vlm_jax
from tests.golden import comparison
from vlm_jax.checkpoints.ops import CONV2D
from vlm_jax.encoders.cascade import Cascade
from vlm_jax.encoders.sam import relative_positions
from vlm_jax.layers.position_embedding import LearnedPositions2D
from vlm_jax.processors.mosaic import Mosaic, MosaicViews
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.views import PreparedImage
from vlm_jax.types import Params

PARTS = ("encoder", "patch_embed", "neck", "downsample_0", "downsample_1", "pre_norm", "layers")
NCHW = (0, 3, 1, 2)


def outputs(folder: pathlib.Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every array of the folder."""
    golden = comparison.read(folder)
    ours = vlm_jax.from_pretrained(folder)
    found = {}
    for name, pixels in inputs.items():
        if name.endswith(".pixels") and not name.startswith("clip_alone"):
            found |= {f"{name.removesuffix('pixels')}{key}": value for key, value in seen(ours, pixels).items()}
    for name, table in inputs.items():
        if size := re.fullmatch(r"rel\.(\d+)\.(\d+)\.table", name):
            count = int(size.group(2))
            out = relative_positions(jnp.asarray(table), count, count)
            found[f"rel.{size.group(1)}.{count}.out"] = out
    if "clip_alone.pixels" in inputs:
        found["clip_alone.out"] = clip_alone(ours, inputs["clip_alone.pixels"])
    found |= layouts(ours, golden)
    return {name: np.asarray(array) for name, array in found.items() if name in golden.expected}


def seen(ours: Any, pixels: np.ndarray) -> dict[str, jax.Array]:
    """What both encoders and the projector make of pixels [n, 3, H, W], under the names of the manifest."""
    encoder: Cascade = ours.module.encoder
    sam, clip = encoder.first, encoder.second
    images = jnp.asarray(pixels.transpose(0, 2, 3, 1))
    rows, cols = sam.patch_grid(*images.shape[1:3])
    grid = encoder.grid(*images.shape[1:3])

    def wanted(part, method):
        return method == "__call__" and (part.name in PARTS or str(part.name).startswith("run_"))

    @jax.jit
    def run(params, images):
        out, state = ours.module.apply({"params": params}, images, method="visual_tokens", capture_intermediates=wanted)
        of_sam, of_clip = (params["encoder"][name] for name in ("first", "second"))
        tables = position_table(sam.patch_grid(*sam.image_size), (rows, cols), of_sam)
        return out.tokens, state["intermediates"]["encoder"], tables, position_table(clip.image_size, grid, of_clip)

    tokens, state, of_sam, of_clip = run(ours.params, images)
    first, second = (called(state[name]) for name in ("first", "second"))
    runs = sorted((name for name in first if name.startswith("run_")), key=lambda name: int(name.removeprefix("run_")))
    blocks = np.concatenate([first[name][0] for name in runs])
    layers = state["second"]["blocks"]["layers"]["__call__"][0][0]
    convolutions = {name: first[name].transpose(NCHW) for name in ("neck", "downsample_0", "downsample_1")}
    params = ours.params["encoder"]["second"]
    classes = params["class_token"] + params["class_position"]
    patches = first["downsample_1"].reshape(len(images), -1, clip.width) + of_clip[None]
    classes = jnp.broadcast_to(classes[None], (len(images), *classes.shape))
    return {
        "sam.patch_embed": first["patch_embed"].reshape(blocks.shape[1:]),
        **{f"sam.block.{i}": block for i, block in enumerate(blocks)},
        "sam.neck": convolutions["neck"],
        "sam.net_2": convolutions["downsample_0"],
        "sam.net_3": convolutions["downsample_1"],
        "sam.pos_embed": of_sam.reshape(1, rows, cols, -1),
        "clip.pos_embed": jnp.concatenate([params["class_position"], of_clip])[None],
        "clip.embeddings": jnp.concatenate([classes, patches], axis=1),
        "clip.pre_layrnorm": second["pre_norm"],
        **{f"clip.layer.{i}": layer for i, layer in enumerate(layers)},
        "concat": state["__call__"][0].tokens,
        "tokens": tokens,
    }


def called(state: Params) -> Params:
    """What the parts of a module returned, by their names."""
    return {part: value["__call__"][0] for part, value in state.items() if "__call__" in value}


def position_table(table_grid: tuple[int, int], grid: tuple[int, int], params: Params) -> jax.Array:
    table = params["positions"]["table"]
    return LearnedPositions2D(table_grid, table.shape[-1]).apply({"params": params["positions"]}, grid)


def clip_alone(ours: Any, pixels: np.ndarray) -> jax.Array:
    """CLIP on pixels, by the patch convolution that the release's files have and its model does not use."""
    clip, key = ours.module.encoder.second, "model.vision_model.embeddings.patch_embedding.weight"
    (kernel,) = CONV2D(ours.checkpoint[key][...])
    side = kernel.shape[0]
    alone = clip.clone(
        embeds_patches=True,
        patch_bias=False,
        patch_size=side,
        image_size=tuple(side * count for count in clip.image_size),
        keep_class_token=True,
    )
    params = {**ours.params["encoder"]["second"], "patch_embed": {"kernel": kernel}}
    return jax.jit(alone.apply)({"params": params}, pixels.transpose(0, 2, 3, 1)).tokens


def layouts(ours: Any, golden: comparison.Golden) -> dict[str, np.ndarray]:
    """The rows of images with so many local views, the first ones of the pool, and of one without."""
    inputs, names = golden.inputs, [name for name in golden.expected if name.startswith("layout.")]
    if not names:
        return {}
    encoder = ours.module.encoder
    whole, tiles = (inputs[name].transpose(0, 2, 3, 1) for name in ("base.pixels", "layout.locals"))
    views = MosaicViews(
        Pixels(),
        whole.shape[1],
        encoder.grid(*whole.shape[1:3]),
        mosaic=Mosaic(tiles.shape[1], encoder.grid(*tiles.shape[1:3])),
    )
    learned = [ours.checkpoint[name][...] for name in ("model.image_newline", "model.view_seperator")]
    grids: dict[str, tuple[int, int] | None] = {}
    for name in names:
        size = re.fullmatch(r"layout\.(\d+)x(\d+)\.image_embeds", name)
        grids[name] = None if size is None else (int(size.group(2)), int(size.group(1)))
    seen = {
        name: PreparedImage(whole, 0, views.layout(grid), parts=None if grid is None else tiles[: grid[0] * grid[1]])
        for name, grid in grids.items()
    }
    batch = views.join([[image] for image in seen.values()])  # one row for each
    tokens = jax.jit(lambda images: ours.apply(images, method="visual_tokens").tokens)(batch)
    found = {}
    for own, (name, image) in zip(np.asarray(tokens), seen.items(), strict=True):
        table = np.concatenate([learned, own])
        found[name] = table[np.where(image.layout < 0, -1 - image.layout, image.layout + len(learned))]
    return found
