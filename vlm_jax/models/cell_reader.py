"""An encoder with a dense head that predicts class and box for each cell of a page."""

from typing import cast

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from vlm_jax import axes
from vlm_jax.encoders.encoder import Encoder
from vlm_jax.layers.dense import Dense
from vlm_jax.types import Grid, VisualFeatures


class CellReader(nn.Module):
    """Two linear heads on every feature predict the class and the box of its cell.

    Dense supervision teaches an encoder to read and to locate much faster than answers do, so
    it is the first stage where no released weights are loaded. Each feature predicts independently, so that
    each is useful as a visual token, averaged with its neighbours or not.

    Attributes:
      encoder: an entry of `encoders.ENCODERS` whose grid is divisible by `cells`.
      cells: rows and columns of cells R, C.
      num_classes: classes of a cell.
    """

    encoder: Encoder
    cells: Grid
    num_classes: int

    def setup(self):
        self.classes = Dense(self.num_classes, (axes.EMBED, axes.CLASSES))
        self.boxes = Dense(4, (axes.EMBED, axes.CLASSES))

    def __call__(
        self, images: Float[Array, "B height width channels"]
    ) -> tuple[Float[Array, "B R C F K"], Float[Array, "B R C F 4"]]:
        """Class logits, and (left, top, right, bottom) as fractions of the page; float32.

        F features per cell.

        Raises:
          ValueError: the cells do not divide the encoder's grid.
        """
        features = cast(VisualFeatures, self.encoder(images))
        (rows, cols), (cell_rows, cell_cols) = features.grid, self.cells
        if rows % cell_rows or cols % cell_cols:
            raise ValueError(f"{cell_rows}x{cell_cols} cells do not divide the encoder's {rows}x{cols} grid")
        shape = (-1, cell_rows, rows // cell_rows, cell_cols, cols // cell_cols, features.tokens.shape[-1])
        cells = features.tokens.reshape(shape).transpose(0, 1, 3, 2, 4, 5)
        cells = cells.reshape(*cells.shape[:3], -1, cells.shape[-1])
        return self.classes(cells).astype(jnp.float32), self.boxes(cells).astype(jnp.float32)
