"""Processors of transformers compared with ours: one saved folder, the same conversation, the same images."""

import json

import av
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.gemma4.image_processing_pil_gemma4 import get_aspect_ratio_preserving_size
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.qwen2_5_omni.configuration_qwen2_5_omni import Qwen2_5OmniThinkerConfig
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2_5OmniThinkerModel
from transformers.vision_utils import get_vision_nearest_position_ids

from vlm_jax.encoders.merging_vit import rows_of_table
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.processing import (
    deepseek_hf,
    deepseek_ocr2,
    gemma3,
    gemma4,
    internvl_hf,
    llava_hf,
    minicpm_v4_6,
    ovis2_hf,
    qwen_hf,
)
from vlm_jax.processors.filled import filled_size
from vlm_jax.processors.pixels import Pixels
from vlm_jax.processors.sliced import SlicedViews, area_size
from vlm_jax.processors.video import EveryFrame, SegmentSampler
from vlm_jax.processors.views import PictureMismatch
from vlm_jax.types import PatchFormat

from ..advice import tried
from .processors import (
    ABOUT_A_VIDEO,
    INDICATORS,
    OMNI_TEMPLATE,
    ONEVISION_TEMPLATE,
    QWEN,
    SIZES,
    VISION,
    conversation,
    deepseek_ocr2_processor,
    deepseek_vl_hybrid_processor,
    deepseek_vl_processor,
    frames,
    gemma3_processor,
    internvl_processor,
    llava_next_processor,
    llava_onevision_processor,
    llava_processor,
    minicpm_v_processor,
    navit_patches,
    official,
    official_video,
    ovis2_processor,
    patches_of,
    pictures,
    qwen,
    qwen2_5_omni_processor,
    same_ids,
    same_tiles,
    same_two_sizes,
    same_wholes_and_tiles,
    save,
)


def check_rows(ours, token_id, num_rows):
    """Every place of an image is filled, each row at most once and in order of the places."""
    places = np.asarray(ours.tokens) == token_id
    np.testing.assert_array_equal(np.asarray(ours.visual_index) >= 0, places)
    assert ours.visual_index.max() < num_rows


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


def same_patches(ours, theirs):
    np.testing.assert_allclose(patches_of(ours.images), theirs["pixel_values"], atol=1e-5)


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


def test_llava_onevision(tmp_path):
    """A canvas for a single picture, one tile for each of several, every frame of a video; the release's template."""
    theirs = llava_onevision_processor(ONEVISION_TEMPLATE)
    vision = {"patch_size": 4, "image_size": 20}
    aspect = {"vision_aspect_ratio": "anyres_max_2"}
    folder, config = save(theirs, tmp_path, model_type="llava_onevision", vision_config=vision, **aspect)
    processor = llava_hf.processor_onevision(folder, config)
    tokens = set()
    for number, picture in enumerate(pictures(len(SIZES))):
        ours, expected = processor(conversation(1), [picture]), official(theirs, conversation(1), [picture])
        same_ids(ours, expected)
        same_tiles(ours, expected)
        (count,) = processor.count_visual_tokens([SIZES[number]])
        assert count == int((ours.visual_index >= 0).sum())
        tokens.add(count)
        loads = processor.views.loads([SIZES[number]]), [ours.images.shape[1]]
        assert loads[0] == loads[1] and ours.visual_index.max() <= 25 * loads[0][0]
    assert len(tokens) > 3
    ours, expected = processor(conversation(3), pictures(3)), official(theirs, conversation(3), pictures(3))
    same_ids(ours, expected)
    same_tiles(ours, expected)
    assert processor.count_visual_tokens(SIZES[:3]) == [26] * 3
    ours, expected = processor(ABOUT_A_VIDEO, [], [frames(5)]), official_video(theirs, ABOUT_A_VIDEO, frames(5), 2.0)
    same_ids(ours, expected)
    np.testing.assert_allclose(ours.images[0], np.moveaxis(expected["pixel_values_videos"][0], 1, -1), atol=1e-5)
    assert isinstance(processor.frame_sampler, EveryFrame)
    with pytest.raises(PretrainedError, match=r"vision_aspect_ratio: expected that of config\.json, 'anyres_max_9'"):
        llava_hf.processor_onevision(folder, {**config, "vision_aspect_ratio": "anyres_max_9"})


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


@pytest.mark.parametrize("kind", QWEN)
def test_qwen_videos(tmp_path, kind):
    """Frames, many and few, at several rates; one larger than the limit, one smaller, one in between."""
    theirs, model, processor = qwen(kind, tmp_path)
    between = [frame.resize((48, 40)) for frame in frames(3)]
    rounded = [*between] * 4, 20 / 7  # 1.4 positions a step, which is less in float32: the fifth is 7 all the same
    for given, fps in ((frames(5), 1.0), (pictures(1), 2.0), (between, 0.7), ([pictures(5)[4]] * 4, 3), rounded):
        ours = processor(ABOUT_A_VIDEO, videos=[given], fps=fps)
        still = {}
        if kind == "qwen3_vl" and len(given) == 1:  # which is refused there: the same frame, twice at one time
            given, still = given * 2, {"frames_indices": [0, 0]}
        expected = official_video(theirs, ABOUT_A_VIDEO, given, fps, **still)
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


class OmniPositions:
    """What a thinker's positions are computed from."""

    spatial_merge_size = 2
    get_rope_index = Qwen2_5OmniThinkerModel.get_rope_index
    get_llm_pos_ids_for_vision = Qwen2_5OmniThinkerModel.get_llm_pos_ids_for_vision

    def __init__(self, vocabulary, **more):
        ids = {
            f"{name}_token_id": vocabulary.convert_tokens_to_ids(token)
            for name, token in {
                **{kind: f"<|{kind.upper()}|>" for kind in ("image", "video", "audio")},
                "vision_start": "<|vision_bos|>",
                "audio_start": "<|audio_bos|>",
            }.items()
        }
        self.config = Qwen2_5OmniThinkerConfig(**more)
        for name, index in ids.items():
            setattr(self.config, name, index)

    def __call__(self, inputs):
        given = {name: torch.from_numpy(np.asarray(value)) for name, value in inputs.items()}
        seconds = given.get("video_second_per_grid")
        grids = {name: given.get(name) for name in ("image_grid_thw", "video_grid_thw")}
        found, _ = self.get_rope_index(
            given["input_ids"], attention_mask=given["attention_mask"], second_per_grids=seconds, **grids
        )
        return found.numpy().transpose(1, 2, 0)


def test_qwen2_5_omni(tmp_path):
    """The release's template; videos at several rates; a file whose frames are not quite of the rate asked for."""
    theirs = qwen2_5_omni_processor(OMNI_TEMPLATE)
    thinker = {"vision_config": {"window_size": 112}, "position_id_per_seconds": 25}
    made = {"model_type": "qwen2_5_omni", "thinker_config": thinker}
    processor, positions = qwen_hf.processor_omni(*save(theirs, tmp_path, **made)), OmniPositions(theirs.tokenizer)
    for images in (pictures(1), pictures(5)[2:]):
        messages = conversation(len(images))
        ours, expected = processor(messages, images), official(theirs, messages, images)
        same_ids(ours, expected)
        same_patches(ours, expected)
        np.testing.assert_array_equal(ours.positions, positions(expected))
    between = [frame.resize((480, 300)) for frame in frames(3)]
    for given, fps in ((frames(5), 1.0), (pictures(1), 2.0), (between, 0.7), (frames(5) * 2, 3)):
        described = {"fps": fps, "total_num_frames": len(given), "frames_indices": list(range(len(given)))}
        asked = {"videos": [given], "video_metadata": [described], "fps": fps}
        expected = official(theirs, ABOUT_A_VIDEO, [], "pt", **asked)
        ours = processor(ABOUT_A_VIDEO, videos=[given], fps=fps)
        same_ids(ours, expected)
        np.testing.assert_allclose(patches_of(ours.images), expected["pixel_values_videos"], atol=1e-5)
        np.testing.assert_array_equal(ours.positions, positions(expected))
    assert 50 in ours.positions[0, :, 0] - ours.positions[0][np.asarray(ours.visual_index[0]) >= 0].min()
    path = video_file(tmp_path / "video.mp4", (frames(5) * 5)[:25], 8)
    given = decoded(path)
    chosen = torch.linspace(0, len(given) - 1, 6).round().int().tolist()
    ours = processor(ABOUT_A_VIDEO, videos=[path])
    expected = official_video(theirs, ABOUT_A_VIDEO, [given[number] for number in chosen], 2.0)
    same_ids(ours, expected)
    np.testing.assert_allclose(patches_of(ours.images), expected["pixel_values_videos"], atol=1e-5)
    np.testing.assert_array_equal(ours.positions, positions(expected))


def test_qwen_with_patches_of_one_frame(tmp_path):
    """LLaVA-OneVision 1.5, which was released with Qwen2.5-VL's processor so set, and reads positions on one axis."""
    theirs, *_ = qwen("qwen2_5_vl", tmp_path)
    theirs.image_processor.temporal_patch_size = theirs.video_processor.temporal_patch_size = 1
    vision = {"patch_size": 4, "spatial_merge_size": 2}
    processor = qwen_hf.processor_of_frames(*save(theirs, tmp_path, model_type="any", vision_config=vision))
    for images in (pictures(1), pictures(5)[3:]):
        ours, expected = (
            processor(conversation(len(images)), images),
            official(theirs, conversation(len(images)), images),
        )
        same_ids(ours, expected)
        same_patches(ours, expected)
        np.testing.assert_array_equal(ours.images.class_tokens.sum(), len(images))
    ours = processor(ABOUT_A_VIDEO, videos=[frames(5)], fps=1.0)
    expected = official_video(theirs, ABOUT_A_VIDEO, frames(5), 1.0)
    same_ids(ours, expected)
    np.testing.assert_allclose(patches_of(ours.images), expected["pixel_values_videos"], atol=1e-5)
    assert ours.images.class_tokens.sum() == 5
    np.testing.assert_array_equal(ours.positions[0], np.arange(ours.tokens.shape[1]))


def test_settings_in_files_of_their_own(tmp_path):
    """As older releases have them."""
    _, _, processor = qwen("qwen2_vl", tmp_path)
    parts = json.loads((tmp_path / "processor_config.json").read_text())
    for name, section in (("", "image_processor"), ("video_", "video_processor")):
        (tmp_path / f"{name}preprocessor_config.json").write_text(json.dumps(parts.pop(section)))
    (tmp_path / "processor_config.json").write_text(json.dumps(parts))
    config = json.loads((tmp_path / "config.json").read_text())
    assert qwen_hf.processor(tmp_path, config).views == processor.views


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


def test_deepseek_vl_hybrid(tmp_path):
    theirs = deepseek_vl_hybrid_processor()
    folder, config = save(theirs, tmp_path, model_type="deepseek_vl_hybrid")
    processor = deepseek_hf.processor_hybrid(folder, config)
    images, kind = pictures(5), theirs.image_processor
    ours, expected = processor(conversation(5), images), official(theirs, conversation(5), images)
    same_ids(ours, expected)
    same_two_sizes(ours, expected, kind)


def test_deepseek_ocr2(tmp_path):
    """Images with and without tiles; also pads of an odd number of pixels, and a tall and a wide one."""
    theirs = deepseek_ocr2_processor()
    folder, config = save(theirs, tmp_path, model_type="deepseek_ocr2")
    processor = deepseek_ocr2.processor(folder, config)
    small = [Image.fromarray(np.asarray(picture)[:31, :45]) for picture in pictures(2)]
    for images in ([small[0]], small, [*small, *pictures(5)]):
        messages = conversation(len(images))
        ours, expected = processor(messages, images), official(theirs, messages, images)
        same_ids(ours, expected)
        same_wholes_and_tiles(ours, expected)
        count = int((np.asarray(expected["input_ids"]) == theirs.image_token_id).sum())
        assert sum(processor.count_visual_tokens([picture.size[::-1] for picture in images])) == count
    # Token by token, tile after tile; then the whole, which comes first in the table, and the separator.
    index = processor(conversation(1), pictures(1)).visual_index
    tiles = expected["num_local_patches"][2]
    wanted = [*range(1 + 256, 1 + 256 + 144 * tiles), *range(1, 1 + 256), 0]
    np.testing.assert_array_equal(index[index >= 0], wanted)


def test_deepseek_ocr2_without_a_chat_template(tmp_path):
    """The prompt of its documentation; a folder's image processor does not change the number of tiles."""
    theirs = deepseek_ocr2_processor(templated=False)
    theirs.image_processor.max_patches = 3
    folder, config = save(theirs, tmp_path, model_type="deepseek_ocr2")
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Free OCR. "}]}
    ours = deepseek_ocr2.processor(folder, config)([question], pictures(1))
    same_ids(ours, theirs(images=pictures(1), text="<image>\nFree OCR.", return_tensors="np"))


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


def test_gemma3_with_pan_and_scan(tmp_path):
    """Transformers crops where the call says so; the folder says it here. Groups are its token types."""
    crops = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 20, "pan_and_scan_max_num_crops": 3}
    theirs = gemma3_processor(**crops)
    ours = gemma3.processor(*save(theirs, tmp_path, model_type="gemma3"))
    for count in (1, 2, 5):
        inputs = official(theirs, conversation(count), pictures(count), **crops)
        batch = ours(conversation(count), pictures(count))
        same_ids(batch, inputs)
        same_tiles(batch, inputs)
        np.testing.assert_array_equal(batch.group_ids > 0, inputs["token_type_ids"])
        check_rows(batch, theirs.tokenizer.image_token_id, 4 * len(inputs["pixel_values"]))
    assert batch.images.shape[1] == 5 + 2 + 3 + 0 + 3 + 2
    same_ids(ours(conversation(2), pictures(2), do_pan_and_scan=False), official(theirs, conversation(2), pictures(2)))


def test_gemma3_with_pan_and_scan_of_a_call(tmp_path):
    """Where the folder states its settings alone; for a batch of several conversations too."""
    limits = {"pan_and_scan_min_crop_size": 20, "pan_and_scan_max_num_crops": 3}
    theirs = gemma3_processor(**limits)
    ours = gemma3.processor(*save(theirs, tmp_path, model_type="gemma3"))
    for asked in ({}, {"do_pan_and_scan": False}, {"do_pan_and_scan": True}):
        inputs = official(theirs, conversation(2), pictures(2), **limits, **asked)
        batch = ours.batch([conversation(2), conversation(0)], [pictures(2), []], **asked)
        np.testing.assert_array_equal(batch.tokens[0], inputs["input_ids"][0])
        same_tiles(batch, inputs)
        assert batch.images.shape[1] == (2 + 2 + 3 if asked.get("do_pan_and_scan") else 2)
    _, _, other = qwen("qwen2_vl", tmp_path / "other")
    with pytest.raises(PictureMismatch, match=tried("has no pan and scan; remove the option")):
        other(conversation(1), pictures(1), do_pan_and_scan=True)
    assert other(conversation(1), pictures(1)).images is not None


def test_sizes_of_gemma4():
    draw = np.random.default_rng(0)
    for height, width, tokens in zip(*draw.integers(1, 5000, (2, 200)), draw.choice(gemma4.BUDGETS, 200), strict=True):
        size = int(height), int(width)
        wanted = get_aspect_ratio_preserving_size(*size, 16, 9 * int(tokens), 3)
        assert filled_size(size, 48, 0, int(tokens) * 48**2) == wanted


@pytest.mark.parametrize("mode", ["16x", "4x"])
@pytest.mark.parametrize("slices", [9, 36, 1])
def test_sizes_of_minicpm_v(mode, slices):
    theirs = MiniCPMV4_6ImageProcessorPil()
    side, merge_size = 448, 2 if mode == "4x" else 4
    views = SlicedViews(Pixels(), PatchFormat(14, merge_size=merge_size), area_size, 0, side * side, max_slices=slices)
    draw = np.random.default_rng(0)
    for height, width in [*draw.integers(1, 5000, (200, 2)).tolist(), (448, 448), (449, 448), (1, 2000), (896, 1344)]:
        grid = theirs.get_sliced_grid((height, width), slices, side)
        whole = theirs.find_best_resize((height, width), side, 14, mode, allow_upscale=grid is None)
        found = views.cut((height, width), side * side, slices, None)
        assert found.whole == whole and found.grid == (None if grid is None else tuple(grid))
        if grid is not None:
            rows, cols = grid
            refined = theirs.get_refine_size((height, width), grid, side, 14, mode, allow_upscale=True)
            assert (found.part[0] * rows, found.part[1] * cols) == refined


MINICPM = {
    "released": {},
    "without slices": {"images": {"slice_mode": False}, "videos": {"slice_mode": False}},
    "without numbers": {"images": {"use_image_id": False, "scale_resolution": 32}},
    "a frame in a view": {"videos": {"max_slice_nums": 1, "image_mean": [0.5] * 3}},
}


@pytest.mark.parametrize("mode", ["16x", "4x"])
@pytest.mark.parametrize("name", MINICPM)
def test_minicpm_v(tmp_path, mode, name):
    theirs = minicpm_v_processor(mode, **MINICPM[name])
    folder, config = save(theirs, tmp_path, model_type="minicpmv4_6", downsample_mode=mode)
    ours, side = minicpm_v4_6.processor(folder, config), 2 if mode == "4x" else 4
    for count in (0, 1, 5):
        batch, inputs = (
            ours(conversation(count), pictures(count)),
            official(theirs, conversation(count), pictures(count)),
        )
        same_ids(batch, inputs)
        if count:
            np.testing.assert_allclose(patches_of(batch.images), navit_patches(inputs, "image", side), atol=1e-5)
            shown = np.asarray(batch.tokens)[batch.visual_index >= 0]
            assert set(shown.tolist()) == {theirs.image_token_id}
    inputs = official_video(theirs, ABOUT_A_VIDEO, frames(3), 2.0)
    batch = ours(ABOUT_A_VIDEO, [], [frames(3)])
    same_ids(batch, inputs)
    np.testing.assert_allclose(patches_of(batch.images), navit_patches(inputs, "video", side), atol=1e-5)


def test_minicpm_v_with_images_and_videos_mixed(tmp_path):
    """Both are numbered from 0; a mark's tiles follow it, whatever stands before it."""
    theirs = minicpm_v_processor()
    folder, config = save(theirs, tmp_path, model_type="minicpmv4_6")
    ours = minicpm_v4_6.processor(folder, config)
    kinds = ("video", "image", "video", "image")
    mixed = [{"role": "user", "content": [*({"type": kind} for kind in kinds), {"type": "text", "text": "So?"}]}]
    clips = [frames(2), [frame.resize((20, 20)) for frame in frames(3)]]
    text = ours.tokenizer.decode(ours(mixed, pictures(2), clips).tokens[0].tolist(), skip_special=False)
    for token in ("<|image_pad|>", "<|video_pad|>"):
        text = text.replace(token, "")
    tiled = "<image></image>" + "<slice></slice>" * 2
    several = "<image></image><slice></slice>"
    assert text.count("<image_id>0</image_id>") == text.count("<image_id>1</image_id>") == 2
    first, second, third, fourth = (part.partition("</image_id>")[2] for part in text.split("<image_id>")[1:])
    assert first == f"{tiled * 2}\n" and third == "<image></image>" * 3 + "\n"
    assert second.startswith(several) and fourth.startswith(several)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("image_processor", "downsample_mode", "4x", "image processor.downsample_mode: expected '16x', got '4x'"),
        ("video_processor", "downsample_mode", "4x", "video processor.downsample_mode: expected '16x', got '4x'"),
        ("video_processor", "patch_size", 4, "video processor.patch_size: expected 2, got 4"),
        ("video_processor", "stack_frames", 3, "video processor.stack_frames: expected 1, got 3"),
    ],
)
def test_settings_of_minicpm_v_that_are_refused(tmp_path, section, key, value, message):
    folder, config = save(minicpm_v_processor(), tmp_path, model_type="minicpmv4_6")
    path = folder / "processor_config.json"
    parts = json.loads(path.read_text())
    parts[section][key] = value
    path.write_text(json.dumps(parts))
    with pytest.raises(PretrainedError, match=message):
        minicpm_v4_6.processor(folder, config)


def test_rows_of_the_table_of_minicpm_v():
    """Of the released table of 70 x 70, for images of up to 200 patches a side."""
    for side in range(1, 200):
        expected = get_vision_nearest_position_ids(torch.tensor([[side, 3]]), 70).numpy()
        positions = np.moveaxis(np.mgrid[:side, :3], 0, -1).reshape(1, -1, 2)
        sizes = np.broadcast_to([side, 3], positions.shape)
        found = rows_of_table(jnp.asarray(positions), jnp.asarray(sizes), 70)
        np.testing.assert_array_equal(found[0], expected)


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
