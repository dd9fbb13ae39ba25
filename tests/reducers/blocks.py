"""A transformer block in NumPy, one sequence at a time, in halves: between them tokens may be merged."""

import numpy as np
from scipy.special import expit

from .definitions import softmax


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0)


def norm(x, p, epsilon):
    if "bias" in p:
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * p["scale"]


def rotate(x, positions, theta):
    """[T, heads, H], half-split."""
    half = x.shape[-1] // 2
    angle = positions[:, None, None] / theta ** (np.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)


def heads(x, p, num_heads, num_kv_heads, epsilon, positions=None, theta=None):
    """Queries and keys [T, heads, H], and values."""
    normed = norm(x, p["attention_norm"], epsilon)
    counts = {"query": num_heads, "key": num_kv_heads, "value": num_kv_heads}
    q, k, v = (dense(normed, p["attention"][name]).reshape(len(x), count, -1) for name, count in counts.items())
    if positions is not None:
        q, k = rotate(q, positions, theta), rotate(k, positions, theta)
    return q, k, v


def weights(q, k, bias):
    """Softmax weights [heads, T, S]; `bias` [T, S] or [S]."""
    k = np.repeat(k, q.shape[1] // k.shape[1], axis=1)
    return softmax(np.einsum("thd,shd->hts", q, k) / np.sqrt(q.shape[-1]) + bias)


def attend(x, p, q, k, v, bias):
    v = np.repeat(v, q.shape[1] // v.shape[1], axis=1)
    out = np.einsum("hts,shd->thd", weights(q, k, bias), v)
    return x + dense(out.reshape(len(x), -1), p["attention"]["out"])


def feed_forward(x, p, epsilon):
    normed, mlp = norm(x, p["mlp_norm"], epsilon), p["mlp"]
    up = dense(normed, mlp["up"])
    if "gate" in mlp:
        gate = dense(normed, mlp["gate"])
        return x + dense(gate * expit(gate) * up, mlp["down"])
    gelu = up * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    return x + dense(gelu, mlp["down"])
