"""Needles: every query looks up one unrelated key among keys without structure: who finds it, and what tune does."""

from common import Table, audited, timed_attend, torch_exact

import opoch_xp as ox
from opoch_xp import workloads
from opoch_xp.methods import method_name
from opoch_xp.tune import many_tables

N = 65_536
TOL = 0.1


def main() -> None:
    q, k, v = workloads.make("needles", N)
    yardstick = torch_exact(q, k, v, True, repeats=3)
    title = f"Needles, {N:,} tokens causal, cosine .9; PyTorch exact {yardstick}"
    table = Table("needles", title, ["method", "time (s)", "error", "p99", "missed mass", "pairs"])
    trees = [ox.Treecode(rtol=rtol) for rtol in (0.2, 0.05, 0.01)]
    for method in (ox.Exact(), *trees, many_tables(N), ox.LSH(bits=16, tables=8), ox.LSH(bits=8, tables=64)):
        seconds, result = timed_attend((q, k, v), True, method, 1)
        found = audited(q, k, v, True, result)
        table.add(method, seconds, float(found.error[0]), found.per_query.p99, found.missed, result.report.pairs)
    for tol in (0.05, TOL, 0.3):
        method, found = ox.tune(q, k, v, causal=True, tol=tol)
        walked = "; ".join(f"{method_name(rung.method)} {rung.error:.3g}" for rung in found.ladder)
        what = f"tune(tol={tol}) returns {method_name(method)}, after {walked}"
        table.add(what, found.seconds, float(found.error[0]), found.per_query.p99, found.missed, "")
    table.save()


if __name__ == "__main__":
    main()
