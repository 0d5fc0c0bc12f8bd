"""Triton kernels against attention row by row: on a GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from evolkv import CompressedCache
from evolkv.cache import attend
from evolkv.cache.masks import boolean_mask, hides_nothing
from evolkv.cache.math import LogitTerms, attention
from evolkv.errors import UsageError
from evolkv.profile import BudgetProfile
from evolkv.selectors import get_selector
from tiny import KV_HEADS, LAYERS, tiny_model, tokens

pytest.importorskip("triton")
from evolkv.cache import kernels

pytestmark = pytest.mark.slow
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
#: The interpreter, which computes in NumPy, has no bfloat16.
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
SNAPKV = get_selector({"name": "snapkv", "window": 4})
RAGGED = torch.tensor([[5, 9], [30, 6], [12, 7], [8, 25]]).numpy()


@pytest.fixture
def counted(monkeypatch):
    """Turns the kernels on, and counts their calls."""
    calls = []
    decode = kernels.decode
    monkeypatch.setenv("EVOLKV_TRITON", "1")
    monkeypatch.setattr(kernels, "decode", lambda *args, **kwargs: calls.append(1) or decode(*args, **kwargs))
    return calls


class Rows:
    """A group of rows of one layer, with room."""

    def __init__(self, rows, entries, key_dim, value_dim, dtype):
        made = {"device": DEVICE, "dtype": dtype}
        self.rows = torch.tensor(rows, device=DEVICE)
        self.held = (
            torch.randn(len(rows), entries + 3, key_dim, **made),
            torch.randn(len(rows), entries + 3, value_dim, **made),
        )
        self.positions = (torch.arange(entries + 3, dtype=torch.int32, device=DEVICE) * 2).repeat(len(rows), 1)
        self.entries = entries
        self.append()

    def append(self):
        self.entries += 1
        self.keys, self.values = (part[:, : self.entries] for part in self.held)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("fold", "key_dim", "value_dim"), [(3, 16, 16), (1, 8, 12), (20, 80, 64), (2, 256, 256)])
@pytest.mark.parametrize(("window", "softcap", "sinks"), [(None, None, False), (40, None, False), (150, 3.0, True)])
def test_every_row_attends_to_its_own_entries_and_the_new_one(dtype, fold, key_dim, value_dim, window, softcap, sinks):
    heads, rows = 2, 6
    groups = [Rows([1, 4], 5, key_dim, value_dim, dtype), Rows([0, 2, 5], 70, key_dim, value_dim, dtype)]
    groups.append(Rows([3], 300, key_dim, value_dim, dtype))
    table = kernels.RowTable()
    for step in range(2):
        made = {"device": DEVICE, "dtype": dtype}
        query, new_keys = torch.randn(rows, fold, key_dim, **made), torch.randn(rows, key_dim, **made)
        new_values = torch.randn(rows, value_dim, **made)
        sink = torch.randn(heads * fold, **made) if sinks else None
        places, since, aligned = table.of(groups)
        assert since == step
        # Groups have 75, 73 and 304 places.
        assert aligned == (key_dim * dtype.itemsize % 16 == 0 and value_dim * dtype.itemsize % 16 == 0)
        longest = max(group.entries for group in groups)
        settings = {"scaling": 0.2, "softcap": softcap}
        found = kernels.decode(
            query,
            new_keys,
            new_values,
            places,
            since,
            longest,
            aligned=aligned,
            kv_heads=heads,
            window=window,
            sinks=sink,
            **settings,
        )
        for group in groups:
            assert torch.equal(group.keys[:, -1], new_keys[group.rows])
            assert torch.equal(group.values[:, -1], new_values[group.rows])
            shown = None
            if window is not None:
                position = group.positions[:, : group.entries]
                shown = (position > position[:, -1:] - window)[:, None]
            sunk = None if sink is None else sink.float()
            terms = LogitTerms(*settings.values(), sunk).folded(heads, 1).of_rows(group.rows % heads)
            expected = attention(query[group.rows].float(), group.keys.float(), group.values.float(), shown, terms)
            tolerance = 2e-5 if dtype == torch.float32 else 2e-2
            torch.testing.assert_close(found[group.rows].float(), expected, atol=tolerance, rtol=tolerance)
            group.append()


def decoded(model, prompt, budgets, steps, mask=None, **settings):
    """Logits of `steps` calls of one token each after a prompt, and the cache."""
    cache = CompressedCache(model, BudgetProfile.from_budgets(model, budgets, SNAPKV.to_dict()), **settings)
    new = tokens(len(prompt), steps, seed=7).to(prompt.device)
    model(prompt, cache=cache, attention_mask=mask)
    found = []
    for step in range(steps):
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        found.append(model(new[:, step : step + 1], cache=cache, attention_mask=mask).logits)
    return torch.cat(found, dim=1), cache


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "cohere2", "qwen3_next"])
def test_decoding_with_kernels_equals_decoding_without(family, counted, monkeypatch):
    model, prompt, steps = tiny_model(family).to(DEVICE), tokens(1, 40).to(DEVICE), 6
    found, cache = decoded(model, prompt, RAGGED, steps)
    assert len(counted) == steps * sum(len(layer.groups) > 1 for layer in cache.kv_layers)
    monkeypatch.setenv("EVOLKV_TRITON", "0")
    expected, plain = decoded(model, prompt, RAGGED, steps)
    assert len(counted) == steps * LAYERS
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    for mine, other in zip(cache.kv_layers, plain.kv_layers, strict=True):
        for group, same in zip(mine.groups, other.groups, strict=True):
            torch.testing.assert_close(group.keys, same.keys, atol=2e-5, rtol=0)


def test_room_is_bounded_and_a_padded_batch_stays_right(counted, monkeypatch):
    model, prompt = tiny_model("llama").to(DEVICE), tokens(2, 40).to(DEVICE)
    mask = torch.ones_like(prompt)
    mask[0, :17] = 0
    found, cache = decoded(model, prompt, RAGGED, 12, mask)
    assert len(counted) == 12 * LAYERS
    monkeypatch.setenv("EVOLKV_TRITON", "0")
    expected, plain = decoded(model, prompt, RAGGED, 12, mask)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    rows = 2 * LAYERS * KV_HEADS
    assert plain.kv_bytes <= cache.kv_bytes <= plain.kv_bytes + rows * 3 * 2 * 16 * 4


def test_copies_crops_and_beams_do_not_write_into_each_other(counted):
    model, prompt = tiny_model("llama").to(DEVICE), tokens(1, 40).to(DEVICE)
    alone, _ = decoded(model, prompt, RAGGED, 6)
    _, cache = decoded(model, prompt, RAGGED, 3)
    new = tokens(1, 6, seed=7).to(DEVICE)
    twin, other = cache.copy(), cache.copy()
    other.batch_repeat_interleave(2)
    before = len(counted)
    for step in range(3, 6):
        mine = model(new[:, step : step + 1], cache=cache).logits
        torch.testing.assert_close(mine, alone[:, step : step + 1], atol=2e-5, rtol=0)
        # The twin goes another way, and comes back to where it was.
        model(tokens(1, 1, seed=step).to(DEVICE), cache=twin)
        twin.crop(-1)
        its = model(new[:, step : step + 1], cache=twin).logits
        both = model(new[:, step : step + 1].repeat(2, 1), cache=other).logits
        torch.testing.assert_close(torch.cat([its, both]), alone[:, step : step + 1].repeat(3, 1, 1), atol=2e-5, rtol=0)
    assert len(counted) - before == 4 * 3 * LAYERS


def test_a_window_that_entries_leave_is_followed(counted, monkeypatch):
    """More of them than a group keeps room for."""
    model, prompt = tiny_model("mistral").to(DEVICE), tokens(1, 40).to(DEVICE)
    budgets = RAGGED.clip(max=20)
    found, cache = decoded(model, prompt, budgets, 24)
    assert counted
    monkeypatch.setenv("EVOLKV_TRITON", "0")
    expected, plain = decoded(model, prompt, budgets, 24)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    for mine, other in zip(cache.kv_layers, plain.kv_layers, strict=True):
        assert [group.keys.shape for group in mine.groups] == [group.keys.shape for group in other.groups]


def test_evicting_again_is_the_same_with_kernels(counted, monkeypatch):
    model, prompt = tiny_model("llama").to(DEVICE), tokens(1, 40).to(DEVICE)
    found, _ = decoded(model, prompt, RAGGED, 14, evict_every=6)
    assert counted
    monkeypatch.setenv("EVOLKV_TRITON", "0")
    expected, _ = decoded(model, prompt, RAGGED, 14, evict_every=6)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj"])
def test_nothing_is_written_where_a_gradient_is_asked_for(trained, counted):
    model, prompt = tiny_model("llama").to(DEVICE), tokens(1, 40).to(DEVICE)
    model.requires_grad_(False)
    weight = getattr(model.get_decoder().layers[0].self_attn, trained).weight
    with torch.enable_grad():
        weight.requires_grad_(True)
        logits, _ = decoded(model, prompt, RAGGED, 2)
        logits[:, -1].sum().backward()
    assert weight.grad is not None
    assert float(weight.grad.norm()) > 0


def test_mixed_number_formats_go_the_plain_way(counted):
    model, prompt = tiny_model("llama").to(DEVICE), tokens(1, 40).to(DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16 if DEVICE == "cpu" else torch.float16):
        logits, _ = decoded(model, prompt, RAGGED, 2)
    assert not counted
    assert logits.isfinite().all()


def test_a_mask_of_the_users_is_looked_at_each_time():
    mask = torch.zeros(1, 1, 1, 9)
    visible = boolean_mask(mask, 1, 1, 9, mask.device)
    assert visible.all()
    assert not hides_nothing(mask, visible)


def test_missing_triton_is_said_in_one_line(monkeypatch):
    monkeypatch.setenv("EVOLKV_TRITON", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.delitem(sys.modules, "evolkv.cache.kernels")
    monkeypatch.delattr("evolkv.cache.kernels")
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UsageError, match="EVOLKV_TRITON=1 needs Triton; pip install triton"):
        attend.triton_kernels(torch.zeros(1))


_COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from evolkv.cache import kernels

types = {"table": "*i64", "outputs": "*fp32", "maxima": "*fp32", "sums": "*fp32", "scaling": "fp32", "softcap": "fp32"}
held = ("query", "new_keys", "new_values", "sinks", "merged")
flags = {"SPLIT": 256, "ALIGNED": True, "HAS_WINDOW": True, "HAS_SOFTCAP": True, "HAS_SINKS": True, "QUERY_BLOCK": 16}


def built(kernel, dtype, capability, **constants):
    given = {name: value for name, value in (flags | constants).items() if name in kernel.arg_names}
    signature = {
        name: "constexpr" if name in given else f"*{dtype}" if name in held else types.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=given)
    options = {"num_stages": kernels._STAGES}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(len(made.asm["cubin"]), made.metadata.shared)


for dtype, size in (("bf16", 2), ("fp32", 4)):
    for dim in (8, 80, 128, 256):
        block = kernels._block(dim)
        dims = {"FOLD": 3, "KEY_DIM": dim, "KEY_BLOCK": block, "VALUE_DIM": dim, "VALUE_BLOCK": block}
        built(kernels._split_kernel, dtype, 80, TILE=kernels.tile_of(dim, dim, size), **dims)
built(kernels._split_kernel, "bf16", 90, TILE=64, **dims)
built(kernels._append_kernel, "bf16", 80, **dims)
built(kernels._merge_kernel, "bf16", 80, **dims)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_kernels_compile_for_gpus_and_fit_into_their_shared_memory(tmp_path):
    """Of which the interpreter says nothing. No GPU is needed for it."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _COMPILE],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    built = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(built) == 11
    # What consumer GPUs of compute capability 8.6 and 8.9 have for a block.
    assert max(shared for _, shared in built) <= 101376
    assert min(size for size, _ in built) > 1000
