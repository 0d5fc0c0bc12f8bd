"""The door into attention: an implementation registered with transformers that our cache layers answer.

`attach(model)` switches the model's decoder to the implementation ``evolkv_<own>``, where ``<own>`` is what the
model was loaded with. It calls the model's own implementation unless the keys come from an `AttendingLayer` (one of our
cache layers), which then computes attention itself. The keys carry that fact as an attribute of the tensor that
`update` returned, so there is no global state and any other cache works as before.
"""

from __future__ import annotations

import functools
import sys
import threading
import weakref
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from evolkv.cache.chunks import put_together, read_all_but_last
from evolkv.cache.generate import watch_generate
from evolkv.cache.masks import make_mask
from evolkv.cache.math import logit_terms
from evolkv.errors import ModelError
from evolkv.models.forward import given_cache
from evolkv.selectors import LayerContext, PromptAttention

Attention = Callable[..., tuple[Tensor, Tensor | None]]

_PREFIX = "evolkv_"
_LAYER = "_evolkv_layer"


class AttendingLayer(CacheLayerMixin):
    """A cache layer that computes attention over what it holds.

    Args:
        sliding_window: how many tokens a query of the layer sees, or None for all.

    Attributes:
        context: where the layer is in a model, for selectors that need to know; None where nobody asks.
        on_the_way: whether keys and values that were handed out have still to reach attention.
    """

    context: LayerContext | None = None
    on_the_way = False

    def __init__(self, sliding_window: int | None = None):
        super().__init__()
        self.sliding_window = sliding_window
        # HF's own dispatch looks at this flag to find a layer whose lengths the sliding masks are made for.
        self.is_sliding = sliding_window is not None

    @abstractmethod
    def attend(
        self, own: Attention, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Return the attention output ``[batch, tokens, heads, head_dim]``, and weights or None."""

    def inputs(self, query: Tensor, key: Tensor, value: Tensor, kwargs: dict[str, Any]) -> PromptAttention:
        """Return the attention inputs of a call; the queries are those of the last keys.

        Args:
            query: ``[batch, heads, queries, head_dim]``.
            key: ``[batch, kv_heads, tokens, head_dim]``.
            value: ``[batch, kv_heads, tokens, value_dim]``.
            kwargs: what the model says of its attention.
        """
        return PromptAttention(
            query,
            key,
            value,
            **logit_terms(query, kwargs)._asdict(),
            sliding_window=self.sliding_window,
            first_query=key.shape[2] - query.shape[2],
            layer=self.context,
        )

    def send(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Mark keys and values as this layer's, for the attention call that follows."""
        self.on_the_way = True
        # Fresh views: the caller's own tensors must stay unmarked.
        key, value = key.view_as(key), value.view_as(value)
        setattr(key, _LAYER, self)
        setattr(value, _LAYER, self)
        return key, value

    def check_arrival(self) -> None:
        """Raise `ModelError` if the keys handed out by `update` never reached attention."""
        if self.on_the_way:
            raise ModelError(
                "the model changes its keys between cache and attention, or bypasses transformers' attention "
                "interface, so that they cannot be compressed (or the cache was released, or made for another model); "
                "EvolKV needs keys that go to attention as the cache returned them"
            )

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is allocated ahead."""

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1


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
    expected = layer.on_the_way and getattr(value, _LAYER, None) is layer
    if not expected:
        raise ModelError(
            f"{type(module).__name__} changes its values between cache and attention, or attends to them more than "
            "once for each token, so that they cannot be compressed; EvolKV needs keys and values that go to attention "
            "once, as the cache returned them"
        )
    layer.on_the_way = False
    attend = _attend_untraced if torch.compiler.is_compiling() else type(layer).attend
    return attend(layer, own, module, query, key, value, attention_mask, **kwargs)


# The state of our layers is in Python objects, and grows: a compiled model runs them as they are.
@torch.compiler.disable
def _attend_untraced(layer: AttendingLayer, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    return layer.attend(*args, **kwargs)


class _WrappedName(str):
    """The name of an attention implementation of ours; a copy or pickle of it is the name of the model's own."""

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        return str, (self.removeprefix(_PREFIX),)

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        return self.removeprefix(_PREFIX)


# Module hooks. They are functions of this file, so that copies and pickles of a hooked model can have them, and do
# nothing for a cache that is not ours. A thread that installs or removes them may have another thread's call take one
# for a hook without keywords; such a call began without any of our caches.

# Opens the call of a model in which a `compress` block puts its cache: arguments by name -> those with the cache.
Bring = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]
_Changed = tuple[tuple[Any, ...], dict[str, Any]] | None


@torch.compiler.disable
def _before_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> _Changed:
    attachment = None if kwargs is None else _attachments.get(module)
    if attachment is None or kwargs is None:
        return None
    blocks = tuple(attachment.blocks)
    brought = blocks[-1](module, args, kwargs) if blocks else None
    cache: Any = given_cache(kwargs if brought is None else brought[1])
    if hasattr(cache, "note_call"):
        cache.note_call(kwargs)
    return brought


def _begin_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> _Changed:
    return None if kwargs is None else read_all_but_last(module, args, kwargs)


def _end_call(module: nn.Module, args: tuple[Any, ...], kwargs: Any, *output: Any) -> Any:
    return put_together(module, args, kwargs, *output) if output else None


def _enter_layer(
    index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> _Changed:
    cache: Any = None if kwargs is None else given_cache(kwargs)
    return cache.enter_layer(index, module, args, kwargs) if hasattr(cache, "enter_layer") else None


_HOOKS = (_before_model, _begin_call, _end_call, _enter_layer)


def _remove_hooks(module: nn.Module) -> None:
    """Remove our hooks from a module, also those that were copied along with it."""
    for hooks, flags in (
        (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
        (module._forward_hooks, module._forward_hooks_with_kwargs),
    ):
        for key, hook in list(hooks.items()) if hooks else ():
            if getattr(hook, "func", hook) in _HOOKS:
                hooks.pop(key, None)
                flags.pop(key, None)


class _Attachment:
    """The hooks of one decoder: how many users they have, and what to restore after the last."""

    def __init__(self, model: PreTrainedModel):
        self.users = 0
        #: What the open `compress` blocks do with a call, the innermost last.
        self.blocks: list[Bring] = []
        decoder = model.get_decoder()
        text_config = model.config.get_text_config(decoder=True)
        configs = {id(text_config): text_config}
        # A copy of a hooked model brought hooks along.
        _remove_hooks(getattr(model, "_orig_mod", model))
        for module in decoder.modules():
            config = vars(module).get("config")
            if isinstance(config, PreTrainedConfig):
                configs[id(config)] = config
            if module._forward_pre_hooks or module._forward_hooks:
                _remove_hooks(module)
        self.own = [(config, str(config._attn_implementation).removeprefix(_PREFIX)) for config in configs.values()]
        self.wrap()
        self._decoder = weakref.ref(decoder)
        self._by_layer = False
        decoder.register_forward_pre_hook(_begin_call, with_kwargs=True)
        decoder.register_forward_hook(_end_call, with_kwargs=True)

    @property
    def is_wrapped(self) -> bool:
        """Return whether all configs name our implementation."""
        return all(type(config._attn_implementation_internal) is _WrappedName for config, _ in self.own)

    def wrap(self) -> None:
        """Have the configs name our implementation for the one that they name now.

        Raises:
            ModelError: if it cannot be wrapped.
        """
        names = [str(config._attn_implementation) for config, _ in self.own]
        chosen = [(at, name) for at, name in enumerate(names) if not name.startswith(_PREFIX)]
        for _, name in chosen:
            _check_implementation(name)
        for at, name in chosen:
            wrapped = _WrappedName(_PREFIX + name)
            if wrapped not in ALL_ATTENTION_FUNCTIONS:
                AttentionInterface.register(wrapped, functools.partial(_attention, name))
                AttentionMaskInterface.register(wrapped, functools.partial(make_mask, name))
            config, _ = self.own[at]
            config._attn_implementation_internal = wrapped
            self.own[at] = (config, name)

    def hook_model(self, model: PreTrainedModel) -> None:
        """Have calls of the model, and of its decoder, go through the open blocks and their cache first."""
        for module in dict.fromkeys([getattr(model, "_orig_mod", model), model.get_decoder()]):
            if _before_model not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_before_model, prepend=True, with_kwargs=True)
            _attachments[module] = self

    def hook_layers(self) -> None:
        """Have each layer of the decoder ask its cache for other arguments."""
        decoder = self._decoder()
        if not self._by_layer and decoder is not None:
            for index, layer in enumerate(decoder.layers):
                layer.register_forward_pre_hook(functools.partial(_enter_layer, index), with_kwargs=True)
            self._by_layer = True

    def remove(self) -> None:
        """Leave the model as it was."""
        for module in [module for module, held in _attachments.items() if held is self]:
            _remove_hooks(module)
            del _attachments[module]
        decoder = self._decoder()
        if self._by_layer and decoder is not None:
            for layer in decoder.layers:
                _remove_hooks(layer)
        for config, name in self.own:
            # Another may have been chosen meanwhile.
            if str(config._attn_implementation).startswith(_PREFIX):
                config._attn_implementation_internal = name


def own_attention(model: PreTrainedModel) -> str:
    """Return the name of the attention implementation that a model was loaded with, hooked or not."""
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


#: By decoder, and by model where a `compress` block is open.
_attachments: weakref.WeakKeyDictionary[nn.Module, _Attachment] = weakref.WeakKeyDictionary()
# Reentrant: a cache may be collected, and so detached, while another one attaches.
_lock = threading.RLock()


def wrap_again(decoder: nn.Module) -> None:
    """Wrap what `set_attn_implementation` has chosen since the hook was installed, if it did.

    Raises:
        ModelError: if it cannot be wrapped.
    """
    with _lock:
        attachment = _attachments.get(decoder)
        if attachment is not None and not attachment.is_wrapped:
            attachment.wrap()


def hook_model(model: PreTrainedModel) -> None:
    """Have the model tell our caches of its calls (`note_call`), for as long as they live."""
    with _lock:
        _attachments[model.get_decoder()].hook_model(model)


def attach(model: PreTrainedModel, bring: Bring | None = None, *, by_layer: bool = False) -> Callable[[], None]:
    """Install the hooks; the model is restored when every caller has called what is returned.

    Args:
        model: the model.
        bring: what a `compress` block does with calls of the model.
        by_layer: whether a cache wants its `enter_layer` called before each layer of the decoder.

    Raises:
        ModelError: if the model's attention implementation cannot be wrapped.
    """
    decoder = model.get_decoder()
    with _lock:
        watch_generate(model, decoder)
        attachment = _attachments.get(decoder)
        if attachment is None:
            attachment = _attachments[decoder] = _Attachment(model)
        else:
            attachment.wrap()
        attachment.users += 1
        if bring is not None:
            attachment.blocks.append(bring)
            attachment.hook_model(model)
        if by_layer:
            attachment.hook_layers()
    # The model may be gone before its last cache is; a weak reference lets it.
    reference = weakref.ref(decoder)

    def detach() -> None:
        with _lock:
            held = reference()
            current = _attachments.get(held) if held is not None else None
            if current is None:
                return
            if bring is not None:
                current.blocks.remove(bring)
            current.users -= 1
            if current.users == 0:
                current.remove()

    return detach
