from __future__ import annotations

import contextlib
import gc
import json
import os
from collections import defaultdict
from pathlib import Path

# Before vLLM is imported. The engine runs in this process, so that tests see its blocks.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

BLOCK = 32


def read_reference(name):
    folder = os.environ.get("EVOLKV_VLLM_REFERENCE")
    if not folder:
        pytest.fail("run make test-vllm: it makes what these tests compare with, in EvolKV's own environment")
    return json.loads(Path(folder, f"{name}.json").read_text("utf-8")) | {"folder": folder}


@pytest.fixture(scope="session")
def tiny():
    return read_reference("tiny")


@pytest.fixture(scope="session")
def windows():
    return read_reference("windows")


@pytest.fixture(scope="session")
def lora():
    return read_reference("lora")


@pytest.fixture(scope="session")
def smollm():
    return read_reference("smollm")


@contextlib.contextmanager
def engine(model, config=None, **settings):
    """An engine of vLLM in this process; gone after the block."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 512,
        "block_size": BLOCK,
        "max_num_seqs": 16,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    additional = {} if config is None else {"evolkv": config}
    llm = LLM(str(model), additional_config=additional, **{**defaults, **settings})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def answers(llm, prompts, tokens=12, **settings):
    """The tokens of greedy answers, one list for each prompt."""
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, **settings)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def scheduler(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def pool(llm):
    return scheduler(llm).kv_cache_manager.block_pool


@pytest.fixture
def kept(monkeypatch):
    """What each layer keeps of each prompt, by the prompt's length and the layer: ``[kv_heads][entries]``."""
    from evolkv_vllm.compaction import Compactor

    found, plain = defaultdict(list), Compactor.kept

    def noted(self, prompt, entries):
        positions = plain(self, prompt, entries)
        found[prompt.num_tokens, self.layer].append([head for part in positions for head in part.tolist()])
        return positions

    monkeypatch.setattr(Compactor, "kept", noted)
    return found
