"""Budgets by head: to vLLM, each KV head of a layer is a layer with one KV head and blocks of its own.

So vLLM groups heads by budget as it groups layers, and nothing below the model has to know of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention.attention import Attention

from evolkv.errors import UsageError
from evolkv_vllm import checks
from evolkv_vllm.rule import BudgetRule


class AttentionByHead(Attention):
    """A layer whose KV heads are layers of their own; a plain one becomes it by `split`.

    Attributes:
        heads: the KV heads, each with its query heads.
    """

    heads: nn.ModuleList

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Return the attention of the new tokens, ``[tokens, heads * head_dim]``; see vLLM's own."""
        number = len(self.heads)
        queries = query.view(-1, self.num_heads, self.head_size).chunk(number, dim=1)
        keys = key.view(-1, number, self.head_size).unbind(1)
        values = value.view(-1, number, self.head_size_v).unbind(1)
        parts = zip(self.heads, queries, keys, values, strict=True)
        outputs = [head(*states, output_dtype=output_dtype) for head, *states in parts]
        output = torch.cat(outputs, dim=-1)
        return output if output_shape is None else output.view(-1, output_shape[-1])


def split(layer: Attention, plain: Callable[..., None], arguments: dict[str, Any], rule: BudgetRule) -> None:
    """Let the KV heads of a layer be layers of their own.

    Args:
        layer: vLLM's, complete; changed.
        plain: vLLM's own ``Attention.__init__``.
        arguments: that it was made with.
        rule: what the budgets come to.

    Raises:
        UsageError: the layer cannot be compressed, or has another number of KV heads than the budgets.
    """
    number = layer.num_kv_heads
    checks.check_layer(layer)
    if number != rule.heads:
        raise UsageError(
            f"EvolKV: the budgets are for {rule.heads} KV heads, but vLLM's layer {layer.layer_name} has {number}; use "
            "a profile by layer: evolkv search --granularity layer"
        )
    context = get_current_vllm_config().compilation_config.static_forward_context
    del context[layer.layer_name]
    sinks, group = arguments.get("sinks"), layer.num_heads // number
    heads = []
    for part in range(number):
        own = {**arguments, "num_heads": group, "num_kv_heads": 1, "prefix": f"{layer.layer_name}.head{part}"}
        if sinks is not None:
            # A view, because the weights come later.
            own["sinks"] = sinks.detach()[part * group : (part + 1) * group]
        head = Attention.__new__(Attention)
        plain(head, **own)
        # Not as a module: the layer holds the head.
        object.__setattr__(head, "whole", layer)
        head.impl.part = part
        heads.append(head)
    layer.heads = nn.ModuleList(heads)
    layer.__class__ = AttentionByHead


def whole_of(layer: Attention) -> Attention:
    """Return the layer with all KV heads that a layer, or a KV head, belongs to."""
    return layer.__dict__.get("whole", layer)


def bound(plain: Callable[..., None], layer: Attention, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Return the arguments of a call of ``Attention.__init__`` by name."""
    found = dict(inspect.signature(plain).bind(layer, *args, **kwargs).arguments)
    extra = found.pop("extra_impl_args", {})
    return {**{name: value for name, value in found.items() if name != "self"}, **extra}
