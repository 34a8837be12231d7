"""Which faster computation is used where."""

from __future__ import annotations

import functools

import torch

MODES = ("measured", "all", "off")  # --admin-fast

H100 = "NVIDIA H100 80GB HBM3"

# By feature, the devices on which benchmarks found it to help: "cpu", or a GPU's torch.cuda.get_device_name().
# --admin-fast all uses every feature on every CPU and GPU.
MEASURED: dict[str, frozenset[str]] = {
    "sub-layer": frozenset({"cpu"}),
    "attention": frozenset({"cpu"}),
    "one projection": frozenset(),  # of queries, keys and values
    "beams": frozenset({"cpu"}),
    "dropout": frozenset(),  # fastest on CPUs, but a seed's masks are not stock's: for those who ask
    "loss": frozenset({"cpu"}),
    "adam": frozenset({"cpu", H100}),
}


def wanted(feature: str, device: torch.device, mode: str) -> bool:
    """Whether --admin-fast ``mode`` asks for a feature on this device."""
    if mode == "all":
        return device.type in ("cpu", "cuda")
    return mode == "measured" and _name(device) in MEASURED[feature]


@functools.lru_cache(maxsize=None)
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
