"""What `cli.plan` asks for by its flags, and what it prints of a plan."""

import io
import json

import pytest
import rich.console

from vlm_jax.cli import command, plan
from vlm_jax.cli.plan_output import plan_tables, search_tables, sweep_tables
from vlm_jax.config import ConfigError
from vlm_jax.planner.memory import Memory, Share
from vlm_jax.planner.plan import Moved, Plan
from vlm_jax.planner.predict import Estimate
from vlm_jax.planner.search import Candidate
from vlm_jax.sweep.planned import PlannedPoint
from vlm_jax.train import finetuning

from ..advice import tried

GIB = 2**30


@pytest.fixture
def flags(monkeypatch):
    """Sets flags by name, as a command line without others."""
    config = finetuning.get_config()
    monkeypatch.setattr(command, "CONFIG", type("Flag", (), {"value": config}))
    monkeypatch.setattr(command, "config_path", lambda: finetuning.__file__)

    def given(**values):
        for name, value in values.items():
            monkeypatch.setattr(plan, name.upper(), type("Flag", (), {"value": value}))

    given(topology=["v5p:4x4x4"])
    return given


def test_flags_set_keys_of_the_config(flags):
    flags(release="Qwen/Qwen2.5-VL-7B-Instruct", token_budget=256, length=4096, batch_size=256)
    request = plan.requested()
    assert request.config.release == "Qwen/Qwen2.5-VL-7B-Instruct" and request.config.token_budget == 256
    assert request.config.row.length == 4096 and request.config.stages.instruction.batch_size == 256
    flags(stage="decode")
    request = plan.requested()
    assert request.stage == "decode" and request.batch_size == 256
    assert request.config.stages.instruction.batch_size is None


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"topology": []}, "--topology: expected one slice"),
        ({"topology": ["v5e:2x2", "v5e:4x4"]}, "several with --sweep"),
        ({"sweep": True, "search": True}, "at most one"),
        ({"search": True, "stage": "decode"}, tried("--search: is for training; pass --stage=train")),
        ({"largest": True}, tried("--largest_batch: is for generation; pass --stage=prefill or --stage=decode")),
        ({"context": 4096}, tried("--context: is for generation; pass --stage=prefill or --stage=decode")),
        ({"budgets": ["64"]}, tried("{--budgets}: of --sweep only; pass --sweep")),
        ({"connectors": ["pool"], "join": "run"}, "--connectors, --join: of --sweep only"),
        ({}, "--release: expected an included config or a folder"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags, given, said):
    flags(**given)
    with pytest.raises(ConfigError, match=said):
        plan.requested()


@pytest.mark.parametrize(
    ("given", "stage"),
    [
        ({"search": True, "stage": "train"}, "train"),
        ({"largest": True, "stage": "prefill"}, "prefill"),
        ({"largest": True, "stage": "decode"}, "decode"),
        ({"context": 4096, "stage": "prefill"}, "prefill"),
        ({"context": 4096, "stage": "decode"}, "decode"),
        ({"budgets": ["64"], "sweep": True}, "train"),
    ],
)
def test_flags_that_are_passed_as_said_fit(flags, given, stage):
    flags(release="Qwen/Qwen2.5-VL-7B-Instruct", **given)
    assert plan.requested().stage == stage


def test_a_sweep_without_budgets_has_that_of_the_config(flags, monkeypatch, tmp_path):
    asked = []

    def made(request):
        asked.append((request.topology, request.config.connector.kind, request.config.token_budget))
        return plan_of(12 * GIB, 16 * GIB, 0.5)

    monkeypatch.setattr(plan, "_made", made)
    flags(sweep=True, release="Qwen/Qwen2.5-VL-7B-Instruct", token_budget=256, connectors=["released", "pool"])
    monkeypatch.setattr(command, "WORKDIR", type("Flag", (), {"value": None}))
    with pytest.raises(ConfigError, match=tried("--workdir: expected the folder of the sweep's files; pass one")):
        plan._sweep(plan.requested())
    monkeypatch.setattr(command, "WORKDIR", type("Flag", (), {"value": str(tmp_path / "plans")}))
    plan._sweep(plan.requested())
    assert asked == [("v5p:4x4x4", None, 256), ("v5p:4x4x4", "pool", 256)]
    points = json.loads((tmp_path / "plans" / "plans.json").read_text())
    assert [point["token_budget"] for point in points] == [256, 256]


@pytest.mark.parametrize(
    "text", [None, "", '{"loss": 1.0}\n', "no JSON\n{}\n"], ids=["none", "empty", "other", "broken"]
)
def test_what_cannot_be_joined_is_named_before_anything_is_compiled(flags, monkeypatch, tmp_path, text):
    monkeypatch.setattr(plan, "_made", lambda request: pytest.fail("compiled"))
    monkeypatch.setattr(command, "WORKDIR", type("Flag", (), {"value": str(tmp_path / "plans")}))
    if text is not None:
        (tmp_path / "results.jsonl").write_text(text)
    flags(sweep=True, release="Qwen/Qwen2.5-VL-7B-Instruct", join=str(tmp_path))
    with pytest.raises(ConfigError, match=r"--join: .*results\.jsonl"):
        plan._sweep(plan.requested())


def plan_of(peak: int, available: int, seconds: float | None) -> Plan:
    time = None if seconds is None else Estimate(seconds, 0.8 * seconds, 1.25 * seconds, *[seconds] * 5, 0.5, 0.0)
    return Plan(
        stage="train",
        rows=8,
        tokens=1000,
        details={},
        topology="v5e:2x2",
        chip="v5e",
        num_devices=4,
        mesh={"fsdp": 4},
        memory=Memory(GIB, 0, peak - GIB, 0, peak, available, peak <= available),
        parameters=(Share("parameters of decoder", 3_000_000, GIB),),
        temporaries=(Share("decoder/mlp/up", 10, GIB // 2, "bf16[2, 5]"),),
        flops=2e12,
        model_flops=1e12,
        traffic=1.0,
        moved=(Moved("all-gather", ("fsdp",), 6, float(2**20), 0.25),),
        step_time=time,
        refused="" if time else "compiled for its memory alone",
        compile_seconds=12.0,
        assumptions=("an estimate",),
        versions={"libtpu": "1"},
    )


def printed(*tables) -> str:
    console = rich.console.Console(file=io.StringIO(), width=160)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def test_a_plan_is_printed_with_its_verdict():
    text = printed(*plan_tables(plan_of(12 * GIB, 16 * GIB, 0.5)))
    assert "fits with 4.00 GiB to spare" in text and "3,000,000 elements" in text and "bf16[2, 5]" in text
    assert "500 ms (400 to 625)" in text and "2,000" in text and "50.0%" in text
    text = printed(*plan_tables(plan_of(20 * GIB, 16 * GIB, None)))
    assert "does not fit: 4.00 GiB too much" in text and "not predicted: compiled for its memory alone" in text


@pytest.mark.parametrize("peak", [12 * GIB, 20 * GIB])
def test_a_search_in_which_nothing_fits_fails(flags, monkeypatch, capsys, peak):
    found = [Candidate({"fsdp": 4}, "full", plan_of(peak, 16 * GIB, None)), Candidate({"data": 4}, "", None, "no")]
    monkeypatch.setattr(plan, "search", lambda request, folder, working: found)
    flags(search=True, release="Qwen/Qwen2.5-VL-7B-Instruct")
    if peak > 16 * GIB:
        with pytest.raises(SystemExit) as exited:
            plan.main()
        assert exited.value.code == 1
    else:
        plan.main()
    assert f"{peak / GIB:.2f}" in capsys.readouterr().out


def test_a_search_and_a_sweep_are_tables():
    found = [
        Candidate({"fsdp": 4, "tensor": 1}, "dots", plan_of(12 * GIB, 16 * GIB, 0.5)),
        Candidate({"fsdp": 2, "tensor": 2}, "none", None, "config.mesh: impossible"),
    ]
    text = printed(*search_tables(found))
    assert "fsdp=4 " in text and "fsdp=2 tensor=2" in text and "12.00" in text and "config.mesh: impossible" in text
    points = [PlannedPoint("pool", 16, "v5e:2x2", found[0].plan), PlannedPoint("pool", 3, "v5e:2x2", None, "no grid")]
    text = printed(*sweep_tables(points))
    assert "2,000" in text and "pool@3: no grid" in text
