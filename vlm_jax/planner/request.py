"""Asking for a plan: from a config, a slice and a stage to the finished plan, made or kept."""

import contextlib
import dataclasses
import hashlib
import pathlib
from collections.abc import Callable
from typing import Any, Literal

from vlm_jax.config import ConfigError, RunConfig, parse, plain
from vlm_jax.paths import absolute
from vlm_jax.planner.inference import inference_work
from vlm_jax.planner.kept import kept_plan
from vlm_jax.planner.plan import Plan, compile_plan
from vlm_jax.planner.settings import planned
from vlm_jax.planner.topology import Topology, open_topology
from vlm_jax.planner.training import training_work
from vlm_jax.sharding.mesh import MeshSettings, make_mesh
from vlm_jax.train.step import num_shards
from vlm_jax.types import Fields

Stage = Literal["train", "prefill", "decode"]
# Called with what is compiled; the context lasts as long as it takes.
Working = Callable[[str], contextlib.AbstractContextManager[object]]


def quietly(text: str) -> contextlib.AbstractContextManager[object]:
    """A `Working` that says nothing."""
    del text
    return contextlib.nullcontext()


@dataclasses.dataclass(frozen=True)
class Request:
    """What is planned.

    Attributes:
      config: a run's; keys that are None are chosen, see `settings.planned`.
      topology: as `v5p:4x4x4`.
      stage: the last training stage, or a step of generation.
      batch_size: prompts of generation over all devices; of training the stage's own. None for one a shard.
      context: slots of the cache of a row; None for the prompt's length and a quarter.
      pictures: of a row, where `config.row.images` is None.
      quick: for memory alone.
    """

    config: RunConfig
    topology: str
    stage: Stage = "train"
    batch_size: int | None = None
    context: int | None = None
    pictures: int = 1
    quick: bool = False

    def changed(self, **values: Any) -> "Request":
        """The same with other keys of the config, by path with `__` for a dot, or other fields."""
        own = {key: values.pop(key) for key in list(values) if key in {f.name for f in dataclasses.fields(self)}}
        config = self.config.copy_and_resolve_references()
        with config.unlocked():
            for path, value in values.items():
                *sections, key = path.split("__")
                section = config
                for name in sections:
                    section = section[name]
                if key not in section and key != "remat":
                    raise ConfigError(f"config.{path.replace('__', '.')}: the config has no such key")
                section[key] = value
        return dataclasses.replace(self, config=config, **own)

    def asked(self) -> Fields:
        """As JSON types, for the hash of a plan that is kept."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        release = self.config.release
        folder = None if release is None else pathlib.Path(absolute(release))
        return {**given, "config": plain(self.config), "folder": {} if folder is None else _settings_of(folder)}


def _settings_of(folder: pathlib.Path) -> dict[str, str]:
    """Hashes of a release's JSON files: those of the model, its processor and its tokenizer."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.json"))}


def make_plan(request: Request, folder: str | None, working: Working = quietly) -> tuple[Plan, bool]:
    """The plan of a request, and whether it was kept from before.

    Args:
      request: what is planned.
      folder: of finished plans; None keeps none.
      working: shows that a compilation is under way.

    Raises:
      PlanError, ConfigError, InfeasibleBudget: it cannot be made; the message has the fix.
    """
    topology = open_topology(request.topology)

    def make() -> Plan:
        with working(f"{request.stage} on {request.topology}"):
            return _made(request, topology)

    return kept_plan(request.asked(), make, folder)


def _made(request: Request, topology: Topology) -> Plan:
    config, experiment = planned(request.config, len(topology.devices), pictures=request.pictures)
    mesh = make_mesh(parse(MeshSettings, config.mesh, "config.mesh"), topology.devices)
    if request.stage == "train":
        work = training_work(config, experiment, mesh)
    else:
        work = inference_work(
            config,
            experiment,
            mesh,
            stage=request.stage,
            batch_size=request.batch_size or num_shards(mesh),
            context=request.context,
        )
    return compile_plan(work, topology, quick=request.quick)
