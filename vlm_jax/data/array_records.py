"""ArrayRecord files, whose records are JSON objects."""

import threading
from typing import Any

from vlm_jax.data.local_file import LocalFile
from vlm_jax.data.stores import IndexedStore, MalformedRecords, parsed
from vlm_jax.types import Fields

SIGNATURE = bytes.fromhex("83af70d10d884a3f")  # of Riegeli files
RANDOM_ACCESS = "readahead_buffer_size:0,max_parallelism:0"


class ArrayRecords(IndexedStore):
    """The records of an ArrayRecord file; see `stores.Store`."""

    noun = "records"

    def __init__(self, file: LocalFile):
        super().__init__(file)
        self._open()
        if not self._reader.ok():
            raise MalformedRecords(f"{self.path}: an ArrayRecord file that is cut off or damaged; write it again")
        self._count = self._reader.num_records()

    def _open(self) -> None:
        from array_record.python import array_record_module  # type: ignore  # installed with grain

        self._lock = threading.Lock()
        self._reader = array_record_module.ArrayRecordReader(self._file.path, RANDOM_ACCESS)

    def __getstate__(self) -> Fields:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_reader")}

    def __setstate__(self, state: Fields) -> None:
        self.__dict__ |= state
        self._open()

    def __len__(self) -> int:
        return self._count

    def fields(self, index: int, *, whole: bool = True) -> Any:
        """The record at an index.

        Raises:
          ValueError: it is not a JSON object.
        """
        del whole
        with self._lock:
            try:
                (data,) = self._reader.read([index])
            except RuntimeError as error:
                raise ValueError(f"damaged: {error}") from None
        try:
            return parsed(data)
        except ValueError as error:
            raise ValueError(f"expected JSON, as of a line of JSONL: {error}") from None
