"""Threads that share a paged model, hooks inside its passes, and passes that end abnormally."""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

import fluxmoe
from fluxmoe import errors
from fluxmoe.core.types import Phase
from fluxmoe.trace import TraceReader
from tests.torch.conftest import Load, answer, prompts, same, sizes

IMPLEMENTATIONS = ["eager", "grouped_mm", "batched_mm"]


def run(model: Any, length: int = 10) -> torch.Tensor:
    with torch.no_grad():
        return model(prompts()["input_ids"][:, :length]).logits


def join(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


def room(model: Any, layers: float) -> int:
    """Return the bytes of the pages of ``layers`` layers."""
    experts, _, page_bytes = sizes(model)
    return int(layers * experts) * page_bytes


@pytest.mark.parametrize("part", ["mlp", "mlp.experts"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layers_called_by_themselves(load: Load, implementation: str, part: str) -> None:
    """Many threads call layers at once and evict each other's pages."""
    model = load("qwen3-moe", implementation)
    layers = [layer.mlp for layer in model.model.layers]
    draw = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 16, model.config.hidden_size, generator=draw).bfloat16()
              for _ in layers]  # fmt: skip

    def compute(index: int) -> torch.Tensor:
        block, states = layers[index], inputs[index]
        with torch.no_grad():
            if part == "mlp":
                return block(states)
            states = states[0]
            _, weights, ids = block.gate(states)
            return block.experts(states, ids, weights)

    stock = [compute(index) for index in range(len(layers))]
    work = [index % len(layers) for index in range(60)]
    with fluxmoe.page(model, room(model, 1), eviction="lru") as paged:
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(compute, work))
        paged.check()
        assert paged.stats()["evictions"] > 0
    assert all(torch.equal(got, stock[index]) for got, index in zip(found, work, strict=True))


def test_a_layer_waits_for_the_pass_that_runs_and_for_an_event(load: Load) -> None:
    """The event is between the call to ``acquire`` and the kernel."""
    model = load(implementation="eager")
    stock = run(model)
    block, states = model.model.layers[0].mlp, torch.ones(1, 4, model.config.hidden_size).bfloat16()
    with torch.no_grad():
        alone = block(states)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        if threading.current_thread() is first:
            inside.set()
            go_on.wait(60)

    with fluxmoe.page(model, room(model, 1)) as paged, ThreadPoolExecutor(3) as pool:
        for place in (model.model.layers[1].mlp.experts.act_fn, model.model.layers[1]):
            hook = place.register_forward_pre_hook(wait)
            found: list[torch.Tensor] = []
            first = threading.Thread(target=lambda found=found: found.append(run(model)))
            first.start()
            assert inside.wait(60)
            others = [
                pool.submit(lambda: torch.no_grad()(block)(states)),
                pool.submit(paged.resize, room(model, 2)),
                pool.submit(run, model),
            ]
            go_on.set()
            join(first)
            hook.remove()
            assert torch.equal(found[0], stock)
            assert torch.equal(others[0].result(60), alone)
            others[1].result(60)
            assert torch.equal(others[2].result(60), stock)
            paged.resize(room(model, 1))
            inside.clear()
            go_on.clear()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_hooks_between_the_layers_may_do_everything(load: Load, implementation: str) -> None:
    """Another thread runs the same model, with the same hooks, at the same time."""
    model = load("qwen3-moe", implementation)
    stock = run(model)
    draw, depth, done = random.Random(0), threading.local(), []

    def use(*_: object) -> None:
        if getattr(depth, "inside", False):
            return
        depth.inside = True
        for call in draw.sample(calls, 2):
            call()
            done.append(call)
        depth.inside = False

    with fluxmoe.page(model, room(model, 1), prefetch="next-layer") as paged:
        calls: list[Callable[[], Any]] = [
            paged.check,
            paged.reset,
            paged.stats,
            lambda: paged.resize(room(model, draw.uniform(1, 4))),
            lambda: same((run(model, 3),), (short,)) or pytest.fail("a pass within a pass"),
        ]
        short = run(model, 3)
        places = [
            model,
            model.model,
            model.model.layers[1],
            model.model.layers[2].mlp,
            model.model.layers[2].mlp.experts,
        ]
        hooks = [place.register_forward_pre_hook(use) for place in places]
        hooks += [place.register_forward_hook(use) for place in places]
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda _: run(model), range(9)))
        for hook in hooks:
            hook.remove()
        paged.check()
    assert len(set(done)) == len(calls)
    assert all(torch.equal(logits, stock) for logits in found)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_inside_an_event_nothing_may_change(
    load: Load, tmp_path: Path, implementation: str
) -> None:
    model = load("qwen3-moe", implementation)
    stock = run(model)
    refused, states = [], torch.ones(1, 4, model.config.hidden_size).bfloat16()

    def use(*_: object) -> None:
        if paged is None:
            return  # called by the self-check
        for call in (
            paged.check,
            paged.reset,
            paged.close,
            lambda: paged.resize(room(model, 3)),
            lambda: paged.record(tmp_path / "trace").__enter__(),
            lambda: run(model),
            lambda: model.model.layers[0].mlp(states),
        ):
            with pytest.raises(errors.UnsupportedError, match="pages are in use") as caught:
                call()
            refused.append(caught.value)

    activation = model.model.layers[1].mlp.experts.act_fn
    for register in (activation.register_forward_pre_hook, activation.register_forward_hook):
        paged, hook = None, register(use)
        paged = fluxmoe.page(model, room(model, 1))
        assert torch.equal(run(model), stock)
        paged.check()
        paged.close()
        hook.remove()
    assert len(refused) >= 14
    assert list(tmp_path.iterdir()) == []


def test_close_within_a_pass(load: Load) -> None:
    model = load()
    stock = run(model)
    paged = fluxmoe.page(model, room(model, 1))
    hook = model.model.layers[2].register_forward_pre_hook(lambda *_: paged.close())
    assert torch.equal(run(model), stock)
    assert paged.closed
    hook.remove()
    assert torch.equal(run(model), stock)


def test_a_policy_may_not_use_the_handle(load: Load, tmp_path: Path) -> None:
    """A policy's calls of the handle are refused both in a pass and in a resize."""
    plugin = tmp_path / "meddler.py"
    plugin.write_text(
        "import fluxmoe\n"
        "handles, errors = [], []\n"
        "class Meddler(fluxmoe.EvictionPolicy):\n"
        "    def score(self, view, pages):\n"
        "        for use in handles:\n"
        "            try:\n"
        "                use()\n"
        "            except Exception as error:\n"
        "                errors.append(error)\n"
        "        return pages\n"
        "@fluxmoe.hookimpl\n"
        "def fluxmoe_register_policies(register):\n"
        "    import sys, types\n"
        "    module = sys.modules.setdefault('meddler_shared', types.SimpleNamespace())\n"
        "    module.handles, module.errors = handles, errors\n"
        "    register('meddler', Meddler)\n"
    )
    model = load()
    stock = run(model)
    with fluxmoe.page(model, room(model, 1), eviction="meddler", plugins=[str(plugin)]) as paged:
        shared: Any = sys.modules.pop("meddler_shared")
        shared.handles += [lambda: paged.resize(room(model, 3)), paged.reset, lambda: run(model, 1)]
        assert torch.equal(run(model), stock)
        seen = len(shared.errors)
        assert seen > 0
        paged.resize(room(model, 3))
        assert torch.equal(run(model), stock)
        paged.resize(room(model, 1))
        assert len(shared.errors) > seen
        assert all("pages are in use" in str(error) for error in shared.errors)
        assert torch.equal(run(model), stock)
        paged.check()


def test_a_layer_that_waited_for_close(load: Load) -> None:
    """By the time the layer continues, its pager's number may belong to another pager."""
    model, other = load(), load("mixtral")
    block, states = model.model.layers[0].mlp, torch.ones(1, 4, model.config.hidden_size).bfloat16()
    with torch.no_grad():
        alone = block(states)
    paged = fluxmoe.page(model, room(model, 1))
    lock = block.experts._fluxmoe.lock
    alone_in, waiting = lock.alone, threading.Event()

    def late(compute: Any) -> torch.Tensor:
        waiting.set()
        return alone_in(compute)

    lock.alone = late
    with ThreadPoolExecutor(1) as pool:
        with lock.lock():
            result = pool.submit(lambda: torch.no_grad()(block)(states))
            assert waiting.wait(60)
            lock.alone = alone_in
            paged.close()
            again = fluxmoe.page(other, "1MiB")
            assert again._handle == paged._handle
        assert torch.equal(result.result(60), alone)
    again.close()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("place", ["layer", "experts", "activation"])
def test_a_turn_ends_with_its_pass(load: Load, error: type[BaseException], place: str) -> None:
    """A pass can end at any depth and with any error, in threads that continue or exit."""
    model = load(implementation="eager")
    stock = answer(model)
    layer = model.model.layers[2]

    def fail(*_: object) -> None:
        raise error

    def interrupted() -> None:
        with pytest.raises(error):
            run(model)

    at = {"layer": layer, "experts": layer.mlp.experts, "activation": layer.mlp.experts.act_fn}
    with fluxmoe.page(model, "1MiB") as paged:
        hook = at[place].register_forward_pre_hook(fail)
        thread = threading.Thread(target=interrupted)
        thread.start()
        join(thread)
        interrupted()  # this thread continues without using the model
        hook.remove()
        with ThreadPoolExecutor(1) as pool:
            assert same(pool.submit(answer, model).result(60), stock)
            pool.submit(paged.check).result(60)
        assert same(answer(model), stock)


def test_steps_of_a_trace_are_passes(load: Load, tmp_path: Path) -> None:
    """Phases and requests are correct for nested passes and for passes that end abnormally."""
    model, trace = load(), tmp_path / "trace"
    ids = prompts()["input_ids"]
    layer = model.model.layers[0]

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    def within(*_: object) -> None:
        hook.remove()
        run(model, 1)

    with fluxmoe.page(model) as paged, torch.no_grad(), paged.record(trace):
        hook = layer.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:2, :1])  # 2 tokens of 2 requests
        hook.remove()
        layer.mlp(torch.ones(1, 2, model.config.hidden_size).bfloat16())  # 2 tokens of no request
        hook = layer.register_forward_pre_hook(within)
        model(ids)  # 3 × 10, after 3 × 1
        model(ids[:, :1])
    rows = [row for row in pq.ParquetFile(trace).read().to_pylist() if row["layer"] == 0]
    steps = [[row for row in rows if row["step"] == step] for step in range(4)]
    assert [len(step) for step in steps] == [2, 3, 30, 3]
    assert [{row["request"] for row in step} for step in steps] == [{-1}, {0, 1, 2}, {0, 1, 2},
                                                                    {0, 1, 2}]  # fmt: skip
    phases = [phase for _, number, phase, _ in TraceReader(trace).events() if number == 0]
    assert phases == [Phase.DECODE, Phase.DECODE, Phase.PREFILL, Phase.DECODE]
    assert paged._lock.phase() == Phase.DECODE


def test_a_forward_method_that_was_wrapped_before_or_is_wrapped_meanwhile(load: Load) -> None:
    model = load()
    stock, calls = run(model), []
    base = model.model

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return forward(*args, **kwargs)

        return wrapped

    first = base.forward = wrap(base.forward)
    with fluxmoe.page(model, "1MiB"):
        assert torch.equal(run(model), stock)
    assert base.forward is first
    paged = fluxmoe.page(model, "1MiB")
    second = base.forward = wrap(base.forward)
    paged.close()
    assert base.forward is second
    assert torch.equal(run(model), stock)
    with fluxmoe.page(model, "1MiB"):
        assert torch.equal(run(model), stock)
    assert len(calls) == 5
