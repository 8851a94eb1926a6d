"""The built-in entries, registered through the same hooks as plug-ins.

They are ``Lazy``: their names are known at once, and their modules, which need torch, are imported on first use.
"""

from __future__ import annotations

from .hookspecs import Register, hookimpl
from .lazy import Lazy


@hookimpl
def ca2vdm_register_backends(register: Register) -> None:
    register(Lazy("eager", "ca2vdm_backends.eager:backend"))
    register(Lazy("sdpa", "ca2vdm_backends.sdpa:backend"))
    register(Lazy("compile", "ca2vdm_backends.compile:backend"))


@hookimpl
def ca2vdm_register_samplers(register: Register) -> None:
    register(Lazy("ancestral", "ca2vdm_cli.generate.samplers:AncestralSampler"))
    register(Lazy("ddim", "ca2vdm_cli.generate.samplers:DdimSampler"))
    register(Lazy("dpm++", "ca2vdm_cli.generate.samplers:DpmSolverSampler"))
    register(Lazy("log-snr", "ca2vdm_cli.generate.samplers:LogSnrSampler"))
    register(Lazy("trailing", "ca2vdm_cli.generate.samplers:TrailingSampler"))


@hookimpl
def ca2vdm_register_contexts(register: Register) -> None:
    register(Lazy("cached", "ca2vdm_cli.generate.context:CachedContext"))
    register(Lazy("recompute", "ca2vdm_cli.generate.context:RecomputedContext"))
    register(Lazy("recompute-extendable", "ca2vdm_cli.bench.baselines:ExtendableContext"))
    register(Lazy("bidirectional", "ca2vdm_cli.bench.baselines:BidirectionalContext"))
    register(Lazy("fixed-window", "ca2vdm_cli.bench.baselines:FixedWindowContext"))
    register(Lazy("per-step-cache", "ca2vdm_cli.bench.baselines:PerStepCachedContext"))


@hookimpl
def ca2vdm_register_autoencoders(register: Register) -> None:
    register(Lazy("conv", "ca2vdm_cli.autoencoder:ConvAutoencoder"))
    register(Lazy("lowpass", "ca2vdm_cli.autoencoder:LowPassAutoencoder"))
    register(Lazy("diffusers", "ca2vdm_cli.autoencoder:DiffusersAutoencoder"))


@hookimpl
def ca2vdm_register_readers(register: Register) -> None:
    # in the order in which ``data.format: auto`` tries them
    register(Lazy("ucf101", "ca2vdm_cli.data.layouts:ucf101"))
    register(Lazy("jsonl", "ca2vdm_cli.data.lists:jsonl"))
    register(Lazy("json", "ca2vdm_cli.data.lists:json_list"))
    register(Lazy("csv", "ca2vdm_cli.data.lists:csv_table"))
    register(Lazy("videos", "ca2vdm_cli.data.layouts:videos"))
    register(Lazy("bair", "ca2vdm_cli.data.layouts:bair"))
    register(Lazy("frames", "ca2vdm_cli.data.layouts:frames"))
    register(Lazy("moving-mnist", "ca2vdm_cli.data.layouts:moving_mnist"))


@hookimpl
def ca2vdm_register_metrics(register: Register) -> None:
    register(Lazy("psnr", "ca2vdm_cli.video_metrics:psnr"))
