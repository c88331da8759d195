"""What an index is made of, apart from its vectors."""

from dataclasses import dataclass

from opoch_xp.hashing import MOST_BITS
from opoch_xp.methods import check_whole

METRICS = ("cosine", "inner", "euclidean")


@dataclass(frozen=True)
class Settings:
    """The settings of an LSHIndex, as it explains them; ValueError for those that are out of range."""

    dim: int
    bits: int = 16
    tables: int = 8
    probes: int = 1
    metric: str = "cosine"
    seed: int = 0
    max_candidates: int | None = None

    def __post_init__(self) -> None:
        check_whole("dim", self.dim, 1)
        check_whole("bits", self.bits, 0, MOST_BITS)
        check_whole("tables", self.tables, 1)
        check_whole("probes", self.probes, 1, 2**self.bits)
        check_whole("seed", self.seed, 0)
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {self.metric!r}")
        if self.max_candidates is not None:
            check_whole("max_candidates", self.max_candidates, 1)
