"""Captions: words as of Stanford's tokenizer, and closed forms of CIDEr, BLEU and ROUGE-L."""

import math

import pytest

from vlm_jax.evals.metrics.caption import Caption, cider, rouge_l, words
from vlm_jax.evals.metrics.metric import Response

# What PTBTokenizer of stanford-corenlp-3.4.1.jar (-preserveLines -lowerCase) says, without the marks in the list
# PUNCTUATIONS of pycocoevalcap.
TOKENIZED = {
    "A man's dog, don't run!": "a man 's dog do n't run",
    "can't cannot won't gonna wanna gotta": "ca n't can not wo n't gon na wan na got ta",
    "well-lit room -- with (two) [chairs] {x}": "well-lit room with -lrb- two -rrb- -lsb- chairs -rsb- -lcb- x -rcb-",
    "He said \"hello\" and 'bye'.": "he said hello and bye",
    "U.S. Mr. Smith vs. Dr. Who": "u.s. mr. smith vs. dr. who",
    "50% off @ 3:30 p.m. on 1/2/2020": "50 % off @ 3:30 p.m. on 1/2/2020",
    "It costs $5.00, i.e. 1,000 cents...": "it costs $ 5.00 i.e. 1,000 cents",
    "caf\u00e9 na\u00efve \u201cquoted\u201d it\u2019s": "caf\u00e9 na\u00efve quoted it 's",
    "a/b c & d #1 * x": "a/b c & d # 1 * x",
    "end.": "end",
    "": "",
    "two\nlines": "two lines",
    "the dogs' toys": "the dogs toys",
    "I'm you're they've she'll he'd o'clock": "i 'm you 're they 've she 'll he 'd o'clock",
    "e.g. etc. No. 5": "e.g. etc. no. 5",
    "hello?!  what;now: -": "hello ?! what now",
    "....": "",
    "\u2026 \u2014 \u2013 x\u2014y": "x y",
    "it's 5'10\" tall": "it 's 5 10 tall",
    "black-and-white t-shirt": "black-and-white t-shirt",
    "3.5 .5 5. 1st 2nd": "3.5 .5 5 1st 2nd",
    "(": "-lrb-",
}


@pytest.mark.parametrize("text", TOKENIZED)
def test_words_are_those_of_stanfords_tokenizer(text):
    assert " ".join(words(text)) == TOKENIZED[text]


def test_a_caption_that_is_its_only_reference_is_perfect():
    """Of two captions without a common word every n-gram has the weight log 2, so that cosines are 1."""
    said = [words("a red cat sits here"), words("two old dogs run fast")]
    assert cider(said, [[one] for one in said]) == pytest.approx([10.0, 10.0])
    metric = Caption()
    responses = [Response(" ".join(one), (" ".join(one),)) for one in said]
    assert metric.of_sums(metric.statistics(responses).sum(axis=0)) == pytest.approx([1, 10, 1, 1, 1, 1])


def test_words_that_all_references_have_count_for_nothing_and_length_is_penalised():
    """The caption is half of its reference: of 1, 2, 3 and 4-grams 3, 2, 1, 0 of 6, 5, 4, 3, all of weight log 2."""
    wanted = [[words("a b c d e f")], [words("x y z u v w")]]
    found = cider([words("a b c"), words("x y z u v w")], wanted)
    cosines = [math.sqrt(few / all_) for few, all_ in ((3, 6), (2, 5), (1, 4), (0, 3))]
    assert found == pytest.approx([10 * sum(cosines) / 4 * math.exp(-(3**2) / (2 * 6**2)), 10.0])
    assert cider([["a"], ["b"]], [[["a"]], [["a"]]]) == [0.0, 0.0]


def test_rouge_l_of_the_papers_example():
    """Lin 2004, section 3: "police kill the gunman" and "the gunman kill police" against "police killed the gunman"."""
    reference = words("police killed the gunman")
    for caption, length in (("police kill the gunman", 3), ("the gunman kill police", 2)):
        assert rouge_l(words(caption), [reference]) == pytest.approx(length / 4)  # precision and recall are equal


def test_bleu_of_the_papers_example():
    """Papineni et al. 2002, section 2.1: seven times "the" is right twice; the caption is as long as a reference."""
    references = ("The cat is on the mat.", "There is a cat on the mat.")
    metric = Caption()
    values = metric.of_sums(metric.statistics([Response("the the the the the the the.", references)]).sum(axis=0))
    assert values[2] == pytest.approx(2 / 7) and values[3:].tolist() == [0, 0, 0]
    long = metric.of_sums(metric.statistics([Response("the cat sat down", ("the cat",))]).sum(axis=0))
    assert long[2:4] == pytest.approx([2 / 4, math.sqrt(2 / 4 * 1 / 3)])  # no reward for more words
    short = metric.of_sums(metric.statistics([Response("the cat", references)]).sum(axis=0))
    assert short[2:4] == pytest.approx([math.exp(1 - 6 / 2)] * 2)  # brevity: two words, the nearest reference has six
