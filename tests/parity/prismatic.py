"""Prismatic of transformers' parts, saved under the names of timm: two towers or one, projector and Llama.

The release's code is not in transformers, and asks for a timm of another torch. Its rules are here: features of the
second-to-last block, images after the start token, each resized by torchvision and normalised for every tower.
"""

import itertools
import json
import re
import types

import numpy as np
import torch
import torchvision.transforms.functional as tvf
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersEmbeddings

import vlm_jax

from .processors import tokenizer
from .systems import TEXT, randomised

SIDE, PATCH, REGISTERS, WIDTH, DEPTH = 20, 4, 3, 16, 3
COUNT = (SIDE // PATCH) ** 2
PLACE = 259  # of an image's tokens: <unk>, which the tokenizer adds
SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
FEATURIZERS = ("featurizer", "fused_featurizer")
MEANS = ([0.484375, 0.455078125, 0.40625], [0.5, 0.5, 0.5])
STDS = ([0.228515625, 0.2236328125, 0.224609375], [0.5, 0.5, 0.5])
# Fields of our ViT for the names that the config gives to the towers.
_FIELDS = {"width": WIDTH, "depth": DEPTH, "num_heads": 2, "patch_size": PATCH, "activation": "gelu"}
REGISTRY = {
    "dinov2": {**_FIELDS, "mlp_dim": 32, "class_token": True, "num_registers": REGISTERS, "layer_scale": 1e-5},
    "siglip": {**_FIELDS, "mlp_dim": 24},
}
# Names of transformers -> of timm, in order; then query, key and value are joined.
DINOV2 = (
    (r"^embeddings\.cls_token", "cls_token"),
    (r"^embeddings\.register_tokens", "reg_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
    (r"^encoder\.layer\.", "blocks."),
    (r"attention\.q_proj", "attn.query"),
    (r"attention\.k_proj", "attn.key"),
    (r"attention\.v_proj", "attn.value"),
    (r"attention\.o_proj", "attn.proj"),
    (r"layer_scale(\d)\.lambda1", r"ls\1.scale_factor"),
    (r"^layernorm", "norm"),
)
SIGLIP = (
    (r"^(vision_model\.)?embeddings\.patch_embedding", "patch_embed.proj"),
    (r"^(vision_model\.)?embeddings\.position_embedding\.weight", "pos_embed"),
    (r"^(vision_model\.)?encoder\.layers\.", "blocks."),
    (r"self_attn\.q_proj", "attn.query"),
    (r"self_attn\.k_proj", "attn.key"),
    (r"self_attn\.v_proj", "attn.value"),
    (r"self_attn\.out_proj", "attn.proj"),
    (r"layer_norm(\d)", r"norm\1"),
    (r"^(vision_model\.)?post_layernorm", "norm"),
)


class Embeddings(Dinov2WithRegistersEmbeddings):
    """Without a position of the class token, which timm's has none of: a row of the table is not used."""

    def interpolate_pos_encoding(self, embeddings, height, width):
        found = super().interpolate_pos_encoding(embeddings, height, width)
        return torch.cat([torch.zeros_like(found[:, :1]), found[:, 1:]], dim=1)


def dinov2():
    sizes = {**SIZES, "mlp_ratio": 2, "num_register_tokens": REGISTERS}
    model = transformers.Dinov2WithRegistersModel(transformers.Dinov2WithRegistersConfig(**sizes))
    model.embeddings.__class__ = Embeddings
    model.embeddings.mask_token = None
    return model


def siglip():
    sizes = {**SIZES, "intermediate_size": 24, "vision_use_head": False, "hidden_act": "gelu"}
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes))


def renamed(state, rules):
    """A tower's tensors under the names and in the shapes of timm."""
    found = {}
    for key, value in state.items():
        for pattern, name in rules:
            key = re.sub(pattern, name, key)
        if key == "pos_embed":
            value = value[None] if value.ndim == 2 else value[:, 1:]
        found[key] = value
    for key in [key for key in found if ".attn.query." in key]:
        parts = [found.pop(key.replace("query", name)) for name in ("query", "key", "value")]
        found[key.replace("query", "qkv")] = torch.cat(parts)
    return found


def restored(tensors, state, rules):
    """The inverse of `renamed`, for a module with this state."""
    found = {}
    for key, own in state.items():
        name = key
        for pattern, ours in rules:
            name = re.sub(pattern, ours, name)
        if kind := re.search(r"\.attn\.(query|key|value)\.", name):
            whole = tensors[name.replace(kind.group(1), "qkv")]
            value = whole.chunk(3)[("query", "key", "value").index(kind.group(1))]
        elif name == "pos_embed":
            value = tensors[name][0]
            value = value if value.shape == own.shape else torch.cat([torch.zeros_like(value[:1]), value])[None]
        else:
            value = tensors[name]
        found[key] = value.reshape(own.shape)
    return found


class Prismatic(nn.Module):
    """The model, with the methods of one of transformers that the tests of systems call."""

    def __init__(self, text, towers=("dinov2", "siglip")):
        super().__init__()
        self.names, self.text = towers, text
        made = {"dinov2": dinov2, "siglip": siglip}
        self.towers = nn.ModuleList([made[name]() for name in towers])
        width, out = WIDTH * len(towers), text["hidden_size"]
        sizes = (width, 4 * width, out, out) if len(towers) == 2 else (width, out, out)
        self.projector = nn.ModuleList([nn.Linear(*pair) for pair in itertools.pairwise(sizes)])
        self.language_model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**text))
        self.generation_config = self.language_model.generation_config
        self.config = types.SimpleNamespace(model_type="prismatic")

    def visual_tokens(self, pixel_values):
        found = []
        for number, tower in enumerate(self.towers):
            pixels = pixel_values[:, 3 * number : 3 * number + 3]
            hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
            found.append(hidden[:, 1 + REGISTERS :] if self.names[number] == "dinov2" else hidden)
        x = torch.cat(found, dim=2)
        for layer in self.projector[:-1]:
            x = nn.functional.gelu(layer(x))
        return self.projector[-1](x)

    def embedded(self, input_ids, pixel_values, attention_mask):
        """Images directly after the start token, which padding may precede."""
        x, tokens = self.language_model.get_input_embeddings()(input_ids), []
        if pixel_values is not None:
            tokens = list(self.visual_tokens(pixel_values))
        rows = []
        for row, ids, mask in zip(x, input_ids, attention_mask, strict=True):
            start, count = int(mask.argmax()) + 1, int((ids == PLACE).sum())
            whole = torch.cat([*tokens[: count // COUNT], row[:0]])
            tokens = tokens[count // COUNT :]
            rows.append(torch.cat([row[:start], whole, row[start + count :]]))
        return torch.stack(rows)

    def forward(self, input_ids, attention_mask=None, pixel_values=None, labels=None):
        x = self.embedded(input_ids, pixel_values, attention_mask)
        return self.language_model(inputs_embeds=x, attention_mask=attention_mask, labels=labels)

    def generate(self, input_ids, attention_mask=None, pixel_values=None, **options):
        x = self.embedded(input_ids, pixel_values, attention_mask)
        new = self.language_model.generate(inputs_embeds=x, attention_mask=attention_mask, **options)
        return torch.cat([input_ids, new], dim=1)

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def settings(self):
        count = len(self.names)
        return {
            "model_type": "prismatic",
            "vision_backbone_id": "tiny",
            "llm_backbone_id": "llama2-7b-pure",
            "use_fused_vision_backbone": count == 2,
            "timm_model_ids": list(self.names),
            "timm_override_act_layers": [None] * count,
            "image_sizes": [SIDE] * count,
            "text_config": {"model_type": "llama", **self.text},
            "model_registry": REGISTRY,
        }

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        tensors = {f"language_model.{key}": value for key, value in self.language_model.state_dict().items()}
        for number, layer in enumerate(self.projector, 1):
            tensors |= {f"projector.fc{number}.{key}": value for key, value in layer.state_dict().items()}
        for name, part, tower in zip(self.names, FEATURIZERS, self.towers, strict=False):
            own = renamed(tower.state_dict(), DINOV2 if name == "dinov2" else SIGLIP)
            tensors |= {f"vision_backbone.{part}.{key}": value for key, value in own.items()}
        save_file({key: value.contiguous().clone() for key, value in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.settings()))

    @classmethod
    def from_pretrained(cls, folder, output_loading_info=False):
        config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
        text = {key: value for key, value in config["text_config"].items() if key != "model_type"}
        model, expected = cls(text, tuple(config["timm_model_ids"])), set(tensors)
        model.language_model.load_state_dict(_after(tensors, "language_model."))
        for number, layer in enumerate(model.projector, 1):
            layer.load_state_dict(_after(tensors, f"projector.fc{number}."))
        for name, part, tower in zip(model.names, FEATURIZERS, model.towers, strict=False):
            own = _after(tensors, f"vision_backbone.{part}.")
            tower.load_state_dict(restored(own, tower.state_dict(), DINOV2 if name == "dinov2" else SIGLIP))
        model.save_pretrained(folder / "again")
        written = set(load_file(folder / "again" / "model.safetensors"))
        report = {"missing_keys": written - expected, "unexpected_keys": expected - written, "mismatched_keys": ()}
        return (model.eval(), report) if output_loading_info else model.eval()


def _after(tensors, prefix):
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


class PrismaticProcessor:
    """The release's processor: pixels of all towers by torchvision, and the prompts of its scripts."""

    chat_template = "In: …"  # stated, so that conversations are rendered

    def __init__(self, strategy="resize-naive", towers=2):
        self.tokenizer, self.strategy, self.count = tokenizer("<unk>"), strategy, towers
        self.image_processor = self
        self.tokenizer.add_special_tokens({"unk_token": "<unk>"})

    def apply_chat_template(self, messages, add_generation_prompt=False):
        """`PurePromptBuilder`, with a mark for every image, which are all before the text."""
        written, marks = "", ""
        for message in messages:
            items = message["content"]
            marks += "<image>" * sum(item["type"] == "image" for item in items)
            text = "".join(item["text"] for item in items if item["type"] == "text").strip()
            written += f"In: {text}\nOut: " if message["role"] == "user" else f"{text or ' '}</s>"
        return marks + written.rstrip()

    def pixels(self, image):
        image = image.convert("RGB")
        size = [SIDE, SIDE] if self.strategy == "resize-naive" else SIDE
        if self.strategy == "letterbox":
            across, down = (int((max(image.size) - side) / 2) for side in image.size)
            fill = tuple(int(x * 255) for x in MEANS[-1])
            image = tvf.pad(image, (across, down, across, down), fill=fill, padding_mode="constant")
        image = tvf.resize(image, size, interpolation=tvf.InterpolationMode.BICUBIC, antialias=True)
        image = tvf.to_tensor(tvf.center_crop(image, [SIDE, SIDE]))
        stacked = zip(MEANS[-self.count :], STDS[-self.count :], strict=True)
        return torch.vstack([tvf.normalize(image, mean, std) for mean, std in stacked])

    def __call__(self, images=None, text=(), return_tensors="np", add_special_tokens=True, padding=False, **options):
        assert self.tokenizer.unk_token_id == PLACE
        rows = []
        for one in text:
            ids = self.tokenizer(one.replace("<image>", ""))["input_ids"]
            rows.append([*ids[:1], *[PLACE] * (COUNT * one.count("<image>")), *ids[1:]])
        longest = max(map(len, rows))
        ids = [[*row, *[self.tokenizer.pad_token_id] * (longest - len(row))] for row in rows]
        mask = [[*[1] * len(row), *[0] * (longest - len(row))] for row in rows]
        found = {"input_ids": np.array(ids), "attention_mask": np.array(mask)}
        flat = [image for row in images or () for image in row]
        if flat:
            found["pixel_values"] = np.stack([self.pixels(image).numpy() for image in flat])
        return found if return_tensors == "np" else {key: torch.from_numpy(value) for key, value in found.items()}

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        means, stds = MEANS[-self.count :], STDS[-self.count :]
        settings = {
            "image_processor_type": "PrismaticImageProcessor",
            "image_resize_strategy": self.strategy,
            "input_sizes": [[3, SIDE, SIDE]] * self.count,
            "interpolations": ["bicubic"] * self.count,
            "means": [[0.485, 0.456, 0.406], [0.5] * 3][-self.count :],
            "stds": [[0.229, 0.224, 0.225], [0.5] * 3][-self.count :],
            "tvf_do_letterbox": self.strategy == "letterbox",
            "tvf_letterbox_fill": [127] * 3 if self.strategy == "letterbox" else None,
            "tvf_normalize_params": [{"inplace": False, "mean": m, "std": s} for m, s in zip(means, stds, strict=True)],
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(settings))


def prismatic(folder, strategy="resize-naive", towers=("dinov2", "siglip")):
    """The processor, the model, and ours from their folder."""
    processor = PrismaticProcessor(strategy, len(towers))
    model = Prismatic({**TEXT, "vocab_size": len(processor.tokenizer)}, towers)
    model = randomised(model)
    processor.save_pretrained(folder)
    model.save_pretrained(folder)
    return processor, model, vlm_jax.from_pretrained(folder)
