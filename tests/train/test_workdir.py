"""Files of a run's folder that are complete at every moment."""

import json

import pytest
from etils import epath

from vlm_jax.train.workdir import (
    MetricsLog,
    WorkdirError,
    each_line,
    read_lines,
    whole_file,
    write_lines,
    write_whole,
)

from ..advice import tried


def failing(lines):
    yield from lines
    raise RuntimeError("stopped")


def test_a_file_stays_as_it_was_until_the_next_one_is_whole(tmp_path):
    path = epath.Path(tmp_path / "lines.jsonl")
    write_lines(path, [{"step": 1}, {"step": 2}])
    with pytest.raises(RuntimeError, match="stopped"):
        write_lines(path, failing([{"step": 3}]))
    with pytest.raises(RuntimeError, match="stopped"), whole_file(path) as file:
        file.writelines(failing(["half"]))
    assert read_lines(path) == [{"step": 1}, {"step": 2}]
    write_lines(path, ({**line, "more": 0} for line in each_line(path)))  # reads the file that it replaces
    assert path.read_text() == '{"step": 1, "more": 0}\n{"step": 2, "more": 0}\n'
    write_whole(path, "text")
    with whole_file(path.parent / "new" / "file") as file:
        file.write("text")
    assert path.read_text() == (path.parent / "new" / "file").read_text() == "text"


def test_steps_that_are_repeated_leave_the_log(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"st')
    log = MetricsLog(epath.Path(tmp_path), 2)
    log.append([{"step": 3, "again": True}])
    assert log.read() == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


@pytest.mark.parametrize("line", [b'{"st', b"[]", b"\xff\xfe", b"7"])
def test_a_line_that_was_damaged_is_named(tmp_path, line):
    path = epath.Path(tmp_path / "metrics.jsonl")
    path.write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 3}\n')
    told = tried("expected a JSON object, got {}; remove the line, and rerun the same command")
    with pytest.raises(WorkdirError, match=f"metrics.jsonl:2: {told}"):
        MetricsLog(path.parent, 3)
    path.write_bytes(b'{"step": 1}\n{"step": 3}\n')
    assert MetricsLog(path.parent, 3).read() == [{"step": 1}, {"step": 3}]


def test_a_log_that_was_cut_short_is_told(tmp_path, caplog):
    path = epath.Path(tmp_path / "metrics.jsonl")
    write_lines(path, [{"step": 1}, {"step": 2}, {"step": 3}])
    MetricsLog(path.parent, 2)
    assert not caplog.text
    path.write_text('{"step": 1}\n{"st')
    MetricsLog(path.parent, 2)
    assert "metrics.jsonl: has the lines of 1 of 2 steps" in caplog.text


def test_a_folder_that_is_removed_under_a_run_is_told(tmp_path):
    workdir = epath.Path(tmp_path) / "run"
    workdir.mkdir()
    log = MetricsLog(workdir, 0)
    workdir.rmtree()
    told = tried("the folder was removed, or its disk is full. Rerun the same command to resume from the newest")
    with pytest.raises(
        WorkdirError, match=rf"run/metrics\.jsonl: cannot be written \(No such file or directory\): {told}"
    ):
        log.append([{"step": 1}])
    workdir.mkdir()
    log.append([{"step": 1}])
    assert log.read() == [{"step": 1}]
