"""Ways to call a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_module
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from tests.identity.torch_cells import prompts
from tests.torch.ways.use import IDS, Use, eager, pages_itself, slow


def call(use: Use) -> Any:
    with torch.no_grad():
        full = use.model(**prompts(), output_hidden_states=True, output_router_logits=True)
        embedded = use.model(inputs_embeds=use.model.get_input_embeddings()(IDS))
        direct = use.model.forward(IDS)
    return full.logits, full.hidden_states, full.router_logits, embedded.logits, direct.logits


def generate(use: Use) -> Any:
    found = []
    for way in (
        {"do_sample": False},
        {"do_sample": True, "temperature": 1.3},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": False, "cache_implementation": "static"},
        {"do_sample": False, "use_cache": False},
    ):
        torch.manual_seed(11)
        found.append(use.model.generate(**prompts(), max_new_tokens=4, pad_token_id=0, **way))
    ids = IDS[:1].repeat(1, 2)
    return *found, use.model.generate(ids, max_new_tokens=4, prompt_lookup_num_tokens=2)


def parts(use: Use) -> Any:
    with torch.no_grad():
        base = use.model.base_model(IDS).last_hidden_state
        mlp = use.layers[2].mlp(use.states)
        positions = use.model.model.rotary_emb(use.states, torch.arange(6)[None])
        layer = use.layers[1](use.states, position_embeddings=positions)
        return base, mlp, layer, use.run()


def routed(use: Use) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        _, weights, ids = use.layers[1].mlp.gate(use.states[0])
    return use.states[0], ids, weights


def experts_alone(use: Use) -> Any:
    states, ids, weights = routed(use)
    turned = ids.t().contiguous().t()
    assert not turned.is_contiguous()
    with torch.no_grad():
        return (
            use.experts(states, ids, weights),
            use.experts(states, turned, weights),
            use.experts(states[:, None].expand(-1, 2, -1)[:, 1], ids.int(), weights),
            use.experts(states, ids[:, ::2], weights[:, ::2]),
            use.experts(states[:0], ids[:0], weights[:0]),
            use.experts(torch.nn.Parameter(states), ids, weights),
        )


def experts_that_do_not_exist(use: Use) -> None:
    states, ids, weights = routed(use)
    for number in (-1, use.model.config.num_experts, 2**40):
        wrong = ids.clone()
        wrong[1, 1] = number
        use.refuses(lambda wrong=wrong: torch.no_grad()(use.experts)(states, wrong, weights))
    use.refuses(lambda: torch.no_grad()(use.experts)(states, ids.float(), weights))


def nested_call(use: Use) -> Any:
    found: list[torch.Tensor] = []

    def again(*_: object) -> None:
        if not found:
            found.append(torch.empty(0))
            found.append(use.run())

    hook = use.layers[1].register_forward_hook(again)
    logits = use.run()
    hook.remove()
    return logits, found


@eager
def hooks(use: Use) -> Any:
    found: list[Any] = []

    def before(module: torch.nn.Module, args: Any) -> Any:
        found.append([value.clone() for value in args])
        return (args[0] * 2, *args[1:])

    def after(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        found.append(output.clone())
        return output + 1

    def no_grad(*_: object) -> None:
        assert not torch.is_grad_enabled()

    held = [
        use.experts.register_forward_pre_hook(before),
        use.experts.register_forward_hook(after),
        use.layers[0].mlp.register_forward_hook(after),
        use.experts.act_fn.register_forward_hook(no_grad),
    ]
    logits = use.run()
    for hook in held:
        hook.remove()
    return logits, found, use.run()


def hooks_cleared(use: Use) -> Any:
    for module in use.model.modules():
        module._forward_pre_hooks.clear()
        module._forward_hooks.clear()
    return use.run()


def methods_set(use: Use) -> Any:
    found = []
    for implementation in ("batched_mm", "eager"):
        use.close()
        use.model.set_experts_implementation(implementation)
        use.page()
        experts, plain = use.experts, use.run()
        gate = experts._apply_gate
        experts._apply_gate = lambda x, gate=gate: 2 * gate(x)
        doubled = use.run()
        del experts._apply_gate
        act_fn, experts.act_fn = experts.act_fn, torch.nn.Identity()
        found += [plain, doubled, use.run()]
        experts.act_fn = act_fn
    return found


def inside_before_paging(use: Use) -> Any:
    """Set code inside one layer, which is not the layer that is always checked."""
    found, experts = [], use.experts
    act_fn, gate = experts.act_fn, experts._apply_gate
    for implementation in ("batched_mm", "eager"):
        for change in ("hook", "module", "method"):
            use.close()
            use.model.set_experts_implementation(implementation)
            hook = None
            if change == "hook":
                hook = act_fn.register_forward_hook(lambda module, args, output: output * 2)
            if change == "module":
                experts.act_fn = torch.nn.Sequential(act_fn, torch.nn.Dropout(0.5)).train()
            if change == "method":
                experts._apply_gate = lambda x: gate(x - x.mean(0))
            use.page()
            torch.manual_seed(7)
            found.append(use.run())
            use.close()
            if hook is not None:
                hook.remove()
            experts.act_fn = act_fn
            vars(experts).pop("_apply_gate", None)
    use.page()
    return found, use.run()


def inside_while_paged(use: Use) -> None:
    experts = use.experts
    act_fn = experts.act_fn
    for register in (act_fn.register_forward_hook, act_fn.register_forward_pre_hook):
        hook = register(lambda *_: None)
        use.refuses(use.run)
        hook.remove()
        use.run()
    experts.act_fn = type(act_fn)()
    use.refuses(use.run)
    experts.act_fn = act_fn
    use.run()
    act_fn.forward = torch.sigmoid
    use.refuses(use.run)
    del act_fn.forward
    use.run()
    experts._apply_gate = lambda x: x.chunk(2, dim=-1)[0]
    use.refuses(use.run)
    del experts._apply_gate
    use.run()
    hook = register_module_forward_pre_hook(lambda *_: None)
    use.refuses(use.run)
    hook.remove()
    cls, method = type(experts), type(experts)._apply_gate
    cls._apply_gate = lambda self, x: method(self, x)
    try:
        use.refuses(use.run)
    finally:
        cls._apply_gate = method
    use.run()


@pages_itself
def inside_with_grouped_mm(use: Use) -> None:
    experts, cls = use.experts, type(use.experts)
    act_fn, method = experts.act_fn, cls._apply_gate

    def hook(*_: object) -> None: ...

    hooks = [act_fn.register_forward_hook(hook)]
    use.refuses(use.page)
    hooks.pop().remove()
    hooks.append(register_module_forward_hook(hook))
    use.refuses(use.page)
    hooks.pop().remove()
    experts.act_fn = torch.nn.Sequential(act_fn, torch.nn.Dropout(0.0))
    use.refuses(use.page)
    experts.act_fn = act_fn
    experts._apply_gate = lambda x: x.chunk(2, dim=-1)[0]
    use.refuses(use.page)
    del experts._apply_gate
    cls._apply_gate = lambda self, x: method(self, x)
    try:
        use.refuses(use.page)
    finally:
        cls._apply_gate = method
    use.page()


def without_gradients(use: Use) -> Any:
    with torch.inference_mode():
        first = use.model(IDS).logits.clone()
    use.model.requires_grad_(False)
    second = use.model(IDS).logits
    assert not second.requires_grad
    return first, second


def gradients(use: Use) -> None:
    use.refuses(lambda: use.model(IDS))
    for parameter in use.model.parameters():
        parameter.requires_grad_(False)
    embedded = use.model.get_input_embeddings()(IDS).requires_grad_()
    use.refuses(lambda: use.model(inputs_embeds=embedded))
    use.experts.down_proj.requires_grad_()
    use.refuses(lambda: use.model(IDS))


def training_mode(use: Use) -> Any:
    use.model.train()
    first = use.run()
    use.model.gradient_checkpointing_enable()
    second = use.run()
    use.model.gradient_checkpointing_disable()
    return first, second, use.run(use.model.eval())


def autocast(use: Use) -> Any:
    found = []
    for implementation in ("grouped_mm", "eager", "batched_mm"):
        use.close()
        use.model.set_experts_implementation(implementation)
        use.page()
        with torch.autocast("cpu", torch.bfloat16):
            found += [use.run(), use.run()]
        found.append(use.run())
    return found


autocast.dtype = "float32"  # type: ignore[attr-defined]


class _Pass(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def modes(use: Use) -> Any:
    found = []
    with FlopCounterMode(display=False) as counter:
        found.append(use.run())
    with torch.profiler.profile():
        found.append(use.run())
    with _Pass():
        found.append(use.run())
    torch.use_deterministic_algorithms(True)
    try:
        found.append(use.run())
    finally:
        torch.use_deterministic_algorithms(False)
    return found, counter.get_total_flops()


class _Record(TorchFunctionMode):
    """A mode that keeps every tensor that is an argument of a torch function."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.kept += [each for each in args if type(each) in (torch.Tensor, torch.nn.Parameter)]
        return func(*args, **(kwargs or {}))


def recorded_tensors(use: Use) -> Any:
    with _Record() as mode:
        found = use.run()
    slots = [each for each in mode.kept if each.ndim == 3 and len(each) == 21]
    assert bool(slots) == (use.handle is not None)
    use.close()
    assert not any(each.any() for each in slots)
    with torch.no_grad():
        for each in slots:
            each.fill_(1)
    return found, use.run()


def data_parallel(use: Use) -> Any:
    return use.run(torch.nn.DataParallel(use.model))


@contextlib.contextmanager
def group(use: Use) -> Iterator[None]:
    """Make a process group that consists of this process."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{use.folder}/meet", rank=0, world_size=1
    )
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def distributed(use: Use) -> None:
    with group(use):
        use.refuses(lambda: torch.nn.parallel.DistributedDataParallel(use.model))


def sharded(use: Use) -> None:
    cpu = torch.device("cpu")
    with group(use):
        use.refuses(
            lambda: FullyShardedDataParallel(use.model, device_id=cpu),
            lambda: fully_shard(use.experts),
            lambda: distribute_module(use.experts, init_device_mesh("cpu", (1,))),
        )


@slow
def compiled_while_paged(use: Use) -> Any:
    torch._dynamo.reset()
    compiled = torch.compile(use.layers[1].mlp, fullgraph=True)
    with torch.no_grad():
        return compiled(use.states), compiled(-use.states)


@slow
def compiled_branches(use: Use) -> Any:
    """The layers of a compiled graph do not depend on each other, and a layer runs twice."""
    torch._dynamo.reset()
    found = []
    for implementation in ("grouped_mm", "batched_mm"):
        use.close()
        use.model.set_experts_implementation(implementation)
        use.page()
        first, second = use.layers[0].mlp, use.layers[1].mlp

        def branches(x: torch.Tensor, first: Any = first, second: Any = second) -> torch.Tensor:
            return first(x) + second(-x) + first(2 * x)

        with torch.no_grad():
            compiled = torch.compile(branches, fullgraph=True)
            found += [compiled(use.states), compiled(-use.states)]
    return found
