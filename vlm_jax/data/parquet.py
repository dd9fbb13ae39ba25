"""Parquet files, read by pyarrow (the extra `parquet`): Cauldron's, FineVision's and TRL's tables with pictures."""

import collections
import threading
from typing import Any

import numpy as np

from vlm_jax.config import ConfigError
from vlm_jax.data.local_file import LocalFile
from vlm_jax.data.media import NOT_READ
from vlm_jax.data.stores import IndexedStore, MalformedRecords
from vlm_jax.types import Fields

GROUPS_IN_MEMORY = 4


class ParquetRows(IndexedStore):
    """The rows of a parquet file; see `stores.Store`. A few row groups are kept in memory."""

    noun = "rows"

    def __init__(self, file: LocalFile):
        super().__init__(file)
        self._open()
        metadata = self._table.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._ends = np.cumsum(np.array(sizes, np.int64))
        schema = self._table.schema
        leaves = [schema.column(number).path for number in range(len(schema.names))]
        # Of a picture's `bytes` and `path`, checking reads the path alone; its nulls count pictures as well.
        others = {leaf.rpartition(".")[0] for leaf in leaves if leaf.endswith(".path")}
        self._light = [leaf for leaf in leaves if leaf.rpartition(".")[2] != "bytes" or leaf[:-6] not in others]
        self._unread = {leaf.split(".")[0] for leaf in leaves} if len(self._light) < len(leaves) else set()

    def _open(self) -> None:
        try:
            import pyarrow  # type: ignore
            import pyarrow.parquet  # type: ignore
        except ImportError:
            raise ConfigError(
                f"{self.path}: parquet files need pyarrow, which is not installed: pip install 'vlm_jax[parquet]', or "
                "write the rows as JSONL"
            ) from None
        try:
            self._table = pyarrow.parquet.ParquetFile(self._file.path, memory_map=True)
        except (pyarrow.ArrowException, OSError) as error:
            raise MalformedRecords(f"{self.path}: a parquet file that is cut off or damaged: {error}") from error
        self._lock = threading.Lock()
        self._groups: collections.OrderedDict[tuple[int, bool], Any] = collections.OrderedDict()

    def __getstate__(self) -> Fields:
        mutable = ("_lock", "_groups", "_table")
        return {key: value for key, value in self.__dict__.items() if key not in mutable}

    def __setstate__(self, state: Fields) -> None:
        self.__dict__ |= state
        self._open()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def fields(self, index: int, *, whole: bool = True) -> Any:
        """The row as a dict; without `whole`, pictures have no bytes.

        Raises:
          ValueError: its row group is damaged.
        """
        group = int(np.searchsorted(self._ends, index, side="right"))
        place = index - (int(self._ends[group - 1]) if group else 0)
        (row,) = self._read(group, whole or not self._unread).slice(place, 1).to_pylist()
        return row if whole else {key: _marked(value) for key, value in row.items()}

    def _read(self, group: int, whole: bool) -> Any:
        import pyarrow  # type: ignore

        with self._lock:
            key = group, whole
            if key not in self._groups:
                try:
                    self._groups[key] = self._table.read_row_group(group, columns=None if whole else self._light)
                except (pyarrow.ArrowException, OSError) as error:
                    raise ValueError(f"row group {group} is damaged: {error}") from None
                if len(self._groups) > GROUPS_IN_MEMORY:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key]


def _marked(value: Any) -> Any:
    """Pictures of which only the path was read, with a mark for their bytes."""
    if isinstance(value, list):
        return [_marked(item) for item in value]
    if isinstance(value, dict):
        return {**value, "bytes": NOT_READ} if set(value) == {"path"} else {k: _marked(v) for k, v in value.items()}
    return value
