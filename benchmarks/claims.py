"""Write docs/claims.md: the published claims about hashed attention, each with what was measured and a verdict.

Everything is measured in this run; the needles' figures go to benchmarks/results/needle.json as well. A verdict
follows from its figures by the rule beside it, so a run that measures something else says something else.
"""

import json
from pathlib import Path

import numpy as np
from common import RESULTS, Table, median_seconds

import opoch_xp as ox
from opoch_xp import vectors, workloads
from opoch_xp.cli import needle, tables
from opoch_xp.cli.rows import Input, Row, exact_row, method_row
from opoch_xp.measure import timed
from opoch_xp.methods import method_name

MILLION = 1_000_000
DOCS = Path(__file__).parent.parent / "docs" / "claims.md"
QUERIES, COSINE = 256, 0.9  # of the table of needles
CLAIMED = 1e8  # bytes; up to twice as much is granted, for codes of 64 bits
LINEAR = 1.1  # exponents up to it: what noise adds to a fit over a factor of 8 in N
TRUE, FALSE = "true", "false"


def markdown(columns: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def section(claim: str, verdict: str, said: str, table: str) -> str:
    return f"## {claim}\n\n**{verdict[0].upper()}{verdict[1:]}.** {said}\n" + (f"\n{table}\n" if table else "")


def million() -> tuple[str, str, Row]:
    """Claims of memory and time, on a million topics."""
    given = Input(*workloads.make("topics", MILLION), causal=False)
    exact = exact_row(given)
    q, k = given.q, given.k
    planes = ox.random_hyperplanes(64, 16, 8)
    hashing, _ = median_seconds(lambda: (ox.hash_codes(q, planes), ox.hash_codes(k, planes)), 3)
    _, _, held = timed(lambda: (ox.hash_codes(q, planes), ox.hash_codes(k, planes)))
    rows = [method_row(given, method, exact) for method in (ox.LSH(16, 1), ox.LSH(16, 8), ox.Treecode())]
    cells = [
        [row.method, tables.seconds(row.seconds), tables.size(row.extra_bytes), tables.percent(row.error)]
        for row in rows
    ]
    cells.insert(0, ["hashing q and k alone, 16 x 8", tables.seconds(hashing), tables.size(held), "no output"])
    cells.insert(0, [exact.method, tables.seconds(exact.seconds, True), tables.size(exact.extra_bytes, True), "0"])
    table = markdown(["1,000,000 tokens, 1 head of 64, topics, not causal", "time", "extra memory", "error"], cells)
    most = max(row.extra_bytes or 0 for row in rows)
    memory = section(
        "Attention over a million tokens needs 4 TB; hashing needs 0.1 GB",
        TRUE if most <= CLAIMED else "true of hashing alone" if (held or 0) <= 2 * CLAIMED else FALSE,
        f"The matrix of {MILLION:,} x {MILLION:,} float32 is 4.0 TB, but nobody has to hold it: streaming exact "
        f"attention needs {tables.size(exact.extra_bytes)}, the output itself. Hashing alone takes {tables.size(held)} for its "
        f"codes; the output of hashed attention takes {tables.size(rows[0].extra_bytes)} "
        f"with one table, {tables.size(rows[1].extra_bytes)} with eight.",
        table,
    )
    least = min(row.seconds or 0 for row in rows)
    time = section(
        "A million tokens in under 0.5 s",
        TRUE if least < 0.5 else ("true of hashing alone" if hashing < 0.5 else FALSE),
        f"Hashing queries and keys takes {tables.seconds(hashing)} on this machine and computes no attention. The fastest "
        f"output took {tables.seconds(least)}, with the error beside it in the table above.",
        "",
    )
    return memory, time, rows[1]


def linear() -> str:
    """Time of all N queries with the settings that find the same share of needles."""
    sizes, rows, seconds = [1 << p for p in (14, 16, 18, 20)], [], []
    angle = float(np.degrees(np.arccos(0.9)))
    for n in sizes:
        found = ox.suggest(64, n, recall=0.9, angle=angle)
        x, q, needles = vectors.make("random", n, 4000)
        index = ox.LSHIndex(64, **found.settings)
        build, _ = median_seconds(lambda: index.add(x), 1)  # noqa: B023
        search, result = median_seconds(lambda: index.search(q, 1), 3)  # noqa: B023
        hits = float((result.ids[:, 0] == needles).mean())
        total = build + search / len(q) * n
        seconds.append(total)
        setting = f"{found.bits} x {found.tables}, {found.probes} probes"
        rows.append(
            [
                f"{n:,}",
                setting,
                f"{hits:.1%}",
                tables.seconds(build),
                tables.micro(search / len(q)),
                tables.seconds(total, True),
            ]
        )
    quality = exponent(sizes, seconds)
    fixed, longest, hashing = [], [1 << p for p in (17, 18, 19, 20)], []
    times, method = [], ox.LSH(12, 8)
    planes = ox.random_hyperplanes(64, method.bits, method.tables)
    for n in longest:
        q, k, v = workloads.make("topics", n)
        hashed, _ = median_seconds(lambda: (ox.hash_codes(q, planes), ox.hash_codes(k, planes)), 3)  # noqa: B023
        time, result = median_seconds(lambda: ox.attend(q, k, v, method=method, check=False), 1)  # noqa: B023
        error = float(ox.audit(q, k, v, output=result).error[0])
        hashing.append(hashed)
        times.append(time)
        pairs = tables.percent(float(result.report.pairs))
        fixed.append([f"{n:,}", tables.seconds(hashed), tables.seconds(time), pairs, tables.percent(error)])
    settings = exponent(longest, times)
    steepest = max(settings, quality)
    return section(
        "Time is linear in N",
        TRUE if steepest <= LINEAR else "true of hashing alone" if exponent(longest, hashing) <= LINEAR else FALSE,
        f"With fixed settings the buckets grow with N: {method_name(method)} takes N^{settings:.2f}, hashing alone "
        f"N^{exponent(longest, hashing):.2f} (first table). With settings that keep finding 90% of needles at "
        f"{angle:.0f} degrees among random directions, the time of N queries grows as N^{quality:.2f} (second table; the "
        f"collision model says 1 + rho = {1 + np.log2(1 / (1 - angle / 180)):.2f} without probes). Exponents are fitted "
        f"over the sizes shown; up to N^{LINEAR} counts as linear.",
        markdown(["N, topics, not causal", "hashing q and k", "the whole", "pairs read", "error"], fixed)
        + "\n\n"
        + markdown(["N, random", "bits x tables", "needles found", "build", "per query", "~ all N queries"], rows),
    )


def exponent(sizes: list[int], values: list[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def bits_and_error() -> str:
    rows, errors = [], []
    inputs = {"topics, 65,536": workloads.make("topics", 65_536), "heads, 8,192": workloads.make("heads", 8192)}
    for bits in (2, 4, 6, 8, 10, 12, 14, 16):
        cells = [str(bits)]
        for q, k, v in inputs.values():
            result = ox.attend(q, k, v, method=ox.LSH(bits, 8, max_bucket=k.shape[-2]), check=False)
            error = float(np.mean(ox.audit(q, k, v, output=result, rows=128).error))
            errors.append((bits, error))
            cells += [tables.percent(error), tables.percent(float(result.report.pairs))]
        rows.append(cells)
    first, last = (np.mean([error for bits, error in errors if bits == b]) for b in (2, 16))
    return section(
        "The error falls exponentially with the number of bits",
        FALSE if last > first else TRUE,
        "What falls exponentially is the number of keys that share a bucket, and with it what is read. The error of the "
        "output, the mass that was missed, rises.",
        markdown(
            ["bits, 8 tables, not causal", *(f"{what}: {name}" for name in inputs for what in ("error", "pairs"))], rows
        ),
    )


def neighbourhood() -> str:
    rows, shares = [], []
    for name, n in (("gaussian", 65_536), ("topics", 65_536), ("needles", 65_536), ("heads", 8192)):
        q, k, _ = workloads.make(name, n)
        overlap, held, mass = [], [], []
        for head in range(min(4, len(q))):
            keys = k[head] - k[head].mean(0)
            index = ox.LSHIndex(64, 16, 1, metric="inner")
            index.add(keys)
            numbers = np.random.default_rng(0).integers(n, size=200)
            offsets, ids = index.candidates(q[head][numbers])
            for row, number in enumerate(numbers):
                mine = ids[offsets[row] : offsets[row + 1]]
                logits = 0.125 * (keys @ q[head][number]).astype(np.float64)
                weights = np.exp(logits - logits.max())
                held.append(len(mine))
                mass.append(weights[mine].sum() / weights.sum())
                if len(mine):
                    top = np.argpartition(-logits, len(mine) - 1)[: len(mine)]
                    overlap.append(len(np.intersect1d(top, mine)) / len(mine))
        share = float(np.mean(overlap)) if overlap else 0.0
        shares.append(share)
        rows.append(
            [
                f"{name}, {n:,}",
                f"{np.mean(held):.1f}",
                f"{np.mean(np.array(held) == 0):.0%}",
                tables.percent(share),
                tables.percent(float(np.mean(mass))),
            ]
        )
    return section(
        "The 16-bit neighbourhood is identical to the top k of the softmax",
        TRUE if min(shares) > 0.99 else FALSE,
        "The keys in a query's 16-bit bucket against as many keys of the largest weight.",
        markdown(
            ["200 queries a head", "keys in the bucket", "buckets empty", "of them in the top k", "softmax mass"], rows
        ),
    )


def one_bucket() -> str:
    rows, errors, n = [], [], 16_384
    rng = np.random.default_rng(0)
    base, v = rng.standard_normal(64, np.float32), rng.standard_normal((1, n, 64), np.float32)
    for noise, factor in ((0.0, 1.0), (0.01, 1.0), (0.01, 30.0), (0.05, 30.0)):
        k = base + np.float32(noise) * rng.standard_normal((1, n, 64), np.float32)
        q = np.float32(factor) * (base + np.float32(noise) * rng.standard_normal((1, n, 64), np.float32))
        method = ox.LSH(8, 1, center=False)
        result = ox.attend(q, k, v, method=method, check=False)
        error = float(ox.audit(q, k, v, output=result).error[0])
        errors.append(error)
        codes = ox.hash_codes(k[0], ox.random_hyperplanes(64, 8, 1))
        largest = np.bincount(codes[0]).max() / n
        rows.append(
            [
                f"{noise:g}",
                f"{factor:g}",
                f"{largest:.1%}",
                tables.percent(float(result.report.pairs)),
                tables.percent(error),
            ]
        )
    return section(
        "Where all tokens share a bucket, attention falls back to the mean field",
        "true where their keys are equal"
        if errors[0] < 1e-3 < max(errors)
        else (TRUE if max(errors) < 1e-3 else FALSE),
        "In the published script nothing falls back: the bucket is read whole, which is exact and quadratic. Here a bucket "
        "beyond `max_bucket` gives the mean value, exact for equal keys. Keys that share a bucket need not weigh the same: "
        "with large queries the mean is far off.",
        markdown(["noise of the keys", "size of the queries", "largest bucket", "pairs read", "error"], rows),
    )


def needles() -> str:
    """What `opoch-xp needle` measures, for every kind of vectors; embeddings need packages of their own."""
    found = []
    for workload in vectors.NAMES:
        found += needle.results(needle.Setup(workload, (), (), 1, 64, QUERIES, COSINE, 0))
    (RESULTS / "needle.json").write_text(json.dumps(found, indent=1) + "\n")
    rows = []
    for result in found:
        for row in result["rows"]:
            rows.append(
                [
                    f"{result['workload']}, {result['n']:,}", f"{row['bits']} x {row['tables']}",
                    tables.micro(row["query_seconds"]), tables.factor(row["speedup"]), tables.percent(row["candidates"]),
                    tables.percent(row["recall"]), tables.percent(row["found"]), f"{row['sigmas']:.2f}",
                ]
            )  # fmt: skip
    about = f"{QUERIES} queries, needles at cosine {COSINE}"
    columns = ["vectors", "bits x tables", "per query", "speed-up", "candidates", "recall@50", "needle", "sigmas"]
    return (
        "## The accuracy table\n\nWhat `opoch-xp needle` prints, every figure measured on the run it stands in; speed-up is "
        "over exact search, sigmas how far candidates are nearer than all vectors, in standard deviations of all. The "
        f"published table copied its recall at a million from a smaller run.\n\n{about}\n\n{markdown(columns, rows)}\n"
    )


def main() -> None:
    about = about_machine()
    memory, time, _ = million()
    parts = [memory, time, linear(), bits_and_error(), neighbourhood(), one_bucket(), needles()]
    head = (
        "# The published claims\n\nThe claim that started this project: hash queries and keys with random hyperplanes, "
        "attend only inside shared buckets, and attention over a million tokens costs O(N). Each part of it, measured; "
        "written by `benchmarks/claims.py`, verdicts included. *Error* is the Frobenius norm of (approximate - exact) "
        f"over that of exact, on sampled rows.\n\n{about}\n"
    )
    DOCS.write_text("\n".join([head, *parts]))


def about_machine() -> str:
    table = Table("claims", "Claims", [])
    return ", ".join(f"{key} {value}" for key, value in table.about.items() if key != "torch")


if __name__ == "__main__":
    main()
