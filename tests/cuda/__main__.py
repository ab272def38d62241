"""``python -m tests.cuda``: run the conformance tests on this machine's GPU.

The command needs neither pytest plugins nor test configuration. With ``--fake``, the tests run only
on the fake driver.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.cuda.card import Card, real_card


def main(argv: list[str]) -> int:
    arguments = ["-c", "/dev/null", "--rootdir=.", "--noconftest", "-p", "no:cacheprovider", "-q"]
    if "--fake" in argv:
        arguments += ["-k", "not gpu"]
    else:
        card = real_card()
        if not isinstance(card, Card):
            print(f"there is no GPU to try: {card}", file=sys.stderr)
            return 2
        print(f"{card.cuda.name}, driver for CUDA {card.cuda.version}")
        card.close()
    here = Path(__file__).parent
    files = [str(here / "test_conformance.py"), str(here / "test_bindings.py")]
    return int(pytest.main([*arguments, "-W", "ignore::pytest.PytestUnknownMarkWarning", *files]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
