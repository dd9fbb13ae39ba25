"""Trees of HTML: the example of Zhang and Shasha, tables by hand, and texts that are no HTML."""

import pytest

from vlm_jax.evals.metrics.html import document_similarity, markup_similarity, table_similarity
from vlm_jax.evals.metrics.tree_distance import Node, tree_distance


def tree(label, *children):
    return Node((label,), children=list(children))


def unit(mine, theirs):
    return float(mine.label != theirs.label)


def test_the_distance_of_zhangs_and_shashas_trees_is_two():
    """Figure 4 of Zhang and Shasha 1989: f(d(a c(b)) e) becomes f(c(d(a b)) e) by moving c."""
    first = tree("f", tree("d", tree("a"), tree("c", tree("b"))), tree("e"))
    second = tree("f", tree("c", tree("d", tree("a"), tree("b"))), tree("e"))
    assert tree_distance(first, second, unit) == tree_distance(second, first, unit) == 2
    assert tree_distance(first, first, unit) == 0
    assert tree_distance(first, tree("x"), unit) == 6  # five are removed and one is replaced


TABLE = "<table><tr><td>ab</td><td>c</td></tr><tr><td>d</td></tr></table>"  # five elements below it


@pytest.mark.parametrize(
    ("answer", "similarity", "structure"),
    [
        (TABLE, 1, 1),
        (f"<html><body>see: {TABLE}</body></html>", 1, 1),
        (TABLE.replace("td", "th"), 1, 1),
        (TABLE.replace("<td>c</td>", ""), 1 - 1 / 5, 1 - 1 / 5),
        (TABLE.replace(">ab<", ">xb<"), 1 - 0.5 / 5, 1),
        (TABLE.replace("<td>c", "<td colspan=2>c"), 1 - 1 / 5, 1 - 1 / 5),
        (TABLE.replace("<td>c", "<td rowspan='1'>c"), 1, 1),
        (TABLE.replace("c<", "<b>c</b><"), 1 - (2 / 3) / 6, 1),  # two tags of three pieces; six elements
        (TABLE.replace("</td>", "").replace("</tr>", ""), 1, 1),  # ends may be left out
        ("ab c d", 0, 0),
        ("", 0, 0),
    ],
)
def test_similarity_of_a_table(answer, similarity, structure):
    assert table_similarity(answer, TABLE) == pytest.approx(similarity)
    assert table_similarity(answer, TABLE, content=False) == pytest.approx(structure)


@pytest.mark.parametrize(
    ("span", "similarity"), [("2", 1), ("02", 1), (" 2 ", 1), ("3", 4 / 5), ("x", 4 / 5), ("", 4 / 5), ("0", 4 / 5)]
)
def test_spans_are_numbers(span, similarity):
    """Of five elements one is replaced where they differ. A span without a number counts as 1."""
    spanned = TABLE.replace("<td>c", "<td colspan='2'>c")
    assert table_similarity(TABLE.replace("<td>c", f"<td colspan='{span}'>c"), spanned) == pytest.approx(similarity)
    is_one = span in ("x", "")
    assert (table_similarity(TABLE.replace("<td>c", f"<td colspan='{span}'>c"), TABLE) == 1) == is_one


def test_the_first_table_of_a_text_counts():
    other = "<table><tr><td>zz</td></tr></table>"
    assert table_similarity(TABLE + other, TABLE) == 1 > table_similarity(other + TABLE, TABLE)
    assert table_similarity(f"<div><p>{TABLE}</p></div><div>{other}</div>", TABLE) == 1


def test_a_similarity_of_tables_is_in_0_to_1():
    """A row of three cells and four rows: one is removed and added, three are replaced, 5 of 4 elements."""
    assert table_similarity(f"<table><tr>{'<td></td>' * 3}</tr></table>", f"<table>{'<tr></tr>' * 4}</table>") == 0
    assert table_similarity("<table></table>", "<table>x</table>") == 1


@pytest.mark.parametrize(
    ("opened", "ended"),
    [
        ("<ul><li>a<li>b</ul>", "<ul><li>a</li><li>b</li></ul>"),
        ("<p>a<p>b", "<p>a</p><p>b</p>"),
        ("<select><option>a<option>b</select>", "<select><option>a</option><option>b</option></select>"),
    ],
)
def test_ends_of_elements_may_be_left_out(opened, ended):
    """HTML's standard, section 13.1.2.4 (optional tags)."""
    assert document_similarity(opened, ended) == markup_similarity(opened, ended) == 1


def test_similarity_of_a_document():
    page = "<body><h1>Cats</h1>\n<p>one  <b>two</b> three</p></body>"  # four elements
    assert document_similarity(f"<html><head><title>x</title></head>{page}</html>", page) == 1
    assert document_similarity(page.replace("h1", "h2"), page) == pytest.approx(1 - 1 / 4)
    assert document_similarity(page.replace("Cats", "Bats"), page) == pytest.approx(1 - 0.25 / 4)
    assert document_similarity(page.replace("Cats", "Bats"), page, content=False) == 1
    pieces = len("Cats") + 2 + len("one two three") - 2 + 2 + 2  # two spaces beside tags do not count
    assert markup_similarity(page.replace("Cats", "Bats"), page) == pytest.approx(1 - 1 / pieces)
    assert markup_similarity(page.replace("\n", ""), page) == 1 == markup_similarity("", "")
    assert markup_similarity("<p>one\n two</p>", "<p>one two</p>") == 1


@pytest.mark.parametrize(
    "text", ["<", "<td", "</td>", "<![x[ y", "<![CDATA[x]]>", "<!", "<!--", "&#x;", "<table", "<a b='"]
)
def test_texts_that_are_no_html_are_measured(text):
    for one, other in ((text, TABLE), (TABLE + text, TABLE)):
        assert 0 <= table_similarity(one, other) <= 1
        assert 0 <= document_similarity(one, other) <= 1 and 0 <= markup_similarity(one, other) <= 1
    assert table_similarity("<b>" * 2000 + TABLE, TABLE) == 1
