"""The library of the simulated devices, as Python calls it."""

from __future__ import annotations

import atexit
import ctypes
import traceback
from collections.abc import Callable
from ctypes import c_char_p, c_int, c_int64
from itertools import count
from pathlib import Path

path: Path | None = None  # of the library
_library: ctypes.CDLL | None = None
_kernels: dict[int, Callable[[], None]] = {}  # that were launched and may run, or run again
_numbers = count()
_Callback = ctypes.CFUNCTYPE(c_int, c_int64)

_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    **dict.fromkeys(("deferred", "device_count", "get_device", "get_sync_debug"), (c_int, ())),
    **dict.fromkeys(("capturing", "any_capturing", "is_in_bad_fork"), (c_int, ())),
    **dict.fromkeys(("live_bytes", "peak_bytes", "live_blocks", "get_stream"), (c_int64, (c_int,))),
    **dict.fromkeys(("hand_out_default", "set_sync_debug", "reset_peak"), (None, (c_int,))),
    "start": (None, ()),
    "set_stream": (None, (c_int, c_int64)),
    "set_device": (c_char_p, (c_int,)),
    "synchronize": (c_char_p, (c_int,)),
    "graph_begin": (c_char_p, (ctypes.POINTER(c_int64),)),
    "graph_end": (c_char_p, ()),
    "graph_replay": (c_char_p, (c_int64,)),
    "graph_reset": (None, (c_int64,)),
    "graph_size": (c_int64, (c_int64,)),
    "set_callbacks": (None, (_Callback, _Callback)),
}


def load() -> None:
    """Load the library, once."""
    global _library
    if _library is None:
        _library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(_library, f"sim_{name}")
            function.restype, function.argtypes = result, arguments
        _library.sim_set_callbacks(_on_call, _on_drop)
        # Graphs that are never reset are destroyed after the interpreter.
        atexit.register(_library.sim_set_callbacks, _Callback(), _Callback())


def call(name: str, *arguments: object) -> int:
    """Call the library's function ``sim_<name>``. Raise RuntimeError if it returns a message."""
    result = getattr(_library, f"sim_{name}")(*arguments)
    if isinstance(result, bytes):
        raise RuntimeError(result.decode())
    return result if result is not None else 0


def begin_graph() -> int:
    """Begin a capture on the current stream; its number."""
    number = c_int64()
    call("graph_begin", ctypes.byref(number))
    return number.value


def add_kernel(run: Callable[[], None]) -> int:
    """A number for a function that the library may call, until it drops it."""
    number = next(_numbers)
    _kernels[number] = run
    return number


@_Callback
def _on_call(number: int) -> int:
    try:
        _kernels[number]()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


@_Callback
def _on_drop(number: int) -> int:
    _kernels.pop(number, None)
    return 0
