"""What every source of the table promises, whatever its kind."""

import json

import numpy as np
import pytest
from PIL import Image

from vlm_jax.config import parse
from vlm_jax.data import SOURCES
from vlm_jax.data.loader import batch_at
from vlm_jax.data.source import Elements, Settings, Source, Tools
from vlm_jax.processors.boxes import format_box
from vlm_jax.processors.digits_vocabulary import digits_tokenizer
from vlm_jax.processors.documents_vocabulary import documents_tokenizer
from vlm_jax.processors.image import image_size, normalize, open_image
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.plain_prompt import PlainPrompt
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.tiles import FixedTilesViews
from vlm_jax.processors.video import video_size
from vlm_jax.types import RowShape, Sample, text_of


def conversations_section(folder):
    rng = np.random.default_rng(0)
    for name in ("train", "test"):
        lines = []
        for number in range(8):
            Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8)).save(folder / f"{name}{number}.png")
            line = {
                "id": number,
                "image": f"{name}{number}.png",
                "question": f"count {number}",
                "answer": "3",
            }
            lines.append(json.dumps(line))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return {
        "train_path": str(folder / "train.jsonl"),
        "evaluation_path": str(folder / "test.jsonl"),
        "channels": 1,
    }


SECTIONS = {
    "digits": lambda folder: {"variants": 1, "evaluation_size": 4},
    "documents": lambda folder: {"grids": ((2, 2), (2, 4)), "page_size": 48, "evaluation_size": 4},
    "conversations": conversations_section,
}


def processor_of(kind):
    tokenizer = documents_tokenizer() if kind == "documents" else digits_tokenizer()
    return Processor(PlainPrompt(tokenizer), FixedTilesViews(Pixels((0.5,), (0.5,)), (48, 48), 4), tokenizer, 0)


def test_every_kind_is_under_contract():
    assert set(SECTIONS) == set(SOURCES)


@pytest.mark.parametrize("kind", SOURCES)
def test_a_source_keeps_its_contract(kind, tmp_path):
    processor = processor_of(kind)
    settings = parse(SOURCES[kind], SECTIONS[kind](tmp_path), "config.data")
    assert isinstance(settings, Settings)
    source = settings.open(
        Tools(format_box, open_image, image_size, lambda image: normalize(image, (0.5,), (0.5,)), video_size)
    )
    assert isinstance(source, Source)
    assert (source.tasks, source.channels, source.streams) == (
        settings.tasks,
        settings.channels,
        settings.streams,
    )
    assert "questions" in source.streams

    for sample in [source.train("questions", 0)[0], *source.evaluation(0)]:
        assert isinstance(sample, Sample)
        assert sample.task in source.tasks
        roles = [message["role"] for message in sample.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(image.dtype == np.uint8 and image.shape[2] == source.channels for image in sample.images)
    samples = list(source.evaluation(0))
    assert [s.messages for s in samples] == [s.messages for s in source.evaluation(0)]
    assert all(len(sample.messages) == 2 for sample in samples)
    assert len({sample.sample_id for sample in samples}) == len(samples)

    def row(sample):
        example = processor.example(sample.messages, sample.images, targets=True, name=sample.sample_id)
        return processor.rows([[example]], RowShape(128, 1), targets=True)

    # The stream is endless, and a batch is reproduced from (seed, step).
    rows, again = (source.train("questions", 5).map(row) for _ in range(2))
    ours, theirs = batch_at(rows, 4, 10_000), batch_at(again, 4, 10_000)
    np.testing.assert_array_equal(ours.tokens, theirs.tokens)
    np.testing.assert_array_equal(ours.images, theirs.images)
    assert (ours.tokens != batch_at(rows, 4, 10_001).tokens).any()
    assert ours.images.shape == (4, 1, 48, 48, 1)
    # What is learned decodes to the answers.
    first = source.train("questions", 5)[40_000]
    learned = ours.targets[0][ours.loss_weights[0] == 1.0]
    assert processor.tokenizer.decode(learned) == "".join(text_of(message) for message in first.messages[1::2])


def test_elements_are_a_sequence():
    squares, wanted = Elements(lambda index: index * index, 5), [0, 1, 4, 9, 16]
    assert list(squares) == wanted and 9 in squares and list(reversed(squares)) == wanted[::-1]
    assert [squares[index] for index in (0, -1, np.int64(2))] == [0, 16, 4]
    for part in (slice(1, 3), slice(None, None, -2), slice(-2, 99), slice(3, 3)):
        assert squares[part] == wanted[part]
    for outside in (5, -6):
        with pytest.raises(IndexError):
            squares[outside]
