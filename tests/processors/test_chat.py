"""Chat templates: where they are found, what they may do, and what they reject. Texts are written by hand."""

import json

import pytest

from vlm_jax.processors.chat import ChatTemplate, ChatTemplateError, MissingChatTemplate
from vlm_jax.processors.digits_vocabulary import digits_tokenizer
from vlm_jax.processors.layout import Text
from vlm_jax.processors.learned import PromptError
from vlm_jax.processors.prompt import TemplatePrompt

from ..advice import tried

CHATML = """{%- for message in messages %}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
    {% for part in message.content %}
        {% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}
    {% endfor %}
{% endif %}
<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
USER, SILENT = {"role": "user", "content": "hi"}, {"role": "user", "content": ""}


def test_messages_become_the_text_of_a_prompt():
    picture = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    template = ChatTemplate(CHATML)
    text = "<|im_start|>user\n<image>what?<|im_end|>\n"
    assert template.render([picture], add_generation_prompt=False) == text
    assert template.render([picture]) == text + "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ bos_token }}{{ messages[0]['content'] }}", "<s>hi"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ {'a': 1} | tojson(indent=1) }}", '{\n "a": 1\n}'),
        ("{% for n in [1, 2, 3] %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "1"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "hi!"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% set x = namespace(n=0) %}{% set x.n = 3 %}{{ x.n }}", "3"),
        ("{% if tools is none %}no tools{% endif %}", "no tools"),
        ("{{ level }}", "7"),
    ],
)
def test_what_a_template_may_use(source, text):
    variables = {"level": 7} if "level" in source else {}
    messages = [USER if "content" in source else SILENT]
    assert ChatTemplate(source, {"bos_token": "<s>"}).render(messages, **variables) == text


def test_a_variable_that_nothing_reads_is_told():
    template = ChatTemplate("{% if enable_thinking is defined and enable_thinking %}hm{% endif %}")
    assert template.render([SILENT], enable_thinking=True) == "hm"
    with pytest.raises(ChatTemplateError, match=r"unused variable 'enable_thinkin'; did you mean 'enable_thinking'"):
        template.render([SILENT], enable_thinkin=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "chat template: roles must alternate"),
        ("{{ messages[0].__class__.__mro__ }}", "chat template: .*unsafe|chat template: .*__class__"),
        ("{{ messages.append(1) }}", "chat template: .*unsafe"),
        ("{{ missing.key }}", "chat template: 'missing' is undefined"),
    ],
)
def test_what_a_template_refuses_and_what_it_may_not_do(source, message):
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(source).render([USER])


LISTS = (
    "{% for m in messages %}{% if m.role != 'system' %}{{ m.role }}:{% for c in m.content | selectattr('type', "
    "'equalto', 'text') %} {{ c.text }}{% endfor %};{% endif %}{% endfor %}"
)
ANSWER = {"role": "assistant", "content": "u"}


def test_a_text_is_given_in_the_form_that_a_template_reads():
    lists = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, ANSWER]
    for given in ([USER, ANSWER], lists):
        assert ChatTemplate(LISTS).render(given, add_generation_prompt=False) == "user: hi;assistant: u;"
        strings = ChatTemplate("{% for m in messages %}{{ m.content.strip() }}|{% endfor %}")
        assert strings.render(given, add_generation_prompt=False) == "hi|u|"


@pytest.mark.parametrize(
    ("source", "messages", "message"),
    [
        (
            LISTS,
            [{"role": "system", "content": "be short"}, USER],
            tried("{0}, of the role {'system'}: the template shows nothing of its text, or of one of its texts; give"),
        ),
        (
            "{{ messages[0].content }}",
            [USER, ANSWER],
            "message 1, of the role 'assistant': .* nothing",
        ),
        (
            "{{ messages[0].content[0].text }}",
            [{"role": "user", "content": [{"type": "text", "text": text} for text in ("a", "b")]}],
            r"message 0, .* or of one of its texts",
        ),
    ],
)
def test_a_text_that_a_template_does_not_show_is_named(source, messages, message):
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(source).render(messages, add_generation_prompt=False)


def test_a_text_in_a_role_that_a_template_reads_is_shown():
    assert "be short" in ChatTemplate(LISTS).render([{**USER, "content": "be short"}], add_generation_prompt=False)


def test_a_list_is_not_written_as_python_writes_it():
    given = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    template = ChatTemplate("{% for m in messages %}{{ m['content'] | trim }}{% endfor %}")
    assert template.render(given, add_generation_prompt=False) == "hi"


def test_a_text_beside_calls_of_tools_is_not_lost():
    template = ChatTemplate(
        "{% for m in messages %}{% if m.tool_calls is defined %}call{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    assert template.render([USER, ANSWER], add_generation_prompt=False) == "hiu"
    with pytest.raises(ChatTemplateError, match="message 1, of the role 'assistant'"):
        template.render([USER, {**ANSWER, "tool_calls": [{"name": "f"}]}], add_generation_prompt=False)


def test_a_template_sees_no_objects():
    """An object has methods that are not for a template, and would be written as `<object>`."""
    template = ChatTemplate("{{ tools | tojson }}{{ messages[0].content }} {{ 'name' in messages[0] }}")
    assert template.render([{**USER, "name": None}], tools=[{"name": "f"}]) == '[{"name": "f"}]hi False'
    advised = tried('; pass its JSON schema, {{"type": "function", "function": {{…}}}}')
    with pytest.raises(ChatTemplateError, match=r"^tools\[0\]: expected text, .* of type builtin_function.*" + advised):
        template.render([USER], tools=[len])
    schema = {"type": "function", "function": {"name": "len"}}
    assert template.render([USER], tools=[schema]).startswith(json.dumps([schema]))


def test_a_key_of_a_message_that_nothing_reads_is_told():
    template = ChatTemplate("{{ messages[0].content }}{% if messages[0]['tool_calls'] %}call{% endif %}")
    assert template.render([{**USER, "tool_calls": [1]}]) == "hicall"
    with pytest.raises(ChatTemplateError, match="message 0: the template does not read the key 'images'; remove it"):
        template.render([{**USER, "images": ["a.png"]}])


def test_where_a_folder_keeps_its_template(tmp_path):
    def text(name=None):
        return ChatTemplate.from_folder(tmp_path, name=name).render([SILENT])

    with pytest.raises(ChatTemplateError, match=r"no chat template here; looked for chat_template\.jinja, chat_temp"):
        text()
    entry = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    assert (text(), text("tool_use")) == ("one", "two")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "three"}))
    assert text() == "three"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "four"}))
    assert text() == "four"
    (tmp_path / "chat_template.jinja").write_text("five")
    assert text() == "five"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("six")
    assert (text(), text("rag")) == ("five", "six")
    with pytest.raises(ChatTemplateError, match="no chat template 'rug'; expected one of default, rag"):
        text("rug")


def test_a_template_that_is_none_is_named():
    with pytest.raises(ChatTemplateError, match="folder/x: not a Jinja template: line 2"):
        ChatTemplate("\n{% if %}", origin="folder/x")
    with pytest.raises(ChatTemplateError, match="at least one message"):
        ChatTemplate("").render([])


def test_a_picture_among_the_parts_of_a_text_is_named():
    prompt = TemplatePrompt(ChatTemplate("{{ messages[0].content }}"), digits_tokenizer(), joined="")
    parts = [{"type": "text", "text": "count "}, {"type": "text", "text": "7"}]
    (text,) = prompt([{"role": "user", "content": parts}], [])
    assert isinstance(text, Text) and digits_tokenizer().decode(text.ids) == "count 7"
    with pytest.raises(PromptError, match="an item of type 'image'; this model reads text"):
        prompt([{"role": "user", "content": [{"type": "image"}]}], [])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("chat_template.json", "{", r"chat_template\.json: not JSON"),
        (
            "chat_template.json",
            '{"template": "x"}',
            r"expected the key chat_template, got template",
        ),
        ("tokenizer_config.json", "[]", r"tokenizer_config\.json: expected a JSON object, got list"),
    ],
)
def test_a_damaged_file_is_named_and_no_folder_without_a_template(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ChatTemplateError, match=message) as refused:
        ChatTemplate.from_folder(tmp_path)
    assert not isinstance(refused.value, MissingChatTemplate)
    (tmp_path / name).unlink()
    with pytest.raises(MissingChatTemplate, match="no chat template here"):
        ChatTemplate.from_folder(tmp_path)
