"""CudaDriver: access to one device through the CUDA driver, with errors raised as exceptions.

The driver's functions come from ``cuda.bindings.driver``, which is imported only when the first
device is opened. Each function returns a tuple that starts with a ``CUresult``; ``CudaDriver``
returns the rest, or raises a ``SubstrateError`` that names the call and the result. Tests pass
``fluxmoe.cuda.fake.FakeDriver`` instead of the bindings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from fluxmoe.errors import DeviceMemoryError, MissingDependencyError, SubstrateError

_LOST = "the device has lost its state: restart this process; see dmesg for the cause"
_BUG = "this is a bug in FluxMoE; please report it"
_SEE = "see nvidia-smi, and dmesg for messages of the kernel module"
_FIXES = {
    "CUDA_ERROR_NO_DEVICE": "check nvidia-smi for a GPU that CUDA_VISIBLE_DEVICES allows",
    "CUDA_ERROR_INVALID_DEVICE": "check that nvidia-smi lists the requested GPU",
    "CUDA_ERROR_DEVICE_UNAVAILABLE": "another process has exclusive use of the GPU; see nvidia-smi",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "reboot: driver and kernel module versions differ",
    "CUDA_ERROR_NOT_SUPPORTED": "this GPU or its driver does not support the call",
    "CUDA_ERROR_ILLEGAL_ADDRESS": _LOST,
    "CUDA_ERROR_LAUNCH_FAILED": _LOST,
    "CUDA_ERROR_ECC_UNCORRECTABLE": _LOST,
    "CUDA_ERROR_INVALID_VALUE": _BUG,
    "CUDA_ERROR_INVALID_HANDLE": _BUG,
    "CUDA_ERROR_INVALID_CONTEXT": _BUG,
}


def load() -> Any:
    """Import the driver's bindings.

    Raises:
        MissingDependencyError: The bindings are not installed.
    """
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise MissingDependencyError(
            f"the CUDA bindings cannot be imported: {error}", fix="pip install 'fluxmoe[cuda]'"
        ) from error
    return driver


class CudaDriver:
    """A device and its primary context, which torch also uses.

    Args:
        api: The bindings or a replacement; None to import the bindings.
        ordinal: Index of the device among the visible devices.

    Attributes:
        version: CUDA version of the driver, such as 12080 for CUDA 12.8.
        device: The driver's device number.

    Raises:
        MissingDependencyError: The bindings are not installed.
        SubstrateError: There is no driver or no such device.
    """

    def __init__(self, api: Any = None, ordinal: int = 0) -> None:
        self.api = load() if api is None else api
        self.ordinal = ordinal
        self._context: Any = None
        self.call("cuInit", 0)
        self.version = int(self.call("cuDriverGetVersion"))
        found = int(self.call("cuDeviceGetCount"))
        if not 0 <= ordinal < found:
            raise SubstrateError(
                f"no CUDA device {ordinal}; devices found: {found}",
                fix=_FIXES["CUDA_ERROR_NO_DEVICE"],
            )
        self.device = self.call("cuDeviceGet", ordinal)
        self._context = self.call("cuDevicePrimaryCtxRetain", self.device)

    def call(self, name: str, *args: Any) -> Any:
        """Call the driver; return None, the only result, or the tuple of results.

        Raises:
            DeviceMemoryError: The device is out of memory.
            SubstrateError: The call failed for any other reason.
        """
        try:
            result, *answers = getattr(self.api, name)(*args)
        except (AttributeError, RuntimeError) as error:  # the function or the library is missing
            raise SubstrateError(
                f"the CUDA driver cannot be called: {error}",
                where=name,
                fix="install or update NVIDIA's driver; nvidia-smi shows the installed version",
            ) from error
        if result == self.api.CUresult.CUDA_SUCCESS:
            return answers[0] if len(answers) == 1 else tuple(answers) or None
        raise _refusal(name, result)

    def ready(self, name: str, *args: Any) -> bool:
        """Call a query such as ``cuEventQuery``; return False if not ready.

        Raises the same errors as ``call``.
        """
        (result,) = getattr(self.api, name)(*args)
        if result == self.api.CUresult.CUDA_ERROR_NOT_READY:
            return False
        if result == self.api.CUresult.CUDA_SUCCESS:
            return True
        raise _refusal(name, result)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the device's context current on this thread; restore the previous one afterwards.

        A failure to restore is ignored: the work is done, and the next call reports the error.
        """
        self.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.api.cuCtxPopCurrent()

    def attribute(self, name: str) -> int:
        """Return a device attribute; ``name`` is a suffix such as ``ASYNC_ENGINE_COUNT``."""
        which = getattr(self.api.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(self.call("cuDeviceGetAttribute", which, self.device))

    @property
    def name(self) -> str:
        """Device name, such as ``NVIDIA H100 PCIe``."""
        text: bytes = self.call("cuDeviceGetName", 128, self.device)
        return text.split(b"\0")[0].decode(errors="replace")

    def memory(self) -> tuple[int, int]:
        """Return the free and total bytes of device memory."""
        with self.current():
            free, total = self.call("cuMemGetInfo")
        return int(free), int(total)

    def close(self) -> None:
        """Release the context. Idempotent."""
        if self._context is not None:
            self.call("cuDevicePrimaryCtxRelease", self.device)
            self._context = None


def _refusal(name: str, result: Any) -> SubstrateError:
    """Make the error for a failed call."""
    reason = getattr(result, "name", str(result))
    if reason == "CUDA_ERROR_OUT_OF_MEMORY":
        return DeviceMemoryError(
            f"the CUDA device is out of memory: {reason}",
            where=name,
            fix="lower memory.budget or stop other processes on the GPU (see nvidia-smi)",
        )
    return SubstrateError(
        f"the CUDA driver call failed: {reason}", where=name, fix=_FIXES.get(reason, _SEE)
    )


def no_range(name: str) -> AbstractContextManager[None]:
    """Return a context manager that does nothing, in place of a profiler range."""
    return nullcontext()


def nvtx_ranges() -> Callable[[str], AbstractContextManager[Any]]:
    """Return the function that makes NVIDIA profiler ranges, or ``no_range`` without ``nvtx``."""
    try:
        import nvtx
    except ImportError:
        return no_range
    annotate: Callable[[str], AbstractContextManager[Any]] = nvtx.annotate
    return annotate
