"""``python -m fluxmoe``: the command line."""

from fluxmoe.cli import main

main()
