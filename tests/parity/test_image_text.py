"""CLIP, SigLIP, SigLIP 2 and ViT of transformers compared with ours: one saved folder, the same images and texts."""

import json

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import normalizers
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import vlm_jax
from tests.processors.vocabularies import sentencepiece_model
from vlm_jax.evals.zero_shot import class_embeddings, top_k_accuracy
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.processors.tokenizer import TokenizerError
from vlm_jax.system import UnsupportedError

from .processors import SIZES, pictures

BLOCKS = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = [
    "A photo of the Lazy Dog.",
    "hello,   WORLD! it's the quick_brown fox's 1st",
    "the dog in the image " * 12,  # longer than any tower reads
    "你好 the café",
]
LENGTH = 20


def clip_tokenizer():
    """Letters with and without the end of a word, a few pairs, and the two ends of a text."""
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e</w>"), ("d", "o"), ("do", "g</w>")]
    names = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    names += ["<|startoftext|>", "<|endoftext|>"]
    made = transformers.CLIPTokenizer({name: index for index, name in enumerate(names)}, merges)
    made.model_max_length = LENGTH
    return made


def clip(folder):
    vocabulary = clip_tokenizer()
    images = CLIPImageProcessorPil(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
    processor = transformers.CLIPProcessor(images, vocabulary)
    ends = {"bos_token_id": vocabulary.bos_token_id, "eos_token_id": vocabulary.eos_token_id}
    config = transformers.CLIPConfig(
        text_config={**BLOCKS, **ends, "vocab_size": len(vocabulary), "max_position_embeddings": LENGTH},
        vision_config={**BLOCKS, "image_size": 16, "patch_size": 4},
        projection_dim=12,
    )
    return saved(folder, processor, transformers.CLIPModel(config))


def siglip_tokenizer(folder):
    model = sentencepiece_model(
        model_type="unigram", vocab_size=60, byte_fallback=False, normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
    )  # fmt: skip
    (folder / "spiece.model").write_bytes(model)
    return transformers.SiglipTokenizer(str(folder / "spiece.model"))


def siglip(folder):
    processor = transformers.SiglipProcessor(
        SiglipImageProcessorPil(size={"height": 16, "width": 16}), siglip_tokenizer(folder)
    )
    config = transformers.SiglipConfig(
        text_config={**BLOCKS, "vocab_size": 60, "max_position_embeddings": LENGTH},
        vision_config={**BLOCKS, "image_size": 16, "patch_size": 4},
    )
    return saved(folder, processor, transformers.SiglipModel(config))


def gemma_tokenizer():
    """Gemma's: pairs of characters without a normalizer of case, and an end after a text."""
    letters = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
    letters += sorted({*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,.!'_0123456789"})
    merges = [("d", "o"), ("do", "g"), ("t", "h"), ("th", "e")]
    vocabulary = {name: index for index, name in enumerate([*letters, *map("".join, merges)])}
    made = transformers.Siglip2Tokenizer(vocabulary, merges)
    made.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "$A <eos>", special_tokens=[("<eos>", 1)]
    )
    made.padding_side, made.model_max_length = "right", LENGTH
    return made


def siglip2(folder):
    processor = transformers.Siglip2Processor(
        Siglip2ImageProcessorPil(patch_size=4, max_num_patches=24), gemma_tokenizer()
    )
    config = transformers.Siglip2Config(
        text_config={**BLOCKS, "vocab_size": len(processor.tokenizer), "max_position_embeddings": LENGTH},
        vision_config={**BLOCKS, "patch_size": 4, "num_patches": 16},
    )
    return saved(folder, processor, transformers.Siglip2Model(config))


def siglip2_fixed(folder):
    """SigLIP 2 at a fixed resolution, which is SigLIP but for its tokenizer."""
    processor = transformers.SiglipProcessor(
        SiglipImageProcessorPil(size={"height": 16, "width": 16}, resample=2), gemma_tokenizer()
    )
    config = transformers.SiglipConfig(
        text_config={**BLOCKS, "vocab_size": len(processor.tokenizer), "max_position_embeddings": LENGTH},
        vision_config={**BLOCKS, "image_size": 16, "patch_size": 4},
    )
    return saved(folder, processor, transformers.SiglipModel(config))


def saved(folder, processor, model):
    processor.save_pretrained(folder)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.eval().save_pretrained(folder)
    return processor, model, vlm_jax.from_pretrained(folder)


@pytest.fixture(scope="module", params=[clip, siglip, siglip2, siglip2_fixed], ids=lambda made: made.__name__)
def towers(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp(request.param.__name__))


def official(processor, images=None, texts=None):
    settings = {"padding": "max_length", "truncation": True, "max_length": LENGTH} if texts else {}
    if hasattr(processor.image_processor, "max_num_patches") and images:
        settings |= {"max_num_patches": processor.image_processor.max_num_patches, "patch_size": 4}
    return processor(images=images, text=texts, return_tensors="pt", **settings)


def test_ids_pixels_and_logits(towers):
    processor, model, ours = towers
    images = pictures(len(SIZES))
    expected = official(processor, images, TEXTS)
    batch = ours.processor(images=images, texts=TEXTS)
    np.testing.assert_array_equal(batch.tokens, expected["input_ids"])
    assert len({tuple(row) for row in np.asarray(batch.tokens)}) == len(TEXTS)
    pixels = expected["pixel_values"].numpy()
    if "spatial_shapes" in expected:
        np.testing.assert_allclose(batch.images.patches, pixels, atol=1e-5)
        np.testing.assert_array_equal(batch.images.segment_ids > 0, expected["pixel_attention_mask"])
        np.testing.assert_array_equal(batch.images.sizes[:, 0], expected["spatial_shapes"])
    else:
        np.testing.assert_allclose(batch.images, pixels.transpose(0, 2, 3, 1), atol=1e-5)
    with torch.no_grad():
        logits = model(**{**expected, "attention_mask": None}).logits_per_image.numpy()
    found = np.asarray(ours.logits(batch))
    assert found.shape == (len(images), len(TEXTS)) and found.dtype == np.float32
    assert np.abs(found - logits).max() <= 1e-4 * np.abs(logits).max()


def test_zero_shot_classification(towers):
    """Class embeddings and accuracy in three lines compared with their towers."""
    processor, model, ours = towers
    names, templates, images = ["dog", "brown fox", "world"], ["a photo of the {}.", "the {}"], pictures(4)
    classes = class_embeddings(ours.encode_texts, names, templates, batch_size=6)
    features = ours.encode_images(images)
    accuracy = top_k_accuracy(features, classes, np.array([0, 1, 2, 0]))

    prompts = [template.format(name) for name in names for template in templates]
    with torch.no_grad():
        texts = model.get_text_features(official(processor, texts=prompts)["input_ids"])
        shown = model.get_image_features(**official(processor, images))
    texts, shown = (getattr(part, "pooler_output", part) for part in (texts, shown))
    np.testing.assert_allclose(features, shown, atol=1e-4 * float(shown.abs().max()))
    means = torch.nn.functional.normalize(texts, dim=-1).reshape(3, 2, -1).mean(1)
    means = torch.nn.functional.normalize(means, dim=-1)
    np.testing.assert_allclose(classes, means, atol=1e-5)
    assert accuracy == float(((shown @ means.T).argmax(-1) == torch.tensor([0, 1, 2, 0])).float().mean())


def test_texts_of_the_first_files_of_clip(tmp_path):
    """`vocab.json` and `merges.txt`, without a `tokenizer.json`."""
    theirs, _, _ = clip(tmp_path)
    state = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(state["model"]["vocab"]))
    lines = ["#version: 0.2", *(pair if isinstance(pair, str) else " ".join(pair) for pair in state["model"]["merges"])]
    (tmp_path / "merges.txt").write_text("\n".join(lines))
    texts = [*TEXTS, "don't STOP <|endoftext|> it", "", "tab\there"]
    found = vlm_jax.from_pretrained(tmp_path).processor(texts=texts).tokens
    np.testing.assert_array_equal(found, official(theirs, texts=texts)["input_ids"])


def test_case_is_lowered_where_gemmas_tokenizer_keeps_it(tmp_path):
    """The first files of SigLIP 2 name Gemma's tokenizer, which reads case; the towers were trained without."""
    _, _, ours = siglip2(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "GemmaTokenizer"}))
    again = vlm_jax.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.processor(texts=TEXTS).tokens, ours.processor(texts=TEXTS).tokens)


@pytest.mark.parametrize("resample", [2, 3])
def test_a_classifier(tmp_path, resample):
    names = {0: "tench", 1: "goldfish", 2: "great white shark"}
    config = transformers.ViTConfig(**BLOCKS, image_size=16, patch_size=4, id2label=names)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, resample=resample)
    _, model, ours = saved(tmp_path, processor, transformers.ViTForImageClassification(config))
    images = pictures(len(SIZES))
    expected = processor(images, return_tensors="pt")
    batch = ours.processor(images=images)
    np.testing.assert_allclose(batch.images, expected["pixel_values"].numpy().transpose(0, 2, 3, 1), atol=1e-5)
    with torch.no_grad():
        logits = model(**expected).logits.numpy()
    found = np.asarray(ours.logits(batch))
    assert np.abs(found - logits).max() <= 1e-4 * np.abs(logits).max()
    assert [ours.labels[row.argmax()] for row in found] == [model.config.id2label[row.argmax()] for row in logits]
    with pytest.raises(UnsupportedError, match="has no conversations"):
        ours.generate([{"role": "user", "content": "What?"}], max_new_tokens=1)
    with pytest.raises(PretrainedError, match="not a two-tower model"):
        ours.encode_texts(["a"])


def test_towers_alone(tmp_path):
    """A tower of its own takes what it reads, and says so of the other."""
    _, model, _ = clip(tmp_path / "whole")
    for part, folder in ((model.vision_model, tmp_path / "vision"), (model.text_model, tmp_path / "text")):
        part.save_pretrained(folder)
        for name in ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
            if (tmp_path / "whole" / name).exists():
                (folder / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    vision, text = (vlm_jax.from_pretrained(tmp_path / name) for name in ("vision", "text"))
    whole = vlm_jax.from_pretrained(tmp_path / "whole").processor(pictures(2), TEXTS)
    np.testing.assert_array_equal(vision.processor(pictures(2)).images, whole.images)
    np.testing.assert_array_equal(text.processor(texts=TEXTS).tokens, whole.tokens)
    with pytest.raises(ValueError, match="takes no texts"):
        vision.processor(texts=TEXTS)
    with pytest.raises(ValueError, match="takes no images"):
        text.processor(pictures(1))


def test_pictures_where_nothing_fills_texts_up(tmp_path):
    """A tokenizer without a pad token is a matter of texts alone."""
    _, _, ours = siglip2_fixed(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "pad_token"}))
    again = vlm_jax.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again.processor(pictures(1)).images, ours.processor(pictures(1)).images)
    with pytest.raises(TokenizerError, match=r"1 texts cannot be encoded: .*expected a pad_token"):
        again.processor(texts=["a"])


def vit(folder):
    config = transformers.ViTConfig(**BLOCKS, image_size=16, patch_size=4)
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
    return saved(folder, processor, transformers.ViTForImageClassification(config))


@pytest.mark.parametrize("made", [clip, vit], ids=lambda made: made.__name__)
def test_the_size_asked_for_at_load_is_that_of_the_pictures(tmp_path, made):
    """A middle is cut from as much of an image as before; what is written says so to both."""
    processor, _, _ = made(tmp_path / "released")
    ours = vlm_jax.from_pretrained(tmp_path / "released", image_size=32)
    image_processor = getattr(processor, "image_processor", processor)
    tile = {"height": 32, "width": 32}
    size = {"size": {"shortest_edge": 40}, "crop_size": tile} if made is clip else {"size": tile}
    expected = image_processor(pictures(4), return_tensors="np", **size)["pixel_values"].transpose(0, 2, 3, 1)
    found = ours.processor(pictures(4)).images
    np.testing.assert_allclose(found, expected, atol=1e-5)
    ours.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(vlm_jax.from_pretrained(tmp_path / "saved").processor(pictures(4)).images, found)
    again = type(image_processor).from_pretrained(tmp_path / "saved")
    expected = again(pictures(4), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, expected, atol=1e-5)
