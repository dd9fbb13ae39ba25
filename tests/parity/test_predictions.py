"""Answers as a parquet file, read by pyarrow."""

import pyarrow.parquet
from etils import epath

from vlm_jax.evals.predictions import ROWS_PER_GROUP, write_parquet


def test_rows_are_read_back(tmp_path):
    rows = [
        {
            "sample_id": f"a.jsonl:{place}",
            "task": "vqa",
            "text": "caf\u00e9",
            "references": ["caf\u00e9"] * (place % 3 + 1),
            "question": "q",
            "group": "g",
            "is_finished": place % 2 == 0,
            "turns": place % 3 + 1,
            "correct": place % 2 == 0 if place % 3 else 0.25,
            "visual_tokens": [16] * (place % 2),
            "tokens_by_span": [],
        }
        for place in range(ROWS_PER_GROUP + 5)
    ]
    path = epath.Path(tmp_path) / "answers.parquet"
    write_parquet(iter(rows), path)
    table = pyarrow.parquet.read_table(path)
    assert table.to_pylist() == [row | {"correct": float(row["correct"])} for row in rows]
    assert [str(table.schema.field(name).type) for name in ("text", "correct")] == ["string", "double"]
    assert pyarrow.parquet.ParquetFile(path).num_row_groups == 2  # no more are in memory at a time
    write_parquet([], path)
    assert pyarrow.parquet.read_table(path).num_rows == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["answers.parquet"]
