"""NVIDIA GPUs that programs can be compiled for without having one, and how XLA is told of them.

XLA tunes its kernels by running them, which it cannot do here: it takes default tiles, so memory is
meaningful, and bytes and seconds are those of an untuned program.
"""

import dataclasses
import os

# The share of a GPU's memory that JAX takes as its pool (docs.jax.dev, "GPU memory allocation").
DEFAULT_POOL = 0.75
LARGEST_HOST = 8  # GPUs that NVLink or PCIe joins


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One GPU: NVIDIA's figures, and those by which XLA chooses and checks its kernels."""

    name: str
    capability: tuple[int, int]
    memory_bytes: int  # that CUDA reports in all
    memory_gbs: float  # GB/s
    bf16_tflops: float  # dense, sums in float32
    link_gbs: float  # GB/s that it receives from the GPUs of its host together
    cores: int  # streaming multiprocessors
    units_per_core: int  # of float32
    threads_per_core: int
    clock_ghz: float
    l2_bytes: int
    shared_bytes: int  # shared memory of a core; a block can have 1 KiB less

    @property
    def pool_gib(self) -> float:
        """GiB of JAX's pool, by XLA_PYTHON_CLIENT_MEM_FRACTION if it is set."""
        share = os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "") or DEFAULT_POOL
        return round(float(share) * self.memory_bytes / 2**30, 2)

    def describe_target(self) -> str:
        """Returns the text form of XLA's GpuTargetConfigProto."""
        major, minor = self.capability
        return f"""
        gpu_device_info {{
          threads_per_block_limit: 1024 threads_per_warp: 32
          threads_per_core_limit: {self.threads_per_core}
          shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_bytes}
          shared_memory_per_block_optin: {self.shared_bytes - 1024}
          core_count: {self.cores} fpus_per_core: {self.units_per_core}
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
          memory_bandwidth: {int(self.memory_gbs * 1e9)} l2_cache_size: {self.l2_bytes}
          clock_rate_ghz: {self.clock_ghz} device_memory_size: {self.memory_bytes}
          cuda_compute_capability {{ major: {major} minor: {minor} }}
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        device_description_str: "{self.name}"
        """


# TFLOP/s, GB/s and links: NVIDIA's data sheets of H100, H200, A100 and L4, and its white paper on
# the Ada architecture (RTX 4090: 165 TFLOP/s with sums in float32). A link is half of the sheet's
# figure for both directions: NVLink 900 and 600 GB/s, PCIe 4 x16 64 GB/s. What XLA is told of the
# first three is openxla/xla, xla/backends/gpu/target_config/specs; of the others, that white paper.
# The H200, L4 and 4090 have the memory that torch reports there: 139.8, 22.0 and 23.6 GiB.
GPUS = {
    "h100": Gpu(
        *("NVIDIA H100 80GB HBM3", (9, 0), 84_942_979_072, 3352.0, 989.0, 450.0),
        *(132, 128, 2048, 1.98, 50 * 2**20, 228 * 2**10),
    ),
    "h200": Gpu(
        *("NVIDIA H200", (9, 0), 150_109_880_320, 4800.0, 989.0, 450.0),
        *(132, 128, 2048, 1.98, 50 * 2**20, 228 * 2**10),
    ),
    "a100": Gpu(
        *("NVIDIA A100-SXM4-80GB", (8, 0), 85_100_068_864, 2039.0, 312.0, 300.0),
        *(108, 64, 2048, 1.41, 40 * 2**20, 164 * 2**10),
    ),
    "l4": Gpu(
        *("NVIDIA L4", (8, 9), 23_600_000_000, 300.0, 121.0, 32.0),
        *(58, 128, 1536, 2.04, 48 * 2**20, 100 * 2**10),
    ),
    "rtx4090": Gpu(
        *("NVIDIA GeForce RTX 4090", (8, 9), 25_386_000_000, 1008.0, 165.2, 32.0),
        *(128, 128, 1536, 2.52, 72 * 2**20, 100 * 2**10),
    ),
}
