"""Triton's interpreter, which runs a kernel on the memory of the simulated device, in the order of its stream."""

from __future__ import annotations

import sys
import threading
from types import ModuleType
from typing import Any

from simulated_gpu import device

_lock = threading.RLock()  # the interpreter changes triton.language while it runs: one kernel at a time


def patch(interpreter: ModuleType) -> None:
    """Change the class that runs a grid."""
    executor = interpreter.GridExecutor
    run = executor.__call__
    executor._init_args_hst = lambda self, args, kwargs: (list(args), dict(kwargs))  # they are on the host
    executor._restore_args_dev = lambda self, *unchanged: None

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [_checked(a) for a in (*args, *kwargs.values()) if hasattr(a, "data_ptr")]
        if not tensors:
            return run(self, *args, **kwargs)
        torch = sys.modules["torch"]
        with torch._C._DisableTorchDispatch(), torch._C._AutoDispatchBelowAutograd():
            borrow = torch.ops.simulated_gpu.borrow
            # Kernels do not hold their tensors, so memory that is freed while they wait is lost.
            args = tuple(borrow(a) if hasattr(a, "data_ptr") else a for a in args)
            kwargs = {name: borrow(a) if hasattr(a, "data_ptr") else a for name, a in kwargs.items()}

            def kernel() -> None:
                with _lock, torch._C._DisableTorchDispatch():
                    run(self, *args, **kwargs)

            if device.call("deferred") or device.call("any_capturing"):
                torch.ops.simulated_gpu.launch(device.add_kernel(kernel), tensors)
            else:
                kernel()
        return None

    executor.__call__ = launch


def _checked(tensor: Any) -> Any:
    if tensor.device.type != "cuda":
        raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?) (simulated)")
    current = device.call("get_device")
    if tensor.device.index != current:
        raise RuntimeError(f"a kernel is launched on cuda:{current}, and a tensor is on {tensor.device} (simulated)")
    return tensor
