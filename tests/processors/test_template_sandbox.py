"""Templates over the bounds of time and size end soon, with the project's error; others are rendered as by Jinja."""

import json

import jinja2
import jinja2.sandbox
import pytest

from vlm_jax.processors import template_sandbox
from vlm_jax.processors.chat import ChatTemplate, ChatTemplateError
from vlm_jax.processors.template_sandbox import BoundedEnvironment, TemplateLimit

from ..memory import peak_bytes

USER = {"role": "user", "content": ""}
LOOP = "{% for n in range(99999) %}"

ENDLESS = {
    "nested loops": LOOP * 4 + "{% set x = 1 %}" + "{% endfor %}" * 4,
    "loops in filters": LOOP + "{% set x = range(99999) | select('eq', -1) | list %}{% endfor %}",
    "tests of lists": "{% set l = range(99999) | list %}{{ l | select('in', l) | list | length }}",
    "a macro": "{% macro m(n) %}{% for k in range(9999) %}{{ m(n) }}{% endfor %}{% endmacro %}{{ m(0) }}",
}
LARGE = {
    "product": "{{ 'a' * 10**10 }}",
    "list": "{{ [0] * 10**10 }}",
    "power": "{{ 10**(10**10) }}",
    "doubling": "{% set x = namespace(t='ab') %}" + LOOP + "{% set x.t = x.t + x.t %}{% endfor %}",
    "joined": "{% set x = namespace(t='ab') %}" + LOOP + "{% set x.t = x.t ~ x.t %}{% endfor %}",
    "nested": "{% set x = namespace(t=[]) %}" + LOOP + "{% set x.t = [x.t, x.t] %}{% endfor %}",
    "tuples": "{% set x = namespace(t=()) %}" + LOOP + "{% set x.t = (x.t, x.t) %}{% endfor %}",
    "dicts": "{% set x = namespace(t=1) %}" + LOOP + "{% set x.t = dict(a=x.t, b=x.t) %}{% endfor %}",
    "batches": "{% set x = namespace(t=[1]) %}" + LOOP + "{% set x.t = (x.t * 2) | batch(2) | list %}{% endfor %}",
    "arguments": "{% macro m(n) %}{{ m(varargs, varargs) if n }}{% endmacro %}{{ m(1, 2, 2) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10000000000, 1) }}",
    "format": "{{ '{:10000000000}'.format(1) }}",
    "format argument": "{{ '{:{}}'.format(1, 10000000000) }}",
    "format filter": "{{ '%10000000000d' | format(1) }}",
    "center": "{{ 'a' | center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "zfill": "{{ 'a'.zfill(10000000000) }}",
    "expandtabs": "{{ ('\\t' * 100000).expandtabs(100000) }}",
    "bytes": "{{ (1).to_bytes(10000000000, 'big') }}",
    "replace": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "replace filter": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "translate": "{{ ('a' * 1000000).translate({97: 'b' * 1000000}) }}",
    "join": "{{ ('a' * 1000000).join(range(9999) | map('string')) }}",
    "join filter": "{{ range(99999) | join('a' * 1000000) }}",
    "indent": "{{ ('\\n' * 1000000) | indent(1000000) }}",
    "indent of one line": "{{ 'a' | indent(10000000000) }}",
    "tojson": "{{ [[1]] | tojson(indent=10000000000) }}",
    "round": "{{ 1 | round(10000000000, 'ceil') }}",
    "batch": "{{ [1] | batch(10000000000, 0) | list }}",
    "output": LOOP + "a" * 10_000 + "{% endfor %}",
    "block": "{% set x %}" + LOOP + "a" * 10_000 + "{% endfor %}{% endset %}",
}  # fmt: skip
RAISING = ["{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ [1][9].x.y }}", "{{ range(999999) }}", "{{ 2.0 ** 9999 }}",
           "{{ (1).to_bytes(1, 'x') }}", "{{ '%d' % 'a' }}", "{{ '{}'.format() }}", "{{ 'a'.encode('x') }}",
           "{{ ''.__class__.__mro__ }}", "{{ 'a' | nofilter }}", "{% include 'x' %}",
           "{{ ''['__class__']() }}"]  # fmt: skip


@pytest.mark.parametrize("name", ENDLESS)
def test_a_template_ends_within_its_time(name, monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.1)
    with pytest.raises(ChatTemplateError, match=r"it takes more than 0\.1 seconds|recursion"):
        ChatTemplate(ENDLESS[name]).render([USER])


@pytest.mark.parametrize("name", LARGE)
def test_a_value_is_not_built_over_its_size(name):
    def render():
        with pytest.raises(
            ChatTemplateError, match=r"a value of more than|whole number of more than|recursion|it takes more than"
        ):
            ChatTemplate(LARGE[name]).render([USER])

    assert peak_bytes(render) < 400 * 2**20


@pytest.mark.parametrize("source", RAISING)
def test_what_a_template_raises_is_the_projects_error(source):
    with pytest.raises(ChatTemplateError):
        ChatTemplate(source).render([USER])


@pytest.mark.parametrize("source", ["{{ " + "(" * 200 + "1" + ")" * 200 + " }}",
                                    "{{ " + "[" * 5000 + "]" * 5000 + " }}",
                                    "{{ " + "-" * 5000 + "1 }}", "{% if a %}" * 400 + "{% endif %}" * 400,
                                    "a" * 2_000_000])  # fmt: skip
def test_a_template_that_is_too_deep_or_too_long_is_the_projects_error(source):
    with pytest.raises(ChatTemplateError, match=r"nested too deeply|at most 1048576 characters|not a Jinja template"):
        ChatTemplate(source, origin="it").render([USER])
        pytest.fail("compiled")


USUAL = [
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ m.role ~ ': ' ~ m.content ~ 1 }}"
    "{% if not loop.last %},{% endif %}{% else %}none{% endfor %}",
    "{% for k, v in {'a': 1, 'b': [2, (3, None)]}.items() %}{{ k }}={{ v }};{% endfor %}",
    "{% set ns = namespace(x=0) %}{% for n in range(5) if n % 2 %}{% set ns.x = ns.x + n %}{% endfor %}{{ ns.x }}",
    "{{ messages | map(attribute='role') | join(', ') }}",
    "{{ messages | selectattr('role', 'eq', 'user') | list | length }}",
    "{{ ('a,b' | replace(',', ';')).split(';') }}{{ 'x' * 3 }}{{ '%s-%03d' % ('a', 7) }}{{ '{:>4}'.format('a') }}",
    "{% macro say(x) %}<{{ x }}{{ caller() if caller }}>{% endmacro %}{{ say('a') }}{% call say(2) %}b{% endcall %}",
    "{% for x in [1, [2, [3]]] recursive %}{% if x is iterable %}"
    "({{ loop(x) }}){% else %}{{ x }}{% endif %}{% endfor %}",
    "{% set a, b = 1, (2, 3) %}{{ a }}{{ b }}{{ [a, b] | tojson }}{{ missing }}{{ none }}",
    "{{ true and 1.50 }}{{ 7 // 2 }}",
    "{{ messages[1:] | length }}{{ messages[-1].content | trim | indent(2) | default('x') }}",
    "{{ (1, 2) + (3,) }}{{ 2**10 }}",
    "{% filter upper %}a{{ 'b' }}{% endfilter %}{% set t %}c{{ 1 }}{% endset %}{{ t }}{{ [3, 1] | sort | first }}",
]


@pytest.mark.parametrize("source", USUAL)
def test_usual_templates_are_rendered_as_by_jinja(source):
    messages = [{"role": "system", "content": "be\nshort "}, {"role": "user", "content": "hi"}]
    reference = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    reference.filters["tojson"] = lambda value: json.dumps(value)
    bounded = BoundedEnvironment()
    bounded.add_filter("tojson", lambda value: json.dumps(value))
    values = {"messages": messages}
    expected = reference.from_string(source).render(**values)
    assert bounded.rendered(bounded.from_string(source), values) == expected


def test_a_long_conversation_is_no_costly_template():
    """A million characters in 1,000 messages."""
    messages = [{"role": ("user", "assistant")[n % 2], "content": "word " * 200} for n in range(1000)]
    source = (
        "{% for m in messages %}{{ m.role ~ ': ' + m.content | trim }}{{ loop.index != messages | length }}{% endfor %}"
    )
    assert len(ChatTemplate(source).render(messages)) > 990_000


def test_the_limit_is_of_one_rendering(monkeypatch):
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.05)
    environment = BoundedEnvironment()
    template = environment.from_string("{% for n in range(n) %}{% for k in range(999) %}{% endfor %}{% endfor %}")
    with pytest.raises(TemplateLimit):
        environment.rendered(template, {"n": 99999})
    assert environment.rendered(template, {"n": 1}) == ""
