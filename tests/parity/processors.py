"""Processors of transformers, tiny, and how what they make is compared with ours."""

import json
import warnings

import numpy as np
import tokenizers
import transformers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_ocr2.image_processing_pil_deepseek_ocr2 import DeepseekOcr2ImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.gemma4.feature_extraction_gemma4 import Gemma4AudioFeatureExtractor
from transformers.models.gemma4.image_processing_pil_gemma4 import Gemma4ImageProcessorPil
from transformers.models.gemma4.video_processing_gemma4 import Gemma4VideoProcessor
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.llava_onevision.video_processing_llava_onevision import LlavaOnevisionVideoProcessor
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor

from vlm_jax.pretrained.processing import PROCESSORS

SIZES = [(40, 70), (90, 31), (56, 56), (23, 200), (131, 97)]


def pictures(count):
    draw = np.random.default_rng(0)
    small = [draw.integers(0, 255, (height // 4, width // 4, 3), np.uint8) for height, width in SIZES[:count]]
    return [Image.fromarray(s).resize(size[::-1], 3) for s, size in zip(small, SIZES, strict=False)]


def template(image, head="", video="<video>"):
    """A template in the manner of releases: pictures and text in order, roles before them."""
    return (
        head + "{% for m in messages %}{{ m['role'] | upper }}: {% if m['content'] is string %}{{ m['content'] }}"
        "{% else %}{% for c in m['content'] %}{% if c['type'] == 'image' %}" + image + "\n"
        "{% elif c['type'] == 'video' %}" + video + "\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %} "
        "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
    )


def tokenizer(*added, **names):
    """Bytes, and a BOS that is put before texts."""
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = tokenizers.Tokenizer(models.BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>", *added, *names.values()])
    backend.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", extra_special_tokens=names
    )


def conversation(count):
    """As many pictures in the first turn, and another turn after it."""
    images = [{"type": "image"} for _ in range(count)]
    return [
        {"role": "user", "content": [*images, {"type": "text", "text": "What is é this? 12"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]


def official(theirs, messages, images, return_tensors="np", **options):
    text = theirs.apply_chat_template(messages, add_generation_prompt=True)
    bos = theirs.tokenizer.bos_token
    special = {"add_special_tokens": False} if text.startswith(bos) else {}
    of_one = [images] if images else None  # as `apply_chat_template` passes those of one conversation
    return theirs(images=of_one, text=[text], return_tensors=return_tensors, **special, **options)


def official_video(theirs, messages, frames, fps, **metadata):
    """The same of a conversation with a video, whose frames are chosen already."""
    described = {"fps": fps, "total_num_frames": len(frames), "frames_indices": list(range(len(frames))), **metadata}
    with warnings.catch_warnings():  # MiniCPM-V's processor sums a tensor by NumPy
        warnings.filterwarnings("ignore", message="__array_wrap__ must accept context")
        made = official(theirs, messages, [], "pt", videos=[frames], video_metadata=[described])
    return {name: np.asarray(value) for name, value in made.items()}


def save(theirs, folder, **config):
    """A folder as released: it does not state `do_sample_frames`, which `save_pretrained` writes as false."""
    theirs.save_pretrained(folder)
    path = folder / "processor_config.json"
    if path.exists():
        parts = json.loads(path.read_text())
        parts.get("video_processor", {}).pop("do_sample_frames", None)
        path.write_text(json.dumps(parts))
    (folder / "config.json").write_text(json.dumps(config))
    return folder, config


def same_ids(ours, theirs):
    np.testing.assert_array_equal(ours.tokens, theirs["input_ids"])
    np.testing.assert_array_equal(ours.segment_ids, theirs["attention_mask"])


def same_tiles(ours, theirs):
    """Tiles, whatever the batch adds to them."""
    tiles = np.asarray(theirs["pixel_values"])
    tiles = tiles.reshape(-1, *tiles.shape[-3:]).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(ours.images[0], tiles, atol=1e-5)


VISION = {"patch_size": 7, "image_size": 28}


def llava_processor(images=CLIPImageProcessorPil, head="", **options):
    return transformers.LlavaProcessor(
        images(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, **options),
        tokenizer(image_token="<image>"),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>", head),
    )


def llava_next_processor():
    pinpoints = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
    return transformers.LlavaNextProcessor(
        LlavaNextImageProcessorPil(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
        ),
        tokenizer(image_token="<image>"),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template("<image>"),
    )


# llava-hf/llava-onevision-qwen2-7b-ov-hf, chat_template.json.
ONEVISION_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}{{ '<video>' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ '\\n' + content['text'] }}"
    "{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ '\\n' + content['text'] }}{% endgeneration %}{% endfor %}{% endif %}{{'<|im_end|>'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def llava_onevision_processor(chat_template=None):
    """Tiles of 5x5 tokens, of which a canvas keeps about those of two."""
    pinpoints = [[20, 20], [20, 40], [40, 20], [20, 60], [60, 40], [60, 60]]
    size = {"size": {"height": 20, "width": 20}}
    return transformers.LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessorPil(**size, image_grid_pinpoints=pinpoints),
        tokenizer(image_token="<image>", video_token="<video>"),
        LlavaOnevisionVideoProcessor(**size, image_mean=[0.4, 0.5, 0.6]),
        num_image_tokens=25,
        vision_feature_select_strategy="full",
        chat_template=chat_template or template("<image>"),
        vision_aspect_ratio="anyres_max_2",
    )


ABOUT_A_VIDEO = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "When?"}]}]


def frames(count):
    return [picture.resize((70, 50)) for picture in pictures(count)]


QWEN_TAGS = "<|vision_start|><|image_pad|><|vision_end|>"


QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"


QWEN = {
    "qwen2_vl": (transformers.Qwen2VLProcessor, Qwen2VLModel, {"spatial_merge_size": 2}),
    "qwen2_5_vl": (
        transformers.Qwen2_5_VLProcessor,
        Qwen2_5_VLModel,
        {"spatial_merge_size": 2, "tokens_per_second": 2, "window_size": 16},
    ),
    "qwen3_vl": (transformers.Qwen3VLProcessor, Qwen3VLModel, {"spatial_merge_size": 2}),
}


class Config:
    """The fields that a model's positions are computed from."""

    def __init__(self, vision):
        self.vision_config = type("Vision", (), vision)


def qwen(kind, folder):
    made, model, vision = QWEN[kind]
    names = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 1024, "longest_edge": 4096})
    third = kind == "qwen3_vl"  # whose limits are of all frames together
    videos = (Qwen3VLVideoProcessor if third else Qwen2VLVideoProcessor)(
        patch_size=4,
        merge_size=2,
        size={"shortest_edge": 1024, "longest_edge": 5120 if third else 2048},
        image_mean=[0.4, 0.5, 0.6],
        cap_pixels_per_frame=False,
        do_sample_frames=False,
    )
    theirs = made(images, tokenizer(*names), videos, chat_template=template(QWEN_TAGS, video=QWEN_VIDEO))
    folder, config = save(theirs, folder, model_type=kind, vision_config=vision)
    positions = object.__new__(model)
    object.__setattr__(positions, "config", Config(vision))
    return theirs, positions, PROCESSORS[kind](folder, config)


# Qwen/Qwen2.5-Omni-7B, chat_template.json.
OMNI_TEMPLATE = (
    "{% set audio_count = namespace(value=0) %}{% set image_count = namespace(value=0) %}"
    "{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif content['type'] == 'audio' or 'audio' in content or 'audio_url' in content %}"
    "{% set audio_count.value = audio_count.value + 1 %}"
    "{% if add_audio_id %}Audio {{ audio_count.value }}: {% endif %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif content['type'] == 'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
OMNI_TAGS = ("<|vision_bos|><|IMAGE|><|vision_eos|>", "<|vision_bos|><|VIDEO|><|vision_eos|>")


def qwen2_5_omni_processor(chat_template=None):
    """With patches of 14 pixels: the size of a video's frames is that of the class, whatever the folder says."""
    names = {f"{kind}_token": f"<|{kind.upper()}|>" for kind in ("image", "audio", "video")}
    names |= {f"{kind}_{edge}_token": f"<|{kind}_{edge}|>" for kind in ("vision", "audio") for edge in ("bos", "eos")}
    return transformers.Qwen2_5OmniProcessor(
        Qwen2VLImageProcessorPil(merge_size=2, size={"shortest_edge": 4 * 784, "longest_edge": 12 * 784}),
        Qwen2VLVideoProcessor(merge_size=2, image_mean=[0.4, 0.5, 0.6], cap_pixels_per_frame=False),
        transformers.WhisperFeatureExtractor(feature_size=8),
        tokenizer("<|im_start|>", "<|im_end|>", **names),
        chat_template=chat_template or template(OMNI_TAGS[0], video=OMNI_TAGS[1]),
    )


def patches_of(packed):
    """In the processor's order, without padding."""
    patches = np.asarray(packed.patches[0])
    patches = patches if packed.order is None else patches[packed.order[0]]
    classes = 0 if packed.class_tokens is None else packed.class_tokens[0].sum()
    return patches[: int((packed.segment_ids[0] > 0).sum() - classes)]


def deepseek_vl_processor(size=32):
    return transformers.DeepseekVLProcessor(
        DeepseekVLImageProcessorPil(size={"height": size, "width": size}, min_size=4),
        tokenizer(image_token="<image_placeholder>"),
        chat_template=template("<image_placeholder>"),
        num_image_tokens=9,
    )


def deepseek_vl_hybrid_processor(low=32, high=64):
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    sizes = {"size": {"height": low, "width": low}, "high_res_size": {"height": high, "width": high}}
    return transformers.DeepseekVLHybridProcessor(
        DeepseekVLHybridImageProcessorPil(**sizes, **half, min_size=4),
        tokenizer(image_token="<image_placeholder>"),
        chat_template=template("<image_placeholder>"),
        num_image_tokens=9,
    )


def deepseek_ocr2_processor(templated=True):
    """A whole of 61x61 and tiles of 45x45 patches, the least that give the released numbers of queries."""
    return transformers.DeepseekOcr2Processor(
        DeepseekOcr2ImageProcessorPil(size={"height": 61, "width": 61}, tile_size=45),
        tokenizer(image_token="<image>"),
        chat_template=template("<image>") if templated else None,
        patch_size=1,
    )


def same_wholes_and_tiles(ours, theirs):
    """Views of the whole, and the tiles of those that have any."""
    images = ours.images
    if "pixel_values_local" in theirs:
        parts = {"pixel_values": images.wholes[0], "pixel_values_local": images.tiles[0]}
    else:
        parts = {"pixel_values": images[0]}
    for name, found in parts.items():
        np.testing.assert_allclose(found, np.asarray(theirs[name]).transpose(0, 2, 3, 1), atol=1e-5)


def same_two_sizes(ours, theirs, kind):
    """The towers normalise these, each with its own statistics."""
    for pixels, name, mean, std in (
        (ours.images.high[0], "high_res_pixel_values", kind.high_res_image_mean, kind.high_res_image_std),
        (ours.images.low[0], "pixel_values", kind.image_mean, kind.image_std),
    ):
        wanted = np.asarray(theirs[name]).transpose(0, 2, 3, 1)
        np.testing.assert_allclose((pixels - np.array(mean)) / np.array(std), wanted, atol=1e-5)


def internvl_processor():
    names = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    return transformers.InternVLProcessor(
        GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=6),
        tokenizer(**names, video_token="<video>"),
        InternVLVideoProcessor(size={"height": 28, "width": 28}),
        image_seq_length=4,
        chat_template=template("<IMG_CONTEXT>"),
    )


INDICATORS = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]


def ovis2_processor(tiles=True):
    return transformers.Ovis2Processor(
        Ovis2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=tiles, max_patches=9),
        tokenizer("<image>", "<IMG_ATOM>", *INDICATORS),
        chat_template=template("<image>"),
        image_seq_length=4,
    )


SPLIT = {"size": {"longest_edge": 84}, "max_image_size": {"longest_edge": 28}}


def split_tokens(*names):
    """Tokens of Idefics3, some of whose numbered tags are text of several tokens."""
    tags = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2, 3)]
    return ["<image>", "<fake_token_around_image>", "<end_of_utterance>", *tags, *names]


def idefics3_processor(**options):
    """Without a token `<global-img>`, as in the release."""
    return transformers.Idefics3Processor(
        Idefics3ImageProcessorPil(**SPLIT, **options),
        tokenizer(*split_tokens()),
        image_seq_len=4,
        chat_template=template("<image>"),
    )


def smolvlm_processor(**options):
    # The package num2words, which the class demands, has these words for the frames of these tests.
    processing_smolvlm.num2words = {1: "one", 3: "three", 4: "four"}.__getitem__
    return transformers.SmolVLMProcessor(
        SmolVLMImageProcessorPil(**SPLIT, **options),
        tokenizer(*split_tokens("<global-img>", "<video>", "<|im_start|>")),
        SmolVLMVideoProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28}),
        image_seq_len=4,
        chat_template=template("<image>"),
    )


GEMMA_TEMPLATE = (
    "{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}"
    "{%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}{%- else -%}"
    "{%- set first_user_prefix = messages[0]['content'][0]['text'] + '\n\n' -%}{%- endif -%}"
    "{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set first_user_prefix = '' -%}"
    "{%- set loop_messages = messages -%}{%- endif -%}{%- for message in loop_messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}"
    "{%- if (message['role'] == 'assistant') -%}{%- set role = 'model' -%}{%- else -%}"
    "{%- set role = message['role'] -%}{%- endif -%}"
    "{{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else '') }}"
    "{%- if message['content'] is string -%}{{ message['content'] | trim }}"
    "{%- elif message['content'] is iterable -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
    "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}{%- endfor -%}"
    "{%- else -%}{{ raise_exception('Invalid content type') }}{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)


def gemma3_processor(side=24, tokens=4, **options):
    """With the template of the release."""
    names = {
        "boi_token": "<start_of_image>",
        "image_token": "<image_soft_token>",
        "eoi_token": "<end_of_image>",
        "sot_token": "<start_of_turn>",
        "eot_token": "<end_of_turn>",
    }
    return transformers.Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": side, "width": side}, **options),
        tokenizer(**names),
        chat_template=GEMMA_TEMPLATE,
        image_seq_length=tokens,
    )


def paligemma_processor(side=24, tokens=16):
    """Its tokenizer adds no BOS, and has the tokens of places and of segments, which are no special ones."""
    made = tokenizer(image_token="<image>")
    made.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A:0", "$A:0 $B:1", [])
    images = SiglipImageProcessorPil(size={"height": side, "width": side})
    images.image_seq_length = tokens
    return transformers.PaliGemmaProcessor(images, made)


def gemma4_processor(images=140, videos=70):
    """With the names of the release's special tokens; of images and of frames that many tokens at most."""
    names = {
        "image_token": "<|image|>",
        "boi_token": "<|image>",
        "eoi_token": "<image|>",
        "audio_token": "<|audio|>",
        "boa_token": "<|audio>",
        "eoa_token": "<audio|>",
    }
    return transformers.Gemma4Processor(
        Gemma4AudioFeatureExtractor(),
        Gemma4ImageProcessorPil(patch_size=2, max_soft_tokens=images),
        tokenizer("<|video|>", **names),
        Gemma4VideoProcessor(patch_size=2, max_soft_tokens=videos, do_sample_frames=False),
        chat_template=template("<|image|>", video="<|video|>"),
    )


def filled_patches(theirs, kind, side):
    """Gemma 4's patches of images or of a video's frames, in blocks and scaled as its tower does, without padding."""
    pixels = theirs[f"pixel_values{'_videos' if kind == 'video' else ''}"]
    found = []
    for patches, places in zip(np.asarray(pixels), np.asarray(theirs[f"{kind}_position_ids"]), strict=True):
        real = (places >= 0).all(-1)
        columns, rows = places[real].max(0) + 1
        blocks = patches[real].reshape(rows // side, side, columns // side, side, -1).swapaxes(1, 2)
        found.append(blocks.reshape(rows * columns, -1))
    return 2 * np.concatenate(found) - 1


# openbmb/MiniCPM-V-4.6, tokenizer_config.json.
MINICPM_NAMES = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "image_start_token": "<image>",
    "image_end_token": "</image>",
    "slice_start_token": "<slice>",
    "slice_end_token": "</slice>",
    "image_id_start_token": "<image_id>",
    "image_id_end_token": "</image_id>",
}


def minicpm_v_processor(mode="16x", images=None, videos=None, chat_template=None, **names):
    """Views of 2x2 tokens of 8 pixels, of frames of 3x3; in the mode `4x` of four times as many."""
    same = {"patch_size": 2, "downsample_mode": mode}
    frames = {"scale_resolution": 24, "max_slice_nums": 2, "image_mean": [0.4, 0.5, 0.6], "do_sample_frames": False}
    return transformers.MiniCPMV4_6Processor(
        MiniCPMV4_6ImageProcessorPil(**same, **{"scale_resolution": 16, "max_slice_nums": 4, **(images or {})}),
        MiniCPMV4_6VideoProcessor(**same, **{**frames, **(videos or {})}),
        tokenizer(**MINICPM_NAMES, **names),
        chat_template=chat_template or template("<|image_pad|>", video="<|video_pad|>"),
    )


def navit_patches(theirs, kind, side):
    """MiniCPM-V's patches of images or of frames, in blocks of side x side."""
    ending = "_videos" if kind == "video" else ""
    pixels, found, start = np.asarray(theirs[f"pixel_values{ending}"])[0], [], 0
    for rows, columns in np.asarray(theirs[f"target_sizes{ending}"]):
        channels, size, _ = pixels.shape
        own = pixels[..., start : start + rows * columns * size]
        patches = own.reshape(channels, size, rows, columns, size).transpose(2, 3, 0, 1, 4)
        blocks = patches.reshape(rows // side, side, columns // side, side, -1).swapaxes(1, 2)
        found.append(blocks.reshape(rows * columns, -1))
        start += rows * columns * size
    return np.concatenate(found)
