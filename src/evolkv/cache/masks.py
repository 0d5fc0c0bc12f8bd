"""Attention masks: what those of any implementation hide, and which tokens they say are padding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

_PADDING = "_evolkv_padding"
_EVERYTHING = "_evolkv_everything"


def make_mask(name: str, **kwargs: Any) -> Any:
    """Return what the mask function of an attention implementation makes, with the padding that it was made from."""
    mask = ALL_MASK_ATTENTION_FUNCTIONS[name](**kwargs)
    padding = kwargs.get("attention_mask")
    if mask is not None:
        note_padding(mask, padding)
    return mask


def note_padding(mask: Any, padding: Tensor | None) -> None:
    """Note which columns of a mask are real tokens, ``[batch, tokens]``; None where nobody said."""
    if padding is not None:
        setattr(mask, _PADDING, padding)
    setattr(mask, _EVERYTHING, {})


def padding_of(mask: Tensor | BlockMask | None) -> Tensor | None:
    """Return the padding mask ``[batch, tokens]`` (True: a real token) that an attention mask was made from."""
    if mask is None:
        return None
    padding: Tensor | None = getattr(mask, _PADDING, None)
    if padding is not None:
        return padding
    # A mask the caller prepared: a token is real if any query may look at it.
    visible = _as_booleans(mask)
    return visible.flatten(1, -2).any(dim=1) if visible.ndim == 4 else visible


def real_tokens(padding: Tensor | None, key: Tensor) -> list[Tensor] | None:
    """Return the columns of each sequence's real tokens; None if nothing is padding.

    Args:
        padding: True for real tokens, ``[batch or 1, tokens]``; None where there is no padding.
        key: keys of the sequences, ``[batch, kv_heads, tokens, head_dim]``.
    """
    if padding is None or bool(padding.all()):
        return None
    return [row.nonzero()[:, 0] for row in padding.to(key.device).expand(len(key), -1)]


def real_columns(mask: Tensor | BlockMask | None, key: Tensor) -> Tensor | None:
    """Return which of a call's new tokens are real, ``[batch, new]``, or None where all are.

    A device is asked once for all layers that share a mask of transformers' making.

    Args:
        mask: of the call.
        key: its keys, ``[batch, kv_heads, new, head_dim]``.
    """
    padding = padding_of(mask)
    if padding is None:
        return None
    columns = padding[:, -key.shape[2] :].bool().expand(len(key), -1)
    known: dict[Any, bool] = getattr(mask, _EVERYTHING, {})
    if "real" not in known:
        known["real"] = bool(columns.all())
    return None if known["real"] else columns


def is_causal(mask: Tensor | BlockMask | None, key: Tensor) -> bool:
    """Return whether a mask hides nothing but later tokens from a call with these keys; masks of others may."""
    return mask is None or (hasattr(mask, _EVERYTHING) and real_columns(mask, key) is None)


def was_padding(mask: Tensor | BlockMask | None) -> bool:
    """Return whether a mask hides only padding and what the model's attention hides anyway."""
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 2) or hasattr(mask, _PADDING)


def _as_booleans(mask: Tensor | BlockMask) -> Tensor:
    """Return any implementation's mask with True where visible, in the shape it has."""
    if isinstance(mask, BlockMask):
        batch, heads, queries, keys = mask.shape
        return create_mask(mask.mask_mod, batch, heads, queries, keys, device=str(mask.kv_num_blocks.device))
    # Additive where it is of floating point, otherwise 1 for what is visible.
    return mask >= 0 if mask.is_floating_point() else mask.bool()


def boolean_mask(
    mask: Tensor | BlockMask | None, batch: int, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """Return any implementation's mask over the newest `keys` entries as booleans.

    Returns:
        ``[batch or 1, 1, queries, keys]``, True where visible; None where everything is visible.
    """
    if mask is None:
        if queries == 1:
            return None
        rows = torch.arange(keys - queries, keys, device=device)[:, None]
        return (torch.arange(keys, device=device) <= rows)[None, None]
    visible = _as_booleans(mask)
    if visible.ndim == 2:  # flash attention's: padding only
        return sdpa_mask(
            batch,
            queries,
            keys,
            keys - queries,
            attention_mask=visible[:, -keys:],
            device=device,
            allow_is_causal_skip=False,
        )
    return visible[..., -keys:]


def hides_nothing(mask: Tensor | BlockMask | None, visible: Tensor | None) -> bool:
    """Return whether everything is visible by `visible`, which `boolean_mask` made from `mask`.

    A device is asked once for all layers that share a mask of transformers' making, and never about other masks.
    """
    if visible is None:
        return True
    known: dict[Any, bool] | None = getattr(mask, _EVERYTHING, None)
    if known is None:
        return False
    keys = visible.shape[-1]
    if keys not in known:
        known[keys] = bool(visible.all())
    return known[keys]
