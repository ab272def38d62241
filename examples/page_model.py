"""Page a Hugging Face model with memory for half of its experts; the logits do not change.

Usage: python examples/page_model.py
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import fluxmoe
from fluxmoe.demo.model import SHIPPED
from fluxmoe.sim.simulator import simulate


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED)
    model = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype="auto").eval()
    prompt = tokenizer("And he said unto them, ", return_tensors="pt")
    with torch.inference_mode():
        unpaged = model(**prompt).logits

    with fluxmoe.page(model, memory="11MiB", eviction="next-use") as paged:
        with torch.inference_mode():
            assert torch.equal(model(**prompt).logits, unpaged)
        print("the same logits, bit for bit")

        # Start without resident pages, as the simulator does.
        paged.reset()
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.parquet"
            with paged.record(trace):
                tokens = model.generate(**prompt, max_new_tokens=24)
            stats = paged.stats()
            replay = simulate(trace, "next-use", stats["slots"])
        print(tokenizer.decode(tokens[0]))
        print(f"{stats['slots']} of {stats['pages']} pages fit, {stats['hit_rate']:.0%} hits")
        assert (replay.hits, replay.misses) == (stats["hits"], stats["misses"])
        print("the simulator counts the same")


if __name__ == "__main__":
    main()
