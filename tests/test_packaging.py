"""The wheel: its files, their names, its metadata, and that it works without the source tree."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from command_kit import ROOT

import ca2vdm_cli
from ca2vdm_cli.presets import preset_names

pytestmark = pytest.mark.slow

PACKAGES = {"ca2vdm_cli": "ca2vdm_cli", "backends": "ca2vdm_backends", "presets": "ca2vdm_presets"}
"""Folder of each package: its name once installed."""
DATA = {".yaml", ".safetensors", ".md"}
"""Data files of presets; besides these, only the default preset's digits.png."""
LEGAL = [name for name in ("LICENSE", "NOTICE") if (ROOT / name).exists()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources without the network."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", *LEGAL):
        shutil.copy(ROOT / name, source)
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", folder, source], check=True)
    (path,) = folder.glob("*.whl")
    return path


def test_wheel_holds_every_module_and_data_file(wheel: Path) -> None:
    """Scripts beside a preset, and pictures for its README, are not installed."""
    code = [path for folder in ("ca2vdm_cli", "backends") for path in (ROOT / folder).rglob("*.py")]
    data = [path for path in (ROOT / "presets").rglob("*") if path.suffix in DATA or path.name == "digits.png"]
    files = [*code, *data, ROOT / "ca2vdm_cli" / "py.typed", ROOT / "presets" / "__init__.py"]
    relative = [path.relative_to(ROOT).parts for path in files]
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == {"/".join([PACKAGES[folder], *rest]) for folder, *rest in relative}
    assert {"preset.yaml", "digits.png", "DIGITS.md"} <= {
        name.removeprefix("ca2vdm_presets/moving-digits/") for name in names
    }


def test_wheel_installs_no_generic_names(wheel: Path) -> None:
    info = f"ca2vdm-{ca2vdm_cli.__version__}.dist-info"
    assert {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()} == {*PACKAGES.values(), info}


def test_wheel_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = f"ca2vdm-{ca2vdm_cli.__version__}.dist-info"
    metadata = Parser().parsestr(archive.read(f"{info}/METADATA").decode())
    assert metadata["Version"] == ca2vdm_cli.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_all("Provides-Extra") == ["bench", "heic", "latent", "train", "dev"]
    assert "torch<2.14,>=2.6" in (metadata.get_all("Requires-Dist") or [])
    assert {f"{info}/licenses/{name}" for name in LEGAL} <= set(archive.namelist())
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
    assert len(files) == 2 + len(preset_names())
    assert all(file.is_relative_to(tmp_path) for file in files)
