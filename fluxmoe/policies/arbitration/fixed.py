"""A fixed split: what each tenant got at the start is what it keeps."""

from __future__ import annotations

from fluxmoe.core.policy.arbitration import ArbitrationPolicy, ArbitrationView, Split


class Fixed(ArbitrationPolicy):
    """Never move memory."""

    fixed = True

    def split(self, view: ArbitrationView) -> Split:
        return Split(view.frames)
