"""The pages of text: glyphs as PIL draws them, texts read back by templates, answers derived from the pages."""

import functools
import re

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from vlm_jax.config import ConfigError, parse
from vlm_jax.data import SOURCES, glyphs
from vlm_jax.data.document_pages import DocumentPages, finer, text_of_page
from vlm_jax.data.glyphs import CHARACTERS, font_names, render_glyphs
from vlm_jax.data.source import Tools
from vlm_jax.processors import documents_vocabulary
from vlm_jax.types import CellBatch, text_of

from ..advice import tried

TOOLS = Tools(
    format_box=lambda *args: "",
    read_image=lambda path: None,
    image_size=lambda path: None,
    prepare_image=lambda image: image.astype(np.float32) / 255,
    video_size=lambda path: None,
)
GRIDS = ((2, 3), (4, 6))
FONTS = ("DejaVuSansMono", "cmtt10", "DejaVuSerif")
SMALL = {"grids": GRIDS, "page_size": 96, "fonts": FONTS, "evaluation_size": 5, "turns_per_page": 3}


def opened(**options):
    return parse(SOURCES["documents"], {**SMALL, **options}, "config.data").open(TOOLS)


def font(name, em):
    path = f"{matplotlib.get_data_path()}/fonts/ttf/{name}.ttf"
    return ImageFont.truetype(path, em, layout_engine=ImageFont.Layout.BASIC)


def extent(face):
    """Rows of ink above and below the base line, of all characters together."""
    boxes = [face.getbbox(character, anchor="ls") for character in CHARACTERS]
    return -min(box[1] for box in boxes), max(box[3] for box in boxes)


def fits(name, em, height, width):
    face = font(name, em)
    return sum(extent(face)) <= height and max(face.getlength(character) for character in CHARACTERS) <= width


def drawn(face, character, height, width):
    """The cell of one character, drawn by PIL: centred by its advance, on the base line of all characters."""
    above, below = extent(face)
    picture = Image.new("L", (width, height))
    left = round((width - face.getlength(character)) / 2)
    place = (left, (height - above - below) // 2 + above)
    ImageDraw.Draw(picture).text(place, character, fill=255, font=face, anchor="ls")
    return np.asarray(picture)


@functools.cache
def templates(name, height, width):
    face = font(name, render_glyphs(name, height, width).em)
    return np.stack([drawn(face, character, height, width) for character in CHARACTERS]).astype(int)


def cells_of(image, rows, cols):
    """[rows, cols, height, width] of an image."""
    height, width = image.shape[0] // rows, image.shape[1] // cols
    return image[:, :, 0].reshape(rows, height, cols, width).transpose(0, 2, 1, 3).astype(int)


def read_by_templates(image, rows, cols, fonts=FONTS):
    """The text of a page without noise: of every cell the nearest character, in the font that is nearest in all."""
    cells = cells_of(image, rows, cols).reshape(rows * cols, -1)
    readings = []
    for name in fonts:
        known = templates(name, image.shape[0] // rows, image.shape[1] // cols).reshape(len(CHARACTERS), -1)
        distances = ((cells[:, None] - known[None]) ** 2).sum(-1)
        readings.append((distances.min(1).sum(), "".join(CHARACTERS[i] for i in distances.argmin(1))))
    return min(readings)[1]


def turns(sample):
    """(question, answer) of every turn."""
    texts = [text_of(message) for message in sample.messages]
    return list(zip(texts[::2], texts[1::2], strict=True))


def checked(question, answer, text):
    """(rows, cols) of a question whose answer is checked against the text of the page."""
    page = re.fullmatch(r"READ (\d+) BY (\d+)", question)
    if page:
        rows, cols = map(int, page.groups())
        assert answer == text and len(text) == rows * cols
        return rows, cols
    line, rows, cols = map(int, re.fullmatch(r"READ LINE (\d+) OF (\d+) BY (\d+)", question).groups())
    assert 1 <= line <= rows
    lines = [text[start : start + cols] for start in range(0, len(text), cols)]
    assert answer == lines[line - 1] and len(lines) == rows
    return rows, cols


@pytest.mark.parametrize("name", FONTS)
@pytest.mark.parametrize(("height", "width"), [(24, 16), (12, 6), (48, 32)])
def test_a_glyph_is_what_pil_draws_at_the_largest_size_that_fits(name, height, width):
    glyphs = render_glyphs(name, height, width)
    assert fits(name, glyphs.em, height, width)
    assert not any(fits(name, em, height, width) for em in range(glyphs.em + 1, 2 * height + 1))
    inside = glyphs.pixels[:, :, glyphs.overhang : glyphs.overhang + width]
    np.testing.assert_array_equal(inside, templates(name, height, width))
    for pixels, box in zip(glyphs.pixels, glyphs.boxes.tolist(), strict=True):
        ys, xs = np.nonzero(pixels)
        xs = xs - glyphs.overhang  # no ink is cut off: the box is that of the font
        assert box == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]


def test_slanted_ink_reaches_into_the_neighbouring_cell_and_is_kept():
    name, height, width = "DejaVuSansMono-Oblique", 12, 6
    glyphs, face = render_glyphs(name, height, width), font("DejaVuSansMono-Oblique", 10)
    assert (glyphs.em, glyphs.overhang) == (10, 1)
    inks = [int(np.asarray(face.getmask(character)).sum()) for character in CHARACTERS]
    assert glyphs.pixels.sum((1, 2), dtype=int).tolist() == inks
    assert (glyphs.pixels[:, :, [0, -1]] > 0).any()


def test_fonts_are_those_with_all_characters():
    names = font_names()
    assert {"DejaVuSansMono", "DejaVuSerif-BoldItalic", "STIXGeneral", "cmtt10"} <= set(names)
    # Fonts without letters, with symbols in the places of letters, and with one picture for all letters.
    assert not {"DejaVuSansDisplay", "STIXNonUni", "cmex10", "cmsy10", "LastResortHE-Regular"} & set(names)


def test_templates_read_every_test_page_exactly():
    source = opened(evaluation_size=6)
    samples = source.evaluation(seed=0)
    assert len(samples) == 4 * 6
    for sample in samples:
        ((question, answer),) = turns(sample)
        rows, cols = map(int, sample.task.split(":")[1].split("x"))
        text = read_by_templates(sample.images[0], rows, cols)
        assert checked(question, answer, text) == (rows, cols)
        assert sample.task.split(":")[0] == ("ocr_line" if "LINE" in question else "ocr")


def test_test_pages_may_have_fonts_that_training_pages_have_not():
    source = opened(test_fonts=("STIXGeneral",), fonts=("DejaVuSansMono",), augment=False)
    for images, name in (
        ([sample.images[0] for sample in source.evaluation(0)], "STIXGeneral"),
        ([source.train("questions", 0)[index].images[0] for index in range(8)], "DejaVuSansMono"),
    ):
        for image in images:
            shapes = [(rows, cols) for rows, cols in GRIDS if _is_drawn_in(image, name, rows, cols)]
            assert len(shapes) == 1


def _is_drawn_in(image, name, rows, cols):
    known = {cell.tobytes() for cell in templates(name, image.shape[0] // rows, image.shape[1] // cols)}
    return all(cell.tobytes() in known for line in cells_of(image, rows, cols) for cell in line)


def test_answers_of_the_training_stream_are_those_of_the_page():
    source, sizes, kinds = opened(augment=False), set(), []
    stream = source.train("questions", seed=3)
    for index in range(40):
        sample = stream[index]
        assert len(turns(sample)) == 3
        size = checked_size(sample)
        text = read_by_templates(sample.images[0], *size)
        for question, answer in turns(sample):
            assert checked(question, answer, text) == size
            kinds.append("LINE" in question)
        sizes.add(size)
        assert sample.task == f"{'ocr_line' if kinds[-1] else 'ocr'}:{size[0]}x{size[1]}"
    assert sizes == set(GRIDS)
    assert 40 < sum(kinds) < 80  # of 120 turns half, as each page has one or two of three


def checked_size(sample):
    """(rows, cols) that the first question states."""
    return tuple(map(int, turns(sample)[0][0].split()[-3::2]))


def test_tasks_are_asked_by_their_weights_and_every_line_is_asked_for():
    source = opened(task_weights={"ocr_line": 1.0, "ocr": 0.0})
    assert source.tasks == ("ocr_line:2x3", "ocr_line:4x6")
    stream = source.train("questions", seed=0)
    questions = [question for index in range(60) for question, _ in turns(stream[index])]
    lines = [f"READ LINE {line} OF {rows} BY {cols}" for rows, cols in GRIDS for line in range(1, rows + 1)]
    assert set(questions) == set(lines)
    assert [sample.task for sample in source.evaluation(0)] == ["ocr_line:2x3"] * 5 + ["ocr_line:4x6"] * 5


def test_characters_and_sizes_come_evenly():
    source = opened()
    stream = source.train("captions", seed=0)
    texts = [stream[index].answer for index in range(400)]
    # 200 expected of each size, with a standard deviation of 10: five of them.
    assert abs(sum(len(text) == 24 for text in texts) - 200) < 50
    counts = np.array([sum(text.count(character) for text in texts) for character in CHARACTERS])
    expected = counts.sum() / 36
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)
    assert "".join(documents_vocabulary.CHARACTERS) == CHARACTERS


def test_an_element_depends_on_seed_and_index_alone():
    one, two = opened().train("questions", seed=5), opened().train("questions", seed=5)
    for index in (7, 0, 10**12):
        _, ours, theirs = two[3], one[index], two[index]
        np.testing.assert_array_equal(ours.images[0], theirs.images[0])
        assert ours.messages == theirs.messages
        assert ours.sample_id == theirs.sample_id == f"documents/train/5/{index}"
    assert one[1].answer != one[2].answer
    assert one[1].answer != opened().train("questions", seed=6)[1].answer
    tested = opened(augment=False).evaluation(seed=5)
    assert [s.messages for s in tested] == [s.messages for s in opened().evaluation(seed=5)]
    assert [s.messages for s in tested] != [s.messages for s in opened().evaluation(seed=6)]
    pages = {task: [s.answer for s in tested if s.task == task] for task in ("ocr:2x3", "ocr:4x6")}
    assert not any(large.startswith(small) for small, large in zip(*pages.values(), strict=True))
    alone = opened(grids=GRIDS[1:], task_weights={"ocr_line": 1.0}).evaluation(seed=5)
    assert [s.messages for s in alone] == [s.messages for s in tested if s.task == "ocr_line:4x6"]


def test_text_pages_hold_the_characters_of_a_context_grid():
    source = opened(context_grids=((4, 6), (2, 6)))
    stream, seen = source.train("text_pages", seed=1), set()
    assert source.settings.text_streams == {"text_pages": 24}
    for index in range(40):
        sample = stream[index]
        assert sample.images == ()
        context = sample.messages[0]["content"][0]["text"]
        rows, cols = map(int, sample.task.split(":")[1].split("x"))
        height, width = {24: (4, 6), 12: (2, 6)}[len(context)]
        seen.add((rows, len(context)))
        grid = np.array(list(context)).reshape(height, width)
        text = "".join(grid[:: height // rows, :: width // cols].ravel().tolist())
        assert (
            grid == grid[:: height // rows, :: width // cols].repeat(height // rows, 0).repeat(width // cols, 1)
        ).all()
        (first, whole), *rest = turns(sample)
        for question, answer in [(first.removeprefix(context), whole), *rest]:
            assert checked(question, answer, text) == (rows, cols)
    assert seen == {(2, 24), (2, 12), (4, 24)}  # the coarser grid has no place for the smaller text
    contexts = {len(s.messages[0]["content"][0]["text"]) for s in source.evaluation(0, "text_pages")}
    assert contexts == {24}


def test_cells_of_all_sizes_have_the_character_and_the_ink_that_cover_them():
    source = opened(augment=False, fonts=("DejaVuSansMono",))
    assert source.settings.cells == (4, 6) and source.settings.num_classes == 36
    stream = source.train("cells", seed=4)
    for index in range(12):
        element = stream[index]
        assert isinstance(element, CellBatch) and element.images.shape == (1, 1, 96, 96, 1)
        image = np.rint(element.images[0, 0] * 255).astype(np.uint8)
        rows, cols = next(grid for grid in GRIDS if _is_drawn_in(image, "DejaVuSansMono", *grid))
        text = np.array([CHARACTERS.index(c) for c in read_by_templates(image, rows, cols)]).reshape(rows, cols)
        np.testing.assert_array_equal(element.classes[0], text.repeat(4 // rows, 0).repeat(6 // cols, 1))
        boxes = np.rint(element.boxes[0] * 96).astype(int)
        for row in range(4):
            for col in range(6):
                own_row, own_col = row * rows // 4, col * cols // 6
                top, left = own_row * 96 // rows, own_col * 96 // cols
                ys, xs = np.nonzero(image[top : top + 96 // rows, left : left + 96 // cols, 0])
                hull = [left + xs.min(), top + ys.min(), left + xs.max() + 1, top + ys.max() + 1]
                assert boxes[row, col].tolist() == hull
    assert len(source.evaluation(0, "cells")) == len(source.evaluation(0, "captions")) == 2 * 5


def test_lines_of_training_pages_are_shifted_by_at_most_the_jitter():
    pages = DocumentPages(grids=[(4, 4)], page_size=96, fonts=["DejaVuSansMono"], jitter=2)
    known, shifts = templates("DejaVuSansMono", 24, 24), set()
    for seed in range(40):
        page = pages.compose(np.random.default_rng(seed), (4, 4))
        wide = np.pad(page.pixels[:, :, 0], 4).astype(int)
        for row in range(1, 3):  # lines beside the edge may be cut off
            expected = np.concatenate([known[index] for index in page.classes[row]], axis=1)
            expected = np.pad(expected[4:-4], ((0, 0), (4, 4)))  # rows that no neighbour's ink reaches
            found = [
                (x, y)
                for x in range(-3, 4)
                for y in range(-3, 4)
                if np.array_equal(
                    np.roll(wide, (-y, -x), (0, 1))[4 + 24 * row + 4 : 4 + 24 * row + 20],
                    expected,
                )
            ]
            assert len(found) == 1
            shifts.update(found)
            left = page.boxes[row, 0] - render_glyphs("DejaVuSansMono", 24, 24).boxes[page.classes[row, 0]]
            assert left.tolist() == [found[0][0], 24 * row + found[0][1]] * 2
    assert {x for x, _ in shifts} == {y for _, y in shifts} == {-2, -1, 0, 1, 2}


def test_only_training_pages_are_shifted_and_noisy():
    source = opened(noise=20.0, jitter=2)
    paper = [np.mean(source.train("questions", 0)[index].images[0] == 0) for index in range(20)]
    clean = [np.mean(sample.images[0] == 0) for sample in source.evaluation(0)]
    # Noise makes half of the paper brighter than black.
    assert np.mean(clean) > np.mean(paper) + 0.15


def test_a_finer_page_repeats_classes_and_boxes():
    page = DocumentPages(grids=[(2, 3)], page_size=48, fonts=["cmtt10"]).compose(np.random.default_rng(0), (2, 3))
    fine = finer(page, (4, 3))
    assert text_of_page(fine) == "".join(text_of_page(page)[start : start + 3] * 2 for start in (0, 3))
    np.testing.assert_array_equal(fine.boxes[3, 2], page.boxes[1, 2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grids": ()}, r"config\.data\.grids: expected at least one text size"),
        (
            {"grids": ((5, 3),)},
            r"config\.data\.page_size: 96 pixels are not divided by the 5x3 cells .* multiple of 15",
        ),
        (
            {"grids": ((96, 3),), "jitter": 0},
            r"config\.data\.grids: a cell of 1x32 pixels is too small for the font Dej",
        ),
        (
            {"grids": ((16, 16),), "page_size": 80, "fonts": ("DejaVuSans",)},
            r"config\.data\.grids: a cell of 5x5 pixels in the font DejaVuSans at 5 pixels shows 'i' and 'l' alike",
        ),
        ({"context_grids": ((4, 4),)}, r"config\.data\.context_grids: expected one with multiples of 2x3, got 4x4"),
        ({"fonts": ()}, r"config\.data\.fonts: expected at least one"),
        (
            {"fonts": ("DejavuSansMono",)},
            r"config\.data\.fonts: .* no font 'DejavuSansMono' .*; did you mean 'DejaVuSansM",
        ),
        ({"test_fonts": ("cmex10",)}, r"config\.data\.test_fonts: matplotlib has no font 'cmex10' of all characters"),
        ({"task_weights": {"ocrr": 1.0}}, r"config\.data\.task_weights\.ocrr: no such task; did you mean 'ocr'"),
        ({"task_weights": {"ocr": 0.0}}, r"config\.data\.task_weights: no task has a weight"),
        ({"font": "cmtt10"}, r"config\.data\.font: unknown or unused key; did you mean 'fonts'"),
    ],
)
def test_options_that_cannot_be_met_are_refused_by_their_key(options, message):
    with pytest.raises(ConfigError, match=message):
        opened(**options)


SMALLEST = {"grids": ((16, 16),), "page_size": 80, "jitter": 0}


@pytest.mark.parametrize(
    ("options", "message", "fix"),
    [
        (
            {"grids": ((2, 3), (2, 3))},
            tried("config.data.grids[{}]: {} is there twice; remove one"),
            {"grids": ((2, 3),)},
        ),
        (
            {"grids": ((5, 3),)},
            tried("pixels are not divided by the {} cells of config.data.grids[{}]; set it to a multiple of {}"),
            {"page_size": 90},
        ),
        ({"jitter": 5}, tried("are over a quarter of the smallest cell's side, {}; lower it"), {"jitter": 4}),
        (
            {"grids": ((96, 3),), "jitter": 0},
            tried("is too small for the font {}; enlarge page_size"),
            {"page_size": 1152},
        ),
        (
            {"grids": ((96, 3),), "jitter": 0},
            tried("is too small for the font {}; enlarge page_size, or have fewer rows or columns"),
            {"grids": ((8, 3),)},
        ),
        (
            {**SMALLEST, "fonts": ("DejaVuSans",)},
            tried("shows '{}' and '{}' alike; enlarge page_size"),
            {"page_size": 192},
        ),
        (
            {**SMALLEST, "fonts": ("DejaVuSans", "DejaVuSansMono")},
            tried("shows '{}' and '{}' alike; enlarge page_size, or omit the font"),
            {"fonts": ("DejaVuSansMono",)},
        ),
    ],
)
def test_what_an_error_advises_helps(options, message, fix):
    with pytest.raises(ConfigError, match=message):
        opened(**options)
    sample = opened(**{**options, **fix}).train("questions", seed=0)[0]
    assert sample.images[0].shape == 2 * ({**SMALL, **options, **fix}["page_size"],) + (1,)


def test_fonts_need_matplotlib(monkeypatch):
    glyphs.font_folder.cache_clear()
    monkeypatch.setattr(glyphs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=tried("install it: pip install matplotlib")):
        glyphs.font_folder()
    monkeypatch.undo()
    assert str(glyphs.font_folder()) == f"{matplotlib.get_data_path()}/fonts/ttf"


def test_an_unknown_stream_is_refused():
    with pytest.raises(ConfigError, match="documents: no stream 'question'; did you mean 'questions'"):
        opened().train("question", seed=0)
