"""A dashboard's panels as one picture: what its queries found over time, with the panels' names.

Not Grafana's drawing: what Prometheus answers to each query, by matplotlib.
"""

import io
import math
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.dates import DateFormatter
from matplotlib.ticker import EngFormatter, PercentFormatter
from PIL import Image

COLUMNS, STEP_S, LARGEST = 4, 2, 300_000
UNITS = {
    "percentunit": PercentFormatter(1.0),
    "s": EngFormatter("s"),
    "Bps": EngFormatter("B/s"),
    "ops": EngFormatter("/s"),
    "tokens/s": EngFormatter("/s"),
    "short": EngFormatter(),
}
Ask = Callable[..., Any]
"""``ask(path, **parameters)`` of Prometheus' HTTP API: the data, None where there is none."""


def draw(ask: Ask, dashboard: dict[str, Any], began_s: float, until_s: float, path: Path) -> int:
    """Writes the picture; how many panels show something. Times are Unix times."""
    rows, section = [], ""
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            section = panel["title"]
        else:
            rows.append((section, panel))
    height = math.ceil(len(rows) / COLUMNS)
    figure, axes = plt.subplots(height, COLUMNS, figsize=(4.2 * COLUMNS, 2.3 * height), dpi=84)
    shown = 0
    for plot, (section, panel) in zip(axes.flat, rows, strict=False):
        shown += _panel(plot, section, panel, lambda e: _series(ask, e, began_s, until_s))
    for plot in axes.flat[len(rows) :]:
        plot.set_axis_off()
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn)
    Image.open(drawn).convert("RGB").quantize(96, Image.Quantize.FASTOCTREE).save(
        path, optimize=True
    )
    assert path.stat().st_size < LARGEST, f"{path} has {path.stat().st_size} bytes"
    return shown


def _panel(plot: Any, section: str, panel: dict[str, Any], series: Callable[..., Any]) -> bool:
    for target in panel["targets"]:
        for labels, times, numbers in series(target["expr"]):
            name = re.sub(
                r"{{\s*(\w+)\s*}}", lambda m, la=labels: la.get(m[1], ""), _legend(target)
            )
            plot.plot(times, numbers, label=name[:36], linewidth=1.2)
    unit = panel.get("fieldConfig", {}).get("defaults", {}).get("unit", "short")
    plot.set_title(f"{section}: {panel['title']}", fontsize=8, loc="left")
    plot.yaxis.set_major_formatter(UNITS[unit])
    plot.xaxis.set_major_formatter(DateFormatter("%H:%M:%S"))
    plot.xaxis.set_major_locator(plt.MaxNLocator(3))
    plot.tick_params(labelsize=6)
    nothing = plot.get_ylim()[1] <= 0.1 and not any(any(one.get_ydata()) for one in plot.lines)
    plot.set_ylim(0, 1 if nothing else None)
    if plot.lines:
        plot.legend(fontsize=5.5, loc="upper left", framealpha=0.6)
    return bool(plot.lines)


def _legend(target: dict[str, Any]) -> str:
    return target.get("legendFormat") or target["expr"]


def _series(ask: Ask, expression: str, began_s: float, until_s: float) -> Any:
    """(labels, times, numbers) of each series that a query finds."""
    found = ask("query_range", query=expression, start=began_s, end=until_s, step=STEP_S)
    for one in (found or {"result": []})["result"]:
        points = [(t, float(v)) for t, v in one["values"] if math.isfinite(float(v))]
        if points:
            times = [datetime.fromtimestamp(t, UTC) for t, _ in points]
            yield one["metric"], times, [v for _, v in points]
