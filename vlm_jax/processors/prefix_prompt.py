"""Prompts of a prefix-LM: images and a question attend to each other in both directions; the answer is causal."""

import dataclasses
from collections.abc import Mapping, Sequence

from vlm_jax.processors.items import Kind, check_kinds, check_message_keys
from vlm_jax.processors.layout import Text
from vlm_jax.processors.learned import PromptError, Targets, Turns, answer_weights
from vlm_jax.processors.prompt import Slot
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.types import Grid, Message

PREFIX = 1  # the group of the prefix
_CONVERSATIONS = (["user"], ["user", "assistant"])


@dataclasses.dataclass(frozen=True)
class PrefixPrompt:
    """Encodes `images <bos> question separator` as one group, and `answer <eos>` after it.

    The start token comes after the last image, so text between images comes before it. A separator ends the question,
    since the model has no other sign that the answer begins.

    Attributes:
      tokenizer: with the names `bos_token` and `eos_token`; texts are encoded with its special tokens.
      image: the placeholder token of visual tokens; a text that has it has an image there.
      separator: text after the question.
      image_id: id at the positions of visual tokens; that of `image` when None. For a vocabulary without it.

    Source: Beyer et al. 2024 (PaliGemma), section 3.2 and figure 2; transformers, models/paligemma,
    processing_paligemma.py.
    """

    tokenizer: Tokenizer
    image: str = "<image>"
    separator: str = "\n"
    image_id: int | None = None

    independent_turns = False

    @property
    def placeholders(self) -> Mapping[Kind, tuple[str, ...]]:
        """See `Prompt`."""
        return {"image": (self.image,)}

    def __call__(
        self,
        messages: Sequence[Message],
        places: Sequence[Sequence[float]],
        *,
        add_generation_prompt: bool = True,
        targets: Targets = False,
        turns: Turns = "all",
        continuation: str = "",
        grids: Sequence[Grid | None] = (),
        frame_grids: Sequence[Grid | None] = (),
        durations: Sequence[float] = (),
        **variables: object,
    ) -> list[Text | Slot]:
        """The pieces of one conversation; see `Prompt`. A continuation is encoded by itself, as an answer is.

        Raises:
          PromptError: more than one question and one answer, an image in the answer, or any variables.
          TokenizerError: the tokenizer lacks a start, end or image token.
        """
        del places, add_generation_prompt, grids, frame_grids, durations  # not written
        check_message_keys(messages)
        check_kinds(messages, ("image",))
        if variables:
            raise PromptError(f"without a chat template, {', '.join(variables)} are unused; leave them out")
        roles = [message["role"] for message in messages]
        if roles not in _CONVERSATIONS:
            raise PromptError(
                "the model takes one question, with one answer in training: expected the roles ['user'] or ['user', "
                f"'assistant'], got {roles}; make a conversation of each question"
            )
        names = self.tokenizer.names
        bos, eos = (names.get(f"{role}_token", f"<{role}>") for role in ("bos", "eos"))
        self.tokenizer.id_of(bos)
        *before, question = self._parts(messages[0])
        index = self.tokenizer.id_of(self.image) if self.image_id is None else self.image_id
        slot = Slot("image", index, group=PREFIX)
        pieces: list[Text | Slot] = []
        for text in before:
            pieces += [self._text(text, group=PREFIX), slot] if text else [slot]
        pieces.append(self._text(f"{bos}{question}{self.separator}", group=PREFIX))
        if len(messages) > 1:
            self.tokenizer.id_of(eos)
            weight = answer_weights(messages, turns)[1] if targets else 0.0
            answer, *images = self._parts(messages[1])
            if images:
                raise PromptError(
                    f"message 1: expected an answer without images, got {len(images)} ('{self.image}' in a text is an "
                    "image too); put images in the question"
                )
            pieces.append(self._text(answer + eos, learned=weight))
        return [*pieces, self._text(continuation, learned=1.0)] if continuation else pieces

    def _parts(self, message: Message) -> list[str]:
        """The texts of a message before, between and after its images."""
        content = message["content"]
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(item["text"] if item["type"] == "text" else self.image for item in items)
        return text.split(self.image)

    def _text(self, text: str, *, learned: float = 0.0, group: int = 0) -> Text:
        return Text(tuple(self.tokenizer.encode(text)), learned, group=group)
