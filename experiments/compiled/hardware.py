"""Published figures of TPUs and GPUs: peaks, memories, links, clocks, and the slices that are sold.

TPUs, per chip:

    v4    docs.cloud.google.com/tpu/docs/v4: 32 GiB at 1200 GB/s; Jouppi et al., ISCA 2023, arXiv
          2304.01433: 6 links of 50 GB/s each way
    v5e   docs.cloud.google.com/tpu/docs/v5e: 16 GB at 819 GB/s, 400 GB/s over 4 links both ways;
          4 matrix units of 128 x 128
    v5p   docs.cloud.google.com/tpu/docs/v5p: 95 GiB at 2765 GB/s, 1200 GB/s over 6 links both ways
    v6e   docs.cloud.google.com/tpu/docs/v6e: 32 GB at 1638 GB/s, 800 GB/s over 4 links both ways;
          2 matrix units of 256 x 256. (The page said 1640 GB/s, and 1600, before it said 1638.)

The same pages' bisection bandwidths agree with these links: 1.6 TB/s of a v5e pod are 32 links of
50 GB/s. Clocks are not published: these are peaks over what the matrix units do in a cycle.

A slice is a box of chips, one jax device each. Neighbours along each of its dimensions share a
link; the ends of a dimension are linked too (it is a ring) where the dimension is a multiple of 4
on v4 and v5p, whose cubes of 4 x 4 x 4 are switched together optically, and where it is the pod's
whole 16 on v5e and v6e.

GPUs: NVIDIA's data sheets of H200, H100, GH200, A100, L40S and L4; multiprocessors, shared memory
and second-level caches from the white papers of Hopper and Ampere.
"""

import math
import re
from dataclasses import dataclass

# Dense bfloat16 peak in FLOP/s per jax device, by prefix of device_kind. First match wins. A v2 or
# v3 device is one core, half a chip.
PEAK_FLOPS = (
    ("TPU v2", 22.5e12),
    ("TPU v3", 61.5e12),
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H100", 989e12),
    ("NVIDIA GH200", 989e12),
    ("NVIDIA A100", 312e12),
    ("NVIDIA L40S", 362e12),
    ("NVIDIA L4", 121e12),
)
# Bytes per second of a GPU's memory, likewise.
GPU_MEMORY_BYTES_PER_S = (
    ("NVIDIA H200", 4.8e12),
    ("NVIDIA H100", 3.35e12),
    ("NVIDIA A100", 2.0e12),
)
PLANES = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
BOXES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
LARGE_BOXES = ("8x8x16", "8x16x16", "16x16x16")


def peak_flops(device_kind: str) -> float | None:
    """Peak of one device in FLOP/s, or None where it is not known (as for CPUs)."""
    return _by_prefix(PEAK_FLOPS, device_kind)


def gpu_memory_bytes_per_s(device_kind: str) -> float | None:
    """Rate of a GPU's memory, or None where it is not known."""
    return _by_prefix(GPU_MEMORY_BYTES_PER_S, device_kind)


def _by_prefix(figures: tuple[tuple[str, float], ...], device_kind: str) -> float | None:
    return next((figure for prefix, figure in figures if device_kind.startswith(prefix)), None)


# --- TPUs


@dataclass(frozen=True)
class TpuChip:
    """One generation.

    hbm_bytes               of high-bandwidth memory
    hbm_bytes_per_s         its rate, reads and writes together
    link_bytes_per_s        rate of one link one way
    ring                    what size of a dimension closes to a ring, and every multiple of it
    slices                  published shapes of slices
    clock_hz                cycles per second
    matmul_flops_per_cycle  of all matrix units, in bfloat16
    """

    name: str
    hbm_bytes: float
    hbm_bytes_per_s: float
    link_bytes_per_s: float
    ring: int
    slices: tuple[str, ...]
    clock_hz: float | None = None
    matmul_flops_per_cycle: int | None = None


TPU_CHIPS = {
    chip.name: chip
    for chip in (
        TpuChip("v4", 32 * 2**30, 1200e9, 50e9, 4, BOXES + LARGE_BOXES),
        TpuChip("v5e", 16 * 2**30, 819e9, 50e9, 16, PLANES, 1.5e9, 4 * 128 * 128 * 2),
        TpuChip("v5p", 95 * 2**30, 2765e9, 100e9, 4, (*BOXES, *LARGE_BOXES, "16x16x24")),
        # The peak over the clock: twice what two units of 256 x 256 do in one pass.
        TpuChip("v6e", 32 * 2**30, 1638e9, 100e9, 16, PLANES, 1.75e9, 2 * 256 * 256 * 2 * 2),
    )
}


@dataclass(frozen=True)
class Slice:
    """A box of chips, such as v5p:8x8x8."""

    chip: TpuChip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def is_ring(self, dimension: int) -> bool:
        return self.shape[dimension] % self.chip.ring == 0


def parse_topology(name: str) -> Slice:
    """The slice that "v5p:8x8x8" names. Raises ValueError, with those that are known, for any other
    name."""
    generation, _, shape = name.partition(":")
    if generation not in TPU_CHIPS or shape not in TPU_CHIPS[generation].slices:
        known = (f"{x.name}:{{{','.join(x.slices)}}}" for x in TPU_CHIPS.values())
        raise ValueError(f"--topology must be one of {' '.join(known)}; got {name!r}")
    return Slice(TPU_CHIPS[generation], tuple(map(int, re.findall(r"\d+", shape))))


# --- GPUs

REGISTERS_PER_MULTIPROCESSOR = 65536
THREADS_PER_MULTIPROCESSOR = 2048
PROGRAMS_PER_MULTIPROCESSOR = 32


@dataclass(frozen=True)
class Gpu:
    """What compilers ask about a GPU.

    device_kind                  its name in jax
    capability                   compute capability, (major, minor)
    shared_bytes                 shared memory of a multiprocessor
    shared_bytes_of_one_program  what one program can have of it
    cache_bytes                  second-level cache
    memory_bytes                 device memory
    accelerated                  has instructions of this architecture alone, such as wgmma
    """

    device_kind: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_bytes: int
    shared_bytes_of_one_program: int
    cache_bytes: int
    memory_bytes: int
    accelerated: bool


# By the architecture that their code is compiled for.
GPUS = {
    "sm_90a": Gpu("NVIDIA H200", (9, 0), 132, 233472, 232448, 50 << 20, 141 << 30, True),
    "sm_80": Gpu("NVIDIA A100", (8, 0), 108, 167936, 166912, 40 << 20, 80 << 30, False),
}
