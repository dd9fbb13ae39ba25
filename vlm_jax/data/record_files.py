"""The checked records of a file: opened and checked once a process, then read one by one."""

import array
import collections
import dataclasses
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from vlm_jax.config import ConfigError
from vlm_jax.data.packing import fingerprint
from vlm_jax.data.schemas import Reader, Record, check_texts
from vlm_jax.data.spelling import Notes, Spelling
from vlm_jax.data.stores import MalformedRecords, files_of, open_store

MAX_REPORTED = 20  # faulty records that one error lists
FILES_IN_MEMORY = 16
_log = logging.getLogger(__name__)
_opened: collections.OrderedDict[str, "RecordFile"] = collections.OrderedDict()


@dataclasses.dataclass(frozen=True)
class Rules:
    """What every record of a file must satisfy.

    Attributes:
      tasks: allowed values of `task`; the first is the default.
      num_images: images of every record; None for any number.
      spelling: names of keys and speakers.
      max_checked: records that are checked when a file is opened, evenly spread; the others when they are read.
      placeholders: texts that no message may have, since they stand for an image or a video in the model's prompt.
    """

    tasks: tuple[str, ...]
    num_images: int | None = None
    spelling: Spelling = dataclasses.field(default_factory=Spelling)
    max_checked: int = 200_000
    placeholders: tuple[str, ...] = ()


class RecordFile:
    """Random access to the records of a file, by any number of threads and processes.

    Args:
      path: as of `stores.open_store`.
      rules: for every record.
      key: of the path under config.data, for messages.

    Raises:
      ConfigError: there is no such file, or it has no record.
      MalformedRecords: the file cannot be read, or records are malformed, the first MAX_REPORTED of which are listed.
    """

    def __init__(self, path: str, rules: Rules, key: str):
        self.path, self._rules = path, rules
        self._store = open_store(path, key)
        if not len(self._store):
            raise ConfigError(f"config.data.{key}: '{path}' has no record")
        self._repeated, self._numbers_all = np.zeros(0, np.int64), False
        self._check()

    def __len__(self) -> int:
        return len(self._store)

    def __getitem__(self, index: int) -> Record:
        """The record at an index, with a name that no other record of the file has.

        Raises:
          MalformedRecords: it cannot be used; only for one that was not checked.
        """
        try:
            return self._named(index, self._record(index, Notes()))
        except ValueError as error:
            raise MalformedRecords(f"{self._store.place(index)}: {error}") from None

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def fingerprint(self) -> str:
        """Of the path, the content, and the rules by which records are read; placeholders only refuse records."""
        rules = {name: value for name, value in dataclasses.asdict(self._rules).items() if name != "placeholders"}
        return fingerprint({"path": self.path, "content": self._store.digest(), "rules": rules})

    def _record(self, index: int, notes: Notes, *, whole: bool = True) -> Record:
        rules = self._rules
        reader = Reader(self._store.folder, rules.tasks, rules.spelling, notes)
        record = reader.record(self._store.fields(index, whole=whole))
        if rules.num_images not in (None, len(record.images)):
            raise ValueError(f"{len(record.images)} images, but config.data.num_images is {rules.num_images}")
        check_texts((*record.messages, *record.rejected), rules.placeholders)
        return record

    def _named(self, index: int, record: Record) -> Record:
        number, place = str(self._store.number(index)), np.searchsorted(self._repeated, index)
        if record.record_id is None:
            return dataclasses.replace(record, record_id=number)
        if self._numbers_all or (place < len(self._repeated) and self._repeated[place] == index):
            return dataclasses.replace(record, record_id=f"{record.record_id}@{number}")
        return record

    def _check(self) -> None:
        """Reads records without their pictures; keeps which of them repeat an id."""
        count, most = len(self._store), self._rules.max_checked
        indices = range(count) if count <= most else np.linspace(0, count - 1, most).astype(np.int64).tolist()
        notes, faults, num_faults, ids = Notes(), [], 0, array.array("q")
        for index in indices:
            try:
                record = self._record(index, notes, whole=False)
                ids.append(hash(record.record_id if record.record_id is not None else (index,)))
            except ValueError as error:
                num_faults += 1
                ids.append(hash((index,)))
                if len(faults) < MAX_REPORTED:
                    faults.append(f"  {self._store.place(index)}: {error}")
        if num_faults:
            more = f"\n  and {num_faults - len(faults)} more" if num_faults > len(faults) else ""
            listed = "\n".join(faults)
            raise MalformedRecords(
                f"{num_faults} {self._store.noun} are not valid records of conversations:\n{listed}{more}"
            )
        first = np.unique(np.frombuffer(ids, np.int64), return_index=True)[1]
        again = np.ones(len(ids), bool)
        again[first] = False
        self._repeated = np.asarray(indices)[again]
        if count > most:
            _log.info("%s: %d of %d records were checked; the others are when they are read", self.path, most, count)
            self._numbers_all = True  # ids of the others are not known
        if notes.cut:
            _log.warning("%s: %d records begin with an assistant's turn, which is omitted", self.path, notes.cut)
        if notes.ignored:
            listed = ", ".join(f"{name} ({number})" for name, number in notes.ignored.most_common())
            _log.warning("%s: keys that no schema has are ignored, with their numbers: %s", self.path, listed)


def open_records(path: str, rules: Rules, key: str) -> RecordFile:
    """The records of a file, which is checked again only after it has changed.

    Raises:
      As `RecordFile`.
    """
    state = json.dumps([path, dataclasses.asdict(rules), key, _state(path)])
    if state not in _opened:
        _opened[state] = RecordFile(path, rules, key)
        if len(_opened) > FILES_IN_MEMORY:
            _opened.popitem(last=False)
    _opened.move_to_end(state)
    return _opened[state]


def _state(path: str) -> list[Any]:
    """What changes with the files of a path; empty where there are none."""
    stats = []
    for file in files_of(path):
        if "://" in file and epath.Path(file).exists():
            stat = epath.Path(file).stat()
            stats.append([file, stat.length, str(stat.mtime)])
        elif "://" not in file and os.path.exists(file):
            local = os.stat(file)
            stats.append([file, local.st_ino, local.st_size, local.st_mtime_ns])
    return stats
