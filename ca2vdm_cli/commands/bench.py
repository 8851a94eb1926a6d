"""``bench``: what the cache gains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..bench import run_bench, whole_chunks
from ..pipeline import Pipeline
from ..terminal import ProgressBar, duration, output_console, print_json, size, table


def run(
    preset: str | None,
    checkpoint: Path | None,
    frames: int | None,
    steps: int | None,
    sampler: str | None,
    seed: int,
    context_frames: int | None,
    backend: str,
    device: str,
    dtype: str,
    overrides: list[str],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure and report."""
    pipeline = Pipeline.load(
        preset,
        checkpoint=checkpoint,
        overrides=overrides,
        backend=backend,
        device=device,
        dtype=dtype,
        random_weights=True,
        pixels=False,
        seed=seed,
    )
    chunks, length = whole_chunks(pipeline, frames, context_frames), pipeline.config.model.chunk_frames
    with ProgressBar("benchmark", chunks, chunks * length, quiet=quiet) as bar:
        report = run_bench(
            pipeline,
            chunks,
            steps=steps,
            sampler=sampler,
            seed=seed,
            context_frames=context_frames,
            on_chunk=lambda row: bar.advance(finished=(row.index + 1) * length),
        )
    if as_json:
        print_json(report)
    else:
        _print(report)


def _print(report: dict[str, Any]) -> None:
    out = output_console()
    weights = "trained weights" if report["trained"] else "random weights"
    speedup = report["speedup"]
    if speedup:
        ratio = f"{speedup:.2f}× faster" if speedup >= 1 else f"{1 / speedup:.2f}× slower"
        verdict = f"cached is {ratio} than recompute at a {report['context_frames']}-frame window"
    else:
        verdict = "no chunk saw a full window: ask for more --frames"
    apart = f"{report['max_abs_difference_before_slide']:.1e}"
    exact = f"outputs equal to {apart}" if report["outputs_agree"] else f"[red]outputs DIFFER by {apart}[/]"
    out.print(f"[bold]{verdict}, {exact} until the window slides (largest output {report['max_abs_output']:.1f})[/]")
    out.print(
        f"{report['preset']} ({weights}), {report['backend']} on {report['device']} in {report['dtype']}, "
        f"{report['frames']} frames in chunks of {report['chunk_frames']}, {report['steps']} steps, "
        f"{report['tokens_per_frame']} tokens a frame, weights {size(report['weights_bytes'])}"
    )

    def shown(seconds: float | None) -> str:
        return "–" if seconds is None else duration(seconds)

    rows = [
        [
            name,
            shown(result["steady_seconds_per_step"]),
            shown(result["cache_write_seconds"]) if name == "cached" else "–",
            shown(result["steady_seconds_per_chunk"]),
            shown(result["seconds"]),
            size(result["context_bytes"]),
            "–" if result["peak_memory_bytes"] is None else size(result["peak_memory_bytes"]),
        ]
        for name, result in report["results"].items()
    ]
    ratios = [report["speedup_per_step"], None, report["speedup"], report["speedup_total"]]
    rows.append(["ratio", *("" if ratio is None else f"{ratio:.2f}×" for ratio in ratios), "", ""])
    out.print(table(["", "a step>", "cache write>", "a chunk>", "in total>", "kept>", "peak>"], rows))
    if report["max_abs_difference_after_slide"] is not None:
        out.print(
            f"after the window slides they differ by {report['max_abs_difference_after_slide']:.1e}: a recomputed "
            "frame has lost the frames before the window, a cached one remembers them"
        )
