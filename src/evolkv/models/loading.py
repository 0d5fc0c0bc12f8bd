"""Loading a model by name, path or alias."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from evolkv.errors import EvolKVError, ModelError, RunError, is_out_of_memory
from evolkv.models import gguf
from evolkv.models.aliases import ALIASES
from evolkv.registry import unknown_name

DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
}
_HUB_TIMEOUT_SECONDS = 10.0
_ORIGIN = "_evolkv_origin"
_TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model", "merges.txt")
_POINTER, _POINTER_BYTES = b"version https://git-lfs", 1024


@dataclass(frozen=True)
class Origin:
    """The source of a model, so that other processes can load it for themselves; see `load_model`."""

    name: str
    dtype: torch.dtype
    attn_implementation: str | None
    trust_remote_code: bool

    def load(self, device: str) -> tuple[Any, Any]:
        """Load the same model and tokenizer on a device of this process."""
        return load_model(self.name, self.dtype, device, self.attn_implementation, self.trust_remote_code)


def loaded_from(model: Any) -> Origin | None:
    """Return the source of a model, or None if `load_model` did not make it."""
    origin = getattr(model, _ORIGIN, None)
    return origin if isinstance(origin, Origin) else None


#: Of the models that `load_model` made.
_tokenizers: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def tokenizer_of(model: Any) -> Any:
    """Return the tokenizer of a model; None if it cannot be found.

    That is what `load_model` loaded along with the model, or else what stands where the model says that it came from.
    """
    if (known := _tokenizers.get(model)) is not None:
        return known
    origin = loaded_from(model)
    name = getattr(model, "name_or_path", "") if origin is None else origin.name
    if not name:
        return None
    try:
        with _quiet():
            tokenizer = _load_tokenizer(*_find(name), origin is not None and origin.trust_remote_code)
    except EvolKVError:
        return None
    return _tokenizers.setdefault(model, tokenizer)


def load_model(
    name: str | os.PathLike[str],
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    check: Callable[[Any, Any], None] | None = None,
) -> tuple[Any, Any]:
    """Load a decoder-only language model and its tokenizer.

    Weights are read from safetensors or GGUF files only, never from pickles. A GGUF file (an alias is one,
    too) is converted at its first use and kept under the user's cache folder, or `$EVOLKV_CACHE`.

    Args:
        name: an alias (see `list_models`), a local folder, a `.gguf` file, or a Hugging Face id.
        dtype: the dtype to hold and compute in, by name ("float32", "bfloat16", "float16") or as
            `torch.dtype`. Default: bfloat16 where the device computes it fast, else float32.
        device: where to put the model ("cpu", "cuda", "cuda:1", …). Default: "cuda" if there is one,
            else "cpu".
        attn_implementation: transformers' name of an attention implementation. Default: the model's own.
        trust_remote_code: run modelling code that comes with the weights. Default: never.
        check: called with the tokenizer and the config before the weights, which take long, are read. What it raises
            ends the loading.

    Returns:
        (model, tokenizer): the model in eval mode on `device`; the tokenizer has a padding token.

    Raises:
        ModelError: there is no such model, its files are damaged, it is not a decoder-only language model, or
            `dtype`, `device` or `attn_implementation` cannot be had here.
        RunError: memory or disk space ran out, or the Hugging Face Hub cannot be reached.
    """
    place = _device(device)
    kind = _dtype(dtype, place)
    with _quiet():
        source, label = _find(os.fspath(name))
        try:
            model, tokenizer = _load(source, label, kind, place, attn_implementation, trust_remote_code, check)
            _tokenizers[model] = tokenizer
            path = Path(os.path.expanduser(name))
            origin = str(path.resolve()) if os.fspath(name) not in ALIASES and path.exists() else os.fspath(name)
            setattr(model, _ORIGIN, Origin(origin, kind, attn_implementation, trust_remote_code))
            return model, tokenizer
        except EvolKVError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise RunError(
                    f"out of memory while loading {label!r} in {kind} on {place}; take a smaller model"
                ) from error
            raise ModelError(f"cannot load {label!r}: {_one_line(error)}") from error


def _load(
    source: str,
    label: str,
    dtype: torch.dtype,
    device: torch.device,
    attention: str | None,
    trust_remote_code: bool,
    check: Callable[[Any, Any], None] | None,
) -> tuple[Any, Any]:
    # Transformers' classes cost seconds to import, and a command that loads no model should not pay them.
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    _check_architecture(config, label)
    # Before the weights, which take long.
    tokenizer = _load_tokenizer(source, label, trust_remote_code)
    if check is not None:
        config._name_or_path = label
        check(tokenizer, config)
    model, report = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        output_loading_info=True,
    )
    gguf.check_complete(report, label)
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = label
    # A call that wants more than logits asks for it.
    model.config.output_attentions = model.config.output_hidden_states = False
    return model.to(device).eval(), tokenizer


def _load_tokenizer(source: str, label: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except Exception as error:
        folder = Path(source)
        if folder.is_dir() and not any(file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern)):
            names = ", ".join(sorted(each.name for each in folder.iterdir()))
            raise ModelError(
                f"no tokenizer in folder {folder}, which has {names}; "
                "copy the tokenizer's files there, such as tokenizer.json and tokenizer_config.json"
            ) from error
        raise ModelError(f"cannot load the tokenizer of {label!r}: {_one_line(error)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _find(name: str) -> tuple[str, str]:
    """Return what transformers should load for a name, and what to call it."""
    path = Path(os.path.expanduser(name))
    if name in ALIASES:
        entry = ALIASES[name]
        return str(gguf.converted(entry.paths(name), name, entry.sha256)), name
    if name and path.is_file():
        _refuse_pointers([path])
        return str(gguf.converted([path], path.name.removesuffix(".gguf"))), path.name.removesuffix(".gguf")
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            files = sorted(path.glob("*.gguf"))
            hint = (
                f"pass the file itself: {files[0]}" if files else "expected a folder with config.json and safetensors"
            )
            raise ModelError(f"no config.json in folder {path}; {hint}")
        _refuse_pointers(sorted(path.iterdir()))
        return str(path), str(path.resolve())
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or name.endswith(".gguf"):
        raise ModelError(f"no such model file or folder: {name!r}; {_choices()}")
    near = difflib.get_close_matches(name, ALIASES, n=1)
    if "/" not in name and near:
        raise ModelError(f"unknown model {name!r}. Did you mean {near[0]!r}? {_choices()}")
    _check_hub(name)
    return name, name


def _refuse_pointers(files: list[Path]) -> None:
    """Raise `ModelError` for files of which a clone without Git LFS has only the address."""
    for file in files:
        if file.is_file() and file.stat().st_size < _POINTER_BYTES and file.read_bytes().startswith(_POINTER):
            raise ModelError(
                f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in {file.parent}, or download "
                "the model again"
            )


def _check_hub(name: str) -> None:
    """Ask the Hub once, with a time limit: transformers itself would try for half a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        HfApi().model_info(name, timeout=_HUB_TIMEOUT_SECONDS)
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403, 404):
            reason = "not a local path, and the Hugging Face Hub has no such model, or not for you"
            raise ModelError(f"unknown model {name!r}: {reason}; {_choices()}") from error
        raise RunError(
            f"model {name!r} is no local path, and the Hugging Face Hub cannot be reached to look for it "
            f"({type(error).__name__}); try again, or {_choices()}"
        ) from error


def _choices() -> str:
    return f"give an alias ({', '.join(sorted(ALIASES))}), a folder, a .gguf file or a Hugging Face id"


def _check_architecture(config: Any, label: str) -> None:
    from transformers import AutoModelForCausalLM

    names = getattr(config, "architectures", None) or []
    causal = any(re.search(r"CausalLM|LMHead|ConditionalGeneration|Model$", name) for name in names) or not names
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    supported = remote or type(config) in AutoModelForCausalLM._model_mapping
    if getattr(config, "is_encoder_decoder", False) or not causal or not supported:
        raise ModelError(
            f"{label!r} is a {', '.join(names) or config.model_type}; EvolKV needs a decoder-only causal language model"
        )


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except Exception as error:  # which exception depends on the backend that is missing
        raise ModelError(f"device {str(device)!r} is not available here; use {_devices()}") from error
    return place


def _devices() -> str:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return " or ".join(["'cpu'", *(f"'cuda:{index}'" for index in range(count))])


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return default_dtype(device)
    named = DTYPES.get(dtype.removeprefix("torch.").lower()) if isinstance(dtype, str) else dtype
    if named is None or named not in DTYPES.values():
        raise ModelError(str(unknown_name("dtype", str(dtype), DTYPES)))
    return named


def default_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype that `load_model` takes by itself: bfloat16 where the device computes it fast, else float32."""
    return torch.bfloat16 if _computes_bfloat16_fast(device) else torch.float32


def _computes_bfloat16_fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Without these instructions bfloat16 is emulated, up to a hundred times slower than float32.
        probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, probe, bool)() for probe in probes)
    return False


def _one_line(error: Exception) -> str:
    """Return the first lines of an exception that may fill a screen, up to one that ends a clause."""
    words = ""
    for line in filter(None, map(str.strip, str(error).splitlines())):
        words = f"{words} {line}".strip()
        if not words.endswith((":", ",")):
            break
    return words[:300] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers and of the Hub client, then restore them."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    with contextlib.ExitStack() as restore:
        for library in (logging, hub_logging):
            restore.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity_error()
        if logging.is_progress_bar_enabled():
            restore.callback(logging.enable_progress_bar)
            logging.disable_progress_bar()
        if not are_progress_bars_disabled():
            restore.callback(enable_progress_bars)
            disable_progress_bars()
        restore.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        yield
