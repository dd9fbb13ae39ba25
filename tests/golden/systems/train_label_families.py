"""The families of `train_labels`: messages from a release's training schema, and arrays as its code returns them."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from tests.golden.comparison import Golden
from vlm_jax.pretrained.processing import deepseek, internvl, llava, llava_hf, ovis, qwen, qwen_hf
from vlm_jax.processors import templates
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.learned import AS_RELEASED
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.square import SquareViews
from vlm_jax.processors.tiles import InternVLViews
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Batch, Message

IGNORED = -100
ROLES = {"human": "user", "gpt": "assistant", "<|User|>": "user", "<|Assistant|>": "assistant"}
IMAGE, VIDEO = "<image>", "<video>"


@dataclasses.dataclass(frozen=True)
class Case:
    """One entry of conversations.json, with the folder's arrays."""

    entry: dict[str, Any]
    inputs: dict[str, np.ndarray]
    expected: dict[str, np.ndarray]

    @property
    def turns(self) -> list[tuple[str, str]]:
        """(role, text) of every turn."""
        pairs = [
            (turn.get("from", turn.get("role")), turn.get("value", turn.get("content")))
            for turn in self.entry["conversations"]
        ]
        return [(ROLES.get(role, role), text) for role, text in pairs]

    @property
    def pictures(self) -> list[Image.Image]:
        return [Image.fromarray(self.inputs[name]) for name in self.entry["images"]]

    @property
    def frames(self) -> bool:
        """Whether the pictures are the frames of one video."""
        return bool(self.entry.get("video_frames"))

    def texts(self, role: str) -> list[str]:
        return [text for own, text in self.turns if own == role]

    def expects(self, key: str) -> np.ndarray:
        return self.expected[f"case{self.entry['case']}.{key}"]


def labels_of(batch: Batch) -> np.ndarray:
    """Unshifted labels of the first row: each id where predicting it has weight."""
    assert batch.targets is not None and batch.loss_weights is not None
    learned = np.where(batch.loss_weights[0] > 0, batch.targets[0], IGNORED)
    return np.concatenate([[IGNORED], learned[:-1]]).astype(np.int64)


def padded(rows: list[np.ndarray], length: int, fill: Any, left: bool = False) -> np.ndarray:
    """Rows filled up, or cut, to a length."""
    found = np.full((len(rows), length), fill, np.asarray(rows[0]).dtype)
    for row, one in zip(found, rows, strict=True):
        one = one[:length]
        row[length - len(one) if left else 0 : length if left else len(one)] = one
    return found


class MissingCase(LookupError):
    """A batch or a pack holds a conversation that is not compared."""


class Family:
    """A release's conversations.

    Attributes:
      named: numbers of the cases with a named difference, which are made as released.
    """

    NOT_COMPARED: ClassVar[dict[str, str]] = {}

    def __init__(self, folder: Path, arguments: dict[str, Any]):
        self.folder, self.arguments = folder, arguments
        self.named: set[int] = set()
        path = folder / "config.json"
        self.config = json.loads(path.read_text()) if path.exists() else {}
        self.processor = dataclasses.replace(self.read(), max_length=None)

    def read(self) -> Processor:
        raise NotImplementedError

    def as_released(self, case: Case) -> bool:
        """Whether the release's faults are built for a case."""
        return getattr(self.processor.prompt, "released", None) is not None

    def messages(self, case: Case) -> list[Message]:
        return [{"role": role, "content": text} for role, text in case.turns]

    def views(self, case: Case) -> Any:
        """The views, with the limits that the release sets for a sample."""
        del case
        return self.processor.views

    def batch(self, case: Case, as_released: bool = False) -> Batch:
        targets = AS_RELEASED if as_released else True
        media = ((), [case.pictures]) if case.frames else (case.pictures, ())
        processor = dataclasses.replace(self.processor, views=self.views(case))
        return processor(self.messages(case), *media, targets=targets)

    def arrays(self, case: Case, as_released: bool = False) -> dict[str, np.ndarray]:
        raise NotImplementedError

    def counted(self, case: Case) -> bool:
        """Whether the release's count of tokens is right: it learns anything where it has no limit."""
        whole = self.processor
        prompt: Any = whole.prompt
        released = prompt.released
        released = dataclasses.replace(released, limit=None) if hasattr(released, "limit") else released
        self.processor = dataclasses.replace(whole, prompt=dataclasses.replace(prompt, released=released))
        try:
            return bool((self.batch(case, as_released=True).loss_weights > 0).any())
        finally:
            self.processor = whole

    def batches(self, made: dict[int, dict[str, np.ndarray] | None], golden: Golden) -> dict[str, np.ndarray]:
        return {}

    def packs(self, made: dict[int, dict[str, np.ndarray] | None], golden: Golden) -> dict[str, np.ndarray]:
        return {}

    def rows(self, made: dict[int, dict[str, np.ndarray] | None], which: str, key: str) -> list[np.ndarray]:
        """An array of each case of `batch_of` or `pack_of`."""
        found = [made[number] for number in self.arguments[which]]
        if any(one is None for one in found):
            raise MissingCase(which)
        return [one[key] for one in found if one is not None]


class QwenVL2(Family):
    """Qwen2.5-VL."""

    def read(self) -> Processor:
        return qwen_hf.processor(self.folder, self.config)

    def messages(self, case: Case) -> list[Message]:
        """`_build_messages` of data_processor.py: texts of a question between its tags, stripped."""
        found = []
        for role, text in case.turns:
            items: list[Message] = []
            for part in re.split(f"({IMAGE})", text) if role == "user" else [text]:
                if part == IMAGE and role == "user":
                    items.append({"type": "image"})
                elif role != "user" or part.strip():
                    items.append({"type": "text", "text": part if role != "user" else part.strip()})
            found.append({"role": role, "content": items})
        return found

    def arrays(self, case: Case, as_released: bool = False) -> dict[str, np.ndarray]:
        batch = self.batch(case, as_released)
        grids = [one.grid for one in self.processor.views.images(case.pictures)]
        found = {
            "input_ids": batch.tokens[0].astype(np.int64),
            "labels": labels_of(batch),
            "position_ids": batch.positions[0].T.astype(np.int64),
        }
        return found | ({"image_grid_thw": np.array(grids, np.int64)} if grids else {})

    def batches(self, made: dict[int, dict[str, np.ndarray] | None], golden: Golden) -> dict[str, np.ndarray]:
        most = self.arguments["model_max_length"]
        ids, labels = (self.rows(made, "batch_of", key) for key in ("input_ids", "labels"))
        length = min(most, max(map(len, ids)))
        axes = [[row[axis] for row in self.rows(made, "batch_of", "position_ids")] for axis in range(3)]
        return {
            "batch.input_ids": padded(ids, length, self.processor.pad_id),
            "batch.labels": padded(labels, length, IGNORED),
            "batch.attention_mask": padded([row != self.processor.pad_id for row in ids], length, False),
            "batch.position_ids": np.stack([padded(rows, length, 1) for rows in axes]),
        }

    def packs(self, made: dict[int, dict[str, np.ndarray] | None], golden: Golden) -> dict[str, np.ndarray]:
        """Several examples in one row."""
        self.rows(made, "pack_of", "labels")
        listed = json.loads((self.folder / "conversations.json").read_text())["cases"]
        cases = [Case(listed[number], golden.inputs, golden.expected) for number in self.arguments["pack_of"]]
        row = [
            self.processor.example(
                self.messages(case),
                case.pictures,
                targets=AS_RELEASED if case.entry["case"] in self.named else True,
            )
            for case in cases
        ]
        batch = self.processor.rows([row], targets=True)
        ends = np.searchsorted(batch.segment_ids[0], np.arange(len(cases)) + 1, side="right")
        return {
            "pack.input_ids": batch.tokens.astype(np.int64),
            "pack.labels": labels_of(batch)[None],
            "pack.position_ids": np.moveaxis(batch.positions, -1, 0).astype(np.int64),
            "pack.cu_seqlens": np.concatenate([[0], ends]).astype(np.int32),
        }


class QwenVL2Data(QwenVL2):
    """Qwen2.5-VL by the older data_qwen.py."""

    def as_released(self, case: Case) -> bool:
        return False

    def messages(self, case: Case) -> list[Message]:
        """Texts of a question between its tags, as they are."""
        found = []
        for role, text in case.turns:
            items: list[Message] = []
            for part in re.split(f"({IMAGE})", text) if role == "user" else [text]:
                tag = part == IMAGE and role == "user"
                items += [{"type": "image"}] if tag else [{"type": "text", "text": part}]
            found.append({"role": role, "content": items})
        return found


class LLaVA(Family):
    """LLaVA and MobileVLM: a picture is -200 in the ids."""

    def read(self) -> Processor:
        path = self.folder / "vision_tower_config.json"
        more = {"vision_tower_config": json.loads(path.read_text()), "conversation_version": self.arguments["version"]}
        return llava.processor(self.folder, {**self.config, **more})

    @property
    def pad(self) -> int:
        """The release's id of padding, with which it finds what is padding."""
        return self.processor.tokenizer.id_of(self.arguments["pad_token"])

    def as_released(self, case: Case) -> bool:
        """Not with a tag in an answer, whose place would be learned, nor with more tags than pictures."""
        tagged = [role for role, text in case.turns if IMAGE in text]
        return "assistant" not in tagged and len(tagged) <= len(case.pictures)

    def batch(self, case: Case, as_released: bool = False) -> Batch:
        """The release keeps one tag of those of a turn."""
        tagged = sum(IMAGE in text for _, text in case.turns)
        if not as_released:
            return super().batch(case)
        return self.processor(self.messages(case), case.pictures[:tagged], targets=AS_RELEASED)

    def arrays(self, case: Case, as_released: bool = False) -> dict[str, np.ndarray]:
        batch = self.batch(case, as_released)
        rows, labels = batch.visual_index[0], labels_of(batch)
        most = self.arguments["model_max_length"]
        ids = np.where(rows >= 0, -200, batch.tokens[0]).astype(np.int64)
        size = self.processor.count_visual_tokens([(1, 1)])[0]
        first = (rows < 0) | (rows % size == 0)
        # The release cuts ids with one place for a picture, then those with all its places.
        kept = np.cumsum(first) <= most
        if not case.pictures:  # texts are cut before, by the tokenizer
            ids, labels, first, kept, rows = (part[:most] for part in (ids, labels, first, kept, rows))
        found = {"input_ids": ids[first], "labels": labels[first]}
        found["attention_mask"] = found["input_ids"][:most] != self.pad
        present = kept & ~((rows < 0) & (ids == self.pad))
        merged = labels[present][:most]
        return found | {"merged_labels": merged, "merged_attention_mask": np.ones(len(merged), bool)}

    def batches(self, made: dict[int, dict[str, np.ndarray] | None], golden: Golden) -> dict[str, np.ndarray]:
        ids, labels = (self.rows(made, "batch_of", key) for key in ("input_ids", "labels"))
        length = min(self.arguments["model_max_length"], max(map(len, ids)))
        filled = padded(ids, length, self.pad)
        return {
            "batch.input_ids": filled,
            "batch.labels": padded(labels, length, IGNORED),
            "batch.attention_mask": filled != self.pad,
        }


class LLaVANextQwen(Family):
    """LLaVA-NeXT and OneVision with Qwen: the folder has a tokenizer only, and no picture."""

    def read(self) -> Processor:
        tokenizer = Tokenizer.from_folder(self.folder)
        marks = {"image": IMAGE}
        prompt = TemplatePrompt(
            ChatTemplate(templates.chatml(self.arguments["system_message"])),
            tokenizer,
            marks=marks,
            tokens={"image": tokenizer.names["pad_token"]},
            split=True,
            learned=llava_hf.LEARNED_QWEN,
        )
        views = SquareViews(Pixels(), (1, 1), 1)
        return Processor(prompt, views, tokenizer, tokenizer.id_of(tokenizer.names["pad_token"]))

    def batch(self, case: Case, as_released: bool = False) -> Batch:
        """Where no picture was given, a tag is text to the release."""
        messages, marks = self.messages(case), sum(text.count(IMAGE) for _, text in case.turns)
        processor = self.processor
        if not case.entry["num_images"]:
            marks, processor = 0, dataclasses.replace(processor, prompt=dataclasses.replace(processor.prompt, marks={}))
        return processor(messages, [np.zeros((1, 1, 3), np.uint8)] * marks, targets=True)

    def arrays(self, case: Case, as_released: bool = False) -> dict[str, np.ndarray]:
        batch, most = self.batch(case), self.arguments["model_max_length"]
        labels = labels_of(batch)
        labels[0] = batch.tokens[0, 0]  # nothing predicts it
        ids = np.where(batch.visual_index[0] < 0, batch.tokens[0], -200).astype(np.int64)
        return {"input_ids": ids, "labels": labels, "attention_mask": ids[:most] != self.processor.pad_id}

    batches = LLaVA.batches
    pad = property(lambda self: self.processor.pad_id)


class InternVL(Family):
    """InternVL."""

    def read(self) -> Processor:
        return internvl.processor(self.folder, self.config)

    def as_released(self, case: Case) -> bool:
        """Only where every picture has its tag, and the first turn the first."""
        texts = [text for _, text in case.turns]
        tags = sum(text.count(IMAGE) for text in texts) == len(case.pictures) and internvl.CONTEXT not in "".join(texts)
        return super().as_released(case) and tags and (IMAGE in texts[0] or not case.pictures)

    def views(self, case: Case) -> InternVLViews:
        """Pictures of one sample share the limit of tiles."""
        views = self.processor.views
        return dataclasses.replace(views, max_tiles=max(1, views.max_tiles // max(len(case.pictures), 1)))

    def arrays(self, case: Case, as_released: bool = False) -> dict[str, np.ndarray]:
        batch, most = self.batch(case, as_released), self.arguments["max_seq_length"]
        ids = batch.tokens[0].astype(np.int64)[:most]
        tiles = sum(len(one.pixels) for one in self.views(case).images(case.pictures))
        return {
            "input_ids": ids,
            "labels": labels_of(batch)[:most],
            "attention_mask": ids != self.processor.pad_id,
            "position_ids": batch.positions[0].astype(np.int64)[:most],
            "image_flags": np.ones(tiles, np.int64) if tiles else np.zeros(1, np.int64),
        }

    def batches(self, made: dict[int, dict[str, np.ndarray] | None], golden: Golden) -> dict[str, np.ndarray]:
        ids, labels, positions = (self.rows(made, "batch_of", k) for k in ("input_ids", "labels", "position_ids"))
        length = max(map(len, ids))
        filled = padded(ids, length, 0)  # the release's collator takes 0 for padding, whatever the vocabulary
        return {
            "batch.input_ids": filled,
            "batch.labels": padded(labels, length, IGNORED),
            "batch.attention_mask": filled != 0,
            "batch.position_ids": padded(positions, length, 0),
        }

    def packs(self, made: dict[int, dict[str, np.ndarray] | None], golden: Golden) -> dict[str, np.ndarray]:
        ids, labels, positions = (self.rows(made, "pack_of", k) for k in ("input_ids", "labels", "position_ids"))
        total, length = sum(map(len, ids)), golden.expected["pack.input_ids"].shape[1]
        found = {
            "pack.input_ids": padded([np.concatenate(ids)], length, 0),
            "pack.labels": padded([np.concatenate(labels)], length, IGNORED),
            "pack.position_ids": padded([np.concatenate(positions)], length, 0),
            "pack.cu_seqlens": np.unique([0, *np.cumsum([len(row) for row in ids]), length])[None].astype(np.int32),
        }
        assert total <= length
        counts = [np.sum(row != IGNORED) for row in labels]
        for name, power in (("token", 0.0), ("sample", 1.0), ("square", 0.5)):
            weights = [(row != IGNORED) / max(n, 1) ** power for row, n in zip(labels, counts, strict=True)]
            found[f"pack.loss_weight_{name}"] = padded([np.concatenate(weights).astype(np.float32)], length, 0.0)
        return found


class Ovis2(Family):
    """Ovis 2: a tile is -300, and what stands about pictures is -301 to -305."""

    def read(self) -> Processor:
        return ovis.processor2(self.folder, self.config)

    def views(self, case: Case) -> Any:
        """With as many parts as the release gives to one picture or to each of several."""
        most = self.arguments["max_partitions"][2 if case.frames else int(len(case.pictures) > 1)]
        return dataclasses.replace(self.processor.views, max_parts=most)

    def learned_ids(self, batch: Batch) -> np.ndarray:
        rows, count = batch.visual_index[0], self.processor.num_learned
        ids = np.where(rows < count, -301 - rows, -300)
        return np.where(rows < 0, batch.tokens[0], ids).astype(np.int64)

    def arrays(self, case: Case, as_released: bool = False) -> dict[str, np.ndarray]:
        batch = self.batch(case, as_released)
        short, long = self.arguments["text_max_length"], self.arguments["multimodal_max_length"]
        ids, labels, rows = self.learned_ids(batch), labels_of(batch), batch.visual_index[0]
        place = (rows - self.processor.num_learned) % self.processor.views.num_tokens
        first = (rows < self.processor.num_learned) | (place == 0)
        kept = np.cumsum(first) <= short
        found = {"input_ids": ids[first & kept], "labels": labels[first & kept]}
        found["attention_mask"] = found["input_ids"] != self.processor.pad_id
        merged = labels[kept][:long]
        return found | {"merged_labels": merged, "merged_attention_mask": (ids != self.processor.pad_id)[kept][:long]}

    def batches(self, made: dict[int, dict[str, np.ndarray] | None], golden: Golden) -> dict[str, np.ndarray]:
        rows = {key: self.rows(made, "batch_of", key) for key in ("input_ids", "labels", "attention_mask")}
        length = max(map(len, rows["input_ids"]))
        fills = {"input_ids": self.processor.pad_id, "labels": IGNORED, "attention_mask": False}
        return {f"batch.{key}": padded(rows[key], length, fill) for key, fill in fills.items()}


class Ovis25(Ovis2):
    """Ovis 2.5."""

    def read(self) -> Processor:
        return ovis.processor2_5(self.folder, self.config)

    def views(self, case: Case) -> Any:
        """With the limits of pixels of one picture, several, or a video."""
        kind = "video" if case.frames else "single_image" if len(case.pictures) < 2 else "multiple_image"
        least, most = (self.arguments[f"{kind}_{which}_pixels"] for which in ("min", "max"))
        return dataclasses.replace(self.processor.views, min_pixels=least, max_pixels=most)

    def arrays(self, case: Case, as_released: bool = False) -> dict[str, np.ndarray]:
        batch = self.batch(case, as_released)
        ids, labels, visual = self.learned_ids(batch), labels_of(batch), batch.visual_index[0] >= 0
        limit = case.entry["multimodal_max_length"] if visual.any() else self.arguments["text_max_length"]
        while limit < len(ids) and visual[limit] and batch.visual_index[0][limit] not in (0, 2):
            limit -= 1  # a picture is not cut in two
        ids, labels = ids[:limit], labels[:limit]
        found = {"input_ids": ids, "labels": labels, "attention_mask": ids != self.processor.pad_id}
        views = self.views(case)
        seen = views.video(case.pictures, 1.0, None) if case.frames else views.images(case.pictures)
        starts = np.isin(batch.visual_index[0], [0, 2])[:limit]  # the learned rows before pictures and videos
        grids = [one.grid for one in seen[: starts.sum()]]
        return found | ({"grid_thws": np.array(grids, np.int64)} if grids else {})

    def messages(self, case: Case) -> list[Message]:
        """An answer of the role `ignored_gpt` is not learned."""
        return [
            {"role": "assistant", "content": text, "loss": False}
            if role == "ignored_gpt"
            else {"role": role, "content": text}
            for role, text in case.turns
        ]

    def batches(self, made: dict[int, dict[str, np.ndarray] | None], golden: Golden) -> dict[str, np.ndarray]:
        """A batch without any padding gets one place of it."""
        found = super().batches(made, golden)
        one = {key.removeprefix("batch_of_one."): array for key, array in golden.expected.items() if "of_one" in key}
        number = int(re.search(r"case(\d+)", golden.entries["batch_of_one.input_ids"]["meaning"])[1]) if one else 0
        fills = {"input_ids": self.processor.pad_id, "labels": IGNORED, "attention_mask": False}
        own = made[number]
        if own is None:
            raise MissingCase("batch_of_one")
        return found | {f"batch_of_one.{key}": padded([own[key]], len(own[key]) + 1, fills[key]) for key in one}


class QwenVL1(Family):
    """Qwen-VL, with rows filled to `max_len`."""

    def read(self) -> Processor:
        return qwen.processor(self.folder, self.config)

    def as_released(self, case: Case) -> bool:
        return not any("<img>" in text for text in case.texts("assistant"))

    def batch(self, case: Case, as_released: bool = False) -> Batch:
        images = [np.zeros((8, 8, 3), np.uint8)] * sum(text.count("<img>") for _, text in case.turns)
        return self.processor(self.messages(case), images, targets=AS_RELEASED if as_released else True)

    def arrays(self, case: Case, as_released: bool = False) -> dict[str, np.ndarray]:
        batch, length = self.batch(case, as_released), self.arguments["max_len"]
        labels = labels_of(batch)
        labels[0] = batch.tokens[0, 0]  # nothing predicts it
        ids = padded([batch.tokens[0].astype(np.int64)], length, self.processor.pad_id)[0]
        return {
            "input_ids": ids,
            "labels": padded([labels], length, IGNORED)[0],
            "attention_mask": ids != self.processor.pad_id,
        }


class DeepSeekVL2(Family):
    """DeepSeek-VL2."""

    def read(self) -> Processor:
        return deepseek.processor2(self.folder, {})

    def as_released(self, case: Case) -> bool:
        return sum(text.count(IMAGE) for _, text in case.turns) == len(case.pictures)

    def arrays(self, case: Case, as_released: bool = False) -> dict[str, np.ndarray]:
        batch, pictures = self.batch(case, as_released), case.pictures
        labels = labels_of(batch)
        labels[0] = batch.tokens[0, 0]  # nothing predicts it
        crops = [self.processor.views.grid((one.height, one.width), len(pictures))[::-1] for one in pictures]
        return {
            "input_ids": batch.tokens[0].astype(np.int64),
            "labels": labels,
            "images_seq_mask": batch.visual_index[0] >= 0,
            "images_spatial_crop": np.array(crops or [[0, 0]], np.int64),
        }

    def batches(self, made: dict[int, dict[str, np.ndarray] | None], golden: Golden) -> dict[str, np.ndarray]:
        found: dict[str, np.ndarray] = {}
        fills = {"input_ids": self.processor.pad_id, "labels": IGNORED, "images_seq_mask": False}
        rows = {key: self.rows(made, "batch_of", key) for key in fills}
        length = max(map(len, rows["input_ids"]))
        for side in ("left", "right"):
            own = {key: padded(rows[key], length, fill, side == "left") for key, fill in fills.items()}
            # A padding token that a text spells: on the left the release ignores its label, on the right it masks it.
            real = padded([np.ones(len(row), bool) for row in rows["input_ids"]], length, False, side == "left")
            unpadded = own["input_ids"] != self.processor.pad_id
            own["attention_mask"] = real if side == "left" else unpadded
            if side == "left":
                own["labels"] = np.where(unpadded, own["labels"], IGNORED)
                own["images_seq_mask"] = own["images_seq_mask"].astype(np.int64)
            found |= {f"batch_{side}.{key}": array for key, array in own.items()}
        return found


FAMILIES: dict[str, type[Family]] = {
    "deepseek_vl2": DeepSeekVL2,
    "internvl2_5": InternVL,
    "internvl2_5_internlm2": InternVL,
    "internvl2_hermes2": InternVL,
    "internvl2_internlm2": InternVL,
    "internvl2_phi3": InternVL,
    "llava15": LLaVA,
    "llava15_legacy": LLaVA,
    "llava_llama2": LLaVA,
    "llava_mpt": LLaVA,
    "llava_next_qwen": LLaVANextQwen,
    "llava_plain": LLaVA,
    "mobilevlm": LLaVA,
    "mobilevlm_not_legacy": LLaVA,
    "ovis2": Ovis2,
    "ovis2_5": Ovis25,
    "qwen2_5_vl": QwenVL2,
    "qwen2_5_vl_data_qwen": QwenVL2Data,
    "qwen_vl_v1": QwenVL1,
}


def family(system: str) -> type[Family]:
    """The family of a folder's system."""
    return FAMILIES[system.removeprefix("train_labels_")]
