"""Where training labels differ from those of a release's code on purpose: for which conversations, and why."""

import dataclasses
import re
from collections.abc import Callable

from tests.golden.systems.train_label_families import IMAGE, Case, Family


@dataclasses.dataclass(frozen=True)
class Rule:
    """A difference.

    Attributes:
      systems: pattern of the whole names of systems, after `train_labels_`.
      differs: whether a conversation is made differently.
      reason: what the release's code does, and what is done here.
    """

    systems: str
    differs: Callable[[Family, Case], bool]
    reason: str


def num_tags(case: Case) -> int:
    return sum(text.count(IMAGE) for _, text in case.turns)


def tags_differ(family: Family, case: Case) -> bool:
    return num_tags(case) != len(case.pictures) and not case.frames


def asked_tags_differ(family: Family, case: Case) -> bool:
    return sum(text.count(IMAGE) for text in case.texts("user")) != len(case.pictures)


def has(text: str) -> Callable[[Family, Case], bool]:
    return lambda family, case: any(text in own for _, own in case.turns)


def empty_answer(family: Family, case: Case) -> bool:
    return "" in case.texts("assistant")


def answer_first(family: Family, case: Case) -> bool:
    return case.turns[0][0] == "assistant"


def question_last(family: Family, case: Case) -> bool:
    return case.turns[-1][0] == "user"


def several_tags(family: Family, case: Case) -> bool:
    return any(text.count(IMAGE) > 1 for _, text in case.turns)


def tag_in_answer(family: Family, case: Case) -> bool:
    return any(IMAGE in text for text in case.texts("assistant"))


def untagged_first(family: Family, case: Case) -> bool:
    return bool(case.pictures) and IMAGE not in case.turns[0][1]


def stripped(family: Family, case: Case) -> bool:
    return any(text != text.strip() for _, text in case.turns)


def padding(family: Family, case: Case) -> bool:
    """A text spells the token that the release takes for padding."""
    pad = family.processor.tokenizer.id_of(family.arguments["pad_token"])
    return any(pad in family.processor.tokenizer.encode(text) for _, text in case.turns)


def miscounted(family: Family, case: Case) -> bool:
    """The release's count is off: without its limit nothing is learned."""
    return family.as_released(case) and not family.counted(case)


def role_word(family: Family, case: Case) -> bool:
    """A text other than an answer has the token of the word `assistant`, or a role is taken for it."""
    word = family.processor.tokenizer.encode("assistant")
    texts = [text for role, text in case.turns if role != "assistant"]
    return any(set(word) & set(family.processor.tokenizer.encode(text)) for text in texts) or "system" in dict(
        case.turns
    )


VICUNA = "llava15.*|mobilevlm.*|llava_llama2"
LLAVA = VICUNA + "|llava_plain"
COUNTED = "internvl2_(hermes2|internlm2|phi3)"
LOST = "the release counts tokens piece by piece, and learns nothing of a sample where the sum is off: "
RULES = (
    Rule("qwen2_5_vl", role_word, "the release starts labels at the word `assistant` anywhere, and takes a system "
         "message for an answer"),
    Rule("qwen2_5_vl", lambda family, case: any("<|im_end|>" in text for text in case.texts("assistant")),
         "the release ends an answer's labels at an end token that is written inside it"),
    Rule("qwen2_5_vl_data_qwen", lambda family, case: case.turns[0][0] == "system",
         "the release writes its own system message before that of a conversation"),
    Rule("qwen2_5_vl_data_qwen", answer_first, "the release drops a first turn that is an answer"),
    Rule("qwen2_5_vl_data_qwen", asked_tags_differ,
         "the release goes on with another number of tags than pictures; here it is refused"),
    Rule(VICUNA, empty_answer, LOST + "an empty answer has no end token"),
    Rule(VICUNA, question_last, LOST + "a last question"),
    Rule(VICUNA, has(" ASSISTANT: "), LOST + "the answer's head in a text"),
    Rule(VICUNA, has("</s>"), LOST + "the end token in a text"),
    Rule(VICUNA, padding, LOST + "the padding token in a text"),
    Rule("llava_llama2", has("[/INST] "), LOST + "the answer's head in a text"),
    Rule("llava_mpt", lambda family, case: True, LOST + "one token a turn, where the tokenizer adds no start token"),
    Rule("llava_next_qwen", answer_first, "the release drops a first turn that is an answer"),
    Rule("llava_next_qwen", tag_in_answer, "the release learns the place of a picture in an answer"),
    Rule(VICUNA, answer_first, "the release drops a first turn that is an answer"),
    Rule(LLAVA, several_tags, "the release merges the tags of a turn into one"),
    Rule(LLAVA, tag_in_answer, "the release learns the place of a picture in an answer"),
    Rule("internvl2_(hermes2|phi3)", empty_answer, LOST + "an empty answer has no end token"),
    Rule(COUNTED, question_last, LOST + "a last question; or it is learned"),
    Rule(COUNTED, answer_first, "the release drops a first turn that is an answer"),
    Rule(COUNTED, lambda family, case: any(end in text for _, text in case.turns for end in ("<|im_end|>", "<|end|>")),
         LOST + "the end token in a text"),
    Rule("internvl2_internlm2", lambda family, case: stripped(family, case) or empty_answer(family, case),
         "the release strips all turns, and writes no end token after an empty answer"),
    Rule("internvl2.*", untagged_first, "the release looks for a picture's tag in the first turn only, and writes one "
         "there; later tags stay text. Here a picture is where its tag is"),
    Rule("internvl2.*", has("<IMG_CONTEXT>"), "the release gives a written placeholder no picture; here it is refused"),
    Rule(f"internvl2.*|{LLAVA}|deepseek_vl2", tags_differ, "the release goes on with another number of tags than "
         "pictures; here it is refused"),
    Rule("deepseek_vl2", question_last, "the release writes the head of an answer behind a last question in training; "
         "here only where an answer is asked for"),
    Rule("ovis2", lambda family, case: case.frames and not hasattr(family.processor.views, "video_edges"),
         "videos of Ovis 2 are not supported"),
    Rule("qwen_vl_v1", answer_first, "the release drops a first turn that is an answer"),
    Rule("qwen_vl_v1", lambda family, case: any("<img>" in text for text in case.texts("assistant")),
         "the release learns the places of a picture in an answer, which no text is generated for"),
    Rule(f"{VICUNA}|{COUNTED}", miscounted, LOST + "later turns of a tokenizer for which it subtracts no token, or "
         "the wrong number"),
)  # fmt: skip


def difference(system: str, family: Family, case: Case) -> Rule | None:
    """The first rule that names a difference for a conversation."""
    name = system.removeprefix("train_labels_")
    return next((rule for rule in RULES if re.fullmatch(rule.systems, name) and rule.differs(family, case)), None)
