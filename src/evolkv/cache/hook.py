"""The door into attention: an implementation registered with transformers that our cache layers answer.

`attach(model)` switches the model's decoder to the implementation ``evolkv_<own>``, where ``<own>`` is what the
model was loaded with. It calls the model's own implementation unless the keys come from a `HookedLayer` (one of our
cache layers), which then computes attention itself. The keys carry that fact as an attribute of the tensor that
`HookedLayer.update` returned, so there is no global state and any other cache works as before.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evolkv.cache.chunks import hook_chunks
from evolkv.errors import ModelError

Attention = Callable[..., tuple[Tensor, Tensor | None]]

_PREFIX = "evolkv_"
_LAYER = "_evolkv_layer"
_PADDING = "_evolkv_padding"
_ON_THE_WAY = "_evolkv_on_the_way"
_EVERYTHING = "_evolkv_everything"


class AttendingLayer(Protocol):
    """A cache layer that computes attention over what it holds."""

    def attend(
        self,
        own: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention output ``[batch, tokens, heads, head_dim]`` (and weights or None)."""
        ...


def tag(key: Tensor, value: Tensor, layer: AttendingLayer) -> tuple[Tensor, Tensor]:
    """Marks keys and values as coming from `layer`, for the attention call that follows.

    Raises:
        ModelError: if the keys that were marked before never got there, and so were not stored.
    """
    check_arrival(layer)
    setattr(layer, _ON_THE_WAY, True)
    # Fresh views: the caller's own tensors must stay unmarked.
    key, value = key.view_as(key), value.view_as(value)
    setattr(key, _LAYER, layer)
    setattr(value, _LAYER, layer)
    return key, value


def check_arrival(layer: AttendingLayer) -> None:
    """Raises `ModelError` if keys and values of the layer went to attention, and never got there."""
    if getattr(layer, _ON_THE_WAY, False):
        raise ModelError(
            "the model changes its keys between cache and attention, or bypasses transformers' attention interface, so "
            "that they cannot be compressed (or the cache was released, or made for another model); EvolKV needs keys "
            "that go to attention as the cache returned them"
        )


def forget_sent(layer: AttendingLayer) -> None:
    """Expects no keys and values of the layer to reach attention any more."""
    setattr(layer, _ON_THE_WAY, False)


def padding_of(mask: Tensor | BlockMask | None) -> Tensor | None:
    """The 2-D padding mask ``[batch, tokens]`` (True: a real token) that a prompt's attention mask was made from."""
    if mask is None:
        return None
    padding: Tensor | None = getattr(mask, _PADDING, None)
    if padding is not None:
        return padding
    # A mask the caller prepared: a token is real if any query may look at it.
    visible = _as_booleans(mask)
    return visible.flatten(1, -2).any(dim=1) if visible.ndim == 4 else visible


def was_padding(mask: Tensor | BlockMask | None) -> bool:
    """Whether a mask says no more than which tokens are padding, and what the model's attention hides anyway."""
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 2) or hasattr(mask, _PADDING)


def _as_booleans(mask: Tensor | BlockMask) -> Tensor:
    """Any implementation's mask with True where visible, in the shape it has."""
    if isinstance(mask, BlockMask):
        batch, heads, queries, keys = mask.shape
        return create_mask(mask.mask_mod, batch, heads, queries, keys, device=str(mask.kv_num_blocks.device))
    # Additive where it is of floating point, otherwise 1 for what is visible.
    return mask >= 0 if mask.is_floating_point() else mask.bool()


def _own_attention(module: nn.Module, name: str) -> Attention:
    if name == "eager":
        # Eager attention is not registered: each modelling file brings its own.
        own: Attention | None = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if own is None:
            raise ModelError(
                f"{type(module).__name__} has no eager attention function to wrap; "
                "load the model with attn_implementation='sdpa'"
            )
        return own
    found: Attention = ALL_ATTENTION_FUNCTIONS[name]
    return functools.partial(_flash_attention, found, name) if "flash" in name else found


class _AsLoaded:
    """A module or config with the name of the attention implementation that it was loaded with, and all else its own.

    Flash attention looks that name up in the module's config to find its kernel.
    """

    def __init__(self, wrapped: Any, **changed: Any):
        self.__dict__.update(changed, _wrapped=wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def _flash_attention(
    flash: Attention, name: str, module: nn.Module, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    config = _AsLoaded(module.config, _attn_implementation=name)
    return flash(_AsLoaded(module, config=config), *args, **kwargs)


def _attention(
    name: str, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    # The mask has transformers' name for it, since some models give it by that.
    own = _own_attention(module, name)
    layer: AttendingLayer | None = getattr(key, _LAYER, None)
    if layer is None:
        return own(module, query, key, value, attention_mask, **kwargs)
    expected = getattr(layer, _ON_THE_WAY, False) and getattr(value, _LAYER, None) is layer
    if not expected:
        raise ModelError(
            f"{type(module).__name__} changes its values between cache and attention, or attends to them more than "
            "once for each token, so that they cannot be compressed; EvolKV needs keys and values that go to attention "
            "once, as the cache returned them"
        )
    setattr(layer, _ON_THE_WAY, False)
    return layer.attend(own, module, query, key, value, attention_mask, **kwargs)


def _mask(name: str, **kwargs: Any) -> Any:
    mask = ALL_MASK_ATTENTION_FUNCTIONS[name](**kwargs)
    padding = kwargs.get("attention_mask")
    if mask is not None and padding is not None:
        setattr(mask, _PADDING, padding)
    if mask is not None:
        setattr(mask, _EVERYTHING, {})
    return mask


def boolean_mask(
    mask: Tensor | BlockMask | None, batch: int, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """What any implementation's mask over the newest `keys` entries means, as booleans.

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
    """Whether everything is visible by `visible`, which `boolean_mask` made from `mask`.

    A device is asked once for all layers that share a mask of transformers' making, and never about other masks.
    """
    if visible is None:
        return True
    known: dict[int, bool] | None = getattr(mask, _EVERYTHING, None)
    if known is None:
        return False
    keys = visible.shape[-1]
    if keys not in known:
        known[keys] = bool(visible.all())
    return known[keys]


def _decoder_configs(model: PreTrainedModel) -> list[PreTrainedConfig]:
    found = {id(model.config.get_text_config(decoder=True)): model.config.get_text_config(decoder=True)}
    for module in model.get_decoder().modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            found[id(config)] = config
    return list(found.values())


class _Attachment:
    """How many users the hook of one model has, and what to restore after the last."""

    def __init__(self, model: PreTrainedModel):
        self.users = 0
        self.own = [(config, str(config._attn_implementation)) for config in _decoder_configs(model)]
        self.wrap()
        self.handles = hook_chunks(model.get_decoder())

    def wrap(self) -> None:
        """Has the configs name our implementation for the one that they name now.

        Raises:
            ModelError: if it cannot be wrapped.
        """
        names = [str(config._attn_implementation) for config, _ in self.own]
        chosen = [(at, name) for at, name in enumerate(names) if not name.startswith(_PREFIX)]
        for _, name in chosen:
            _check_implementation(name)
        for at, name in chosen:
            wrapped = _PREFIX + name
            if wrapped not in ALL_ATTENTION_FUNCTIONS:
                AttentionInterface.register(wrapped, functools.partial(_attention, name))
                AttentionMaskInterface.register(wrapped, functools.partial(_mask, name))
            config, _ = self.own[at]
            config._attn_implementation_internal = wrapped
            self.own[at] = (config, name)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        for config, name in self.own:
            # Another may have been chosen meanwhile.
            if str(config._attn_implementation).startswith(_PREFIX):
                config._attn_implementation_internal = name


def own_attention(model: PreTrainedModel) -> str:
    """Name of the attention implementation that a model was loaded with, whether or not the hook is installed."""
    return str(model.config._attn_implementation).removeprefix(_PREFIX)


def _check_implementation(name: str) -> None:
    if name.startswith("paged|"):
        raise ModelError(
            f"attention implementation {name!r} keeps keys and values in pages of its own, for continuous batching; "
            "load the model with attn_implementation='sdpa', 'eager', 'flex_attention' or 'flash_attention_2'"
        )
    if name not in ("eager", "sdpa", "flex_attention") and not (
        "flash" in name and name in ALL_ATTENTION_FUNCTIONS and name in ALL_MASK_ATTENTION_FUNCTIONS
    ):
        raise ModelError(
            f"attention implementation {name!r} cannot be compressed; "
            "load the model with attn_implementation='sdpa', 'eager', 'flex_attention' or 'flash_attention_2'"
        )


_attachments: weakref.WeakKeyDictionary[PreTrainedModel, _Attachment] = weakref.WeakKeyDictionary()
# Reentrant: a cache may be collected, and so detached, while another one attaches.
_lock = threading.RLock()


def wrap_again(model: PreTrainedModel) -> None:
    """Wraps what `set_attn_implementation` has chosen since the hook was installed, if it did.

    Raises:
        ModelError: if it cannot be wrapped.
    """
    with _lock:
        attachment = _attachments.get(model)
        if attachment is not None:
            attachment.wrap()


def attach(model: PreTrainedModel) -> Callable[[], None]:
    """Installs the hook; the model is restored when every caller has called what is returned.

    Raises:
        ModelError: if the model's attention implementation cannot be wrapped.
    """
    with _lock:
        attachment = _attachments.get(model)
        if attachment is None:
            attachment = _attachments[model] = _Attachment(model)
        else:
            attachment.wrap()
        attachment.users += 1
    # The model may be gone before its last cache is; a weak reference lets it.
    reference = weakref.ref(model)

    def detach() -> None:
        with _lock:
            held = reference()
            current = _attachments.get(held) if held is not None else None
            if held is None or current is None:
                return
            current.users -= 1
            if current.users == 0:
                current.remove()
                del _attachments[held]

    return detach
