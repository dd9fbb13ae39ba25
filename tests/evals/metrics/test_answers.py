"""Short answers: published examples of VQA accuracy, ANLS and relaxed accuracy, and options of multiple choice."""

import pytest

from vlm_jax.evals.metrics import METRICS
from vlm_jax.evals.metrics.answers import Anls, RelaxedAccuracy, VqaAccuracy, normalised_answer
from vlm_jax.evals.metrics.choice import Choice, chosen_letter, options_of
from vlm_jax.evals.metrics.metric import Response
from vlm_jax.evals.metrics.yes_no import Mme, yes_or_no


@pytest.mark.parametrize(("agreeing", "accuracy"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_by_the_number_of_people_who_agree(agreeing, accuracy):
    """The table of the VQA challenge's evaluation page: min(n / 3, 1), averaged over the ten choices of nine people."""
    people = ("Yes",) * agreeing + ("no",) * (10 - agreeing)
    assert VqaAccuracy().score(Response("yes.", people)) == pytest.approx(accuracy * (agreeing < 10))
    assert VqaAccuracy().score(Response("Yes", people)) == pytest.approx(accuracy)


def test_a_single_reference_is_compared_when_normalised():
    assert VqaAccuracy().score(Response("The TWO dogs!", ("2 dogs",))) == 1.0
    assert VqaAccuracy().score(Response("three dogs", ("2 dogs",))) == 0.0


def test_vqa_accuracy_of_fewer_people():
    """Of three, of whom two agree: 1/3 against the others of either of them, 2/3 against those of the third."""
    assert VqaAccuracy().score(Response("yes", ("yes", "yes", "no"))) == pytest.approx((1 / 3 + 1 / 3 + 2 / 3) / 3)


@pytest.mark.parametrize("answer", ["on top", "on\ttop", "on\ntop", " on top\n"])
def test_what_all_people_say_is_compared_on_one_line(answer):
    assert VqaAccuracy().score(Response(answer, ("on top",) * 10)) == 1.0
    assert VqaAccuracy().score(Response("On top", ("on top",) * 10)) == 0.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1.5 metres.", "1.5 metres"),
        ("1,000/2", "10002"),  # with a comma between digits no mark becomes a space
        ("z-w", "z w"),
        ("x -y z-w", "x y zw"),  # a mark beside a space is removed everywhere
        ("x- y z-w", "x y zw"),
        ("None of ten", "0 of 10"),
        ("somebody'd", "somebodyd"),
    ],
)
def test_answers_are_normalised_as_by_vqaeval(text, expected):
    """By processPunctuation and processDigitArticle of GT-Vision-Lab/VQA."""
    assert normalised_answer(text) == expected


def test_anls_is_zero_from_half_of_the_text_on():
    assert Anls().score(Response("Johann", ("johanN  ",))) == 1.0
    assert Anls().score(Response("abcd", ("abxx",))) == 0.0
    assert Anls().score(Response("abcde", ("abcxx", "xxxxx"))) == pytest.approx(0.6)


@pytest.mark.parametrize(("answer", "right"), [("95", True), ("94.9", False), ("1.05e2", True), ("9500%", True)])
def test_numbers_within_five_percent_are_right(answer, right):
    assert RelaxedAccuracy().score(Response(answer, ("7", "100"))) is right


@pytest.mark.parametrize(
    ("reference", "right"), [("B", True), ("(b)", True), ("B.", True), ("a dog", True), ("A", False), ("a cat", False)]
)
def test_the_right_option_is_a_letter_or_a_text(reference, right):
    question = "What is it?\n(A) a cat\n(B) a dog"
    assert options_of(question) == {"A": "a cat", "B": "a dog"}
    for answer in ("B", "The answer is B.", "It is a dog."):
        assert Choice().score(Response(answer, (reference,), question)) is right


# What is around a letter in can_infer_option of MMBench's evaluator.
AROUND = ["B", "B.", "B,", "B:", "B)", "B).", "(B)", "(B).", ":B", ":B,", ":B.", ":B)", ":B)."]


@pytest.mark.parametrize("word", AROUND)
def test_an_option_is_a_letter_among_marks(word):
    assert chosen_letter(f"Surely {word} it is", {"A": "a cat", "B": "a dog"}) == "B"
    assert chosen_letter(f"Surely {word.lower()} it is", {"A": "a cat", "B": "a dog"}) is None


def test_what_can_be_inferred_of_an_option():
    """By can_infer_option and can_infer_text: `A` among more than three words is an article; there are five letters."""
    options = {"A": "a dog", "B": "a cat"}
    assert chosen_letter("A cat sits", options) == "A" and chosen_letter("A cat sits here", options) == "B"
    assert chosen_letter("A or C", options) is None and chosen_letter("A or F", options) == "A"
    assert chosen_letter("a cat and a dog", options) is None


def test_the_text_of_a_right_option_has_any_case():
    question = "What is it?\nA. a cat\nB. A dog"
    assert Choice().score(Response("B", (" a DOG ",), question)) and not Choice().score(
        Response("A", ("a DOG",), question)
    )


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ('"Yes"', "yes"),
        ("I no longer see it", "no"),
        ("I'd no", None),
        (" \n yes", "yes"),
        ("so yes", None),
        ("", None),
    ],
)
def test_yes_or_no_is_in_the_first_four_letters(answer, said):
    """As parse_pred_ans of MME's calculation.py takes it, but for spaces before it."""
    assert yes_or_no(answer) == said


def test_both_questions_about_a_picture_are_right_or_not():
    """Of three pictures one is wholly right, one half: 3 of 6 questions, 1 of 3 pictures, and 100 (1/2 + 1/3)."""
    said = [("yes", "yes"), ("no", "no"), ("yes", "no"), ("No.", "no"), ("yes", "no"), ("other", "yes")]
    responses = [Response(text, (right,), group=f"{place // 2}") for place, (text, right) in enumerate(said)]
    mixed = [responses[place] for place in (0, 2, 4, 1, 3, 5)]
    for given in (responses, mixed):
        values = Mme().of_sums(METRICS["mme"].statistics(given).sum(axis=0))
        assert values == pytest.approx([1 / 2, 1 / 3, 250 / 3])


def test_any_number_of_questions_about_a_picture_is_right_or_not():
    """One of one, and two of three: 3 of 4 questions, 1 of 2 pictures."""
    said = [("yes", "a"), ("yes", "b"), ("yes", "b"), ("no", "b")]
    responses = [Response(text, ("yes",), group=group) for text, group in said]
    assert Mme().of_sums(Mme().statistics(responses).sum(axis=0)) == pytest.approx([3 / 4, 1 / 2, 125])
