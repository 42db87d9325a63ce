"""How many GPUs torch will see, asked without importing torch (the command line must stay fast)."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys


def count_gpus() -> int:
    """NVIDIA GPUs that this process may use: 0 with a CPU-only torch, and CUDA_VISIBLE_DEVICES is obeyed."""
    if (torch := sys.modules.get("torch")) is not None:
        return torch.cuda.device_count()
    try:
        if importlib.metadata.version("torch").endswith("+cpu"):
            return 0
    except importlib.metadata.PackageNotFoundError:
        return 0
    n = installed_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return n
    names = [name.strip() for name in visible.split(",")]
    usable = 0
    for name in names:  # as CUDA does it: the list ends at the first entry that is not a device
        if not name or (name.lstrip("-").isdigit() and not 0 <= int(name) < n):
            break
        usable += 1
    return min(usable, n)


def installed_gpus() -> int:
    """NVIDIA GPUs of the machine, from the driver's management library; 0 without a driver."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return 0
    if nvml.nvmlInit_v2() != 0:
        return 0
    count = ctypes.c_uint(0)
    code = nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    nvml.nvmlShutdown()
    return count.value if code == 0 else 0


def gpu_memory() -> int:
    """Bytes of the smallest GPU of the machine; 0 where there is none or the driver does not say."""

    class _Memory(ctypes.Structure):
        _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]

    n = installed_gpus()
    if n == 0:
        return 0
    nvml = ctypes.CDLL("libnvidia-ml.so.1")
    if nvml.nvmlInit_v2() != 0:
        return 0
    found = []
    for index in range(n):
        handle, memory = ctypes.c_void_p(), _Memory()
        if (
            nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0
            and nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
        ):
            found.append(int(memory.total))
    nvml.nvmlShutdown()
    return min(found, default=0)
