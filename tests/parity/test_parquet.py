"""Parquet files that pyarrow writes, with the columns of Cauldron, FineVision and TRL."""

import io
import pickle

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from vlm_jax.data import media
from vlm_jax.data.record_files import Rules, open_records
from vlm_jax.data.stores import MalformedRecords
from vlm_jax.processors.image import open_image
from vlm_jax.types import images_of, text_of

PICTURE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
RULES = Rules(("vqa",))


def picture(value):
    data = io.BytesIO()
    Image.new("L", (3, 2), value).save(data, "PNG")
    return {"bytes": data.getvalue(), "path": None}


def shades(record):
    return [int(open_image(media.content(image), channels=1).max()) for image in record.images]


def write(path, rows, schema):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, row_group_size=2)


def test_pairs_of_texts_with_any_number_of_pictures(tmp_path):
    pair = pyarrow.struct([("user", pyarrow.string()), ("assistant", pyarrow.string()), ("source", pyarrow.string())])
    schema = pyarrow.schema(
        [
            ("images", pyarrow.list_(PICTURE)),
            ("texts", pyarrow.list_(pair)),
            ("relevance_ratings", pyarrow.list_(pyarrow.int64())),
        ]
    )
    rows = [
        {
            "images": [picture(10 * row + place) for place in range(row)],
            "texts": [{"user": f"q{row}", "assistant": "a", "source": "s"}] * 2,
            "relevance_ratings": [5, None],
        }
        for row in range(5)
    ]
    write(tmp_path / "set.parquet", rows, schema)
    records = pickle.loads(pickle.dumps(open_records(str(tmp_path / "set.parquet"), RULES, "train_path")))
    assert [shades(record) for record in records] == [[10 * row + place for place in range(row)] for row in range(5)]
    assert [len(images_of(record.messages[0])) for record in records] == list(range(5))
    assert [text_of(record.messages[0]) for record in records] == [f"q{row}" for row in range(5)]
    assert all(len(record.messages) == 4 for record in records)


def test_messages_whose_items_lack_keys(tmp_path):
    item = pyarrow.struct([("type", pyarrow.string()), ("text", pyarrow.string()), ("index", pyarrow.int64())])
    message = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.list_(item))])
    schema = pyarrow.schema([("messages", pyarrow.list_(message)), ("images", pyarrow.list_(PICTURE))])
    asked = [{"type": "text", "text": "q"}, {"type": "image", "index": 0}]
    said = [{"role": "user", "content": asked}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]
    write(tmp_path / "set.parquet", [{"messages": said, "images": [picture(7)]}] * 3, schema)
    for record in open_records(str(tmp_path / "set.parquet"), RULES, "train_path"):
        assert record.messages[0]["content"] == [{"type": "text", "text": "q"}, {"type": "image"}]
        assert (record.messages[1]["content"], shades(record)) == ("a", [7])


def test_a_damaged_file_and_a_row_without_turns_are_named(tmp_path):
    path = tmp_path / "set.parquet"
    write(path, [{"images": [picture(1)]}], pyarrow.schema([("images", pyarrow.list_(PICTURE))]))
    with pytest.raises(MalformedRecords, match=r"1 rows .*\n.*set\.parquet\[0\]: no key with turns: .* got images"):
        open_records(str(path), RULES, "train_path")
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(MalformedRecords, match=r"set\.parquet: a parquet file that is cut off or damaged"):
        open_records(str(path), RULES, "train_path")
