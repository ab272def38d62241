"""``python -m tests.fuzz``: repeat a run, or search for one that fails."""

from __future__ import annotations

import argparse
import logging
import sys

from tests.fuzz.driver import Failure, attempt, fuzz


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first or only seed")
    parser.add_argument("--ops", type=int, default=5000, help="operations per run")
    parser.add_argument("--runs", type=int, default=1, help="number of consecutive seeds")
    parser.add_argument("--gpu", action="store_true", help="run on a fake GPU")
    arguments = parser.parse_args(argv)
    logging.disable()  # without the reports of many faulty policies
    if arguments.runs == 1:
        attempt(arguments.seed, arguments.ops, gpu=arguments.gpu)  # for a full traceback
        print(f"seed {arguments.seed}: {arguments.ops} operations, nothing wrong")
        return 0
    try:
        seeds = range(arguments.seed, arguments.seed + arguments.runs)
        tally = fuzz(seeds, arguments.ops, gpu=arguments.gpu)
    except Failure as failure:
        print(failure, file=sys.stderr)
        return 1
    print(f"{tally.runs} runs, {tally.operations} operations, nothing wrong")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
