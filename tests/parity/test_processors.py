"""Processors of transformers compared with ours: one saved folder, the same conversation, the same images."""

import json

import av
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from tokenizers import decoders, models, pre_tokenizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deepseek_vl.image_processing_pil_deepseek_vl import DeepseekVLImageProcessorPil
from transformers.models.deepseek_vl_hybrid.image_processing_pil_deepseek_vl_hybrid import (
    DeepseekVLHybridImageProcessorPil,
)
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.ovis2.image_processing_pil_ovis2 import Ovis2ImageProcessorPil
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from vlm_jax.pretrained.processing import deepseek_hf, internvl_hf, llava_hf, ovis2_hf, qwen_hf
from vlm_jax.processors.video import SegmentSampler

SIZES = [(40, 70), (90, 31), (56, 56), (23, 200), (131, 97)]


def pictures(count):
    draw = np.random.default_rng(0)
    small = [draw.integers(0, 255, (height // 4, width // 4, 3), np.uint8) for height, width in SIZES[:count]]
    return [Image.fromarray(s).resize(size[::-1], 3) for s, size in zip(small, SIZES, strict=False)]


def template(image, head="", video="<video>"):
    """A template in the manner of releases: images and text in order, roles before them."""
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
    """As many images in the first turn, and another turn after it."""
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
    return theirs(images=images or None, text=[text], return_tensors=return_tensors, **special, **options)


def official_video(theirs, messages, frames, fps, **metadata):
    """The same of a conversation with a video, whose frames are chosen already."""
    described = {"fps": fps, "total_num_frames": len(frames), "frames_indices": list(range(len(frames))), **metadata}
    made = official(theirs, messages, [], "pt", videos=[frames], video_metadata=[described])
    return {name: np.asarray(value) for name, value in made.items()}


def save(theirs, folder, **config):
    theirs.save_pretrained(folder)
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


def check_rows(ours, token_id, num_rows):
    """Every place of an image is filled, each row at most once and in order of the places."""
    places = np.asarray(ours.tokens) == token_id
    np.testing.assert_array_equal(np.asarray(ours.visual_index) >= 0, places)
    assert ours.visual_index.max() < num_rows


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


@pytest.mark.parametrize("head", ["", "<s>"])
@pytest.mark.parametrize("images", [CLIPImageProcessorPil, LlavaImageProcessorPil])
def test_llava(tmp_path, images, head):
    theirs = llava_processor(images, head, **({"do_pad": True} if images is LlavaImageProcessorPil else {}))
    folder, config = save(theirs, tmp_path, model_type="llava", vision_config=VISION)
    processor = llava_hf.processor(folder, config)
    for count in (0, 1, 3):
        messages, images_ = conversation(count), pictures(count)
        ours, expected = processor(messages, images_), official(theirs, messages, images_)
        same_ids(ours, expected)
        if count:
            same_tiles(ours, expected)
            check_rows(ours, theirs.image_token_id, 16 * count)
            index = ours.visual_index[ours.visual_index >= 0]
            np.testing.assert_array_equal(index, np.arange(16 * count))
    assert processor.count_visual_tokens(SIZES) == [16] * len(SIZES)


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


def test_llava_next(tmp_path):
    theirs = llava_next_processor()
    folder, config = save(theirs, tmp_path, model_type="llava_next", vision_config=VISION)
    processor = llava_hf.processor_next(folder, config)
    for number, picture in enumerate(pictures(len(SIZES))):
        ours, expected = processor(conversation(1), [picture]), official(theirs, conversation(1), [picture])
        same_ids(ours, expected)
        same_tiles(ours, expected)
        assert processor.count_visual_tokens([SIZES[number]]) == [int((ours.visual_index >= 0).sum())]
    messages = conversation(2)
    ours, expected = processor(messages, pictures(2)), official(theirs, messages, pictures(2))
    same_ids(ours, expected)
    tiles = expected["pixel_values"].transpose(0, 1, 3, 4, 2).reshape(-1, 28, 28, 3)
    np.testing.assert_allclose(ours.images[0], tiles[tiles.any((1, 2, 3))], atol=1e-5)  # without padding


ABOUT_A_VIDEO = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "When?"}]}]


def frames(count):
    return [picture.resize((70, 50)) for picture in pictures(count)]


def video_file(path, pictures, fps):
    """A file that loses something of its frames."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height = pictures[0].size
        for picture in pictures:
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())
    return path


def decoded(path):
    with av.open(str(path)) as container:
        return [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]


QWEN_TAGS = "<|vision_start|><|image_pad|><|vision_end|>"
QWEN_VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
QWEN = {
    "qwen2_vl": (transformers.Qwen2VLProcessor, Qwen2VLModel, {"spatial_merge_size": 2}),
    "qwen2_5_vl": (
        transformers.Qwen2_5_VLProcessor,
        Qwen2_5_VLModel,
        {"spatial_merge_size": 2, "tokens_per_second": 2, "window_size": 16},
    ),
}


class Config:
    """The fields that a model's positions are computed from."""

    def __init__(self, vision):
        self.vision_config = type("Vision", (), vision)


def qwen(kind, folder):
    made, model, vision = QWEN[kind]
    names = ["<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>"]
    images = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, size={"shortest_edge": 1024, "longest_edge": 4096})
    videos = Qwen2VLVideoProcessor(
        patch_size=4,
        merge_size=2,
        size={"shortest_edge": 1024, "longest_edge": 2048},
        image_mean=[0.4, 0.5, 0.6],
        cap_pixels_per_frame=False,
    )
    theirs = made(images, tokenizer(*names), videos, chat_template=template(QWEN_TAGS, video=QWEN_VIDEO))
    folder, config = save(theirs, folder, model_type=kind, vision_config=vision)
    positions = object.__new__(model)
    object.__setattr__(positions, "config", Config(vision))
    return theirs, positions, qwen_hf.processor(folder, config)


def patches_of(packed):
    """In the processor's order, without padding."""
    patches = np.asarray(packed.patches[0])
    patches = patches if packed.order is None else patches[packed.order[0]]
    return patches[: int((packed.segment_ids[0] > 0).sum())]


def same_patches(ours, theirs):
    np.testing.assert_allclose(patches_of(ours.images), theirs["pixel_values"], atol=1e-5)


@pytest.mark.parametrize("kind", QWEN)
def test_qwen_images(tmp_path, kind):
    theirs, model, processor = qwen(kind, tmp_path)
    for images in (pictures(1), pictures(2), pictures(5)[3:]):
        messages = conversation(len(images))
        ours, expected = processor(messages, images), official(theirs, messages, images)
        same_ids(ours, expected)
        same_patches(ours, expected)
        sizes = [(image.height, image.width) for image in images]
        grids = torch.from_numpy(expected["image_grid_thw"])
        assert processor.count_visual_tokens(sizes) == (grids.prod(-1) // 4).tolist()
        ids = torch.from_numpy(expected["input_ids"])
        kinds = (ids == theirs.image_token_id).int()
        positions, _ = type(model).get_rope_index(model, ids, mm_token_type_ids=kinds, image_grid_thw=grids)
        np.testing.assert_array_equal(ours.positions.transpose(2, 0, 1), positions)


def same_video(ours, theirs, model, processor):
    """Ids, pixels, and the positions of the video and of the token after it."""
    same_ids(ours, theirs)
    np.testing.assert_allclose(patches_of(ours.images), theirs["pixel_values_videos"], atol=1e-5)
    ids, grids = torch.from_numpy(theirs["input_ids"]), torch.from_numpy(theirs["video_grid_thw"])
    kinds = 2 * (ids == processor.video_token_id).int()
    timed = {"second_per_grid_ts": torch.tensor(theirs["second_per_grid_ts"])} if "second_per_grid_ts" in theirs else {}
    positions, _ = type(model).get_rope_index(model, ids, mm_token_type_ids=kinds, video_grid_thw=grids, **timed)
    places = np.asarray(ours.visual_index[0]) >= 0
    np.testing.assert_array_equal(ours.positions[0][places], positions[:, 0].T[places])
    assert ours.positions[0, places.nonzero()[0][-1] + 1, 0] == ours.positions[0][places].max() + 1


@pytest.mark.parametrize("kind", QWEN)
def test_qwen_videos(tmp_path, kind):
    """Frames, many and few, at several rates; one larger than the limit, one smaller, one in between."""
    theirs, model, processor = qwen(kind, tmp_path)
    between = [frame.resize((48, 40)) for frame in frames(3)]
    for given, fps in ((frames(5), 1.0), (pictures(1), 2.0), (between, 0.7), ([pictures(5)[4]] * 4, 3)):
        ours = processor(ABOUT_A_VIDEO, videos=[given], fps=fps)
        expected = official_video(theirs, ABOUT_A_VIDEO, given, fps)
        assert ("second_per_grid_ts" in expected) == (kind == "qwen2_5_vl")
        same_video(ours, expected, model, theirs)


@pytest.mark.parametrize("kind", QWEN)
def test_a_video_file(tmp_path, kind):
    """Two frames a second, evenly from the first to the last, as the release's reader chooses them."""
    theirs, model, processor = qwen(kind, tmp_path)
    path = video_file(tmp_path / "video.mp4", (frames(5) * 5)[:24], 8)
    given = decoded(path)
    chosen = torch.linspace(0, len(given) - 1, 6).round().int().tolist()  # of three seconds
    metadata = {"total_num_frames": len(given), "frames_indices": chosen}
    expected = official_video(theirs, ABOUT_A_VIDEO, [given[number] for number in chosen], 8.0, **metadata)
    same_video(processor(ABOUT_A_VIDEO, videos=[path]), expected, model, theirs)


def test_settings_in_files_of_their_own(tmp_path):
    """As older releases have them."""
    _, _, processor = qwen("qwen2_vl", tmp_path)
    parts = json.loads((tmp_path / "processor_config.json").read_text())
    for name, section in (("", "image_processor"), ("video_", "video_processor")):
        (tmp_path / f"{name}preprocessor_config.json").write_text(json.dumps(parts.pop(section)))
    (tmp_path / "processor_config.json").write_text(json.dumps(parts))
    config = json.loads((tmp_path / "config.json").read_text())
    assert qwen_hf.processor(tmp_path, config).views == processor.views


def deepseek_vl_processor(size=32):
    return transformers.DeepseekVLProcessor(
        DeepseekVLImageProcessorPil(size={"height": size, "width": size}, min_size=4),
        tokenizer(image_token="<image_placeholder>"),
        chat_template=template("<image_placeholder>"),
        num_image_tokens=9,
    )


def test_deepseek_vl(tmp_path):
    theirs = deepseek_vl_processor()
    folder, config = save(theirs, tmp_path, model_type="deepseek_vl")
    processor = deepseek_hf.processor(folder, config)
    for count in (1, 5):
        messages, images = conversation(count), pictures(count)
        ours, expected = processor(messages, images), official(theirs, messages, images)
        same_ids(ours, expected)
        same_tiles(ours, expected)
        check_rows(ours, theirs.image_token_id, 9 * count)


def deepseek_vl_hybrid_processor(low=32, high=64):
    half = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    sizes = {"size": {"height": low, "width": low}, "high_res_size": {"height": high, "width": high}}
    return transformers.DeepseekVLHybridProcessor(
        DeepseekVLHybridImageProcessorPil(**sizes, **half, min_size=4),
        tokenizer(image_token="<image_placeholder>"),
        chat_template=template("<image_placeholder>"),
        num_image_tokens=9,
    )


def test_deepseek_vl_hybrid(tmp_path):
    theirs = deepseek_vl_hybrid_processor()
    folder, config = save(theirs, tmp_path, model_type="deepseek_vl_hybrid")
    processor = deepseek_hf.processor_hybrid(folder, config)
    images, kind = pictures(5), theirs.image_processor
    ours, expected = processor(conversation(5), images), official(theirs, conversation(5), images)
    same_ids(ours, expected)
    same_two_sizes(ours, expected, kind)


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


def test_internvl(tmp_path):
    theirs = internvl_processor()
    folder, config = save(theirs, tmp_path, model_type="internvl")
    processor = internvl_hf.processor(folder, config)
    for count in (1, 5):
        messages, images = conversation(count), pictures(count)
        ours, expected = processor(messages, images), official(theirs, messages, images)
        same_ids(ours, expected)
        same_tiles(ours, expected)
        check_rows(ours, theirs.image_token_id, 4 * ours.images.shape[1])
    path = video_file(tmp_path / "video.mp4", frames(4), 8)
    chosen = [decoded(path)[number] for number in SegmentSampler().chosen(4, 8)]
    for video, given in ((frames(3), frames(3)), (path, chosen)):
        ours, expected = processor(ABOUT_A_VIDEO, videos=[video]), official_video(theirs, ABOUT_A_VIDEO, given, 2.0)
        same_ids(ours, expected)
        same_tiles(ours, expected)


INDICATORS = ["<IMG_START>", "<IMG_GRID>", "<IMG_COL>", "<IMG_ROW>", "<IMG_END>"]


def ovis2_processor(tiles=True):
    return transformers.Ovis2Processor(
        Ovis2ImageProcessorPil(size={"height": 28, "width": 28}, crop_to_patches=tiles, max_patches=9),
        tokenizer("<image>", "<IMG_ATOM>", *INDICATORS),
        chat_template=template("<image>"),
        image_seq_length=4,
    )


@pytest.mark.parametrize("tiles", [False, True])
def test_ovis2(tmp_path, tiles):
    theirs = ovis2_processor(tiles)
    made = theirs.tokenizer
    ids = made.convert_tokens_to_ids(INDICATORS)
    folder, config = save(theirs, tmp_path, model_type="ovis2", visual_indicator_token_ids=ids)
    processor = ovis2_hf.processor(folder, config)
    for count in (1, 5):
        messages, images = conversation(count), pictures(count)
        ours, expected = processor(messages, images), official(theirs, messages, images)
        same_ids(ours, expected)
        same_tiles(ours, expected)
        atoms = np.asarray(ours.tokens) == made.convert_tokens_to_ids("<IMG_ATOM>")
        np.testing.assert_array_equal(ours.visual_index[atoms], 5 + np.arange(4 * ours.images.shape[1]))
        for row, index in enumerate(ids):
            assert (ours.visual_index[np.asarray(ours.tokens) == index] == row).all()


def test_a_batch_is_padded_on_the_left(tmp_path):
    theirs, _, processor = qwen("qwen2_vl", tmp_path)
    conversations = [conversation(2), conversation(0), conversation(1)]
    images = [pictures(2), [], pictures(1)]
    ours = processor.batch(conversations, images)
    texts = [theirs.apply_chat_template(messages, add_generation_prompt=True) for messages in conversations]
    expected = theirs(images=images, text=texts, return_tensors="np", padding=True, padding_side="left")
    same_ids(ours, expected)
    patches = [
        patches[segments > 0] for patches, segments in zip(ours.images.patches, ours.images.segment_ids, strict=True)
    ]
    np.testing.assert_allclose(np.concatenate([patches[0], patches[2]]), expected["pixel_values"], atol=1e-5)
