"""vLLM calls FluxMoE's entry point in each of its processes, so the entry point must be light."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

from fluxmoe.backends.vllm.child.child import ENVIRONMENT

pytestmark = pytest.mark.vllm

HEAVY = [
    "numba",
    "pyarrow",
    "fluxmoe.core.paging.rule",
    "fluxmoe.backends.runtime",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.layers.fused_moe.routed_experts",
]


def test_the_entry_point_and_the_metrics_import_nothing_that_pages() -> None:
    program = f"""
import sys
from fluxmoe.backends.vllm import register
register()
register()
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
connector = KVConnectorFactory.get_connector_class_by_name("FluxMoEConnector")
assert connector.build_kv_connector_stats().is_empty()
assert "fluxmoe.backends.vllm.metrics" in sys.modules
print([name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr


def test_a6_only_the_worker_class_replaces_anything_in_the_process() -> None:
    program = """
import importlib, pkgutil
import torch, vllm
from vllm.model_executor.custom_op import op_registry_oot
import fluxmoe.backends.vllm as backend

def state():
    torches = [torch, torch.cuda, torch.accelerator, torch.Tensor]
    names = ["Event", "Stream", "set_stream", "current_stream", "stream", "synchronize",
             "empty_cache", "get_memory_info", "pin_memory", "record_stream"]
    found = {(at, name): getattr(at, name, None) for at in torches for name in names}
    return {**found, "layers": dict(op_registry_oot)}

before = state()
modules = [m.name for m in pkgutil.walk_packages(backend.__path__, backend.__name__ + ".")]
engines = [name for name in modules if name.endswith((".compat.cpu", ".worker.cpu"))]
for name in modules:
    if name not in engines:
        importlib.import_module(name)
assert len(modules) > 25 and len(engines) == 2
print([str(key) for key, value in state().items() if value != before[key]])
importlib.import_module(engines[0])
assert state() != before
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout.splitlines()[-1:]) == (0, ["[]"]), (
        done.stdout + done.stderr
    )


@pytest.mark.parametrize("level, shown", [("INFO", True), ("WARNING", False)])
def test_what_fluxmoe_tells_is_in_vllms_log(level: str, shown: bool) -> None:
    program = """
import logging
from fluxmoe.backends.vllm import register
register()
from vllm.logger import _configure_vllm_root_logger
_configure_vllm_root_logger()
logging.info("of a library")  # which adds a handler in another format
logging.getLogger("fluxmoe").info("memory moves")
logging.getLogger("fluxmoe").warning("a move was undone")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **ENVIRONMENT, "VLLM_LOGGING_LEVEL": level},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    log = done.stdout + done.stderr
    assert ("memory moves" in log) == shown, log
    assert log.count("a move was undone") == 1, log
    shown_line = next(line for line in log.splitlines() if "a move was undone" in line)
    assert re.search(r"WARNING \d\d-\d\d \d\d:\d\d:\d\d \[", shown_line)  # in vLLM's format


def test_c4_a_block_of_lines_is_one_record_of_a_json_log() -> None:
    program = """
import logging
from fluxmoe.backends.vllm import register
register()
from vllm.config.logging import LoggingConfig
from vllm.logger import configure_logging
configure_logging(LoggingConfig(formatter="json"))
logging.getLogger("fluxmoe").info("FluxMoE pages:\\n  budget")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **ENVIRONMENT, "VLLM_LOGGING_LEVEL": "INFO"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    (line,) = (each for each in (done.stdout + done.stderr).splitlines() if "budget" in each)
    assert "FluxMoE pages:\n  budget" in json.loads(line).values()


def test_c4_a_program_with_its_own_logging_keeps_it() -> None:
    program = """
import logging
logging.basicConfig(format="mine: %(message)s", level=logging.INFO)
from fluxmoe.backends.vllm import register
register()
logging.getLogger("fluxmoe").info("memory moves")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **ENVIRONMENT, "VLLM_LOGGING_LEVEL": "INFO"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if "memory" in line] == ["mine: memory moves"]
