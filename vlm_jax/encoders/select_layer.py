"""Number of blocks that a selected hidden state needs."""


def blocks_up_to(select_layer: int | None, depth: int) -> int:
    """Number of blocks to build: all, or those before hidden state number `select_layer`.

    Args:
      select_layer: 0 for the input of the first block, -1 for the output of the last, -2 for that of the
        one before; None for the whole model.
      depth: blocks of the whole model.

    Raises:
      ValueError: there is no such hidden state.
    """
    if select_layer is None:
        return depth
    if not -depth - 1 <= select_layer <= depth:
        raise ValueError(
            f"select_layer {select_layer}: {depth} blocks have the hidden states 0 to {depth}, or {-depth - 1} to -1"
        )
    return select_layer % (depth + 1)
