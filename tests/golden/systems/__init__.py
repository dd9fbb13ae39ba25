"""The systems that are compared with golden arrays.

A module here has `outputs(folder: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]`, which
reads sizes and settings from the folder and returns every output of its manifest. What it cannot return
stands in `NOT_COMPARED: dict[str, str]`, regular expression of whole names -> reason.
"""

from types import ModuleType

from tests.golden.systems import deepseek_vl, deepseek_vl_parts, open_clip_losses, ovis2, ovis2_5, s2

# The `system` of a manifest -> the module; several systems may share one.
SYSTEMS: dict[str, ModuleType] = {
    "deepseek_vl_hybrid": deepseek_vl,
    "deepseek_vl_parts": deepseek_vl_parts,
    "deepseek_vl_siglip": deepseek_vl,
    "s2_siglip": s2,
    "s2_simple": s2,
    "open_clip_losses": open_clip_losses,
    "ovis2": ovis2,
    "ovis2_hf": ovis2,
    "ovis2_5": ovis2_5,
    "ovis2_5_window": ovis2_5,
}
