"""Text-only language models."""

from vlm_jax.pretrained.processing.settings import Folder, end_of_text, pad_id
from vlm_jax.processors.chat import ChatTemplate
from vlm_jax.processors.processor import Processor
from vlm_jax.processors.prompt import TemplatePrompt
from vlm_jax.processors.templates import IM_END
from vlm_jax.processors.tokenizer import Tokenizer
from vlm_jax.processors.views import NoViews
from vlm_jax.types import Config


def processor(folder: Folder, config: Config) -> Processor:
    """A processor with a chat template and a tokenizer, without views."""
    tokenizer = Tokenizer.from_folder(folder)
    prompt = TemplatePrompt(ChatTemplate.from_folder(folder, tokenizer.names), tokenizer, joined="", begins=False)
    ends = ()
    if config["model_type"] == "internlm2" and tokenizer.vocabulary.id_of(IM_END) is not None:
        ends = (*end_of_text(tokenizer), IM_END)  # modeling_internlm2.py, chat
    return Processor(prompt, NoViews(), tokenizer, pad_id(tokenizer, config), end_tokens=ends)
