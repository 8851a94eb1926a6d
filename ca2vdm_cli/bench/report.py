"""A benchmark's report for people: the verdict in words, warnings, tables, CSV and HTML."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Iterator, Sequence
from itertools import chain

from ca2vdm_cli.generate.context import contexts

from .results import BackendRun, Report, Spread

Units = Callable[[float], str]
"""Formats bytes or seconds for people."""
Table = tuple[list[str], list[list[str]]]
"""Columns, right-aligned if they end in ``>``, and rows; a cell may have several lines."""


def verdict(run: BackendRun) -> str:
    """The outcome in one line of words."""
    return "; ".join([_speed(run), *_memory(run), _exactness(run)])


def _speed(run: BackendRun) -> str:
    measured = {method: ratio for method, ratio in run.speedup_per_chunk.items() if ratio}
    if not run.speedup_per_chunk:
        return "cached alone was measured"
    if not measured:
        return "no chunk saw a full window, so there is no speed to compare: measure more frames"
    parts: list[str] = []
    for faster in (True, False):
        word = "faster " if faster else "slower "
        for method, ratio in measured.items():
            if (ratio >= 1) is faster:
                parts.append(f"{ratio if faster else 1 / ratio:.2f}× {word}than {method}")
                word = ""
    steps = f"{run.steps} step{'' if run.steps == 1 else 's'} per chunk"
    return f"cached is {_join(parts)} at a {run.context_frames}-frame window and {steps}"


def _memory(run: BackendRun) -> Iterator[str]:
    if "per-step-cache" in run.results:
        ratio = run.results["per-step-cache"].cache_bytes / run.results["cached"].cache_bytes
        yield f"{ratio:.3g}× less cache memory than per-step-cache"


def _exactness(run: BackendRun) -> str:
    if run.outputs_agree is None:
        return "outputs not compared (no exact baseline)"
    if not run.max_abs_difference_before_slide:
        return "outputs are identical until the window slides"
    difference = f"{run.max_abs_difference_before_slide:.1e}"
    if not run.outputs_agree:
        return f"outputs DIFFER by {difference} before the window slides"
    largest = f"{run.max_abs_output:.1f}"
    return (
        f"outputs differ only by rounding until the window slides, by at most {difference} (largest output {largest})"
    )


def warnings(report: Report) -> Iterator[str]:
    """Reasons to distrust the results."""
    for run in report.runs:
        if not run.flops_agree:
            worst = max(result.flops_error or 0.0 for result in run.results.values())
            yield f"{run.backend}: counted operations differ from the formula by up to {worst:.1%}"
        if not run.cache_bytes_agree:
            yield f"{run.backend}: the cache's bytes differ from the formula"
        spreads = {method: result.steady_seconds_per_step_spread for method, result in run.results.items()}
        if unsteady := [method for method, s in spreads.items() if s and s.three_quarters > 1.3 * s.quarter]:
            yield (
                f"{run.backend}: the middle half of the step times of {_join(unsteady)} spans more than 30 %: is the "
                "machine busy?"
            )


def notes(run: BackendRun) -> Iterator[str]:
    """How to read the table of costs."""
    yield (
        "Steady-state medians; below them the ratio to cached, and the range of the values. Chunk: denoising steps "
        "and cache write. Video: all chunks, without decoding. frames/s: with decoding, if there is an autoencoder. "
        "MFU: share of the machine's rate in matrix products of the same dtype, measured between the steps. "
        "Context: memory kept between chunks. Peak: context and working memory, without the weights."
    )
    if run.max_abs_difference_after_slide is not None:
        yield (
            f"After the window slides, cached and recompute differ by {run.max_abs_difference_after_slide:.1e}: a "
            "recomputed frame no longer sees the frames before the window, while cached keys and values reflect them."
        )
    if others := [method for method in run.results if not contexts[method].exact]:
        yield (
            f"Only the costs of {_join(others)} are compared: from the same weights, they generate a different video "
            "than cached."
        )


GROWTH_NOTE = (
    "Exponents e, fitted to the longer half of the lengths. Frames: a whole video of that length (memory: context and "
    "working memory of a step). Context: one denoising step. –: fewer than three lengths."
)
TIME = ("", "step>", "write>", "chunk>", "decode>", "video>", "frames/s>")
"""Columns of a first table, which fits a terminal..."""
WORK = ("", "FLOPs/step>", "MFU>", "context>", "peak>", "time ∝\nframesᵉ>", "FLOPs ∝\nframesᵉ>")
"""...and those of a second table."""


def costs_table(run: BackendRun, size: Units, duration: Units, columns: Sequence[str] = ()) -> Table:
    """Steady-state costs, see ``notes``.

    Args:
        run: one backend's.
        size, duration: format bytes and seconds.
        columns: the columns to show, as far as they were measured; by default all but the exponents.
    """
    pixels = run.results["cached"].decode_seconds is not None

    def time(seconds: float | None, below: str = "") -> str:
        return "–" if seconds is None else f"{duration(seconds)}\n{below}".rstrip("\n")

    rows = []
    for method, result in run.results.items():
        step, chunk, write = result.steady_seconds_per_step, result.steady_seconds_per_chunk, result.cache_write_seconds
        per_step, per_chunk = run.speedup_per_step.get(method), run.speedup_per_chunk.get(method)
        writes = result.cache_write_flops != 0
        rate, peak = result.steady_frames_per_second, result.peak_memory_above_weights_bytes
        cells = {
            "": method,
            "step>": time(step, _below(per_step, step, result.steady_seconds_per_step_spread)),
            "write>": time(write, f"{write / step:.2f} steps") if writes and write and step else "–",
            "chunk>": time(chunk, _below(per_chunk, chunk, result.steady_seconds_per_chunk_spread)),
            "decode>": time(result.decode_seconds),
            "encode>": time(result.encode_seconds),
            "video>": time(result.seconds),
            "first chunk>": time(result.first_chunk_latency_seconds),
            "frames/s>": f"{rate:.3g}" if rate else "–",
            "FLOPs/step>": operations(result.flops_per_step),
            "MFU>": "–" if result.mfu is None else f"{result.mfu:.0%}",
            "context>": size(result.context_bytes),
            "peak>": "–" if peak is None else size(peak),
        }
        wanted = [column for column in columns or cells if pixels or column not in ("decode>", "encode>")]
        growth = run.growth.frames[method]
        cells["time ∝\nframesᵉ>"] = _exponent(growth.seconds_exponent)
        cells["FLOPs ∝\nframesᵉ>"] = _exponent(growth.flops_exponent)
        rows.append([cells[column] for column in wanted])
    return wanted, rows


def _below(ratio: float | None, median: float | None, spread: Spread | None) -> str:
    """Lines below a median: the ratio to ``cached`` if it is a baseline's, and the range of the values."""
    lines = [] if ratio is None else [f"{ratio:.2f}×"]
    if median and spread:
        lines.append(f"{spread.min / median - 1:+.0%} {spread.max / median - 1:+.0%}")
    return "\n".join(lines)


def growth_table(run: BackendRun) -> Table:
    """Fitted exponents."""
    costs, lengths = ("time", "FLOPs", "memory"), {"frames": run.growth.frames, "context": run.growth.context_frames}
    rows = []
    for method in run.results:
        curves = [curves[method] for curves in lengths.values()]
        exponents = [(c.seconds_exponent, c.flops_exponent, c.memory_bytes_exponent) for c in curves]
        rows.append([method, *map(_exponent, chain(*exponents))])
    return ["", *(f"{cost} ∝ {length}ᵉ>" for length in lengths for cost in costs)], rows


def _exponent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-0.00", "0.00")


def operations(count: float) -> str:
    """A number of operations for people: 170 G."""
    for unit in "kMGT":
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count / 1000:.3g} P"


def as_csv(report: Report) -> str:
    """A row for every backend, method, repeat and chunk, in seconds, bytes and operations."""
    out = io.StringIO()
    columns = ["backend", "context_frames", "method", "repeat", "chunk", "first_frame", "seen_frames"]
    columns += ["cache_write_seconds", "denoise_seconds", "decode_seconds", "encode_seconds", "total_seconds"]
    columns += ["kept_bytes", "step_flops"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for run in report.runs:
        for method, result in run.results.items():
            for index, repeat in enumerate(result.repeats):
                for chunk, steps in enumerate(repeat.seconds_per_step):
                    write, decode = repeat.write_seconds_per_chunk[chunk], repeat.decode_seconds_per_chunk[chunk]
                    first_frame = run.first_frame + chunk * report.environment.chunk_frames
                    place = [run.backend, run.context_frames, method, index, chunk, first_frame]
                    seconds = [write, sum(steps), decode, repeat.encode_seconds_per_chunk[chunk]]
                    total = write + sum(steps) + (decode or 0.0)
                    rest = [result.kept_bytes_per_chunk[chunk], result.step_flops_per_chunk[chunk]]
                    writer.writerow([*place, result.seen_frames_per_chunk[chunk], *seconds, total, *rest])
    return out.getvalue()


_FACTS = {
    "processor": "processor",
    "cores": "cores",
    "threads": "threads",
    "platform": "platform",
    "torch": "PyTorch",
    "numpy": "NumPy",
    "python": "Python",
    "version": "ca2vdm",
    "date": "date",
    "preset": "preset",
    "preset_sha256": "preset’s SHA-256",
    "device": "device",
    "dtype": "dtype",
    "tokens_per_frame": "tokens per frame",
    "frames": "frames",
    "chunk_frames": "frames per chunk",
    "context_frames": "window in frames",
    "steps": "denoising steps",
    "sampler": "sampler",
    "seed": "seed",
    "repeat": "repeats",
}
"""Key of each fact in the JSON, and its name in the report."""
_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1c2430; background: #fff; max-width: 74rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
p.verdict { font-size: 1.15rem; font-weight: 600; border-left: 4px solid #2a6fbb; padding: .4rem .9rem;
  background: #f2f6fb; }
p.warning { color: #8a3b00; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { text-align: right; padding: .3rem .5rem; white-space: nowrap; border-bottom: 1px solid #e3e7ee;
  vertical-align: top; }
th { border-bottom: 2px solid #b9c2cf; } th:first-child, td:first-child { text-align: left; }
tr.ours td { font-weight: 600; background: #f2f6fb; }
td span { color: #66707f; font-weight: 400; font-size: .8rem; display: block; }
figure { margin: 1rem 0; } figure svg { width: 100%; height: auto; }
.scroll { overflow-x: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; font-size: .88rem; }
dt { color: #66707f; } dd { margin: 0; overflow-wrap: anywhere; } p.note { color: #4a5463; font-size: .9rem; }
"""


def as_html(report: Report, svg: str, size: Units, duration: Units) -> str:
    """One self-contained page: verdict, plots, tables, machine.

    Args:
        report: of all backends.
        svg: the plots, an SVG document.
        size, duration: format bytes and seconds.
    """
    title = f"ca2vdm bench: {_text(report.environment.preset)}"
    body = [f"<h1>{title}</h1>", f'<p class="verdict">{_text(report.verdict)}</p>']
    body += [f'<p class="warning">{_text(line)}</p>' for line in warnings(report)]
    body.append(f"<figure>{svg[svg.index('<svg') :]}</figure>")
    for run in report.runs:
        body.append(f"<h2>{_text(run.backend)}, {run.context_frames}-frame window</h2>")
        body.append(_table(*costs_table(run, size, duration)))
        body += [f'<p class="note">{_text(line)}</p>' for line in notes(run)]
        body.append(f"<h2>Growth ({_text(run.backend)})</h2>")
        body.append(_table(*growth_table(run)))
        body.append(f'<p class="note">{_text(GROWTH_NOTE)}</p>')
    values, run = report.as_json(), report.runs[0]
    facts = {name: values[key] for key, name in _FACTS.items()}
    facts["weights"] = "trained" if report.environment.trained else "random"
    if "fixed-window" in run.results:
        facts["window of fixed-window"] = run.fixed_window_frames
    facts["matrix products"] = (
        f"{run.gemm_flops_per_second / 1e9:.0f} GFLOP/s (median of {'×'.join(map(str, run.gemm_shape))})"
    )
    lines = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    body.append(f"<h2>Machine and settings</h2><dl>{lines}</dl>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name.rstrip('>'))}</th>" for name in columns)
    lines = []
    for row in rows:
        cells = []
        for cell in row:
            value, *below = cell.split("\n")
            cells.append(f"<td>{_text(value)}{''.join(f'<span>{_text(line)}</span>' for line in below)}</td>")
        lines.append(f"<tr{' class=ours' if row[0] == 'cached' else ''}>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _join(parts: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))


def _text(value: object) -> str:
    return html.escape(str(value))
