"""A disk that becomes full while a run saves: a file system of a few hundred kilobytes."""

import json
import re

from ..advice import tried

# A separate mount for the one process, so that nothing remains.
SMALL_DISK = ("unshare", "--map-root-user", "--mount", "sh", "-c")


def test_a_full_disk_is_explained_and_the_run_goes_on_when_there_is_space(command, tmp_path):
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    kept.mkdir()
    # What the disk holds in the end is copied out before the mount is gone.
    script = f'mount -t tmpfs -o size=600k tmpfs "{disk}" && "$@"; status=$?; cp -r "{disk}/." "{kept}"; exit $status'
    status, errors = command.finish(disk / "run", prefix=(*SMALL_DISK, script, "sh"))
    assert status == 1, errors
    assert "no space left: a checkpoint needs about" in errors
    assert re.search(tried("free space or fix the permissions, and rerun the same command to resume"), errors)
    assert "Traceback" not in errors
    numbered = [path for path in (kept / "run" / "checkpoints").iterdir() if path.name.isdigit()]
    assert all((path / "_CHECKPOINT_METADATA").exists() for path in numbered)  # whole ones only

    programs = tmp_path / "programs"
    # The same folder, where there is space.
    status, errors = command.finish(kept / "run", f"--compilation_cache={programs}")
    assert status == 0, errors
    assert programs.is_dir()
    lines = [json.loads(line) for line in (kept / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 81))
