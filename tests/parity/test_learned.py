"""Trained tokens of a conversation compared with transformers' mask of assistants' tokens and its models' loss."""

import jax
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

import vlm_jax
from vlm_jax.losses.cross_entropy import cross_entropy
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.learned import encode_learned, render_learned
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.vocabulary import TokenizersVocabulary

from ..processors.vocabularies import TEXTS
from .processors import QWEN_TAGS, pictures
from .systems import llava, qwen2_vl

# White space is after the end token, and is not learned.
SAYS = "{% generation %}{{ m['content'][0]['text'] + '</s>' }}{% endgeneration %}{{ '\n' }}"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}ASSISTANT:" + SAYS + "{% else %}USER: "
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}IMAGE{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ '\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def without_blocks(template):
    return template.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def conversations():
    """Of two answers and of one, with another number of pictures."""
    first, second, third = ({"type": "image", "image": picture} for picture in pictures(3))
    return [
        [
            {"role": "user", "content": [first, {"type": "text", "text": "What is é this? 12"}]},
            {"role": "assistant", "content": [{"type": "text", "text": " A cat 猫.\n"}]},
            {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": " Yes."}]},
        ],
        [
            {"role": "user", "content": [second, third, {"type": "text", "text": "Compare."}]},
            {"role": "assistant", "content": [{"type": "text", "text": " Both are alike."}]},
        ],
    ]


@pytest.fixture(scope="module", params=[(llava, "<image>\n"), (qwen2_vl, QWEN_TAGS)], ids=["llava", "qwen2_vl"])
def system(request, tmp_path_factory):
    """A processor and a model of transformers, and their folder, whose template has blocks."""
    made, image = request.param
    folder = tmp_path_factory.mktemp(made.__name__)
    with pytest.MonkeyPatch.context() as patch:
        # Processors with videos check their parts against classes that only torchvision brings.
        patch.setattr(transformers.ProcessorMixin, "check_argument_for_proper_class", lambda *_: None)
        processor, model, _ = made(folder)
    processor.chat_template = TEMPLATE.replace("IMAGE", image)
    processor.tokenizer.padding_side = "right"
    return processor, model, folder


@pytest.mark.parametrize("blocks", [True, False])
def test_the_mask_and_the_loss_of_a_batch(system, blocks):
    """Also where the folder's template has no blocks, and what is learned follows from what turns add."""
    processor, model, folder = system
    template = processor.chat_template
    (folder / "chat_template.jinja").write_text(template if blocks else without_blocks(template))
    ours = vlm_jax.from_pretrained(folder)
    inputs = processor.apply_chat_template(
        conversations(),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        return_tensors="np",
        processor_kwargs={"padding": True},
    )
    mask = np.asarray(inputs.pop("assistant_masks")).astype(bool)
    batch = ours.processor.batch(conversations(), targets=True)
    np.testing.assert_array_equal(batch.tokens, inputs["input_ids"])
    np.testing.assert_array_equal(batch.segment_ids, inputs["attention_mask"])
    assert 0 < mask.sum() < mask.size / 2
    np.testing.assert_array_equal(batch.loss_weights[:, :-1] > 0, mask[:, 1:])
    learned = batch.loss_weights > 0
    np.testing.assert_array_equal(batch.targets[learned], np.asarray(inputs["input_ids"])[mask])
    assert ours.tokenizer.decode(batch.targets[0][learned[0]], skip_special=False) == " A cat 猫.\n</s> Yes.</s>"

    given = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
    labels = given["input_ids"].masked_fill(~torch.from_numpy(mask), -100)
    with torch.no_grad():
        expected = float(model(**given, labels=labels).loss)

    @jax.jit
    def loss(params, batch):
        logits = ours.module.apply({"params": params}, batch)
        return cross_entropy(logits, batch.targets, batch.loss_weights)[0]

    assert float(loss(ours.params, batch)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("trimmed", [True, False])
@pytest.mark.parametrize("says", [SAYS, SAYS.replace("{% generation %}", " {% generation %}"), "Say:" + SAYS])
def test_tokens_that_lie_across_an_end(says, trimmed):
    """Pairs that were learned from such texts, so that tokens hold the space before an answer, or more line ends."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trimmed)
    backend.post_processor = tokenizers.processors.ByteLevel(trim_offsets=trimmed)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*TEXTS, "ASSISTANT:the dog\n\nUSER: the dog\nthe fox"] * 20, trainer)
    backend.add_special_tokens(["</s>"])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    template = TEMPLATE.replace(SAYS, says)
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in [
            ("user", "a\n"),
            ("assistant", "the dog"),
            ("user", "hello"),
            ("assistant", "the fox\nhello"),
        ]
    ]
    expected = theirs.apply_chat_template(
        messages, chat_template=template, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    ours = Tokenizer(TokenizersVocabulary(backend), {"eos_token": "</s>"})
    text, spans = render_learned(ChatTemplate(template), messages, ours, add_generation_prompt=False)
    assert text == theirs.apply_chat_template(messages, chat_template=template, tokenize=False)
    ids, learned = encode_learned(ours, text, spans, add_special=False)
    assert ids == expected["input_ids"] and learned == [bool(each) for each in expected["assistant_masks"]]
