"""``fluxmoe.page`` and ``load``: policies given as classes or instances, and wrong types (B5)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fluxmoe
from fluxmoe.errors import ConfigError
from tests.torch.conftest import Load, answer, held, same


class MyLru(fluxmoe.EvictionPolicy):
    def score(self, view: fluxmoe.PageView, pages: Any) -> Any:
        return view.last_use[pages]


class Ahead(fluxmoe.PrefetchPolicy):
    lead = 1

    def propose(self, view: fluxmoe.PageView, access: fluxmoe.Access) -> Any:
        return view.page_of((access.layer + 1) % view.num_layers, [0])


@pytest.mark.parametrize("policy", [MyLru, MyLru(), {"kind": MyLru}])
def test_b5_a_class_or_an_instance_is_a_policy(load: Load, policy: Any) -> None:
    model = load()
    stock = answer(model)
    counted = []
    for eviction in (policy, "lru"):
        with fluxmoe.page(model, "1MiB", eviction=eviction) as paged:
            assert same(answer(model), stock)
            counted.append({key: paged.stats()[key] for key in ("hits", "misses", "evictions")})
    assert counted[0] == counted[1]


def test_b5_load_takes_them_too(load: Load, checkpoint: Callable[..., Path]) -> None:
    stock = answer(load())
    with fluxmoe.load(checkpoint(), "1MiB", eviction=MyLru(), prefetch=Ahead) as paged:
        assert same(answer(paged.model), stock)
        assert paged.stats()["loads_prefetch"] > 0


WRONG: dict[str, tuple[Callable[[torch.nn.Module, Path], object], str]] = {
    "a name": (lambda m, p: fluxmoe.page("name"), "must be a .*Module, not 'name'.*load"),
    "None": (lambda m, p: fluxmoe.page(None), "model must be .*, not None"),
    "memory": (lambda m, p: fluxmoe.page(m, None), "not a valid size: None"),
    "eviction": (lambda m, p: fluxmoe.page(m, eviction=Ahead), "no eviction policy in"),
    "eviction's type": (lambda m, p: fluxmoe.page(m, eviction=3), "eviction: .*not 3"),
    "prefetch": (lambda m, p: fluxmoe.page(m, prefetch=MyLru()), "no prefetch policy in"),
    "stores": (lambda m, p: fluxmoe.page(m, stores="host"), "must be a list, not 'host'"),
    "a store": (lambda m, p: fluxmoe.page(m, stores=["host"]), r"stores\.0: it must be a map"),
    "plugins": (lambda m, p: fluxmoe.page(m, plugins=3), "plugins: it must be a list, not 3"),
    "plugin": (lambda m, p: fluxmoe.page(m, plugins="pol.py"), "no such file; plugin pol.py"),
    "banks": (lambda m, p: fluxmoe.page(m, banks="many"), "memory.banks: .*'many'"),
    "threads": (lambda m, p: fluxmoe.page(m, copy_threads=-1), "copy_threads: .*not -1"),
    "strict": (lambda m, p: fluxmoe.page(m, strict_policies="perhaps"), "strict_.*'perhaps'"),
    "seed": (lambda m, p: fluxmoe.page(m, seed=None), "seed: .*not None"),
    "path": (lambda m, p: fluxmoe.load(None), "path must be a path, not None"),
    "bytes": (lambda m, p: fluxmoe.load(bytes(p)), "path must be a path, not b'"),
    "a model": (lambda m, p: fluxmoe.load(m), "path must be a path, not .*fluxmoe.page"),
    "dtype": (lambda m, p: fluxmoe.load(p, dtype="fp8"), 'dtype must be "auto" or one of bfloat16'),
    "integers": (lambda m, p: fluxmoe.load(p, dtype=torch.int8), "not torch.int8"),
    "no dtype": (lambda m, p: fluxmoe.load(p, dtype=None), "dtype must be .*not None"),
    "a function": (lambda m, p: fluxmoe.load(p, dtype="zeros"), "not 'zeros'"),
    "options": (lambda m, p: fluxmoe.load(p, options="eager"), "options must be a map .*'eager'"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_b5_wrong_types(load: Load, checkpoint: Callable[..., Path], case: str) -> None:
    call, says = WRONG[case]
    model = load()
    before = held()
    with pytest.raises(fluxmoe.FluxMoEError, match=says):
        call(model, checkpoint())
    assert held() == before


def test_all_errors_of_page_at_once(load: Load, tmp_path: Path) -> None:
    model = load()
    (tmp_path / "file").touch()
    before = held()
    store = {"kind": "file", "path": str(tmp_path / "file" / "x")}
    with pytest.raises(fluxmoe.FluxMoEError) as caught:
        fluxmoe.page(model, 1024, eviction="lrru", stores=[store])
    assert [error.code for error in caught.value.problems()] == ["FM201", "FM102", "FM101"]
    with pytest.raises(fluxmoe.FluxMoEError) as caught:
        fluxmoe.page(model.to("meta"), "50%", banks=0, copy_threads=100, prefetch="nxt")
    problems = caught.value.problems()
    assert [error.code for error in problems] == ["FM402", "FM101", "FM101", "FM101", "FM201"]
    assert held() == before


def test_b5_methods_of_the_handle(load: Load, tmp_path: Path) -> None:
    with fluxmoe.page(load(), "1MiB") as paged:
        for call, says in (
            (lambda: paged.resize(None), "not a valid size: None"),
            (lambda: paged.follow("1MiB"), r"room must be a function .*'1MiB'.*PagedModel\.follow"),
            (lambda: paged.record(None).__enter__(), "path must be a path, not None"),
            (lambda: paged.record(tmp_path / "t", phase="decode").__enter__(), "fluxmoe.Phase"),
            (lambda: paged.record(tmp_path / "t", max_steps=0).__enter__(), "at least 1, not 0"),
        ):  # fmt: skip
            with pytest.raises(ConfigError, match=says):
                call()
        assert paged.pager.watcher is None
