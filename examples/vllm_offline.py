"""Run vLLM in this process, with a policy from a file.

Usage: python examples/vllm_offline.py
"""

import os
from pathlib import Path

# Must be set before vLLM is imported: engine in this process, one thread, no network access.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
)

from vllm import LLM, SamplingParams

from fluxmoe.backends.vllm import engine_options
from fluxmoe.demo.model import SHIPPED

POLICY = Path(__file__).with_name("mru.py")


def main() -> None:
    llm = LLM(
        model=str(SHIPPED),
        **engine_options(
            {
                "memory": {"budget": "24MiB", "experts": {"target": "11MiB"}},
                "plugins": [str(POLICY)],
                "eviction": "mru",
            }
        ),
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=8,
    )
    prompts = ["And he said unto them, ", "It is a truth universally "]
    for output in llm.generate(prompts, SamplingParams(max_tokens=24, temperature=0.8, seed=1)):
        print(output.prompt + output.outputs[0].text)
    stats = llm.collective_rpc("fluxmoe_stats")[0]
    print(f"{stats['slots']} of {stats['pages']} pages fit, {stats['hit_rate']:.0%} hits")


if __name__ == "__main__":
    main()
