"""Which rows of the visual table represent an image in tiles: LLaVA-1.6's layouts, written from its paper and code."""

import numpy as np

NEWLINE = 0  # the row of `image_newline`; those of the tiles follow


def best_resolution(width: int, height: int, candidates: list[list[int]]) -> tuple[int, int]:
    """The (width, height) of the candidates that keeps most pixels, and then wastes the fewest."""

    def kept_and_wasted(size):
        scale = min(size[0] / width, size[1] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - size[0] * size[1]

    chosen = max(candidates, key=kept_and_wasted)
    return chosen[0], chosen[1]


def unpadded(grid: np.ndarray, width: int, height: int) -> np.ndarray:
    """The rows and columns of a grid of the padded image that are of the image itself."""
    rows, cols = grid.shape
    if width / height > cols / rows:
        padding = (rows - int(height * (cols / width))) // 2
        return grid[padding : rows - padding]
    padding = (cols - int(width * (rows / height))) // 2
    return grid[:, padding : cols - padding]


def run(shape: tuple[int, ...], config: dict, side: int, kind: str = "spatial_unpad") -> np.ndarray:
    """The rows of one image: the whole image first, then its tiles combined.

    Args:
      shape: (height, width, ..) of the picture.
      config: with `image_grid_pinpoints` and `image_crop_resolution`.
      side: rows and columns of tokens of a tile.
      kind: `spatial_unpad`, `spatial` or `flat`.
    """
    height, width = shape[:2]
    tile = config["image_crop_resolution"]
    cols, rows = (size // tile for size in best_resolution(width, height, config["image_grid_pinpoints"]))
    whole = NEWLINE + 1 + np.arange(side**2)
    tiles = NEWLINE + 1 + side**2 + np.arange(rows * cols * side**2)
    if kind != "flat":
        tiles = tiles.reshape(rows, cols, side, side).transpose(0, 2, 1, 3).reshape(rows * side, cols * side)
    if kind == "spatial_unpad":
        tiles = unpadded(tiles, width, height)
        tiles = np.concatenate([tiles, np.full((len(tiles), 1), NEWLINE)], axis=1)
    return np.concatenate([whole, tiles.reshape(-1)])
