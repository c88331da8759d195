"""`python -m opoch_xp`: the command line."""

from opoch_xp.cli import main

main()
