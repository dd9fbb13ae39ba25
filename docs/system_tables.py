"""The page of the systems that load: families with what compares them, and the included released configs."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from vlm_jax.connectors import CONNECTORS
from vlm_jax.decoders import DECODERS
from vlm_jax.encoders import COMPOSITE_ENCODERS, ENCODERS, PACKED_ENCODERS
from vlm_jax.encoders.vit import ViT
from vlm_jax.models.classifier import Classifier
from vlm_jax.models.two_tower import TwoTower
from vlm_jax.models.vlm import VLM
from vlm_jax.pretrained import FAMILIES
from vlm_jax.pretrained.family import marker
from vlm_jax.pretrained.known import describe_known, known_config, known_configs


class Row(NamedTuple):
    """One system of the first table.

    Attributes:
      name: of the system.
      kinds: its model types, keys of `FAMILIES`.
      loaded: which parts.
      golden: what is compared with arrays of the official code.
      live: what is compared with a model of `transformers`.
    """

    name: str
    kinds: tuple[str, ...]
    loaded: str
    golden: str = ""
    live: str = ""


ROWS = (
    Row(
        "LLaVA 1.5, 1.6 (own names)",
        ("llava_llama",),
        "CLIP tower, S², anyres, projector, Llama or Qwen2",
        "pixels, tiles, features, batches, logits, loss, greedy ids",
    ),
    Row(
        "LLaVA, LLaVA-NeXT (`transformers`)",
        ("llava", "llava_next"),
        "the same, with Mistral",
        live="conversation to answer, and back",
    ),
    Row(
        "LLaVA-OneVision (`transformers`)",
        ("llava_onevision",),
        "SigLIP tiles of one image, their grid resized to a maximum; one tile of each of several; pooled frames; Qwen2",
        live="conversation (a video too) to answer, and back",
    ),
    Row(
        "LLaVA-OneVision 1.5",
        ("llavaonevision1_5", "rice_vit"),
        "native resolution with a class token per image (RICE-ViT), merger, Qwen3",
        "features, logits, loss, greedy ids; of one image at a time, as the release's code slices several wrongly",
    ),
    Row(
        "MobileVLM, MobileVLM V2",
        ("mobilevlm",),
        "CLIP tower, LDP, MobileLLaMA",
        "features, batches, logits, loss, greedy ids",
    ),
    Row(
        "Qwen-VL, Qwen-VL-Chat; Qwen",
        ("qwen",),
        "vision tower, resampler, Qwen",
        "pixels, ids, boxes, features, logits, loss, greedy ids",
    ),
    Row(
        "Qwen2-VL, Qwen2.5-VL",
        ("qwen2_vl", "qwen2_vl_vision", "qwen2_5_vl", "qwen2_5_vl_vision"),
        "native resolution, merger, M-RoPE, Qwen2",
        live="conversation (a video too) to answer, and back",
    ),
    Row(
        "Qwen2.5-Omni",
        ("qwen2_5_omni", "qwen2_5_omni_thinker", "qwen2_5_omni_vision_encoder"),
        "the thinker without its audio encoder: Qwen2.5-VL's parts, positions by seconds of a video",
        live="conversation (a video too) to answer, and back",
    ),
    Row(
        "Qwen3-VL, dense and with experts",
        ("qwen3_vl", "qwen3_vl_vision", "qwen3_vl_moe", "qwen3_vl_moe_vision"),
        "native resolution, mergers of several layers (DeepStack), interleaved M-RoPE, times of videos, Qwen3",
        live="conversation (a video too) to answer, and back",
    ),
    Row(
        "Qwen3.5, dense and with experts",
        ("qwen3_5", "qwen3_5_vision", "qwen3_5_moe", "qwen3_5_moe_vision"),
        "native resolution, merger, partial interleaved M-RoPE, times of videos, Gated DeltaNet and gated attention",
        live="conversation (a video too) to answer, and back",
    ),
    Row(
        "DeepSeek-VL (own names, `transformers`)",
        ("multi_modality", "deepseek_vl", "deepseek_vl_hybrid"),
        "SigLIP or SAM + SigLIP, projector, Llama",
        "features, logits, greedy ids",
        "conversation to answer, and back",
    ),
    Row(
        "DeepSeek-OCR",
        ("deepseek_ocr",),
        "SAM, 16x convolution and CLIP behind it, tiles with a view of the whole, mixture of experts",
        "features, pixels, ids, layouts, token counts, logits, loss, greedy ids, n-grams",
    ),
    Row(
        "DeepSeek-OCR 2 (own format, `transformers`)",
        ("DeepseekOCR2", "deepseek_ocr2"),
        "SAM, 16x convolution and causal learned queries behind it, tiles with a view of the whole, mixture of experts",
        live="conversation to answer, and back",
    ),
    Row(
        "DeepSeek-VL2",
        ("deepseek_vl_v2",),
        "SigLIP tiles, projector, latent attention, mixture of experts",
        "pixels, ids, layouts, router choices, caches, logits, loss, greedy ids",
        "only DeepSeek-V2",
    ),
    Row(
        "InternVL (own names)",
        ("internvl_chat", "intern_vit_6b"),
        "InternViT, pixel shuffle, Llama, InternLM2, Qwen2, Qwen3 with or without experts",
        "tiles, features, logits, loss, greedy ids",
    ),
    Row(
        "InternVL (`transformers`)",
        ("internvl",),
        "the same, with Qwen2, Qwen3 with experts",
        live="conversation (a video too) to answer, and back",
    ),
    Row(
        "Gemma 3",
        ("gemma3",),
        "SigLIP, mean pooling, norm and projection, Gemma with local and global layers, both-ways attention in images",
        live="conversation to answer, and back",
    ),
    Row(
        "PaliGemma, PaliGemma 2 (`transformers`, big_vision `.npz`)",
        ("paligemma", "big_vision.proj.paligemma.paligemma"),
        "SigLIP, one linear layer, Gemma or Gemma 2 with softcaps; both-ways attention in images and question",
        live="question to answer, loss, gradients, and back",
    ),
    Row(
        "Gemma 4 (31B, 26B-A4B, E4B, E2B)",
        ("gemma4", "gemma4_vision"),
        "native resolution, means of 3x3 patches, Gemma with local and global layers of different heads, with or "
        "without experts, both-ways attention in images in local layers; E2B, E4B: an embedding for every layer, "
        "shared keys and values; no audio",
        live="conversation (a video too) to answer, and back",
    ),
    Row(
        "MiniCPM-V 4.6",
        ("minicpmv4_6", "minicpmv4_6_vision"),
        "native resolution with slices, a tower that merges patches (4x and 16x), merger, Qwen3.5",
        live="conversation (a video too) to answer, and back",
    ),
    Row(
        "Idefics3, SmolVLM, SmolVLM2",
        ("idefics3", "idefics3_vision", "smolvlm", "smolvlm_vision"),
        "SigLIP tiles named in the text, pixel shuffle, Llama; SmolVLM: videos as frames with their times",
        live="conversation (a video of SmolVLM too) to answer, and back",
    ),
    Row(
        "Ovis 2 (own names, `transformers`)",
        ("ovis", "ovis2"),
        "AIMv2, visual vocabulary, Qwen2",
        "pixels, ids, features, logits, loss, greedy ids",
        "conversation to answer, and back",
    ),
    Row(
        "Ovis 2.5",
        ("ovis2_5",),
        "native resolution, visual vocabulary, Qwen3",
        "pixels, ids, labels, a video, features, logits, loss, gradients, greedy ids",
    ),
    Row(
        "Prismatic, OpenVLA",
        ("prismatic", "openvla"),
        "DINOv2 and SigLIP side by side, or one tower, projector, Llama or Mistral",
        live="its parts: conversation to answer, and back",
    ),
    Row(
        "Llama, Mistral, Qwen2, Qwen3, Qwen3.5, Gemma, Gemma 2, Gemma 3, Gemma 4, InternLM2, DeepSeek-V2",
        (
            *("llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen2_vl_text", "qwen3", "qwen3_moe", "qwen3_5_text"),
            *("qwen3_vl_text", "qwen3_vl_moe_text", "internlm2", "deepseek_v2", "LLaVAOneVision1_5_text"),
            *("gemma", "gemma2", "gemma3_text", "gemma4_text", "qwen2_5_omni_text", "qwen3_5_moe_text"),
        ),
        "only the language model",
        "InternLM2 inside InternVL",
        "logits, greedy ids, and back",
    ),
    Row(
        "BLIP-2, InstructBLIP, Idefics2",
        (
            *(f"{name}{part}" for name in ("blip_2", "instructblip") for part in ("_qformer", "_vision_model")),
            *("blip-2", "instructblip", "idefics2", "idefics2_vision"),
        ),
        "only tower and Q-Former or perceiver",
        live="visual tokens, and back",
    ),
    Row(
        "ViT (vision_transformer, big_vision `.npz`, `transformers`)",
        ("vit_jax", "big_vision.vit", "vit"),
        "class token, gap, map and none heads, hybrid ResNet stem",
        "features, logits; images by TensorFlow's resizing",
        "images to classes, and back",
    ),
    Row(
        "DINOv2, with and without registers (`transformers`)",
        ("dinov2", "dinov2_with_registers"),
        "tower, or with classes",
        live="images to features and classes, and back",
    ),
    Row("DINOv3 (`transformers`)", ("dinov3_vit",), "tower", live="images to features, attention, and back"),
    Row(
        "CLIP (OpenAI names, open_clip, `transformers`)",
        ("clip", "clip_text_model", "clip_vision_model", "open_clip"),
        "ViT and ModifiedResNet, text tower",
        "features, logits, losses, gradients",
        "images and texts to logits, zero-shot classes, and back",
    ),
    Row(
        "SigLIP, SigLIP 2 with NaFlex (`transformers`, big_vision)",
        (
            *(f"siglip{number}{part}" for number in ("", "2") for part in ("", "_text_model", "_vision_model")),
            "big_vision.proj.image_text.two_towers",
            "big_vision.proj.image_text.text_transformer",
        ),
        "both towers",
        "features, logits, losses, gradients; images by TensorFlow's resizing",
        "images and texts to logits, zero-shot classes, and back",
    ),
    Row("SAM", ("sam", "sam_vision_model"), "image encoder", live="features, and back"),
)
HEAD = """# Systems

A released folder is recognised by the model type of its config. Both tables are made from the package; the build
fails if a model type that the package loads is missing here.

## Families
"""
MEANING = """
Golden arrays are outputs of the official implementations (`tests/golden`). Live means a randomly initialised model of
`transformers`, saved and loaded here (`tests/parity`): from a conversation to the answer, compared with its own
processor, the ids are equal, pixels within 1e-5, logits within 1e-4 of the largest, and 32 greedy ids equal, for text,
one image, two, and a video; "and back" means that `transformers` reads the output of `save_pretrained` and gives the
same results. Videos are compared with its video processors (Qwen2-VL, Qwen2.5-VL, Qwen2.5-Omni, Qwen3-VL, Qwen3.5,
Gemma 4, InternVL, SmolVLM, LLaVA-OneVision), as frames and, except for Qwen3.5, Gemma 4 and LLaVA-OneVision, as files
that PyAV decodes for both; frames are resized with torch's rounding, which differs from Pillow's.

A `.npz` of big_vision has no tokenizer: copy that of its texts next to it as `tokenizer.model`, the SentencePiece model
c4_en or mc4 for SigLIP, Gemma's for SigLIP 2. It is identified by its vocabulary; texts raise an error with any other.
PaliGemma's is `paligemma_tokenizer.model`, under this name.

## Included released configs

These need no folder to be [planned](../how-to/slice.md). *Visual tokens* are those of one square view, or of one tile,
as released.
"""


def page() -> str:
    """The whole page as Markdown.

    Raises:
      ValueError: a model type of `FAMILIES` is in no row, or a row has one that is not.
    """
    listed = [kind for row in ROWS for kind in row.kinds]
    if sorted(listed) != sorted(FAMILIES.own):
        wrong = sorted(set(listed) ^ set(FAMILIES.own)) or sorted(kind for kind in listed if listed.count(kind) > 1)
        raise ValueError(f"docs/system_tables.py: ROWS must have every model type of FAMILIES once; check {wrong}")
    return "\n".join([HEAD, *_families(), MEANING, *_released(), ""])


def _families() -> Iterator[str]:
    yield "| system | model types | what is loaded | golden arrays of the official code | live `transformers` |"
    yield "| --- | --- | --- | --- | --- |"
    for row in ROWS:
        kinds = ", ".join(f"`{kind}`" for kind in row.kinds)
        yield f"| {row.name} | {kinds} | {row.loaded} | {row.golden} | {row.live} |"


def _released() -> Iterator[str]:
    yield "| release | model type | encoder | connector | decoder | visual tokens |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name in known_configs():
        cells = (f"`{name}`", f"`{marker(known_config(name))}`", *_parts(describe_known(name).module))
        yield f"| {' | '.join(cells)} |"


def _parts(model: Any) -> tuple[str, str, str, str]:
    """Kinds of a module's parts, and the visual tokens of a square view."""
    if isinstance(model, TwoTower):
        return _kind(model.image), "", _kind(model.text), ""
    if isinstance(model, Classifier):
        return _kind(model.encoder), "", "classes", ""
    if not isinstance(model, VLM):
        return _kind(model), "", "", ""
    return _kind(model.encoder), _kind(model.connector), _kind(model.decoder), _tokens(model)


def _tokens(model: VLM) -> str:
    encoder, connector = model.encoder, model.connector
    if encoder is None or connector is None:
        return ""
    if type(encoder) in PACKED_ENCODERS.values():
        return "by the size of the image"
    if isinstance(encoder, ViT) and encoder.image_size is not None:
        return str(connector.num_tokens(encoder.grid(*encoder.image_size)))
    return ""


def _kind(module: Any) -> str:
    """The name of a module in its table, with its depth and width."""
    if module is None:
        return ""
    tables = (ENCODERS, PACKED_ENCODERS, COMPOSITE_ENCODERS, CONNECTORS, DECODERS)
    names = [name for table in tables for name, cls in table.items() if cls is type(module)]
    name = names[0] if names else type(module).__name__
    depth, width = getattr(module, "depth", None), getattr(module, "width", None)
    return f"`{name}`" + (f", {depth} × {width}" if isinstance(depth, int) and isinstance(width, int) else "")
