"""TODO parity/results."""

from dataclasses import dataclass, field

from clean_transformer.analysis.comparison import Impact
from clean_transformer.config import Config
from clean_transformer.parity.activations.drift import EndToEnd
from clean_transformer.parity.activations.isolated import Isolated
from clean_transformer.parity.locate import Located
from clean_transformer.parity.same_function import ParityReport
from clean_transformer.parity.verdict import Check, Verdict, worst


@dataclass(frozen=True)
class DeviceRun:
    """Questions 2 and 3 for one device, dtype and mode; `not_checked` says why there is nothing."""

    device: str
    dtype: str
    mode: str = "eager"
    settings: dict[str, str] = field(default_factory=dict)
    isolated: list[Isolated] = field(default_factory=list)
    end_to_end: list[EndToEnd] = field(default_factory=list)
    invariants: list[Check] = field(default_factory=list)
    probes: list[Check] = field(default_factory=list)
    impact: Impact | None = None
    located: Located | None = None
    not_checked: str = ""

    @property
    def verdict(self) -> Verdict:
        """The worst of every row and check."""
        rows: list[Isolated | EndToEnd | Check] = [
            *self.isolated,
            *self.end_to_end,
            *self.invariants,
            *self.probes,
        ]
        return worst(row.verdict for row in rows)

    @property
    def first_failure(self) -> Isolated | None:
        """The first activation, in the order of the forward pass, that does not pass."""
        order = {row.name: index for index, row in reversed([*enumerate(self.isolated)])}
        failures = [row for row in self.isolated if row.verdict is not Verdict.PASS]
        return min(failures, key=lambda row: order[row.name], default=None)


@dataclass(frozen=True)
class SuiteReport:
    """What `clean-transformer parity` found."""

    weights: str
    cfg: Config
    tokens: tuple[int, int]
    environment: dict[str, str]
    same_function: ParityReport | None
    no_reference: str
    runs: list[DeviceRun]

    @property
    def verdict(self) -> Verdict:
        """PASS only if the function is the same and every device computes it accurately."""
        same = self.same_function.verdict if self.same_function else Verdict.NOT_CHECKED
        return worst([same, *(run.verdict for run in self.runs)])
