"""The smallest length at which Treecode() beats streaming exact attention, ours and PyTorch's: one head of 64."""

from common import Table, audited, timed_attend, torch_exact

import opoch_xp as ox
from opoch_xp import workloads

LENGTHS = (1024, 2048, 3072, 4096, 6144, 8192, 12_288, 16_384, 24_576, 32_768)


def main() -> None:
    times = ["PyTorch (s)", "Exact (s)", "Treecode (s)", "Exact / Treecode", "PyTorch / Treecode"]
    columns = ["workload", "tokens", *times, "error", "chosen by itself"]
    table = Table("crossover", "Where Treecode() starts to pay, one head of 64, causal", columns)
    crossed: dict[tuple[str, str], int] = {}
    for workload in ("scattered", "gaussian"):
        for n in LENGTHS:
            q, k, v = workloads.make(workload, n)
            repeats = 9 if n < 10_000 else 5
            torch = torch_exact(q, k, v, True, repeats).seconds
            exact, _ = timed_attend((q, k, v), True, ox.Exact(), repeats)
            tree, result = timed_attend((q, k, v), True, ox.Treecode(), repeats)
            chosen = type(ox.attend(q, k, v, causal=True, check=False).report.method).__name__
            error = float(audited(q, k, v, True, result).error[0])
            table.add(workload, n, torch, exact, tree, exact / tree, torch / tree, error, chosen)
            for name, seconds in (("Exact", exact), ("PyTorch", torch)):
                if seconds > tree:
                    crossed.setdefault((workload, name), n)
                else:
                    crossed.pop((workload, name), None)
    for (workload, name), n in crossed.items():
        print(f"{workload}: Treecode() beats {name} from {n:,} tokens on")
    table.save()


if __name__ == "__main__":
    main()
