"""The conformance kit, which tests policies and codecs against their contracts."""

from fluxmoe.testing.conformance.arbitration import check_arbitration_policy
from fluxmoe.testing.conformance.codec import check_codec
from fluxmoe.testing.conformance.eviction import check_eviction_policy
from fluxmoe.testing.conformance.prefetch import check_prefetch_policy
from fluxmoe.testing.conformance.report import ConformanceError

__all__ = [
    "ConformanceError",
    "check_arbitration_policy",
    "check_codec",
    "check_eviction_policy",
    "check_prefetch_policy",
]
