"""Every Markdown page: commands and settings are valid, links lead somewhere, and the README's examples run."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from importlib import import_module, metadata
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import typer
from command_kit import ROOT

from ca2vdm_cli.cli import app
from ca2vdm_cli.config import Preset
from ca2vdm_cli.errors import UsageError
from ca2vdm_cli.presets import load_preset, preset_names

ClickException = import_module("typer._click.exceptions" if find_spec("typer._click") else "click").ClickException

PLACEHOLDERS = {"D": "float32", "F": "8", "N": "8", "P": "tiny", "A,B": "eager,sdpa", "NAME,...": "cached,recompute"}
"""Values for the placeholders of commands in prose; all others are file names."""
FOREIGN_FLAGS = {"--extra-index-url", "--torch-backend"}
"""Flags of pip and uv."""
PROSE = {"ca2vdm itself"}
"""Spans that look like commands."""


def find_pages() -> list[Path]:
    """All Markdown files, except in hidden folders and build outputs."""
    skipped = {"build", "dist", "runs"}
    paths = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    return sorted(path for path in paths if not any(part.startswith(".") or part in skipped for part in path.parts))


PAGES = find_pages()


@dataclass(frozen=True)
class Code:
    """A code block or a code span."""

    place: str
    """Page and line."""
    language: str
    """Language of a block; ``span`` for a span."""
    text: str

    @property
    def prose(self) -> bool:
        """Whether this is a code span."""
        return self.language == "span"


def code_in(page: Path) -> Iterator[Code]:
    """All code of a page."""
    language, block, start = "", [""], 0
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        if fence := re.match(r"\s*```(\w*)", line):
            if language:
                yield Code(f"{page}:{start}", language, "\n".join(block) + "\n")
            language, block, start = "" if language else fence[1] or "text", [], number + 1
        elif language:
            block.append(line)
        else:
            yield from (Code(f"{page}:{number}", "span", text) for text in re.findall(r"`([^`]+)`", line))


CODE = [code for page in PAGES for code in code_in(page)]


def command_lines(code: Code) -> Iterator[list[str]]:
    """The words of each simple command in shell code: pipelines and lists are split, and here-documents skipped."""
    text = re.sub(r"<<'(\w+)'\n.*?\n\1\n", "\n", code.text, flags=re.DOTALL).replace("\\\n", " ")
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("|&;<>()"):
                yield words
                words = []
            else:
                words.append(word)


def tool_arguments(words: list[str]) -> list[str] | None:
    """The arguments for ca2vdm in ``ca2vdm …`` or ``… -m ca2vdm_cli …``, or None for another command."""
    if words and words[0].rpartition("/")[2] == "ca2vdm":
        return words[1:]
    for i, pair in enumerate(pairwise(words)):
        if pair == ("-m", "ca2vdm_cli"):
            return words[i + 2 :]
    return None


def commands() -> Iterator[tuple[str, list[str]]]:
    """Place and arguments of every ca2vdm command on any page; the place of a command in prose begins with "prose"."""
    for code in CODE:
        if code.text in PROSE:
            continue
        if code.language in ("bash", "sh") or (code.prose and re.match(r"(\S+/)?ca2vdm |.*-m ca2vdm_cli", code.text)):
            for words in command_lines(code):
                arguments = tool_arguments(words)
                if arguments is not None and "COMMAND" not in arguments:
                    place = f"prose of {code.place}" if code.prose else code.place
                    yield place, [PLACEHOLDERS.get(word, word) for word in arguments if word != "--debug"]


COMMANDS = list(commands())


def parse_error(arguments: list[str]) -> str:
    """Parse a command line without running it; returns what is wrong with it, if anything."""

    def strip(command: Any) -> None:
        command.callback = None
        for option in command.params:
            if option.name in ("install_completion", "show_completion"):  # they would act while parsing
                option.callback = None
        for child in getattr(command, "commands", {}).values():
            strip(child)

    command: Any = typer.main.get_command(app)
    strip(command)
    try:
        with command.make_context("ca2vdm", list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as end:  # --help, --version
        return "" if end.exit_code == 0 else f"exit code {end.exit_code}"
    except ClickException as error:
        return str(error.format_message())
    return ""


def test_there_is_something_to_check() -> None:
    assert {"README.md", "docs/training.md", "presets/moving-digits/README.md"} <= {str(page) for page in PAGES}
    assert len(COMMANDS) > 80
    torchrun = Code("", "bash", "A=1 torchrun --nproc 2 -m ca2vdm_cli train \\\n  --set 'a=[1, 2]' > out  # why\n")
    assert next(map(tool_arguments, command_lines(torchrun))) == ["train", "--set", "a=[1, 2]"]
    piped = Code("", "bash", "ca2vdm sample -o - | ca2vdm extend - && ls\n")
    assert [tool_arguments(words) for words in command_lines(piped)] == [["sample", "-o", "-"], ["extend", "-"], None]


@pytest.mark.parametrize(("place", "arguments"), COMMANDS, ids=[f"{place} {' '.join(a)}" for place, a in COMMANDS])
def test_commands_parse(place: str, arguments: list[str]) -> None:
    error = parse_error(arguments)
    if place.startswith("prose") and error.startswith("Missing"):  # only the beginning of a command
        error = ""
    assert not error, f"{place}: {error}"


def test_faults_in_commands_are_noticed() -> None:
    assert not parse_error(["sample", "--frames", "8"])
    assert "flames" in parse_error(["sample", "--flames", "8"])
    assert "--frames" in parse_error(["sample", "--frames", "eight"])
    assert "simple" in parse_error(["simple"])


def overrides_in(arguments: list[str]) -> list[str]:
    return [value for flag, value in pairwise(arguments) if flag == "--set"]


SETTINGS = [(place, arguments) for place, arguments in COMMANDS if overrides_in(arguments)] + [
    (code.place, words)
    for code in CODE
    if code.prose and code.text.startswith("--set ") and "KEY" not in code.text
    for words in command_lines(code)
]


@pytest.mark.parametrize(("place", "arguments"), SETTINGS, ids=[f"{place} {' '.join(a)}" for place, a in SETTINGS])
def test_settings_of_commands_are_valid(place: str, arguments: list[str]) -> None:
    """Key and value of each ``--set`` are valid, in the command's preset or else in the default one."""
    preset = arguments[arguments.index("--preset") + 1] if "--preset" in arguments else ""
    try:
        load_preset(preset if preset in preset_names() else "moving-digits", overrides_in(arguments))
    except UsageError as error:
        name = re.search(r"there is no [\w ]+ '([^']+)'", str(error))
        if not name or name[1] not in plugin_names(place.removeprefix("prose of ").rpartition(":")[0]):
            raise


def plugin_names(page: str) -> set[str]:
    """Names that the page's Python examples register."""
    examples = [code.text for code in CODE if code.language == "python" and code.place.startswith(f"{page}:")]
    return {name for text in examples for name in re.findall(r'\bname\b.*? = "([^"]+)"', text)}


def preset_keys() -> set[str]:
    """``section.key`` of every setting."""
    keys = set()
    for section, hint in get_type_hints(Preset).items():
        for kind in (hint, *get_args(hint)):
            if is_dataclass(kind):
                keys |= {f"{section}.{field.name}" for field in fields(kind)}
    return keys


def test_settings_in_prose_exist() -> None:
    known = preset_keys()
    sections = "|".join({key.partition(".")[0] for key in known})
    names = [(span.place, re.match(rf"(?:{sections})\.[a-z_]+(?==|$)", span.text)) for span in CODE if span.prose]
    unknown = [f"{place}: {name[0]}" for place, name in names if name and name[0] not in known]
    assert not unknown


def test_flags_in_prose_exist() -> None:
    def flags(command: Any) -> set[str]:
        own = {flag for option in command.params for flag in option.opts}
        return own.union(*(flags(child) for child in getattr(command, "commands", {}).values()))

    known = flags(typer.main.get_command(app)) | FOREIGN_FLAGS | {"--debug", "--help"}
    names = [(span.place, re.match(r"--[a-z-]+", span.text)) for span in CODE if span.prose]
    unknown = [f"{place}: {flag[0]}" for place, flag in names if flag and flag[0] not in known]
    assert not unknown


def test_extras_exist() -> None:
    known = set(metadata.metadata("ca2vdm").get_all("Provides-Extra") or [])
    for code in CODE:
        for extras in re.findall(r"(?:ca2vdm|\.)\[([a-z,]+)\]", code.text):
            assert set(extras.split(",")) <= known, f"{code.place}: {extras}"


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ +(.+?) *$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_have_targets(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = ROOT / page.parent / path if path else ROOT / page
        assert target.exists(), f"{page}: {link} does not exist"
        assert not anchor or anchor in anchors(target), f"{page}: {target.name} has no heading #{anchor}"


def marked_block(marker: str) -> str:
    """The code block of the README after a marker."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(rf"<!-- {marker} -->\n```bash\n(.*?)```", text, flags=re.DOTALL)
    assert block, f"README.md has no code block after <!-- {marker} -->"
    return block[1].strip()


def test_the_sample_command_is_the_one_that_ci_runs() -> None:
    """``.ci/run`` runs it as written, and counts the frames."""
    setup, _, command = marked_block("sample command").rpartition(" && ")
    assert setup == "python3 -m venv .venv && .venv/bin/pip install -e ."
    assert command == ".venv/bin/ca2vdm sample --frames 600"
    assert 'marked "sample command"' in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_test_command_runs_the_tests() -> None:
    assert marked_block("test command").endswith(".venv/bin/pip install -e '.[dev]' && .venv/bin/python -m pytest")


def test_python_examples_compile_and_the_readme_s_runs(capsys: pytest.CaptureFixture[str]) -> None:
    signatures = "docs/api.md"  # its blocks are not statements
    blocks = [code for code in CODE if code.language == "python" and not code.place.startswith(signatures)]
    assert len(blocks) > 5
    for block in blocks:
        compiled = compile(block.text, block.place, "exec")
        if block.place.startswith("README.md"):
            exec(compiled, {})
    assert capsys.readouterr().out.splitlines()[0] == "0 (1, 8, 64, 64, 1)"
