"""All targets by name; `run.NAMES` lists them for the command, which does not import them."""

from tests.fuzz import configs, files, media, texts

TARGETS = {**media.TARGETS, **files.TARGETS, **texts.TARGETS, **configs.TARGETS}
