"""Ways to save, move, edit and replace weights."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch.func import functional_call
from torch.nn.utils import parametrize, prune

from tests.torch.ways.use import IDS, Use, pages_itself

PARTS = ("gate_up_proj", "down_proj")


def saved(use: Use) -> None:
    for module in (use.model, use.model.model, use.layers[1].mlp, use.experts):
        use.refuses(
            module.state_dict, lambda module=module: torch.save(module.state_dict(), use.folder)
        )
    use.refuses(
        lambda: use.model.save_pretrained(use.folder / "folder"),
        lambda: torch.save(use.model.state_dict(keep_vars=True), use.folder / "file"),
    )


def saved_parameters(use: Use) -> None:
    named = dict(use.model.named_parameters())
    own = {part: getattr(use.experts, part) for part in PARTS}
    weight = own["down_proj"]
    use.refuses(
        lambda: torch.save(named, use.folder / "file"),
        lambda: torch.save([*own.values()], use.folder / "file"),
        lambda: safetensors.torch.save_file(own, use.folder / "file"),
        lambda: safetensors.torch.save_model(use.experts, str(use.folder / "file")),
        lambda: pickle.dumps(weight),
        weight.numpy,
        weight.tolist,
        weight.detach,
        weight.untyped_storage,
        weight.data_ptr,
        weight.cpu,
        weight.share_memory_,
        lambda: torch.from_dlpack(weight),
        lambda: np.asarray(weight),
        lambda: np.array(weight),
        lambda: [*weight],
        lambda: weight.data,
        lambda: weight.__array__(),
    )


def loaded(use: Use) -> None:
    other = use.other()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    state = other.state_dict()
    block = other.model.layers[0].mlp.state_dict()
    use.refuses(
        lambda: use.model.load_state_dict(state),
        lambda: use.model.load_state_dict(state, assign=True),
        lambda: use.model.load_state_dict({}, strict=False),
        lambda: use.layers[0].mlp.load_state_dict(block),
        lambda: use.experts.load_state_dict(block, strict=False),
    )


def loaded_part(use: Use) -> Any:
    other = use.other().model.layers[2]
    use.layers[0].self_attn.load_state_dict(other.self_attn.state_dict())
    use.layers[0].mlp.gate.load_state_dict(other.mlp.gate.state_dict(), assign=True)
    return use.run()


def updated(use: Use) -> Any:
    other = use.other()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    state = other.state_dict()
    layer = {name: state[name].flip(0) for name in state if "layers.1.mlp.experts" in name}
    found = []
    for weights in (state, layer):
        if use.handle is None:
            use.model.load_state_dict(weights, strict=False)
        else:
            use.handle.update_weights(weights)
        found.append(use.run())
    use.close()
    return [*found, use.run()]


def updated_wrongly(use: Use) -> None:
    name = "model.layers.1.mlp.experts.down_proj"
    state = {name: weight * 2 for name, weight in use.stock.state_dict().items()}
    use.refuses(
        lambda: use.handle.update_weights({name: state[name]}),
        lambda: use.handle.update_weights({**state, name: state[name][1:]}),
        lambda: use.handle.update_weights({**state, "nothing": state[name]}),
        lambda: use.handle.update_weights([*state.items(), (name, state[name])]),
        lambda: use.handle.update_weights([*state]),
        lambda: use.handle.update_weights(use.handle.model),
    )


def moved(use: Use) -> None:
    use.refuses(
        lambda: use.model.to(torch.float32),
        lambda: use.model.to("meta"),
        lambda: use.model.to_empty(device="cpu"),
        use.model.half,
        use.model.double,
        use.model.model.float,
        use.layers[0].mlp.float,
        use.experts.half,
        torch.nn.ModuleList([use.model]).float,
        lambda: use.experts.down_proj.to(torch.float32),
    )


def moved_to_a_gpu(use: Use) -> None:
    use.refuses(use.model.xpu, lambda: use.model.to("xpu"), lambda: use.layers[0].to("xpu"))


def moved_nowhere(use: Use) -> Any:
    assert use.model.to("cpu").cpu().to(use.model.dtype).share_memory() is use.model
    return use.run()


def edited(use: Use) -> None:
    for weight in (use.experts.down_proj, dict(use.model.named_parameters())[
        "model.layers.0.mlp.experts.gate_up_proj"
    ]):  # fmt: skip
        values = torch.ones(weight.shape, dtype=weight.dtype)
        with torch.no_grad():
            use.refuses(
                lambda weight=weight, values=values: weight.copy_(values),
                weight.zero_,
                lambda weight=weight: weight.data.zero_(),
                lambda weight=weight, values=values: setattr(weight, "data", values),
                lambda weight=weight: weight[0].zero_(),
                lambda weight=weight: weight.__setitem__(0, 1.0),
                lambda weight=weight: weight.__imul__(2),
                lambda weight=weight: torch.nn.init.normal_(weight),
                lambda weight=weight: torch.add(weight, 1, out=weight),
                lambda weight=weight: torch._foreach_mul_([weight], 2),
                lambda weight=weight: torch.ops.aten.zero_(weight),
                lambda weight=weight, values=values: values.copy_(weight),
                lambda weight=weight: weight.resize_(0),
                lambda weight=weight, values=values: weight.set_(values),
            )
    use.refuses(lambda: use.model.apply(_double))


@torch.no_grad()
def _double(module: torch.nn.Module) -> None:
    for weight in module.parameters(recurse=False) if hasattr(module, "has_gate") else ():
        weight.mul_(2)


@pages_itself
def edited_kept(use: Use) -> None:
    kept = [use.experts.down_proj, *use.layers[0].mlp.parameters()]
    use.page()
    with torch.no_grad():
        use.refuses(kept[0].zero_, lambda: kept[0].data.zero_())
        use.refuses(lambda: torch.nn.utils.vector_to_parameters(torch.ones(10**7), kept))


@pages_itself
def edited_view(use: Use) -> None:
    views = [
        use.experts.down_proj[0],
        use.experts.gate_up_proj.detach(),
        use.model.state_dict()["model.layers.1.mlp.experts.down_proj"],
    ]
    for view in views:
        use.page()
        right = use.run()
        with torch.no_grad():
            view += 1
        use.refuses(use.run, lambda: use.layers[1].mlp(use.states))
        use.close()
        assert not torch.equal(use.run(), right)  # the closed model uses the edited weights
    use.page()
    with torch.no_grad():
        torch.Tensor(use.experts.down_proj).add_(1)  # not dispatched to the parameter
    use.refuses(use.run)
    use.close()


@pages_itself
def edited_memory(use: Use) -> None:
    for share in (
        lambda weight: weight.data,
        lambda weight: weight.detach().view(torch.int16).numpy(),
        lambda weight: torch.from_dlpack(weight.detach()),
    ):
        shared = share(use.experts.down_proj)
        use.page()
        use.handle.check()
        before = shared[3].copy() if isinstance(shared, np.ndarray) else shared[3].clone()
        shared[3] = shared[4]
        use.refuses(use.handle.check)
        shared[3] = before
        use.handle.check()
        name = next(n for n, p in use.model.named_parameters() if p is use.experts.down_proj)
        rows = {
            name.replace("down_proj", part): torch.rand(
                getattr(use.experts, part).shape, dtype=use.experts.down_proj.dtype
            )
            for part in ("gate_up_proj", "down_proj")
        }
        use.handle.update_weights(rows)
        use.handle.check()  # new weights do not count as an edit
        use.close()


@pages_itself
def edited_during_a_pass(use: Use) -> None:
    view = use.layers[2].mlp.experts.down_proj[3]
    use.page()
    with torch.inference_mode():
        hook = use.layers[1].register_forward_hook(lambda *_: (None, view.zero_())[0])
        use.refuses(use.run)
        hook.remove()
        use.refuses(use.run)
    use.close()


def assigned(use: Use) -> None:
    experts = use.experts
    new = torch.nn.Parameter(torch.ones(experts.down_proj.shape, dtype=use.model.dtype))
    use.refuses(
        lambda: setattr(experts, "down_proj", new),
        lambda: setattr(experts, "down_proj", None),
        lambda: delattr(experts, "down_proj"),
        lambda: experts.register_parameter("down_proj", new),
        lambda: experts.register_parameter("more", new),
        lambda: experts._parameters.update(down_proj=new),
        lambda: experts._parameters.pop("down_proj"),
        lambda: experts._parameters.clear(),
    )
    experts.down_proj = experts.down_proj


def swapped(use: Use) -> None:
    weight = use.experts.down_proj
    new = torch.nn.Parameter(torch.ones(weight.shape, dtype=weight.dtype))
    torch.utils.swap_tensors(weight, new)
    use.refuses(use.run)
    torch.utils.swap_tensors(weight, new)


def functional_call_with(use: Use, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return functional_call(use.model, weights, (IDS,), {"use_cache": False}).logits


def functional_call_of_the_experts(use: Use) -> None:
    named = use.other().state_dict()
    some = {name: weight for name, weight in named.items() if "1.mlp.experts" in name}
    use.refuses(lambda: functional_call_with(use, named), lambda: functional_call_with(use, some))


def functional_call_of_the_rest(use: Use) -> Any:
    own = dict(use.model.named_parameters())
    rest = {name: weight * 2 for name, weight in own.items() if "experts" not in name}
    return functional_call_with(use, own), functional_call_with(use, rest), use.run()


class _Double(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 2


def parametrized(use: Use) -> None:
    experts = use.experts
    use.refuses(
        lambda: parametrize.register_parametrization(experts, "down_proj", _Double()),
        lambda: parametrize.register_parametrization(experts, "down_proj", _Double(), unsafe=True),
        lambda: torch.nn.utils.weight_norm(experts, "down_proj"),
        lambda: torch.nn.utils.parametrizations.weight_norm(experts, "down_proj"),
        lambda: torch.nn.utils.parametrizations.spectral_norm(experts, "down_proj"),
        lambda: prune.l1_unstructured(experts, "down_proj", 0.5),
        lambda: prune.random_unstructured(experts, "down_proj", 0.5),
    )


class _Adapter(torch.nn.Module):
    def __init__(self, inner: torch.nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.left = torch.nn.Parameter(torch.ones_like(inner.weight[:, :2]))
        self.right = torch.nn.Parameter(torch.ones_like(inner.weight[:2]))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.inner(states) + states @ self.right.T @ self.left.T


def parametrized_rest(use: Use) -> Any:
    attention = use.layers[1].self_attn
    parametrize.register_parametrization(attention.q_proj, "weight", _Double())
    parametrize.register_parametrization(use.layers[1].mlp.gate, "weight", _Double())
    first = use.run()
    attention.v_proj = _Adapter(attention.v_proj)
    return first, use.run()


@torch.no_grad()
def edited_rest(use: Use) -> Any:
    use.layers[0].mlp.gate.weight.mul_(-1)
    use.layers[1].self_attn.q_proj.weight.data += 1
    use.model.lm_head.weight = torch.nn.Parameter(use.model.lm_head.weight * 2)
    return use.run()


def sums(use: Use) -> None:
    weight = use.experts.down_proj
    with torch.no_grad():
        use.refuses(
            lambda: sum(parameter.sum() for parameter in use.model.parameters()),
            lambda: torch.nn.utils.parameters_to_vector(use.model.parameters()),
            lambda: torch.equal(weight, weight),
            lambda: weight == 0,
            lambda: weight.norm(),
            lambda: torch.nn.functional.linear(torch.ones(1, weight.shape[2]), weight[0]),
        )


def shapes(use: Use) -> Any:
    model, weight = use.model, use.experts.down_proj
    assert "down_proj" not in repr(weight)
    return (
        [(name, [*p.shape], p.dtype, p.requires_grad) for name, p in model.named_parameters()],
        model.num_parameters(),
        model.get_memory_footprint(),
        (model.device, model.dtype, weight.numel(), weight.nbytes, weight.dim(), len(weight)),
        (weight.is_contiguous(), weight.stride(), weight.is_floating_point(), weight.grad),
        weight in {weight},
    )


def embeddings(use: Use) -> Any:
    model = use.model
    torch.manual_seed(3)
    model.init_weights()
    model.tie_weights()
    model.resize_token_embeddings(model.config.vocab_size + 8)
    model.set_input_embeddings(torch.nn.Embedding.from_pretrained(
        model.get_input_embeddings().weight.detach() * 2))  # fmt: skip
    return use.run()


def optimiser(use: Use) -> Any:
    for kind in (torch.optim.SGD, torch.optim.AdamW):
        chosen = kind(use.model.parameters(), lr=1)
        chosen.zero_grad(set_to_none=False)
        chosen.step()
    use.model.zero_grad()
    gate = use.layers[0].mlp.gate.weight
    gate.grad = torch.ones_like(gate)
    torch.nn.utils.clip_grad_norm_(use.model.parameters(), 1.0)
    torch.optim.SGD(use.model.parameters(), lr=1).step()
    return use.run()


def optimiser_by_hand(use: Use) -> None:
    weight = use.experts.down_proj
    use.refuses(lambda: setattr(weight, "grad", torch.ones(weight.shape, dtype=weight.dtype)))


def layer_replaced(use: Use) -> Any:
    other = use.other()
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj.mul_(2)
    use.layers[1].mlp = other.model.layers[1].mlp
    first = use.run()
    use.close()
    return first, use.run()


def layers_rearranged(use: Use) -> Any:
    one, two = use.layers[0].mlp, use.layers[2].mlp
    one.experts, two.experts = two.experts, one.experts
    found = [use.run()]
    layers = use.layers
    use.model.model.layers = torch.nn.ModuleList([layers[0], layers[2], layers[2]])
    found.append(use.run())
    use.model.model.layers = layers[:1]
    found.append(use.run())
    use.model.model.layers = layers
    use.close()
    return found, use.run()
