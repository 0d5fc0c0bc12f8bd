"""Random models, batches, budgets and selectors: evicting equals masking, computed without any of our cache.

One test knows what must be kept of a prompt, and evicts once; another does so where layers drop tokens from all deeper
ones. The third evicts again, in chunks, after turns and while tokens are generated; it takes from the cache what is
held, and checks how much that is and what attention makes of it.

A tenth of the cases is quick; the rest is marked slow.

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

import reading_reference
import smallkv_reference
from evolkv import BudgetProfile, CompressedCache
from evolkv.cache.companion import register_companion
from evolkv.errors import ModelError
from evolkv.models import describe_model, model_facts
from evolkv.models.rotary import rotary_of
from evolkv.selectors import LayerContext, PromptAttention, get_selector
from tiny import VOCABULARY

CASES = int(os.environ.get("EVOLKV_FUZZ_CASES", "2000"))
ONLY = [int(number) for number in os.environ.get("EVOLKV_FUZZ_ONLY", "").split(",") if number]
_CASES_PER_MODEL = 10
_REFERENCE = "fuzz_reference"
_TOLERANCE = {torch.float32: 2e-5, torch.float16: 0.02, torch.bfloat16: 0.06}
#: How far a score may be from the last one kept for the choice to be one of rounding.
_TIE = {torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}


class Masking:
    """Attention over whole sequences, without a cache: what is evicted is masked."""

    def __call__(self, module, query, key, value, mask, scaling=None, softcap=None, sliding_window=None, **kwargs):
        heads = key.shape[1]
        fold, total = query.shape[1] // heads, query.shape[2]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        sinks = kwargs.get("s_aux")
        asking, position = torch.arange(total)[:, None], torch.arange(total)
        visible = (position <= asking)[None].repeat(heads, 1, 1)
        if sliding_window is not None:
            visible &= position > asking - sliding_window
        self.evict(visible, module, query, key, value, scaling, softcap, sliding_window, sinks)
        weights = self.compensated(self.weights(visible, query, key, scaling, softcap, sinks))
        output = weights @ value.repeat_interleave(fold, 1).float()
        return output.to(query.dtype).transpose(1, 2).contiguous(), None

    def weights(self, visible, query, key, scaling, softcap, sinks):
        """Attention among tokens, as far as they are visible, ``[1, heads, tokens, tokens]``."""
        fold, total = query.shape[1] // key.shape[1], query.shape[2]
        logits = (query.float() @ key.repeat_interleave(fold, 1).float().transpose(2, 3)) * scaling
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap
        logits = logits.masked_fill(~visible.repeat_interleave(fold, 0), float("-inf"))
        if sinks is not None:
            logits = torch.cat([logits, sinks.float().view(1, -1, 1, 1).expand(-1, -1, total, 1)], dim=-1)
        return logits.softmax(-1)[..., :total]

    def compensated(self, weights):
        """What becomes of the attention."""
        return weights

    def logits(self, row):
        """Logits of a text ``[tokens]`` by a model whose attention is this."""
        own = self.model.config._attn_implementation
        AttentionInterface.register(_REFERENCE, self)
        AttentionMaskInterface.register(_REFERENCE, lambda **kwargs: None)
        self.model.config._attn_implementation = _REFERENCE
        try:
            return self.model(row[None], use_cache=False).logits[0]
        finally:
            self.model.config._attn_implementation = own


@dataclass(frozen=True)
class Once(Masking):
    """The first `prompt` tokens attend to each other; later ones to what each KV head keeps of them, and to each other.

    `given` are the positions that the cache under test holds, for choices that hang on rounding.
    """

    model: object
    selector: object
    budgets: np.ndarray
    prompt: int
    given: list
    memory: dict
    kept: list

    def evict(self, visible, module, query, key, value, scaling, softcap, window, sinks):
        """Hides what each KV head does not keep of the prompt: it keeps the best by score of those in reach."""
        end, row = self.prompt, len(self.kept)
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
        visible[:, end:, :end] &= held[:, None]


@dataclass(frozen=True)
class Pruned(Masking):
    """Of the first `prompt` tokens each layer reads those that all layers below have kept, by one budget a layer.

    `left` are the tokens that enter each layer; `given` are those that the cache under test holds.
    """

    model: object
    selector: object
    budgets: list
    prompt: int
    given: list
    left: list

    def evict(self, visible, module, query, key, value, scaling, softcap, window, sinks):
        """Hides what earlier layers have dropped, and from later tokens what this one does not keep."""
        end, entering, row = self.prompt, self.left[-1], len(self.left) - 1
        visible[:, :, :end] &= entering
        # A dropped token sees itself, so that it stays a number; nobody sees it.
        visible[:, :end, :end] |= torch.diag(~entering)
        votes = self.votes(visible[:, :end, :end], query[:, :, :end], key[:, :, :end], scaling, softcap, sinks)
        age = end - 1 - torch.arange(end)
        within = entering if window is None else entering & (age < window)
        count = min(self.budgets[row], int(within.sum()))
        order = sorted((i for i in range(end) if entering[i]), key=lambda i: (-float(votes[i]), i))
        protected, recent = self.selector.protected, 1 + int(self.selector.recent * end)

        def first(place):
            by_age = int(age[order[place]])
            old = by_age >= recent or (by_age and not protected)
            return min(
                (place + 1) / (1 - protected) if protected < 1 else np.inf,
                np.inf if old else 0 if not by_age else by_age / protected,
            )

        places = sorted(range(len(order)), key=lambda place: (first(place), place))
        held = torch.zeros(end, dtype=torch.bool)
        held[[order[place] for place in places if within[order[place]]][:count]] = True
        for head in self.given[row]:
            given = torch.zeros(end, dtype=torch.bool)
            given[head] = True
            differs = (held != given).nonzero()[:, 0]
            assert int(given.sum()) == count, f"layer {row} holds {int(given.sum())}, not {count}"
            if len(differs):
                off = votes[differs].max() - votes[differs].min()
                assert float(off) <= _TIE[query.dtype] * float(votes[votes.isfinite()].max()), f"layer {row} differs"
                held = given
        visible[:, end:, :end] &= held
        self.left.append(entering if window is not None else held)

    def votes(self, visible, query, key, scaling, softcap, sinks):
        """Attention that each token gets from the recent ones that are left, ``[tokens]``."""
        end, entering = self.prompt, self.left[-1]
        attention = self.weights(visible, query, key, scaling, softcap, sinks)[0].mean(0)
        recent = int(self.selector.recent * end)
        votes = torch.zeros(end)
        for i in range(end - 1 - recent, end):
            if entering[i]:
                votes += attention[i] * (1 + (self.selector.weight - 1) * (i - (end - 1 - recent)) / max(1, recent))
        votes[: self.selector.sinks] = torch.inf
        return votes


@dataclass(frozen=True)
class Again(Masking):
    """Each token attends to what every KV head held before its call, and to those of its call.

    `calls` are ``(first token, token after the last, end of the last cut, positions by layer and head)``; what came
    since the last cut is held.
    """

    model: object
    calls: list
    layers: list

    def evict(self, visible, *_):
        """Hides what was not held before a call."""
        for start, stop, cut, positions in self.calls:
            for head, held in enumerate(positions[len(self.layers)]):
                gone = torch.ones(cut, dtype=torch.bool)
                gone[held] = False
                visible[head, start:stop, :cut] &= ~gone
        self.layers.append(None)


@dataclass(frozen=True)
class Reads(Once):
    """As `Once`, and each of some tokens attends only to what RocketKV's equations choose of that.

    `alone` are the tokens that are read so. The tokens before `decided` attend to what is beyond doubt.
    """

    alone: set
    decided: list

    def evict(self, visible, module, query, key, value, scaling, softcap, window, sinks):
        """Hides what each KV head does not keep, and what each token does not choose."""
        super().evict(visible, module, query, key, value, scaling, softcap, window, sinks)
        if window is not None:
            return
        fold = query.shape[1] // key.shape[1]
        for head, kept in enumerate(self.kept[-1]):
            held, asking = int(kept.sum()), query[0, head * fold : (head + 1) * fold]
            read = self.selector.entries_read(held, self.prompt, held)
            for token in sorted(self.alone):
                if token >= self.decided[0]:
                    break
                entries = visible[head, token].nonzero()[:, 0]
                try:
                    chosen = reading_reference.chosen(
                        asking[:, token], key[0, head, entries], held, read, scaling, margin=1e-4
                    )
                except reading_reference.UndecidedError:
                    self.decided[0] = token
                    break
                visible[head, token] = False
                visible[head, token, entries[chosen]] = True


@dataclass(frozen=True)
class Turns(Masking):
    """Each of some tokens attends to what RocketKV's equations choose of what the turn before it wanted, and since.

    `calls` are ``(first token, first that is read alone, token after the last)``; `decided` as in `Reads`.
    """

    model: object
    selector: object
    budgets: np.ndarray
    calls: list
    decided: list
    layers: list

    def evict(self, visible, module, query, key, value, scaling, softcap, window, sinks):
        """Hides what each token does not choose."""
        budgets = self.budgets[len(self.layers)].tolist()
        self.layers.append(None)
        if window is not None:
            return
        fold, readable, since = query.shape[1] // key.shape[1], [], 0
        for start, alone, stop in self.calls:
            if alone > start:
                seen = (query[:, :, start:alone], key[:, :, :alone], value[:, :, :alone])
                prompt = PromptAttention(*seen, scaling, softcap, first_query=start, sinks=sinks)
                scores = self.selector.score(prompt)[0].double().sort(descending=True, stable=True)
                since, readable = alone, []
                for head, budget in enumerate(budgets):
                    count, ranked = min(budget, alone), scores.values[head].tolist()
                    if count < alone and 0 < ranked[count - 1] - ranked[count] < 1e-4 * ranked[count - 1]:
                        self.decided[0] = min(self.decided[0], alone)
                    readable.append(scores.indices[head, :count].sort().values.tolist())
            for token in range(alone, stop):
                for head, kept in enumerate(readable):
                    if token >= self.decided[0]:
                        return
                    entries = torch.tensor([*kept, *range(since, token + 1)])
                    asking = query[0, head * fold : (head + 1) * fold, token]
                    read = self.selector.entries_read(len(kept), since, len(kept))
                    try:
                        chosen = reading_reference.chosen(
                            asking, key[0, head, entries], len(kept), read, scaling, margin=1e-4
                        )
                    except reading_reference.UndecidedError:
                        self.decided[0] = token
                        return
                    visible[head, token] = False
                    visible[head, token, entries[chosen]] = True


@dataclass(frozen=True)
class Watched(Masking):
    """Attention as it is; `seen` are its weights in each layer without a window, ``[heads, tokens, tokens]``."""

    model: object
    seen: list

    def evict(self, visible, module, query, key, value, scaling, softcap, window, sinks):
        """Hides nothing."""
        if window is None:
            self.seen.append(self.weights(visible, query, key, scaling, softcap, sinks)[0])


@dataclass(frozen=True)
class Accompanied(Masking):
    """After the first `prompt` tokens each reads what a companion chooses.

    `companion` is its attention, ``[heads, tokens, tokens]``. `decided` as in `Reads`; `marginal` is what of it takes
    the place of the layer's.
    """

    model: object
    selector: object
    budgets: np.ndarray
    prompt: int
    companion: torch.Tensor
    decided: list
    layers: list
    marginal: list

    def evict(self, visible, module, query, key, value, scaling, softcap, window, sinks):
        """Hides what is neither critical nor recent, and notes what takes the place of the marginal part."""
        end, heads, fold = self.prompt, query.shape[1], query.shape[1] // key.shape[1]
        budgets = self.budgets[len(self.layers)].tolist()
        self.layers.append(None)
        self.marginal[:] = [torch.zeros(heads, *visible.shape[1:])]
        if window is not None:
            return
        first = min(self.selector.match, end)
        part = visible[:, :first, :first], query[:, :, :first], key[:, :, :first]
        own = self.weights(*part, scaling, softcap, sinks)[0].sum(1)
        theirs = self.companion[:, :first, :first].sum(1)
        for head, budget in enumerate(budgets):
            counts = smallkv_reference.classes(self.selector, budget, end)
            if counts is None:
                continue
            critical, recent, weighed = counts
            group, older = range(head * fold, (head + 1) * fold), end - recent
            token = end
            try:
                partners = [smallkv_reference.partner(own[i], theirs, margin=1e-4) for i in group]
                for token in range(end, visible.shape[1]):
                    received = self.companion[partners, : token + 1, :older].sum(1).mean(0)
                    exact, rest = smallkv_reference.chosen(received, critical, weighed, margin=1e-4)
                    visible[head, token, :older] = False
                    visible[head, token, exact] = True
                    for i, j in zip(group, partners, strict=True):
                        self.marginal[0][i, token, rest] = self.companion[j, token, rest]
            except smallkv_reference.UndecidedError:
                self.decided[0] = min(self.decided[0], token)

    def compensated(self, weights):
        """The attention without the marginal part, and the companion's in its place."""
        return weights * (1 - self.marginal[0].sum(-1, keepdim=True)) + self.marginal[0]


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def longrope(rng, head_dim):
    """Random factors for each pair of channels; texts stay within the limit of the short ones."""
    factors = {name: rng.uniform(1, 4, head_dim // 2).tolist() for name in ("short_factor", "long_factor")}
    return {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 256, **factors}


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
        ("Llama", {"rope_parameters": LLAMA3}),
        ("Phi3", {"hidden_size": heads * head_dim, "rope_parameters": longrope(rng, head_dim)}),
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
    model = model.to(
        torch.float32 if hybrid else pick(torch.float32, torch.float32, torch.float32, torch.float16, torch.bfloat16)
    )
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


def random_rocketkv(rng):
    window, kernel = int(rng.integers(1, 6)), int(rng.choice([1, 3, 5]))
    return get_selector(
        {"name": "rocketkv", "window": window, "kernel": kernel, "read": int(rng.choice([0, 2, 3, 5, 9]))}
    )


def random_budgets(rng, shape, least, longest):
    """Per head or per layer: the least possible, about the prompt's length, beyond it, or anything."""
    kinds = [least, least + 1, max(least, longest - 1), max(least, longest), longest + 40]
    row = lambda size: np.where(  # noqa: E731
        rng.random(size) < 0.4, rng.choice(kinds, size), rng.integers(least, max(least + 1, longest + 3), size)
    )
    return row(shape) if rng.random() < 0.6 else np.repeat(row((shape[0], 1)), shape[1], axis=1)


class Case:
    """What the cases of both tests begin with: a padded batch of texts, of which the first tokens are the prompts."""

    def __init__(self, number, model, longest=40, selector=random_selector):
        self.rng = np.random.default_rng([number, 2])
        self.model, self.hybrid = model, model.config.model_type in ("bamba", "lfm2")
        self.selector = selector(self.rng)
        self.batch = int(self.rng.choice([1, 1, 2, 3]))
        self.lengths = [int(self.rng.integers(1, longest)) for _ in range(self.batch)]
        self.side = "left" if self.hybrid or self.rng.random() < 0.5 else "right"
        self.steps = [int(self.rng.choice([1, 1, 2, 4])) for _ in range(int(self.rng.integers(1, 5)))]
        info = describe_model(model)
        shape, longest = (info.num_layers, info.num_kv_heads), max(self.lengths)
        self.budgets = random_budgets(self.rng, shape, self.selector.min_budget, longest)
        generator = torch.Generator().manual_seed(number)
        self.rows = [
            torch.randint(3, VOCABULARY, (length + sum(self.steps),), generator=generator) for length in self.lengths
        ]
        #: Of each sequence, how many tokens were read; the mask of all columns read; and the logits of each token.
        self.read = [0] * self.batch
        self.mask = torch.zeros(self.batch, 0, dtype=torch.long)
        self.got = [[] for _ in self.rows]

    def feed(self, counts, side, cache):
        """Reads so many further tokens of each sequence in one call."""
        width = max(counts)
        ids, mask = torch.zeros(self.batch, width, dtype=torch.long), torch.zeros(self.batch, width, dtype=torch.long)
        places = torch.zeros_like(ids)
        for i, count in enumerate(counts):
            where = slice(width - count, None) if side == "left" else slice(0, count)
            start = self.read[i]
            ids[i, where], mask[i, where] = self.rows[i][start : start + count], 1
            places[i, where] = torch.arange(start, start + count)
            self.read[i] += count
        self.mask = torch.cat([self.mask, mask], dim=1)
        output = self.model(ids, attention_mask=self.mask, position_ids=places, cache=cache)
        for i in range(self.batch):
            self.got[i].append(output.logits[i][mask[i].bool()])

    def counts_of(self, step):
        """How many tokens each sequence has in a call of so many columns."""
        # Recurrent states read padding in the middle.
        if self.hybrid or self.rng.random() < 0.5:
            return [step] * self.batch
        counts = [int(self.rng.integers(1, step + 1)) for _ in self.rows]
        counts[int(self.rng.integers(self.batch))] = step
        return counts

    def compare(self, i, reference):
        """Raises AssertionError if the logits of a sequence are not those of the reference, as far as it decides."""
        got = torch.cat(self.got[i])
        expected = reference.logits(self.rows[i][: len(got)])
        if isinstance(reference, (Reads, Turns, Accompanied)):
            got, expected = got[: reference.decided[0]], expected[: reference.decided[0]]
        error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1))
        assert error <= _TOLERANCE[self.model.dtype], f"sequence {i} of {self.said()}: off by {error:.2g}"

    def said(self):
        """The case in words."""
        return (
            f"lengths {self.lengths} padded on the {self.side}, steps {self.steps}, {self.selector}, budgets "
            f"{self.budgets.tolist()}, {str(self.model.dtype).removeprefix('torch.')}"
        )


def prunes(number, model):
    """One case of the third test: tokens that a layer drops are absent from all deeper ones."""
    case, facts = Case(number, model), model_facts(model)
    rng, layers = case.rng, facts.num_layers
    selector = get_selector(
        {
            "name": "pyramidinfer",
            "recent": float(rng.choice([0.0, 0.2, 0.6])),
            "weight": float(rng.choice([0.5, 1.2])),
            "sinks": int(rng.integers(0, 5)),
            "protected": float(rng.choice([0.0, 0.5, 0.75, 1.0])),
        }
    )
    longest = max(case.lengths)
    budgets = np.sort(rng.integers(1, longest + 3, layers))[::-1]
    case.selector, case.budgets = selector, budgets
    profile = lambda: BudgetProfile.from_budgets(model, budgets, selector)  # noqa: E731
    if case.hybrid or None not in facts.sliding_windows:
        with pytest.raises(ModelError, match="no prefill can be pruned"):
            CompressedCache(model, profile())
        return
    cache = CompressedCache(model, profile())
    case.feed(case.lengths, case.side, cache)
    given, shares = [positions_of(cache, i) for i in range(case.batch)], cache.prefill_share_by_sequence
    for step in case.steps:
        case.feed(case.counts_of(step), "left", cache)
    cache.release()
    for i, length in enumerate(case.lengths):
        left = [torch.ones(length, dtype=torch.bool)]
        reference = Pruned(model, selector, budgets.tolist(), length, given[i], left)
        expected = reference.logits(case.rows[i][: length + sum(case.steps)])
        got = torch.cat(case.got[i])
        read = torch.cat([left[-2], torch.ones(len(got) - length, dtype=torch.bool)])
        error = float((got - expected[: len(got)])[read].abs().max() / expected.abs().max().clamp(min=1))
        assert error <= _TOLERANCE[model.dtype], f"sequence {i} of {case.said()}: off by {error:.2g}"
        assert shares[i] == pytest.approx(sum(int(each.sum()) for each in left[:-1]) / (layers * length))


def positions_of(cache, i):
    """Positions held of a sequence, by layer and head."""
    return [[heads if cache.num_rows == 1 else heads[i] for heads in layer] for layer in cache.positions]


def evicts_once(number, model):
    """One case of the first test."""
    case = Case(number, model)
    cache = CompressedCache(model, BudgetProfile.from_budgets(model, case.budgets, case.selector.to_dict()))
    case.feed(case.lengths, case.side, cache)
    given = [positions_of(cache, i) for i in range(case.batch)]
    for step in case.steps:
        case.feed(case.counts_of(step), "left", cache)
    cache.release()
    for i, length in enumerate(case.lengths):
        case.compare(i, Once(model, case.selector, case.budgets, length, given[i], {}, []))


def reads_a_part(number, model):
    """One case of the first test under RocketKV, whose new tokens do not read all that is held."""
    model = model.float()
    case = Case(number, model, selector=random_rocketkv)
    cache = CompressedCache(model, BudgetProfile.from_budgets(model, case.budgets, case.selector.to_dict()))
    case.feed(case.lengths, case.side, cache)
    given = [positions_of(cache, i) for i in range(case.batch)]
    alone = [set() for _ in case.rows]
    for step in case.steps:
        counts = case.counts_of(step)
        first = int(case.rng.integers(0, step + 1))
        cache.expect_answers([first] * case.batch)
        # What comes alone is generated, also where the rest of its call is, or the model reads token by token.
        alike = step == 1 or (first == 1 and step > 1) or model.config.model_type == "bamba"
        generated = step if alike else step - first
        for i, count in enumerate(counts):
            end = case.read[i] + count
            alone[i] |= set(range(end - min(generated, count), end))
        case.feed(counts, "left", cache)
    cache.release()
    for i, length in enumerate(case.lengths):
        first = [len(case.rows[i])]
        case.compare(i, Reads(model, case.selector, case.budgets, length, given[i], {}, [], alone[i], first))


def random_multi_turn(rng):
    return get_selector({**random_rocketkv(rng).to_dict(), "name": "rocketkv_mt"})


def takes_turns(number, model):
    """One case of the first test under RocketKV's multi-turn variant, which drops nothing."""
    model = model.float()
    case = Case(number, model, selector=random_multi_turn)
    cache = CompressedCache(model, BudgetProfile.from_budgets(model, case.budgets, case.selector.to_dict()))
    calls, decided = [[(0, length, length)] for length in case.lengths], [[len(row)] for row in case.rows]
    case.feed(case.lengths, case.side, cache)
    for step in case.steps:
        counts = case.counts_of(step)
        first = int(case.rng.integers(0, step + 1))
        cache.expect_answers([first] * case.batch)
        if step == 1 or first == 1 or model.config.model_type == "bamba":
            first = 0
        for i, count in enumerate(counts):
            start, stop = case.read[i], case.read[i] + count
            calls[i].append((start, max(start, stop - (step - first)), stop))
            if first and count <= step - first:
                # A turn that is nothing but padding has no queries to choose by.
                decided[i][0] = min(decided[i][0], start)
        case.feed(counts, "left", cache)
    cache.release()
    for i in range(case.batch):
        case.compare(i, Turns(model, case.selector, case.budgets, calls[i], decided[i], []))


def random_smallkv(rng):
    critical, recent, marginal = (int(rng.integers(*ends)) for ends in ((0, 4), (0, 3), (1, 5)))
    parts = {"critical": critical, "recent": recent, "marginal": marginal, "match": int(rng.choice([3, 12, 200]))}
    return get_selector({"name": "smallkv", "model": "fuzz", **parts})


def reads_along(number, model):
    """One case of the first test under SmallKV, whose companion is another random model."""
    model = model.float()
    case = Case(number, model, selector=random_smallkv)
    for seed in range(number, number + 100):
        companion, said = random_model(10_000 + seed)
        fits = case.hybrid or companion.config.model_type not in ("bamba", "lfm2")
        if fits and None in model_facts(companion).sliding_windows:
            break
    register_companion("fuzz", companion.float())
    cache = CompressedCache(model, BudgetProfile.from_budgets(model, case.budgets, case.selector.to_dict()))
    case.feed(case.lengths, case.side, cache)
    for step in case.steps:
        case.feed(case.counts_of(step), "left", cache)
    cache.release()
    for i, length in enumerate(case.lengths):
        watched = Watched(companion, [])
        watched.logits(case.rows[i])
        decided = [len(case.rows[i])]
        reference = Accompanied(model, case.selector, case.budgets, length, torch.cat(watched.seen), decided, [], [])
        try:
            case.compare(i, reference)
        except AssertionError as error:
            raise AssertionError(f"companion {said}: {error}") from None


def evicts_again(number, model):
    """One case of the second test."""
    case, settings = Case(number, model, longest=24), {}
    by_token = model.config.model_type == "bamba"
    if not by_token and case.rng.random() < 0.6:
        settings["prefill_chunk"] = int(case.rng.integers(4, 12))
    elif not by_token and case.rng.random() < 0.5:
        settings["evict"] = "again"
    if not settings or case.rng.random() < 0.3:
        settings["evict_every"] = int(case.rng.integers(1, 8))
    if case.hybrid:
        case.lengths = [min(case.lengths)] * case.batch
    selector = case.selector.to_dict()
    if case.selector.looks_at_other_layers:
        selector["reuse"] = 1
    cache = CompressedCache(model, BudgetProfile.from_budgets(model, case.budgets, selector), **settings)
    calls = [[] for _ in case.rows]

    def feed(counts, side):
        for i, count in enumerate(counts):
            if case.read[i]:
                cut = cache.kv_layers[0].prompt_lengths[i]
                calls[i].append((case.read[i], case.read[i] + count, cut, positions_of(cache, i)))
        case.feed(counts, side, cache)
        check_sizes(case, cache)

    # What is held between the pieces of one call cannot be seen from outside: a call for each.
    left, most = list(case.lengths), max(2, settings.get("prefill_chunk", max(case.lengths)) // 2)
    if by_token:
        most, case.steps = max(left), [1] * sum(case.steps)
    while any(left):
        # A call of a single token has no padding.
        counts = [count if count <= most + 1 else most for count in left]
        feed(counts, case.side)
        left = [rest - count for rest, count in zip(left, counts, strict=True)]
    for step in case.steps:
        feed(case.counts_of(step), "left")
    cache.release()
    try:
        for i in range(case.batch):
            case.compare(i, Again(model, calls[i], []))
    except AssertionError as error:
        raise AssertionError(f"{settings}: {error}") from None


def check_sizes(case, cache):
    """Raises AssertionError if a head holds more, or after a cut less, than its budget of what it has seen."""
    for layer, budgets in zip(cache.kv_layers, case.budgets, strict=True):
        for i, length in enumerate(layer.prompt_lengths):
            for head, budget in enumerate(budgets.tolist()):
                held = len(layer.kept_positions(i, head))
                most = min(budget, length)
                assert held <= most, f"{held} of {length} held under a budget of {budget}: {case.said()}"
                if layer.sliding_window is None:
                    assert held == most, f"{held} of {length} held under a budget of {budget}: {case.said()}"


def cases(name, check, total):
    """Parameters of the test: the chosen cases, or a tenth of all and the rest."""
    if ONLY:
        return [pytest.param(check, ONLY, id=name)]
    return [
        pytest.param(check, range(total // 10), id=name),
        pytest.param(check, range(total // 10, total), id=f"{name}-the-rest", marks=pytest.mark.slow),
    ]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("check", "numbers"),
    [
        *cases("once", evicts_once, CASES),
        *cases("again", evicts_again, CASES // 5),
        *cases("reading", reads_a_part, CASES // 10),
        *cases("turns", takes_turns, CASES // 10),
        *cases("prunes", prunes, CASES // 5),
        *cases("along", reads_along, CASES // 20),
    ],
)
def test_evicting_equals_masking_for_random_models_batches_budgets_and_selectors(check, numbers):
    failures = []
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
