"""Command line: `opoch-xp wall`, `opoch-xp audit FILE`, `opoch-xp backends`. Needs the extra `cli`."""

import sys
from importlib.util import find_spec
from io import TextIOWrapper


def main() -> None:
    """Run the command line, or say in one line what has to be installed for it."""
    missing = [name for name in ("typer", "rich") if find_spec(name) is None]
    if missing:
        sys.exit(f'opoch-xp needs {" and ".join(missing)}: pip install "opoch-xp[cli]"')
    from opoch_xp.cli.app import app

    for stream in (sys.stdout, sys.stderr):  # a name of a file that they cannot write is no reason to lose figures
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="opoch-xp")
