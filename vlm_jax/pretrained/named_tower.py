"""Vision towers of LLaVA and MobileVLM, whose config, and mostly also tensors, are in a separate folder."""

from pathlib import Path

from vlm_jax.checkpoints.hub import Checkpoint, CheckpointFileError, fetch, open_checkpoint, read_config
from vlm_jax.config import did_you_mean
from vlm_jax.pretrained.family import PretrainedError
from vlm_jax.pretrained.llava import PREFIX, TOWERS
from vlm_jax.types import Config, Fields

KEY, CONFIG_KEY = "mm_vision_tower", "vision_tower_config"
_OWN = "vision_model."  # prefix of the tensors of CLIP's image tower


def with_named_tower(config: Config, checkpoint: Checkpoint, folder: Path) -> tuple[Fields, Checkpoint]:
    """The config with the tower's config under `vision_tower_config`, and the checkpoint with the tower's tensors.

    The tower is `mm_vision_tower`: a folder, relative to the checkpoint's or the working directory, or a name on
    the hub. Tensors of the checkpoint take precedence over those of the tower's folder; known names need no folder
    for their config. Other releases are returned unchanged.

    Args:
      config: the released config.
      checkpoint: of the same release.
      folder: its folder.

    Raises:
      PretrainedError: the tower is not found, or is not a CLIP; the message has the fix.
    """
    config, name = dict(config), config.get(KEY)
    if name is None:
        return config, checkpoint
    missing = not any(key.startswith(PREFIX) for key in checkpoint)
    known = CONFIG_KEY in config or name in TOWERS
    if known and not missing:
        return config, checkpoint
    place = _place(str(name), folder, missing=missing, where=str(config.get("model_type")))
    if not known:
        config[CONFIG_KEY] = _vision_section(read_config(place), place)
    if missing:
        tower = open_checkpoint(place)
        found = {PREFIX + key.removeprefix(_OWN): tensor for key, tensor in tower.items() if key.startswith(_OWN)}
        if not found:
            raise PretrainedError(
                f"{tower.origin}: expected the image tower of a CLIP, with tensors named {_OWN}…, got "
                f"{', '.join(list(tower)[:3]) or 'none'}, …"
            )
        checkpoint = Checkpoint({**checkpoint, **found}, checkpoint.origin, archive=checkpoint.archive)
    return config, checkpoint


def _place(name: str, folder: Path, *, missing: bool, where: str) -> Path:
    """The tower's folder."""
    for path in (folder / name, Path(name)):
        if path.is_dir():
            return path
    try:
        return fetch(name)
    except CheckpointFileError as error:
        lacks = "tensors" if missing else "config"
        raise PretrainedError(
            f"{where}.{KEY}: the checkpoint has no {lacks} of its vision tower, and '{name}' is not a folder "
            f"in {folder} or here, and not on the hub{did_you_mean(name, TOWERS)}. Download the tower and set {KEY} to "
            f"its folder ({error})"
        ) from error


def _vision_section(config: Config, place: Path) -> Fields:
    """The vision config of a full CLIP, or of its image tower."""
    if config.get("model_type") == "clip_vision_model":
        return dict(config)
    if config.get("model_type") == "clip":
        return {**(config.get("vision_config") or {}), **(config.get("vision_config_dict") or {})}
    raise PretrainedError(f"{place}: expected a config of clip or clip_vision_model, got {config.get('model_type')!r}")
