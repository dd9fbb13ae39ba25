"""The advice of error messages, and the marks of the tests that follow it.

A message ends with its fix: `"...; set it to False"`. A test that causes the fault, follows the words and sees that it
helped marks them, and `tests/cli/test_tried_advice.py` requires a mark for every advice in `vlm_jax`:

    with pytest.raises(ConfigError, match=tried("needs several tiles; set it to False")):
"""

import ast
import pathlib
import re
from collections.abc import Iterator

TESTS = pathlib.Path(__file__).parent
PACKAGE = TESTS.parent / "vlm_jax"
HOLE = "\0"  # what an f-string fills in

# First words of advice, at the start of a text or after one of the marks in ADVICE.
VERBS = (
    "add|call|cast|change|check|choose|compute|convert|count|create|delete|did|download|enlarge|export|fetch|fix|free|"
    "give|install|keep|leave|load|lower|make|merge|name|nearest|omit|pack|pass|pip|plan|put|raise|reduce|remove|rename|"
    "repair|rerun|resize|run|save|see|select|set|shorten|shrink|start|take|train|use|wait|write"
)
# Words that follow a semicolon and begin no advice. A new word there must go into one of the two.
OTHERS = (
    "a|answers|classify|does|each|every|expected|grey|images|is|it|its|known|looked|message|model|one|only|planned|row|"
    "rows|samples|several|state|the|this|with"
)
ADVICE = re.compile(rf"(?:^|[;,.:] (?:or )?|\n|\bor )(?:{VERBS})\b", re.IGNORECASE)
# Texts that the rule takes for advice: names of conversions, and a question of the digits.
NO_ADVICE = {f"run -> peft: {HOLE} -> {HOLE}", "run -> Hugging Face", f"count {HOLE}"}


def tried(words: str) -> str:
    """A pattern for `match=` of a part of a message whose advice the test follows.

    Args:
      words: a part of the f-string in `vlm_jax`, with what it fills in, or with nothing, in braces:
        `"raise {config.row.length} by {} or more"`. Write it in place, as a literal, since the walk reads it there.
    """
    return "".join("(?s:.*)" if hole and not part else _escaped(part) for hole, part in _parts(words))


def with_holes(words: str) -> str:
    """The words as they stand in a text of `messages`."""
    return "".join(HOLE if hole else part for hole, part in _parts(words))


def marks() -> Iterator[tuple[str, str]]:
    """(file, words with holes) of every call of `tried` in the tests."""
    for path in sorted(TESTS.rglob("*.py")):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)) if "tried(" in text else ():
            match node:
                case ast.Call(func=ast.Name(id="tried"), args=[ast.Constant(value=str(words))]):
                    yield str(path.relative_to(TESTS)), with_holes(words)


def messages() -> Iterator[tuple[str, str]]:
    """(file, text) of every string of the package, without docstrings and descriptions of flags."""
    for path in sorted(PACKAGE.rglob("*.py")):
        nodes, skipped = list(ast.walk(ast.parse(path.read_text()))), set()
        for node in nodes:
            if isinstance(node, ast.Expr):
                skipped.add(id(node.value))
            elif isinstance(node, ast.JoinedStr):
                skipped |= {id(part) for part in node.values}
            elif isinstance(node, ast.Call) and re.search(r"DEFINE_|numbers\.define", ast.unparse(node.func)):
                skipped |= {id(part) for part in ast.walk(node)}
        for node in nodes:
            text = _text(node)
            if text and id(node) not in skipped:
                yield str(path.relative_to(PACKAGE)), text


def advice() -> dict[str, str]:
    """The texts with advice, and the first file of each."""
    found: dict[str, str] = {}
    for file, text in messages():
        if is_advice(text):
            found.setdefault(text, file)
    return found


def is_advice(text: str) -> bool:
    """Whether the text has a verb of advice, and more than one word."""
    return " " in text and text not in NO_ADVICE and ADVICE.search(text) is not None


def _text(node: ast.AST) -> str | None:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _parts(words: str) -> list[tuple[bool, str]]:
    """(is it filled in, text) of each part; {{ and }} are braces."""
    found = re.findall(r"(\{\{|\}\})|(\{[^{}]*\})|([^{}]+)", words)
    return [(bool(hole), brace[:1] or hole[1:-1] or plain) for brace, hole, plain in found]


def _escaped(text: str) -> str:
    return re.escape(text).replace(r"\ ", " ")
