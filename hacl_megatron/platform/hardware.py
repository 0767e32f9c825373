"""GPUs that runs are planned for, and how much of what they promise a run is taken to get."""

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """From NVIDIA's data sheets; memory as the driver shows it. Bandwidths are bytes a second, in one direction."""

    memory: float
    """Bytes."""
    bf16_flops: float
    """Dense matrix products a second, bf16."""
    fp32_flops: float
    """The same in fp32 without TF32."""
    fp8_flops: float | None
    """The same in FP8; None: the chip has no such units."""
    memory_bandwidth: float
    node_bandwidth: float
    """NVLink of one GPU."""
    network_bandwidth: float
    """A GPU's share of its node's network: one HDR (A100) or NDR (H100) port each, as in DGX systems."""


GPUS = {
    "h200-141g": Gpu(
        memory=139.8 * GIB, bf16_flops=989e12, fp32_flops=67e12, fp8_flops=1979e12, memory_bandwidth=4.8e12,
        node_bandwidth=450e9, network_bandwidth=50e9,
    ),
    "h100-80g": Gpu(
        memory=79.1 * GIB, bf16_flops=989e12, fp32_flops=67e12, fp8_flops=1979e12, memory_bandwidth=3.35e12,
        node_bandwidth=450e9, network_bandwidth=50e9,
    ),
    "a100-80g": Gpu(
        memory=79.1 * GIB, bf16_flops=312e12, fp32_flops=19.5e12, fp8_flops=None, memory_bandwidth=2.04e12,
        node_bandwidth=300e9, network_bandwidth=25e9,
    ),
    "a100-40g": Gpu(
        memory=39.4 * GIB, bf16_flops=312e12, fp32_flops=19.5e12, fp8_flops=None, memory_bandwidth=1.56e12,
        node_bandwidth=300e9, network_bandwidth=25e9,
    ),
}  # fmt: skip


_CHIPS = {"A100": "a100-80g", "H100 80GB HBM3": "h100-80g", "H200": "h200-141g"}
"""Part of a device's name, and an entry of `GPUS` whose FLOP/s it has. Not H100s on PCIe, which have fewer."""


def gpu_of_device(device_name: str | None) -> str | None:
    """The entry of `GPUS` for a device that the driver calls so; None if it is not known here."""
    return next((gpu for part, gpu in _CHIPS.items() if part in (device_name or "")), None)


def peak_flops(device_name: str | None, *, bf16: bool) -> float | None:
    """What the data sheet promises of a device that the driver calls so; None if it is not known here."""
    known = gpu_of_device(device_name)
    if known is None:
        return None
    return GPUS[known].bf16_flops if bf16 else GPUS[known].fp32_flops


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Where the run would go, and what part of its promise is expected."""

    gpu_name: str
    gpus_per_node: int
    compute_efficiency: float = 0.55
    """Share of the peak that matrix products reach, recomputed ones counted. 0.52 to 0.57 on one H200, in bf16 with
    Transformer Engine and flash-attn; 0.47 on one H100 without."""
    fp8_efficiency: float = 0.42
    """The same in FP8, of FP8's peak: 0.42 on one H200."""
    bandwidth_efficiency: float = 0.7
    """Share of a link's bandwidth that collectives reach."""
    reserve: float = 2 * GIB
    """Bytes kept for the CUDA context, NCCL's buffers and fragmentation."""

    @property
    def gpu(self) -> Gpu:
        return GPUS[self.gpu_name]
