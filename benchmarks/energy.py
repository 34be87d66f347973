"""Energy counters of the machine: Intel and AMD processors' RAPL, NVIDIA's NVML."""

import ctypes
import math
from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
UNAVAILABLE = "not available here"


def joules_counter(device: str, powercap: Path = POWERCAP) -> Callable[[], float] | None:
    """Reads the joules that the processors (`cpu`) or the first GPU (`cuda`) have taken since some
    moment, all that runs on them together; None where the machine does not tell.

    RAPL's counters turn over after some minutes at full load: what turned over once since the last
    reading is counted.
    """
    return _nvml() if device == "cuda" else _rapl(powercap)


def _rapl(powercap: Path) -> Callable[[], float] | None:
    # Packages are intel-rapl:0, :1 ..; what lies in them, intel-rapl:0:0 .., they contain.
    zones = [its for its in powercap.glob("intel-rapl:[0-9]*") if its.name.count(":") == 1]

    def microjoules(name: str) -> list[int]:
        return [int((zone / name).read_text()) for zone in zones]

    try:
        last, ranges = microjoules("energy_uj"), microjoules("max_energy_range_uj")
    except OSError:  # since 2020 for root alone
        return None
    if not zones:
        return None
    total = 0

    def read() -> float:
        nonlocal last, total
        now = microjoules("energy_uj")
        total += sum((b - a) % its for a, b, its in zip(last, now, ranges, strict=True))
        last = now
        return total / 1e6

    return read


def _nvml() -> Callable[[], float] | None:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    gpu, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()

    def read() -> float:
        failed = nvml.nvmlDeviceGetTotalEnergyConsumption(gpu, ctypes.byref(millijoules))
        return float("nan") if failed else millijoules.value / 1e3

    failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(gpu))
    if failed or math.isnan(read()):
        return None
    return read
