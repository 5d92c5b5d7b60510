"""The machine that a measurement ran on, and the memory that a call takes on it."""

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path

import torch


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """What speed depends on: hardware, threads and versions."""
    cpu = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpu.read_text()) if cpu.is_file() else None
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "transformers-confu")},
    }


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    """From here on [`peak_memory`] counts."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif platform.system() == "Linux":
        try:
            Path("/proc/self/clear_refs").write_text("5")  # proc(5): sets the peak to the present size
        except OSError:  # forbidden in some containers: the peak is then that of the whole process
            pass


def peak_memory(device: torch.device) -> int:
    """
    Most bytes in use since the reset: allocated on a CUDA device, resident in this process elsewhere. A process keeps
    what it has freed, so on a CPU earlier calls count too. 0 where the system does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+)", status.read_text()) if status.is_file() else None
    return int(peak[1]) * 1024 if peak else 0
