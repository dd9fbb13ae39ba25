"""Adapters to evaluation harnesses: their models, by `vlm_jax.from_pretrained`."""
