"""Which errors a command prints as one message."""

import importlib
import pkgutil

import vlm_jax
from vlm_jax.cli.process import EXPLAINED

# Errors that are met inside the package, where they become one of EXPLAINED, or that a command handles itself.
INSIDE = {"UnreadableFile", "Unbalanced", "ListFormatError", "Interrupted", "SourceError", "TemplateLimit", "_Stopped"}
INSIDE |= {"DamagedFile", "UnknownTripCount", "UnreadableProgram", "RequestError", "Stopped", "TrialError", "HostLost"}
# Modules that need a package which the tests do not have, and define no error.
ADAPTERS = {f"vlm_jax.harnesses.{name}" for name in ("lmms_eval", "manifest", "vlmevalkit")} | {"vlm_jax.demo.page"}


def test_every_error_of_the_package_is_explained_or_met_inside():
    """An error class that is new, and in neither list, would reach a user as a traceback."""
    found = {}
    for module in pkgutil.walk_packages(vlm_jax.__path__, "vlm_jax."):
        # Commands define flags when they are imported.
        if not module.name.startswith("vlm_jax.cli.") and module.name not in ADAPTERS:
            names = vars(importlib.import_module(module.name)).items()
            found |= {name: one for name, one in names if isinstance(one, type) and one.__module__ == module.name}
    errors = {name: one for name, one in found.items() if issubclass(one, Exception)}
    assert {name for name, one in errors.items() if not issubclass(one, EXPLAINED)} == INSIDE
    assert len(errors) > 20
