"""One chart for each benchmark, of the rows of a result file; the only user of matplotlib.

A benchmark's chart says which fields are its labels, its values and their quartiles. A benchmark
that has none here is shown as its table alone, which a test does not allow for ours.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvconnect.errors import ConfigError

Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """A value and, where it has any, its quartiles."""

    label: str
    series: str
    value: float
    low: float | None = None
    high: float | None = None
    count: float | None = None
    """Where it is on an axis of numbers."""


@dataclass(frozen=True)
class Chart:
    """What is drawn: bars by label, or, where points have counts, lines by count."""

    unit: str
    points: Sequence[Point]


def svg(benchmark: str, rows: Sequence[Row]) -> list[str]:
    """Pictures of a benchmark's rows, one for each unit; raises ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "matplotlib is not installed, which draws the plots; pip install 'kvconnect[bench]'"
        ) from error
    matplotlib.use("svg")
    if benchmark not in CHARTS:
        return []
    by_unit: dict[str, list[Point]] = {}
    for unit, point in CHARTS[benchmark](rows):
        by_unit.setdefault(unit, []).append(point)
    return [_drawn(Chart(unit, points)) for unit, points in by_unit.items()]


def _spread(label: str, series: str, found: Row | None, count: float | None = None) -> Any:
    if found:
        yield (
            found["unit"],
            Point(label, series, found["p50"], found["p25"], found["p75"], count),
        )


Found = Iterator[tuple[str, Point]]


PD_UNITS = {
    "hand_over": "ms of hand-over",
    "first_token": "ms to the first token",
    "between_tokens_p99": "ms between tokens, p99",
    "throughput": "tokens answered a second",
}


def _pd(rows: Sequence[Row]) -> Found:
    for row in rows:
        if "hand_over" not in row:  # files of before there were ways
            label = f"{row['connector']} {row['prompt_tokens']}"
            value = float(row.get("ttft_p50_ms") or row.get("p50_ms") or 0)
            yield "ms", Point(label, "first token", value)
            continue
        series = f"{row['connector']} {row['way']}, {row['concurrency']} at once"
        for name, unit in PD_UNITS.items():
            if found := row.get(name):
                yield from _spread(f"{row['prompt_tokens']} tokens", series, found | {"unit": unit})


def _trace(rows: Sequence[Row]) -> Found:
    for row in rows:
        yield from _spread(f"{row['engine']}: {row['what']}", row["way"], row["after_prefill"])


def _offload(rows: Sequence[Row]) -> Found:
    for outer in rows:
        part, row = outer["part"], outer["row"]
        if part == "tiers" and isinstance(row["ratio"], dict):
            ratio = row["ratio"] | {"unit": "of the plain copy"}
            yield from _spread(row["operation"], "ratio", ratio)
        elif part == "tiers":
            low, high = row["ratio_low"], row["ratio_high"]
            point = Point(row["operation"], "ratio", row["ratio"], low, high)
            yield "of the plain copy", point
        elif part == "hits":
            label, high = f"{row['prompt_tokens']} tokens", row["ttft_p90_ms"]
            median = row["ttft_p50_ms"]
            yield "ms to the first token, to p90", Point(label, row["source"], median, median, high)
        elif part == "cost" and "cpu" in row:
            found = row["cpu"] | {"unit": "CPU seconds, of those of something else"}
            # files of before 2026-11-29's second method have engines
            label = f"{row['connector']} ÷ {row['beside']}" if "beside" in row else row["engine"]
            yield from _spread(label, "cost", found)
        elif part == "eviction":
            label = f"{row['trace']}, {row['capacity']}"
            yield "share of the best hits", Point(label, row["policy"], row["share_of_best"])


def _figures(rows: Sequence[Row]) -> Found:
    for row in rows:
        name = row["name"] if row["measured"] else f"{row['name']} (computed)"
        for _, point in _spread(f"{row['count']}", name, row["value"], row["count"]):
            yield f"{row['value']['unit']}, by {row['of']}", point


def _of(label: str, series: str, values: dict[str, str]) -> Callable[[Sequence[Row]], Found]:
    """Fields by unit; ``label`` and ``series`` are formats over a row's fields."""

    def found(rows: Sequence[Row]) -> Found:
        for row in rows:
            for unit, name in values.items():
                if row.get(name) is not None:
                    yield unit, Point(label.format(**row), series.format(**row), row[name])

    return found


CHARTS: dict[str, Callable[[Sequence[Row]], Found]] = {
    "pd": _pd,
    "trace": _trace,
    "offload": _offload,
    "connector": _figures,
    "scale": _figures,
    "kernels": _of("{shape}", "{verb}", {"of memcpy": "fraction"}),
    "transport": _of(
        "{transport} {wire} {row_bytes}", "{mode}", {"GB/s": "gb_s", "of memcpy": "of_memcpy"}
    ),
    "proxy": _of("{router}, {connections} at once", "router", {"ms added": "added_p50_ms"}),
    "idle": _of("{connector} {role}", "engine", {"% of a core": "engine_percent"}),
    "inter-token": _of("{connector}", "p99", {"ms": "p99_ms"}),
}


def _drawn(chart: Chart) -> str:
    import matplotlib.pyplot as plt

    series = list(dict.fromkeys(point.series for point in chart.points))
    labels = list(dict.fromkeys(point.label for point in chart.points))
    lines = all(point.count is not None for point in chart.points)
    height = 4.0 if lines else 1.2 + 0.22 * len(labels) * max(1, len(series) ** 0.7)
    figure, axes = plt.subplots(figsize=(9, height), layout="constrained")
    for number, name in enumerate(series):
        points = [point for point in chart.points if point.series == name]
        values = [point.value for point in points]
        errors = [
            [point.value - (point.value if point.low is None else point.low) for point in points],
            [(point.value if point.high is None else point.high) - point.value for point in points],
        ]
        errors = [[max(0.0, one) for one in side] for side in errors]
        if lines:
            counts = [point.count or 0 for point in points]
            axes.errorbar(counts, values, yerr=errors, marker="o", capsize=3, label=name)
        else:
            width = 0.8 / len(series)
            at = [labels.index(point.label) + number * width for point in points]
            axes.barh(at, values, width, xerr=errors, capsize=2, label=name)
    if lines:
        axes.set(xscale="log", ylabel=chart.unit, ylim=(0, None))
    else:
        axes.set(xlabel=chart.unit, yticks=range(len(labels)), yticklabels=labels)
        axes.invert_yaxis()
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
    drawn = io.StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    plt.close(figure)
    text = drawn.getvalue()
    return text[re.search(r"<svg", text).start() :]  # type: ignore[union-attr]
