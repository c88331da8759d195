"""Checks of the project: `nox` runs them all, `nox -l` lists them, `nox -s "tests(numpy)"` runs one."""

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"

GROUPS = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, group: str) -> None:
    """The pinned packages of one dependency group and, beside them, the project as its users get it: a wheel."""
    session.install(*nox.project.dependency_groups(GROUPS, group), ".")


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format and types: ruff and mypy."""
    session.install(*nox.project.dependency_groups(GROUPS, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session
@nox.parametrize("backend", [nox.param("numpy", id="numpy"), nox.param("strict", id="strict")])
def tests(session: nox.Session, backend: str) -> None:
    """The whole test suite through one backend: the NumPy plugin, or the generic twins under array-api-strict."""
    install(session, "test")
    arguments = [] if backend == "numpy" else ["--backend", backend]
    session.run("pytest", *arguments, *session.posargs)
