"""Prefetch by the most similar previous step.

Xue, Fu, Lu, Mai, Marina: "MoE-Infinity: Efficient MoE Inference on Personal Machines with
Sparsity-Aware Expert Cache", arXiv 2401.14361. The experts used by a request, layer by layer, form
an expert activation matrix. Past matrices are kept. While a new one is being filled, the past
matrix that is most similar so far predicts the experts of later layers. Experts of nearer layers
and with larger shares come first.

Differences from the paper:

* Policies get batches, not requests, so a matrix covers all requests of one step. With large
  batches, all matrices are similar, and only popularity per layer remains.
* The paper forms the collection by clustering. Here a new matrix replaces the most similar kept
  one, so that the collection remains diverse.
"""

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

import fluxmoe

__version__ = "0.1.0"
fluxmoe_plugin_api = 1


class Options(BaseModel):
    model_config = ConfigDict(extra="forbid")

    lead: int = Field(default=1, ge=1, description="How many layers ahead to fetch.")
    keep: int = Field(default=64, ge=1, description="Matrices to keep.")


class ActivationMatrices(fluxmoe.PrefetchPolicy):
    """Fetch the experts that later layers used in the most similar previous step (MoE-Infinity)."""

    def __init__(self, lead=1, keep=64):
        self.lead, self._keep = lead, keep
        self.reset()

    def reset(self):
        self._kept = None  # float32 [keep, layers, experts], each matrix of length 1
        self._count = 0
        self._step = None

    def propose(self, view, access):
        if self._kept is None:
            shape = view.num_layers, view.experts_per_layer
            self._kept = np.zeros((self._keep, *shape), np.float32)
            self._now = np.zeros(shape, np.float32)
        if access.step != self._step:
            self._finish()
            self._step = access.step
        experts = access.pages - access.layer * view.experts_per_layer
        self._now[access.layer, experts] = access.tokens
        if not self._count:
            return []
        past = self._kept[self._most_similar(self._now, access.layer + 1)]
        return self._ahead(view, access.layer, past, len(experts))

    def _finish(self):
        """Keep the matrix of the finished step."""
        length = np.linalg.norm(self._now)
        if not length:
            return
        if self._count < self._keep:
            place, self._count = self._count, self._count + 1
        else:
            place = self._most_similar(self._now, len(self._now))
        self._kept[place] = self._now / length
        self._now[:] = 0

    def _most_similar(self, matrix, layers):
        """Find the kept matrix with the largest cosine to ``matrix`` over the first ``layers``."""
        kept = self._kept[: self._count, :layers].reshape(self._count, -1)
        lengths = np.linalg.norm(kept, axis=1)
        return int(np.argmax(kept @ matrix[:layers].ravel() / np.maximum(lengths, 1e-9)))

    def _ahead(self, view, layer, past, count):
        """List the ``count`` most used experts of each later layer, most urgent first."""
        pages, urgency = [], []
        for distance in range(1, min(self.lead, view.num_layers - 1 - layer) + 1):
            row = past[layer + distance]
            best = np.argsort(-row, kind="stable")[:count]
            best = best[row[best] > 0]
            pages.append(view.page_of(layer + distance, best))
            share = row[best] / max(row.sum(), 1e-9)
            urgency.append(share * (1 - distance / view.num_layers))
        if not pages:
            return []
        return np.concatenate(pages)[np.argsort(-np.concatenate(urgency), kind="stable")]


@fluxmoe.hookimpl
def fluxmoe_register_policies(register):
    register("eam", ActivationMatrices, Options)
