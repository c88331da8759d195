"""audit, tune, tol and the check of an automatic choice: errors are those of the definition, and are acted upon."""

import warnings
from typing import Any

import numpy as np
import oracle
import pytest
from conftest import Backend

import opoch_xp as ox
from opoch_xp import Exact, Treecode
from opoch_xp.arguments import prepare
from opoch_xp.attention import WARN_ABOVE
from opoch_xp.cost import COMPILED, Cost, expected_rows, predicted
from opoch_xp.solve import choose
from opoch_xp.testing import clustered, qkv, relative_error, rounding
from opoch_xp.tune import AUDITS

pytestmark = pytest.mark.dynamic_shapes  # of LSH, which tune may try
SMALL = Treecode(rtol=0.2, sinks=3, block=32, fan=4, leaf=4, branch=4, top=4, group=8, least=2)
FULL = Treecode(rtol=0.0, sinks=3, block=32, fan=4, leaf=4, branch=4, top=4, group=8, least=2)


def arrays(backend: Backend, *host: Any) -> list[Any]:
    return [backend.array(a) for a in host]


def flat(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Keys without structure, all of which count: an output of next to nothing, of which a treecode misses much."""
    return qkv(9, n, d=16, d_v=16)


@pytest.mark.parametrize("causal", [False, True])
def test_error_on_all_rows_is_the_definition(backend: Backend, causal: bool) -> None:
    q, k, v = qkv(0, 200, lead=(2, 2), key_lead=(2, 1))
    found = ox.attend(*arrays(backend, q, k, v), causal=causal, method=SMALL, backend=backend.name)
    audit = ox.audit(*arrays(backend, q, k, v), causal=causal, method=SMALL, rows=200, backend=backend.name)
    out, lse = backend.numpy(found.out), backend.numpy(found.lse)
    single, missed = [], []
    for b in range(2):
        for h in range(2):
            exact, exact_lse = oracle.dense(q[b, h], k[b, 0], v[b, 0], causal=causal)
            assert audit.error[b, h] == pytest.approx(relative_error(out[b, h], exact))
            single.append(np.linalg.norm(out[b, h] - exact, axis=1) / np.linalg.norm(exact, axis=1))
            missed.append(1 - np.exp(lse[b, h] - exact_lse))
    assert audit.per_query.mean == pytest.approx(np.mean(single))
    assert audit.per_query.p50 == pytest.approx(np.median(single))
    assert audit.per_query.p99 == pytest.approx(np.percentile(single, 99))
    assert audit.per_query.max == pytest.approx(np.max(single))
    assert audit.missed == pytest.approx(np.mean(missed))
    assert (audit.rows, audit.heads, audit.method) == (200, 4, SMALL)
    assert (audit.interval[..., 0] <= audit.error).all()
    assert (audit.error <= audit.interval[..., 1]).all()
    assert audit.worst == audit.interval.max()


def test_sampled_error_lies_near_the_whole(backend: Backend) -> None:
    """The 95% interval on 64 rows of 600 holds the error on all rows, for all but a few of 40 draws."""
    q, k, v = clustered(1, 600)
    given = ox.attend(*arrays(backend, q, k, v), method=SMALL, backend=backend.name, check=False)
    whole = relative_error(backend.numpy(given.out), oracle.dense(q, k, v)[0])
    audits = [
        ox.audit(*arrays(backend, q, k, v), rows=64, seed=seed, output=given, backend=backend.name)
        for seed in range(40)
    ]
    held = [bool(audit.interval[0] <= whole <= audit.interval[1]) for audit in audits]
    assert sum(held) >= 30  # a 95% interval misses 2 of 40; the bootstrap of 64 rows with heavy tails somewhat more
    assert len({float(audit.error) for audit in audits}) == 40
    again = ox.audit(*arrays(backend, q, k, v), rows=64, seed=3, output=given, backend=backend.name)
    assert float(again.error) == float(audits[3].error)
    assert again.seconds == 0


def test_exact_has_no_error(backend: Backend) -> None:
    audit = ox.audit(*arrays(backend, *qkv(2, 100)), method=Exact(), backend=backend.name)
    assert audit.worst <= rounding(*qkv(2, 100))
    assert audit.rows == 100


def test_rows_that_see_no_key_are_not_sampled(backend: Backend) -> None:
    q, k, v = qkv(3, 100, 40)
    audit = ox.audit(*arrays(backend, q, k, v), causal=True, method=FULL, rows=64, backend=backend.name)
    assert audit.rows == 40
    hidden = backend.array(np.zeros(40, bool))
    audit = ox.audit(*arrays(backend, q, k, v), key_mask=hidden, method=FULL, backend=backend.name)
    assert audit.worst == 0
    assert audit.missed == 0


def test_an_output_that_is_no_number_is_an_error(backend: Backend) -> None:
    q, k, v = qkv(4, 50)
    given = ox.attend(*arrays(backend, q, k, v), method=Exact(), backend=backend.name)
    spoiled = ox.Attention(given.out * float("nan"), given.lse, given.report)
    audit = ox.audit(*arrays(backend, q, k, v), output=spoiled, backend=backend.name)
    assert audit.worst > 1e100
    assert audit.missed == pytest.approx(0)


def test_queries_that_are_not_finite_hold_no_error(backend: Backend) -> None:
    q, k, v = clustered(4, 300)
    clean = ox.audit(*arrays(backend, q, k, v), method=FULL, rows=300, backend=backend.name)
    q[7], q[200, 0] = np.nan, np.inf
    audit = ox.audit(*arrays(backend, q, k, v), method=FULL, rows=300, backend=backend.name)
    assert clean.worst < 1e-5
    assert audit.worst < 1e-5
    assert abs(audit.missed) < 1e-5


@pytest.mark.parametrize(("n_q", "lead"), [(0, (2,)), (5, (0,)), (0, ())])
def test_nothing_to_audit(backend: Backend, n_q: int, lead: tuple[int, ...]) -> None:
    host = [np.ones(shape) for shape in ((*lead, n_q, 4), (*lead, 6, 4), (*lead, 6, 3))]
    for method in (Exact(), SMALL):
        audit = ox.audit(*arrays(backend, *host), method=method, backend=backend.name)
        assert audit.error.shape == lead
        assert audit.worst == 0
    assert ox.attend(*arrays(backend, *host), tol=0.1, backend=backend.name).out.shape == (*lead, n_q, 3)


@pytest.mark.parametrize("tol", [0.9, 0.3, 0.1, 0.04, 0.01, 1e-3])
def test_tune_meets_any_tolerance_and_keeps_what_it_tried(backend: Backend, tol: float) -> None:
    q, k, v = clustered(5, 3000)
    method, audit = ox.tune(*arrays(backend, q, k, v), tol=tol, rows=64, backend=backend.name)
    assert audit.method == method
    assert audit.worst <= tol
    assert 1 <= len(audit.ladder) <= AUDITS
    (found,) = {rung.error for rung in audit.ladder if rung.method == method}
    assert found == audit.worst
    assert all(rung.passed == (rung.error <= tol) for rung in audit.ladder)
    tried = [rung.method.rtol for rung in audit.ladder if isinstance(rung.method, Treecode)]
    assert len(set(tried)) == len(tried)
    if isinstance(method, Treecode):  # the cheapest of what passed
        assert method.rtol == max(rung.method.rtol for rung in audit.ladder if rung.passed)


@pytest.fixture
def cheap(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows read cost what compiled kernels make them cost: a treecode pays at some thousands of keys."""
    monkeypatch.setattr(backend.kernels, "COST", COMPILED)


@pytest.mark.usefixtures("cheap")
def test_a_larger_tolerance_opens_less(backend: Backend) -> None:
    q, k, v = clustered(5, 3000)
    found = [
        ox.tune(*arrays(backend, q, k, v), tol=tol, rows=64, backend=backend.name)[0] for tol in (0.01, 0.02, 0.04)
    ]
    rtol = [method.rtol for method in found if isinstance(method, Treecode)]
    assert len(rtol) == 3
    assert rtol == sorted(rtol)
    assert rtol[0] < rtol[-1]


def test_tune_passes_over_what_is_dearer_than_exact(backend: Backend) -> None:
    method, audit = ox.tune(*arrays(backend, *qkv(6, 64)), tol=0.01, backend=backend.name)
    assert [rung.method for rung in audit.ladder] == [Exact()]
    assert method == Exact()


@pytest.mark.usefixtures("cheap")
def test_tune_on_flat_heads_gives_what_meets_tol(backend: Backend) -> None:
    method, audit = ox.tune(*arrays(backend, *flat(4000)), tol=0.02, rows=64, backend=backend.name)
    assert audit.worst <= 0.02
    assert method == Exact()
    assert [type(rung.method) for rung in audit.ladder[-2:]] == [ox.LSH, Exact]
    assert isinstance(audit.ladder[0].method, Treecode)


@pytest.mark.usefixtures("cheap")
def test_long_inputs_are_tried_on_their_last_queries(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = clustered(7, 3000)
    module = __import__("sys").modules["opoch_xp.tune"]
    monkeypatch.setattr(module, "TRIAL_QUERIES", 500)
    method, audit = ox.tune(*arrays(backend, q, k, v), tol=0.9, rows=64, causal=True, backend=backend.name)
    assert [rung.queries for rung in audit.ladder] == [500] * (len(audit.ladder) - 1) + [3000]
    assert audit.ladder[-1].method == method
    assert method in {rung.method for rung in audit.ladder[:-1]}


@pytest.mark.usefixtures("cheap")
def test_what_passes_on_the_last_queries_alone_is_made_finer(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = clustered(9, 3000)
    q[:2700] *= 0.1  # flatter than the queries that are tried, and their outputs smaller
    module = __import__("sys").modules["opoch_xp.tune"]
    monkeypatch.setattr(module, "TRIAL_QUERIES", 300)
    method, audit = ox.tune(*arrays(backend, q, k, v), tol=0.03, rows=256, causal=True, backend=backend.name)
    assert audit.worst <= 0.03
    whole = [rung for rung in audit.ladder if rung.queries == 3000]
    assert not whole[0].passed
    assert whole[-1].passed
    assert whole[-1].method == method
    assert isinstance(method, Treecode)
    assert method.rtol < whole[0].method.rtol


def test_tol_attends_by_the_tuned_method(backend: Backend) -> None:
    q, k, v = clustered(5, 3000)
    method, _ = ox.tune(*arrays(backend, q, k, v), tol=0.3, backend=backend.name)
    found = ox.attend(*arrays(backend, q, k, v), tol=0.3, backend=backend.name)
    assert found.report.method == method
    assert found.report.audit.worst <= 0.3
    assert len(found.report.passes) == len(found.report.audit.ladder)
    assert relative_error(backend.numpy(found.out), oracle.dense(q, k, v)[0]) < 0.3
    alone = ox.attend(*arrays(backend, q, k, v), method=method, backend=backend.name)
    assert np.array_equal(backend.numpy(found.out), backend.numpy(alone.out))


def cheap_treecode(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs under which a Treecode is chosen for short inputs."""
    monkeypatch.setattr(backend.kernels, "COST", Cost(read=0.01, split=0.0))


def test_a_bad_choice_warns_and_names_the_figure_and_the_cure(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    cheap_treecode(backend, monkeypatch)
    q, k, v = flat(8191)
    q, k, v = arrays(backend, q[:300], k, v)
    with pytest.warns(
        ox.ApproximationWarning, match=r"errs by \d+\.\d% .* 32 sampled rows .* tol= .*check=False"
    ) as seen:
        found = ox.attend(q, k, v, backend=backend.name)
    assert seen[0].filename == __file__
    assert found.report.audit.worst > WARN_ABOVE
    assert found.report.method == Treecode()
    assert found.report.reason.startswith("chosen by predicted cost")
    with pytest.warns(ox.ApproximationWarning) as seen:
        ox.attention(q, k, v, backend=backend.name)
    assert seen[0].filename == __file__, "the warning names the caller's line, also through attention"
    with pytest.warns(ox.ApproximationWarning):
        ox.attend(q, k, v, method=Treecode(), check=True, backend=backend.name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ox.attend(q, k, v, backend=backend.name, check=False).report.audit is None
        assert ox.attend(q, k, v, backend=backend.name, method=Treecode()).report.audit is None


def test_a_good_choice_is_silent(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    cheap_treecode(backend, monkeypatch)
    q, k, v = qkv(10, 2500)
    found = ox.attend(*arrays(backend, q, k[:1].repeat(2500, 0), v), backend=backend.name)
    assert found.report.method == Treecode()
    assert found.report.audit.worst < 1e-6


def test_choice_follows_predicted_cost(backend: Backend) -> None:
    def chosen(n_q: int, n_k: int) -> ox.Exact | Treecode:
        q, k, v = (backend.xp.zeros(shape) for shape in ((n_q, 1), (n_k, 1), (n_k, 1)))
        return choose(prepare(q, k, v, backend=backend.name, check_finite=False))[0]

    assert chosen(1000, 1000) == Exact()
    assert chosen(1, 10**6) == Exact()
    assert chosen(10**6, 10**6) == Treecode()


def test_predicted_cost_is_rows_times_their_price() -> None:
    read, split = Cost(2.0, 0.0), Cost(0.0, 3.0)
    q, k, v = np.ones((3, 512, 8))
    local = 512 * ox.attend(q, k, v, causal=True, method=SMALL).report.rows["local"]
    outside = 513 / 2 - local / 512
    assert expected_rows(512, 512, True, SMALL) == pytest.approx(min(outside, 1.2 * outside**0.75))
    assert predicted(512, 512, True, SMALL, read) == pytest.approx(
        local + 2 * 512 * expected_rows(512, 512, True, SMALL)
    )
    assert predicted(512, 512, True, Exact(), read) == 512 * 513 / 2
    assert predicted(300, 200, True, Exact(), read) == 200 * 201 / 2
    assert predicted(200, 300, True, Exact(), read) == 200 * 300 - 200 * 199 / 2
    keys = 480 * 3 + 384 * 5  # rows times levels of splits: 15 chunks of 32 and 3 of 128 are read, the last by no query
    queries = 512 * 2 + 512 * 4
    assert predicted(512, 512, True, SMALL, split) == pytest.approx(local + 3 * (keys + queries))


@pytest.mark.parametrize(
    ("keywords", "told"),
    [
        ({"rows": 0}, "rows must be a whole number of at least 1, got 0"),
        ({"rows": 2.5}, "rows must be .* got 2.5"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(keywords: dict[str, Any], told: str) -> None:
    q, k, v = np.ones((3, 10, 4))
    with pytest.raises(ValueError, match=told):
        ox.audit(q, k, v, method=Exact(), **keywords)
    with pytest.raises(ValueError, match=told):
        ox.tune(q, k, v, tol=0.1, **keywords)


@pytest.mark.parametrize("tol", [0, 1, -0.1, 1.5, "a", None])
def test_tol_outside_its_bounds(tol: Any) -> None:
    q, k, v = np.ones((3, 10, 4))
    with pytest.raises(ValueError, match="tol must be an error between 0 and 1, both excluded; got"):
        ox.tune(q, k, v, tol=tol)


def test_audit_refuses_what_is_no_method() -> None:
    q, k, v = np.ones((3, 10, 4))
    with pytest.raises(TypeError, match="method must be one of"):
        ox.audit(q, k, v, method="exact")
    with pytest.raises(TypeError, match="give method or output, not both"):
        ox.audit(q, k, v, method=Exact(), output=ox.attend(q, k, v, method=SMALL))
    with pytest.raises(ValueError, match=r"output must have out \(10, 4\), got \(9, 4\)"):
        ox.audit(q, k, v, output=ox.attend(q[:9], k, v, method=SMALL))
