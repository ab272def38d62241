"""Ways to trace, export and transform a model."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from tests.torch.ways.use import IDS, Use, slow


def jit_trace(use: Use) -> None:
    block, states = use.layers[1].mlp, use.states
    use.refuses(
        lambda: torch.jit.trace(block, states),
        lambda: torch.jit.trace(use.model, IDS, strict=False),
        lambda: torch.jit.trace_module(use.layers[1].mlp, {"forward": states}),
    )
    use.model.requires_grad_(False)  # otherwise, torch refuses the gate
    use.refuses(lambda: torch.jit.trace(lambda x: block(x), states))


def jit_script(use: Use) -> None:
    for module in (use.model, use.layers[1], use.layers[1].mlp, use.experts):
        use.refuses(lambda module=module: torch.jit.script(module))
    use.refuses(lambda: torch.jit.script(torch.nn.Sequential(use.layers[1].mlp)))


def exported(use: Use) -> None:
    use.refuses(
        lambda: torch.no_grad()(torch.export.export)(use.layers[1].mlp, (use.states,)),
        lambda: torch.no_grad()(torch.export.export)(use.model, (IDS,), {"use_cache": False}),
    )


@slow
def exported_strictly(use: Use) -> None:
    export = torch.no_grad()(torch.export.export)
    use.refuses(lambda: export(use.layers[1].mlp, (use.states,), strict=True))


def onnx(use: Use) -> None:
    block, states = use.layers[1].mlp, (use.states,)
    use.refuses(lambda: torch.onnx.export(block, states, io.BytesIO(), dynamo=False))


def fx(use: Use) -> None:
    with torch.no_grad():
        use.refuses(
            lambda: torch.fx.symbolic_trace(use.experts),
            lambda: torch.fx.symbolic_trace(use.layers[1].mlp),
        )


def make_fx_of(use: Use, **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        return make_fx(use.layers[1].mlp, _allow_non_fake_inputs=True, **settings)(use.states)


def make_fx_(use: Use) -> None:
    for mode in ("real", "fake", "symbolic"):
        use.refuses(lambda mode=mode: make_fx_of(use, tracing_mode=mode))
        use.refuses(lambda mode=mode: make_fx_of(use, tracing_mode=mode, pre_dispatch=True))


def traced_parts(use: Use) -> Any:
    attention, norm = use.layers[1].self_attn, use.model.model.norm
    with torch.no_grad():
        return (
            torch.jit.trace(norm, use.states)(-use.states),
            torch.export.export(norm, (use.states,)).module()(-use.states),
            make_fx(attention.q_proj)(use.states)(-use.states),
            torch.fx.symbolic_trace(attention.q_proj)(use.states),
        )


def transforms(use: Use) -> None:
    block, states = use.layers[1].mlp, use.states
    with torch.no_grad():
        use.refuses(
            lambda: torch.vmap(block)(states[None]),
            lambda: torch.vmap(lambda x: use.model(x).logits, randomness="same")(IDS[:, None]),
            lambda: torch.func.jvp(block, (states,), (states,)),
            lambda: torch.func.functionalize(block)(states),
        )
    use.refuses(
        lambda: torch.func.grad(lambda x: block(x).sum())(states),
        lambda: torch.func.vjp(block, states),
        lambda: torch.func.jacrev(block)(states),
        lambda: torch.autograd.functional.jacobian(block, states),
    )


def fake_inputs(use: Use) -> None:
    block = use.layers[1].mlp
    with torch.no_grad():
        _, weights, ids = block.gate(use.states[0])
        use.refuses(
            lambda: use.experts(use.states[0].to("meta"), ids, weights),
            lambda: use.experts(use.states[0], ids.to("meta"), weights),
            lambda: use.experts(use.states[0], ids, weights.to("meta")),
        )
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = [mode.from_tensor(tensor) for tensor in (use.states[0], ids, weights)]
            use.refuses(lambda: use.experts(*fake))
