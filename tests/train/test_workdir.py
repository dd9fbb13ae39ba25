"""Files of a run's folder that are complete at every moment."""

import json

import pytest
from etils import epath

from vlm_jax.train.workdir import MetricsLog, each_line, read_lines, whole_file, write_lines, write_whole


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
