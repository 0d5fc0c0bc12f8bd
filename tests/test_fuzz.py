"""Random models, batches, budgets and selectors: evicting equals masking, computed without any of our cache.

EVOLKV_FUZZ_CASES=20000 pytest tests/test_fuzz.py    # ten times as many as usual; 2,000 take about a minute on one core
EVOLKV_FUZZ_ONLY=137,940 pytest tests/test_fuzz.py   # the cases that an assertion named, alone
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import transformers
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from evolkv import BudgetProfile, CompressedCache
from evolkv.models import describe_model
from evolkv.models.rotary import rotary_of
from evolkv.selectors import LayerContext, PromptAttention, get_selector
from tiny import VOCABULARY

CASES = int(os.environ.get("EVOLKV_FUZZ_CASES", "2000"))
ONLY = [int(number) for number in os.environ.get("EVOLKV_FUZZ_ONLY", "").split(",") if number]
_CASES_PER_MODEL = 10
_REFERENCE = "fuzz_reference"
_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.06}
#: How far a score may be from the last one kept for the choice to be one of rounding.
_TIE = {torch.float32: 1e-4, torch.bfloat16: 0.05}


@dataclass(frozen=True)
class Reference:
    """Attention over whole sequences, without a cache: what is evicted is masked.

    The first `prompt` tokens attend to each other; later ones to what each KV head keeps of them, and to each other.
    `given` are the positions that the cache under test holds, for choices that hang on rounding.
    """

    model: object
    selector: object
    budgets: np.ndarray
    prompt: int
    given: list
    memory: dict
    kept: list

    def __call__(self, module, query, key, value, mask, scaling=None, softcap=None, sliding_window=None, **kwargs):
        row, heads = len(self.kept), key.shape[1]
        fold, total = query.shape[1] // heads, query.shape[2]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        sinks = kwargs.get("s_aux")
        held = self._hold(module, row, query, key, value, scaling, softcap, sliding_window, sinks)
        asking, position = torch.arange(total)[:, None], torch.arange(total)
        visible = (position <= asking)[None].repeat(heads, 1, 1)
        if sliding_window is not None:
            visible &= position > asking - sliding_window
        visible[:, self.prompt :, : self.prompt] &= held[:, None]
        logits = (query.float() @ key.repeat_interleave(fold, 1).float().transpose(2, 3)) * scaling
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits.masked_fill(~visible.repeat_interleave(fold, 0), float("-inf"))
        if sinks is not None:
            logits = torch.cat([logits, sinks.float().view(1, -1, 1, 1).expand(-1, -1, total, 1)], dim=-1)
        weights = logits.softmax(-1)[..., :total]
        output = weights @ value.repeat_interleave(fold, 1).float()
        return output.to(query.dtype).transpose(1, 2).contiguous(), None

    def _hold(self, module, row, query, key, value, scaling, softcap, window, sinks):
        """Which tokens of the prompt each KV head keeps, ``[heads, prompt]``: the best by score of those in reach."""
        end = self.prompt
        context = LayerContext(row, functools.partial(rotary_of, self.model, module.layer_idx), self.memory)
        prompt = (query[:, :, :end], key[:, :, :end], value[:, :, :end])
        scores = self.selector.score(
            PromptAttention(*prompt, scaling, softcap, window, layer=context, sinks=sinks),
        )[0].double()
        if window is not None:
            scores[:, : max(0, end - window)] = -torch.inf
        held = torch.zeros(scores.shape, dtype=torch.bool)
        for head, budget in enumerate(self.budgets[row].tolist()):
            count = min(budget, end, window or end)
            order = scores[head].sort(descending=True, stable=True)
            held[head, order.indices[:count]] = True
            given = torch.zeros(end, dtype=torch.bool)
            given[self.given[row][head]] = True
            differs = (held[head] != given).nonzero()[:, 0]
            if len(differs):
                last = float(order.values[count - 1])
                size = float(scores[head][scores[head].isfinite()].abs().max())
                off = (scores[head, differs] - last).abs().max()
                assert int(given.sum()) == count, f"layer {row}, head {head} holds {int(given.sum())}, not {count}"
                assert float(off) <= _TIE[query.dtype] * size, f"layer {row}, head {head} keeps other tokens"
                held[head] = given
        self.kept.append(held)
        return held


def random_model(seed):
    """A random architecture with random weights."""
    rng = np.random.default_rng([seed, 1])
    pick = lambda *values: values[int(rng.integers(len(values)))]  # noqa: E731
    kv_heads, fold, head_dim = pick(1, 2, 3), pick(1, 2, 4), pick(4, 8, 16)
    heads, window = kv_heads * fold, pick(5, 11, 24)
    layers = pick(1, 2, 3)
    families = (
        ("Llama", {}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
        ("Llama", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}),
        ("Mistral", {"sliding_window": window}),
        ("Qwen3", {}),
        ("Gemma2", {"sliding_window": window, "attn_logit_softcapping": pick(None, 2.0, 50.0)}),
        ("Gemma3", {"sliding_window": window, "sliding_window_pattern": 2}),
        ("Phi3", {"hidden_size": heads * head_dim, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
        ("StableLm", {"hidden_size": heads * head_dim, "partial_rotary_factor": 0.5}),
        ("SmolLM3", {"no_rope_layers": [int(rng.integers(2)) for _ in range(layers)]}),
        ("Olmo2", {"hidden_size": heads * head_dim}),
        ("Granite", {"attention_multiplier": float(rng.uniform(0.05, 1))}),
        ("Cohere2", {"sliding_window": window, "layer_types": None}),
        (
            "GptOss",
            {
                "sliding_window": window,
                "num_local_experts": 2,
                "num_experts_per_tok": 2,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        (
            "Bamba",
            {
                "hidden_size": heads * head_dim,
                "num_hidden_layers": layers + 1,
                "attn_layer_indices": [i for i in range(layers + 1) if i != layers // 2],
                "mamba_n_heads": 2 * heads,
                "mamba_d_head": head_dim,
                "mamba_n_groups": 1,
                "mamba_d_state": 4,
            },
        ),
        (
            "Lfm2",
            {
                "hidden_size": heads * head_dim,
                "num_hidden_layers": layers + 1,
                "full_attn_idxs": [i for i in range(layers + 1) if i != layers // 2],
            },
        ),
    )
    name, own = families[seed % len(families)]
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 8 * heads,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "query_pre_attn_scalar": head_dim,
    }
    torch.manual_seed(seed)
    attention = "eager" if name in ("Gemma2", "GptOss") else pick("sdpa", "eager")
    config_class = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    config = config_class(**{**shape, **own}, attn_implementation=attention)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        # Wider than the initialisation, so that attention is far from even.
        if parameter_name.endswith("sinks"):
            parameter.normal_()
        elif parameter.ndim > 1:
            parameter.mul_(3)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    # Recurrent states in half precision differ by more than what is tested here.
    hybrid = name in ("Bamba", "Lfm2")
    model = model.to(torch.float32 if hybrid else pick(torch.float32, torch.float32, torch.bfloat16))
    return model, f"{name} {layers}x{kv_heads}x{fold}x{head_dim} window {own.get('sliding_window')} {attention}"


def random_selector(rng):
    name = ("snapkv", "streaming_llm", "knorm", "keydiff", "tova", "h2o", "chunkkv")[int(rng.integers(7))]
    window = int(rng.integers(1, 6))
    parameters = {
        "snapkv": {"window": window, "kernel": int(rng.choice([1, 3, 5]))},
        "streaming_llm": {"sinks": int(rng.integers(0, 4))},
        "h2o": {"window": window},
        "chunkkv": {"window": window, "chunk": int(rng.integers(1, 6))},
    }
    return get_selector({"name": name, **parameters.get(name, {})})


def random_budgets(rng, shape, least, longest):
    """Per head or per layer: the least possible, about the prompt's length, beyond it, or anything."""
    kinds = [least, least + 1, max(least, longest - 1), max(least, longest), longest + 40]
    row = lambda size: np.where(  # noqa: E731
        rng.random(size) < 0.4, rng.choice(kinds, size), rng.integers(least, max(least + 1, longest + 3), size)
    )
    return row(shape) if rng.random() < 0.6 else np.repeat(row((shape[0], 1)), shape[1], axis=1)


def check(number, model):
    """One case; raises AssertionError with what differs."""
    rng = np.random.default_rng([number, 2])
    info, hybrid = describe_model(model), model.config.model_type in ("bamba", "lfm2")
    selector = random_selector(rng)
    batch = int(rng.choice([1, 1, 2, 3]))
    lengths = [int(rng.integers(1, 40)) for _ in range(batch)]
    side = "left" if hybrid or rng.random() < 0.5 else "right"
    steps = [int(rng.choice([1, 1, 2, 4])) for _ in range(int(rng.integers(1, 5)))]
    budgets = random_budgets(rng, (info.num_layers, info.num_kv_heads), selector.min_budget, max(lengths))
    generator = torch.Generator().manual_seed(number)
    rows = [torch.randint(3, VOCABULARY, (length + sum(steps),), generator=generator) for length in lengths]

    width = max(lengths)
    ids, mask = torch.zeros(batch, width, dtype=torch.long), torch.zeros(batch, width, dtype=torch.long)
    for i, length in enumerate(lengths):
        where = slice(width - length, None) if side == "left" else slice(0, length)
        ids[i, where], mask[i, where] = rows[i][:length], 1
    cache = CompressedCache(model, BudgetProfile.from_budgets(model, budgets, selector.to_dict()))
    got = [[] for _ in rows]
    output = model(ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), **cache.as_argument)
    for i in range(batch):
        got[i].append(output.logits[i][mask[i].bool()])
    positions = [[heads if batch > 1 else [heads] for heads in layer] for layer in cache.positions]
    done = 0
    for step in steps:
        mask = torch.cat([mask, mask.new_ones(batch, step)], dim=1)
        starts = [length + done for length in lengths]
        new = torch.stack([row[start : start + step] for row, start in zip(rows, starts, strict=True)])
        places = torch.tensor(starts)[:, None] + torch.arange(step)
        output = model(new, attention_mask=mask, position_ids=places, **cache.as_argument)
        for i in range(batch):
            got[i].append(output.logits[i])
        done += step
    cache.release()

    own = model.config._attn_implementation
    for i, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        given = [[heads[i] for heads in layer] for layer in positions]
        reference = Reference(model, selector, budgets, length, given, {}, [])
        AttentionInterface.register(_REFERENCE, reference)
        AttentionMaskInterface.register(_REFERENCE, lambda **kwargs: None)
        model.config._attn_implementation = _REFERENCE
        try:
            expected = model(row[None], use_cache=False).logits[0]
        finally:
            model.config._attn_implementation = own
        error = float((torch.cat(got[i]) - expected).abs().max() / expected.abs().max().clamp(min=1))
        assert error <= _TOLERANCE[model.dtype], (
            f"sequence {i} of lengths {lengths} padded on the {side}, steps {steps}, {selector}, "
            f"budgets {budgets.tolist()}: off by {error:.2g}"
        )


@pytest.mark.filterwarnings("ignore")
def test_evicting_equals_masking_for_random_models_batches_budgets_and_selectors():
    failures = []
    numbers = ONLY or range(CASES)
    held = None
    with torch.inference_mode():
        for number in numbers:
            if held is None or held[0] != number // _CASES_PER_MODEL:
                held = (number // _CASES_PER_MODEL, *random_model(number // _CASES_PER_MODEL))
            try:
                check(number, held[1])
            except Exception as error:
                failures.append((number, f"case {number} ({held[2]}): {type(error).__name__}: {error}"))
    seeds = ",".join(str(number) for number, _ in failures)
    assert not failures, f"{len(failures)} of {len(numbers)} cases; EVOLKV_FUZZ_ONLY={seeds}\n" + "\n".join(
        text for _, text in failures[:20]
    )
