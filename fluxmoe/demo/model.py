"""The shipped checkpoint, and a budget at which stock vLLM runs out of KV cache."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ASSETS = Path(__file__).with_name("assets")
#: A small Qwen3-MoE, trained on public-domain prose and documentation; see its README.
SHIPPED = ASSETS / "prose-moe-12m"


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A Qwen3-MoE checkpoint in bf16, and the sizes that follow from its shape."""

    folder: Path
    layers: int
    experts: int
    top_k: int
    hidden: int
    expert_hidden: int
    kv_heads: int
    head_dim: int
    #: vLLM's default block size on a CPU. Requests that fit into one block never wait for another.
    block_tokens: int = 128

    @classmethod
    def read(cls, folder: Path) -> DemoModel:
        """Read the model from the ``config.json`` in ``folder``."""
        config = json.loads((folder / "config.json").read_text())
        return cls(
            folder,
            layers=config["num_hidden_layers"],
            experts=config["num_local_experts"],  # the name that transformers 5 uses
            top_k=config["num_experts_per_tok"],
            hidden=config["hidden_size"],
            expert_hidden=config["moe_intermediate_size"],
            kv_heads=config["num_key_value_heads"],
            head_dim=config["head_dim"],
        )

    @property
    def page_bytes(self) -> int:
        return 3 * self.hidden * self.expert_hidden * 2

    @property
    def experts_total_bytes(self) -> int:
        return self.layers * self.experts * self.page_bytes

    @property
    def kv_block_bytes(self) -> int:
        return self.layers * self.block_tokens * 2 * self.kv_heads * self.head_dim * 2

    def budget(self, sequences: int) -> int:
        """Return the bytes for all experts and for ``sequences`` requests.

        A request takes one KV block; vLLM's null block is added.
        """
        return self.experts_total_bytes + (sequences + 1) * self.kv_block_bytes

    def options(self, max_num_seqs: int) -> dict[str, Any]:
        """Return vLLM's settings: eager, one block per request, ``max_num_seqs`` at once."""
        return {
            "enforce_eager": True,
            "max_model_len": self.block_tokens,
            "max_num_seqs": max_num_seqs,
            "block_size": self.block_tokens,
            # On a CPU, vLLM cannot split the prefill of a request that has its own seed, so one
            # step must have room for all prompts together.
            "max_num_batched_tokens": max_num_seqs * self.block_tokens,
        }
