"""What the benchmark's numbers mean: the verdict in words, and the files that are written of a report."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ca2vdm_cli.errors import as_user_error

Report = dict[str, Any]
"""What ``bench --json`` prints."""

OTHER_VIDEOS = (
    "bidirectional, fixed-window and per-step-cache make another video than cached does on the same weights: only "
    "their cost is compared."
)
"""Said wherever one of them is in a table."""


def verdict(report: Report) -> str:
    """The outcome in one line of words."""
    return "; ".join([_speed(report), *_memory(report), _exactness(report)])


def _speed(report: Report) -> str:
    measured = {name: ratio for name, ratio in report["speedup_per_chunk"].items() if ratio}
    if not report["speedup_per_chunk"]:
        return "cached alone was measured"
    if not measured:
        return "no chunk saw a full window: ask for more --frames"
    parts: list[str] = []
    for faster in (True, False):
        names = [name for name, ratio in measured.items() if (ratio >= 1) is faster]
        word = "faster" if faster else "slower"
        for i, name in enumerate(names):
            ratio = measured[name] if faster else 1 / measured[name]
            parts.append(f"{ratio:.2f}× {word} than {name}" if i == 0 else f"{ratio:.2f}× than {name}")
    steps = f"{report['steps']} step{'' if report['steps'] == 1 else 's'} a chunk"
    return f"cached is {_listed(parts)} at a {report['context_frames']}-frame window and {steps}"


def _memory(report: Report) -> Iterator[str]:
    results = report["results"]
    if "per-step-cache" in results:
        ratio = results["per-step-cache"]["cache_bytes"] / results["cached"]["cache_bytes"]
        yield f"{ratio:.3g}× less cache memory than per-step-cache"


def _exactness(report: Report) -> str:
    if report["outputs_agree"] is None:
        return "outputs not compared (that takes recompute)"
    apart = f"{report['max_abs_difference_before_slide']:.1e}"
    if not report["outputs_agree"]:
        return f"outputs DIFFER by {apart} before the window slides"
    return f"outputs equal to {apart} until the window slides (largest output {report['max_abs_output']:.1f})"


def warnings(report: Report) -> list[str]:
    """What is to be doubted in a report; empty if nothing is."""
    found = []
    for run in (report, *report["other_backends"]):
        where = run["backend"]
        if not run["flops_agree"]:
            worst = max(result["flops_error"] for result in run["results"].values())
            found.append(f"{where}: counted operations differ from the formula by up to {worst:.1%}")
        if not run["cache_bytes_agree"]:
            found.append(f"{where}: the cache's bytes differ from the formula")
        spread = run["results"]["cached"]["steady_seconds_per_step_spread"]
        if spread and spread["three_quarters"] > 1.3 * spread["quarter"]:
            found.append(f"{where}: the middle half of cached's steps spreads by more than 30 %: a busy machine?")
    return found


def write_text(path: Path, text: str) -> None:
    """Write a report's file.

    Raises:
        UserError: it can't be written.
    """
    with as_user_error(f"{path}: cannot be written"):
        path.write_text(text, encoding="utf-8")


def as_csv(report: Report) -> str:
    """A row for every chunk of every contestant, backend and repeat, in seconds, bytes and operations."""
    out = io.StringIO()
    columns = ["backend", "context_frames", "contestant", "repeat", "chunk", "first_frame", "seen_frames"]
    columns += ["cache_write_seconds", "denoise_seconds", "decode_seconds", "encode_seconds", "total_seconds"]
    columns += ["kept_bytes", "step_flops"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(columns)
    for run in (report, *report["other_backends"]):
        for name, result in run["results"].items():
            for number, repeat in enumerate(result["repeats"]):
                for chunk, steps in enumerate(repeat["seconds_per_step"]):
                    write, decode = repeat["write_seconds_per_chunk"][chunk], repeat["decode_seconds_per_chunk"][chunk]
                    writer.writerow(
                        [
                            run["backend"],
                            run["context_frames"],
                            name,
                            number,
                            chunk,
                            run["first_frame"] + chunk * report["chunk_frames"],
                            result["seen_frames_per_chunk"][chunk],
                            write,
                            sum(steps),
                            decode,
                            repeat["encode_seconds_per_chunk"][chunk],
                            write + sum(steps) + (decode or 0.0),
                            result["kept_bytes_per_chunk"][chunk],
                            result["step_flops_per_chunk"][chunk],
                        ]
                    )
    return out.getvalue()


_FACTS = (
    *("processor", "cores", "threads", "platform", "torch", "numpy", "python", "version", "date"),
    *("preset", "preset_sha256", "trained", "device", "dtype", "tokens_per_frame", "frames", "chunk_frames"),
    *("context_frames", "fixed_window_frames", "steps", "sampler", "seed", "repeat"),
)
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


def as_html(report: Report, svg: str, size: Any, duration: Any) -> str:
    """One self-contained page: verdict, plots, tables, machine.

    Args:
        report: what ``bench --json`` prints.
        svg: the plots, an ``<svg>`` element.
        size, duration: bytes and seconds as people read them.
    """
    body = [f"<h1>ca2vdm bench: {_text(report['preset'])}</h1>", f'<p class="verdict">{_text(report["verdict"])}</p>']
    body += [f'<p class="warning">{_text(line)}</p>' for line in warnings(report)]
    body.append(f"<figure>{svg}</figure>")
    for run in (report, *report["other_backends"]):
        body.append(f"<h2>{_text(run['backend'])}, {run['context_frames']}-frame window</h2>")
        body.append(_table(*costs_table(run, size, duration)))
        notes = [COSTS_NOTE, slide_note(run), OTHER_VIDEOS]
        body += [f'<p class="note">{_text(line)}</p>' for line in notes if line]
        body.append(f"<h2>Growth ({_text(run['backend'])})</h2>")
        body.append(_table(*growth_table(run)))
        body.append(f'<p class="note">{_text(GROWTH_NOTE)}</p>')
    facts = {name: report[name] for name in _FACTS}
    facts["matrix product rate"] = (
        f"{report['gemm_flops_per_second'] / 1e9:.0f} GFLOP/s (median of {'×'.join(map(str, report['gemm_shape']))})"
    )
    rows = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts.items())
    body.append(f"<h2>Machine and settings</h2><dl>{rows}</dl>")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>ca2vdm bench: {_text(report['preset'])}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{chr(10).join(body)}\n</body></html>\n"
    )


COSTS_NOTE = (
    "Medians of the steady state; below them how many times cached's they are, or how far cached's own spread. A "
    "chunk: denoising steps and cache write. In total: the whole video. frames/s: with decoding, where there is any. "
    "MFU: share of the machine's rate in matrix products of the same precision, measured in turns. Peak: what is kept "
    "and what computing takes, without the weights."
)
GROWTH_NOTE = (
    "The exponents e, fitted to the longer half of the lengths. Frames: a whole video of that length (memory: what is "
    "kept, and a denoising step on top). Context: one denoising step. –: fewer than three lengths."
)


_COSTS = {"time": "seconds", "FLOPs": "flops", "memory": "memory_bytes"}


def growth_table(run: Report) -> tuple[list[str], list[list[str]]]:
    """Fitted exponents: columns (``>`` at the end: numbers) and rows."""
    lengths = {"frames": "frames", "context_frames": "context"}
    columns = [f"{cost} ∝ {said}ᵉ>" for said in lengths.values() for cost in _COSTS]
    rows = [
        [name, *(_exponent(run["growth"][length][name], cost) for length in lengths for cost in _COSTS)]
        for name in run["results"]
    ]
    return ["", *columns], rows


def _operations(count: float) -> str:
    """As people read them: 170 G."""
    for unit in "kMGT":
        count /= 1000
        if count < 1000 or unit == "T":
            return f"{count:.3g} {unit}"
    raise AssertionError


def _exponent(curve: Report, cost: str) -> str:
    exponent = curve[f"{_COSTS[cost]}_exponent"]
    return "–" if exponent is None else f"{exponent:.2f}".replace("-0.00", "0.00")


TIME = ("", "a step>", "write>", "a chunk>", "decode>", "in total>", "frames/s>")
"""Columns of a first table that fits a terminal..."""
WORK = ("", "FLOPs a step>", "MFU>", "kept>", "peak>", "time ∝ framesᵉ>", "FLOPs ∝ framesᵉ>")
"""...and of a second."""


def costs_table(
    run: Report, size: Any, duration: Any, columns: Sequence[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """Costs in the steady state, see ``COSTS_NOTE``: columns and rows; a cell may have a second line.

    Args:
        run: of one backend.
        size, duration: bytes and seconds as people read them.
        columns: which, as far as they were measured; by default all but the exponents.
    """
    pixels = run["results"]["cached"]["decode_seconds"] is not None

    def shown(value: float | None, below: str = "") -> str:
        return "–" if value is None else f"{duration(value)}\n{below}"

    def worth(result: Report, name: str, part: str) -> str:
        """How many times cached's it is, or for cached itself how far its values spread."""
        ratio = run[f"speedup_per_{part}"].get(name)
        if ratio is not None:
            return f"{ratio:.2f}×"
        median, spread = result[f"steady_seconds_per_{part}"], result[f"steady_seconds_per_{part}_spread"]
        if not spread:
            return ""
        return f"{spread['min'] / median - 1:+.0%} {spread['max'] / median - 1:+.0%}"

    rows = []
    for name, result in run["results"].items():
        step, write = result["steady_seconds_per_step"], result["cache_write_seconds"]
        cells: dict[str, str | None] = {
            "": name,
            "a step>": shown(step, worth(result, name, "step")),
            "write>": shown(write, f"{write / step:.2f} steps") if name == "cached" and write else "–",
            "a chunk>": shown(result["steady_seconds_per_chunk"], worth(result, name, "chunk")),
            "decode>": shown(result["decode_seconds"]) if pixels else None,
            "encode>": shown(result["encode_seconds"]) if pixels else None,
            "in total>": shown(result["seconds"]),
            "first chunk>": shown(result["first_chunk_latency_seconds"]),
            "frames/s>": "–" if not result["steady_frames_per_second"] else f"{result['steady_frames_per_second']:.3g}",
            "FLOPs a step>": _operations(result["flops_per_step"]),
            "MFU>": "–" if result["mfu"] is None else f"{result['mfu']:.0%}",
            "kept>": size(result["context_bytes"]),
            "peak>": "–" if result["peak_memory_bytes"] is None else size(result["peak_memory_above_weights_bytes"]),
        }
        if columns is not None:
            growth = run["growth"]["frames"][name]
            cells |= {f"{word} ∝ framesᵉ>": _exponent(growth, word) for word in ("time", "FLOPs")}
            cells = {column: cells[column] for column in columns}
        rows.append({column: cell for column, cell in cells.items() if cell is not None})
    return list(rows[0]), [[cell.rstrip("\n") for cell in row.values()] for row in rows]


def slide_note(run: Report) -> str:
    """What the drift after the window has slid means; empty where it was not measured."""
    if run["max_abs_difference_after_slide"] is None:
        return ""
    return (
        f"After the window slides, cached and recompute differ by {run['max_abs_difference_after_slide']:.1e}: a "
        "recomputed frame has lost the frames before the window, a cached one remembers them."
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(name.rstrip('>'))}</th>" for name in columns)
    lines = []
    for row in rows:
        cells = []
        for cell in row:
            value, _, below = cell.partition("\n")
            cells.append(f"<td>{_text(value)}{f'<span>{_text(below)}</span>' if below else ''}</td>")
        lines.append(f"<tr{' class=ours' if row[0] == 'cached' else ''}>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _text(value: object) -> str:
    return html.escape(str(value))


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
