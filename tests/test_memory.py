"""Estimates of memory: close to what tensors take, and refusals of what the machine cannot hold."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from command_kit import RUN, Refused, ca2vdm, clip, save
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ca2vdm_cli import memory, runtime
from ca2vdm_cli.autoencoder import load_autoencoder
from ca2vdm_cli.config import AutoencoderConfig, ModelConfig, VideoConfig
from ca2vdm_cli.generate.context import CachedContext, make_context
from ca2vdm_cli.generate.loop import stored_caption
from ca2vdm_cli.memory import autoencoder_bytes, forward_bytes, generation_needs, parameter_count, training_needs
from ca2vdm_cli.model.temporal_window import TemporalWindow
from ca2vdm_cli.model.transformer import CausalVideoTransformer
from ca2vdm_cli.plugins import backends
from ca2vdm_cli.presets import load_preset

CPU = torch.device("cpu")
VARIANTS: list[dict[str, Any]] = [
    {},
    {"mlp_ratio": 1.0},
    {"temporal_positions": "rope", "mlp_ratio": 1.5},
    {"mask_channel": True, "spatial_prefix": "none"},
    {"spatial_prefix": "first_frame", "learn_variance": False},
    {"text_channels": 7, "text_tokens": 5},
    {"context_frames": 20, "latent_width": 8},
]


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are created within and still alive."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {tensor.untyped_storage()._cdata: 0 for tensor in known}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key)

    def _drop(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@torch.inference_mode()
def simulated(config: ModelConfig, backend: str, dtype: torch.dtype) -> int:
    """Bytes alive at the peak of a denoising step, by a run with tensors that have shapes but no data."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        with default_dtype(dtype):
            model = CausalVideoTransformer(config, backends[backend]).eval()
        context = make_context(model, "cached", 1)
        assert isinstance(context, CachedContext)
        caption = stored_caption(model, 1)
        if caption is not None:
            context.set_text(model.text_keys_values(caption.embedding, caption.mask))
        shape = (1, *config.chunk_shape)
        context.append(torch.zeros(shape))
        context.open_chunk()
        noisy, timestep = torch.empty(shape), torch.zeros(1)
        buffers = [tensor for layer in context.cache.layers for tensor in layer]
        with Live([*model.state_dict().values(), *buffers, noisy]) as live:
            context.predict(noisy, timestep)
    return live.peak


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_parameters_are_counted_exactly(make_config: Callable[..., ModelConfig], changes: dict[str, Any]) -> None:
    config = make_config(**changes)
    model = CausalVideoTransformer(config, backends["eager"])
    assert parameter_count(config) == sum(tensor.numel() for tensor in model.state_dict().values())


@pytest.mark.parametrize("kind", ["conv", "lowpass"])
def test_bytes_of_autoencoders_are_exact(kind: str, make_config: Callable[..., ModelConfig]) -> None:
    config, video = AutoencoderConfig(kind=kind, downsample=4, base_channels=8), VideoConfig(height=16, width=16)
    model = make_config(in_channels=3)
    autoencoder = load_autoencoder(config, video, 3)
    assert autoencoder_bytes(config, model, 3) == sum(t.nbytes for t in autoencoder.state_dict().values())


@pytest.mark.parametrize(
    ("backend", "dtype"), [("eager", torch.float32), ("sdpa", torch.float32), ("sdpa", torch.bfloat16)], ids=str
)
def test_memory_of_a_forward_is_that_of_its_tensors(
    make_config: Callable[..., ModelConfig], backend: str, dtype: torch.dtype
) -> None:
    """Within a tenth below and a third above, whatever the options."""
    for changes in VARIANTS:
        config = make_config(**{"hidden_size": 128, "latent_height": 16, "latent_width": 16, **changes})
        scores = backends[backend].writes_scores
        estimated = forward_bytes(config, dtype.itemsize, config.chunk_frames, config.window_frames, scores=scores)
        assert 0.75 < simulated(config, backend, dtype) / estimated < 1.1, changes


def test_memory_of_training_is_that_of_its_tensors() -> None:
    """Within a factor of two, for real forward and backward passes of two depths."""
    preset = load_preset("tiny", ["model.hidden_size=64", "training.batch_size=2"]).config
    peaks = []
    for depth in (1, 5):
        config = replace(preset.model, depth=depth)
        model = CausalVideoTransformer(config, backends["sdpa"]).train()
        window = TemporalWindow(config)
        start = config.context_frames
        latents = torch.randn(2, config.in_channels, config.window_frames, config.latent_height, config.latent_width)
        plan = model.context_plan(config.chunk_frames, start, window)
        with Live([*model.state_dict().values(), latents]) as live:
            model(latents, torch.zeros(2), plan).sum().backward()
        peaks.append(live.peak - 4 * parameter_count(config))  # gradients are counted apart
    per_block = (peaks[1] - peaks[0]) / 4
    needs = training_needs(replace(preset, model=replace(preset.model, depth=4)), torch.float32, scores=False)
    assert 1 / 2 < per_block / (needs["activations"] / 4) < 1.1


def test_an_estimate_takes_no_memory_and_no_time() -> None:
    preset = load_preset("ca2-vdm-xl", ["model.depth=1000", "model.hidden_size=65536", "model.context_frames=60000"])
    began = time.process_time()
    needs = generation_needs(preset.config, torch.float32, CPU, scores=True, videos=4)
    assert needs.running > 2**40
    assert sum(training_needs(preset.config, torch.float32, scores=True).values()) > 2**40
    assert time.process_time() - began < 1


HUGE = ["--preset", "tiny", "--set", "model.depth=1000", "--set", "model.hidden_size=48000", *RUN]


@pytest.mark.usefixtures("in_an_empty_folder")
@pytest.mark.parametrize("command", ["bench", "verify", "train", "plan"])
def test_what_the_machine_cannot_hold_is_refused(command: str, refused: Refused) -> None:
    began = time.process_time()
    line = refused(2, command, *HUGE)
    assert "memory: about " in line and "TiB are needed on cpu (weights" in line
    assert "are available; choose a smaller" in line
    assert line.endswith("or try it all the same with --force") == (command != "plan")
    assert time.process_time() - began < 10


@pytest.mark.usefixtures("in_an_empty_folder")
def test_many_videos_are_refused_and_force_tries(
    weights: Any, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    save("clip.mkv", clip(4))
    needs = generation_needs(load_preset(weights).config, torch.float32, CPU, scores=True)
    request = ["--preset", weights, *RUN, "--dtype", "float32", "--steps", 1, "--frames", 4, "-q", "-o"]
    for command in (["sample"], ["extend", "clip.mkv"]):
        monkeypatch.setattr(memory, "available_memory", lambda device: needs.peak + 1)
        assert ca2vdm(*command, *request, "one.npz", "--overwrite") == 0
        several = [*command, *request, "four.npz", "--overwrite", "--num-videos", 4]
        monkeypatch.setattr(memory, "available_memory", lambda device: 3 * needs.cache)
        if needs.peak <= 3 * needs.cache:
            assert "memory: about" in refused(2, *several)
        monkeypatch.setattr(memory, "available_memory", lambda device: 10_000)
        assert "9.77 KiB are available" in refused(2, *several)
        assert ca2vdm(*several, "--force") == 0


def test_limits_of_a_container_count(monkeypatch: pytest.MonkeyPatch) -> None:
    total = runtime.available_memory(CPU)
    assert total is not None and total > 0
    monkeypatch.setattr(runtime, "_limits", lambda: iter([10**6]))
    assert runtime.available_memory(CPU) == 10**6
