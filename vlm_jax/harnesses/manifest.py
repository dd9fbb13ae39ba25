"""The entry of lmms-eval's table of models; imports no model, since every run of lmms-eval reads it."""

from lmms_eval.models.registry_v2 import ModelManifest  # type: ignore

MANIFEST = ModelManifest(
    model_id="vlm_jax",
    chat_class_path="vlm_jax.harnesses.lmms_eval.ChatModel",
    simple_class_path="vlm_jax.harnesses.lmms_eval.SimpleModel",
)
