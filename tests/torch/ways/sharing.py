"""Ways to share, close and interrupt a model and its handle."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fluxmoe
from tests.identity.torch_cells import prompts
from tests.torch.ways.use import IDS, Use, eager, of_a_loaded_model, pages_itself, slow


def threads(use: Use) -> Any:
    def work(index: int) -> torch.Tensor:
        if use.handle is not None and index % 3 == 0:
            use.handle.resize(("1MiB", "2MiB")[index % 2])
            use.handle.stats()
        if index % 2:
            return use.model.generate(IDS[:, index:], max_new_tokens=3, pad_token_id=0)
        with torch.no_grad():
            return use.model(IDS[:, index:]).logits

    if use.handle is None:
        return [work(index) for index in range(8)]
    with ThreadPoolExecutor(4) as pool:
        return [*pool.map(work, range(8))]


@slow
@pages_itself
def compiled_before(use: Use) -> Any:
    torch._dynamo.reset()
    block = use.layers[1].mlp
    compiled, found = torch.compile(block, fullgraph=True), []
    for change in (lambda: None, use.page, use.close):
        change()
        with torch.no_grad():
            found += [compiled(use.states), compiled(-use.states)]
    return found


@slow
@pages_itself
def compiled_threads(use: Use) -> None:
    """One thread tries every entry while another is between two events of a compiled graph."""
    torch._dynamo.reset()
    layers = use.model.model
    use.page()
    block, states = use.layers[2].mlp, use.states

    @torch.no_grad()
    def two(states: torch.Tensor) -> torch.Tensor:
        return layers.layers[1].mlp(stop(layers.layers[0].mlp(states)))

    inside, go_on, first = threading.Event(), threading.Event(), threading.current_thread()

    @torch.library.custom_op("fluxmoe_tests::stop", mutates_args=())
    def stop(x: torch.Tensor) -> torch.Tensor:
        if threading.current_thread() is not first:
            inside.set()
            assert go_on.wait(60)
        return x.clone()

    stop.register_fake(torch.empty_like)
    compiled = torch.compile(two, fullgraph=True)
    right = compiled(states)
    with ThreadPoolExecutor(1) as pool:
        for attempt in (
            use.run,
            lambda: compiled(states),
            lambda: torch.no_grad()(block)(states),
            use.handle.check,
            lambda: use.handle.resize("2MiB"),
            use.handle.close,
        ):
            inside.clear()
            go_on.clear()
            running = pool.submit(compiled, states)
            assert inside.wait(60)
            use.refuses(attempt)
            go_on.set()
            assert torch.equal(running.result(60), right)
            use.handle.check()
            assert torch.equal(compiled(states), right)


def other_implementation(use: Use) -> None:
    for name in ("eager", "batched_mm", "grouped_mm"):
        use.model.set_experts_implementation(name)
        use.refuses(use.run, lambda: use.layers[0].mlp(use.states))
    use.model.set_experts_implementation("fluxmoe")


@pages_itself
def inference_tensors(use: Use) -> Any:
    with torch.inference_mode():
        use.model = AutoModelForCausalLM.from_pretrained(
            use.checkpoint, dtype="auto", experts_implementation="grouped_mm"
        )
        use.page()
        return use.model(IDS).logits.clone(), use.run()


def second_handle(use: Use) -> None:
    use.refuses(
        lambda: fluxmoe.page(use.model, "1MiB"),
        lambda: fluxmoe.page(use.model.model, "1MiB"),
        lambda: fluxmoe.page(use.layers[0].mlp, "1MiB"),
        lambda: fluxmoe.page(torch.nn.Sequential(use.model), "1MiB"),
    )


def two_models(use: Use) -> Any:
    with torch.no_grad():
        other = use.other()
        other.model.layers[0].mlp.experts.down_proj.mul_(2)
    if use.handle is None:
        return [use.run(), use.run(other)] * 2
    with fluxmoe.page(other, "1MiB"):
        return [use.run(), use.run(other), use.run(), use.run(other)]


@pages_itself
def one_folder(use: Use) -> Any:
    other = use.other()
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj.mul_(2)
    models = [use.model, other, use.other()]
    if use.stays_unpaged:
        return [use.run(model) for model in models]
    stores = [{"kind": "file", "path": str(use.folder)}]
    handles = [fluxmoe.page(model, "1MiB", stores=stores) for model in models]
    found = [use.run(model) for model in models]
    for handle in handles:
        handle.close()
    return found


def shared_configuration(use: Use) -> None:
    other = type(use.model)(use.model.config).eval()
    use.refuses(lambda: use.run(other), lambda: fluxmoe.page(other, "1MiB"))


def changed_configuration(use: Use) -> None:
    other = type(use.model)(use.model.config).eval()
    other.set_experts_implementation("grouped_mm")
    use.refuses(use.run)
    use.model.set_experts_implementation("fluxmoe")


def handle_dropped(use: Use) -> Any:
    use.handle = None
    gc.collect()
    return use.run()


def closed_in_a_hook(use: Use) -> Any:
    hook = use.layers[1].register_forward_pre_hook(lambda *_: use.close())
    found = use.run()
    hook.remove()
    return found, use.run()


def closed_by_a_thread(use: Use) -> Any:
    inside, closing = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        inside.set()
        assert closing.wait(60)

    hook = use.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(use.run)
        assert inside.wait(60)
        closed = pool.submit(use.close)
        closing.set()
        closed.result(60)
        found = running.result(60)
    hook.remove()
    return found, use.run()


@eager
@pages_itself
def used_inside_an_event(use: Use) -> None:
    use.page()
    for attempt in (
        use.handle.close,
        use.handle.check,
        use.run,
        lambda: use.handle.resize("2MiB"),
        lambda: use.handle.reset(),
        lambda: use.layers[0].mlp(use.states),
    ):
        hook = use.experts.act_fn.register_forward_pre_hook(
            lambda *_, attempt=attempt: (None, attempt())[0]
        )
        use.refuses(use.run)
        hook.remove()


def paged_again(use: Use) -> Any:
    found = []
    for _ in range(2):
        found.append(use.run())
        use.close()
        found.append(use.run())
        use.page()
    return found, use.run()


def closed_handle(use: Use) -> None:
    handle = use.handle
    handle.close()
    handle.close()
    use.refuses(
        handle.stats,
        handle.reset,
        handle.check,
        lambda: handle.resize("2MiB"),
        lambda: handle.follow(lambda: "2MiB"),
        lambda: handle.record(use.folder / "trace").__enter__(),
        lambda: handle.pager,
    )


@eager
def interrupted(use: Use) -> Any:
    found = []
    for raised in (ValueError, KeyboardInterrupt, SystemExit):
        for module in (use.layers[1], use.experts, use.experts.act_fn):

            def fail(*_: object, raised: type[BaseException] = raised) -> None:
                raise raised

            hook = module.register_forward_pre_hook(fail)
            with pytest.raises(raised):
                use.run()
            hook.remove()
            with ThreadPoolExecutor(1) as pool:
                found.append(pool.submit(use.run).result(60))
    return found


def handle_used(use: Use) -> Any:
    if use.handle is None:
        return use.run(), use.run(), use.run(), use.run()
    with use.handle.record(use.folder / "trace.parquet", weights=True, predict=True):
        recorded = use.run()
    use.handle.resize("2MiB")
    grown = use.run()
    use.handle.follow(lambda: "1MiB")
    followed = use.run()
    use.handle.follow(None)
    use.handle.reset()
    return recorded, grown, followed, use.run()


@of_a_loaded_model
def loaded_and_closed(use: Use) -> None:
    use.handle.close()
    model = use.model
    use.refuses(
        use.run,
        lambda: use.layers[0].mlp(use.states),
        lambda: model.generate(**prompts(), max_new_tokens=2),
        model.state_dict,
        lambda: model.save_pretrained(use.folder),
        lambda: torch.save(model, use.folder / "model"),
        lambda: sum(parameter.sum() for parameter in model.parameters()),
        lambda: fluxmoe.page(model, "1MiB"),
    )
    model.set_experts_implementation("eager")
    use.refuses(use.run, model.float)


@pages_itself
def loaded_and_revived(use: Use) -> Any:
    if not use.stays_unpaged:
        with fluxmoe.load(use.checkpoint, "1MiB") as handle:
            use.model = handle.model
        use.model.load_state_dict(use.stock.state_dict(), assign=True)
    return use.run(), use.model.get_experts_implementation()
