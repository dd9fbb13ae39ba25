"""What the log says of a run: tokens, rates, FLOPs, compilations, event files, traces."""

import contextlib
import logging
import pathlib
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vlm_jax.build import build
from vlm_jax.config import ConfigError
from vlm_jax.train import watch, writers
from vlm_jax.train.loop import Trainer
from vlm_jax.train.stages import parse_schedule
from vlm_jax.train.watch import Step, Watch, count_tokens
from vlm_jax.train.workdir import read_lines
from vlm_jax.train.writers import RunLog, scalars_of
from vlm_jax.types import CellBatch, Sample, Turn, dialogue

from .conftest import tiny_config

PEAK = 1e9
STEPS = 6


def answering_config():
    config = tiny_config()
    with config.unlocked():
        del config.stages.seeing
        config.schedule = ("answering",)
        config.stages.answering.update({"steps": STEPS, "batch_size": 2, "warmup_steps": 2})
        config.stages.answering.learning_rates = {"connector": 2e-3, "decoder": 1e-3}
        config.loop.update({"log_every": 3, "save_every": 4, "peak_flops": PEAK, "profile": (5, 2)})
    return config


@pytest.fixture(scope="module")
def run(one_device, tmp_path_factory):
    """(config, experiment, workdir) of a run of two logs."""
    config, workdir = answering_config(), tmp_path_factory.mktemp("run") / "run"
    experiment = build(config)
    Trainer(config, experiment, one_device, workdir).run()
    return config, experiment, epath.Path(workdir)


@pytest.fixture(scope="module")
def lines(run):
    return read_lines(run[2] / "metrics.jsonl")


def test_tokens_of_a_row_are_those_counted_by_hand(run):
    _, experiment, _ = run
    page = np.zeros((24, 24, 1), np.uint8)
    turns = [Turn("read row 1 column 1", "7"), Turn("count 7", "12")]
    row = experiment.training_row(Sample("page", dialogue(turns, num_images=1), (page,)))
    encode = experiment.system.processor.tokenizer.encode
    asked, said = ([len(encode(getattr(turn, key))) for turn in turns] for key in ("question", "answer"))
    learned = sum(said) + len(turns)  # and an end token each
    tokens = 4 + 1 + sum(asked) + learned  # visual tokens, and the token at the start
    assert count_tokens(row) == {"tokens": tokens, "learned_tokens": learned, "visual_tokens": 4}
    assert count_tokens({"chosen": row, "rejected": row}) == {name: 2 * n for name, n in count_tokens(row).items()}
    assert count_tokens(CellBatch(np.zeros((1, 1, 4, 4, 1)), np.zeros((1, 2, 2), int), np.zeros((1, 2, 2, 4)))) == {}


def test_every_line_has_the_tokens_of_its_batch(run, lines):
    config, experiment, _ = run
    rows = experiment.open_source().train("questions", config.seed)
    for line in lines:
        first = 2 * (line["step"] - 1)
        of_rows = [count_tokens(experiment.training_row(rows[first + place])) for place in range(2)]
        for name in watch.TOKENS:
            assert line[name] == sum(counts[name] for counts in of_rows)
        total = 2 * experiment.row.length
        np.testing.assert_allclose(line["padding_share"], 1 - line["tokens"] / total, rtol=1e-6)


def test_speeds_are_of_all_steps_between_two_logs(lines):
    assert ["mfu" in line for line in lines] == [line["step"] in (3, 4, 6) for line in lines]
    for start, stop in ((0, 3), (3, 4), (4, 6)):
        between, last = lines[start:stop], lines[stop - 1]
        assert len({line["seconds"] for line in between}) == 1
        elapsed = last["seconds"] * len(between)
        for name in watch.TOKENS:
            np.testing.assert_allclose(last[f"{name}_per_second"], sum(line[name] for line in between) / elapsed)
        assert last["host_peak_bytes"] > 2**20 and last["compilations"] >= 0
    assert lines[2]["compilations"] >= 1 and lines[2]["compile_seconds"] > 0


def test_learning_rates_are_a_warm_up_and_a_cosine(lines):
    for line in lines:
        done = line["step"] - 1
        share = done / 2 if done < 2 else 0.5 * (1 + np.cos(np.pi * (done - 2) / (STEPS - 2)))
        for part, peak in (("connector", 2e-3), ("decoder", 1e-3)):
            np.testing.assert_allclose(line[f"learning_rate/{part}"], peak * share, rtol=1e-5, atol=1e-9)


def test_mfu_is_that_of_the_closed_form(run, lines):
    """Kaplan et al. 2020, table 1, part by part; backward twice forward where kernels are trained."""
    config, experiment, _ = run
    encoder, decoder = config.encoder, config.decoder
    patches, length = 16, experiment.row.length
    vocab = experiment.system.model.decoder.vocab_size
    # Gradients of the frozen encoder are not computed.
    block = 2 * patches * (4 * encoder.width**2 + 2 * encoder.width * encoder.mlp_dim) + 4 * patches**2 * encoder.width
    seen = 2 * patches * encoder.patch_size**2 * encoder.width + encoder.depth * block
    # Pooling 4 x 4 features, and their mask, to 2 x 2 by a product for each axis; two products follow.
    pooled = 2 * 4 * (4 * 2 + 2 * 2) * (encoder.width + 1)
    connected = 2 * 4 * encoder.width * decoder.width
    inside = 2 * length * (4 * decoder.width**2 + 3 * decoder.width * decoder.mlp_dim)
    read = decoder.depth * (inside + 4 * length**2 * decoder.width) + 2 * length * decoder.width * vocab
    # What is before the connector's second product needs no gradient but of its kernel.
    flops = 2 * (seen + pooled + (2 + 3) * connected + 3 * read)
    for line in (lines[2], lines[5]):
        np.testing.assert_allclose(line["mfu"] * line["seconds"] * PEAK, flops, rtol=1e-6)


def test_event_files_have_the_numbers_of_the_lines(run, lines):
    events = EventAccumulator(str(run[2] / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    written = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag):
            written.setdefault(event.step, {})[tag] = event.value
    expected = {line["step"]: scalars_of(line) for line in lines}
    assert "loss" in expected[1] and "stage" not in expected[1] and "step" not in expected[1]
    assert {step: set(values) for step, values in written.items()} == {
        step: set(values) for step, values in expected.items()
    }
    for step, values in expected.items():
        for name, value in values.items():
            assert written[step][name] == np.float32(value), (step, name)


def test_steps_after_the_newest_checkpoint_are_in_the_event_files_once(run, tmp_path):
    config, workdir = run[0], epath.Path(tmp_path)

    def append(done, steps, shift):
        log = RunLog(workdir, config, done, ("tensorboard",))
        log.append({"step": step, "stage": "s", "loss": step + shift} for step in steps)
        log.close()

    append(0, range(1, 6), 0.0)
    time.sleep(1)  # TensorBoard reads event files in the order of their names, which start with the second
    append(3, range(4, 7), 0.5)  # killed behind a checkpoint of step 3
    events = EventAccumulator(str(workdir / "tensorboard")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in events] == [(1, 1), (2, 2), (3, 3), (4, 4.5), (5, 5.5), (6, 6.5)]


def test_the_profiler_traces_the_steps_of_its_window(run):
    (trace,) = (pathlib.Path(run[2]) / "profile").glob("**/*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(trace)).planes
    names = [event.name for plane in planes for line in plane.lines for event in line.events]
    assert sum("jit(step)" in name for name in names) >= 2


def test_programs_that_are_compiled_again_are_counted_and_named(run, one_device, caplog):
    config = run[0]
    (span,) = parse_schedule(("answering",), config.stages)
    watched, found = Watch(span, lambda done: {}, one_device, None), []
    step = jax.jit(lambda x: {"loss": jnp.tanh(x).sum() * 1.125})
    with contextlib.closing(watched), caplog.at_level(logging.WARNING):
        for number, size in enumerate((4, 4, 5), start=1):
            watched.add(Step(number, step(np.zeros(size, np.float32)), 0.0, {}, None))
            (line,) = watched.lines()
            found.append((line["compilations"], line["compile_seconds"] > 0, len(caplog.records)))
    assert found == [(1, True, 0), (0, False, 0), (1, True, 1)]  # the first is expected
    assert caplog.records[0].getMessage().startswith("stage answering: 1 programs were compiled in steps 3 to 3")


def test_wandb_is_named_where_it_is_missing_and_gets_the_lines_where_it_is_not(run, monkeypatch, tmp_path):
    config, _, _ = run
    with pytest.raises(ConfigError, match=r"config\.loop\.writers: wandb is not installed; pip install 'vlm_jax\["):
        writers.check_writers(("wandb",))
    with pytest.raises(ConfigError, match=r"config\.loop\.writers: unknown 'tensorbord'; did you mean 'tensorboard'"):
        writers.check_writers(("tensorbord",))
    logged, begun = [], []

    class Run:
        def log(self, scalars, step):
            logged.append((step, scalars))

        def finish(self):
            logged.append("finished")

    module = types.SimpleNamespace(init=lambda **options: begun.append(options) or Run())
    monkeypatch.setitem(sys.modules, "wandb", module)
    for done in (0, 1):
        log = RunLog(epath.Path(tmp_path), config, done, ("wandb",))
        log.append([{"step": done + 1, "stage": "s", "loss": 2.0}])
        log.close()
    assert logged == [(1, {"loss": 2.0}), "finished", (2, {"loss": 2.0}), "finished"]
    assert len({options["id"] for options in begun}) == 1 and {options["resume"] for options in begun} == {"allow"}
    assert begun[0]["config"]["seed"] == config.seed
