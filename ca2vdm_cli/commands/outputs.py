"""Where the videos of ``sample`` and ``extend`` go: names, which are reserved while a process writes them."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.files import reserved
from ca2vdm_cli.processes import launched


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """The flags that determine where the videos go and what the command prints."""

    path: str | None
    format: str | None
    fps: float | None
    overwrite: bool
    as_json: bool
    quiet: bool
    run: Path | None = None
    """The run folder, if the run is to be resumable."""
    manifest: bool = False
    """Whether each output gets a sidecar that says how it was made."""

    def targets(self, num_videos: int, default: str, reservations: ExitStack) -> list[str]:
        """One output per video; several are numbered.

        Without ``-o`` they go into the run folder, or else get the first unused name, which is reserved.
        """
        path = self.path
        self._check_standard_output(num_videos)
        suffix = "/" if self.format == "png" else f".{self.format or 'mp4'}"
        if path is None and self.run is not None:
            path = str(self.run / f"{default}{suffix}")
        elif path is None:
            if launched()[1] > 1:
                raise UsageError("-o: required when several processes share the videos, because each writes its own")
            names = [default] if self.overwrite else (f"{default}{'' if n == 0 else f'-{n}'}" for n in count())
            path = next((f"{n}{suffix}" for n in names if self._take(f"{n}{suffix}", num_videos, reservations)), None)
            if path is None:
                raise UsageError(f"{default}{suffix}: another process is writing it; name another output with -o")
        return numbered(path, num_videos, self.format)

    def reserve(self, target: str, reservations: ExitStack) -> None:
        """Reserve an output that was named.

        Raises:
            UsageError: another process is writing it.
        """
        special = target == "-" or (os.path.exists(target) and not os.path.isfile(target) and not os.path.isdir(target))
        if not special and not reservations.enter_context(reserved(Path(os.path.realpath(target)))):
            raise UsageError(f"{target}: another process is writing it; choose another output")

    def _take(self, path: str, num_videos: int, reservations: ExitStack) -> bool:
        """Reserve a default name, if it is unused."""

        def used() -> bool:
            return not self.overwrite and any(Path(name).exists() for name in numbered(path, num_videos, self.format))

        return not used() and reservations.enter_context(reserved(Path(os.path.realpath(path)))) and not used()

    def _check_standard_output(self, num_videos: int) -> None:
        if self.path != "-":
            return
        if num_videos > 1 or self.as_json or self.manifest:
            other = "--num-videos" if num_videos > 1 else "--json" if self.as_json else "--manifest"
            raise UsageError(f"-o -: standard output holds one video and nothing else; leave out {other}")
        if sys.stdout.isatty():
            raise UsageError("-o -: standard output is a terminal; pipe it into a player, or name a file")


def numbered(path: str, num_videos: int, format: str | None) -> list[str]:
    """The path of each video."""
    width = max(2, len(str(num_videos - 1)))
    into_folder, images = path.endswith("/") or Path(path).is_dir(), format in (None, "png")
    if num_videos == 1 and (images or not into_folder):
        return [path]
    if into_folder:
        end = "/" if images else f".{format}"
        return [f"{path.rstrip('/')}/{k:0{width}d}{end}" for k in range(num_videos)]
    file = Path(path)
    return [str(file.with_name(f"{file.stem}-{k:0{width}d}{file.suffix}")) for k in range(num_videos)]
