"""Answers as a parquet file."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from vlm_jax.config import ConfigError

ROWS_PER_GROUP = 1000
TEXTS = ("sample_id", "task", "question", "reference", "text", "group")
NUMBERS = ("visual_tokens", "tokens_by_span")  # lists of them


def check_parquet(flag: str) -> None:
    """Checks that parquet files can be written.

    Args:
      flag: that asks for them.

    Raises:
      ConfigError: pyarrow is missing.
    """
    try:
        import pyarrow.parquet  # type: ignore # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{flag}: pyarrow is missing; pip install 'vlm_jax[parquet]', or omit the flag") from error


def write_parquet(rows: Iterable[Mapping[str, Any]], path: epath.Path) -> None:
    """Writes rows of answers, a thousand at a time, as a file that is always complete.

    Args:
      rows: with the same keys; `correct` becomes a number.
      path: of the file, local or `gs://`.
    """
    import pyarrow  # type: ignore
    import pyarrow.parquet  # type: ignore

    texts, numbers = pyarrow.string(), pyarrow.list_(pyarrow.int64())
    kinds = {
        **dict.fromkeys(TEXTS, texts),
        **dict.fromkeys(NUMBERS, numbers),
        "references": pyarrow.list_(texts),
        "correct": pyarrow.float64(),
        "is_finished": pyarrow.bool_(),
        "turns": pyarrow.int64(),
    }
    rows = iter(rows)
    first = list(itertools.islice(rows, ROWS_PER_GROUP))
    names = list(first[0]) if first else list(kinds)
    schema = pyarrow.schema([(name, kinds[name]) for name in names])
    draft = path.with_name(path.name + ".partial")
    with draft.open("wb") as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while first:
            columns = {name: [row[name] for row in first] for name in names}
            if "correct" in columns:
                columns["correct"] = [float(value) for value in columns["correct"]]
            writer.write_table(pyarrow.table(columns, schema))
            first = list(itertools.islice(rows, ROWS_PER_GROUP))
    draft.replace(path)
