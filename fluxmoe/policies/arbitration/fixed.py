"""``fixed``: each tenant keeps its initial memory."""

from __future__ import annotations

from fluxmoe.core.policy.arbitration import ArbitrationPolicy, ArbitrationView, Split


class Fixed(ArbitrationPolicy):
    """Keep the initial split, as the baseline without arbitration."""

    fixed = True

    def split(self, view: ArbitrationView) -> Split:
        return Split(view.frames)
