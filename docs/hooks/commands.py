"""The commands and options of `opoch-xp`, written into the page from the program itself."""

import html
import re
from typing import Any

from typer import Context
from typer.main import get_command

MARK = "<!-- commands -->"
KINDS = {"int range": "N", "list[int]": "N", "float range": "X", "float": "X", "path": "FILE"}  # any other: NAME


def on_page_markdown(text: str, **_: Any) -> str:
    return text.replace(MARK, commands()) if MARK in text else text


def commands() -> str:
    """A section for every command: what it does, how it is called, its options."""
    from opoch_xp.cli.app import app

    program: Any = get_command(app)
    return "\n".join(section(name, command) for name, command in program.commands.items())


def section(name: str, command: Any) -> str:
    arguments = [entry for entry in command.params if not entry.opts[0].startswith("-")]
    call = " ".join(["opoch-xp", name, *(entry.name.upper() for entry in arguments), "[OPTIONS]"])
    rows = [row(entry, Context(command)) for entry in command.params if not entry.hidden]
    head = [f"## {name}", "", command.help, "", f"```text\n{call}\n```", "", "| option | meaning |", "|---|---|"]
    return "\n".join([*head, *rows, ""])


def row(entry: Any, context: Any) -> str:
    """A line of the table, from what --help says: `--dim N`, and bounds in words."""
    option, meaning = entry.get_help_record(context)
    given = re.search(r" <(.+)>$", option)
    if given and "|" in given[1]:
        meaning = f"{meaning} One of {', '.join(given[1].split('|'))}."
    if given:
        option = option[: given.start()] + " " + KINDS.get(given[1], "NAME")
    if entry not in context.command.params or not entry.opts[0].startswith("-"):
        option = entry.name.upper()
    meaning = meaning.replace("[required]", "").replace("x>=", "at least ")
    meaning = re.sub(r"(\S+?)<=x<=(\S+?)([\];])", r"\1 to \2\3", meaning)
    return f"| `{option}` | {html.escape(re.sub(r'  +', ' ', meaning)).replace('[', '(').replace(']', ')')} |"
