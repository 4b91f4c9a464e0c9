"""The members of ``torch._C`` that ``torch.cuda`` needs and that a CPU build lacks."""

from __future__ import annotations

import os
import sys
import time
import types
from collections.abc import Callable
from typing import Any

from simulated_gpu import refusals
from simulated_gpu.device import begin_graph, call

MEMORY = 16 << 30  # bytes of memory; the real limit is the memory of the host
_POOL = (0, 1)


def fill(core: Any) -> None:
    """Add to ``torch._C``, between its import and that of ``torch.cuda``."""
    core._CudaStreamBase, core._CudaEventBase = _stream_class(core), _event_class(core)
    core._CudaDeviceProperties, core._CUDAGraph = DeviceProperties, Graph
    core._has_cuda = True
    core._cudart = sys.modules["torch._C._cudart"] = _cudart()
    for name in ("_cuda_CUDAAllocator_AllocatorState", "_cuda_CUDAAllocator"):  # imported by name, never used
        setattr(core, name, type(name, (), {}))
    functions = {**_of_devices(core), **_of_streams(), **_of_memory(), **_NOTHING}
    for name, function in functions.items():
        setattr(core, name, function)
    _let_storages_be_on_devices(core)


class DeviceProperties:
    """The properties of an imaginary GPU, with common sizes, so that launch code takes its usual paths."""

    name, major, minor, multi_processor_count = "Simulated GPU (this is a CPU)", 9, 0, 8
    total_memory, L2_cache_size, warp_size = MEMORY, 1 << 20, 32
    gcnArchName = ""  # noqa: N815
    max_threads_per_multi_processor, max_threads_per_block, regs_per_multiprocessor = 2048, 1024, 65536
    shared_memory_per_block, shared_memory_per_block_optin, shared_memory_per_multiprocessor = 49152, 232448, 233472
    is_integrated = is_multi_gpu_board = 0
    uuid = "simulated"
    pci_bus_id = pci_device_id = pci_domain_id = 0
    clock_rate = memory_clock_rate = 1_000_000
    memory_bus_width = 1024


class Graph:
    """``torch.cuda.CUDAGraph``."""

    def __new__(cls, *args: object, **kwargs: object) -> Graph:
        return object.__new__(cls)

    def __init__(self, *args: object, **kwargs: object) -> None:
        self.number: int | None = None

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        self.number = begin_graph()

    def capture_end(self) -> None:
        call("graph_end")

    def replay(self) -> None:
        if self.number is None:
            raise RuntimeError("replay() of a graph that wasn't captured")
        call("graph_replay", self.number)

    def reset(self) -> None:
        if self.number is not None:
            call("graph_reset", self.number)
            self.number = None

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.reset()

    def pool(self) -> tuple[int, int]:
        return _POOL

    def instantiate(self) -> None: ...

    def enable_debug_mode(self) -> None: ...

    def debug_dump(self, path: str) -> None: ...

    def register_generator_state(self, state: object) -> None: ...


def _stream_class(core: Any) -> type:
    base = core.Stream

    class CudaStreamBase(base):  # type: ignore[misc]
        def __new__(
            cls,
            priority: int = 0,
            stream_id: int = 0,
            device_index: int = 0,
            device_type: int = 0,
            stream_ptr: int = 0,
        ) -> Any:
            if device_type:
                return base.__new__(cls, stream_id=stream_id, device_index=device_index, device_type=device_type)
            return base.__new__(cls, device=core.device("cuda", call("get_device")), priority=priority)

        @property
        def cuda_stream(self) -> int:
            return int(self.stream_id)

        @property
        def priority(self) -> int:
            return 0

        @staticmethod
        def priority_range() -> tuple[int, int]:
            return (0, -5)

    return CudaStreamBase


def _event_class(core: Any) -> type:
    base = core.Event

    class CudaEventBase(base):  # type: ignore[misc]
        def __new__(cls, enable_timing: bool = False, *flags: bool, **more: bool) -> Any:
            return base.__new__(cls, device=core.device("cuda"), enable_timing=enable_timing)

        def record(self, stream: Any = None) -> None:
            stream = stream or sys.modules["torch"].cuda.current_stream()
            if _host_times():
                stream.synchronize()
            self.recorded = time.perf_counter()
            base.record(self, stream)

        def wait(self, stream: Any = None) -> None:
            base.wait(self, stream or sys.modules["torch"].cuda.current_stream())

        def elapsed_time(self, end: Any) -> float:
            if not _host_times():
                raise refusals.timing()
            return float(1e3 * (end.recorded - self.recorded))

        @property
        def cuda_event(self) -> int:
            return int(self.event_id)

    return CudaEventBase


def _host_times() -> bool:
    return os.environ.get("SIMULATED_GPU_HOST_TIMES", "0") != "0"


def _nothing(*args: object, **kwargs: object) -> None:
    return None


_NOTHING: dict[str, Callable[..., Any]] = dict.fromkeys(
    (
        *("_cuda_ipc_collect", "_cuda_sleep", "_cuda_emptyCache", "_cuda_setMemoryFraction", "_host_emptyCache"),
        *("_cuda_resetAccumulatedMemoryStats", "_cuda_clearCublasWorkspaces", "_cuda_lock_mutex", "_cuda_unlock_mutex"),
    ),
    _nothing,
)


def _exchange(device: int) -> int:
    before = call("get_device")
    if device >= 0:
        call("set_device", device)
    return before


def _of_devices(core: Any) -> dict[str, Callable[..., Any]]:
    def start() -> None:
        torch = sys.modules["torch"]
        call("start")
        call("hand_out_default", 1)
        devices = range(call("device_count"))
        torch.cuda.default_generators = tuple(core.Generator(core.device("cuda", i)) for i in devices)
        call("hand_out_default", 0)
        torch.cuda._get_device_properties = lambda device: DeviceProperties()

    return {
        "_cuda_init": start,
        "_cuda_isInBadFork": lambda: bool(call("is_in_bad_fork")),
        "_cuda_getDeviceCount": lambda: call("device_count"),
        "_cuda_getDevice": lambda: call("get_device"),
        "_cuda_setDevice": lambda device: _nothing(_exchange(device)),
        "_cuda_exchangeDevice": _exchange,
        "_cuda_maybeExchangeDevice": lambda device: _exchange(device),  # a function of its own: Dynamo has a table
        "_cuda_hasPrimaryContext": lambda device: True,
        "_cuda_canDeviceAccessPeer": lambda a, b: True,
        "_cuda_synchronize": lambda: _nothing(call("synchronize", -1)),
        "_cuda_getArchFlags": lambda: "sm_90",
        "_cuda_getCompiledVersion": lambda: 13000,
        "_cuda_set_sync_debug_mode": lambda mode: _nothing(call("set_sync_debug", mode)),
        "_cuda_get_sync_debug_mode": lambda: call("get_sync_debug"),
    }


def _of_streams() -> dict[str, Callable[..., Any]]:
    def index(device: int) -> int:
        return device if device >= 0 else call("get_device")

    def set_stream(stream_id: int, device_index: int, device_type: int) -> None:
        call("set_device", device_index)
        call("set_stream", device_index, stream_id)

    return {
        "_cuda_getCurrentStream": lambda device: (call("get_stream", device), index(device), 1),
        "_cuda_getDefaultStream": lambda device: (0, index(device), 1),
        "_cuda_setStream": set_stream,
        "_cuda_getCurrentRawStream": lambda device: call("get_stream", device),
        "_cuda_isCurrentStreamCapturing": lambda: bool(call("capturing")),
        "_graph_pool_handle": lambda: _POOL,
    }


def _of_memory() -> dict[str, Callable[..., Any]]:
    def stats(device: int) -> dict[str, Any]:
        def each_pool(current: int, peak: int) -> dict[str, dict[str, int]]:
            numbers = {"current": current, "peak": peak, "allocated": 0, "freed": 0}
            return {pool: dict(numbers) for pool in ("all", "large_pool", "small_pool")}

        live, peak = call("live_bytes", device), call("peak_bytes", device)
        sizes = ("allocated_bytes", "reserved_bytes", "active_bytes", "inactive_split_bytes", "requested_bytes")
        found: dict[str, Any] = {name: each_pool(live, peak) for name in sizes}
        for name in ("allocation", "segment", "active", "inactive_split"):
            found[name] = each_pool(call("live_blocks", device), 0)
        return found | dict(num_alloc_retries=0, num_ooms=0, max_split_size=-1)

    return {
        "_cuda_memoryStats": stats,
        "_cuda_resetPeakMemoryStats": lambda device: _nothing(call("reset_peak", device)),
        "_cuda_memorySnapshot": lambda *pool: {"segments": []},
        "_cuda_getAllocatorBackend": lambda: "native",
    }


def _cudart() -> types.ModuleType:
    module: Any = types.ModuleType("torch._C._cudart")
    module.cudaMemGetInfo = lambda device: (MEMORY - call("live_bytes", device), MEMORY)
    module.cudaError = type("cudaError", (), {"success": 0})
    module.cudaGetErrorString = lambda code: "simulated"
    module.cudaDeviceSynchronize = lambda: call("synchronize", -1)
    module.cudaProfilerStart = module.cudaProfilerStop = lambda: 0
    return module  # type: ignore[no-any-return]


def _let_storages_be_on_devices(core: Any) -> None:
    """The constructor of a CPU build knows no device "cuda"."""
    new = core.StorageBase.__new__

    def new_storage(cls: type, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is not None and str(device).startswith("cuda"):
            torch = sys.modules["torch"]
            return torch.empty(args[0] if args else 0, dtype=torch.uint8, device=device).untyped_storage()
        return new(cls, *args, **kwargs) if device is None else new(cls, *args, device=device, **kwargs)

    sys.modules["torch.storage"].UntypedStorage.__new__ = staticmethod(new_storage)  # type: ignore[attr-defined]
