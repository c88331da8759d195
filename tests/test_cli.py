"""The command line: tables that can be read and pasted, figures that can be parsed, and errors of one line."""

import json
import os
import re
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from typer.testing import CliRunner

import opoch_xp
from opoch_xp import workloads
from opoch_xp.cli import rows, tables, wall
from opoch_xp.cli.app import Workload, app
from opoch_xp.methods import LSH, Exact, Treecode, method_name


def run(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def refused(*arguments):
    """The one line on stderr with which a command was refused; nothing was printed before it."""
    result = run(*arguments, code=2)
    assert result.stdout == ""
    (line,) = result.stderr.strip().splitlines()  # rich before 15 leaves an empty line where it waited
    assert line.startswith("opoch-xp: ")
    return line


def table_of(text):
    """The cells of the Markdown tables in a text."""
    lines = [line for line in text.splitlines() if line.startswith("|") and not re.fullmatch(r"[|:-]+", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_wall_measures_every_method(tmp_path):
    path = tmp_path / "wall.json"
    result = run("wall", "--workload", "scattered", "--tokens", 5000, "--dim", 16, "--heads", 2, "--json", path)
    header, *body = table_of(result.stdout)
    assert header == ["method", "time", "speed-up", "extra memory", "error", "p99", "pairs"]
    names = ["Exact, matrix in memory", "Exact(), streaming", "LSH(bits=8, tables=8)", "Treecode()"]
    assert [cells[0] for cells in body] == names
    assert body[0][1] == "refused"
    assert body[0][3] == "needs 200 MB"  # 2 heads of 5,000 x 5,000 float32
    assert all(all(cells) for cells in body[1:])
    assert "5,000 tokens, 2 heads of 16, float32, causal, seed 0" in result.stdout
    assert f"NumPy {np.__version__}" in result.stdout
    assert "\x1b" not in result.stdout
    [table] = json.loads(path.read_text())
    assert [row["method"] for row in table["rows"]] == names
    assert table["heads"] == 2
    treecode = table["rows"][3]
    assert 0 < treecode["error"] < treecode["bound"]
    assert treecode["speedup"] == pytest.approx(table["rows"][1]["seconds"] / treecode["seconds"])


def test_wall_of_the_model_s_heads_has_bits_per_byte():
    result = run("wall", "--workload", "heads", "--tokens", 500, "--json", "-")
    [table] = json.loads(result.stdout)  # with the figures on stdout the table goes to stderr
    header, *body = table_of(result.stderr)
    assert header[-1] == "bits/byte"
    assert [cells[0] for cells in body[2:]] == [
        "window of 1,024 only",
        "LSH(bits=4, tables=8, window=512)",
        "Treecode()",
        "Treecode(group=1)",
    ]
    bits = [row["bits"] for row in table["rows"][1:]]
    assert bits[1] == pytest.approx(bits[0], abs=1e-4)  # 500 tokens are inside the window
    assert max(bits) < bits[0] + 0.05
    assert re.fullmatch("[0-9a-f]{12}", table["text"])


def test_wall_shows_two_tables_by_default():
    result = run("wall", "--tokens", 300, "--no-causal")
    assert re.findall(r"^The wall.*", result.stdout, re.M) == [
        "The wall: topics",
        "The wall, real input: heads of the byte model",
    ]
    assert "16 heads of 64" in result.stdout
    assert "bits/byte" not in result.stdout  # the model is causal


def test_the_workloads_of_the_command_are_the_library_s():
    assert {workload.value for workload in Workload} == set(workloads.NAMES)


def test_defaults_at_a_million_tokens():
    topics, heads = wall.plans(wall.Setup(None, None, 64, None, True, "numpy", 0))
    assert (topics.workload, topics.tokens, topics.heads) == ("topics", 1_000_000, None)
    assert [method for _, method in topics.methods] == [LSH(bits=16, tables=8), Treecode()]
    assert (heads.workload, heads.tokens) == ("heads", 8192)
    assert [method for _, method in heads.methods][1] == LSH(bits=8, tables=8, window=512)


def test_exact_attention_is_extrapolated_from_blocks_of_rows(monkeypatch):
    q, k, v = workloads.make("gaussian", 4096, 4)
    given = rows.Input(q, k, v, causal=True)
    assert not rows.exact_row(given).extrapolated
    monkeypatch.setattr(rows, "FULL_PAIRS", 1000)
    monkeypatch.setattr(rows, "cores", lambda: 1)
    monkeypatch.setattr(rows, "timed", lambda function: (function(), 2.0, 1000))
    sampled = rows.exact_row(given)
    assert sampled.extrapolated
    assert sampled.seconds == pytest.approx(4.0)  # 4 blocks of 512 rows are half of them
    assert sampled.extra_bytes == 1000 + 2048 * 4 * 4


@pytest.mark.parametrize(("n", "rows_sampled"), [(1_000_000, 4096), (700, 512), (100_000_000, 512), (50, 50)])
def test_sampled_rows_see_as_many_keys_as_all_rows_do(monkeypatch, n, rows_sampled):
    monkeypatch.setattr(rows, "cores", lambda: 2)
    sampled = rows.sampled_blocks(n, n * n // 2)
    assert len(sampled) == len(set(sampled)) == rows_sampled
    assert 0 <= sampled.min() <= sampled.max() < n
    assert sampled.mean() == pytest.approx((n - 1) / 2, abs=1)


def test_backends_are_listed():
    result = run("backends")
    cells = table_of(result.stdout)
    assert ["generic", "opoch_xp.backends.generic", "", "yes"] in cells
    assert any(row[0] == "numpy" and row[3] == "yes" for row in cells)
    assert any(row[0] == "tree_attention" and "own" in row for row in cells)


@pytest.fixture
def heads(tmp_path):
    q, k, v = workloads.make("scattered", 400, 16, heads=2)
    path = tmp_path / "heads.npz"
    np.savez(path, q=q, k=k, v=v)
    return path


def test_audit_of_a_file(heads, tmp_path):
    path = tmp_path / "audit.json"
    result = run("audit", heads, "--tol", 0.3, "--json", path)
    header, *body = table_of(result.stdout)
    assert header == ["method", "time", "speed-up", "extra memory", "error", "bound", "p99", "pairs"]
    assert body[0][0].startswith("Exact(), streaming")
    assert sum("<- chosen" in cells[0] for cells in body) == 1
    found = json.loads(path.read_text())
    chosen = eval(found["chosen"], {"Exact": Exact, "LSH": LSH, "Treecode": Treecode})
    assert f"tol=0.3: {method_name(chosen)}" in result.stdout
    bounds = {row["method"]: row["bound"] for row in found["rows"]}
    assert bounds.get(method_name(chosen), 0.0) <= 0.3


def test_audit_refuses_in_one_line(heads, tmp_path):
    assert "no such file" in refused("audit", tmp_path / "none.npz")
    assert "--tol" in refused("audit", heads, "--tol", 1.5)
    for held, message in (
        ({"q": np.ones((4, 3)), "k": np.ones((4, 2)), "v": np.ones((4, 2))}, "q and k must have the same last axis"),
        ({"q": np.ones((4, 3)), "k": np.ones((5, 3)), "v": np.ones((4, 3))}, "same number of keys"),
        ({"q": np.ones(3), "k": np.ones(3), "v": np.ones(3)}, "number of axes"),
        ({"q": np.ones((4, 3)), "k": np.full((4, 3), np.nan), "v": np.ones((4, 3))}, "k must be finite"),
        ({"q": np.ones((4, 3)), "k": np.ones((4, 3))}, "v missing, the file holds k, q"),
        ({name: np.ones((4, 3), int) for name in "qkv"}, "must be float16"),
    ):
        np.savez(tmp_path / "bad.npz", **held)
        assert message in refused("audit", tmp_path / "bad.npz")
    heads.write_bytes(heads.read_bytes()[:5000])
    assert "truncated" in refused("audit", heads)


def test_wall_refuses_in_one_line(tmp_path):
    assert "65,536 tokens" in refused("wall", "--workload", "heads", "--tokens", 65_537)
    assert "16 heads of 64" in refused("wall", "--workload", "heads", "--dim", 32)
    assert "--backend must be one of" in refused("wall", "--backend", "nampy")
    assert "no folder" in refused("wall", "--json", tmp_path / "none" / "wall.json")
    assert run("wall", "--tokens", 0, code=2).stdout == ""


def test_figures_go_straight_into_what_is_no_file(tmp_path):
    """A pipe, a device, the shell's /dev/fd/N: written to, and not replaced."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_text)
        run("backends", "--json", pipe)
        assert {entry["name"] for entry in json.loads(read.result(60))} >= {"numpy", "generic"}
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    run("backends", "--json", "/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    command = f"{sys.executable} -m opoch_xp backends --json >(cat > {tmp_path}/out) > /dev/null; wait; sleep .5"
    subprocess.run(["bash", "-c", command], check=True)
    assert json.loads((tmp_path / "out").read_text())


def test_a_file_keeps_its_mode_and_a_link_its_place(tmp_path):
    path, link = tmp_path / "figures.json", tmp_path / "link.json"
    path.write_text("old")
    path.chmod(0o600)
    link.symlink_to(path)
    run("backends", "--json", link)
    assert link.is_symlink()
    assert json.loads(path.read_text())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(tmp_path.iterdir()) == [path, link]


def test_the_longest_names_there_can_be(tmp_path):
    path = tmp_path / ("n" * 250 + ".json")
    run("backends", "--json", path)
    assert json.loads(path.read_text())
    assert "cannot be written" in refused("backends", "--json", tmp_path / ("n" * 251 + ".json"))


def test_what_was_measured_is_kept_where_stdout_takes_nothing(tmp_path, monkeypatch):
    def broken(*arguments):
        raise BrokenPipeError("nobody reads")

    monkeypatch.setattr(tables.Sink, "show", broken)
    sizes = ["--n", 2000, "--queries", 10, "--bits", 8, "--tables", 2]
    for number, command in enumerate((
        ["needle", *sizes, "--csv", tmp_path / "found.csv"],
        ["wall", "--workload", "scattered", "--tokens", 600],
        ["backends"],
    )):  # fmt: skip
        path = tmp_path / f"{number}.json"
        run(*command, "--json", path, code=2)
        assert json.loads(path.read_text())
    assert (tmp_path / "found.csv").read_text().count("\n") == 2


def test_names_that_stdout_cannot_write(heads, tmp_path):
    """Bytes that are no text in the name of a file, and a stdout that takes ASCII alone."""
    odd = os.fsdecode(bytes(tmp_path) + b"/h\xffe\xc3\xa9ds.npz")
    os.rename(heads, odd)
    for encoding in ("utf-8", "ascii"):
        command = [sys.executable, "-m", "opoch_xp", "audit", odd, "--json", str(tmp_path / "audit.json")]
        environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict"}
        ended = subprocess.run(command, capture_output=True, env=environment)
        assert ended.returncode == 0, ended.stderr
        assert b"Methods on h\\udcffe" in ended.stdout
        assert json.loads((tmp_path / "audit.json").read_text())["file"] == odd


def test_without_typer_one_line_says_what_to_install():
    code = "import sys; sys.modules['typer'] = None; sys.argv = ['opoch-xp']; from opoch_xp.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == 'opoch-xp needs typer: pip install "opoch-xp[cli]"\n'


def test_the_module_runs_as_a_command():
    result = subprocess.run([sys.executable, "-m", "opoch_xp", "--version"], capture_output=True, text=True, check=True)
    assert result.stdout == f"opoch-xp {opoch_xp.__version__}\n"


@pytest.mark.parametrize(
    ("words", "value", "text"),
    [
        (tables.seconds, 0.0123, "12.3 ms"),
        (tables.seconds, 1.064, "1.06 s"),
        (tables.seconds, 836.7, "837 s"),
        (tables.size, 4e12, "4.0 TB"),
        (tables.size, 312e6, "312 MB"),
        (tables.size, 12, "12 B"),
        (tables.size, None, "n/a"),
        (tables.percent, 0.0084, "0.84%"),
        (tables.percent, 0.08, "8.0%"),
        (tables.percent, 0.1612, "16.1%"),
        (tables.percent, 1.68, "168%"),
        (tables.percent, 3e-8, "<0.0001%"),
        (tables.percent, 0.0, "0"),
        (tables.factor, 52.04, "52.0x"),
        (tables.factor, 1234.0, "1,234x"),
    ],
)
def test_figures_in_words(words, value, text):
    assert words(value) == text


def test_methods_are_named_as_they_are_written():
    assert method_name(Exact()) == "Exact()"
    assert method_name(Treecode(group=1)) == "Treecode(group=1)"
    assert method_name(LSH(window=512)) == "LSH(bits=12, tables=8, window=512)"


def test_a_model_needs_libraries_that_are_named(monkeypatch):
    from opoch_xp.cli import model

    monkeypatch.setattr(model, "find_spec", lambda name: None)
    line = refused("model", ".")
    assert 'opoch-xp model needs torch and transformers: pip install "opoch-xp[model]"' in line
