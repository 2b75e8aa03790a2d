"""What offloading costs an engine that never hits, beside a connector that does nothing.

* One engine in one process, whose connector is switched (`switched`, `cost_engine`): two engines
  that are the same differ by 3 % themselves, by where their memory happens to lie.
* Many short rounds. In each a turn of every state, in random order: no connector, one that does
  nothing twice (A/A), and twice one that offloads, whose calls are counted once. So what else the
  machine does meets all alike. Of a state that has two turns the mean counts.
* CPU seconds are of the whole process, until all that a turn is to store has been stored.
* A row is the median of the rounds' ratios, with the interval in which the true median is with 95 %
  certainty: what the method resolves. Two rows are no comparison but a count: what vLLM's calls
  into the connector took, and what our threads took, as parts of all CPU seconds.
"""

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median

from kvconnect.cli.engines import engine_env
from kvconnect_bench.cost_plan import CostPlan, CostTurn, CostTurns, State
from kvconnect_bench.offload_engines import kv_bytes
from kvconnect_bench.results import Spread

ENGINE = "kvconnect_bench.cost_engine"
INPUT_TOKENS, OUTPUT_TOKENS = 128, 8
TURNS_KEPT = 16  # as many turns' KV fill the host's memory
LEAST_BYTES = 1 << 20  # what a connector may be given
UNCERTAIN = 0.05  # how often an interval may not hold what it is of
ON, OFF = (State.OFFLOADS, State.COUNTED), (State.NOTHING, State.AGAIN)
COMPARED = ((ON, OFF), ((State.AGAIN,), (State.NOTHING,)), (OFF, (State.NONE,)))
ALL, COUNTED = "all that the engine uses", (State.COUNTED,)
PARTS: Sequence[tuple[str, Callable[[CostTurn], float]]] = (
    ("vLLM's calls into it", lambda turn: turn.calls_s),
    ("its threads", lambda turn: turn.threads_s),
    ("both", lambda turn: turn.calls_s + turn.threads_s),
)
"""What is counted of an engine that offloads."""


class EngineFailedError(RuntimeError):
    """The engine ended by itself."""


@dataclass(frozen=True)
class CostRow:
    """CPU seconds, divided by those of something else, round by round."""

    connector: str
    """What the engine had, or what of it was counted."""
    beside: str
    """What the ratio is to."""
    rounds: int
    requests: int
    """Of a turn, at once."""
    input_tokens: int
    output_tokens: int
    cpu: Spread
    """Ratio of CPU seconds."""
    cpu_low: float
    """The median is between the two with 95 % certainty."""
    cpu_high: float
    cpu_ms: float
    """What is divided, in the median of the turns."""
    seconds: Spread | None
    """Ratio of seconds until all requests were answered."""
    stored_mb: float
    """In all turns, the first ones included."""


def cost(model: Path, rounds: int, requests: int) -> list[CostRow]:
    """Rows of offloading, of the A/A, of a connector as such, and what was counted."""
    with tempfile.TemporaryDirectory(prefix="kvconnect-bench-") as place:
        out = Path(place) / "measured.json"
        memory = max(TURNS_KEPT * requests * kv_bytes(model, INPUT_TOKENS), LEAST_BYTES)
        plan = CostPlan(str(model), rounds, requests, INPUT_TOKENS, OUTPUT_TOKENS, memory, str(out))
        found = run(plan)
    if found.hit_tokens:
        raise RuntimeError(
            f"{found.hit_tokens:.0f} tokens were loaded, expected none: no cost at 0 % hits"
        )
    return rows_of(found, plan)


def run(plan: CostPlan) -> CostTurns:
    """What the engine measured; raises EngineFailedError, with the end of its output."""
    command = [sys.executable, "-P", "-m", ENGINE, json.dumps(asdict(plan))]
    done = subprocess.run(  # noqa: S603 - our own command, no shell
        command,
        env=engine_env(VLLM_ENABLE_V1_MULTIPROCESSING="0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise EngineFailedError(f"the engine ended with {done.returncode}: {done.stdout[-2000:]}")
    found = json.loads(Path(plan.out).read_text())
    turns = [
        [CostTurn(**turn | {"state": State(turn["state"])}) for turn in each]
        for each in found.pop("rounds")
    ]
    return CostTurns(turns, **found)


def rows_of(found: CostTurns, plan: CostPlan) -> list[CostRow]:
    """Rows of what was measured."""

    def row(
        connector: str,
        beside: str,
        own_s: Sequence[float],
        other_s: Sequence[float],
        own_answered_s: Sequence[float] = (),
        other_answered_s: Sequence[float] = (),
    ) -> CostRow:
        ratios = _ratios(own_s, other_s)
        cpu = Spread.of("ratio", ratios)
        low, high = median_within(ratios)
        assert cpu and low <= median(ratios) <= high
        return CostRow(
            connector=connector,
            beside=beside,
            rounds=len(ratios),
            requests=plan.requests,
            input_tokens=plan.input_tokens,
            output_tokens=plan.output_tokens,
            cpu=cpu,
            cpu_low=round(low, 4),
            cpu_high=round(high, 4),
            cpu_ms=round(1e3 * median(own_s), 2),
            seconds=Spread.of("ratio", _ratios(own_answered_s, other_answered_s)),
            stored_mb=round(found.stored_bytes / 1e6, 1),
        )

    compared = [
        row(
            *(own[0], other[0]),
            *(_means(found, states, lambda turn: turn.cpu_s) for states in (own, other)),
            *(_means(found, states, lambda turn: turn.answered_s) for states in (own, other)),
        )
        for own, other in COMPARED
    ]
    whole = _means(found, COUNTED, lambda turn: turn.cpu_s)
    return compared + [row(name, ALL, _means(found, COUNTED, part), whole) for name, part in PARTS]


def _ratios(own: Sequence[float], other: Sequence[float]) -> list[float]:
    return [one / beside for one, beside in zip(own, other, strict=True)]


def _means(
    found: CostTurns, states: Sequence[State], part: Callable[[CostTurn], float]
) -> list[float]:
    """For each round, of its turns in these states."""
    return [mean(part(turn) for turn in turns if turn.state in states) for turns in found.rounds]


def median_within(values: Sequence[float]) -> tuple[float, float]:
    """Between which of ``values``, six or more, the median of what they are drawn from is, at 95 %.

    By the chance that so few of them are below it, or above: whatever they are drawn from.
    """
    ordered, n, first = sorted(values), len(values), 0
    missed = 2 / 2**n
    while (missed := missed + 2 * math.comb(n, first + 1) / 2**n) <= UNCERTAIN:
        first += 1
    return ordered[first], ordered[n - 1 - first]
