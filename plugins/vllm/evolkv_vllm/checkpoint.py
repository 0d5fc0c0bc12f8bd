"""The model behind a server as EvolKV knows it, without loading its weights a second time.

Profiles belong to models, and a fingerprint of architecture and weights tells models apart. vLLM fuses and shards the
weights that it loads, so they are looked at in their files: the fingerprint needs a few hundred numbers of each.
"""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from evolkv.errors import UsageError

_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


class MissingWeightsError(LookupError):
    """A weight that the files do not have under its name, or not as plain floating-point numbers."""


def outline(model_config: Any) -> Any:
    """Return the transformers model of a server without its weights, on PyTorch's device ``meta``.

    Args:
        model_config: vLLM's `ModelConfig`.

    Raises:
        UsageError: transformers has no such causal language model.
    """
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(model_config.hf_config)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UsageError(
            f"EvolKV cannot read the layers of {model_config.model}: transformers has no causal language model for "
            f"its config ({reason}); serve it without a profile"
        ) from None
    model.config._name_or_path = str(model_config.model)
    return model


def with_weights(model: nn.Module, folder: Path) -> nn.Module:
    """Let a model on the device ``meta`` be fingerprinted by weights that stay in their files.

    Args:
        model: as `outline` returns it; changed.
        folder: holds safetensors files.
    """
    files = _Files(folder)
    for path, module in model.named_modules():
        # The place where `evolkv.models.identity` looks for weights that are not in memory.
        module._hf_hook = _Hook(_OfModule(files, path))
    return model


def without_weights(model: nn.Module) -> nn.Module:
    """Let a model on the device ``meta`` be fingerprinted by its shapes alone; it is changed."""
    for module in model.modules():
        module._hf_hook = _Hook(_Blank(module))  # type: ignore[assignment]
    return model


def weights_folder(model_config: Any, cache: str | None = None) -> Path | None:
    """Return the folder with the safetensors files of a server's model, or None where there is none on this machine.

    Args:
        model_config: vLLM's `ModelConfig`.
        cache: the folder that models of the Hub are downloaded to, if not the usual one.
    """
    name = str(model_config.model)
    folder = Path(os.path.expanduser(name))
    if folder.is_dir():
        return folder if any(folder.glob("*.safetensors")) else None
    from huggingface_hub import try_to_load_from_cache

    for file in ("model.safetensors.index.json", "model.safetensors"):
        found = try_to_load_from_cache(name, file, cache, getattr(model_config, "revision", None))
        if isinstance(found, str):
            return Path(found).parent
    return None


class _Hook:
    """The mark that accelerate leaves at a module whose weights are elsewhere, as far as EvolKV looks at it."""

    def __init__(self, weights_map: _OfModule | _Blank):
        self.weights_map = weights_map


class _Blank:
    """Zeros in place of every weight of a module."""

    def __init__(self, module: nn.Module):
        self._module = module

    def __getitem__(self, name: str) -> Tensor:
        return torch.zeros(1).expand(self._module._parameters[name].shape)  # type: ignore[union-attr]


class _OfModule:
    """The weights of one module, by the names that it has for them."""

    def __init__(self, files: _Files, path: str):
        self._files, self._path = files, path

    def __getitem__(self, name: str) -> Tensor:
        return self._files.tensor(f"{self._path}.{name}" if self._path else name)


class _Files:
    """The tensors of a folder's safetensors files, mapped into memory: only what is looked at is read."""

    def __init__(self, folder: Path):
        self._files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            self._files |= dict.fromkeys(file.keys(), file)

    def tensor(self, name: str) -> Tensor:
        """Return a weight by its name in the model.

        Raises:
            MissingWeightsError: there is none, or it is quantized.
        """
        found = self._files[name].get_tensor(name) if name in self._files else None
        if found is None or found.dtype not in _DTYPES:
            raise MissingWeightsError(name)
        return found
