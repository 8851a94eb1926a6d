"""The wheel: what is in it, under which names, and that it works without the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import ca2vdm_cli

ROOT = Path(__file__).parents[1]
PACKAGES = {"ca2vdm_cli": "ca2vdm_cli", "backends": "ca2vdm_backends", "presets": "ca2vdm_presets"}
DATA = ["*.yaml", "*/*.yaml", "*/*.safetensors", "*/*.md", "moving-digits/digits.png"]
"""What is installed of the presets; their scripts and curves are not."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder, source], check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder, patterns in (
            ("ca2vdm_cli", "ca2vdm_cli", ["**/*.py", "py.typed"]),
            ("ca2vdm_backends", "backends", ["*.py"]),
            ("ca2vdm_presets", "presets", ["__init__.py", *DATA]),
        )
        for pattern in patterns
        for path in (ROOT / folder).glob(pattern)
    }
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == expected
    moving_digits = {"preset.yaml", "model.safetensors", "autoencoder.safetensors", "digits.png", "DIGITS.md"}
    assert {f"ca2vdm_presets/moving-digits/{name}" for name in moving_digits} <= names


def test_wheel_installs_no_generic_names(wheel: Path) -> None:
    info = f"ca2vdm-{ca2vdm_cli.__version__}.dist-info"
    assert {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()} == {*PACKAGES.values(), info}


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"ca2vdm-{ca2vdm_cli.__version__}.dist-info"
    metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == ca2vdm_cli.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Provides-Extra") == ["bench", "latent", "train", "dev"]
    assert "torch<2.14,>=2.6" in (metadata.get_all("Requires-Dist") or [])
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= set(archive.namelist())
    links = dict(link.split(", ") for link in metadata.get_all("Project-URL") or [])
    assert {"Homepage", "Repository", "Documentation", "Changelog", "Issues", "Paper"} == links.keys()
    assert "ca2vdm = ca2vdm_cli.__main__:main" in archive.read(f"{info}/entry_points.txt").decode()


def test_wheel_works_without_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = """if True:
        import ca2vdm_backends, ca2vdm_cli
        from ca2vdm_cli.presets import list_presets
        print(ca2vdm_backends.__file__, ca2vdm_cli.__file__, *(preset.path for preset in list_presets()), sep="\\n")
    """
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        check=True,
        capture_output=True,
        text=True,
    )
    files = [Path(line) for line in run.stdout.splitlines()]
    assert len(files) == 2 + len([*(ROOT / "presets").glob("*.yaml"), *(ROOT / "presets").glob("*/preset.yaml")])
    assert all(file.is_relative_to(tmp_path) for file in files)
