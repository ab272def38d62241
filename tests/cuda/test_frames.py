"""GPU frames: failures of each driver call in turn, and leaks."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from fluxmoe.core.memory import dlpack
from fluxmoe.core.memory.arena import Arena
from fluxmoe.core.memory.dlpack import Exported
from fluxmoe.cuda.driver import CudaDriver
from fluxmoe.cuda.fake import FakeDriver, Refused
from fluxmoe.cuda.frames import FRAME_BYTES, CudaSubstrate
from fluxmoe.errors import DeviceMemoryError, MissingDependencyError, SubstrateError
from fluxmoe.sizes import exact, shown
from fluxmoe.testing.faults import FaultPlan
from tests.core.rig import FRAME, FakeCuda, Leaks

OUT = Refused(FakeDriver.CUresult.CUDA_ERROR_OUT_OF_MEMORY)
NO = Refused(FakeDriver.CUresult.CUDA_ERROR_UNKNOWN)


def frames(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def memory(address: int, nbytes: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))


@pytest.fixture
def make():
    leaks, made = Leaks(), []

    def make(*args, **options) -> FakeCuda:
        made.append(FakeCuda(*args, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
    leaks.assert_none()


def passed(substrate: FakeCuda, *names: str) -> list[int]:
    return [substrate.fake.plan.passed[name] for name in names]


# --- minimal numbers of calls ---------------------------------------------------------------------


def test_a_commit_maps_each_frame_and_sets_access_and_clears_once(make):
    s = make(16)
    address = s.reserve(8 * FRAME)
    s.commit(address, frames(3, 4, 9, 1, 2))
    calls = ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async", "cuMemUnmap"]
    assert passed(s, *calls) == [5, 5, 1, 1, 0]
    s.decommit(address, 5)
    assert passed(s, *calls) == [5, 5, 1, 1, 1]


def test_frames_are_made_once_and_recycled_clean(make):
    s = make(4, recycle=True)
    address = s.reserve(4 * FRAME)
    for _ in range(3):
        s.commit(address, frames(2, 3))
        assert not memory(address, 2 * FRAME).any()
        memory(address, 2 * FRAME)[...] = 7
        s.decommit(address, 2)
        s.release(frames(2, 3))
        assert s.allocated() == 2 * FRAME
    assert passed(s, "cuMemCreate", "cuMemRelease") == [2, 0]


def test_a_frame_may_be_several_pieces_of_the_device(make):
    s = make(4, 3 * FRAME)
    address = s.reserve(2 * 3 * FRAME)
    s.commit(address, frames(1, 3))
    memory(address, 6 * FRAME)[...] = 5
    s.decommit(address + 3 * FRAME, 1)
    assert memory(address, 6 * FRAME)[:: 3 * FRAME].tolist() == [5, 0xFF]


@pytest.mark.parametrize("size", [0, -FRAME, 1000, FRAME + 1])
def test_a_frame_is_whole_pieces_of_the_device(size):
    fake = FakeDriver()
    cuda = CudaDriver(fake)
    with pytest.raises(SubstrateError, match=f"frame of {exact(size)} is .* Fake GPU") as info:
        CudaSubstrate(cuda, 4, size)
    assert info.value.where == "frame_bytes"
    cuda.close()
    assert not fake.live()
    fake.close()
    assert FRAME_BYTES == 2 << 20


def test_nothing_is_unmapped_before_the_kernels_are_through(make):
    s = make(4, pace="kernels")
    address = s.reserve(2 * FRAME)
    s.commit(address, frames(0, 1))
    seen = []
    s.fake.launch(lambda: seen.append(int(memory(address, 1)[0])))
    s.decommit(address, 2)  # without waiting, the fake's context would be lost
    assert seen == [0]
    s.commit(address, frames(0))


# --- failures -------------------------------------------------------------------------------------


def test_out_of_memory_is_told_apart_and_takes_nothing(make):
    s = make(8, pieces=4)
    address = s.reserve(8 * FRAME)
    s.commit(address, frames(0, 1))
    with pytest.raises(
        DeviceMemoryError, match=f"frames of {shown(4 * FRAME)}: 0 B of {shown(4 * FRAME)} is"
    ) as info:
        s.commit(address + 2 * FRAME, frames(2, 3, 4))
    assert info.value.code == "FM308"
    assert info.value.where == "cuMemCreate"
    assert "memory.budget" in info.value.fix
    assert s.allocated() == 2 * FRAME
    assert len(s.fake._maps) == 2
    s.commit(address + 2 * FRAME, frames(2, 3))


def test_an_error_names_the_call_the_result_and_the_way_out(make):
    s = make(4)
    s.fake.plan.arm("cuMemMap", Refused(FakeDriver.CUresult.CUDA_ERROR_INVALID_VALUE))
    with pytest.raises(SubstrateError) as info:
        s.commit(s.reserve(FRAME), frames(0))
    error = info.value
    assert (error.code, error.where) == ("FM301", "cuMemMap")
    assert "CUDA_ERROR_INVALID_VALUE" in error.what
    assert "report" in error.fix


def scenario(s: CudaSubstrate) -> None:
    """Use all functions of a substrate."""
    first, second = s.reserve(6 * FRAME), s.reserve(3 * FRAME)
    s.commit(first + FRAME, frames(1, 2, 5))
    s.commit(second, frames(7, 0))
    s.decommit(first + 2 * FRAME, 2)
    s.release(frames(2, 5))
    s.commit(first + 2 * FRAME, frames(5, 3))
    s.unreserve(second, 3 * FRAME)
    s.release(frames(7, 0))


SITES = [
    "cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDevicePrimaryCtxRetain",
    "cuDeviceGetAttribute", "cuMemGetAllocationGranularity", "cuCtxPushCurrent", "cuCtxPopCurrent",
    "cuStreamCreate", "cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess",
    "cuMemsetD8Async", "cuStreamSynchronize", "cuCtxSynchronize", "cuMemUnmap", "cuMemRelease",
    "cuMemAddressFree", "cuStreamDestroy", "cuDevicePrimaryCtxRelease",
]  # fmt: skip


def test_the_sites_are_all_the_calls_that_are_made():
    plan = FaultPlan()
    s = FakeCuda(8, plan=plan)
    scenario(s)
    s.close()
    assert set(plan.passed) == set(SITES)


@pytest.mark.parametrize("recycle", [True, False])
@pytest.mark.parametrize("site", SITES)
def test_whatever_call_fails_it_is_an_error_and_nothing_is_lost(site, recycle):
    nth = 0
    while True:
        nth += 1
        leaks, plan = Leaks(), FaultPlan()
        plan.arm(site, NO, nth)
        fake = FakeDriver(8, plan=plan)
        errors, s, cuda = [], None, None
        try:
            cuda = CudaDriver(fake)
            s = CudaSubstrate(cuda, 8, FRAME, recycle=recycle)
            scenario(s)
        except SubstrateError as error:
            errors.append(error)
        for each in filter(None, [s, s, cuda, cuda]):  # refused calls succeed on the second try
            try:
                each.close()
            except SubstrateError as error:
                errors.append(error)
        struck = plan.struck[site]
        # A context that cannot be popped stays.
        left = {"contexts": 1} if struck and site == "cuCtxPopCurrent" else {}
        assert fake.live() == left, (site, nth)
        del fake.plan
        fake.close()
        leaks.assert_none()
        if not struck:
            return
        # `close` completed the failed `unreserve`.
        again = ("cuCtxPushCurrent", "cuCtxSynchronize", "cuMemUnmap", "cuMemAddressFree")
        assert errors or site in (*again, "cuCtxPopCurrent")
        assert all("CUDA_ERROR_UNKNOWN" in str(error) for error in errors)
        assert all(error.where == site for error in errors)


@pytest.mark.parametrize("site", ["cuMemMap", "cuMemSetAccess", "cuMemsetD8Async"])
def test_a_commit_that_fails_maps_nothing_even_if_that_cannot_be_undone_at_first(make, site):
    s = make(8)
    address = s.reserve(5 * FRAME)
    s.commit(address, frames(7))
    s.fake.plan.arm(site, NO, lasting=True)
    undo, s.fake.cuMemUnmap = s.fake.cuMemUnmap, lambda *args: (NO.result,)
    with pytest.raises(SubstrateError, match="UNKNOWN"):
        s.commit(address + FRAME, frames(1, 2, 3))
    s.fake.cuMemUnmap = undo
    s.fake.plan.disarm()
    s.commit(address + FRAME, frames(3, 1, 2))
    assert not memory(address, 4 * FRAME).any()


def test_a_device_that_is_not_there():
    fake = FakeDriver()
    with pytest.raises(SubstrateError, match="no CUDA device 3; devices found: 1") as info:
        CudaDriver(fake, 3)
    assert "nvidia-smi" in info.value.fix
    fake.close()


def test_a_driver_that_is_not_installed():
    class Missing:
        def cuInit(self, flags):
            raise RuntimeError("libcuda.so.1 cannot be found")

    with pytest.raises(SubstrateError, match=r"libcuda\.so\.1 cannot be found") as info:
        CudaDriver(Missing())
    assert "driver" in info.value.fix


def test_bindings_that_are_not_installed(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setitem(sys.modules, "cuda", None)
    with pytest.raises(MissingDependencyError, match="CUDA bindings") as info:
        CudaDriver()
    assert info.value.fix == "pip install 'fluxmoe[cuda]'"


# --- tensors --------------------------------------------------------------------------------------


def test_an_arena_is_a_tensor_without_a_copy(make):
    s = make(8)
    arena = Arena(s, 4 * FRAME)
    exported = arena.export(5, 3000)
    assert exported.__dlpack_device__() == (dlpack.CUDA, 0)
    # The fake's memory is host memory, so a CPU tensor can read it.
    tensor = torch.from_dlpack(Exported(exported.address, 5, 3000, (dlpack.CPU, 0)))
    assert (tensor.shape, tensor.dtype) == ((5, 3000), torch.uint8)
    assert tensor.data_ptr() == arena.address
    arena.commit(0, frames(5, 1, 6, 2))
    tensor[3, :2] = torch.tensor([7, 9], dtype=torch.uint8)
    assert arena.rows(5, 3000)[3, :3].tolist() == [7, 9, 0]
    assert tensor.view(torch.bfloat16).shape == (5, 1500)
    arena.close()


def test_what_is_lent_is_forgotten_when_nobody_has_it():
    buffer = np.arange(12, dtype=np.uint8)
    exported = Exported(buffer.ctypes.data, 3, 4, (dlpack.CPU, 0))
    before = len(dlpack._lent)
    tensors = [torch.from_dlpack(exported) for _ in range(3)]
    capsule = exported.__dlpack__()
    assert len(dlpack._lent) == before + 4
    values = tensors[0].tolist()
    assert values == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    del tensors, capsule
    assert len(dlpack._lent) == before
