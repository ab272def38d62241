"""Resizing the memory for experts while a model is in use."""

from __future__ import annotations

import random
import threading

import pytest
import torch

import fluxmoe
from fluxmoe import errors
from fluxmoe.sizes import at_least
from tests.torch.conftest import Load, answer, held, prompts, same, sizes


@pytest.mark.parametrize(
    ("implementation", "policy"),
    [("eager", "lru"), ("grouped_mm", "next-use"), ("grouped_mm", "immediate"),
     ("batched_mm", "lfru")],
)  # fmt: skip
def test_answers_do_not_change(load: Load, implementation: str, policy: str) -> None:
    model = load("qwen3-moe", implementation)
    stock, before = answer(model), held()
    experts, pages, page_bytes = sizes(model)
    with fluxmoe.page(
        model, 2 * experts * page_bytes, eviction=policy, prefetch="next-layer"
    ) as paged:
        for slots in (experts, pages, pages - 5, experts + 1):
            paged.resize(slots * page_bytes)
            stats = paged.stats()
            assert stats["slots"] == slots
            assert stats["budget_bytes"] == slots * page_bytes
            assert stats["expert_bytes"] == stats["committed_bytes"] == slots * page_bytes
            assert same(answer(model), stock), slots
            paged.check()
        assert stats["resized"] > 0
    assert held() == before
    assert same(answer(model), stock)


def test_between_the_steps_of_a_generation(load: Load) -> None:
    model = load()
    stock = answer(model, 20)
    experts, pages, page_bytes = sizes(model)
    draw = random.Random(0)
    with fluxmoe.page(model, experts * page_bytes) as paged:
        hook = model.register_forward_pre_hook(
            lambda *_: paged.resize(draw.randint(experts, pages) * page_bytes)
        )
        assert same(answer(model, 20), stock)
        hook.remove()
        paged.check()
        assert paged.stats()["resized"] > 0


def test_from_another_thread_while_generating(load: Load) -> None:
    model = load()
    stock = answer(model, 20)
    experts, pages, page_bytes = sizes(model)
    done, sizes_seen = threading.Event(), set()

    def resize() -> None:
        draw = random.Random(0)
        while not done.wait(0.001):
            paged.resize(draw.randint(experts, pages) * page_bytes)
            sizes_seen.add(paged.stats()["slots"])

    with fluxmoe.page(model, experts * page_bytes) as paged:
        other = threading.Thread(target=resize)
        other.start()
        try:
            assert same(answer(model, 20), stock)
        finally:
            done.set()
            other.join()
        paged.check()
    assert len(sizes_seen) > 3


def test_a_grown_room_keeps_its_pages(load: Load) -> None:
    model = load()
    with fluxmoe.page(model, "1MiB", eviction="lru") as paged, torch.no_grad():
        model(**prompts())
        resident = paged.stats()["slots"]
        paged.resize("3MiB")
        model(**prompts())
        misses = paged.stats()["misses"]
        model(**prompts())
        assert paged.stats()["misses"] == misses  # all of them fit now
        assert paged.stats()["evictions"] <= misses - resident


def test_more_than_all_experts_is_not_used(load: Load) -> None:
    model = load()
    _, pages, page_bytes = sizes(model)
    with fluxmoe.page(model, "1MiB") as paged:
        paged.resize("1TiB")
        assert paged.stats()["budget_bytes"] == pages * page_bytes
        assert paged.stats()["slots"] == pages


def test_banks_stay(load: Load) -> None:
    model, banks = load(), 2
    stock = answer(model)
    experts, pages, page_bytes = sizes(model)
    with fluxmoe.page(model, 4 * experts * page_bytes, banks=banks) as paged:
        for slots in (banks * experts + 3, pages, banks * experts):
            paged.resize(slots * page_bytes)
            assert (paged.stats()["slots"], paged.stats()["banks"]) == (slots, banks)
            assert same(answer(model), stock)
            paged.check()
        with pytest.raises(errors.BudgetTooSmallError, match=f"in each of {banks} banks"):
            paged.resize((banks * experts - 1) * page_bytes)
        assert same(answer(model), stock)


def test_sizes_that_cannot_be(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load()
    stock = answer(model)
    experts, _, page_bytes = sizes(model)
    with fluxmoe.page(model, "1MiB") as paged:
        before = paged.stats()
        least = experts * page_bytes
        with pytest.raises(errors.BudgetTooSmallError, match=f"give at least {at_least(least)}"):
            paged.resize(least - 1)
        for nonsense in ("plenty", 0, -5):
            with pytest.raises(errors.ConfigError, match=r"PagedModel\.resize"):
                paged.resize(nonsense)
        with monkeypatch.context() as patch:
            patch.setattr("psutil.virtual_memory", lambda: Memory(available=page_bytes))
            with pytest.raises(errors.ConfigError, match=r"exceeds the .* of free memory"):
                paged.resize("2MiB")
        assert paged.stats() == before
        assert same(answer(model), stock)
    with pytest.raises(errors.ConfigError, match="closed"):
        paged.resize("2MiB")


class Memory:
    def __init__(self, available: int) -> None:
        self.available, self.total = available, 1 << 40


@pytest.mark.parametrize("works", [0, 1, 2, 3])
def test_a_system_that_refuses_changes_nothing(
    load: Load, monkeypatch: pytest.MonkeyPatch, works: int
) -> None:
    model = load()
    stock = answer(model)
    experts, pages, page_bytes = sizes(model)
    with fluxmoe.page(model, 2 * experts * page_bytes, banks=2) as paged:
        answer(model)
        before = paged.stats()
        substrate = paged._runtime.memory.substrate
        commits = [None] * works + [errors.SubstrateError("cannot map: injected fault")]
        real = substrate.commit

        def commit(*args: object) -> None:
            fault = commits.pop(0) if commits else None
            if fault is not None:
                raise fault
            real(*args)

        monkeypatch.setattr(substrate, "commit", commit)
        with pytest.raises(errors.SubstrateError, match="injected"):
            paged.resize(pages * page_bytes)
        assert not commits
        assert paged.stats() == before
        paged.check()
        assert same(answer(model), stock)
        paged.resize(pages * page_bytes)
        assert same(answer(model), stock)


@pytest.mark.parametrize("banks", [1, 2])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_room_that_is_asked_for_before_each_pass(
    load: Load, implementation: str, banks: int
) -> None:
    model = load("qwen3-moe", implementation)
    stock = answer(model, 30)
    experts, pages, page_bytes = sizes(model)
    draw, asked, seen = random.Random(1), [], set()

    def room() -> int | str:
        asked.append(draw.randint(0, 2 * pages) * page_bytes)  # sometimes too small or large
        seen.add(paged.stats()["slots"])
        paged.check()
        return asked[-1] if draw.random() < 0.5 else f"{asked[-1] + 1}B"

    with fluxmoe.page(model, 2 * experts * page_bytes, prefetch="next-layer", banks=banks) as paged:
        paged.follow(room)
        assert same(answer(model, 30), stock)
        count = len(asked)
        assert count >= 30 and len(seen) > 4
        assert min(seen) == banks * experts and max(seen) == pages
        assert paged.stats()["resized"] > 0
        paged.follow(None)
        slots = paged.stats()["slots"]
        assert same(answer(model, 30), stock)
        assert (len(asked), paged.stats()["slots"]) == (count, slots)
    with pytest.raises(errors.ConfigError):
        paged.follow(room)


def test_a_room_that_is_nonsense_ends_the_pass_and_nothing_else(load: Load) -> None:
    model = load()
    stock = answer(model)
    experts, _, page_bytes = sizes(model)
    with fluxmoe.page(model, 2 * experts * page_bytes) as paged:
        slots = paged.stats()["slots"]
        for room in (lambda: "lots", lambda: None, lambda: -1, lambda: 1 / 0):
            paged.follow(room)  # type: ignore[arg-type]
            with pytest.raises((errors.ConfigError, ZeroDivisionError)):
                answer(model)
        paged.follow(None)
        assert paged.stats()["slots"] == slots
        assert same(answer(model), stock)
        paged.check()
        paged.follow(lambda: experts * page_bytes)
    assert same(answer(model), stock)  # a closed handle does not follow
