"""The benchmark: its figures, its verdict, and the files it writes."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ca2vdm_cli import commands
from ca2vdm_cli.__main__ import main
from ca2vdm_cli.bench import benchmark as bench
from ca2vdm_cli.bench.baselines import ExtendableContext
from ca2vdm_cli.bench.report import verdict, warnings
from ca2vdm_cli.bench.results import Environment, Report, Spread
from ca2vdm_cli.commands.bench import FORMATS
from ca2vdm_cli.generate.context import contexts
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.pipeline import Pipeline

WINDOW, CHUNK, STEPS = 9, 4, 2  # of the tiny preset
CHUNKS = 5  # two past the window
TINY = ["bench", "--preset", "tiny", "--device", "cpu", "--dtype", "float32", "--steps", str(STEPS)]
ALL = "recompute,recompute-extendable,bidirectional,fixed-window,per-step-cache"


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file of one run: all methods, two repeats, three windows, two backends."""
    folder = tmp_path_factory.mktemp("bench")
    files = [part for suffix in FORMATS for part in ("-o", str(folder / f"out{suffix}"))]
    arguments = ["--compare", ALL, "--context-frames", "9,5,13", "--repeat", "2", "--backend", "sdpa,eager"]
    assert main([*TINY, *arguments, *files, "-q"]) == 0
    return folder


@pytest.fixture(scope="module")
def report(written: Path) -> dict[str, Any]:
    """The run's JSON."""
    loaded: dict[str, Any] = json.loads((written / "out.json").read_text())
    return loaded


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*TINY, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_keys_are_those_that_scripts_rely_on(report: dict[str, Any]) -> None:
    def keys(value: Any, path: str = "") -> Iterator[str]:
        """Paths to all values; methods are ``*``, and lists of objects end in ``[]``."""
        if isinstance(value, dict):
            for key, part in value.items():
                yield from keys(part, f"{path}.{'*' if key in report['results'] else key}".lstrip("."))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for part in value:
                yield from keys(part, f"{path}[]")
        else:
            yield path

    recorded = set((Path(__file__).parent / "report_keys.txt").read_text().split())
    others = report["other_backends"]
    assert set(keys({key: value for key, value in report.items() if key != "other_backends"})) == recorded
    assert set(keys(others[0])) == recorded - {"verdict", *(field.name for field in fields(Environment))}


def test_every_method_is_measured(report: dict[str, Any]) -> None:
    assert list(report["results"]) == ["cached", *ALL.split(",")]
    for result in report["results"].values():
        assert result["steady_chunks"] == 2 * (CHUNKS - 3)
        assert 0 < result["steady_seconds_per_step"] < result["steady_seconds_per_chunk"] < result["seconds"]
        assert 0 < result["mfu"] < 5
        assert result["decode_seconds"] > 0 and result["encode_seconds"] > 0
        total = result["steady_seconds_per_chunk"] + result["decode_seconds"]
        assert result["steady_frames_per_second"] == pytest.approx(CHUNK / total)
        assert result["first_chunk_latency_seconds"] > result["first_chunk_seconds"]
        for part in ("step", "chunk"):
            spread = result[f"steady_seconds_per_{part}_spread"]
            median = result[f"steady_seconds_per_{part}"]
            assert spread["min"] <= spread["quarter"] <= median <= spread["three_quarters"] <= spread["max"]


def test_all_raw_times_are_in_the_report(report: dict[str, Any]) -> None:
    for result in report["results"].values():
        assert len(result["repeats"]) == 2
        for repeat in result["repeats"]:
            assert [len(steps) for steps in repeat["seconds_per_step"]] == [STEPS] * CHUNKS
            assert len(repeat["write_seconds_per_chunk"]) == CHUNKS
    assert len(report["gemm_seconds"]) == 2 * CHUNKS * STEPS  # in every step of both videos
    median = sorted(report["gemm_seconds"])[len(report["gemm_seconds"]) // 2]
    assert report["gemm_flops_per_second"] == pytest.approx(2 * 2048 * 384 * 1536 / median, rel=0.5)


def test_ratios_are_of_the_medians(report: dict[str, Any]) -> None:
    cached = report["results"]["cached"]
    for name in ALL.split(","):
        for part in ("step", "chunk"):
            ratio = report["results"][name][f"steady_seconds_per_{part}"] / cached[f"steady_seconds_per_{part}"]
            assert report[f"speedup_per_{part}"][name] == pytest.approx(ratio)
    assert report["speedup"] == report["speedup_per_chunk"]["recompute"]


def test_report_describes_machine_and_settings(report: dict[str, Any]) -> None:
    for name in ("version", "torch", "numpy", "python", "processor", "platform", "threads", "date", "seed"):
        assert report[name] not in (None, "")
    assert re.fullmatch("[0-9a-f]{64}", report["preset_sha256"])
    assert report["backend"] == "sdpa" and [run["backend"] for run in report["other_backends"]] == ["eager"]
    assert report["fixed_window_frames"] == CHUNK


def test_preset_hash_depends_on_its_settings(capsys: pytest.CaptureFixture[str]) -> None:
    short = ["--compare", "cached", "--frames", "4"]
    first, same = (run(capsys, *short)["preset_sha256"] for _ in range(2))
    other = run(capsys, *short, "--set", "model.mlp_ratio=3")["preset_sha256"]
    assert first == same != other


def test_counted_operations_and_bytes_agree_with_the_formulas(report: dict[str, Any]) -> None:
    for run in (report, *report["other_backends"]):
        assert run["flops_agree"] is True and run["cache_bytes_agree"] is True
        for result in run["results"].values():
            assert result["flops_per_step"] == result["flops_per_step_by_formula"] > 0
            assert result["cache_write_flops"] == result["cache_write_flops_by_formula"]
            assert result["cache_bytes"] == result["cache_bytes_by_formula"]
    cached = report["results"]["cached"]
    assert cached["cache_write_flops"] > 0
    assert report["results"]["per-step-cache"]["cache_bytes"] == STEPS * cached["cache_bytes"]


def test_frames_that_each_method_sees(report: dict[str, Any]) -> None:
    seen = {name: result["seen_frames_per_chunk"] for name, result in report["results"].items()}
    windowed, all_ = [0, 4, 8, 9, 9], [0, 4, 8, 12, 16]
    assert seen["cached"] == seen["recompute"] == seen["per-step-cache"] == windowed
    assert seen["recompute-extendable"] == seen["bidirectional"] == all_
    assert seen["fixed-window"] == [0, 4, 4, 4, 4]


def test_exactness_of_the_same_run(report: dict[str, Any]) -> None:
    assert report["outputs_agree"] is True
    assert 0 < report["max_abs_difference_before_slide"] < 1e-5 * report["max_abs_output"]
    assert report["max_abs_difference_after_slide"] > 1e-3 * report["max_abs_output"]
    before = report["max_abs_difference_per_chunk"][:3]
    assert max(before) <= report["max_abs_difference_before_slide"]


def test_growth_with_frames() -> None:
    """Counted in operations, which other programs can't affect: a growing context is quadratic, the cache linear.

    Memory is that of a new process whose allocator returns freed memory at once; earlier tests leave some in this one.
    """
    arguments = ["--compare", ALL, "--frames", "96", "--steps", "1", "--set", "model.depth=3", "--json"]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    command = [sys.executable, "-m", "ca2vdm_cli", *TINY, *arguments]
    growth = json.loads(subprocess.check_output(command, env=environment))["growth"]["frames"]
    exponents = {name: curve["flops_exponent"] for name, curve in growth.items()}
    assert all(len(curve["frames"]) == len(curve["seconds"]) == 24 for curve in growth.values())
    for name in ("recompute-extendable", "bidirectional"):
        assert exponents[name] == pytest.approx(2, abs=0.1)
        assert growth[name]["memory_bytes_exponent"] > 0.5
    for name in ("cached", "recompute", "fixed-window", "per-step-cache"):
        assert exponents[name] == pytest.approx(1, abs=0.1)
    assert growth["cached"]["memory_bytes"][-1] < 1.5 * growth["cached"]["memory_bytes"][5]


def test_growth_with_context(report: dict[str, Any]) -> None:
    growth = report["growth"]["context_frames"]
    assert growth["cached"]["frames"] == growth["per-step-cache"]["frames"] == [5, 9, 13]
    assert growth["recompute"]["frames"] == [0, 4, 5, 8, 9, 13]
    assert growth["bidirectional"]["frames"] == [0, 4, 5, 8, 12, 13, 16]
    assert growth["cached"]["flops_exponent"] < 0.1 < 0.6 < growth["recompute"]["flops_exponent"] < 1


def test_window_longer_than_the_position_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With random weights, the position table grows; trained weights keep theirs."""
    assert run(capsys, "--context-frames", "20", "--frames", "4")["context_frames"] == 20
    assert main(["train", "--preset", "tiny", "--steps", "1", "--out", "run", "-q", "--device", "cpu"]) == 0
    assert main([*TINY[:1], "--preset", "run", "--context-frames", "20"]) == 2
    assert "--context-frames: 20 is more than the 9 of the model's position table" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("compare", "words"),
    [
        (
            "recompute",
            r"cached is \d+\.\d\d× \w+ than recompute at a 9-frame window and 2 steps per chunk; outputs differ "
            r"only by rounding until the window slides, by at most \d\.\de-\d\d \(largest output \d\.\d\)",
        ),
        ("cached", r"cached alone was measured; outputs not compared .*"),
        (
            "per-step-cache",
            r"cached is .* than per-step-cache at a 9-frame window and 2 steps per chunk; 2× less cache memory than .*",
        ),
    ],
)
def test_verdict(capsys: pytest.CaptureFixture[str], compare: str, words: str) -> None:
    assert main([*TINY, "--compare", compare]) == 0
    line = " ".join(capsys.readouterr().out.split("tiny (random weights)")[0].split())
    assert re.fullmatch(words, line)


def test_spread_is_shown_for_every_method(written: Path) -> None:
    """As a range below each method's median, of a step and of a chunk."""
    page = (written / "out.html").read_text()
    table = page[page.index("<table") : page.index("</table>")]
    for row in table.split("<tr")[2:]:
        assert len(re.findall(r"<span>[+-]\d+% [+-]\d+%</span>", row)) == 2, row


def test_report_names_only_the_baselines_that_were_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "-o", "out.html"]) == 0
    texts = [
        capsys.readouterr().out,
        re.sub("<style>.*?</style>|<svg.*?</svg>", "", Path("out.html").read_text(), flags=re.DOTALL),
    ]
    for text in texts:
        assert "recompute" in text
        assert not re.search("extendable|bidirectional|fixed.window|per.step.cache", text)
    assert main([*TINY, "--compare", "fixed-window", "--fixed-window", "7", "-o", "out.html", "-q"]) == 0
    page = Path("out.html").read_text()
    assert "<dt>window of fixed-window</dt><dd>7</dd>" in page and "recompute" not in page


def test_pdf_is_made_for_papers(written: Path) -> None:
    """As wide as a page's text, in fonts that publishers take."""
    content = (written / "out.pdf").read_bytes()
    box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+) ([\d.]+) ?\]", content)
    assert box and float(box[1]) == 7 * 72
    assert b"/Type3" not in content and b"/FontFile2" in content


def test_random_weights_of_flow_matching(capsys: pytest.CaptureFixture[str]) -> None:
    flow = ["diffusion.beta_schedule=flow", "diffusion.prediction=flow", "model.learn_variance=false"]
    settings = [part for setting in flow for part in ("--set", setting)]
    report = run(capsys, "--compare", "recompute", *settings, "--sampler", "ddim")
    assert report["outputs_agree"] is True and report["max_abs_output"] < 100


def test_drift_is_that_of_a_recomputed_window(capsys: pytest.CaptureFixture[str]) -> None:
    both = run(capsys, "--compare", "recompute,recompute-extendable")
    alone = run(capsys, "--compare", "recompute")
    assert both["max_abs_difference_after_slide"] == pytest.approx(alone["max_abs_difference_after_slide"], rel=1e-3)
    assert run(capsys, "--compare", "recompute-extendable")["max_abs_difference_after_slide"] is None


def test_verdict_about_outputs() -> None:
    """It does not call outputs equal that differ, not even by rounding."""
    pipeline = Pipeline.load("tiny", random_weights=True, pixels=False, device="cpu", dtype="float32")
    measured = bench.run_bench(pipeline, bench.Settings(frames=4, steps=STEPS))
    rounded = replace(measured, outputs_agree=True, max_abs_difference_before_slide=1.6e-2, max_abs_output=4.13)
    assert verdict(rounded).endswith(
        "; outputs differ only by rounding until the window slides, by at most 1.6e-02 (largest output 4.1)"
    )
    same = replace(rounded, max_abs_difference_before_slide=0.0)
    assert verdict(same).endswith("; outputs are identical until the window slides")


def test_unsteady_times_of_any_method_are_noticed() -> None:
    pipeline = Pipeline.load("tiny", random_weights=True, pixels=False, device="cpu", dtype="float32")
    measured = bench.run_bench(pipeline, bench.Settings(frames=4, steps=STEPS))
    spreads = {"cached": Spread(1.0, 1.0, 1.1, 5.0), "recompute": Spread(1.0, 1.0, 1.5, 2.0)}
    results = {
        method: replace(result, steady_seconds_per_step_spread=spreads[method])
        for method, result in measured.results.items()
    }
    run = replace(measured, results=results, flops_agree=True, cache_bytes_agree=True)
    lines = list(warnings(Report("", bench.environment(pipeline), [run])))
    assert lines == [
        f"{run.backend}: the middle half of the step times of recompute spans more than 30 %: is the machine busy?"
    ]


def test_verdict_says_what_is_slower_and_what_differs() -> None:
    pipeline = Pipeline.load("tiny", random_weights=True, pixels=False, device="cpu", dtype="float32")
    settings = bench.Settings(baselines=("per-step-cache",), frames=4, steps=STEPS)
    changed = replace(
        bench.run_bench(pipeline, settings),
        speedup_per_chunk={"recompute": 4.034, "bidirectional": 5.0, "per-step-cache": 0.8},
        max_abs_difference_before_slide=0.25,
        outputs_agree=False,
    )
    assert verdict(changed) == (
        "cached is 4.03× faster than recompute, 5.00× than bidirectional and 1.25× slower than per-step-cache at a "
        "9-frame window and 2 steps per chunk; 2× less cache memory than per-step-cache; outputs DIFFER by 2.5e-01 "
        "before the window slides"
    )


def test_work_that_the_formula_leaves_out_is_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A baseline that does more than it has to: its frames go through a matrix product that changes nothing."""
    predict = ExtendableContext.predict

    def wasteful(context: ExtendableContext, x: Tensor, timestep: Tensor) -> Tensor:
        identity = torch.eye(1024)
        return predict(context, x, timestep) + 0 * (identity @ identity).sum()

    monkeypatch.setattr(ExtendableContext, "predict", wasteful)
    assert main([*TINY, "--compare", "bidirectional", "--frames", "8", "-o", "out.json"]) == 0
    assert "warning: sdpa: counted operations differ from the formula by up to" in capsys.readouterr().out
    report = json.loads(Path("out.json").read_text())
    assert report["flops_agree"] is False and report["results"]["cached"]["flops_error"] == 0


def test_a_cache_that_is_larger_than_the_formula_is_noticed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "cache_bytes", lambda *arguments, **named: 1)
    assert main([*TINY, "--frames", "4"]) == 0
    assert "warning: sdpa: the cache's bytes differ from the formula" in capsys.readouterr().out


def test_a_write_that_is_lost_is_noticed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The second chunk counts as written, but is not."""
    write = CausalVideoTransformer.write

    def forgetful(model: CausalVideoTransformer, clean: Tensor, cache: Any, text: Any = None) -> None:
        if cache.frames == CHUNK:
            cache.commit(clean.shape[2])
        else:
            write(model, clean, cache, text)

    monkeypatch.setattr(CausalVideoTransformer, "write", forgetful)
    result = run(capsys)
    assert result["outputs_agree"] is False and "outputs DIFFER by" in result["verdict"]
    first, second, third, *_ = result["max_abs_difference_per_chunk"]
    assert max(first, second) < 1e-5 < 1e-3 < third == result["max_abs_difference_before_slide"]


def test_csv_has_a_row_for_every_chunk(written: Path, report: dict[str, Any]) -> None:
    with (written / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 6 * 2 * CHUNKS  # backends, methods, repeats
    ours = [row for row in rows if (row["backend"], row["method"], row["repeat"]) == ("sdpa", "recompute", "1")]
    result = report["results"]["recompute"]
    steps = result["repeats"][1]["seconds_per_step"]
    assert [float(row["denoise_seconds"]) for row in ours] == pytest.approx([sum(chunk) for chunk in steps])
    assert [int(row["seen_frames"]) for row in ours] == result["seen_frames_per_chunk"]
    assert [int(row["first_frame"]) for row in ours] == [CHUNK * i for i in range(CHUNKS)]
    decoded = [float(row["decode_seconds"] or 0) for row in ours]
    assert decoded == [seconds or 0 for seconds in result["repeats"][1]["decode_seconds_per_chunk"]]
    assert any(decoded) and decoded != [seconds or 0 for seconds in result["decode_seconds_per_chunk"]]
    for row in ours:
        parts = (float(row[f"{part}_seconds"]) for part in ("cache_write", "denoise", "decode"))
        assert float(row["total_seconds"]) == pytest.approx(sum(parts))


def test_html_has_no_external_resources(written: Path, report: dict[str, Any]) -> None:
    page = (written / "out.html").read_text()
    assert report["verdict"] in page
    assert page.count("<svg") == 1 and page.count("<table") == 4
    without_names = re.sub(r'xmlns(:\w+)?="[^"]*"|<metadata>.*?</metadata>', "", page, flags=re.DOTALL)
    assert not re.search(r"https?:|<script|<link|@import|<img", without_names)
    assert len(page) < 1_000_000


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_plots_have_the_format_of_the_suffix(written: Path, suffix: str, start: bytes) -> None:
    assert (written / f"out{suffix}").read_bytes().startswith(start)


def test_json_on_standard_output_beside_files(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--compare", "cached", "--frames", "4", "--json", "-o", "out.JSON", "--output", "rows.csv"]
    assert main([*TINY, *arguments]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == json.loads(Path("out.JSON").read_text())
    assert err == "→ out.JSON\n→ rows.csv\n"
    assert main([*TINY, *arguments, "-q"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ["--compare", "diffusers"],
            "--compare: there is no context 'diffusers'; known: cached, recompute, ",
        ),
        (["--compare", "recompute,"], "--compare recompute,: an entry is empty"),
        (["--context-frames", "9,x"], "--context-frames 9,x: must be a number of frames, or several such as 25,9,57"),
        (["--context-frames", "0"], "--context-frames 0: must be a number of frames"),
        (["-o", "missing/out.html"], "-o missing/out.html: there is no folder missing"),
        (["-o", "out.txt"], "-o out.txt: the suffix must be .html, .json, .csv, .png, .svg or .pdf"),
        (["--backend", "sdpa,none"], "there is no backend 'none'"),
        (["-o", "folder.csv"], "-o folder.csv: can't be written"),
    ],
)
def test_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], line: str
) -> None:
    monkeypatch.setattr(commands.bench, "run_bench", lambda *_, **__: pytest.fail("it was measured"))
    Path("folder.csv").mkdir()
    assert main([*TINY, "--frames", "4", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert line in err


def test_a_window_without_positions_is_refused_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, weights: Path
) -> None:
    monkeypatch.setattr(commands.bench, "run_bench", lambda *_, **__: pytest.fail("it was measured"))
    assert main(["bench", "--preset", str(weights), "--context-frames", "9,60"]) == 2
    assert "--context-frames: 60 is more than the 9" in capsys.readouterr().err


def test_plots_need_matplotlib(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([*TINY, "-o", "out.png"]) == 2
    assert (
        "--output: plots need matplotlib, which is not installed; pip install 'ca2vdm[bench]'"
        in capsys.readouterr().err
    )
    assert main([*TINY, "--compare", "cached", "--frames", "4", "-o", "out.csv"]) == 0


def test_caches_that_do_not_fit_in_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "available_memory", lambda device: 100_000)
    assert main([*TINY, "--compare", "per-step-cache"]) == 2
    assert "--compare: the 2 caches of per-step-cache take" in capsys.readouterr().err
    assert main([*TINY, "--compare", "recompute", "--frames", "4"]) == 0


def test_methods() -> None:
    """Every baseline that the help names exists, and these are exact."""
    assert set(contexts) == {"cached", *ALL.split(",")}
    exact = [name for name, context in contexts.items() if context.exact]
    assert exact == ["cached", "recompute", "recompute-extendable"]
