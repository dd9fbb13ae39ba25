"""A small release for the page: a LLaVA with a random tower, whose language model says one text with a box.

Every piece of the text is a token with a fixed successor, as in tests/processes/alphabet.py. Layers add one thing: with
`FOREVER` in the question, the answer begins again where it would end.
"""

import json
from unittest import mock

import numpy as np
import safetensors.numpy
import tokenizers
from PIL import Image, ImageDraw

from tests.contracts.releases import CLIP, CROP, FOLDERS, HEAD, TEXT, Folder, make

BOX = (520, 300, 860, 780)  # in thousandths of the picture
PIECES = (
    *("The ", "red ", "sign ", 'says "', "STOP", '". ', "It is ", "here: "),
    *("<ref>sign", "</ref>", "<box>(520,", "300),(", "860,", "780)", "</box>"),
)
ANSWER = "".join(PIECES)
FIRST = 260  # id of the first piece; before it bytes, <s>, </s>, <pad>, <image>
FOREVER = "forever"
NUM_TOKENS = FIRST + len(PIECES) + 1
END, ASKED = 257, ":"  # the end of an answer, and what the prompt ends with
SIDE, PATCH = 96, 8
WIDTH = 280  # of the language model: one number for every token, and a few that are always 0
PREFIX = "language_model.model"


def write(folder) -> None:
    """Writes the released files."""
    text = {**TEXT, "model_type": "llama", "hidden_size": WIDTH, "vocab_size": NUM_TOKENS}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 4}
    case = Folder(
        {
            "model_type": "llava",
            "vision_config": {**CLIP, "image_size": SIDE, "patch_size": PATCH},
            "text_config": text,
            "image_token_index": 259,
            **HEAD,
        },
        names={
            "vision_tower.vision_model.embeddings.class_embedding": (16,),
            "multi_modal_projector.linear_2.weight": (WIDTH, WIDTH),
            f"{PREFIX}.embed_tokens.weight": (1, 1),
            "language_model.lm_head.weight": (1, 1),
        },
        added=("<image>",),
        image="<image>",
        files={
            "preprocessor_config.json": {
                **CROP,
                "size": {"height": SIDE, "width": SIDE},
                "do_center_crop": False,
            }
        },
    )
    with mock.patch.dict(FOLDERS, {"scripted": case}):
        make("scripted", folder)
    backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    first = backend.token_to_id(ASKED)
    backend.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in (*PIECES, FOREVER)])
    *ids, forever = [backend.token_to_id(piece) for piece in (*PIECES, FOREVER)]
    assert [*ids, forever] == list(range(FIRST, NUM_TOKENS))
    backend.save(str(folder / "tokenizer.json"))
    path = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    for name, tensor in tensors.items():
        if name.startswith(PREFIX) and name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor[:] = 0
        elif name.startswith(PREFIX) and name.endswith("norm.weight"):
            tensor[:] = 1
    # Attention, uniform without queries, carries the number of `FOREVER` to all later positions; END is not said there.
    first_layer = f"{PREFIX}.layers.0.self_attn"
    tensors[f"{first_layer}.q_proj.weight"][:] = 0
    tensors[f"{first_layer}.v_proj.weight"][0] = np.eye(WIDTH)[forever]
    tensors[f"{first_layer}.o_proj.weight"][forever, 0] = 1
    for name in ("weight", "bias"):  # visual tokens have none of it
        tensors[f"multi_modal_projector.linear_2.{name}"][forever] = 0
    table = np.eye(NUM_TOKENS, WIDTH, dtype=np.float32)
    head = np.zeros_like(table)
    for token, following in zip([first, *ids], [*ids, END], strict=True):
        head[following, token] = 1
    head[END, forever], head[ids[0], ids[-1]] = -1e6, 0.5
    tensors[f"{PREFIX}.embed_tokens.weight"], tensors["language_model.lm_head.weight"] = table, head
    safetensors.numpy.save_file(tensors, path)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END}))


def street() -> Image.Image:
    """A picture of a street with a sign at `BOX`, 480 x 360 pixels."""
    width, height = 480, 360
    rows, columns = np.mgrid[:height, :width]
    sky = np.stack([150 + rows // 6, 190 + rows // 8, 235 + 0 * columns], axis=-1)
    picture = Image.fromarray(np.clip(sky, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    draw.polygon([(0, 200), (110, 110), (230, 200)], fill=(96, 125, 104))
    draw.polygon([(150, 200), (330, 90), (480, 190), (480, 200)], fill=(74, 105, 86))
    draw.rectangle((0, 200, width, height), fill=(86, 125, 70))
    draw.polygon([(190, height), (230, 200), (250, 200), (420, height)], fill=(92, 94, 100))
    draw.line([(290, height), (240, 200)], fill=(240, 240, 220), width=4)
    left, top, right, bottom = (
        edge * side / 1000 for edge, side in zip(BOX, (width, height, width, height), strict=True)
    )
    middle, radius = ((left + right) / 2, (top + bottom) / 2), (bottom - top) / 2.1
    draw.rectangle((middle[0] - 4, middle[1], middle[0] + 4, 330), fill=(120, 120, 125))
    draw.regular_polygon((*middle, radius), 8, rotation=22.5, fill=(200, 30, 40), outline="white", width=4)
    draw.text(middle, "STOP", fill="white", anchor="mm", font_size=34)
    return picture
