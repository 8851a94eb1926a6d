"""The benchmark's plots (matplotlib, extra ``bench``)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from ca2vdm_cli.errors import UsageError

from .results import BackendRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = ("#2a6fbb", "#c44e2b", "#8c2d5a", "#6b5cb8", "#4f9d69", "#b8902f", "#3a9aa8", "#7d7f85")
_INK, _GRID = "#1c2430", "#dfe4ec"
_SCREEN = {
    "figure.figsize": (13, 7.8),
    "font.size": 9,
    "axes.titlesize": 10.5,
    "axes.labelsize": 9,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "svg.hashsalt": "ca2vdm",
}
_PAGE = {
    "figure.figsize": (7, 4.4),
    "font.size": 6.5,
    "axes.titlesize": 6.4,
    "axes.labelsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "legend.fontsize": 6,
    "lines.linewidth": 0.9,
    "lines.markersize": 2,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.5,
    "pdf.fonttype": 42,
}
"""A PDF is for papers: as wide as a page's text, with TrueType fonts, because some publishers reject Type 3."""


def require_matplotlib() -> None:
    """Check before the benchmark that plots can be drawn after it.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError("output: plots need matplotlib, which is not installed; pip install 'ca2vdm[bench]'") from None


def draw(run: BackendRun, format: str) -> bytes:
    """The plots as ``png``, ``svg``, or ``pdf`` for a paper. Text in SVG is drawn as outlines, so it needs no font."""
    import matplotlib

    out = io.BytesIO()
    date = {"svg": "Date", "pdf": "CreationDate"}.get(format)  # left out, so that equal runs give equal files
    with matplotlib.rc_context(_PAGE if format == "pdf" else _SCREEN):
        _figure(run).savefig(out, format=format, dpi=110, metadata={date: None} if date else None)
    return out.getvalue()


def _figure(run: BackendRun) -> Figure:
    """Two rows of three plots: what a chunk costs, and how costs grow."""
    from matplotlib.figure import Figure  # without pyplot, which looks for a display

    figure = Figure(layout="constrained")
    figure.get_layout_engine().set(hspace=0.08, wspace=0.05)  # type: ignore[union-attr, call-arg]
    (chunk, utilization, memory), (seconds, flops, step) = figure.subplots(2, 3)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK)
        axes.set_axisbelow(True)

    methods, results = list(run.results), run.results.values()
    denoising = [result.steady_denoise_seconds for result in results]
    writes = [result.cache_write_seconds for result in results]
    peaks = [result.peak_memory_above_weights_bytes for result in results]
    _bars(chunk, "Seconds per chunk (light: cache write)", methods, denoising, writes)
    _bars(utilization, "Share of matrix-product rate (MFU)", methods, [result.mfu for result in results], percent=True)
    _bars(memory, "Peak memory above weights (MiB)", methods, [(peak or 0) / 2**20 for peak in peaks])
    for axes in (utilization, memory):
        axes.tick_params(left=False, labelleft=False)

    frames, context = run.growth.frames, run.growth.context_frames
    unit, scale = ("TFLOP", 1e12) if max(curve.flops[-1] for curve in frames.values()) > 1e12 else ("GFLOP", 1e9)
    _title(seconds, "Seconds per video (fitted exponent)")
    _title(flops, f"{unit} per video (fitted exponent)")
    _title(step, "Seconds per step (fitted exponent)")
    for (method, curve), color in zip(frames.items(), cycle(_COLORS), strict=False):
        _line(seconds, method, curve.frames, curve.seconds, curve.seconds_exponent, color)
        _line(flops, method, curve.frames, [count / scale for count in curve.flops], curve.flops_exponent, color)
        growth = context[method]
        _line(step, method, growth.frames, growth.seconds, growth.seconds_exponent, color)
    for axes, label in ((seconds, "frames of video"), (flops, "frames of video"), (step, "frames of context")):
        axes.set_xlabel(label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_ylim(bottom=0)
        axes.grid(color=_GRID)
        axes.legend(frameon=False)
    return figure


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", color=_INK, fontweight="bold")


def _bars(
    axes: Axes,
    title: str,
    methods: list[str],
    values: Sequence[float | None],
    lighter: Sequence[float | None] = (),
    *,
    percent: bool = False,
) -> None:
    """One bar per method, with a second, lighter one stacked on it; the sum is written at its end."""
    first = [value or 0.0 for value in values]
    second = [value or 0.0 for value in lighter or [0.0] * len(first)]
    colors = [color for _, color in zip(methods, cycle(_COLORS), strict=False)]
    axes.barh(methods, first, color=colors, height=0.62)
    axes.barh(methods, second, left=first, color=colors, alpha=0.45, height=0.62)
    totals = [sum(pair) for pair in zip(first, second, strict=True)]
    for i, total in enumerate(totals):
        text = f"{total:.0%}" if percent else f"{total:.3g}" if total < 1000 else f"{total:,.0f}"
        axes.text(total, i, f" {text if total else '–'}", va="center", color=_INK)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.16 * max(totals) or 1)
    axes.grid(axis="x", color=_GRID)
    if percent:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    _title(axes, title)


def _line(axes: Axes, method: str, x: Sequence[float], y: Sequence[float], exponent: float | None, color: str) -> None:
    from matplotlib import rcParams

    ours = method == "cached"
    axes.plot(
        x,
        y,
        color=color,
        marker="o",
        linewidth=rcParams["lines.linewidth"] * (1.6 if ours else 1),
        zorder=3 if ours else 2,
        label=method if exponent is None else f"{method} ({exponent:.2f})",
    )
