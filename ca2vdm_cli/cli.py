"""The command line: every flag, and nothing else. Each command imports what it needs when it runs.

This module must stay free of torch, so that ``--help`` is instant.
"""

from __future__ import annotations

import os
import re
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


PresetOption = Annotated[
    str | None,
    typer.Option(
        help="A preset's name, file or folder (see `ca2vdm presets`). Default: moving-digits.",
        autocompletion=_preset_names,
    ),
]
CheckpointOption = Annotated[
    Path | None, typer.Option(help="Weights to use: a safetensors file, or the folder of a training run.")
]
FramesOption = Annotated[
    int | None, typer.Option(min=1, help="Length in frames; there is no limit. Default: the preset's.")
]
NumVideosOption = Annotated[int, typer.Option(min=1, help="Number of videos; their outputs are numbered.")]
LARGEST_SEED = 2**63 - 1
SeedOption = Annotated[
    int, typer.Option(min=0, max=LARGEST_SEED, help="Random seed. Frames do not depend on length or batch size.")
]
StepsOption = Annotated[int | None, typer.Option(min=1, help="Denoising steps per chunk. Default: the preset's.")]
SamplerOption = Annotated[
    str | None,
    typer.Option(
        help="ancestral, ddim, dpm++, log-snr, trailing, or a scheduler class of diffusers. Default: the preset's.",
        autocompletion=lambda: _builtin_names("samplers"),
    ),
]
BackendOption = Annotated[
    str,
    typer.Option(
        help="Attention backend (see `ca2vdm backends`); auto picks the best.",
        autocompletion=lambda: _builtin_names("backends"),
    ),
]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
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
ContextOption = Annotated[int | None, typer.Option(min=1, help="Window in frames. Default: the preset's.")]
PromptOption = Annotated[
    str | None, typer.Option(metavar="TEXT", help="What the video should show, for presets with a text encoder.")
]
GuidanceOption = Annotated[
    float | None, typer.Option(min=0, help="Guidance scale: how closely to follow the prompt. Default: the preset's.")
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
    typer.Option(help="mp4, mkv, gif, npz, y4m or png, overriding the suffix; mkv or y4m on standard output."),
]
FpsOption = Annotated[
    float | None, typer.Option(help="Frames per second of the output. Default: the input's, or the preset's.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object with all results on standard output; keys: docs/json.md.")
]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Print errors only.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]


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
) -> None:
    """Generate a video of any length.

    It starts from scratch, or from a given first frame.
    """
    from .commands.generate import OutputOptions, run_sample

    run_sample(
        load={
            "preset": preset,
            "checkpoint": checkpoint,
            "overrides": set_ or [],
            "backend": backend,
            "device": device,
            "dtype": dtype.value,
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
        output=OutputOptions(path=output, format=format, fps=fps, overwrite=overwrite, as_json=json, quiet=quiet),
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
    frames: Annotated[int | None, typer.Option(min=1, help="Number of new frames. Default: the preset's.")] = None,
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
) -> None:
    """Continue a video.

    Its last frames fill the cache, and new frames follow. Audio is dropped.
    """
    from .commands.generate import OutputOptions, run_extend

    run_extend(
        load={
            "preset": preset,
            "checkpoint": checkpoint,
            "overrides": set_ or [],
            "backend": backend,
            "device": device,
            "dtype": dtype.value,
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
        output=OutputOptions(path=output, format=format, fps=fps, overwrite=overwrite, as_json=json, quiet=quiet),
        frames=frames,
        num_videos=num_videos,
        source=input,
        only_new=only_new,
        aspect=aspect,
        size=size,
    )


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
            help="Held-out videos for validation. Default: other synthetic clips, or else the training data.",
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
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps. Default: the preset's.")] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights to start from (fine-tuning): a file, or the folder of a training run.")
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
        typer.Option(min=0, max=LARGEST_SEED, help="Seed of all randomness. Default: 0, or the resumed run's."),
    ] = None,
    backend: BackendOption = "auto",
    device: DeviceOption = "auto",
    set_: SetOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
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
        seed=seed,
        backend=backend,
        device=device,
        overrides=set_ or [],
        as_json=json,
        quiet=quiet,
    )


@app.command()
def bench(
    compare: Annotated[
        str,
        typer.Option(
            metavar="NAME,NAME,…",
            help="Baselines to compare the cache with: recompute, recompute-extendable, bidirectional, fixed-window, "
            "per-step-cache, or your own context; `cached` measures the cache alone.",
        ),
    ] = "recompute",
    preset: Annotated[
        str | None,
        typer.Option(
            help="A preset's name, file or folder. Default: bench-small.",
            show_default=False,
            autocompletion=_preset_names,
        ),
    ] = None,
    checkpoint: CheckpointOption = None,
    frames: Annotated[
        int | None, typer.Option(min=1, help="Length in frames. Default: two chunks past the window.")
    ] = None,
    context_frames: Annotated[
        str | None,
        typer.Option(
            metavar="P,P,…",
            help="Window of the video; if several, one chunk is measured at each of the others. Default: the preset's.",
        ),
    ] = None,
    fixed_window: Annotated[int | None, typer.Option(min=1, help="Window of fixed-window. Default: one chunk.")] = None,
    steps: StepsOption = None,
    sampler: SamplerOption = None,
    seed: SeedOption = 0,
    repeat: Annotated[int, typer.Option(min=1, help="Generate the video this many times, and report medians.")] = 1,
    backend: Annotated[
        str, typer.Option(metavar="NAME,NAME,…", help="Backends to measure, one after another; see `ca2vdm backends`.")
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
            metavar="NAME,NAME,…", help="Exact contexts to compare with cached, your own included. Default: recompute."
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
    )
    raise typer.Exit(code)


@app.command("import")
def import_(
    checkpoint: Annotated[
        Path,
        typer.Argument(metavar="CHECKPOINT", help="A state dict in the published format: .pt, .pth or .safetensors."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The safetensors file to write.")],
    preset: Annotated[str, typer.Option(help="The preset that the weights are for.", autocompletion=_preset_names)],
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


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code. Errors, Ctrl-C and closed pipes pass through.

    Raises:
        UsageError: an unknown command or flag, or a value that a flag does not accept.
    """
    command: Any = typer.main.get_command(app)
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
        _name_the_flags(error, flags | {"overrides": "--set", "teacher": "--distill"})
        raise
    return 0
