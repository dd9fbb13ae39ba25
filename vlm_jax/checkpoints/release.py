"""What a release is to this package: its tensors, its rules, and the files of its folder; it knows no model."""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_jax.checkpoints.hub import Checkpoint, CheckpointFileError
from vlm_jax.checkpoints.params import export_params, import_params
from vlm_jax.checkpoints.rules import Rule, matcher, matching
from vlm_jax.checkpoints.saving import check_vacant, copy_companions, save_archive, save_checkpoint


@dataclasses.dataclass(frozen=True)
class Release:
    """A released checkpoint in terms of this package.

    Attributes:
      config: the released settings, in the schema of the release.
      checkpoint: the released tensors, read when they are asked for.
      folder: where they lie, with the files of the tokenizer and the processor.
      rules: which released tensors make which parameters; targets are paths in `params`.
      ignore: regular expressions for whole released keys that the model has no use for; carried along unread and
        written back.
      drawn: parts of the model that are not the release's, in whose stead its own have no use.
    """

    config: Mapping[str, Any]
    checkpoint: Checkpoint
    folder: Path
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    drawn: tuple[str, ...] = ()

    def without(self, *parts: str) -> "Release":
        """The release whose `parts` are replaced by others that it does not know."""
        lost = [rule for rule in self.rules if any(_of_part(target, parts) for target in rule.targets)]
        patterns = tuple(matcher(source).pattern for rule in lost for source in rule.sources)
        kept = tuple(rule for rule in self.rules if rule not in lost)
        drawn = tuple(dict.fromkeys((*self.drawn, *parts)))
        return dataclasses.replace(self, rules=kept, ignore=(*self.ignore, *patterns), drawn=drawn)

    def read(self, targets: Mapping[str, Any]) -> dict[str, Any]:
        """The parameters of all parts that are the release's.

        Args:
          targets: {part: tree of `jax.ShapeDtypeStruct`}; one without a sharding goes to the default device.

        Raises:
          CheckpointMismatch: unused, missing and misshapen keys, all in one message.
        """
        own = {part: tree for part, tree in targets.items() if part not in self.drawn}
        return import_params(self.rules, self.checkpoint, own, ignore=self.ignore)

    def save(
        self,
        folder: str | os.PathLike[str],
        params: Mapping[str, Any],
        *,
        finish: Callable[[Path], None] = lambda folder: None,
    ) -> tuple[Path, ...]:
        """Writes config and weights under the released names, and the files of tokenizer and processor.

        Args:
          folder: made if need be; must not hold a checkpoint.
          params: {part: tree}.
          finish: changes the companions of the written folder before its weights are written.

        Returns:
          The files written.

        Raises:
          CheckpointFileError: the folder holds a checkpoint already, or a part has no name in the released schema.
          CheckpointMismatch: `params` do not have the release's shapes.
        """
        if self.drawn:
            raise CheckpointFileError(
                f"{folder}: the released schema has no names for the {' and the '.join(self.drawn)} that replaced the "
                "release's own; save the parameters as a run does, or load the release without the replacement"
            )
        tensors: dict[str, Any] = export_params(self.rules, params)
        for key, tensor in self.checkpoint.items():
            if key not in tensors and matching(self.ignore, key):
                tensors[key] = tensor  # read when its shard is written
        folder = Path(folder)
        check_vacant(folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "config.json"
        path.write_text(json.dumps(self.config, indent=2) + "\n", encoding="utf-8")
        companions = copy_companions(self.folder, folder)
        finish(folder)
        save = save_archive if self.checkpoint.archive else save_checkpoint  # last: with weights a folder is whole
        return (path, *map(Path, companions), *save(folder, tensors))


def _of_part(target: str, parts: Sequence[str]) -> bool:
    return re.match(rf"({'|'.join(map(re.escape, parts))})/", target) is not None
