"""The layers once more, in NumPy and float64, as the papers write them."""

import numpy as np
import pytest


class Reference:
    """Each method takes arrays of any float dtype and computes in float64."""

    @staticmethod
    def softmax(x):
        e = np.exp(x - x.max(axis=-1, keepdims=True))
        return e / e.sum(axis=-1, keepdims=True)

    @classmethod
    def attention(cls, query, key, value, mask=None, scale=None, bias=None):
        """One query at a time, over [B, T, Q, H] and [B, S, K, H]; mask [B, T, S] is True where read."""
        query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out = np.zeros((*query.shape[:-1], value.shape[-1]))
        groups = query.shape[2] // key.shape[2]
        for b, t, q in np.ndindex(query.shape[:3]):
            read = np.arange(key.shape[1]) if mask is None else np.flatnonzero(mask[b, t])
            if not len(read):
                out[b, t, q] = np.nan  # no meaning
                continue
            logits = scale * key[b, read, q // groups] @ query[b, t, q]
            if bias is not None:
                logits = logits + bias[b, q, t, read]
            out[b, t, q] = cls.softmax(logits) @ value[b, read, q // groups]
        return out

    @staticmethod
    def layer_norm(x, scale, bias, epsilon):
        x = np.asarray(x, np.float64)
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * scale + bias

    @staticmethod
    def rms_norm(x, scale, epsilon):
        x = np.asarray(x, np.float64)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * scale

    @staticmethod
    def rotate(x, positions, theta):
        """Coordinates i and i + H/2 as the complex number that turns by position * theta**(-2i / H)."""
        half = x.shape[-1] // 2
        frequency = theta ** (-2.0 * np.arange(half) / x.shape[-1])
        turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[..., None, None] * frequency)
        return np.concatenate([turned.real, turned.imag], axis=-1)

    @staticmethod
    def dense(x, params):
        return x @ np.asarray(params["kernel"], np.float64) + np.asarray(params.get("bias", 0.0), np.float64)


@pytest.fixture(scope="session")
def reference():
    """The layers in NumPy."""
    return Reference
