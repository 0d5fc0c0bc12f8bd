"""A profile as a press of kvpress 0.5.5, in a Python file that needs nothing of EvolKV."""

from __future__ import annotations

import re
from keyword import iskeyword

from evolkv.errors import UsageError
from evolkv.profile import BudgetProfile

#: Our selectors' parameters as the arguments of the press that ranks tokens in the same way.
_PRESSES: dict[str, tuple[str, dict[str, str]]] = {
    "snapkv": ("WindowPress", {"window": "window_size", "kernel": "kernel_size", "pooling": "pooling", "gqa": "gqa"}),
    "tova": ("TOVAPress", {}),
    "streaming_llm": ("SinksPress", {"sinks": "n_sink"}),
    "knorm": ("KnormPress", {}),
    "keydiff": ("KeyDiffPress", {}),
    "expected_attention": (
        "ExpectedAttentionPress",
        {"future": "n_future_positions", "sinks": "n_sink", "covariance": "use_covariance", "value_norm": "use_vnorm"},
    ),
}

_HEAD = '''"""{title}

Written by `evolkv profile export --to kvpress` for kvpress 0.5.5, which wants transformers below 5.3.

    from {module} import press

    with press(model):
        model.generate(**inputs)
"""

from dataclasses import dataclass

import torch
from kvpress import {imports}
from kvpress.presses.base_press import BasePress

# Entries kept of a prompt by each KV head, a row per layer.
BUDGETS = [
{budgets}
]

'''

_BUDGETS_PRESS = '''
@dataclass
class BudgetsPress(BasePress):
    """Cuts each layer to a number of tokens, whatever the length of the prompt.

    Where the heads of a layer differ, the layer holds as many entries as the head that keeps most; for the other heads
    kvpress masks what is beyond their budget, which frees no memory.

    Args:
        press: ranks the tokens.
        budgets: entries to keep, by layer and KV head.
    """

    press: BasePress
    budgets: list

    def post_init_from_model(self, model):
        config = model.config.get_text_config()
        found = (config.num_hidden_layers, config.num_key_value_heads)
        expected = (len(self.budgets), len(self.budgets[0]))
        if found != expected:
            raise ValueError(f"the budgets are for (layers, KV heads) {expected}, but the model has {found}")
        if "sliding_attention" in (getattr(config, "layer_types", None) or []):
            raise ValueError("the model has layers with sliding windows, which kvpress cannot cut to a budget")
        if model.config._attn_implementation == "eager" and any(len(set(row)) > 1 for row in self.budgets):
            raise ValueError("kvpress masks heads under sdpa and flash attention only; load the model with sdpa")
        self.press.post_init_from_model(model)

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        batch, heads, tokens, _ = keys.shape
        kept = [min(budget, tokens) for budget in self.budgets[module.layer_idx]]
        if min(kept) == tokens:
            return keys, values
        scores = self.press.score(module, hidden_states, keys, values, attentions, kwargs)
        # Ties go to the older token, so that what a head keeps is the beginning of what the largest one keeps.
        indices = scores.argsort(dim=-1, descending=True, stable=True)[..., : max(kept)]
        beyond = torch.arange(max(kept)) >= torch.tensor(kept)[:, None]
        if beyond.any():
            every = beyond.expand(batch, -1, -1).nonzero()
            module.masked_key_indices = tuple(every.to(keys.device).unbind(-1))
        where = indices[..., None].expand(-1, -1, -1, keys.shape[-1])
        return keys.gather(2, where).contiguous(), values.gather(2, where).contiguous()

'''

_WINDOW_PRESS = '''
@dataclass
class WindowPress(SnapKVPress):
    """SnapKV with a choice of pooling over positions, and of how the query heads of a KV head are combined."""

    pooling: str = "max"
    gqa: str = "mean"

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        batch, heads, tokens, _ = keys.shape
        if attentions is not None:
            votes = attentions[..., -self.window_size :, : -self.window_size]
        else:
            votes = self.compute_window_attention(
                module, hidden_states, keys, self.window_size, kwargs["position_embeddings"]
            )
        votes = votes.float().mean(dim=-2)
        pool = torch.nn.functional.max_pool1d if self.pooling == "max" else torch.nn.functional.avg_pool1d
        votes = pool(votes, self.kernel_size, stride=1, padding=self.kernel_size // 2)
        votes = votes.view(batch, heads, -1, tokens - self.window_size)
        votes = votes.mean(dim=2) if self.gqa == "mean" else votes.amax(dim=2)
        return torch.nn.functional.pad(votes, (0, self.window_size), value=torch.inf)

'''

_SINKS_PRESS = '''
@dataclass
class SinksPress(StreamingLLMPress):
    """StreamingLLM with a score that orders the tokens for every budget, as kvpress' own does for one."""

    def score(self, module, hidden_states, keys, values, attentions, kwargs):
        scores = torch.arange(keys.shape[2], device=keys.device, dtype=torch.float32)
        scores[: self.n_sink] = torch.inf
        return scores.expand(keys.shape[:3])

'''

#: Presses that the file brings: what of kvpress they are made of, and their source.
_OWN = {"WindowPress": ("SnapKVPress", _WINDOW_PRESS), "SinksPress": ("StreamingLLMPress", _SINKS_PRESS)}


def press_source(profile: BudgetProfile, module: str = "press") -> str:
    """Python source whose `press` keeps, under kvpress 0.5.5, as many tokens of a prompt as the profile does.

    Args:
        profile: of a model whose layers all have full attention; kvpress knows no sliding windows.
        module: what the file will be called, without ``.py``; for its docstring.

    Raises:
        UsageError: for a selector that no press of kvpress scores like, a model with sliding windows, budgets that are
            a share, or a `module` that Python cannot import.
    """
    if not module.isidentifier() or iskeyword(module):
        raise UsageError(
            f"Python cannot import a file called {module}.py; use letters, digits and underscores, and no word of "
            "Python's own"
        )
    if profile.share is not None:
        raise UsageError(
            f"the profile keeps {profile.share} of each prompt, and the exported press has the same budgets for "
            "all; carry it to a number first: evolkv profile expand PROFILE.json --budget 160 --out FIXED.json"
        )
    if any(profile.model.get("sliding_windows") or ()):
        raise UsageError(
            f"{profile.model['name']} has layers with sliding windows, which kvpress cannot cut to a budget; use the "
            "profile with EvolKV"
        )
    name = profile.selector["name"]
    if name not in _PRESSES:
        raise UsageError(
            f"kvpress has no press that scores each token as {name!r} does; profiles with the selectors "
            f"{', '.join(_PRESSES)} can be exported"
        )
    press, parameters = _PRESSES[name]
    base, source = _OWN.get(press, (press, ""))
    arguments = ", ".join(f"{theirs}={profile.selector[ours]!r}" for ours, theirs in parameters.items())
    # The name comes from a file that anybody may have written, and is about to stand in source code.
    model = re.sub(r"[^\w./@+-]", "_", profile.model["name"])
    head = _HEAD.format(
        title=f"Budgets of {model} at mean budget {profile.mean_budget:.6g}, as a press of kvpress.",
        module=module,
        imports=base,
        budgets="\n".join(f"    {row}," for row in profile.budgets.tolist()),
    )
    made = f"\npress = BudgetsPress({press}({arguments}), BUDGETS)\n"
    return head + _BUDGETS_PRESS + source + made


def held_by_press(profile: BudgetProfile) -> float:
    """Mean entries per KV head that kvpress holds under the exported press: in each layer those of its largest head."""
    return float(profile.budgets.max(axis=1).mean())
