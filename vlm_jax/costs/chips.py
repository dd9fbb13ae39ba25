"""Accelerators: speeds, memories and links, as their vendors give them.

Sources: cloud.google.com/tpu/docs, one page a version (v2, v3, v4, v5e, v5p, v6e, tpu7x), read in November 2026: peak
bfloat16 FLOP/s, HBM, bidirectional bandwidth of the inter-chip interconnect, which is divided by twice the number of
links. NVIDIA's data sheets of A100 80GB SXM, H100 SXM and PCIe, H200, HGX B200 and L4: dense, without sparsity; a link
is one of NVLink. Clocks: Jouppi et al. 2023 for v4; those of v5e and v5p follow from peak FLOP/s and the number of
matrix units, 2 * 128 * 128 FLOPs a cycle each; that of v6e from cycles that its compiler estimates for products of
known time.
"""

import dataclasses

GB, GIB = 1e9, float(2**30)


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one JAX device of a kind can do.

    Attributes:
      name: as in a topology, `v5p:4x4x4`; of a GPU the vendor's.
      kind: start of the JAX device kind.
      flops: dense bfloat16 FLOP/s.
      hbm_bytes: memory.
      hbm_bandwidth: bytes a second between memory and core.
      link_bandwidth: bytes a second in one direction of one link, or of all links to a switch; 0 where there is none.
      dims: dimensions of the torus or mesh that the links form, two for each; 0 for a switch.
      devices_per_chip: JAX devices of one chip.
      clock: cycles a second; None where not known.
    """

    name: str
    kind: str
    flops: float
    hbm_bytes: float
    hbm_bandwidth: float
    link_bandwidth: float
    dims: int
    devices_per_chip: int = 1
    clock: float | None = None


# First match of `kind` wins, so that longer starts come first.
CHIPS = (
    Chip("v2", "TPU v2", 22.5e12, 8 * GIB, 350 * GB, 31 * GB, 2, 2, 0.7e9),
    Chip("v3", "TPU v3", 61.5e12, 16 * GIB, 450 * GB, 41 * GB, 2, 2, 0.94e9),
    Chip("v4i", "TPU v4 lite", 138e12, 8 * GIB, 614 * GB, 50 * GB, 1, 1, 1.05e9),
    Chip("v4", "TPU v4", 275e12, 32 * GIB, 1228 * GB, 50 * GB, 3, 1, 1.05e9),
    Chip("v5e", "TPU v5 lite", 197e12, 16 * GIB, 819 * GB, 50 * GB, 2, 1, 1.5e9),
    Chip("v5e", "TPU v5e", 197e12, 16 * GIB, 819 * GB, 50 * GB, 2, 1, 1.5e9),
    Chip("v5p", "TPU v5", 459e12, 95 * GIB, 2765 * GB, 100 * GB, 3, 1, 1.75e9),
    Chip("v6e", "TPU v6", 918e12, 32 * GIB, 1640 * GB, 100 * GB, 2, 1, 1.75e9),
    Chip("7x", "TPU7x", 1153.5e12, 96 * GIB, 3690 * GB, 100 * GB, 3, 2),
    Chip("A100", "NVIDIA A100", 312e12, 80 * GB, 2039 * GB, 300 * GB, 0),
    Chip("H100 PCIe", "NVIDIA H100 PCIe", 756e12, 80 * GB, 2000 * GB, 300 * GB, 0),
    Chip("H100", "NVIDIA H100", 989.4e12, 80 * GB, 3350 * GB, 450 * GB, 0),
    Chip("H200", "NVIDIA H200", 989.4e12, 141 * GB, 4800 * GB, 450 * GB, 0),
    Chip("B200", "NVIDIA B200", 2250e12, 180 * GB, 7700 * GB, 900 * GB, 0),
    Chip("L4", "NVIDIA L4", 121e12, 24 * GB, 300 * GB, 0.0, 0),
)


def chip_of(kind: str) -> Chip | None:
    """The chip of a JAX device kind (`device_kind`); None for others, as a CPU."""
    return next((chip for chip in CHIPS if kind.startswith(chip.kind)), None)


def peak_flops(kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of a JAX device of a kind; None where none is stated, as for a CPU."""
    chip = chip_of(kind)
    return None if chip is None else chip.flops
