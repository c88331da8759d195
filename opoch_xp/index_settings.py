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
        self._whole("dim", 1)
        self._whole("bits", 0, MOST_BITS)
        self._whole("tables", 1)
        self._whole("probes", 1, 2**self.bits)
        self._whole("seed", 0)
        if self.metric not in METRICS:
            raise ValueError(f"metric must be one of {', '.join(METRICS)}; got {self.metric!r}")
        if self.max_candidates is not None:
            self._whole("max_candidates", 1)

    def _whole(self, name: str, low: int, high: int | None = None) -> None:
        """Checks a field and makes it Python's own int, whose range has no end."""
        check_whole(name, getattr(self, name), low, high)
        object.__setattr__(self, name, int(getattr(self, name)))
