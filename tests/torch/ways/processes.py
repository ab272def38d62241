"""Ways to copy a model and to pass it to other processes."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any

import cloudpickle
import dill
import torch
from torch.ao.quantization import quantize_dynamic

from fluxmoe.errors import FluxMoEError
from tests.torch.ways.use import Use


def forked(use: Use) -> None:
    for attempt in (use.run, use.handle.check, use.handle.reset, use.handle.stats):
        pid = os.fork()
        if pid == 0:
            os._exit(_code_of(attempt))
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == int(use.code[2:]) % 256
        use.refused += 1


def _code_of(attempt: Callable[[], object]) -> int:
    try:
        attempt()
    except FluxMoEError as error:
        return int(error.code[2:]) % 256
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    return 0


def spawned(use: Use) -> None:
    context = multiprocessing.get_context("spawn")
    use.refuses(
        context.Process(target=print, args=(use.model,)).start,
        context.Process(target=print, args=(use.handle,)).start,
        torch.multiprocessing.get_context("spawn").Process(target=use.model).start,
    )


def other_pickles(use: Use) -> None:
    for module in (cloudpickle, dill):
        use.refuses(
            lambda module=module: module.dumps(use.model),
            lambda module=module: module.dumps(use.handle),
            lambda module=module: module.dumps(lambda: use.model),
            lambda module=module: module.dumps(use.experts.down_proj),
        )


def copied(use: Use) -> None:
    for part in (use.model, use.model.model, use.layers[0], use.layers[0].mlp, use.experts):
        use.refuses(
            lambda part=part: copy.copy(part),
            lambda part=part: copy.deepcopy(part),
            lambda part=part: pickle.dumps(part),
            lambda part=part: torch.save(part, use.folder / "part"),
        )
    use.refuses(lambda: copy.deepcopy([*use.model.parameters()]))
    use.refuses(lambda: copy.deepcopy({"model": use.model}))


def copied_handle(use: Use) -> None:
    use.refuses(
        lambda: copy.copy(use.handle),
        lambda: copy.deepcopy(use.handle),
        lambda: pickle.dumps(use.handle),
        lambda: pickle.dumps(use.handle.check),
    )


def copied_parts(use: Use) -> Any:
    norm, attention = copy.deepcopy(use.model.model.norm), use.layers[0].self_attn
    again = pickle.loads(pickle.dumps(attention))
    config = copy.deepcopy(use.model.generation_config)
    return norm.state_dict(), again.state_dict(), config.to_dict()


def quantised(use: Use) -> Any:
    quantize_dynamic(use.model, {torch.nn.Linear}, inplace=True)
    return use.run(), sum("quantized" in type(m).__module__ for m in use.model.modules())


quantised.dtype = "float32"  # type: ignore[attr-defined]


def quantised_copy(use: Use) -> None:
    use.refuses(lambda: quantize_dynamic(use.model, {torch.nn.Linear}))
