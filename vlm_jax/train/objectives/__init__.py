"""Training objectives. One is one file, with the class of its settings, and one line in the table."""

from vlm_jax.train.objectives.classify import Classify
from vlm_jax.train.objectives.contrastive import Contrastive
from vlm_jax.train.objectives.next_token import NextToken
from vlm_jax.train.objectives.objective import Objective
from vlm_jax.train.objectives.prefer import Prefer
from vlm_jax.train.objectives.read_cells import ReadCells

# Objective of a stage -> its settings.
OBJECTIVES: dict[str, type[Objective]] = {
    "classify": Classify,
    "contrastive": Contrastive,
    "next_token": NextToken,
    "prefer": Prefer,
    "read_cells": ReadCells,
}
