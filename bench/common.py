"""What the benchmarks share: the machine, paired timing, and JSON output."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import evolkv
from evolkv.errors import EvolKVError

#: Two-sided 95 % quantiles of Student's t, by number of values.
_T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
MOST_SEEDS = max(_T95)


def parser(description: str) -> argparse.ArgumentParser:
    """An argument parser with the options that every benchmark has."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--json", type=Path, metavar="FILE", help="write the result there as well")
    options.add_argument("--model", default="smollm2-135m")
    options.add_argument("--dtype", default="float32")
    options.add_argument("--device", default=None)
    options.add_argument("--seed", type=int, default=0)
    return options


def count(text: str) -> int:
    """A whole number from 1, for the option of a benchmark."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def counts(text: str) -> list[int]:
    """Whole numbers from 1 with commas between them, for the option of a benchmark."""
    return [count(part.strip()) for part in text.split(",")]


def machine(device: torch.device) -> dict[str, Any]:
    """The machine and the libraries that a figure belongs to."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
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


def run(main: Callable[[], None]) -> None:
    """Runs a benchmark without gradients; as in the program, a wrong request gets one line and exit code 2."""
    try:
        with torch.no_grad():
            main()
    except EvolKVError as error:
        sys.exit(_fail(2, str(error)))
    except KeyboardInterrupt:
        sys.exit(_fail(130, "interrupted"))


def _fail(code: int, message: str) -> int:
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    return code


def finish(result: dict[str, Any], path: Path | None) -> None:
    """Prints a result as JSON, and writes it to a file if one was given."""
    text = json.dumps(result, indent=2)
    print(text)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
