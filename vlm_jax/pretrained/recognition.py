"""What a released folder is, before any of its tensors is matched."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from vlm_jax.checkpoints.hub import CheckpointFileError, open_checkpoint, read_config
from vlm_jax.checkpoints.rules import SourceTensor
from vlm_jax.config import read_json
from vlm_jax.pretrained.big_vision_paligemma import MODEL_NAME, is_paligemma
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.released_json import DEPTHS, SECTIONS, check_released
from vlm_jax.types import Config, Fields

ADAPTER = "adapter_config.json"
# Config and weights of a folder of open_clip on the hub; `model.safetensors` beside them has transformers' names.
OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"
# Files beside the weights of older quantised releases -> their method.
QUANTISED_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq", "quantization_config.json": "quantised"}
# Endings of the keys of quantised tensors -> their method.
QUANTISED_KEYS = {
    ".qweight": "gptq or awq",
    ".qzeros": "gptq or awq",
    ".weight_scale": "fp8 or int8",
    ".weight_scale_inv": "fp8",
    ".weight_packed": "compressed-tensors",
    ".SCB": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".weight.absmax": "bitsandbytes",
}


_MAX_LAYERS = 128  # that are built whatever the checkpoint


def recognised(path: Path, config: Config | None) -> tuple[Path, Fields]:
    """The file or folder with the weights of a release, and its settings.

    Args:
      path: of the release: a folder, or a file in it.
      config: its settings; those of its folder when None.

    Raises:
      PretrainedError: it is an adapter, quantised, or of another format; the message has the way on.
      CheckpointFileError: no config, or one with values of another form.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / ADAPTER).exists():
        base = read_json(folder / ADAPTER, CheckpointFileError).get("base_model_name_or_path")
        raise PretrainedError(
            f"{folder}: an adapter of '{base}', not a model; load it with from_pretrained('{base}', adapter='{folder}')"
        )
    if path.suffix == ".gguf" or (path.is_dir() and _only_gguf(folder)):
        raise PretrainedError(
            f"{path}: GGUF files are not read; load the release's safetensors, or convert it once: "
            "AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(NEW) of transformers"
        )
    if config is None and (config := _told_by_names(path)) is None:
        own = (folder / "config.json").exists() or not (folder / OPEN_CLIP_CONFIG).exists()
        config = read_config(folder) if own else read_config(folder, name=OPEN_CLIP_CONFIG)
        if not own and path.is_dir() and (folder / OPEN_CLIP_WEIGHTS).exists():
            path = folder / OPEN_CLIP_WEIGHTS
    else:
        check_released(config, "config", PretrainedError)
    _check_plain(config, folder)
    return path, dict(config)


def check_tensors(config: Config, checkpoint: Mapping[str, SourceTensor], folder: Path) -> None:
    """Checks a config against the checkpoint's tensors, before anything of its size is built.

    Raises:
      PretrainedError: quantised tensors, or more layers than the checkpoint can have.
    """
    for ending, method in QUANTISED_KEYS.items():
        if key := next((key for key in checkpoint if key.endswith(ending)), None):
            raise _quantised(folder, f"{method}: it has {key}")
    # A layer is a tensor or more, or one row of tensors that stack all layers. Files of a part have fewer tensors.
    rows = (tensor.shape[0] for tensor in checkpoint.values() if len(tensor.shape) > 1)
    most = max(_MAX_LAYERS, len(checkpoint), max(rows, default=0) if config.get("model_name") else 0)
    for name, depth in _depths(config, ""):
        if depth > most:
            raise PretrainedError(
                f"{folder}: config.json: {name}: expected at most {most} layers, for a checkpoint of {len(checkpoint)} "
                f"tensors, got {depth}"
            )


def _told_by_names(path: Path) -> Fields | None:
    """The config of an `.npz` of PaliGemma, which is released without one; None for what has a config, or needs it.

    Raises:
      CheckpointFileError: an `.npz` of another model without a config.
    """
    folder = path if path.is_dir() else path.parent
    if any((folder / name).exists() for name in ("config.json", OPEN_CLIP_CONFIG)):
        return None
    if path.suffix != ".npz" and not any(one.suffix == ".npz" for one in folder.iterdir()):
        return None
    checkpoint = open_checkpoint(path)
    if not checkpoint.archive:
        return None
    if is_paligemma(checkpoint):
        return {"model_name": MODEL_NAME}
    raise CheckpointFileError(
        f"{folder / 'config.json'}: no such file, and the names of {Path(checkpoint.origin).name} are not those of "
        "PaliGemma, the only .npz that needs none; write the release's settings to it, or pass config="
    )


def _check_plain(config: Config, folder: Path) -> None:
    """Raises for a config of quantised weights."""
    for section in (config, *(config[name] for name in SECTIONS if isinstance(config.get(name), Mapping))):
        for key in ("quantization_config", "compression_config"):
            if isinstance(found := section.get(key), Mapping) and found:
                method = found.get("quant_method") or found.get("quant_algo") or "by an unnamed method"
                if not found.get("quant_method") and (found.get("load_in_4bit") or found.get("load_in_8bit")):
                    method = "bitsandbytes"
                raise _quantised(folder, str(method))
    for name, method in QUANTISED_FILES.items():
        if (folder / name).exists():
            raise _quantised(folder, f"{method}, by its {name}")


def _quantised(folder: Path, method: str) -> PretrainedError:
    return PretrainedError(
        f"{folder}: its weights are quantised ({method}), which is not read; load the release that is not quantised, "
        "or save it dequantised once: from_pretrained(FOLDER).dequantize().save_pretrained(NEW) of transformers"
    )


def _only_gguf(folder: Path) -> bool:
    suffixes = {path.suffix for path in folder.iterdir()}
    return ".gguf" in suffixes and suffixes.isdisjoint((".safetensors", ".npz"))


def _depths(config: Config, path: str) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if key in DEPTHS and isinstance(value, int):
            yield f"{path}{key}", value
        elif (key in SECTIONS or key == "width") and isinstance(value, Mapping):
            yield from _depths(value, f"{path}{key}.")
