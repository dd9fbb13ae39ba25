"""Advice that no test follows yet: parts of messages, file by file. It only shrinks; see `test_tried_advice.py`."""

UNTRIED: list[str] = []
