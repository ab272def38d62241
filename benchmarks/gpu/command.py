"""``python -m benchmarks gpu COMMAND``: the commands of the kit, one line each."""

from __future__ import annotations

import sys
from importlib import import_module

from benchmarks.gpu import bring, device
from fluxmoe.errors import FluxMoEError

#: Command → description. The module of that name has ``main(options)``, unless it is in
#: ``_BRINGING``.
COMMANDS = {
    "collect": "here: download the packages that the GPU machine lacks, in pieces",
    "unpack": "there: check the pieces and unpack them",
    "check": "there: every kernel against the reference, bit for bit (seconds)",
    "sanitize": "there: `check` under compute-sanitizer",
    "kernel": "there: time of the fused kernel, raw, compressed and vLLM's",
    "decode": "there: decoding to slots, and encoding",
    "copies": "there: host to device, copied and gathered",
    "events": "there: the event rule on the device",
    "mapping": "there: creating, mapping and unmapping frames",
}
_BRINGING = ("collect", "unpack")


def main(argv: list[str]) -> None:
    """Run one command; on an error, print its message and exit with status 2."""
    name, *options = argv or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {each:10}{what}" for each, what in COMMANDS.items()]
        print("python -m benchmarks gpu COMMAND [OPTIONS]\n", *lines, sep="\n")
        return
    if name not in COMMANDS:
        sys.exit(f"no command of the kit is called {name!r}; known: {', '.join(COMMANDS)}")
    try:
        if name in _BRINGING:
            bring.main(argv)
        else:
            if not {"-h", "--help"} & set(options):
                device.require()  # before a module reports a missing Triton
            import_module(f"benchmarks.gpu.{name}").main(options)
    except FluxMoEError as error:
        print(f"error[{error.code}]: {error.text}", file=sys.stderr)
        sys.exit(2)
