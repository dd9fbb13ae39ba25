"""Chat templates of a checkpoint folder, which render messages to the text of a prompt."""

import datetime
import functools
import json
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
from etils import epath

from vlm_jax.config import did_you_mean
from vlm_jax.paths import read_text
from vlm_jax.processors.template_sandbox import MAX_SOURCE, BoundedEnvironment, TemplateLimit
from vlm_jax.released_json import read_released
from vlm_jax.types import Config, Fields, Message

TEMPLATE_FILES = (
    "chat_template.jinja",
    "chat_template.json",
    "chat_template in processor_config.json",
    "chat_template in tokenizer_config.json",
)
FOLDER = "additional_chat_templates"
DEFAULT = "default"
# Variables whose values are written around every `{% generation %}` block; empty if not given.
GENERATION = GENERATION_BEGIN, GENERATION_END = "generation_begin", "generation_end"


class ChatTemplateError(ValueError):
    """A folder without a template, or messages that a template rejects; the message names the cause."""


class MissingChatTemplate(ChatTemplateError):
    """A folder without any template."""


class ChatTemplate:
    """One Jinja template, run in a sandbox with the functions that releases' templates use.

    Source: transformers, utils/chat_template_utils.py, for the settings and the functions.
    """

    def __init__(self, source: str, names: Mapping[str, str] | None = None, origin: str = "the chat template"):
        """Compiles a template.

        Args:
          source: its text.
          names: special tokens that it may use, `{"bos_token": "<s>", ...}`.
          origin: its source, for errors.

        Raises:
          ChatTemplateError: it is not a Jinja template.
        """
        self.source, self.names, self.origin = source, dict(names or {}), origin
        self._unread: dict[tuple[Any, ...], frozenset[int]] = {}  # by structure: messages in the form not read
        if len(source) > MAX_SOURCE:
            raise ChatTemplateError(f"{origin}: expected at most {MAX_SOURCE} characters, got {len(source)}")
        try:
            self._template = _environment().from_string(source)
            parsed = _environment().parse(source)
            self._reads = jinja2.meta.find_undeclared_variables(parsed)
            self._names = _names_in(parsed)
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"{origin}: not a Jinja template: line {error.lineno}: {error.message}") from error
        except (RecursionError, MemoryError, SyntaxError) as error:  # of Python, which compiles what Jinja writes
            raise ChatTemplateError(f"{origin}: nested too deeply ({type(error).__name__}: {error})") from error

    def __reduce__(self) -> tuple[type["ChatTemplate"], tuple[str, dict[str, str], str]]:
        """For another process, which compiles it anew."""
        return type(self), (self.source, self.names, self.origin)

    @property
    def marks_learned(self) -> bool:
        """Whether the template marks the trained text by `{% generation %}` blocks."""
        return GENERATION_BEGIN in self._reads

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **variables: object) -> str:
        """The text of a conversation, to be encoded without further special tokens.

        Args:
          messages: `{"role": "user", "content": "…"}`, or with content such as
            `[{"type": "image"}, {"type": "text", "text": "…"}]`. Images beside `type` are not handed on. A content of
            text alone may be either, whichever the template reads.
          add_generation_prompt: ends with the head of the answer.
          **variables: more for the template, such as `enable_thinking`; `tools` among them.

        Raises:
          ChatTemplateError: no message, the template refuses them or shows nothing of a text, or it has no use for a
            variable.
        """
        if not messages:
            raise ChatTemplateError(f"{self.origin}: expected at least one message, got none")
        for name in variables.keys() - self._reads:
            raise ChatTemplateError(f"{self.origin}: unused variable '{name}'{did_you_mean(name, self._reads)}")
        given = {"tools": None, "documents": None, **self.names, **variables}
        values = {"add_generation_prompt": add_generation_prompt, **{key: _plain(given[key], key) for key in given}}
        plain = [
            {key: _plain(value, f"message {n}: {key}") for key, value in m.items() if value is not None}
            for n, m in enumerate(messages)
        ]
        self._check_keys(plain)
        try:
            return self._rendered(self._as_read(plain, values), values)
        except ChatTemplateError:
            raise
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"{self.origin}: {error}") from error
        except Exception as error:  # what a template computes can raise any: 1 / 0, 'a' + 1, [].x.y
            raise ChatTemplateError(f"{self.origin}: {type(error).__name__}: {error}") from error

    def _rendered(self, messages: list[Fields], values: Config) -> str:
        return _environment().rendered(self._template, {"messages": messages, **values})

    def _check_keys(self, messages: Sequence[Fields]) -> None:
        """Raises for a key of a message that the template does not name."""
        for number, message in enumerate(messages):
            for key in message.keys() - {"role", "content", "loss", "weight"} - self._names:
                raise ChatTemplateError(
                    f"{self.origin}: message {number}: the template does not read the key '{key}'; remove it"
                )

    def _as_read(self, messages: list[Fields], values: Config) -> list[Fields]:
        """The messages, with content that is only text as a list or as a string, whichever the template reads.

        That depends on the messages' roles, keys and items and on which variables are set, and is found out once for
        each such structure.
        """
        structure = (
            tuple((m.get("role"), tuple(m), *_structure(m.get("content"))) for m in messages),
            tuple((name, bool(value)) for name, value in values.items() if name not in GENERATION),
        )
        if structure not in self._unread:
            self._unread[structure] = self._not_read(messages, values)
        return _in_other_form(messages, self._unread[structure])

    def _not_read(self, messages: list[Fields], values: Config) -> frozenset[int]:
        """Numbers of the messages whose content has the form that the template does not read."""
        hidden = self._hidden(messages, values)
        if hidden is None:  # perhaps since it reads the other form alone
            of_form = (
                {n for n, m in enumerate(messages) if isinstance(m.get("content"), form)} for form in (list, str)
            )
            fitting = (unread for unread in of_form if self._hidden(_in_other_form(messages, unread), values) == set())
            return frozenset(next(fitting, ()))
        for number in sorted(self._hidden(_in_other_form(messages, hidden), values) or ()) if hidden else ():
            raise ChatTemplateError(
                f"{self.origin}: message {number}, of the role {messages[number].get('role')!r}: the template shows "
                "nothing of its text, or of one of its texts; give it in a role and in items that it reads"
            )
        return frozenset(hidden)

    def _hidden(self, messages: list[Fields], values: Config) -> set[int] | None:
        """Numbers of the messages with a text that the template does not show; None where it refuses them.

        It is tried with a text of its own for every one of theirs.
        """
        tried, wanted = [], []
        for number, message in enumerate(messages):
            content = message.get("content")
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else _items(content)
            texts = [f"text{number}x{place}x" if _is_text(part) else None for place, part in enumerate(parts)]
            wanted += [(number, text) for text in texts if text is not None]
            filled = [part if text is None else {**part, "text": text} for part, text in zip(parts, texts, strict=True)]
            new = texts[0] if isinstance(content, str) else filled
            tried.append({**message, "content": new} if any(texts) else message)
        try:
            shown = self._rendered(tried, values)
        except TemplateLimit:
            raise
        except Exception:  # any, as in `render`
            return None
        # A template that takes a list for a text writes it as Python does.
        return {number for number, text in wanted if text not in shown or f"'text': '{text}'" in shown}

    @classmethod
    def from_folder(
        cls, folder: str | os.PathLike[str], names: Mapping[str, str] | None = None, *, name: str | None = None
    ) -> "ChatTemplate":
        """Reads the template of a checkpoint folder, local or `gs://`.

        Args:
          folder: folder of the checkpoint.
          names: special tokens, as in `Tokenizer.names`.
          name: name of one of several templates; the default one when None.

        Raises:
          MissingChatTemplate: the folder has none.
          ChatTemplateError: it has none with that name, or a file that cannot be read.
        """
        folder = epath.Path(folder)
        found = _templates(folder)
        if not found:
            raise MissingChatTemplate(
                f"{folder}: no chat template here; looked for {', '.join(TEMPLATE_FILES)}, {FOLDER}/*.jinja. Put the "
                "release's template into chat_template.jinja"
            )
        wanted = DEFAULT if name is None else name
        if wanted not in found:
            raise ChatTemplateError(
                f"{folder}: no chat template '{wanted}'; expected one of {', '.join(sorted(found))}"
            )
        return cls(found[wanted], names, origin=f"{folder}: chat template")


def _templates(folder: epath.Path) -> dict[str, str]:
    """Templates by name: of the processor's config, else of separate files, else of the tokenizer's config.

    Source: transformers, processing_utils.py, get_processor_dict.
    """
    if found := _of_config(folder / "processor_config.json"):
        return found
    own: dict[str, str] = {}
    alone = folder / "chat_template.json"
    if alone.exists():
        content = read_released(alone, ChatTemplateError)
        if "chat_template" not in content:
            raise ChatTemplateError(f"{alone}: expected the key chat_template, got {', '.join(content) or 'none'}")
        own |= _of_config(alone)
    if (folder / "chat_template.jinja").exists():
        own[DEFAULT] = read_text(folder / "chat_template.jinja", ChatTemplateError)
    if (folder / FOLDER).exists():
        paths = sorted((folder / FOLDER).glob("*.jinja"))
        own |= {path.name.removesuffix(".jinja"): read_text(path, ChatTemplateError) for path in paths}
    return own or _of_config(folder / "tokenizer_config.json")


def _of_config(path: epath.Path) -> dict[str, str]:
    """Templates by name in the key `chat_template` of a file: one, or several as a list or an object."""
    entry = read_released(path, ChatTemplateError).get("chat_template") if path.exists() else None
    if isinstance(entry, list):
        return {item["name"]: item["template"] for item in entry}
    if isinstance(entry, Mapping):
        return dict(entry)
    return {DEFAULT: entry} if entry else {}


@functools.cache
def _environment() -> BoundedEnvironment:
    environment = BoundedEnvironment([_Generation, jinja2.ext.loopcontrols])
    environment.add_filter("tojson", _to_json)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`, which marks the trained parts by the values of two variables."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (
            jinja2.nodes.Output([jinja2.nodes.Name(name, "load")]) for name in (GENERATION_BEGIN, GENERATION_END)
        )
        return [node.set_lineno(line) for node in (begin, jinja2.nodes.Scope(body), end)]


def _is_text(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") == "text" and bool(str(part.get("text", "")).strip())


def _structure(content: Any) -> tuple[Any, ...]:
    """What kind of content it is: a text or a list, and of which items."""
    if isinstance(content, str):
        return (bool(content.strip()),)
    return ("list", *((part.get("type"), _is_text(part)) for part in _items(content) if isinstance(part, Mapping)))


def _items(content: Any) -> list[Any]:
    return content if isinstance(content, list) else []


def _in_other_form(messages: list[Fields], numbers: Collection[int]) -> list[Fields]:
    return [_other_form(message) if number in numbers else message for number, message in enumerate(messages)]


def _other_form(message: Fields) -> Fields:
    """A message with its text in a list of one item, or a list of texts as one text; others as they are."""
    content = message.get("content")
    if isinstance(content, str):
        return {**message, "content": [{"type": "text", "text": content}]}
    if isinstance(content, list) and content and all(_is_text(part) for part in content):
        return {**message, "content": "\n".join(part["text"] for part in content)}
    return message


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _names_in(parsed: jinja2.nodes.Template) -> frozenset[str]:
    """Names of keys and attributes in a template, with all its other strings."""
    attributes = {node.attr for node in parsed.find_all(jinja2.nodes.Getattr)}
    constants = (node.value for node in parsed.find_all(jinja2.nodes.Const))
    return frozenset(attributes | {value for value in constants if isinstance(value, str)})


def _plain(value: Any, where: str) -> Any:
    """Only JSON values, so that a downloaded template cannot call methods of objects.

    Raises:
      ChatTemplateError: another value.
    """
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{number}]") for number, item in enumerate(value)]
    fix = '; pass its JSON schema, {"type": "function", "function": {…}}' if callable(value) else ""
    raise ChatTemplateError(
        f"{where}: expected text, numbers, lists and mappings, got a value of type {type(value).__name__}{fix}"
    )
