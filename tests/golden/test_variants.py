"""Folders with other prompts: without a picture, with a system turn, ending with an answer, with several pictures.

Each is a copy of a folder of the repository with some arrays replaced, by other official arrays or by what is written
out here, and is compared as any folder; then once more with one wrong value, which has to be found.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from tests.golden import comparison
from tests.golden.comparison import Golden
from tests.golden.conftest import DATA
from tests.golden.systems import SYSTEMS, llava_processor, ovis_prompts

IGNORED = -100
Arrays = dict[str, np.ndarray]


class Variant:
    """A copy of a folder whose arrays, and what the manifest says of them, can be replaced."""

    def __init__(self, name: str, folder: Path):
        self.folder, self.replaced = folder / name, set()
        shutil.copytree(DATA / name, self.folder)
        self.manifest = json.loads((self.folder / comparison.MANIFEST).read_text())
        with np.load(self.folder / comparison.CASES) as cases:
            self.arrays = {key: cases[key] for key in cases.files}

    def put(self, name: str, array: np.ndarray, meaning: str = "", role: str = "output") -> None:
        entry = self.manifest["arrays"].setdefault(name, {"role": role, "atol": 0.0, "rtol": 0.0, "meaning": ""})
        self.arrays[name] = array = np.asarray(array)
        self.replaced |= {name} if entry["role"] == "output" else set()
        entry |= {"shape": list(array.shape), "dtype": str(array.dtype), "meaning": meaning or entry["meaning"]}

    def drop(self, *prefixes: str) -> None:
        for name in [name for name in self.arrays if name.startswith(prefixes)]:
            del self.arrays[name], self.manifest["arrays"][name]

    def written(self) -> Golden:
        (self.folder / comparison.MANIFEST).write_text(json.dumps(self.manifest))
        np.savez(self.folder / comparison.CASES, **self.arrays)
        return comparison.read(self.folder)

    def check(self, outputs: Callable[[Golden], Arrays], wrong: str) -> None:
        """Compares the folder, and once more with another value in the array `wrong`."""
        golden = self.written()
        found = {name: array for name, array in outputs(golden).items() if name in golden.expected}
        others = {name: "not of this test" for name in golden.expected.keys() - found.keys() - self.replaced}
        assert comparison.compare_all(golden, found, others) == []
        golden.expected[wrong].flat[-1] += 1
        (line,) = comparison.compare_all(golden, found, others)
        assert line.startswith(f"{wrong}: 1 of {golden.expected[wrong].size} wrong")


def as_registered(golden: Golden) -> Arrays:
    return SYSTEMS[golden.system].outputs(golden.folder, dict(golden.inputs))


def test_deepseek_vl2_conversations(tmp_path):
    variant = Variant("deepseek_vl2_processor", tmp_path)
    encode = tokenizers.Tokenizer.from_file(str(variant.folder / "tokenizer.json")).encode
    listed = json.loads((variant.folder / "conversations.json").read_text())
    variant.drop("conv.", "batchify.")
    bos, eos, tag = 0, 1, listed["image_token_id"]
    # A side of two tokens: the view of the whole with newlines, the separator, and one tile in its place.
    one_tile = [tag] * (2 * 3 + 1 + 2 * 3)

    def add(name: str, conversation: list[tuple[str, str]], images: list[int], *parts: str | list[int], inference=True):
        """A conversation whose ids are written out in parts; text between braces is what a model learns."""
        ids, learned = [bos], [False]
        for part in parts:
            own = encode(part.strip("{}"), add_special_tokens=False).ids if isinstance(part, str) else part
            ids += own
            learned += [part == [eos] or part[0] == "{"] * len(own)
        listed["conversations"].append(
            {
                "name": name,
                "conversation": [{"role": role, "content": content} for role, content in conversation],
                "images": images,
                "inference_mode": inference,
            }
        )
        given, visual = np.array(ids), np.array(ids) == tag
        first = np.arange(len(ids)) == 0
        variant.put(f"conv.{name}.input_ids", given)
        variant.put(f"conv.{name}.images_seq_mask", visual)
        variant.put(f"conv.{name}.images_spatial_crop", np.array([[1, 1]] * len(images) or [[0, 0]]))
        variant.put(f"conv.{name}.num_image_tokens", np.full(len(images), len(one_tile)))
        variant.put(f"conv.{name}.n_tiles", np.array(2 * len(images) or 1))
        variant.put(f"conv.{name}.labels_mask_prompt0", np.where(visual, IGNORED, given))
        variant.put(f"conv.{name}.labels_mask_prompt1", np.where(np.array(learned) | first, given, IGNORED))

    listed["conversations"] = []
    add(
        "system_and_an_answer_to_go_on_with",
        [("system", " Be brief. "), ("user", "What is the time?"), ("assistant", " It is ")],
        [],
        "Be brief.",
        "<|User|>: What is the time?\n\n<|Assistant|>:",
        "{It is}",
    )
    add(
        "three_pictures_in_two_turns",
        [("<|User|>", "<image> and <image>"), ("<|Assistant|>", "Yes."), ("<|User|>", "<image>"), ("assistant", "")],
        [0, 3, 5],
        "<|User|>: ",
        one_tile,
        " and ",
        one_tile,
        "\n\n<|Assistant|>:",
        "{Yes.}",
        [eos],
        "<|User|>: ",
        one_tile,
        "\n\n<|Assistant|>:",
    )
    add(
        "learned_with_an_empty_question",
        [("user", ""), ("assistant", "No."), ("user", "So?"), ("assistant", "")],
        [],
        "<|User|>:<|Assistant|>:",
        "{No.}",
        [eos],
        "<|User|>: So?\n\n<|Assistant|>:",
        [eos],
        inference=False,
    )
    texts = [f"conv.{listed['conversations'][number]['name']}" for number in (0, 2)]
    rows = [variant.arrays[f"{name}.input_ids"] for name in texts]
    length = max(map(len, rows))
    for side in ("left", "right"):
        of = f"batch of {', '.join(texts)}"
        missing = [((length - len(row), 0) if side == "left" else (0, length - len(row))) for row in rows]
        together = list(zip(rows, missing, strict=True))
        ids = np.stack([np.pad(row, width, constant_values=2) for row, width in together])
        variant.put(f"batchify.{side}.input_ids", ids, of)
        variant.put(f"batchify.{side}.attention_mask", np.stack([np.pad(row >= 0, width) for row, width in together]))
        variant.put(f"batchify.{side}.images_spatial_crop", np.zeros((2, 1, 2), int))
        variant.put(f"batchify.{side}.images_shape", np.array([2, 1, 3, listed["image_size"], listed["image_size"]]))
    (variant.folder / "conversations.json").write_text(json.dumps(listed))
    variant.check(as_registered, "conv.three_pictures_in_two_turns.input_ids")


def test_ovis_2_5_prompts(tmp_path):
    variant = Variant("ovis2_5", tmp_path)
    encode = tokenizers.Tokenizer.from_file(str(variant.folder / "tokenizer.json")).encode

    def ids(*parts: str | int) -> np.ndarray:
        """Text between pictures, which are given by their numbers."""
        found = []
        for part in parts:
            if isinstance(part, str):
                found += encode(part, add_special_tokens=False).ids
            else:
                found += [-301, *[-300] * (int(variant.arrays["vit.grid_thws"][part].prod()) // 4), -302]
        return np.array([found])

    def put(name: str, *parts: str | int) -> None:
        text = "".join(part if isinstance(part, str) else "<image>" for part in parts)
        variant.put(f"{name}.{'rendered_prompt' if name != 'chat' else 'prompt'}", np.array(text))
        variant.put(f"{name}.input_ids", ids(*parts))

    user, answer, end = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>\n"
    put("mm", f"<|im_start|>system\nBe brief.{end}{user}Hi{end}{answer}Hello.{end}")
    variant.put("mm.grid_thws", np.zeros((0, 3), int), "no image")
    put("mm2", f"{user}Look.{end}{answer}Yes?{end}{user}", 0, " or ", 1, f"{end}{answer}<think>\n\n</think>\n\n")
    variant.put("chat.prompt", np.array(""), "inference prompt, image 1")
    put("chat", f"{user}", 1, f"{end}{answer}")
    pad = int(variant.arrays["batch.input_ids"][1, -1])
    rows = [variant.arrays[f"{name}.input_ids"][0] for name in ("text", "chat", "mm")]
    length = max(map(len, rows))
    together = np.stack([np.pad(row, (0, length - len(row)), constant_values=pad) for row in rows])
    variant.put("batch.input_ids", together, "right padded batch (text prompt, chat prompt, mm prompt)")
    said = [("system", "Be brief."), ("human", "<image><image>"), ("gpt", "Hm."), ("human", "Why")]
    variant.put(
        "sft.conversation", np.array(json.dumps([{"from": role, "value": text} for role, text in said])), "JSON"
    )
    parts = [f"<|im_start|>system\nBe brief.{end}{user}", 0, 1, f"{end}{answer}<think>\n\n</think>\n\n"]
    learned, rest = "Hm.<|im_end|>", f"\n{user}Why{end}"
    text = "".join(part if isinstance(part, str) else "<image>" for part in parts)
    variant.put("sft.prompt", np.array(text + learned + rest))
    variant.put("sft.input_ids", ids(*parts, learned, rest))
    hidden = [np.full_like(ids(*part), IGNORED) for part in (parts, [rest])]
    variant.put("sft.labels", np.concatenate([hidden[0], ids(learned), hidden[1]], axis=1))
    config = json.loads((variant.folder / "config.json").read_text())
    variant.check(lambda golden: ovis_prompts.outputs2_5(golden, config), "mm2.input_ids")


def test_a_batch_of_llava_whose_picture_stands_in_the_second_row(tmp_path):
    variant = Variant("llava16_anyres", tmp_path)
    for name in [name for name in variant.arrays if re.fullmatch("batch_.*(ids|mask|labels)", name)]:
        variant.put(name, variant.arrays[name][::-1])
    variant.put("batch_ids", variant.arrays["batch_ids"], "row 0: text only; row 1: image 3, right padded")
    variant.check(llava_processor.outputs, "batch_left_labels")


def test_prompts_of_llava_without_a_picture(tmp_path):
    variant = Variant("llava15", tmp_path)
    ids, logits = variant.arrays["text_ids"], variant.arrays["text_logits"]
    count = variant.arrays["one_logits"].shape[1]
    variant.put("two_ids", variant.arrays["one_ids"], "ids", role="input")
    variant.put("two_logits", variant.arrays["one_logits"], f"logits at the last {count} positions")
    variant.manifest["arrays"]["two_logits"]["atol"] = variant.manifest["arrays"]["one_logits"]["atol"]
    variant.put("one_ids", np.repeat(ids, 2, axis=0), "ids, text only")
    variant.put("one_logits", np.repeat(logits[:, -count:], 2, axis=0))
    variant.drop("one_greedy")
    variant.check(as_registered, "one_logits")


@pytest.mark.parametrize(
    ("meaning", "counts", "expected"),
    [
        ("row 0: images 0 and 2; row 1: text only", [2, 0], [[0, 2], []]),
        ("row 0: text only (image 0 is passed for it); row 1: images 3, 1 and 2", [0, 3], [[], [3, 1, 2]]),
        ("batch of two, images 1 and 2, right padded", [1, 1], [[1], [2]]),
        ("two placeholders, images 0 and 2", [2], [[0, 2]]),
        ("text only", [0], [[]]),
        ("two images, 2 tiles + 1 tile", [1, 2], [[0], [1, 2]]),
    ],
)
def test_the_manifest_tells_which_images_rows_show(meaning, counts, expected):
    assert comparison.pictures({"meaning": meaning}, counts) == expected


def test_a_row_with_more_images_than_the_manifest_names_is_refused():
    with pytest.raises(ValueError, match=r"rows show \[2\] images, and the manifest names \[\[3\]\]"):
        comparison.pictures({"meaning": "image 3"}, [2])
