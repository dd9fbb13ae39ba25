"""Unicode's composed form in linear time."""

import unicodedata


def composed(text: str) -> str:
    """The text in form NFC, as by `unicodedata.normalize`, whose time is quadratic in a row of combining marks.

    Marks are decomposed and put in their canonical order first, so that nothing is left to be moved.

    Source: The Unicode Standard, section 3.11, D108 and D109.
    """
    if unicodedata.is_normalized("NFC", text):
        return text
    ordered: list[str] = []
    marks: list[str] = []
    for letter in "".join(unicodedata.normalize("NFD", letter) for letter in text):
        if unicodedata.combining(letter):
            marks.append(letter)
            continue
        ordered += [*sorted(marks, key=unicodedata.combining), letter]
        marks = []
    return unicodedata.normalize("NFC", "".join([*ordered, *sorted(marks, key=unicodedata.combining)]))
