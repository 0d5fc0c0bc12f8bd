"""The parts that benchmarks share: the machine, paired timing, and statistics."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import evolkv

#: Two-sided 95 % quantiles of Student's t, by number of values.
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
MOST_SEEDS = max(_T95)


def machine(device: str | None = None) -> dict[str, Any]:
    """Describe the machine that a figure belongs to."""
    gpu = torch.cuda.is_available() and device != "cpu"
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if gpu else "cpu",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and the libraries that a figure depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "evolkv": evolkv.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    widest = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags), "")
    return f"{names[0] if names else platform.processor()} {widest}".strip()


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """Wall-clock seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def matrix_rate(model: torch.nn.Module, rows: int) -> float:
    """FLOP/s of the machine on this model's own matrices with `rows` rows: the median over five passes."""
    weights = [w for name, w in model.named_parameters() if w.ndim == 2 and "embed" not in name]
    inputs = {w.shape[1]: torch.randn(rows, w.shape[1], dtype=w.dtype, device=w.device) for w in weights}

    def work() -> None:
        for weight in weights:
            inputs[weight.shape[1]] @ weight.T

    flops = sum(2 * rows * w.numel() for w in weights)
    work()
    return flops / statistics.median(seconds(work, weights[0].device) for _ in range(5))


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and most of some runs."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(times: list[float], others: list[float]) -> dict[str, float]:
    """Median, least and most of the ratios of runs that took turns."""
    return spread([mine / other for mine, other in zip(times, others, strict=True)])


def interval_over_seeds(values: list[float]) -> dict[str, Any]:
    """Mean and 95 % t-interval over seeds."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return {"mean": round(mean, 4), "ci95": None, "seeds": len(values)}
    half = _T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": round(mean, 4), "ci95": [round(mean - half, 4), round(mean + half, 4)], "seeds": len(values)}
