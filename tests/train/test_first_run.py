"""The keys that a first run leaves to the data, the release and the devices."""

import json

import jax
import pytest
from PIL import Image

from configs import finetune, finetune_towers
from tests.contracts import releases
from vlm_jax.build import build
from vlm_jax.config import ConfigError, plain
from vlm_jax.train import finetuning
from vlm_jax.train.first_run import as_before, completed, is_incomplete
from vlm_jax.train.input import rows
from vlm_jax.train.stages import parse_schedule

from ..advice import tried

NUM_SAMPLES = 50


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    releases.make("llava", folder)
    Image.new("RGB", (24, 16), "red").save(folder / "red.png")
    records = [
        {
            "id": number,
            "image": ["red.png"] * (number % 3),
            "conversations": [
                {"from": "human", "value": "<image>" * (number % 3) + "w" * (number + 1)},
                {"from": "gpt", "value": "a"},
            ],
        }
        for number in range(NUM_SAMPLES)
    ]
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def config_of(folder, **values):
    config = finetuning.get_config()
    config.release, config.data.train_path = str(folder), str(folder / "train.json")
    for path, value in values.items():
        *sections, key = path.split(".")
        section = config
        for name in sections:
            section = section[name]
        section[key] = value
    return config


def test_every_row_holds_its_samples_and_none_of_the_evaluation(folder):
    config, chosen = completed(config_of(folder))
    assert config.data.held_out == 3 and chosen["config.data.held_out"] == 3  # 5%, rounded up
    assert config.dtype == config.param_dtype == "float32"
    assert (config.encoder.remat, config.decoder.remat) == ("full", "dots")
    experiment = build(config)
    source = experiment.open_source()
    asked = {sample.sample_id.rpartition(":")[2] for sample in source.evaluation(0)}
    ((records, _),) = source.trained.values()
    learned = {records[number].sample_id.rpartition(":")[2] for number in range(len(records))}
    assert len(asked) == 3 and asked | learned == {str(number) for number in range(NUM_SAMPLES)} and not asked & learned

    processor = experiment.system.processor
    lengths = []
    for number in range(len(records)):
        sample = records[number]
        batch = processor.batch([sample.messages], [list(sample.images)], targets=True)
        lengths.append(int((batch.segment_ids > 0).sum()))
    assert max(lengths) <= config.row.length < 9 * max(lengths)
    (span,) = parse_schedule(config.schedule, config.stages)
    made = rows(experiment, span.stage, config.seed)
    counts = [int(made[number].segment_ids.max()) for number in range(12)]
    per_row = sum(counts) / len(counts)
    assert 0.8 * config.row.length < sum(lengths) / len(lengths) * per_row <= config.row.length
    assert span.stage.steps == 100 and span.stage.warmup_steps == 3
    assert span.stage.batch_size == jax.device_count()  # at least a row each


def test_epochs_are_counted_and_what_is_given_stays(folder):
    given = {"stages.instruction.batch_size": 2, "row.length": 512, "row.pack": False, "data.held_out": 10}
    config, chosen = completed(config_of(folder, **given), epochs=3.0)
    assert config.stages.instruction.steps == 60  # 3 times 40 samples, 2 a step
    assert config.row.images == 2 and config.row.length == 512
    assert not {f"config.{path}" for path in given} & set(chosen)
    rates = set(config.stages.instruction.learning_rates.values())
    assert rates == {2e-3}  # the highest, for a model so small
    assert completed(config) == (config, {})


def test_adapters_learn_alone_unless_rates_are_given(folder):
    adapters = {"lora.rank": 2, "lora.target": ("decoder/*/attention",)}
    config, _ = completed(config_of(folder, **adapters))
    assert config.stages.instruction.learning_rates.to_dict() == {"lora": 2e-3}
    assert {path.split("/")[0] for path in build(config).trained} == {"lora"}
    config, _ = completed(config_of(folder, **adapters, **{"stages.instruction.learning_rates.connector": 1e-4}))
    assert config.stages.instruction.learning_rates.to_dict() == {"connector": 1e-4, "lora": 2e-3}


def test_a_run_without_data_is_refused(folder):
    with pytest.raises(ConfigError, match=tried("expected the file to train on, got None; pass --data=FILE")):
        completed(config_of(folder, **{"data.train_path": None}))
    assert completed(config_of(folder))[0].data.train_path  # as --data sets it
    with pytest.raises(ConfigError, match=r"config\.data\.held_out: expected fewer than the 50 records"):
        build(completed(config_of(folder, **{"data.held_out": 50}))[0]).open_source()


def test_the_configs_of_releases_leave_nothing_to_choose():
    config = finetune.get_config()
    assert not is_incomplete(config) and not is_incomplete(finetune_towers.get_config())
    (span,) = parse_schedule(config.schedule, config.stages)
    # Liu et al. 2023, table 9.
    assert (span.stage.batch_size, dict(span.stage.learning_rates)) == (128, {"connector": 2e-5, "decoder": 2e-5})


def test_a_run_that_resumes_on_other_devices_keeps_its_sizes(folder):
    meshes = [{"mesh.fsdp": fsdp, "mesh.tensor": 8 // fsdp} for fsdp in (8, 1)]
    first, other = (plain(completed(config_of(folder, **mesh))[0]) for mesh in meshes)
    assert [one["stages"]["instruction"]["batch_size"] for one in (first, other)] == [8, 1]
    resumed = plain(completed(as_before(config_of(folder, **meshes[1]), first))[0])
    assert {**resumed, "mesh": None} == {**first, "mesh": None} != {**other, "mesh": None}
    given = config_of(folder, **meshes[1], **{"stages.instruction.batch_size": 4})
    assert as_before(given, first).stages.instruction.batch_size == 4
