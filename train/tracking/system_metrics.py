"""What the node does meanwhile: CPU, memory, disk, network and GPUs, under MLflow's names."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil


class SystemMetrics:
    """A daemon thread that hands a sample to `log` every `every_s` seconds.

    The GPUs are those that NVML shows on this node (in a SLURM job those of the job); without
    pynvml or a driver there are none. NVML makes no CUDA context, torch.cuda could.
    """

    def __init__(
        self, log: Callable[[Mapping[str, float]], None], folder: Path, every_s: float
    ) -> None:
        self._log, self._folder, self._every_s = log, folder, every_s
        self._stopping = threading.Event()
        self._nvml, self._gpus = open_gpus()
        network = psutil.net_io_counters()
        self._network = (network.bytes_recv, network.bytes_sent) if network else (0, 0)
        psutil.cpu_percent()  # the first call has nothing to compare with and says 0
        self._thread = threading.Thread(target=self._run, name="system-metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, without waiting for a sample that hangs."""
        self._stopping.set()
        self._thread.join(timeout=1.0)

    def sample(self) -> dict[str, float]:
        """Return one sample; a megabyte is 1e6 bytes, network counts from the start of this."""
        memory, disk = psutil.virtual_memory(), psutil.disk_usage(str(self._folder))
        values = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_megabytes": memory.used / 1e6,
            "system_memory_usage_percentage": memory.percent,
            "disk_usage_percentage": disk.percent,
            "disk_usage_megabytes": disk.used / 1e6,
            "disk_available_megabytes": disk.free / 1e6,
        }
        if network := psutil.net_io_counters():
            received, sent = self._network
            values["network_receive_megabytes"] = (network.bytes_recv - received) / 1e6
            values["network_transmit_megabytes"] = (network.bytes_sent - sent) / 1e6
        for index, gpu in enumerate(self._gpus):
            values |= {f"gpu_{index}_{name}": v for name, v in self._sample_gpu(gpu).items()}
        return {f"system/{name}": value for name, value in values.items()}

    def _run(self) -> None:
        while not self._stopping.wait(self._every_s):
            with contextlib.suppress(Exception):  # a sample is not worth a line, let alone a run
                self._log(self.sample())

    def _sample_gpu(self, gpu: Any) -> dict[str, float]:
        """Return what this GPU can tell; a MIG slice, say, knows no utilization."""
        nvml = self._nvml
        values: dict[str, float] = {}
        with contextlib.suppress(nvml.NVMLError):
            memory = nvml.nvmlDeviceGetMemoryInfo(gpu)
            values["memory_usage_megabytes"] = memory.used / 1e6
            values["memory_usage_percentage"] = 100 * memory.used / memory.total
        with contextlib.suppress(nvml.NVMLError):
            values["utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(gpu).gpu
        with contextlib.suppress(nvml.NVMLError):
            watts = nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3
            values["power_usage_watts"] = watts
            limit = nvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1e3
            values["power_usage_percentage"] = 100 * watts / limit
        return values


def open_gpus() -> tuple[Any, list[Any]]:
    """Return the NVML module and a handle of each GPU; (None, []) where there is no NVML."""
    try:
        pynvml: Any = importlib.import_module("pynvml")  # in no requirement, so for mypy unknown
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        return pynvml, [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
    except Exception:
        return None, []
