"""Error against time around the defaults: one parameter changed at a time, on made and on real input."""

from common import Table, audited, timed_attend

import opoch_xp as ox
from opoch_xp import workloads

SETTINGS = (
    {},
    *({"rtol": rtol} for rtol in (0.02, 0.1, 0.2)),
    *({"block": block} for block in (256, 512, 2048)),
    *({"fan": fan} for fan in (8, 16, 64)),
    *({"leaf": leaf} for leaf in (8, 32)),
    {"branch": 4},
    *({"top": top} for top in (4, 16)),
    *({"group": group} for group in (32, 64, 256)),
    *({"sinks": sinks} for sinks in (0, 64)),
    *({"least": least} for least in (0, 128)),
    {"most": 256},
    *({"iterations": iterations} for iterations in (0, 2, 6)),
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
