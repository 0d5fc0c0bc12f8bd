"""The plugin's hold on vLLM: what it registers, and the methods that it wraps.

vLLM has registries for attention backends and for KV-cache specs. There is none for what the other hooks need:

* `VllmConfig.__post_init__`: settings are checked before anything is loaded.
* `Attention.__init__`: where budgets differ from head to head, a layer's KV heads become layers of their own.
* `Attention.get_kv_cache_spec`: a layer's spec carries its budget.
* `KVCacheManager.__init__`: one line at start says what the budgets come to, answers stay out of the prefix cache, and
  tokens with slots take a short cut.
* `KVCacheManager.get_computed_blocks`: the look-up of a prefix learns how long the prompt is.
* `InputProcessor.process_inputs`: prompts that grow are refused.
* `Scheduler._reserve_prefill_lookahead`: a chunk ends where a prompt ends.
* `GPUModelRunner.initialize_kv_cache`, which the runner for CPUs has, too: all groups of layers are done at once there.
* `GPUModelRunner.prepare_inputs` of vLLM's second runner: the lengths of prompts are taken from the host.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from typing import Any

import torch

from evolkv.errors import RunError, UsageError
from evolkv_vllm import checks, plan
from evolkv_vllm.settings import VARIABLE, Settings

#: What the plugin wraps, overrides or calls of vLLM's internals: module, name there, and arguments that it relies on.
SYMBOLS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vllm.config.vllm", "VllmConfig.__post_init__", ()),
    ("vllm.config.model_arch", "ModelArchitectureConfig", ("rswa_window",)),
    (
        "vllm.model_executor.layers.attention.attention",
        "Attention.__init__",
        ("num_heads", "num_kv_heads", "prefix", "attn_type"),
    ),
    (
        "vllm.model_executor.layers.attention.attention",
        "Attention.forward",
        ("query", "key", "value", "output_shape", "output_dtype"),
    ),
    ("vllm.model_executor.layers.attention.attention", "Attention.get_kv_cache_spec", ("vllm_config",)),
    ("vllm.model_executor.models.utils", "extract_layer_index", ("layer_name",)),
    (
        "vllm.v1.attention.backend",
        "CommonAttentionMetadata",
        ("rswa_prefix_lens", "seq_lens_cpu_upper_bound", "positions"),
    ),
    ("vllm.v1.attention.backends.registry", "register_backend", ("backend", "class_path")),
    (
        "vllm._custom_ops",
        "cpu_attn_get_scheduler_metadata",
        ("seq_lens", "query_start_loc", "causal", "sliding_window_size", "enable_kv_split", "kv_cache_dtype"),
    ),
    (
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionMetadata",
        ("query_start_loc", "max_seq_len", "seq_lens", "block_table", "slot_mapping", "scheduler_metadata"),
    ),
    (
        "vllm.v1.core.kv_cache_coordinator",
        "KVCacheCoordinator.cache_blocks",
        ("request", "num_computed_tokens"),
    ),
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager.__init__", ("kv_cache_config", "max_model_len")),
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager.get_computed_blocks", ("request",)),
    ("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", ("resumable",)),
    (
        "vllm.v1.core.sched.scheduler",
        "Scheduler._reserve_prefill_lookahead",
        ("request", "num_computed_tokens", "num_new_tokens"),
    ),
    (
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.remove_skipped_blocks",
        ("request_id", "processed_computed_tokens", "num_prompt_tokens"),
    ),
    (
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager._remove_blocks_in_range",
        ("request_id", "first_block", "last_block"),
    ),
    (
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.cache_blocks",
        ("request", "num_tokens", "retention_interval", "replay_boundaries"),
    ),
    (
        "vllm.v1.core.single_type_kv_cache_manager",
        "FullAttentionManager.find_longest_cache_hit",
        ("block_hashes", "max_length", "kv_cache_spec"),
    ),
    ("vllm.v1.core.single_type_kv_cache_manager", "FullAttentionManager.pop_blocks_for_free", ("request_id",)),
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager.allocate_slots", ("request", "num_new_tokens")),
    ("vllm.v1.core.kv_cache_manager", "KVCacheBlocks.get_block_ids", ("allow_none",)),
    ("vllm.v1.kv_cache_interface", "FullAttentionSpec.merge", ("specs",)),
    ("vllm.v1.kv_cache_interface", "FullAttentionSpec.is_uniform_with_collection", ("kv_cache_specs",)),
    ("vllm.v1.kv_cache_spec_registry", "KVCacheSpecRegistry._ensure_registered", ()),
    (
        "vllm.v1.kv_cache_spec_registry",
        "KVCacheSpecRegistry.register",
        ("kvcache_spec_cls", "manager_class", "uniform_type_base_spec"),
    ),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.initialize_kv_cache", ("kv_cache_config",)),
    (
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._get_slot_mappings",
        ("num_tokens_padded", "num_reqs_padded", "num_tokens_unpadded", "ubatch_slices"),
    ),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner._build_attention_metadata", ("num_tokens", "slot_mappings")),
    ("vllm.v1.worker.gpu.input_batch", "InputBatch", ("prompt_lens", "idx_mapping_np")),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.prepare_inputs", ()),
    ("vllm.v1.worker.gpu.states", "RequestState.add_request", ("prompt_len",)),
    ("vllm.v1.worker.block_table", "MultiGroupBlockTable.commit_block_table", ("num_reqs",)),
    (
        "vllm.v1.worker.block_table",
        "MultiGroupBlockTable.compute_slot_mapping",
        ("num_reqs", "query_start_loc", "positions"),
    ),
)

_BACKENDS = {
    "CPU_ATTN": "evolkv_vllm.backends.cpu.EvolKVCPUBackend",
    "FLASH_ATTN": "evolkv_vllm.backends.flash_attn.EvolKVFlashBackend",
    "TRITON_ATTN": "evolkv_vllm.backends.triton.EvolKVTritonBackend",
}

_installed = False


def check_symbols() -> None:
    """Check that vLLM has everything in `SYMBOLS`.

    Raises:
        RunError: something is not there, or takes other arguments; it is named.
    """
    for module, name, arguments in SYMBOLS:
        try:
            found: Any = importlib.import_module(module)
            for part in name.split("."):
                found = getattr(found, part)
            missing = sorted(set(arguments) - set(inspect.signature(found).parameters))
        except (ImportError, AttributeError):
            raise _changed(f"{module}.{name} is gone") from None
        if missing:
            raise _changed(f"{module}.{name} takes no {missing[0]}")


def _changed(what: str) -> RunError:
    first, end = checks.VERSIONS
    return RunError(
        f"this vLLM is not one that evolkv-vllm knows: {what}; install vLLM {first[0]}.{first[1]} to "
        f"{end[0]}.{end[1] - 1}, or unset the profile"
    )


def install() -> None:
    """Register the plugin's classes and wrap vLLM's methods, once in each process.

    Where vLLM is not one that the plugin knows, nothing of it changes, except that a profile is refused.

    Raises:
        RunError: a profile is asked for by environment variable, and vLLM is such a one.
    """
    global _installed
    if _installed:
        return
    _installed = True
    try:
        checks.check_version()
        check_symbols()
    except RunError as error:
        if os.environ.get(VARIABLE):
            raise
        reason = str(error)

        def refuse_profiles(config: Any) -> None:
            if Settings.read(config.additional_config) is not None:
                raise RunError(reason)

        _wrap_config(refuse_profiles)
        return
    _register()
    _wrap_config(plan.configure)
    _wrap_layers()
    _wrap_block_managers()
    _wrap_requests()
    _wrap_runner()


def _wrap(owner: type, name: str, wrapper: Callable[..., Any]) -> None:
    """Have calls of a method go to a function, which gets the method itself before the arguments."""
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(plain, *args, **kwargs)

    setattr(owner, name, wrapped)


def _register() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from evolkv_vllm.manager import EvolKVManager
    from evolkv_vllm.spec import EvolKVSpec

    # vLLM registers its own specs only while the registry is empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(EvolKVSpec, EvolKVManager, uniform_type_base_spec=FullAttentionSpec)
    for name, path in _BACKENDS.items():
        register_backend(AttentionBackendEnum[name], path)


def _wrap_config(check: Callable[[Any], None]) -> None:
    """Have every configuration of vLLM checked once it is complete."""
    from vllm.config.vllm import VllmConfig

    def post_init(plain: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        check(self)

    _wrap(VllmConfig, "__post_init__", post_init)


def _wrap_layers() -> None:
    from vllm.config import get_current_vllm_config
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.v1.attention.backend import AttentionType
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from evolkv_vllm import heads
    from evolkv_vllm.compaction import compactor_of
    from evolkv_vllm.spec import EvolKVSpec

    def init(plain: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
        rule = plan.rule_of(get_current_vllm_config())
        if rule is None or rule.heads == 1:
            plain(self, *args, **kwargs)
            return
        arguments = heads.bound(plain, self, *args, **kwargs)
        # vLLM would miss the other layer, whose heads have taken its place.
        checks.check_sharing(arguments.get("kv_sharing_target_layer_name"), arguments.get("prefix", ""))
        plain(self, *args, **kwargs)
        if type(self) is Attention and self.attn_type == AttentionType.DECODER:
            heads.split(self, plain, arguments, rule)

    def get_kv_cache_spec(plain: Callable[..., Any], self: Any, vllm_config: Any) -> Any:
        spec, rule = plain(self, vllm_config), plan.rule_of(vllm_config)
        # Layers with a sliding window have another spec, and keep it.
        if rule is None or type(spec) is not FullAttentionSpec:
            return spec
        checks.check_layer(self)
        number = _layer_number(self.layer_name, vllm_config, rule.num_layers)
        whole, part = heads.whole_of(self), self.impl.part
        if rule.heads > 1 and whole is self:
            raise UsageError(
                f"EvolKV cannot run budgets by head with a layer of the kind {type(self).__name__} "
                f"({self.layer_name}); use a profile by layer: evolkv search --granularity layer"
            )
        if part == 0:
            requests = vllm_config.scheduler_config.max_num_seqs
            whole.impl.compactor = compactor_of(whole, rule.selector, number, rule.num_layers, requests, rule.heads)
        self.impl.compactor = whole.impl.compactor
        return EvolKVSpec.of_layer(spec, rule, number, part)

    _wrap(Attention, "__init__", init)
    _wrap(Attention, "get_kv_cache_spec", get_kv_cache_spec)


def _layer_number(name: str, config: Any, num_layers: int) -> int:
    """Return the number of a layer among those with keys and values: its row in a profile."""
    from vllm.model_executor.layers.attention.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    layers = config.compilation_config.static_forward_context.items()
    own = {each: layer for each, layer in layers if isinstance(layer, Attention)}
    for each, layer in own.items():
        # vLLM does not ask a layer without keys and values of its own for a spec.
        checks.check_sharing(layer.kv_sharing_target_layer_name, each)
    indices = sorted({extract_layer_index(each) for each in own})
    index = extract_layer_index(name)
    if len(indices) == num_layers:
        return indices.index(index)
    if config.parallel_config.pipeline_parallel_size > 1 and index < num_layers:
        total = config.model_config.get_total_num_hidden_layers()
        if total == num_layers:
            # The other layers are on other devices.
            return index
    raise UsageError(
        f"EvolKV: the budgets are for {num_layers} layers, but vLLM's model has {len(indices)} attention layers with "
        "keys and values; serve this model without a profile"
    )


def _wrap_block_managers() -> None:
    from vllm.v1.core.kv_cache_manager import KVCacheManager

    from evolkv_vllm.manager import keep_answers_out, looking_up
    from evolkv_vllm.slots import shorten
    from evolkv_vllm.startup import announce

    def init(plain: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        announce(self)
        keep_answers_out(self.coordinator)
        shorten(self)

    def get_computed_blocks(plain: Callable[..., Any], self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        # vLLM 0.33 says how long a prefix may be, too.
        with looking_up(request.num_prompt_tokens):
            return plain(self, request, *args, **kwargs)

    _wrap(KVCacheManager, "__init__", init)
    _wrap(KVCacheManager, "get_computed_blocks", get_computed_blocks)


def _wrap_requests() -> None:
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine.input_processor import InputProcessor

    from evolkv_vllm.chunks import end_of_chunk

    def reserve(
        plain: Callable[..., int], self: Any, request: Any, num_computed_tokens: int, num_new_tokens: int
    ) -> int:
        number = plain(self, request, num_computed_tokens, num_new_tokens)
        return end_of_chunk(self, request, num_computed_tokens, number)

    def process_inputs(plain: Callable[..., Any], self: Any, *args: Any, resumable: bool = False, **kwargs: Any) -> Any:
        if resumable and plan.rule_of(self.vllm_config) is not None:
            raise VLLMValidationError(
                "EvolKV cannot run sessions whose prompt grows, because its beginning is compressed by then; send "
                "the whole prompt as a new request, or serve the model without a profile"
            )
        return plain(self, *args, resumable=resumable, **kwargs)

    _wrap(Scheduler, "_reserve_prefill_lookahead", reserve)
    _wrap(InputProcessor, "process_inputs", process_inputs)


def _wrap_runner() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    from evolkv_vllm.groups import take_over

    def initialize_kv_cache(plain: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        take_over(self)

    _wrap(GPUModelRunner, "initialize_kv_cache", initialize_kv_cache)
    _wrap(SecondRunner, "prepare_inputs", lengths_on_host)


def lengths_on_host(plain: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Prepare a batch of vLLM's second runner, with the prompts' lengths on the host.

    vLLM's are on the device, and who reads them there waits for the step before.
    """
    batch = plain(self, *args, **kwargs)
    if plan.rule_of(self.vllm_config) is not None:
        batch.prompt_lens = torch.from_numpy(self.req_states.prompt_len.np[batch.idx_mapping_np])
    return batch
