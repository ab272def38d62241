"""The network for training: Qwen3-MoE's arithmetic, arranged for a CPU.

The parameters have the shapes of transformers' ``Qwen3MoeForCausalLM`` and are converted by
``export``. For speed, every expert has the same number of rows in training, so that all experts are
computed in one batched product of a fixed shape, which oneDNN and ``torch.compile`` prepare only
once. In both passes, rows are gathered and never scattered.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: Rows per expert in training, as a multiple of the mean. Further rows are dropped; outside
#: training, no rows are dropped.
CAPACITY = 1.3


class _Spread(torch.autograd.Function):
    """Gather of each token's state into its experts' rows, with a gather as the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, source: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return torch.cat([x, x.new_zeros(1, x.shape[1])])[source]

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return torch.cat([d, d.new_zeros(1, d.shape[1])])[place].sum(1), None, None


class _Collect(torch.autograd.Function):
    """The weighted sum of the outputs of each token's experts."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, top: Tensor, source: Tensor, place: Tensor) -> Tensor:
        chosen = torch.cat([y, y.new_zeros(1, y.shape[1])])[place]
        ctx.save_for_backward(chosen, top, source, place)
        return (chosen * top[:, :, None]).sum(1)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, Tensor, None, None]:
        chosen, top, source, place = ctx.saved_tensors
        d_top = (chosen * d[:, None]).sum(2)
        weight = top.new_zeros(source.shape[0] + 1).index_put_((place,), top)
        low = d.to(chosen.dtype)
        dy = torch.cat([low, low.new_zeros(1, d.shape[1])])[source] * weight[:-1, None].to(
            low.dtype
        )
        return dy, d_top, None, None


class Layer(nn.Module):
    """Grouped-query attention, then routed experts, each with a residual connection."""

    def __init__(self, c: Any) -> None:
        super().__init__()
        self.c = c
        h, d = c.hidden_size, c.head_dim
        self.q = nn.Parameter(torch.empty(c.num_attention_heads * d, h))
        self.k = nn.Parameter(torch.empty(c.num_key_value_heads * d, h))
        self.v = nn.Parameter(torch.empty(c.num_key_value_heads * d, h))
        self.o = nn.Parameter(torch.empty(h, c.num_attention_heads * d))
        self.q_norm = nn.Parameter(torch.ones(d))
        self.k_norm = nn.Parameter(torch.ones(d))
        self.norm1 = nn.Parameter(torch.ones(h))
        self.norm2 = nn.Parameter(torch.ones(h))
        self.router = nn.Parameter(torch.empty(c.num_experts, h))
        self.gate_up = nn.Parameter(torch.empty(c.num_experts, 2 * c.moe_intermediate_size, h))
        self.down = nn.Parameter(torch.empty(c.num_experts, h, c.moe_intermediate_size))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Any:
        """Map ``x`` [B, T, H] float32 to the next ``x``, the balance and z losses, and load [E]."""
        c, (b, t, h), low = self.c, x.shape, mask.dtype
        eps, d = c.rms_norm_eps, c.head_dim
        n = F.rms_norm(x, (h,), self.norm1, eps).to(low)
        qkv = F.linear(n, torch.cat([self.q, self.k, self.v]).to(low)).view(b, t, -1, d)
        heads, groups = c.num_attention_heads, c.num_key_value_heads
        q, k, v = qkv.split([heads, groups, groups], 2)
        q = _rotate(F.rms_norm(q.float(), (d,), self.q_norm, eps), cos, sin).to(low)
        k = _rotate(F.rms_norm(k.float(), (d,), self.k_norm, eps), cos, sin).to(low)
        k, v = (z.repeat_interleave(heads // groups, 2) for z in (k, v))
        q, k, v = (z.transpose(1, 2).reshape(b * heads, t, d) for z in (q, k, v))
        # Plain products: the fused kernel is several times slower here at this head size.
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=d**-0.5)
        out = torch.bmm(scores.softmax(-1), v).view(b, heads, t, d)
        x = x + F.linear(out.transpose(1, 2).reshape(b, t, -1), self.o.to(low)).float()

        n32 = F.rms_norm(x, (h,), self.norm2, eps).view(b * t, h)
        logits = F.linear(n32, self.router)
        p = logits.softmax(-1)
        top, chosen = p.topk(c.num_experts_per_tok, -1)
        top = top / top.sum(-1, keepdim=True)
        flat = chosen.reshape(-1)
        load = torch.zeros(c.num_experts, dtype=torch.int64).scatter_add(
            0, flat, torch.ones_like(flat)
        )
        # Per layer: if the loss is pooled over layers, as in transformers, layers stay skewed.
        balance = c.num_experts * (p.mean(0) * (load / flat.numel())).sum()
        z = logits.logsumexp(-1).square().mean()
        mean = flat.numel() / c.num_experts
        rows = int(CAPACITY * mean) if self.training else int(load.max())
        order = flat.argsort(stable=True)
        grouped = flat[order]
        rank = torch.arange(flat.numel()) - (load.cumsum(0) - load)[grouped]
        spare = c.num_experts * rows
        slot = torch.where(rank < rows, grouped * rows + rank, spare)
        place = torch.empty_like(flat).index_put_((order,), slot).view_as(chosen)
        source = torch.full((spare + 1,), b * t).index_put_((slot,), order // c.num_experts_per_tok)
        source = source[:-1]
        xs = _Spread.apply(n32.to(low), source, place).view(c.num_experts, rows, h)
        gate, up = torch.bmm(xs, self.gate_up.to(low).transpose(1, 2)).chunk(2, 2)
        y = torch.bmm(F.silu(gate) * up, self.down.to(low).transpose(1, 2))
        x = x + _Collect.apply(y.flatten(0, 1), top, source, place).view(b, t, h)
        return x, balance, z, load


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Network(nn.Module):
    """Byte-level language model with tied embeddings."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.c = config
        self.embed = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        for name, weight in self.named_parameters():
            if "norm" not in name:
                std = 0.02 if name in ("embed",) else weight.shape[-1] ** -0.5
                if name.endswith((".o", ".down")):
                    std *= (2 * config.num_hidden_layers) ** -0.5
                nn.init.normal_(weight, std=std if "router" not in name else 0.02)

    def forward(self, ids: Tensor, low: torch.dtype) -> Any:
        """Map ``ids`` [B, T] to logits [B, T, V], the balance and z losses, and the load [L, E]."""
        d, t = self.c.head_dim, ids.shape[1]
        theta = self.c.rope_parameters["rope_theta"]
        angle = torch.arange(t)[:, None] * theta ** (-torch.arange(0, d, 2) / d)[None]
        cos, sin = (f(torch.cat([angle, angle], -1))[:, None] for f in (torch.cos, torch.sin))
        x = F.embedding(ids, self.embed)
        mask = torch.full((t, t), float("-inf"), dtype=low).triu(1)
        losses, loads = [], []
        for layer in self.layers:
            x, balance, z, load = layer(x, cos, sin, mask)
            losses.append((balance, z))
            loads.append(load)
        x = F.rms_norm(x, (x.shape[-1],), self.norm, self.c.rms_norm_eps)
        logits = F.linear(x.to(low), self.embed.to(low)).float()
        balance, z = (torch.stack(parts).mean() for parts in zip(*losses, strict=True))
        return logits, balance, z, torch.stack(loads)

    def export(self) -> Any:
        """Make a ``Qwen3MoeForCausalLM`` with these weights, in float32."""
        from transformers import Qwen3MoeForCausalLM

        names = {
            "q": "self_attn.q_proj.weight",
            "k": "self_attn.k_proj.weight",
            "v": "self_attn.v_proj.weight",
            "o": "self_attn.o_proj.weight",
            "q_norm": "self_attn.q_norm.weight",
            "k_norm": "self_attn.k_norm.weight",
            "norm1": "input_layernorm.weight",
            "norm2": "post_attention_layernorm.weight",
            "router": "mlp.gate.weight",
            "gate_up": "mlp.experts.gate_up_proj",
            "down": "mlp.experts.down_proj",
        }
        state = {"model.embed_tokens.weight": self.embed, "model.norm.weight": self.norm}
        state["lm_head.weight"] = self.embed
        for index, layer in enumerate(self.layers):
            for ours, theirs in names.items():
                state[f"model.layers.{index}.{theirs}"] = getattr(layer, ours)
        model = Qwen3MoeForCausalLM(self.c).float()
        model.load_state_dict({name: weight.detach() for name, weight in state.items()})
        return model.eval()
