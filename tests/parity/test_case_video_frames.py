"""Frames of a video that the settings of a folder choose, compared with sample_frames of transformers."""

import json

import numpy as np
import pytest
from transformers.models.internvl.video_processing_internvl import InternVLVideoProcessor
from transformers.models.minicpmv4_6.video_processing_minicpmv4_6 import MiniCPMV4_6VideoProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.video_utils import VideoMetadata

from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.processing import idefics3, internvl_hf, minicpm_v4_6, qwen_hf
from vlm_jax.pretrained.processing.settings import video_settings
from vlm_jax.processors.views import PictureMismatch

from .processors import save, smolvlm_processor

LENGTHS = [(4, 8.0), (48, 8.0), (47, 25.0), (301, 29.97), (700, 30.0)]
QWEN = [
    {"fps": 1.0},
    {"fps": 2, "min_frames": 4, "max_frames": 768},
    {"fps": 0.5, "min_frames": 8, "max_frames": 10},
    {"fps": 30.0, "min_frames": 4, "max_frames": 12},
    {"num_frames": 4},
    {"num_frames": 7},
]
INTERNVL = [{"num_frames": 4}, {"num_frames": 3}, {"fps": 1.0}, {"fps": 2.5}]


def theirs(made, total, fps):
    """The indices, or None where the reference raises."""
    metadata = VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps)
    try:
        return np.asarray(made.sample_frames(metadata)).tolist()
    except ValueError:
        return None


def ours(sampler, total, fps):
    try:
        return sampler.chosen(total, fps).tolist()
    except PictureMismatch:
        return None


@pytest.mark.parametrize(("total", "fps"), LENGTHS)
@pytest.mark.parametrize("stated", QWEN)
def test_frames_of_qwen(stated, total, fps):
    wanted = theirs(Qwen2VLVideoProcessor(**stated), total, fps)
    assert ours(qwen_hf._sampler({"do_sample_frames": True, **stated}, "folder"), total, fps) == wanted


@pytest.mark.parametrize(("total", "fps"), LENGTHS)
@pytest.mark.parametrize("stated", INTERNVL)
def test_frames_of_internvl(tmp_path, stated, total, fps):
    made = InternVLVideoProcessor(do_sample_frames=True, **stated)
    made.save_pretrained(tmp_path)
    metadata = VideoMetadata(total_num_frames=total, fps=fps, duration=total / fps)
    try:
        wanted = np.asarray(made.sample_frames(metadata, fps=made.fps)).tolist()
    except (ValueError, ZeroDivisionError):
        wanted = None
    found = ours(internvl_hf._sampler(tmp_path), total, fps)
    assert wanted is None or found == wanted


@pytest.mark.parametrize(("total", "fps"), [*LENGTHS, (1, 30.0), (3000, 25.0)])
@pytest.mark.parametrize("stated", [{"fps": 1, "num_frames": 64}, {"fps": 0.5, "num_frames": 5}])
def test_frames_of_smolvlm(stated, total, fps):
    """Of the longer ones with 5 frames the first and the last second are skipped."""
    assert ours(idefics3.sampler(stated), total, fps) == theirs(SmolVLMVideoProcessor(**stated), total, fps)


@pytest.mark.parametrize(("total", "fps"), [*LENGTHS, (1, 30.0), (3000, 25.0), (4000, 29.97)])
@pytest.mark.parametrize("stated", [{}, {"max_num_frames": 5}, {"max_num_frames": 25}])
def test_frames_of_minicpm_v(stated, total, fps):
    """The first of every second, and of a longer video as many as are allowed."""
    wanted = theirs(MiniCPMV4_6VideoProcessor(**stated), total, fps)
    assert ours(minicpm_v4_6.sampler(stated), total, fps) == wanted
    assert len(minicpm_v4_6.sampler({**stated, "do_sample_frames": False}).chosen(301, 29.97)) == 301


def test_frames_of_a_saved_smolvlm(tmp_path):
    """`save_pretrained` writes `do_sample_frames` as false; `video_sampling` takes precedence over other keys."""
    sampling = {"fps": 0.5, "max_frames": 5, "video_size": {"longest_edge": 8}}
    made = SmolVLMVideoProcessor(fps=1, num_frames=64, video_sampling=sampling)
    made.save_pretrained(tmp_path)
    stated = video_settings(tmp_path)
    assert stated["do_sample_frames"] is False
    assert ours(idefics3.sampler({**stated, "fps": 1, "num_frames": 64, "video_sampling": sampling}), 301, 29.97) == (
        theirs(made, 301, 29.97)
    )
    assert ours(idefics3.sampler(stated), 301, 29.97) == theirs(made, 301, 29.97)
    assert len(idefics3.sampler({"do_sample_frames": False}).chosen(301, 29.97)) == 301


def test_frames_of_another_size_than_tiles(tmp_path):
    folder, config = save(smolvlm_processor(), tmp_path, model_type="smolvlm")
    path = folder / "processor_config.json"
    parts = json.loads(path.read_text())
    parts["video_processor"]["max_image_size"] = {"longest_edge": 56}
    path.write_text(json.dumps(parts))
    with pytest.raises(PretrainedError, match=r"max_image_size: expected .* image processor, 28, got 56"):
        idefics3.processor_smolvlm(folder, config)


@pytest.mark.parametrize("made", [Qwen2VLVideoProcessor, InternVLVideoProcessor])
def test_every_frame_without_sampling(tmp_path, made):
    """`do_sample_frames` is false in these classes and in what they save; frames are then taken as they are."""
    processor = made()
    processor.save_pretrained(tmp_path)
    assert processor.do_sample_frames is False
    settings = {"do_sample_frames": False}
    sampler = qwen_hf._sampler(settings, tmp_path) if made is Qwen2VLVideoProcessor else internvl_hf._sampler(tmp_path)
    video = np.zeros((9, 3, 4, 4), np.uint8)
    kept, _ = processor._decode_and_sample_videos([video], [{"total_num_frames": 9, "fps": 2.0}], False)
    assert len(sampler.chosen(9, 2.0)) == len(kept[0])
