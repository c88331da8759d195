"""What was checked of a backend, and what was wrong."""

from dataclasses import dataclass

WIDTH = 118  # characters of a line
SHOWN = 4  # cases named of those that show the same fault


@dataclass(frozen=True)
class Check:
    """One question put to a kernel: the case, its floats' dtype, the sentence that must hold, and the fault found, ""
    where it holds."""

    kernel: str
    case: str
    dtype: str
    sentence: str
    fault: str = ""
    found: str = ""


@dataclass(frozen=True)
class Report:
    """What a backend was found to do right: every check passed, the kernels checked, those filled with generic ones.

    As text, a table: one line a kernel.
    """

    backend: str
    source: str
    library: str
    device: str
    dtypes: tuple[str, ...]
    checks: tuple[Check, ...]
    native: tuple[str, ...]
    generic: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"backend {self.backend}: {self.source}",
            f"arrays of {self.library} on {self.device}, {', '.join(self.dtypes)}: {len(self.checks)} checks passed",
            "",
            f"{'kernel':<18}{'whose':<9}{'checks':>6}  cases",
        ]
        kernels = dict.fromkeys((*self.native, *self.generic, *(check.kernel for check in self.checks)))
        for kernel in kernels:
            passed = [check for check in self.checks if check.kernel == kernel]
            whose = "own" if kernel in self.native else "generic" if kernel in self.generic else ""
            cases = "; ".join(dict.fromkeys(check.case for check in passed))
            line = f"{kernel:<18}{whose:<9}{len(passed) or '-':>6}  {cases}".rstrip()
            lines.append(line if len(line) <= WIDTH else f"{line[: WIDTH - 3].rpartition(' ')[0]} ...")
        return "\n".join(lines)


class BackendError(AssertionError):
    """A backend that breaks its contract. As text, every fault once: where it shows, what was expected and found."""

    def __init__(self, backend: str, source: str, checks: tuple[Check, ...]) -> None:
        self.backend, self.checks = backend, checks
        self.failed = tuple(check for check in checks if check.fault)
        counted = f"{len(self.failed)} of {len(checks)} checks failed"
        super().__init__(
            "\n\n".join([f"backend {backend!r} ({source}) breaks its contract: {counted}", *self._faults()])
        )

    def _faults(self) -> list[str]:
        shown: dict[tuple[str, str], list[Check]] = {}
        for check in self.failed:
            shown.setdefault((check.kernel, check.fault), []).append(check)
        texts = []
        for (kernel, fault), (first, *others) in shown.items():
            where = f"{first.case}, {first.dtype}" if first.dtype else first.case
            lines = [f"{kernel}: {fault}", f"  case: {where}", f"  expected: {first.sentence}"]
            lines += [f"  found: {first.found}"] if first.found else []
            names = [name for name in dict.fromkeys(other.case for other in others) if name != first.case]
            more = f"; and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            lines += [f"  also: {'; '.join(names[:SHOWN])}{more}"] if names else []
            texts.append("\n".join(lines))
        return texts
