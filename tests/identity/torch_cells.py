"""Runner of torch's cells: a Hugging Face model unpaged, then paged, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import fluxmoe
from fluxmoe.errors import FluxMoEError
from tests.identity import models
from tests.identity.cells import Cell
from tests.identity.outcome import COUNTERS, Outcome

Answer = tuple[torch.Tensor, ...]


def prompts() -> dict[str, torch.Tensor]:
    """Make three left-padded prompts of different lengths, with the ids of a byte tokenizer."""
    ids = torch.randint(3, 259, (3, 10), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    mask[2, :9] = 0
    return {"input_ids": ids, "attention_mask": mask}


def answer(model: Any, new_tokens: int = 8) -> Answer:
    """Return generated tokens, logits of all prompt tokens, and logits of every decode step."""
    with torch.inference_mode():
        logits = model(**prompts()).logits
        generated = model.generate(
            **prompts(),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    return generated.sequences, logits, *generated.logits


def compiled_answer(model: Any) -> Answer:
    """Compile a model as one graph; return next tokens and all logits of four passes."""
    torch._dynamo.reset()
    call = torch.compile(model, fullgraph=True, dynamic=False)
    ids = prompts()["input_ids"]
    with torch.no_grad():
        steps = [call(ids.roll(shift, 1), use_cache=False).logits for shift in range(4)]
    return torch.stack([step[:, -1].argmax(-1) for step in steps], 1), *steps


def same(one: Answer, other: Answer) -> bool:
    """Return True if two answers are equal bit for bit."""
    return len(one) == len(other) and all(map(torch.equal, one, other))


class Models:
    """A holder of one model at a time, with its unpaged answers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._key: tuple[str, str] | None = None
        self._model: Any = None
        #: Unpaged answers for the last cell.
        self.stock: Answer = ()

    def run(self, cell: Cell) -> Outcome:
        """Compare one cell with the unpaged model."""
        implementation = cell.mode.removeprefix("torch ")
        ask = compiled_answer if implementation == "compiled" else answer
        if self._key != (cell.model, cell.mode):
            self._model = AutoModelForCausalLM.from_pretrained(
                models.write(self._folder, cell.model),
                dtype="auto",
                experts_implementation="grouped_mm"
                if implementation == "compiled"
                else implementation,
            ).eval()
            self.stock = ask(self._model)
            self._key = cell.model, cell.mode
        shape = models.shape(models.write(self._folder, cell.model))
        try:
            with fluxmoe.page(
                self._model,
                shape.slots(cell.slots) * shape.page_class.nbytes,
                eviction=cell.eviction,
                prefetch=cell.prefetch,
                banks=cell.banks,
                strict_policies=True,
            ) as paged:
                paged_answer = ask(self._model)
                paged.check()
                stats = paged.stats()
        except FluxMoEError as error:
            return Outcome(error=str(error))
        rows = range(len(self.stock[0]))
        return Outcome(
            len(rows),
            sum(torch.equal(self.stock[0][row], paged_answer[0][row]) for row in rows),
            sum(
                same(*(tuple(t[row] for t in a) for a in (self.stock, paged_answer)))
                for row in rows
            ),
            "",
            not same(self.stock, paged_answer) and not same(self.stock, ask(self._model)),
            {key: int(stats[key]) for key in COUNTERS},
        )
