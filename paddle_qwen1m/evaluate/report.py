"""Pictures of results, as PNG, and one HTML file that has them, the tables and the run's options in itself."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from paddle_qwen1m.evaluate import needle, perplexity
from paddle_qwen1m.evaluate.results import Record, grouped, mean, positions

LOST, PARTLY, FOUND = "#F0496E", "#EBB839", "#0CD79F"
"""Colours of a needle map, as others draw it."""
LINES = ("-", "--", ":", "-.")
"""Of configurations, in turn: those that lie on each other are both seen."""
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; } th, td { padding: .25rem .75rem; text-align: right; }
th:first-child, td:first-child { text-align: left; } tr { border-bottom: 1px solid #ddd; }
img { max-width: 100%; } pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; }
"""


def pictures(runs: Mapping[str, Sequence[Record]]) -> dict[str, bytes]:
    """PNG files by name: a needle map a configuration, or a figure with a line each; none without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return {}
    task = next(iter(runs.values()))[0].task
    if task == needle.TASK:
        return {f"needle_{name}.png": _map(Figure, name, records) for name, records in runs.items()}
    if task == perplexity.TASK:
        return {"perplexity.png": _perplexities(Figure, runs)}
    return {"ruler.png": _scores(Figure, runs)}


def page(title: str, given: Mapping[str, Any], markdown: str, images: Mapping[str, bytes]) -> str:
    """A self-contained HTML page; markdown: headings and tables."""
    figures = "\n".join(
        f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'
        for name, content in images.items()
    )
    options = html.escape(json.dumps(given, indent=2))
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>{html.escape(title)}</h1>\n{figures}\n{_html(markdown)}\n"
        f"<h3>What was asked</h3>\n<pre>{options}</pre></body></html>\n"
    )


def _html(markdown: str) -> str:
    lines, table = list[str](), list[list[str]]()
    for line in [*markdown.splitlines(), ""]:
        if line.startswith("|"):
            table.append([html.escape(cell.strip()) for cell in line.strip("|").split("|")])
            continue
        if table:
            head, _, *rows = table
            lines.append(_row(head, "th", "<table>") + "".join(_row(row, "td") for row in rows) + "</table>")
            table = []
        if line.startswith("#"):
            lines.append(f"<h3>{html.escape(line.lstrip('# '))}</h3>")
    return "\n".join(lines)


def _row(cells: Sequence[str], tag: str, before: str = "") -> str:
    return f"{before}<tr>{''.join(f'<{tag}>{cell}</{tag}>' for cell in cells)}</tr>"


def _map(figure_type: Any, name: str, records: Sequence[Record]) -> bytes:
    """Length along x, depth from the top down, colour the share of answers that were right."""
    from matplotlib.colors import LinearSegmentedColormap

    lengths = sorted({record.length for record in records})
    depths = sorted({record.facts["depth_percent"] for record in records})
    cells = [
        [
            mean([one for one in records if (one.length, one.facts["depth_percent"]) == (length, depth)])
            for length in lengths
        ]
        for depth in depths
    ]
    figure = figure_type(figsize=(max(4.5, 0.8 * len(lengths) + 2.5), max(2.5, 0.3 * len(depths) + 1.2)))
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list("needle", [LOST, PARTLY, FOUND])
    drawn = axes.imshow(cells, cmap=colours, vmin=0.0, vmax=1.0, aspect="auto")
    axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45, ha="right")
    axes.set_yticks(range(len(depths)), [f"{depth:g} %" for depth in depths])
    axes.set_xlabel("tokens")
    axes.set_ylabel("depth")
    axes.set_title(f"{name}: share of needles found, {mean(records):.1%} in all")
    figure.colorbar(drawn)
    return _png(figure)


def _scores(figure_type: Any, runs: Mapping[str, Sequence[Record]]) -> bytes:
    """A small figure a task, and in each a line a configuration."""
    tasks = list(grouped(next(iter(runs.values()))))
    columns = min(4, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = figure_type(figsize=(3.2 * columns, 2.4 * rows + 0.4), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for place, axes in enumerate(grid.flat):
        if place >= len(tasks):
            axes.set_axis_off()
            continue
        for (name, records), line in zip(runs.items(), cycle(LINES)):
            lengths = grouped(records)[tasks[place]]
            axes.plot(list(lengths), [100 * mean(ones) for ones in lengths.values()], line, marker=".", label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(lengths), [f"{length:,}" for length in lengths], rotation=45, ha="right", fontsize=7)
        axes.set_ylim(-5, 105)
        axes.set_title(tasks[place], fontsize=9)
    grid[0][0].legend(fontsize=7)
    return _png(figure)


def _perplexities(figure_type: Any, runs: Mapping[str, Sequence[Record]]) -> bytes:
    """Of the longest windows: a line a configuration, perplexity over the end of each range of positions."""
    figure = figure_type(figsize=(6.4, 3.6))
    axes = figure.subplots()
    for (name, records), line in zip(runs.items(), cycle(LINES)):
        lengths = grouped(records)[perplexity.TASK]
        ranges = positions(lengths[max(lengths)])
        ends = [one["end"] for one in ranges]
        axes.plot(ends, [one["perplexity"] for one in ranges], line, marker=".", label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ends, [f"{end:,}" for end in ends], rotation=45, ha="right")
    axes.set_xlabel("tokens read")
    axes.set_ylabel("perplexity")
    axes.legend()
    return _png(figure)


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
    return file.getvalue()
