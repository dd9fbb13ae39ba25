"""Changes of valid inputs, each a function of a random generator.

Written by hand: Hypothesis draws values of a described structure, but neither changes files that exist nor runs for a
given time over more than one process, and Atheris needs a compiler of its own and takes the interpreter over.
"""

import random
import struct
from typing import Any

BYTES = (
    b"",
    b"\x00",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\x80\x00\x00\x00",
    b"\x00" * 16,
    b"\xff" * 16,
)
NUMBERS = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        2**31,
        2**63,
        -(2**31),
        10**400,
        0.5,
        -0.0,
        1e308,
        1e-308,
        float("nan"),
        float("inf"),
    ),
    *("", "0", "257", "None", "a\x00b", "é\U0001f600", "x" * 5000, "../..", "/etc/passwd", "\ud800"),
    *([], [[]], {}, {"a": 1}, [None], [1, "2", None], [0] * 1000, {"": {}}),
)
TEXTS = (
    *(
        "",
        "\x00",
        "\n",
        " " * 1000,
        "<image>",
        "<video>",
        "<|im_end|>",
        "</s>",
        "{{",
        "}}",
        "{%",
        "%}",
        "é",
        "\u0301" * 50,
    ),
    *(
        "\u202e",
        "\ufeff",
        "\U0001f600",
        "a" * 1000,
        "[" * 500,
        "{" * 500,
        "<" * 500,
        "&#9999999999;",
        "9" * 500,
        "-1",
        "NaN",
    ),
)


def changed_bytes(rng: random.Random, data: bytes, most: int = 6) -> bytes:
    """The bytes with up to `most` changes: bits, numbers, parts that are left out, repeated, moved or cut off."""
    made = bytearray(data)
    for _ in range(rng.randint(0, most)):
        place = rng.randrange(len(made) + 1) if rng.random() < 0.5 else rng.randrange(min(len(made), 128) + 1)
        stop = min(place + rng.choice((1, 1, 2, 4, 8, 64)), len(made))
        kind = rng.randrange(8)
        if kind == 0 and made:
            made[place % len(made)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            form = rng.choice((">I", "<I", ">H", "<H", "B"))
            width = struct.calcsize(form)
            made[place : place + width] = struct.pack(form, rng.choice(NUMBERS) % 256**width)
        elif kind == 2:
            del made[place:stop]
        elif kind == 3:
            made[place:place] = rng.choice(BYTES)
        elif kind == 4:
            made[place:place] = made[place:stop] * rng.randint(1, 4)
        elif kind == 5:
            other = rng.randrange(len(made) + 1)
            made[place:stop] = made[other : other + stop - place]
        elif kind == 6:
            made[place:stop] = rng.randbytes(stop - place)
        elif rng.random() < 0.3:
            del made[place:]
    return bytes(made)


def changed_text(rng: random.Random, text: str, parts: tuple[str, ...] = TEXTS, most: int = 5) -> str:
    """The text with up to `most` parts put in, left out, repeated or moved."""
    for _ in range(rng.randint(0, most)):
        place = rng.randrange(len(text) + 1)
        stop = place + rng.choice((1, 3, 10, 50))
        kind = rng.randrange(4)
        if kind == 0:
            text = text[:place] + rng.choice(parts) + text[place:]
        elif kind == 1:
            text = text[:place] + text[stop:]
        elif kind == 2:
            text = text[:place] + text[place:stop] * rng.choice((2, 3, 100)) + text[stop:]
        else:
            text = text[:place] + rng.choice(parts) + text[stop:]
    return text


def changed_json(rng: random.Random, value: Any, most: int = 3) -> Any:
    """A copy of a JSON value with up to `most` of its entries replaced, left out or added."""
    value = _copied(value)
    for _ in range(rng.randint(0, most)):
        places = list(_places(value))
        if not places:
            return _copied(rng.choice(VALUES))
        holder, key = rng.choice(places)
        kind = rng.randrange(8)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            holder[rng.choice(("", "size", "type", "x" * 300, key + key[-1:]))] = _copied(rng.choice(VALUES))
        elif kind == 2 and isinstance(holder[key], int | float) and not isinstance(holder[key], bool):
            holder[key] = rng.choice((-holder[key], str(holder[key]), holder[key] + 1, [holder[key]], holder[key] // 2))
        else:
            holder[key] = _copied(rng.choice(VALUES))
    return value


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def _places(value: Any):
    """(dict or list, key) of every entry."""
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
