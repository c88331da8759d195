"""The commands and options of `opoch-xp`, written into the page from the program itself."""

import html
from typing import Any

from typer import Context
from typer.main import get_command

MARK = "<!-- commands -->"


def on_page_markdown(text: str, **_: Any) -> str:
    return text.replace(MARK, commands()) if MARK in text else text


def commands() -> str:
    """A section for every command: what it does, how it is called, its options."""
    from opoch_xp.cli.app import app

    program: Any = get_command(app)
    return "\n".join(section(name, command) for name, command in program.commands.items())


def section(name: str, command: Any) -> str:
    context = Context(command)
    arguments = [entry for entry in command.params if not entry.opts[0].startswith("-")]
    call = " ".join(["opoch-xp", name, *(entry.name.upper() for entry in arguments), "[OPTIONS]"])
    rows = [entry.get_help_record(context) for entry in command.params if not entry.hidden]
    table = [f"| `{option.replace('|', chr(0x2502))}` | {html.escape(meaning)} |" for option, meaning in rows]
    return "\n".join(
        [f"## {name}", "", command.help, "", f"```text\n{call}\n```", "", "| option | meaning |", "|---|---|", *table, ""]
    )
