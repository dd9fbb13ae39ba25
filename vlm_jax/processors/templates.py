"""Chat templates of releases that define them in code: Jinja, for messages whose content is one text.

Each ends an answer as in the release, and supports a system message where the release does.
"""

# LLaVA, conversation.py, vicuna_v1; MobileVLM, conversation.py, v1.
VICUNA = (
    "{% if messages[0].role == 'system' %}{{ messages[0].content }} {% else %}A chat between a curious user and an "
    "artificial intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's "
    "questions. {% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}USER: {{ message.content }} "
    "{% elif message.role == 'assistant' %}ASSISTANT: {{ message.content }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

# LLaVA, conversation.py, llava_llama_2; the start token of the first turn is that of the tokenizer.
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set turns = messages[1:] %}"
    "{% else %}{% set system = 'You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural language.' %}"
    "{% set turns = messages %}{% endif %}{% for message in turns %}{% if message.role == 'user' %}"
    "{{ ('' if loop.first else '<s>') + '[INST] ' }}"
    "{{ '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first else '' }}"
    "{{ message.content + ' [/INST]' }}{% else %}{{ ' ' + message.content + ' </s>' }}{% endif %}{% endfor %}"
)

# LLaVA, conversation.py, plain, of pretraining.
PLAIN = "{% for message in messages %}{{ message.content + ('\n' if message.role == 'assistant' else '') }}{% endfor %}"

# DeepSeek-VL, utils/conversation.py, deepseek.
DEEPSEEK = (
    "{% if messages[0].role != 'system' %}You are a helpful language and vision assistant. You are able to understand "
    "the visual content that the user provides, and assist the user with a variety of tasks using natural language."
    "{{ '\n\n' }}{% elif messages[0].content %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{% for message in messages %}{% if message.role == 'user' %}User: {{ message.content | trim + '\n\n' }}"
    "{% elif message.role == 'assistant' %}Assistant: {{ message.content | trim + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


def chatml(system: str | None, end: str = "<|im_end|>\n", head: str = "<|im_start|>{role}\n") -> str:
    """ChatML.

    Args:
      system: the default system message; None for none.
      end: text after every message.
      head: text before it, with `{role}`.
    """
    opening = "" if system is None else f"{head.format(role='system')}{system}{end}"
    before, after = head.split("{role}")
    return (
        f"{{% if messages[0].role != 'system' %}}{{{{ {opening!r} }}}}{{% endif %}}"
        "{% for message in messages %}"
        f"{{{{ {before!r} + message.role + {after!r} + message.content + {end!r} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {head.format(role='assistant')!r} }}}}{{% endif %}}"
    )


# OpenGVLab/InternVL, conversation.py, by the key `template` of the config; chat() ends an answer at `sep`, IM_END.
_INTERNVL = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_INTERNVL2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
IM_END = "<|im_end|>"
PHI3_END = "<|end|>"
INTERNVL = {
    "Hermes-2": chatml(_INTERNVL, IM_END),
    "internlm2-chat": chatml(_INTERNVL, IM_END),
    "internvl2_5": chatml(_INTERNVL2_5),
    "phi3-chat": chatml(_INTERNVL, PHI3_END, "<|{role}|>\n"),
}


def _after_images(before: str, after: str, first: str | None = None, system: str | None = None) -> str:
    """Turns of Prismatic, whose images all come first; an answer is preceded by a space.

    Args:
      before, after: text around a question.
      first: text before the first question, with `{system}`; as others when None.
      system: the default system message, where there is one.
    """
    told = "these turns have no system message; put its text in the first question"
    head = repr(before)
    opening = (
        f"{{% if messages[0].role == 'system' %}}{{{{ raise_exception({told!r}) }}}}{{% endif %}}"
        "{% for message in messages %}"
    )
    if first is not None:
        start, rest = first.split("{system}")
        opening = (
            f"{{% set system = {system!r} %}}{{% set turns = messages %}}{{% if messages[0].role == 'system' %}}"
            "{% set system = messages[0].content | trim %}{% set turns = messages[1:] %}{% endif %}"
        )
        opening += "{% for message in turns %}"
        head = f"({start!r} + system + {rest!r} if loop.first else {before!r})"
    return (
        "{% for message in messages %}{% for part in message.content.split('<image>')[1:] %}<image>{% endfor %}"
        f"{{% endfor %}}{opening}{{% set text = message.content.replace('<image>', '') | trim %}}"
        f"{{% if message.role == 'user' %}}{{{{ {head} + text + {after!r} }}}}"
        "{% elif message.role == 'assistant' %}{% generation %}{{ ' ' + (text or ' ') }}{% endgeneration %}</s>"
        "{% endif %}{% endfor %}"
    )


# prismatic/models/backbones/llm/prompting. Beginning and end of an `llm_backbone_id` -> the turns of that model; the
# tag that opens the system message of LLaMA-2 lacks a letter there. Turns are encoded together, as when the release
# generates; in training it encodes each by itself, which is the same for tokenizers that put a space after `</s>`.
PRISMATIC: dict[tuple[str, str], str] = {
    ("llama2", "-pure"): _after_images("In: ", "\nOut:"),
    ("llama2", "-chat"): _after_images(
        "<s>[INST] ",
        " [/INST]",
        "[INST] <<SYS>\n{system}\n<</SYS>>\n\n",
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language.",
    ),
    ("vicuna", ""): _after_images(
        "USER: ",
        " ASSISTANT:",
        "{system} USER: ",
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions.",
    ),
    ("mistral", "-pure"): _after_images("In: ", "\nOut:"),
    ("mistral", "-instruct"): _after_images("[INST] ", " [/INST]"),
}
# prismatic/extern/hf/modeling_prismatic.py, OpenVLAForActionPrediction.predict_action: what follows those turns before
# an action, a space, which is a token of its own at the end of a text.
BEFORE_ACTION = "{% if add_generation_prompt and messages[-1].role == 'user' %}{{ ' ' }}{% endif %}"

# LLaVA, conversation.py, mpt.
MPT = chatml(
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and honest answers.",
    IM_END,
)

# AIDC-AI/Ovis2, configuration_ovis.py, QwenConversationFormatter.
OVIS2 = chatml("You are a helpful assistant.")

# AIDC-AI/Ovis, conversation_formatter.py, Qwen3ConversationFormatter: an answer without a thought is learned after an
# empty one.
OVIS2_5_TRAINING = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{% if message.loss != false and ('<think>' not in message.content or '</think>' not in message.content) %}"
    "{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% generation %}{{ message.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# AIDC-AI/Ovis2.5, tokenizer_config.json: answers are written without their thoughts. Tags in a text, which the release
# leaves out, stand for pictures here.
OVIS2_5 = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{% if message.role == 'assistant' %}"
    "{{ message.content.split('</think>')[-1].lstrip('\n') }}{% else %}{{ message.content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
