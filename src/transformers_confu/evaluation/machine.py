"""The machine that a measurement ran on, and the memory that a call takes on it."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """What speed depends on: hardware, threads and versions."""
    description: dict[str, str | int] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    return description | {name: version(name) for name in ("torch", "transformers", "transformers-confu")}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


class PeakMemory:
    r"""
    The most memory in use since `reset`: allocated on a CUDA device, resident in this process elsewhere.

    A process keeps memory that it has freed, so on a CPU the peak of a call includes what earlier calls left behind.
    """

    def __init__(self, device: torch.device):
        self.device = device

    def reset(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif platform.system() == "Linux":
            try:
                Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets the peak to the present size
            except OSError:  # forbidden in some containers: the peak is then that of the whole process
                pass

    def read(self) -> int:
        """Bytes; 0 where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if platform.system() == "Linux":
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return 0
