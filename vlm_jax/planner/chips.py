"""Peak speeds of devices, as their vendors give them."""

# Start of a JAX device kind -> dense bfloat16 FLOP/s of one JAX device, without sparsity; first match wins.
# A chip of TPU v2, v3 and 7x is two devices. Source: cloud.google.com/tpu/docs and NVIDIA's data sheets.
PEAK_FLOPS = {
    "TPU v2": 22.5e12,
    "TPU v3": 61.5e12,
    "TPU v4 lite": 138e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989.4e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
}


def peak_flops(kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a JAX device of a kind (`device_kind`); None where none is stated, as for a CPU."""
    return next((peak for start, peak in PEAK_FLOPS.items() if kind.startswith(start)), None)
