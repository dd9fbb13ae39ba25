"""Decoders of released systems, as sections of a config, by the names of the language models."""

from typing import Any

# A mixture's, and what every DeepSeek-V2 of DeepSeek-VL2 has.
_EXPERTS = {"num_selected": 6, "num_shared": 2, "num_dense": 1}
_DYNAMIC = {"theta": 1e6, "scaling": "dynamic", "factor": 2.0, "original_length": 32_768}
M_ROPE = {"theta": 1e6, "sections": (16, 24, 24)}


def _transformer(width: int, mlp_dim: int, depth: int, num_heads: int, num_kv_heads: int, **more: Any) -> dict:
    sizes = {"width": width, "mlp_dim": mlp_dim, "depth": depth, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    return {"kind": "transformer", **sizes, "tie_embeddings": False, "remat": "full", **more}


def vicuna_7b(vocab_size: int = 32_000) -> dict[str, Any]:
    """Llama 2 7B, whose releases pad the vocabulary or do not."""
    return _transformer(4096, 11_008, 32, 32, 32, vocab_size=vocab_size, norm_epsilon=1e-5)


def vicuna_13b(vocab_size: int = 32_000) -> dict[str, Any]:
    """Llama 2 13B."""
    return _transformer(5120, 13_824, 40, 40, 40, vocab_size=vocab_size, norm_epsilon=1e-5)


def mistral_7b(vocab_size: int = 32_000) -> dict[str, Any]:
    """Mistral 7B v0.2, which has no window."""
    return _transformer(4096, 14_336, 32, 32, 8, vocab_size=vocab_size, norm_epsilon=1e-5, rope={"theta": 1e6})


def mobilellama_1_4b() -> dict[str, Any]:
    """The language model of MobileVLM V2 1.7B."""
    return _transformer(2048, 5632, 24, 16, 16, vocab_size=32_000, norm_epsilon=1e-5)


def mobilellama_2_7b() -> dict[str, Any]:
    """The language model of MobileVLM V2 3B."""
    return _transformer(2560, 6912, 32, 32, 32, vocab_size=32_000, norm_epsilon=1e-5)


def deepseek_1_3b() -> dict[str, Any]:
    """DeepSeek-LLM 1.3B, of DeepSeek-VL 1.3B."""
    return _transformer(2048, 5632, 24, 16, 16, vocab_size=102_400)


def deepseek_7b() -> dict[str, Any]:
    """DeepSeek-LLM 7B, of DeepSeek-VL 7B."""
    return _transformer(4096, 11_008, 30, 32, 32, vocab_size=102_400)


def qwen_7b() -> dict[str, Any]:
    """Qwen 7B, the first, of 2,048 positions in training."""
    rope = {"theta": 10_000.0, "scaling": "dynamic_prompt", "original_length": 2048}
    more = {"head_dim": 128, "log_length": 2048, "qkv_bias": True, "rope": rope}
    return _transformer(4096, 11_008, 32, 32, 32, vocab_size=151_936, **more)


_QWEN2 = {
    "0.5b": (896, 4864, 24, 14, 2),
    "1.5b": (1536, 8960, 28, 12, 2),
    "3b": (2048, 11_008, 36, 16, 2),
    "7b": (3584, 18_944, 28, 28, 4),
    "14b": (5120, 13_824, 48, 40, 8),
    "72b": (8192, 29_568, 80, 64, 8),
}


def qwen2(size: str, **more: Any) -> dict[str, Any]:
    """Qwen2 and Qwen2.5, whose head is the table up to 3B.

    Args:
      size: a key of `_QWEN2`.
      **more: other keys, or values.
    """
    small = size in ("0.5b", "1.5b", "3b")
    fields = {"vocab_size": 151_936 if small else 152_064, "tie_embeddings": small, "rope": {"theta": 1e6}}
    return _transformer(*_QWEN2[size], **{"qkv_bias": True, **fields, **more})


def qwen2_of_internvl(size: str) -> dict[str, Any]:
    """Qwen2.5 with the vocabulary of InternVL 2.5 and 3, a head of its own and dynamic positions."""
    return qwen2(size, vocab_size=151_674, tie_embeddings=False, rope=_DYNAMIC)


def qwen3_1_7b() -> dict[str, Any]:
    """Qwen3 1.7B."""
    more = {"head_dim": 128, "qk_norm": True, "tie_embeddings": True, "rope": {"theta": 1e6}}
    return _transformer(2048, 6144, 28, 16, 8, vocab_size=151_936, **more)


def qwen3_8b() -> dict[str, Any]:
    """Qwen3 8B."""
    more = {"head_dim": 128, "qk_norm": True, "rope": {"theta": 1e6}}
    return _transformer(4096, 12_288, 36, 32, 8, vocab_size=151_936, **more)


def internlm2_1_8b() -> dict[str, Any]:
    """InternLM2.5 1.8B, of InternVL 2.5 2B."""
    return _transformer(2048, 8192, 24, 16, 8, vocab_size=92_553, norm_epsilon=1e-5, rope=_DYNAMIC)


def internlm2_7b() -> dict[str, Any]:
    """InternLM2.5 7B, of InternVL 2.5 8B."""
    return _transformer(4096, 14_336, 32, 32, 8, vocab_size=92_553, norm_epsilon=1e-5, rope=_DYNAMIC)


def _deepseek_v2(width: int, mlp_dim: int, depth: int, num_heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"width": width, "mlp_dim": mlp_dim, "depth": depth, "num_heads": num_heads}
    return {"kind": "deepseek", **sizes, **_EXPERTS, "remat": "full", **more}


def deepseek_moe_3b() -> dict[str, Any]:
    """The language model of DeepSeek-VL2 tiny, with plain attention."""
    experts = {"expert_dim": 896, "num_experts": 64}
    return _deepseek_v2(1280, 6848, 12, 10, vocab_size=129_280, latent_dim=None, num_kv_heads=10, **experts)


def deepseek_moe_16b() -> dict[str, Any]:
    """The language model of DeepSeek-VL2 small."""
    experts = {"expert_dim": 1408, "num_experts": 64}
    return _deepseek_v2(2048, 10_944, 27, 16, vocab_size=102_400, latent_dim=512, **experts)


def deepseek_moe_27b() -> dict[str, Any]:
    """The language model of DeepSeek-VL2."""
    chosen = {"scoring": "sigmoid", "selection": "noaux_tc", "normalize_weights": True, "weight_scale": 2.0}
    experts = {"expert_dim": 1536, "num_experts": 72, **chosen}
    return _deepseek_v2(2560, 12_288, 30, 32, vocab_size=129_280, latent_dim=512, **experts)
