"""The benchmark's plots (matplotlib, extra ``bench``)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ca2vdm_cli.errors import UsageError, as_user_error

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLORS = {
    "cached": "#2a6fbb",
    "recompute": "#c44e2b",
    "recompute-extendable": "#8c2d5a",
    "bidirectional": "#6b5cb8",
    "fixed-window": "#4f9d69",
    "per-step-cache": "#b8902f",
}
_INK, _GRID = "#1c2430", "#dfe4ec"


def require_matplotlib() -> None:
    """Say at once that plots can't be made, and not after the benchmark.

    Raises:
        UsageError: matplotlib is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise UsageError("--plot, --html: matplotlib is not installed: pip install 'ca2vdm[bench]'") from None


def save_png(report: dict[str, Any], path: Path) -> None:
    """Write the plots as a PNG.

    Raises:
        UserError: it can't be written.
    """
    with as_user_error(f"{path}: cannot be written"):
        _figure(report).savefig(path, format="png", dpi=110)


def as_svg(report: dict[str, Any]) -> str:
    """The plots as an ``<svg>`` element, letters as outlines, so that it needs nothing from outside."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "ca2vdm"}):
        _figure(report).savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _figure(report: dict[str, Any]) -> Figure:
    """Two rows of three plots: where a chunk's time goes, and how costs grow."""
    from matplotlib.figure import Figure  # without pyplot, which looks for a display

    figure = Figure(figsize=(13, 7.8), layout="constrained")
    figure.get_layout_engine().set(hspace=0.08)  # type: ignore[union-attr, call-arg]
    ((chunk, share, memory), (time_, flops, step)) = figure.subplots(2, 3)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=_INK, labelsize=9)
    _bars(chunk, report, [("denoising", "steady_denoise_seconds", 1.0), ("cache write", "cache_write_seconds", 0.45)])
    chunk.set_title("A chunk, steady state: seconds")
    _bars(share, report, [("", "mfu", 1.0)], percent=True)
    share.set_title("Share of the machine's matrix-product rate")
    _bars(memory, report, [("", "peak_memory_above_weights_bytes", 1.0)], scale=2**20)
    memory.set_title("Peak memory above weights: MiB")
    _lines(time_, report, "frames", "seconds", 1.0)
    time_.set(title="A video: seconds (and exponent)", xlabel="frames of the video")
    most = max(max(curve["flops"]) for curve in report["growth"]["frames"].values())
    unit, scale = ("TFLOP", 1e12) if most > 1e12 else ("GFLOP", 1e9)
    _lines(flops, report, "frames", "flops", scale)
    flops.set(title=f"A video: {unit} (and exponent)", xlabel="frames of the video")
    _lines(step, report, "context_frames", "seconds", 1.0)
    step.set(title="A step: seconds (and exponent)", xlabel="frames of context")
    for axes in figure.axes:
        axes.set_title(axes.get_title(), loc="left", fontsize=10.5, color=_INK, fontweight="bold")
        axes.set_title("")
    return figure


def _bars(
    axes: Axes,
    report: dict[str, Any],
    parts: list[tuple[str, str, float]],
    *,
    scale: float = 1.0,
    percent: bool = False,
) -> None:
    """A bar for every contestant, of parts (label, key of the result, opacity); the sum is written at its end."""
    results = report["results"]
    left = [0.0] * len(results)
    colors = [_COLORS[name] for name in results]
    for _, key, opacity in parts:
        widths = [(result[key] or 0.0) / scale for result in results.values()]
        axes.barh(list(results), widths, left=left, color=colors, alpha=opacity, height=0.62)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for i, total in enumerate(left):
        number = f"{total:.3g}" if total < 1000 else f"{total:,.0f}"
        label = "–" if not total else f"{total:.0%}" if percent else number
        axes.text(total, i, f" {label}", va="center", fontsize=9, color=_INK)
    axes.invert_yaxis()
    axes.margins(x=0.16)
    axes.grid(axis="x", color=_GRID)
    axes.set_axisbelow(True)
    if percent:
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    if len(parts) > 1:
        axes.set_xlabel(", then paler: ".join(label for label, _, _ in parts), fontsize=9)


def _lines(axes: Axes, report: dict[str, Any], length: str, cost: str, scale: float) -> None:
    for name, curve in report["growth"][length].items():
        exponent = curve[f"{cost}_exponent"]
        label = name if exponent is None else f"{name}  {exponent:.2f}"
        own = name == "cached"
        axes.plot(
            curve["frames"],
            [value / scale for value in curve[cost]],
            color=_COLORS[name],
            marker="o",
            markersize=4,
            linewidth=2.4 if own else 1.5,
            zorder=3 if own else 2,
            label=label,
        )
    axes.set_ylim(bottom=0)
    axes.grid(color=_GRID)
    axes.legend(fontsize=8.5, frameon=False)
