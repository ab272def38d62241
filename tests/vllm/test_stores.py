"""vLLM with coded pages and page files gives the same tokens and log-probabilities as stock."""

from __future__ import annotations

from pathlib import Path

import pytest

from fluxmoe.backends.vllm.child.child import ChildEngine
from tests.vllm.conftest import EAGER, PAGE, PAGES, Outputs, config, outputs

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("kept", ["host", "file", "both"])
def test_coded_pages_and_page_files(
    eager: ChildEngine, stock_outputs: Outputs, tmp_path: Path, kept: str
) -> None:
    file = {"kind": "file", "path": str(tmp_path)}
    stores = {
        "host": [{"kind": "host", "codec": "fixed4"}],
        "file": [file],
        "both": [
            {"kind": "host", "codec": "fixed4", "limit": 20 * PAGE},
            {**file, "codec": "fixed4"},
        ],
    }[kept]
    for _ in range(1 if kept == "host" else 2):
        eager.restart(fluxmoe=config(20, stores=stores, prefetch="next-layer"), **EAGER)
        assert outputs(eager) == stock_outputs
        stats = eager.call("stats")
        assert stats["misses"] > 0
        share = {"host": 0.8, "file": 1.0, "both": 0.93}[kept]  # files hold whole sectors
        assert stats["store_bytes"] <= share * PAGES * PAGE
    assert len(list(tmp_path.iterdir())) == (kept != "host")


def test_a_codec_that_is_not_there_is_refused_at_start(eager: ChildEngine) -> None:
    fluxmoe = config(20, stores=[{"kind": "host", "codec": "zip"}])
    with pytest.raises(Exception, match="unknown codec 'zip'"):
        eager.restart(fluxmoe=fluxmoe, **EAGER)
