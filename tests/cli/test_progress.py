"""What a run prints to a file, and to a terminal."""

import re

from vlm_jax.cli import progress
from vlm_jax.cli.progress import Display, Lines, Silence, open_progress

LINE = {
    "stage": "[red]tuning[/lr=1]",
    "loss": 1.25,
    "grad_norm": 0.5,
    "learning_rate/connector": 1e-3,
    "learning_rate/decoder": 2e-5,
    "learning_rate/encoder": 1e-3,
    "tokens_per_second": 812.4,
    "mfu": 0.4321,
    "seconds": 0.12,
}
NUMBERS = "loss 1.2500  gradient 0.5  lr 1.00e-03, 2.00e-05  812 tokens/s  MFU 43.2%  0.12 s/step"
SHOWN = f"[red]tuning[/lr=1]  {NUMBERS}"


def test_a_file_gets_one_plain_line_a_log(monkeypatch, capsys):
    times = iter([10.0, 14.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    shown = open_progress()
    assert isinstance(shown, Lines)
    with shown:
        shown(20, 100, LINE)
        shown(40, 100, LINE)  # 4 seconds for 20 steps, and 60 are left
        shown.tell(40, ["[ocr]: 0.500"])
    expected = [f"step 20/100  {SHOWN}", f"step 40/100  {SHOWN}  0:00:12 left", "evaluation at step 40", "[ocr]: 0.500"]
    assert capsys.readouterr().out == "".join(f"{line}\n" for line in expected)


def test_a_terminal_gets_a_display_without_markup(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(progress.sys.stdout, "isatty", lambda: True)
    shown = open_progress()
    assert isinstance(shown, Display)
    with shown:
        shown(100, 100, LINE)
        shown.tell(100, ["[ocr]: 0.500"])
    out = re.sub("\x1b[^a-zA-Z]*[a-zA-Z]", "", capsys.readouterr().out)  # without colours and cursor moves
    assert "[red]tuning[/lr=1] ━" in out and NUMBERS in out and "100/100" in out and "[ocr]: 0.500\n" in out


def test_other_processes_print_nothing(monkeypatch):
    monkeypatch.setattr(progress, "is_primary", lambda: False)
    assert isinstance(open_progress(), Silence)
