"""The checkpoint of the demonstration, and the budget at which stock vLLM is starved."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fluxmoe.testing import checkpoints


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A Qwen3-MoE with random weights; sizes follow from its shape (bf16)."""

    layers: int = 8
    experts: int = 64
    top_k: int = 8
    hidden: int = 256
    expert_hidden: int = 256
    kv_heads: int = 2
    head_dim: int = 64
    #: vLLM's default block on a CPU; a request that fits one block never waits for a second.
    block_tokens: int = 128

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
        """All experts, and a KV cache for ``sequences`` requests of one block (and vLLM's null)."""
        return self.experts_total_bytes + (sequences + 1) * self.kv_block_bytes

    def write(self, folder: Path) -> Path:
        """Write the checkpoint, unless it is there already."""
        return checkpoints.write(
            folder,
            "qwen3-moe",
            num_hidden_layers=self.layers,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            hidden_size=self.hidden,
            moe_intermediate_size=self.expert_hidden,
            num_attention_heads=4,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
        )

    def options(self, max_num_seqs: int) -> dict[str, Any]:
        """vLLM's settings: eager, one block per request, at most ``max_num_seqs`` at once."""
        return {
            "enforce_eager": True,
            "max_model_len": self.block_tokens,
            "max_num_seqs": max_num_seqs,
            "block_size": self.block_tokens,
        }


def cache_folder() -> Path:
    """Where generated checkpoints are kept."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fluxmoe"
