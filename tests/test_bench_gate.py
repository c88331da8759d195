"""The gate of `nox -s bench_compare`: which figures it judges, what it calls a loss; and results that are kept."""

import json
import math
from importlib import import_module
from importlib.util import find_spec
from inspect import getmembers, isclass
from pathlib import Path

import pytest
from figures import figures, result_file
from gate import MORE_IS_WORSE, factor, losses, main
from keep import keep

OLD, NEW = "a" * 40, "b" * 40
PARAMETERS = [["'numpy'", "'torch'"], ["1024", "4096"]]
TIMED = {"track_exponent", "track_memory", "track_overhead"}  # they differ from run to run and are not judged
SUITES = [path.stem for path in sorted(Path(find_spec("suites").submodule_search_locations[0]).glob("[a-z]*.py"))]


def results(folder, commit, **benchmarks):
    """A result file as asv writes it, with these lists of figures; parameters are those above."""
    content = {
        "commit_hash": commit,
        "env_name": "existing-py_home_someone_bin_python",
        "python": "/home/someone/bin/python",
        "params": {"machine": "local", "python": "/home/someone/bin/python"},
        "result_columns": ["result", "params", "version"],
        "results": {f"attention.Length.{name}": [value, PARAMETERS, "1"] for name, value in benchmarks.items()},
    }
    path = folder / "local" / f"{commit[:8]}-existing-py_home_someone_bin_python.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def lost(folder, old, new):
    found = losses(*(figures(results(folder, commit, **given)) for commit, given in ((OLD, old), (NEW, new))))[0]
    return [(loss.name.rsplit(".", 1)[-1], loss.new) for loss in found]


@pytest.mark.parametrize(
    ("name", "figure", "worse", "better"),
    [
        ("track_error", 0.1, 0.121, 0.01),
        ("track_pairs", 0.2, 0.25, 0.1),
        ("track_candidates", 100.0, 130.0, 50.0),
        ("track_recall", 0.9, 0.7, 1.0),
    ],
)
def test_a_worse_figure_is_a_loss_and_a_better_one_is_none(tmp_path, name, figure, worse, better):
    old = {name: [figure] * 4}
    assert lost(tmp_path, old, {name: [figure, worse, better, figure]}) == [(f"{name}('numpy', 4096)", worse)]
    assert lost(tmp_path, old, {name: [figure * 1.1] * 4}) == []


def test_times_are_not_judged(tmp_path):
    for name in ("time_attend", *TIMED):
        assert lost(tmp_path, {name: [1.0] * 4}, {name: [100.0] * 4}) == []


def test_a_new_benchmark_or_parameter_is_no_loss(tmp_path):
    old = figures(results(tmp_path, OLD, track_pairs=[0.5] * 4))
    new = figures(results(tmp_path, NEW, track_pairs=[0.5] * 4, track_error=[0.9] * 4))
    assert losses(old, new) == ([], 4)
    assert losses(old[:2], new) == ([], 2)


def test_what_does_not_apply_is_no_loss_and_is_not_counted(tmp_path):
    old = figures(results(tmp_path, OLD, track_error=[math.nan, 0.1, 0.1, None]))
    new = figures(results(tmp_path, NEW, track_error=[0.1, math.nan, 0.1, 0.1]))
    assert losses(old, new) == ([], 1)


def test_a_benchmark_that_now_fails_is_a_loss(tmp_path):
    assert lost(tmp_path, {"track_error": [0.1] * 4}, {"track_error": [0.1, None, 0.1, 0.1]}) == [
        ("track_error('numpy', 4096)", None)
    ]
    assert len(lost(tmp_path, {"track_error": [0.1] * 4}, {"track_error": None})) == 4  # asv's way to say all failed


def test_rounding_is_no_loss():
    assert factor(0.0, 9e-7, True) == 1
    assert factor(1e-8, 2e-6, True) == 2


def test_the_exit_status_says_what_was_found(tmp_path, capsys):
    results(tmp_path, OLD, track_error=[0.1] * 4)
    results(tmp_path, NEW, track_error=[0.1] * 4)
    assert main(OLD, NEW, tmp_path) == 0
    results(tmp_path, NEW, track_error=[0.1, 0.1, 0.3, 0.1])
    assert main(OLD, NEW, tmp_path) == 1
    assert "attention.Length.track_error('torch', 1024): 0.1 -> 0.3" in capsys.readouterr().out
    results(tmp_path, NEW, time_attend=[0.1] * 4)
    assert main(OLD, NEW, tmp_path) == 1  # a gate that compared nothing has not passed
    with pytest.raises(FileNotFoundError, match="no results of commit cccccccc"):
        main(OLD, "c" * 40, tmp_path)


def test_every_figure_of_the_suites_is_judged_or_known_to_be_timed():
    names = set()
    for suite in SUITES:
        for _, found in getmembers(import_module(f"suites.{suite}"), isclass):
            names |= {name for name in dir(found) if name.startswith("track_")}
    assert names == set(MORE_IS_WORSE) | TIMED


def test_kept_results_do_not_say_where_they_were_made(tmp_path):
    results(tmp_path, OLD, track_error=[0.1] * 4)
    (tmp_path / "local" / "machine.json").write_text("{}")
    (tmp_path / "benchmarks.json").write_text("{}")
    path = keep("local", OLD, tmp_path, tmp_path / "kept")
    assert "someone" not in path.name + path.read_text()
    assert figures(path) == figures(result_file(tmp_path, OLD))
    assert sorted(p.name for p in (tmp_path / "kept").rglob("*.json")) == sorted(
        ["benchmarks.json", "machine.json", path.name]
    )
    with pytest.raises(ValueError, match="of machine 'local', not 'xeon'"):
        keep("xeon", OLD, tmp_path, tmp_path / "kept")
