"""Command lines: flags of every command, with values that may suit others."""

from __future__ import annotations

from functools import cache
from typing import Any

import typer
from fuzz_material import Material
from fuzz_values import NUMBERS, TEXTS, Case
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from ca2vdm_cli.cli import app

FLAG_VALUES = st.one_of(
    NUMBERS.map(str),
    st.sampled_from(
        [
            *(
                "",
                "-1",
                "-0",
                "0",
                "1",
                "2",
                "1.5",
                "nan",
                "inf",
                "1e3",
                "٣",
                "x",
                "tiny",
                "none",
                "cpu",
                "meta",
                "cuda:99",
            ),
            *("eager", "sdpa", "eager,sdpa", "eager,", ",", "cached", "recompute", "fixed-window", "float32", "ddim"),
            *("missing", "missing/x", "clip.npz", "clip.mp4", "text.txt", "folder", "folder/", ".", "run", "a\x1b[2Jb"),
            *("out.npz", "out.mp4", "out.gif", "out.y4m", "out.xyz", "out.html", "out.csv", "out/", "x\0y", "é.npz"),
            *(
                "x" * 300,
                "9,5",
                "64x48",
                "0x0",
                "1x",
                "model",
                "crop",
                "pad",
                "1GiB",
                "-5GiB",
                "1 EiB",
                "model.depth=1",
            ),
            *(
                "model.depth=0",
                "model.depht=1",
                "=",
                "model",
                "sampling.frames=-1",
                "model.context_frames=12",
                "\ud800",
            ),
        ]
    ),
    TEXTS,
)
ENDINGS = {
    "sample": "--preset run --device cpu --backend eager --steps 1 --frames 2 --num-videos 1 --sampler ddim",
    "extend": "--preset run --device cpu --backend eager --steps 1 --frames 2 --num-videos 1 --sampler ddim",
    "train": "--preset tiny --device cpu --backend eager --steps 1 --set training.autoencoder_steps=1 --out new",
    "bench": "--preset tiny --device cpu --backend eager --steps 1 --frames 8 --repeat 1",
    "plan": "--preset tiny --device cpu --backend eager --steps 1",
    "verify": "--preset tiny --device cpu --backend eager --steps 1",
}
"""Arguments that keep a command short; a case leaves out or repeats a few of them."""


@cache
def flags() -> dict[str, list[tuple[str, bool]]]:
    """Each command's flags, and whether they take a value; commands of groups as ``presets show``."""
    root: Any = typer.main.get_command(app)
    commands = dict(root.commands)
    for name, command in root.commands.items():
        commands |= {f"{name} {inner}": group for inner, group in getattr(command, "commands", {}).items()}
    return {
        name: [
            (flag, not getattr(parameter, "is_flag", False))
            for parameter in command.params
            if parameter.param_type_name == "option"
            for flag in parameter.opts
        ]
        for name, command in commands.items()
    }


@st.composite
def commands(draw: DrawFn, material: Material) -> Case:
    """A command with some of its flags, and with values that may suit other flags."""
    command = draw(st.sampled_from(sorted(flags())))
    own = flags()[command]
    words: list[str] = []
    for _ in range(draw(st.integers(0, 2 if command in ENDINGS else 3))):
        flag, takes_value = draw(st.sampled_from(own)) if own else ("--json", False)
        words.append(flag)
        if takes_value and draw(st.integers(0, 19)):
            words.append(draw(FLAG_VALUES))
    if command == "extend":
        words.insert(
            0, draw(st.sampled_from(["clip.npz", "clip.npz", "clip.mp4", "text.txt", "missing", "folder", "-", "."]))
        )
    elif draw(st.integers(0, 5)) == 0 or command in ("presets show", "import"):
        words.insert(draw(st.integers(0, len(words))), draw(FLAG_VALUES))
    if draw(st.integers(0, 30)) == 0:
        words.append(draw(st.sampled_from(["--", "--help", "-h", "--debugx", "-", "--frames=", "-qq", "--version"])))
    ending = ENDINGS.get(command, "").split()
    given = {word.partition("=")[0] for word in words}
    for i in range(0, len(ending), 2):  # a flag that was given bounds the work itself only if its value is refused
        if ending[i] in ("--backend", "--device") and ending[i] in given and draw(st.booleans()):
            continue
        if ending[i] == "--preset" and {"--checkpoint", "--recorded", "--preset"} & given and draw(st.booleans()):
            continue
        words += ending[i : i + 2]
    return Case((*command.split(), *words), material.surroundings)
