"""What messages tell a user to set or to pass exists: every key of a config and every flag that a text names."""

import pathlib
import re

import vlm_jax
from vlm_jax.adapter import LoraSettings
from vlm_jax.build.image_text import CaptionSettings, Similarity
from vlm_jax.build.sections import KEYS, PROCESSORS, SECTIONS, TOWERS
from vlm_jax.build.settings import EvaluationSettings, ProcessorSettings, RowSettings
from vlm_jax.config import keys_of
from vlm_jax.connectors import CONNECTORS
from vlm_jax.data import SOURCES
from vlm_jax.decoders import DECODERS
from vlm_jax.encoders import COMPOSITE_ENCODERS, ENCODERS, PACKED_ENCODERS
from vlm_jax.evals.classification import ClassificationSettings
from vlm_jax.evals.pairs import PairSettings
from vlm_jax.optim.adamw import OptimizerSettings
from vlm_jax.pretrained.configured import ReleaseProcessorSettings
from vlm_jax.reducers import REDUCERS
from vlm_jax.sharding.mesh import MeshSettings
from vlm_jax.sweep.points import SweepSettings
from vlm_jax.train.objectives import OBJECTIVES
from vlm_jax.train.settings import LoopSettings
from vlm_jax.train.stages import Stage

from ..advice import messages

CLASSES = {
    "data": SOURCES.values(),
    "row": (RowSettings, CaptionSettings),
    "processor": (*PROCESSORS.values(), ProcessorSettings, ReleaseProcessorSettings),
    "encoder": (*ENCODERS.values(), *COMPOSITE_ENCODERS.values(), *PACKED_ENCODERS.values()),
    "reducer": REDUCERS.values(),
    "connector": (*CONNECTORS.values(), Similarity),
    "decoder": (*DECODERS.values(), *TOWERS.values()),
    "lora": (LoraSettings,),
    "optimizer": (OptimizerSettings,),
    "loop": (LoopSettings,),
    "mesh": (MeshSettings,),
    "evaluation": (EvaluationSettings, PairSettings, ClassificationSettings),
    "sweep": (SweepSettings,),
}
KNOWN = {
    section: {"kind", *(key for cls in classes if cls for key in keys_of(cls))} for section, classes in CLASSES.items()
}
KNOWN["stages"] = {key for cls in (Stage, *OBJECTIVES.values()) for key in keys_of(cls)}
OUTSIDE = {"base", "candidates", "sweep", "json"}  # the parts of a sweep's config; the file config.json


def test_every_key_of_a_config_that_a_text_names_exists():
    assert set(CLASSES) | {"stages"} == {*SECTIONS, "sweep"}
    named, wrong = set(), []
    for file, text in messages():
        for path in re.findall(r"(?<![\w./-])config\.([a-z_]+(?:\.[a-z_]+)*)", text):
            first, *rest = path.split(".")
            named.add(path)
            if first in OUTSIDE:
                continue
            if first not in KEYS or (
                rest and first in KNOWN and not any(key.startswith(rest[0]) for key in KNOWN[first])
            ):
                wrong.append(f"{file}: config.{path}")
    assert not wrong and len(named) > 40


def test_every_flag_that_a_text_names_exists():
    flags = {"help", "flagfile", "head", "xla_force_host_platform_device_count"}  # the last two of `ray start` and XLA
    for path in pathlib.Path(vlm_jax.__file__).parent.glob("cli/*.py"):
        found = re.findall(r'(?:DEFINE_\w+|numbers\.define)\(\s*"([\w-]+)"', path.read_text())
        flags |= set(found)
    named = {name for _, text in messages() for name in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)}
    assert len(named) > 15 and named - flags == set()
