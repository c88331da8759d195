"""Error against time around the defaults: one parameter changed at a time, on made and on real input."""

from common import Table, audited, timed_attend

import opoch_xp as ox
from opoch_xp import workloads

SETTINGS = (
    {},
    *({"block": block} for block in (256, 512, 1024, 4096)),
    *({"fan": fan} for fan in (4, 8)),
    *({"leaf": leaf} for leaf in (8, 32)),
    {"leaf": 8, "own": 8},
    {"branch": 4},
    *({"group": group} for group in (16, 32, 128)),
    *({"open": number} for number in (32, 128)),
    *({"near": near} for near in (16, 64)),
    *({"own": own} for own in (0, 2, 8)),
    *({"iterations": iterations} for iterations in (0, 2, 6)),
    {"open": 32, "own": 0, "iterations": 2},
    {"block": 256, "leaf": 8, "group": 128, "own": 8},
)


def main() -> None:
    inputs = {"heads": 8192, "scattered": 65_536, "topics": 131_072}
    columns = ["changed", *(f"{name}: {what}" for name in inputs for what in ("time (s)", "error"))]
    title = "Around the defaults: byte model's 16 heads at 8,192; scattered at 65,536; topics at 131,072; causal"
    table = Table("curve", title, columns)
    made = [workloads.make(name, n) for name, n in inputs.items()]
    for setting in SETTINGS:
        row: list[float] = []
        for arrays in made:
            method = ox.Treecode(**setting)
            seconds, result = timed_attend(arrays, True, method, 3)
            row += [seconds, float(audited(*arrays, True, result).error.mean())]
        table.add(", ".join(f"{name}={value}" for name, value in setting.items()) or "defaults", *row)
    table.save()


if __name__ == "__main__":
    main()
