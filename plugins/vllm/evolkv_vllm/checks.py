"""Refusals, each with its reason, before a server starts."""

from __future__ import annotations

import re
from typing import Any

from evolkv.errors import RunError, UsageError
from evolkv.selectors import Selector

#: The versions of vLLM whose internals the plugin knows: from the first on, before the second.
VERSIONS = ((0, 32), (0, 34))
#: Proposers of draft tokens that have no keys and values of their own.
_PROPOSERS = ("ngram", "suffix")
#: Selectors that average over all KV heads of a layer, which tensor parallelism spreads over devices.
_OVER_HEADS = ("tova", "chunkkv")


def check_version() -> None:
    """Check that vLLM is one of `VERSIONS`.

    Raises:
        RunError: another version.
    """
    import vllm

    version = tuple(int(part) for part in re.findall(r"\d+", vllm.__version__)[:2])
    first, end = VERSIONS
    if not first <= version < end:
        raise RunError(
            f"evolkv-vllm works with vLLM {first[0]}.{first[1]} to {end[0]}.{end[1] - 1}, but {vllm.__version__} is "
            "installed; install one of these, or unset the profile"
        )


def check_config(config: Any, selector: Selector, classes: int, by_head: bool = False) -> None:
    """Check that a configuration of vLLM has nothing that compressed prompts cannot go with.

    Args:
        config: vLLM's `VllmConfig`.
        selector: chooses what is kept.
        classes: groups of layers, or of heads, with different budgets.
        by_head: whether budgets differ from head to head of a layer.

    Raises:
        UsageError: it has, with the reason and what to do.
    """
    for refused, reason in _reasons(config, selector, classes, by_head):
        if refused:
            raise UsageError(f"EvolKV cannot run with {reason}")


def _reasons(config: Any, selector: Selector, classes: int, by_head: bool) -> list[tuple[bool, str]]:
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    speculative = config.speculative_config
    tensor_parallel = parallel.tensor_parallel_size > 1
    observed = selector.observed_queries
    return [
        (
            observed is None,
            f"the selector {selector.name!r}, which looks at every query of a prompt, and vLLM reads prompts in "
            "chunks; use one that looks at the last queries, such as 'snapkv' or 'chunkkv', or at keys alone, such as "
            "'keydiff'",
        ),
        (
            selector.rereads,
            f"the selector {selector.name!r}, which has the model read the whole prompt a second time, and vLLM reads "
            "prompts once; use one that looks at keys alone, such as 'keydiff'",
        ),
        (
            model.runner_type != "generate",
            f"a model that is served for {model.runner_type!r}; it is for models that generate text",
        ),
        (model.is_encoder_decoder, "an encoder-decoder; it is for decoder-only language models"),
        (
            model.use_mla,
            "latent attention (MLA), which keeps one vector per token instead of keys and values for each KV head; "
            "serve this model without a profile",
        ),
        (
            model.model_arch_config.rswa_window is not None,
            "a model that has reference sliding-window attention, which already evicts; serve it without a profile",
        ),
        (model.is_mm_prefix_lm, "a model whose images attend in both directions; serve it without a profile"),
        (
            str(cache.cache_dtype) not in ("auto", str(model.dtype).removeprefix("torch.")),
            f"keys and values of another type than the model's (kv_cache_dtype={cache.cache_dtype}), because entries "
            "are ranked and moved as they are; set --kv-cache-dtype auto",
        ),
        (
            config.kv_transfer_config is not None or getattr(cache, "kv_offloading_size", None) is not None,
            "a KV connector, which expects every block of a prompt where it was written; leave out "
            "--kv-transfer-config and --kv-offloading-size",
        ),
        (
            bool(getattr(cache, "kv_sharing_fast_prefill", False)),
            "layers that share keys and values; leave out --kv-sharing-fast-prefill",
        ),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "context parallelism, which spreads a prompt's entries over devices; set --decode-context-parallel-size "
            "and --prefill-context-parallel-size to 1",
        ),
        (bool(getattr(parallel, "use_ubatching", False)), "microbatches; leave out --enable-dbo"),
        (
            tensor_parallel and selector.name in _OVER_HEADS,
            f"the selector {selector.name!r} and tensor parallelism, because it averages over the heads of all "
            "devices; use 'snapkv', or --tensor-parallel-size 1",
        ),
        (
            tensor_parallel and by_head,
            "budgets by head and tensor parallelism, because the devices would hold different budgets of one layer; "
            "use --tensor-parallel-size 1, or a profile by layer: evolkv search --granularity layer",
        ),
        (
            by_head and model.is_hybrid,
            "budgets by head and a model with state-space or convolution layers, because a head's blocks would be "
            "smaller than such a layer's state; use a profile by layer: evolkv search --granularity layer",
        ),
        (
            parallel.pipeline_parallel_size > 1 and selector.looks_at_other_layers,
            f"the selector {selector.spec!r} and pipeline parallelism, because layers on different devices would "
            "decide for each other; set its reuse to 1",
        ),
        (
            speculative is not None and speculative.method not in _PROPOSERS,
            f"speculative decoding by {getattr(speculative, 'method', None)!r}, whose draft layers have keys and "
            f"values of their own; use one of {', '.join(_PROPOSERS)}",
        ),
        (
            classes > 1 and bool(config.scheduler_config.disable_hybrid_kv_cache_manager),
            "one block table for all layers, because budgets differ; leave out --disable-hybrid-kv-cache-manager, or "
            "use the same budget for all layers",
        ),
    ]


def check_sharing(target: str | None, name: str) -> None:
    """Check that an attention layer has keys and values of its own.

    Args:
        target: the layer whose keys and values it uses, or None.
        name: of the layer, for messages.

    Raises:
        UsageError: it has not.
    """
    if target is not None:
        raise UsageError(
            f"EvolKV cannot run with layers that share keys and values ({name}); serve this model without a profile"
        )


def check_layer(layer: Any) -> None:
    """Check that one attention layer of a loaded model can be compressed.

    Args:
        layer: vLLM's `Attention`.

    Raises:
        UsageError: it cannot.
    """
    implementation = layer.impl
    if not hasattr(implementation, "compactor"):
        raise UsageError(
            f"EvolKV cannot run with the attention backend {layer.attn_backend.get_name()}; choose "
            "--attention-backend FLASH_ATTN or TRITON_ATTN on a GPU"
        )
    if getattr(implementation, "alibi_slopes", None) is not None:
        raise UsageError(
            "EvolKV cannot run with ALiBi, whose biases selectors do not see; serve this model without a profile"
        )
    if layer.head_size != layer.head_size_v:
        raise UsageError(
            f"EvolKV cannot run with keys and values of different sizes ({layer.head_size} and {layer.head_size_v})"
        )
