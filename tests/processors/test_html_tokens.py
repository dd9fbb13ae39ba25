"""HTML in tokens: as html.parser of Python reads what is well formed, and in linear time what is not."""

import html.parser
import random

import pytest

from vlm_jax.processors.html_tokens import EndTag, StartTag, html_tokens


class Reference(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tokens = []

    def handle_starttag(self, tag, attrs):
        self.tokens.append(StartTag(tag, dict(attrs)))

    def handle_endtag(self, tag):
        self.tokens.append(EndTag(tag))

    def handle_data(self, data):
        self.tokens.append(data)


def joined(tokens):
    """With texts that follow each other as one."""
    made = []
    for token in tokens:
        if isinstance(token, str) and made and isinstance(made[-1], str):
            made[-1] += token
        elif token != "":
            made.append(token)
    return made


PARTS = (
    *(
        "<p>",
        "</p>",
        '<div class="a" data-bbox="1 2 3 4">',
        "</DIV>",
        "<br/>",
        "<img src=a.png alt='x > y'>",
    ),
    "<TD  a b=1 >",
    *(
        "text",
        " a < b ",
        "&amp;",
        "&#65; &lt",
        "<!-- a > b -->",
        "<!DOCTYPE html>",
        "\n",
        "<?xml?>",
    ),
    "<h1\nid = 'q'\n>",
    *("<script>if (a<b) '<p>'</script>", "<a href='?a=1&amp;b=2'>", "<input disabled />", "&notanentity;", "<td/>"),
)


@pytest.mark.parametrize("seed", range(200))
def test_well_formed_html_is_read_as_by_python(seed):
    rng = random.Random(seed)
    text = "".join(rng.choices(PARTS, k=rng.randint(1, 12)))
    reference = Reference()
    reference.feed(text)
    reference.close()
    assert joined(html_tokens(text)) == joined(reference.tokens)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<![x[", []),
        ("a<p", ["a"]),
        ('<p data-bbox="1 2', []),
        ("a</p", ["a"]),
        ("<!-- a", []),
        ("<p>&#" + "9" * 5000 + ";", [StartTag("p", {}), "&#" + "9" * 5000 + ";"]),
        ("< <1 <", ["< <1 <"]),
        ("</ x>a", ["a"]),
    ],
    ids=["section", "tag", "quote", "end", "comment", "digits", "signs", "bogus"],
)
def test_what_is_cut_off_or_malformed_is_left_out(text, expected):
    assert joined(html_tokens(text)) == expected


@pytest.mark.parametrize(
    "part", ["<a ", "<a", "<", "</a ", "<!--", "<!", "<?", "<script>", "<a b='", '<a b="c', "&", "&#", "<a / ", "a=b "]
)
def test_any_part_repeated_takes_linear_time(part):
    """200,000 characters, for which quadratic time would be minutes."""
    assert sum(1 for _ in html_tokens("<p>" + part * (200_000 // len(part)))) < 200_010
    assert sum(1 for _ in html_tokens("<p " + part * (200_000 // len(part)))) < 200_010
