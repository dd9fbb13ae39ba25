"""Data sources and batches of samples.

A source is selected by its kind in `SOURCES`, whose entries are settings classes:

    settings = parse(SOURCES[kind], section, "config.data")   # checked; nothing is read yet
    settings.tasks, settings.channels, settings.streams       # known before anything is read
    source = settings.open(Tools(format_box=..., read_image=..., image_size=..., ...))
    source.train(stream, seed)          # endless grain.MapDataset; element i depends on (seed, i)
    source.sized(stream, seed)          # the same stream, and the sizes of its samples before pixels are decoded
    source.evaluation(seed, stream)     # finite, fixed by seed, can be iterated again

The stream "cells" yields `CellBatch`es of one page, all others yield `Sample`s, which a processor maps to batches of
one row. `loader.batches` and `loader.batch_at` join them:

    rows = source.train("questions", seed).map(processor)
    iterator = batches(rows, batch_size, shards=(0, 1), shard_count=4)    # the first half of every batch
    batch_at(rows, batch_size, step)                                      # the global batch of that step

| kind | streams | what it is |
|---|---|---|
| digits | questions, text_pages, fine_text_pages, cells, captions | pages of real handwritten digits, no file needed |
| documents | questions, text_pages, cells, captions | pages of text in matplotlib's fonts, no file needed |
| conversations | questions, captions, preferences | files of conversations about pictures and videos; mixtures |

An image that cannot be read is skipped by the source, up to a limit, and replaced by the next
record: the numbering of elements and the batches of other hosts do not change.
"""

from vlm_jax.data.conversations import Conversations
from vlm_jax.data.digits import Digits
from vlm_jax.data.documents import Documents

SOURCES = {"digits": Digits, "documents": Documents, "conversations": Conversations}
