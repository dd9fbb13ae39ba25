"""A vocabulary of letters and a template over it, for tests of processors."""

from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.tokenizer import Tokenizer


class Letters:
    """A vocabulary of single letters and a few tokens; `add_special` begins with 1."""

    size = 1000
    special = {1: "<s>", 2: "<pad>", 3: "<image>", 4: "<video>", 5: "<a>", 6: "</a>"}  # noqa: RUF012

    def encode(self, text, add_special):
        ids = [1] if add_special else []
        while text:
            index, name = next(
                ((i, n) for i, n in self.special.items() if text.startswith(n)), (100 + ord(text[0]) % 128, text[0])
            )
            ids.append(index)
            text = text[len(name) :]
        return ids

    def offsets(self, text, add_special):
        return None

    def decode(self, ids):
        return "".join(self.special[index] if index in self.special else chr(index - 100) for index in ids)

    def id_of(self, token):
        return {name: index for index, name in self.special.items()}.get(token)


TOKENIZER = Tokenizer(Letters(), {"bos_token": "<s>", "pad_token": "<pad>"})
TEMPLATE = ChatTemplate(
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type == 'text' %}{{ c.text }}{% else %}<{{ c.type }}>{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}!{% endif %}"
)
MARKS = {"image": "<image>", "video": "<video>"}
