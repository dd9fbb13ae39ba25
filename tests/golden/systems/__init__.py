"""The systems that are compared with golden arrays.

A module here has `outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]`, which
reads sizes and settings from the folder and returns every output of its manifest. What it cannot return
stands in `NOT_COMPARED: dict[str, str]`, regular expression of whole names -> reason.
"""

from types import ModuleType

from tests.golden.systems import open_clip_losses

# The `system` of a manifest -> the module; several systems may share one.
SYSTEMS: dict[str, ModuleType] = {
    "open_clip_losses": open_clip_losses,
}
