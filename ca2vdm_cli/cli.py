"""The command line: every flag, and nothing else. Each command imports what it needs when it runs.

This module must stay free of torch, so that ``--help`` is instant.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .errors import UsageError
from .options import Aspect, Dtype

# newer versions of typer carry their own copy of click
_click = import_module("typer._click.exceptions" if find_spec("typer._click") else "click.exceptions")

app = typer.Typer(
    name="ca2vdm",
    help="Long videos from a causal video diffusion model: each frame's keys and values are computed once and cached.",
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="--debug, with any command, shows the traceback of an error.",
)


def _preset_names() -> list[str]:
    from .presets import preset_names

    return preset_names()


def _builtin_names(kind: str) -> list[str]:
    """Names for shell completion. Plug-ins are left out: loading them may take seconds."""
    from . import plugins

    registry = getattr(plugins, kind)
    return [*(name for name in registry.reserved if name == plugins.AUTO), *registry.builtin_names()]


def _listed(names: Callable[[], list[str]]) -> Callable[[str], list[str]]:
    """Completion of the last entry of a list such as ``sdpa,eager``."""

    def complete(incomplete: str) -> list[str]:
        *given, _ = incomplete.split(",")
        return [",".join([*given, name]) for name in names() if name not in given]

    return complete


def _whole(least: int, most: int | None = None) -> Callable[[str | int], int]:
    """Reads a whole number. Unlike a range of typer's, it leaves the help to say in words what is allowed."""

    def number(value: str | int) -> int:
        try:
            number = int(value)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            allowed = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise typer.BadParameter(f"{value!r} is not a whole number {allowed}")
        return number

    return number


def _scale(value: str | float) -> float:
    """Reads a number that is not negative."""
    with suppress(ValueError):
        if (number := float(value)) >= 0 and number != float("inf"):
            return number
    raise typer.BadParameter(f"{value!r} is not a number of at least 0")


PresetOption = Annotated[
    str | None,
    typer.Option(
        metavar="PRESET",
        help="A preset's name, file or folder (see `ca2vdm presets`). Default: moving-digits.",
        autocompletion=_preset_names,
    ),
]
CheckpointOption = Annotated[
    Path | None,
    typer.Option(metavar="PATH", help="Weights to use: a safetensors file, or the folder of a training run."),
]
FramesOption = Annotated[
    int | None,
    typer.Option(
        parser=_whole(1), metavar="N", help="Length in frames, at least 1; there is no limit. Default: the preset's."
    ),
]
NumVideosOption = Annotated[
    int,
    typer.Option(parser=_whole(1), metavar="N", help="Number of videos, at least 1; their outputs are numbered."),
]
LARGEST_SEED = 2**63 - 1
SeedOption = Annotated[
    int,
    typer.Option(
        parser=_whole(0, LARGEST_SEED),
        metavar="N",
        help="Random seed, from 0 to 2^63 - 1. Frames do not depend on length or batch size.",
    ),
]
StepsOption = Annotated[
    int | None,
    typer.Option(parser=_whole(1), metavar="N", help="Denoising steps per chunk, at least 1. Default: the preset's."),
]
SamplerOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="ancestral, ddim, dpm++, log-snr, trailing, or a scheduler class of diffusers. Default: the preset's.",
        autocompletion=lambda: _builtin_names("samplers"),
    ),
]
BackendOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="Attention backend (see `ca2vdm backends`); auto picks the best.",
        autocompletion=lambda: _builtin_names("backends"),
    ),
]
DeviceOption = Annotated[str, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1, …")]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Data type of the model; auto is bfloat16 if the device has native support for it.")
]
StrategyOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="How the network sees finished frames: cached, recompute, or another context (see `ca2vdm plugins`).",
        autocompletion=lambda: _builtin_names("contexts"),
    ),
]
ContextOption = Annotated[
    int | None,
    typer.Option(parser=_whole(1), metavar="N", help="Window in frames, at least 1. Default: the preset's."),
]
PromptOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What the video should show, for presets with a text encoder.")
]
GuidanceOption = Annotated[
    float | None,
    typer.Option(
        parser=_scale,
        metavar="SCALE",
        help="Guidance scale, at least 0: how closely to follow the prompt. Default: the preset's.",
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a setting, e.g. model.sink_frames=2. Repeatable."),
]
OutputOption = Annotated[
    str | None,
    typer.Option(
        "-o",
        "--output",
        metavar="PATH|-",
        help="An mp4, mkv, gif, npz or y4m file, a folder for PNGs (ends in /), or - for y4m on standard output.",
    ),
]
FormatOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help="mp4, mkv, gif, npz, y4m or png, overriding the suffix; mkv or y4m on standard output."
    ),
]
FpsOption = Annotated[
    float | None,
    typer.Option(metavar="FPS", help="Frames per second of the output. Default: the input's, or the preset's."),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object with all results on standard output; keys: docs/json.md.")
]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")]
RunOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Keep each finished chunk in this folder, so that `ca2vdm resume DIR` can go on."),
]
ManifestOption = Annotated[
    bool,
    typer.Option("--manifest", help="Write OUTPUT.json: how it was made, for `ca2vdm reproduce`."),
]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Try it even if the estimate says that there is too little memory.")
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ca2vdm {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
def sample(
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    frames: FramesOption = None,
    first_frame: Annotated[
        str | None, typer.Option(metavar="IMAGE|VIDEO", help="Start from this image, or from a video's first frame.")
    ] = None,
    num_videos: NumVideosOption = 1,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    sampler: SamplerOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    strategy: StrategyOption = "cached",
    context_frames: ContextOption = None,
    prompt: PromptOption = None,
    guidance: GuidanceOption = None,
    set_: SetOption = None,
    output: OutputOption = None,
    format: FormatOption = None,
    fps: FpsOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    overwrite: OverwriteOption = False,
    force: ForceOption = False,
    run: RunOption = None,
    manifest: ManifestOption = False,
) -> None:
    """Generate a video of any length.

    It starts from scratch, or from a given first frame.
    """
    from .commands.generate import run_sample
    from .commands.outputs import OutputOptions

    run_sample(
        load={
            "preset": preset,
            "checkpoint": checkpoint,
            "overrides": set_ or [],
            "backend": backend,
            "device": device,
            "dtype": dtype.value,
            "force": force,
        },
        options={
            "seed": seed,
            "steps": steps,
            "sampler": sampler,
            "strategy": strategy,
            "context_frames": context_frames,
            "prompt": prompt,
            "guidance": guidance,
        },
        output=OutputOptions(
            path=output,
            format=format,
            fps=fps,
            overwrite=overwrite,
            as_json=json,
            quiet=quiet,
            run=run,
            manifest=manifest,
        ),
        frames=frames,
        num_videos=num_videos,
        first_frame=first_frame,
    )


@app.command()
def extend(
    input: Annotated[
        str,
        typer.Argument(metavar="INPUT|-", help="A video, an image, a folder of images, or - for standard input."),
    ],
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    frames: Annotated[
        int | None,
        typer.Option(parser=_whole(1), metavar="N", help="Number of new frames, at least 1. Default: the preset's."),
    ] = None,
    only_new: Annotated[bool, typer.Option("--only-new", help="Write only the new frames, without the input.")] = False,
    aspect: Annotated[
        Aspect, typer.Option(help="If the input's aspect ratio is not the model's: crop, add bars, or stretch.")
    ] = Aspect.STRETCH,
    size: Annotated[
        str | None, typer.Option(metavar="WxH|model", help="Size of the output. Default: the input's.")
    ] = None,
    num_videos: NumVideosOption = 1,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    sampler: SamplerOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    strategy: StrategyOption = "cached",
    context_frames: ContextOption = None,
    prompt: PromptOption = None,
    guidance: GuidanceOption = None,
    set_: SetOption = None,
    output: OutputOption = None,
    format: FormatOption = None,
    fps: FpsOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    overwrite: OverwriteOption = False,
    force: ForceOption = False,
    run: RunOption = None,
    manifest: ManifestOption = False,
) -> None:
    """Continue a video.

    Its last frames fill the cache, and new frames follow. Audio is dropped.
    """
    from .commands.generate import run_extend
    from .commands.outputs import OutputOptions

    run_extend(
        load={
            "preset": preset,
            "checkpoint": checkpoint,
            "overrides": set_ or [],
            "backend": backend,
            "device": device,
            "dtype": dtype.value,
            "force": force,
        },
        options={
            "seed": seed,
            "steps": steps,
            "sampler": sampler,
            "strategy": strategy,
            "context_frames": context_frames,
            "prompt": prompt,
            "guidance": guidance,
        },
        output=OutputOptions(
            path=output,
            format=format,
            fps=fps,
            overwrite=overwrite,
            as_json=json,
            quiet=quiet,
            run=run,
            manifest=manifest,
        ),
        frames=frames,
        num_videos=num_videos,
        source=input,
        only_new=only_new,
        aspect=aspect,
        size=size,
    )


@app.command()
def resume(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder that was given with --run.")],
    from_frame: Annotated[
        int | None,
        typer.Option(
            parser=_whole(1), metavar="N", help="Make another take that differs from frame N of the output on."
        ),
    ] = None,
    run: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the new take.")] = None,
    seed: Annotated[
        int | None,
        typer.Option(parser=_whole(0, LARGEST_SEED), metavar="N", help="Seed of the new take. Default: the same."),
    ] = None,
    prompt: PromptOption = None,
    guidance: Annotated[
        float | None, typer.Option(parser=_scale, metavar="SCALE", help="Guidance scale of the new take, at least 0.")
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(parser=_whole(1), metavar="N", help="Another length, at least the run's. Default: the run's."),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Another attention backend. Default: the run's.")] = None,
    device: Annotated[str | None, typer.Option(help="Another device. Default: the run's.")] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="PATH|-", help="Another output. Default: the run's.")
    ] = None,
    format: FormatOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    overwrite: OverwriteOption = False,
    manifest: ManifestOption = False,
) -> None:
    """Continue a run of `sample` or `extend`, or make another take of it.

    Finished chunks are decoded again but not generated again, and the video is the same as without the interruption.
    """
    from .commands.outputs import OutputOptions
    from .commands.resume import TakeOptions
    from .commands.resume import run as resume_run

    resume_run(
        folder,
        output=OutputOptions(
            path=output,
            format=format,
            fps=None,
            overwrite=overwrite,
            as_json=json,
            quiet=quiet,
            run=run,
            manifest=manifest,
        ),
        take=TakeOptions(from_frame=from_frame, frames=frames, seed=seed, prompt=prompt, guidance=guidance),
        backend=backend,
        device=device,
    )


@app.command()
def runs(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Run folders, or folders with runs inside.")],
    json: JsonOption = False,
) -> None:
    """List runs of `sample` and `extend` as a tree of takes.

    Shows how far each is, whether it is running, and what it takes on disk.
    """
    from .commands.runs import run as list_runs

    list_runs(folders, as_json=json)


@app.command()
def reproduce(
    manifest: Annotated[Path, typer.Argument(metavar="FILE.json", help="What --manifest wrote beside a video.")],
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="PATH", help="Write the video too. Default: only compare.")
    ] = None,
    format: FormatOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    overwrite: OverwriteOption = False,
) -> None:
    """Make a video again from its manifest, and compare the frames.

    The exit code is 1 if they differ.
    """
    from .commands.outputs import OutputOptions
    from .commands.reproduce import run as reproduce_run

    options = OutputOptions(
        path=output, format=format, fps=None, overwrite=overwrite, as_json=json, quiet=quiet, manifest=False
    )
    raise typer.Exit(reproduce_run(manifest, output=options))


@app.command()
def train(
    preset: PresetOption = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="PATH", help="A data set, or one video. Default: the preset's synthetic data."),
    ] = None,
    aspect: Annotated[
        Aspect | None,
        typer.Option(help="How to fit videos with another aspect ratio: crop, add bars, or stretch (default)."),
    ] = None,
    validation_data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Held-out videos for validation. Default: other synthetic clips, the data's test split, or else the "
            "training data.",
        ),
    ] = None,
    check_data: Annotated[
        bool, typer.Option("--check-data", help="Only read the data, and report what is in it.")
    ] = False,
    cache_latents: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Encode the videos once, and cache their latents.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the run: weights and checkpoints.")] = Path(
        "runs/train"
    ),
    steps: Annotated[
        int | None,
        typer.Option(parser=_whole(1), metavar="N", help="Optimizer steps, at least 1. Default: the preset's."),
    ] = None,
    max_minutes: Annotated[
        float | None,
        typer.Option(
            metavar="N", help="End after N minutes: fewer steps if need be, with the learning rate's schedule fitted."
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH", help="Weights to start from (fine-tuning): a file, or the folder of a training run."
        ),
    ] = None,
    widen: Annotated[
        bool,
        typer.Option("--widen", help="Double the width of the starting weights, keeping their outputs, then train."),
    ] = False,
    distill: Annotated[
        Path | None,
        typer.Option(metavar="WEIGHTS", help="Weights or run folder of a trained model, to distill into a few steps."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    seed: Annotated[
        int | None,
        typer.Option(
            parser=_whole(0, LARGEST_SEED),
            metavar="N",
            help="Seed of all randomness, from 0 to 2^63 - 1. Default: 0, or the resumed run's.",
        ),
    ] = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    force: ForceOption = False,
) -> None:
    """Train a model on videos, or on synthetic data."""
    fit = None if aspect is None else aspect.value
    if check_data:
        from .commands.check_data import run as check

        run_folder = distill if distill is not None and distill.is_dir() else out if resume else None
        check(preset, checkpoint or run_folder, data, fit, set_ or [], as_json=json, quiet=quiet)
        return
    from .commands.train import run

    run(
        preset,
        data=data,
        aspect=fit,
        validation_data=validation_data,
        cache_latents=cache_latents,
        out=out,
        steps=steps,
        checkpoint=checkpoint,
        widen=widen,
        distill=distill,
        resume=resume,
        max_minutes=max_minutes,
        seed=seed,
        backend=backend,
        device=device,
        overrides=set_ or [],
        as_json=json,
        quiet=quiet,
        force=force,
    )


@app.command()
def bench(
    compare: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,…",
            help="Baselines to compare the cache with: recompute, recompute-extendable, bidirectional, fixed-window, "
            "per-step-cache, or your own context; `cached` measures the cache alone.",
            autocompletion=_listed(lambda: _builtin_names("contexts")),
        ),
    ] = "recompute",
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="PRESET",
            help="A preset's name, file or folder. Default: bench-small.",
            show_default=False,
            autocompletion=_preset_names,
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    frames: Annotated[
        int | None,
        typer.Option(
            parser=_whole(1), metavar="N", help="Length in frames, at least 1. Default: two chunks past the window."
        ),
    ] = None,
    context_frames: Annotated[
        str | None,
        typer.Option(
            metavar="P,P,…",
            help="Window of the video; if several, one chunk is measured at each of the others. Default: the preset's.",
        ),
    ] = None,
    fixed_window: Annotated[
        int | None,
        typer.Option(
            parser=_whole(1), metavar="N", help="Window of fixed-window in frames, at least 1. Default: one chunk."
        ),
    ] = None,
    steps: StepsOption = None,
    sampler: SamplerOption = None,
    seed: SeedOption = 0,
    repeat: Annotated[
        int,
        typer.Option(
            parser=_whole(1), metavar="N", help="Generate the video N times, at least once, and report medians."
        ),
    ] = 1,
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,…",
            help="Backends to measure, one after another; see `ca2vdm backends`.",
            autocompletion=_listed(lambda: _builtin_names("backends")),
        ),
    ] = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    set_: SetOption = None,
    output: Annotated[
        list[Path] | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE",
            help="Write a report: .html (plots and tables), .json (all figures), .csv (one row per chunk), or the "
            "plots alone as .png, .svg or .pdf. Repeatable.",
        ),
    ] = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    force: ForceOption = False,
) -> None:
    """Benchmark the cache against baselines.

    All methods use the same weights, seed, backend and dtype, and run in alternating order.
    """
    from .commands.bench import run

    run(
        compare=compare,
        preset=preset or ("bench-small" if checkpoint is None else None),
        checkpoint=checkpoint,
        frames=frames,
        context_frames=context_frames,
        fixed_window=fixed_window,
        steps=steps,
        sampler=sampler,
        seed=seed,
        repeat=repeat,
        backend=backend,
        device=device,
        dtype=dtype.value,
        overrides=set_ or [],
        outputs=output or [],
        as_json=json,
        quiet=quiet,
        force=force,
    )


@app.command()
def plan(
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    frames: FramesOption = None,
    steps: StepsOption = None,
    sampler: SamplerOption = None,
    context_frames: ContextOption = None,
    cache_budget: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Memory for the cache, e.g. 1GiB. Default: all available memory."),
    ] = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.AUTO,
    set_: SetOption = None,
    json: JsonOption = False,
) -> None:
    """Estimate the cost of a video before it is generated.

    Reports cache size, memory, operations, time, and the longest window that fits the cache budget. Time is estimated
    by measuring this machine for about two seconds.
    """
    from .commands.plan import run

    run(
        preset=preset,
        checkpoint=checkpoint,
        frames=frames,
        steps=steps,
        sampler=sampler,
        context_frames=context_frames,
        cache_budget=cache_budget,
        backend=backend,
        device=device,
        dtype=dtype.value,
        overrides=set_ or [],
        as_json=json,
    )


@app.command()
def verify(
    preset: PresetOption = None,
    checkpoint: CheckpointOption = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,…",
            help="Exact contexts to compare with cached, your own included. Default: recompute.",
            autocompletion=_listed(lambda: ["recompute", "recompute-extendable"]),
        ),
    ] = None,
    recorded: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Check against a recorded run instead, with the weights in that file."),
    ] = None,
    steps: StepsOption = None,
    seed: SeedOption = 0,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    dtype: Annotated[Dtype, typer.Option(help="Data type; float32 reveals the smallest errors.")] = Dtype.FLOAT32,
    set_: SetOption = None,
    json: JsonOption = False,
    force: ForceOption = False,
) -> None:
    """Check that cached and recomputed frames are equal.

    Uses your own weights, or those of a recorded run. The exit code is 1 if any frames differ.
    """
    from .commands.verify import run

    code = run(
        preset=preset,
        checkpoint=checkpoint,
        recorded=recorded,
        compare=compare,
        steps=steps,
        seed=seed,
        backend=backend,
        device=device,
        dtype=dtype.value,
        overrides=set_ or [],
        as_json=json,
        force=force,
    )
    raise typer.Exit(code)


@app.command("import")
def import_(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            help="A checkpoint in the published format: a file, an index of shards, or a folder.",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The safetensors file to write.")],
    preset: Annotated[
        str,
        typer.Option(metavar="PRESET", help="The preset that the weights are for.", autocompletion=_preset_names),
    ],
    dtype: Annotated[
        Dtype, typer.Option(help="Data type of the written weights; auto keeps each tensor's own.")
    ] = Dtype.AUTO,
    partial: Annotated[
        bool, typer.Option("--partial", help="Accept missing tensors; they are initialized at random.")
    ] = False,
    set_: SetOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Turn a published checkpoint into weights for a preset.

    Reports which tensors matched, were missing or were left over. Nothing is unpickled.
    """
    from .commands.convert import run

    run(
        checkpoint=checkpoint,
        output=output,
        preset=preset,
        dtype=dtype.value,
        overrides=set_ or [],
        partial=partial,
        overwrite=overwrite,
    )


@app.command()
def backends(json: JsonOption = False, device: DeviceOption = "auto", dtype: DtypeOption = Dtype.AUTO) -> None:
    """List the backends and whether each is available.

    If one is not, the reason is shown.
    """
    from .commands.catalog import list_backends

    list_backends(device=device, dtype=dtype, as_json=json)


@app.command()
def plugins(json: JsonOption = False) -> None:
    """List everything that plug-ins can add.

    Shows each backend, sampler, context, autoencoder, reader and metric, and who registered it. docs/plugins.md
    explains how to write a plug-in.
    """
    from .commands.catalog import list_plugins

    list_plugins(as_json=json)


presets_app = typer.Typer(
    help="List the presets; `presets show NAME` prints one.", invoke_without_command=True, rich_markup_mode=None
)
app.add_typer(presets_app, name="presets")


@presets_app.callback()
def presets(context: typer.Context, json: JsonOption = False) -> None:
    """List the presets; `presets show NAME` prints one."""
    if context.invoked_subcommand is None:
        from .commands.catalog import list_presets

        list_presets(as_json=json)


@presets_app.command("show")
def presets_show(
    name: Annotated[str, typer.Argument(help="A preset's name, file or folder.", autocompletion=_preset_names)],
    set_: SetOption = None,
) -> None:
    """Print a preset as YAML: every setting, with a comment that explains it."""
    from .commands.catalog import show_preset

    show_preset(name, overrides=set_ or [])


def _name_the_flags(error: UsageError, flags: dict[str, str]) -> None:
    """Put flags in place of arguments in a library's error: where it begins with one, ``seed:``, and in backticks."""
    argument, colon, problem = str(error).partition(":")
    message = f"{flags[argument]}:{problem}" if colon and argument in flags else str(error)
    error.args = (re.sub(r"`(\w+)`", lambda name: flags.get(name[1], name[0]), message),)


@cache
def _command() -> Any:
    """The commands with their flags: built once, since that takes longer than parsing a command line."""
    return typer.main.get_command(app)


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code. Errors, Ctrl-C and closed pipes pass through.

    Raises:
        UsageError: an unknown command or flag, or a value that a flag does not accept.
    """
    command = _command()
    if "_CA2VDM_COMPLETE" in os.environ:  # the shell asks for completions
        command(prog_name="ca2vdm")
    try:  # not command.main(), which would handle Ctrl-C and closed pipes itself
        with command.make_context("ca2vdm", arguments or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as end:
        return end.exit_code
    except _click.ClickException as error:
        path = error.ctx.command_path if getattr(error, "ctx", None) else "ca2vdm"
        raise UsageError(f"{error.format_message().rstrip('.')} (see {path} --help)") from error
    except UsageError as error:
        parameters = command.commands[context.invoked_subcommand].params
        flags = {p.name: max(p.opts, key=len) for p in parameters if p.param_type_name == "option"}
        _name_the_flags(error, flags | {"overrides": "--set", "teacher": "--distill", "baselines": "--compare"})
        raise
    return 0
