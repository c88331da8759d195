"""The page of the benchmarks in a browser: graphs are drawn, and nothing is fetched from another host."""

import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from offline import make_offline

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--virtual-time-budget=8000",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip
FRAME = """<!doctype html><iframe id=f src="index.html#{place}" style="width:1200px;height:900px"></iframe><script>
setTimeout(() => {{
  const page = f.contentWindow, coloured = canvas => {{
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data, columns = new Set();
    let count = 0;
    for (let i = 0; i < data.length; i += 4) {{
      const [r, g, b, a] = data.subarray(i, i + 4);
      if (a && Math.max(r, g, b) - Math.min(r, g, b) > 40) {{
        count++;
        columns.add(i / 4 % canvas.width);
      }}
    }}
    return [count, columns.size];
  }};
  document.body.append("measured " + JSON.stringify({{
    coloured: [...page.document.querySelectorAll("canvas.flot-base")].map(coloured),
    text: page.document.body.innerText,
    fetched: page.performance.getEntriesByType("resource").map(entry => entry.name),
  }}) + " end");
}}, 3000);
</script>"""
COMMITS = 3


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=someone", "-c", "user.email=someone@example.org", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


def results(folder: Path) -> None:
    """Results as asv writes them, of a repository of some commits: one benchmark of a method and a length."""
    machine = {"machine": "local", "os": "Linux", "arch": "", "cpu": "", "num_cpu": "2", "ram": "", "version": 1}
    parameters = [["'Exact'", "'Treecode'"], ["1024", "4096", "16384"]]
    benchmark = {
        "name": "attention.Length.time_attend", "code": "", "params": parameters, "param_names": ["method", "tokens"],
        "type": "time", "unit": "seconds", "version": "1", "timeout": 60.0,
    }  # fmt: skip
    configuration = {
        "version": 1, "project": "opoch_xp", "repo": ".", "branches": ["HEAD"], "environment_type": "existing",
        "benchmark_dir": ".", "results_dir": "results", "html_dir": "html",
    }  # fmt: skip
    (folder / "results" / "local").mkdir(parents=True)
    (folder / "asv.conf.json").write_text(json.dumps(configuration))
    (folder / "results" / "benchmarks.json").write_text(json.dumps({benchmark["name"]: benchmark, "version": 2}))
    (folder / "results" / "local" / "machine.json").write_text(json.dumps(machine))
    git(folder, "init", "--quiet")
    for number in range(COMMITS):
        git(folder, "commit", "--quiet", "--allow-empty", "--message", f"commit {number}")
        commit = git(folder, "rev-parse", "HEAD")
        times = [0.01 * (1 + number), 0.04, 0.16, 0.02, 0.03, 0.05]
        content = {
            "commit_hash": commit, "env_name": "existing-py3", "date": 1_700_000_000_000 + number, "python": "3",
            "params": {**machine, "python": "3"}, "requirements": {}, "env_vars": {}, "durations": {}, "version": 2,
            "result_columns": ["result", "params", "version"],
            "results": {benchmark["name"]: [times, parameters, "1"]},
        }  # fmt: skip
        del content["params"]["version"]
        (folder / "results" / "local" / f"{commit[:8]}-existing-py3.json").write_text(json.dumps(content))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The folder with the page, and its address."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    folder = tmp_path_factory.mktemp("benchmarks")
    results(folder)
    subprocess.run([sys.executable, "-m", "asv", "publish"], cwd=folder, check=True, capture_output=True)
    page = folder / "html"
    make_offline(page)

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: Handler(*a, directory=str(page)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield page, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def shown(site: tuple[Path, str], profile: Path, place: str) -> dict:
    """What a place of the page shows: coloured pixels and columns of each graph, its text, and what it fetched."""
    folder, address = site
    (folder / "frame.html").write_text(FRAME.format(place=place))
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={profile}", "--dump-dom", f"{address}/frame.html"]
    text = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = re.search(r"measured (\{.*\}) end", text, re.DOTALL)
    assert found is not None, text[-2000:]
    content = json.loads(found[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert content["fetched"]
    assert [name for name in content["fetched"] if not name.startswith(address)] == []
    return content


def test_the_grid_draws_a_graph_of_every_benchmark(site: tuple[Path, str], tmp_path: Path) -> None:
    found = shown(site, tmp_path, "/")
    assert len(found["coloured"]) == 1
    assert min(found["coloured"])[0] > 50


@pytest.mark.parametrize("axis", ["commit", "tokens", "method"])  # a line, a line against numbers, bars
def test_a_benchmark_is_drawn_against_any_axis(site: tuple[Path, str], tmp_path: Path, axis: str) -> None:
    found = shown(site, tmp_path, f"attention.Length.time_attend?x-axis={axis}")
    assert max(found["coloured"])[0] > 500


def test_bars_of_one_category_stand_side_by_side(site: tuple[Path, str], tmp_path: Path) -> None:
    place = "attention.Length.time_attend?x-axis=method"
    _, one = max(shown(site, tmp_path / "one", f"{place}&p-tokens=16384")["coloured"])
    _, three = max(shown(site, tmp_path / "all", f"{place}&p-tokens=16384&p-tokens=4096&p-tokens=1024")["coloured"])
    assert three == pytest.approx(one, rel=0.1)  # columns of the graph: each bar is a third as wide


def test_the_list_is_sorted(site: tuple[Path, str], tmp_path: Path) -> None:
    lines = shown(site, tmp_path, "summarylist?sort=1&dir=desc")["text"].splitlines()
    values = [float(line.split("ms")[0].split()[-1]) for line in lines if re.search(r"\d+ms", line)]
    assert len(values) == 6
    assert values == sorted(values, reverse=True)


def test_the_page_names_no_other_place(site: tuple[Path, str]) -> None:
    text = (site[0] / "index.html").read_text()
    assert re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="[^"]*//[^"]*"', text) == []
    assert not re.search(r"url\([\"']?(?:https?:)?//", (site[0] / "vendor/bootstrap/css/bootstrap.min.css").read_text())


def test_a_library_that_no_package_has_is_named(site: tuple[Path, str], tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text('<script src="https://example.org/d3.min.js" integrity=""></script>')
    with pytest.raises(LookupError, match=r"asv's page asks for d3.min.js"):
        make_offline(tmp_path)
