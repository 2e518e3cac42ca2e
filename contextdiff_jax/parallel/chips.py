"""Chips: operations and bytes that one does, holds and sends in a second."""

from __future__ import annotations

import dataclasses

GiB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A chip's peaks, from the vendors' data sheets.

    TPUs: cloud.google.com/tpu/docs (v5e and so on) and jax-ml.github.io/scaling-book, chapter 2.

    Attributes:
        peak: dense bf16 operations a second.
        hbm: bytes of memory; None for a chip that nothing is compiled for without having it.
        hbm_bandwidth: bytes a second of the memory.
        link: bytes a second over the links along one axis of the torus.
        clock: cycles a second, those of the peak.
        cores: devices that a topology described to the compiler has of one chip.
    """

    name: str
    peak: float
    hbm: float | None = None
    hbm_bandwidth: float | None = None
    link: float | None = None
    clock: float | None = None
    cores: int = 1

    def described(self) -> Chip:
        """The part of the chip that is one device of a described topology."""
        if self.cores == 1:
            return self
        return dataclasses.replace(
            self,
            name=f"{self.name} core",
            peak=self.peak / self.cores,
            hbm=self.hbm / self.cores,
            hbm_bandwidth=self.hbm_bandwidth / self.cores,
            cores=1,
        )


_V5E = Chip("v5e", 197e12, 15.75 * GiB, 8.2e11, 9e10, 1.5e9)
_V5P = Chip("v5p", 459e12, 95 * GiB, 2.76e12, 1.8e11, 1.75e9)
_V6E = Chip("v6e", 918e12, 31.25 * GiB, 1.64e12, 1.8e11, 1.75e9)
# By `jax.Device.device_kind`.
CHIPS = {
    "TPU v4": Chip("v4", 275e12, 32 * GiB, 1.2e12, 9e10, 1.05e9, cores=2),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "NVIDIA A100-SXM4-80GB": Chip("A100", 312e12),
    "NVIDIA H100 80GB HBM3": Chip("H100", 989e12),
    "NVIDIA H200": Chip("H200", 989e12),
}
