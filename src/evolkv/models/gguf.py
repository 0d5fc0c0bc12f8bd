"""GGUF files, converted once and kept as safetensors.

Transformers can read a GGUF file, but takes half a minute over a small one. The weights are therefore
de-quantized once, written in float32 (the one common type that holds every GGUF value exactly) to a folder
under the user's cache, and loaded from there ever after, the first time included: a model has the same
weights however often it was loaded.

A folder carries a manifest with the size and a checksum of each of its files. They are checked at each load
(0.35 s for a gigabyte on two cores with SHA instructions), so a damaged folder is noticed and made again.
Folders appear by one rename, so a conversion that was interrupted leaves nothing that could be mistaken for
a model, and two processes that convert the same file at once do not meet.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import platformdirs
import torch

from evolkv.errors import ModelError, RunError

MANIFEST = "evolkv-manifest.json"
FORMAT = "evolkv.converted/2"
_TEMPORARY = ".tmp-"
_STRETCH_BYTES = 1 << 26
_STALE_SECONDS = 24 * 3600.0
_LONG_ARRAY = 1000


def cache_folder() -> Path:
    """Return the folder of converted models: `$EVOLKV_CACHE`, else the user's cache folder for EvolKV."""
    return Path(os.environ.get("EVOLKV_CACHE") or platformdirs.user_cache_dir("evolkv")) / "models"


def converted(pieces: Sequence[Path], label: str, sha256: str | None = None) -> Path:
    """Return the folder that holds a GGUF file's weights, config and tokenizer, made if there is none.

    Args:
        pieces: the files which, end to end, are the GGUF file. Most often just one.
        label: what the folder's name and error messages call the model.
        sha256: the hex digest the GGUF file must have, where it is known.

    Raises:
        ModelError: the file is not GGUF, is damaged, or holds a model that cannot be converted.
        RunError: the converted model cannot be written.
    """
    with pieces[0].open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{pieces[0]} is not a GGUF file; give a folder, a .gguf file or a model's name")
    if sha256 is not None and is_intact(_folder_of(label, sha256)):
        return _folder_of(label, sha256)
    digest = _sha256(*pieces)
    if sha256 is not None and digest != sha256:
        raise ModelError(f"the installed weights of {label!r} are damaged; reinstall their packages")
    target = _folder_of(label, digest)
    if is_intact(target):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(target.parent)
        with _temporary_folder(target.parent) as work:
            source = pieces[0] if len(pieces) == 1 else _joined(pieces, Path(work, "source.gguf"))
            folder = Path(work, "converted")
            _convert(source, folder, label)
            _write_manifest(folder, digest)
            _publish(folder, target)
    except OSError as error:
        raise RunError(
            f"cannot write the converted weights of {label!r} under {cache_folder()} ({error.strerror}); "
            f"free some space or set EVOLKV_CACHE to another folder"
        ) from error
    return target


def _folder_of(label: str, digest: str) -> Path:
    return cache_folder() / f"{label}-{digest[:16]}"


def is_intact(folder: Path) -> bool:
    """Return whether a converted folder is complete and its files are those that were written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        return manifest["format"] == FORMAT and all(
            (folder / name).stat().st_size == entry["bytes"] and _checksum(folder / name) == entry["checksum"]
            for name, entry in manifest["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _sha256(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _checksum(path: Path) -> str:
    """Return the sha256 of the sha256 sums of a file's stretches, which all cores compute side by side."""

    def stretch(start: int) -> bytes:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            left = _STRETCH_BYTES
            while left and (block := file.read(min(left, 1 << 20))):
                digest.update(block)
                left -= len(block)
        return digest.digest()

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        sums = threads.map(stretch, range(0, path.stat().st_size, _STRETCH_BYTES))
        return hashlib.sha256(b"".join(sums)).hexdigest()


def _joined(pieces: Sequence[Path], target: Path) -> Path:
    with target.open("wb") as whole:
        for piece in pieces:
            with piece.open("rb") as file:
                shutil.copyfileobj(file, whole, 1 << 20)
    return target


def _write_manifest(folder: Path, source_sha256: str) -> None:
    import transformers

    files = sorted(path for path in folder.iterdir() if path.is_file())
    manifest = {
        "format": FORMAT,
        "source": {"sha256": source_sha256},
        "transformers": transformers.__version__,
        "files": {path.name: {"bytes": path.stat().st_size, "checksum": _checksum(path)} for path in files},
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), "utf-8")


def _temporary_folder(parent: Path) -> tempfile.TemporaryDirectory[str]:
    """Return a folder beside the target, so that the last step is a rename within one file system."""
    return tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=parent, ignore_cleanup_errors=True)


def _remove_stale(parent: Path) -> None:
    """Remove what conversions that were killed have left behind."""
    for path in parent.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _publish(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; keep an intact target that another process has made meanwhile."""
    for _ in range(3):
        try:
            folder.rename(target)
            return
        except OSError:
            if not target.exists():
                raise
        if is_intact(target):
            return
        with contextlib.suppress(FileNotFoundError), _temporary_folder(target.parent) as trash:
            target.rename(Path(trash, "damaged"))
    raise RunError(f"other processes keep writing damaged files to {target}; stop them and try again")


def _convert(source: Path, folder: Path, label: str) -> None:
    """Write `source` as a Transformers folder: float32 safetensors, config, tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        with _quick_gguf():
            model, report = AutoModelForCausalLM.from_pretrained(
                **where,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(**where)
        _check_all_is_read(_quick_reader()(source), model.config, label)
        check_complete(report, label)
    except ModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if isinstance(error, struct.error):
            reason = "it ends in the middle of its metadata"
        raise ModelError(
            f"cannot convert the GGUF file of {label!r}: {reason}; "
            f"it may be damaged (download it again) or of a kind Transformers does not know"
        ) from error
    # Transformers refuses to save a model that still calls itself quantized; this one no longer is.
    model.hf_quantizer = None
    vars(model.config).pop("quantization_config", None)
    # A GGUF file has no such field for the tokenizer, which then believes in any length.
    tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _read_tokenizer_as_it_is(folder, tokenizer)
    except OSError:
        raise
    except Exception as error:  # safetensors reports a full disk with its own exception type
        raise RunError(f"cannot write the converted weights of {label!r} to {folder}: {error}") from error


def check_complete(report: dict[str, Any], label: str) -> None:
    """Raise `ModelError` if weights of a model are not in its files: Transformers makes up random ones instead.

    Args:
        report: the loading info of `from_pretrained`.
        label: what the message calls the model.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{label!r} lacks {len(missing)} of the model's weights ({missing[0]}, …); "
            f"it is damaged or not a causal language model"
        )


def _check_all_is_read(reader: Any, config: Any, label: str) -> None:
    """Raise `ModelError` for a file of which Transformers leaves out a part without a word."""
    from evolkv.models.rotary import kinds

    parts = reader.get_field("split.count")
    if parts is not None and parts.contents() > 1:
        raise ModelError(
            f"{label!r} is one of the {parts.contents()} files of a model; "
            "join them with `llama-gguf-split --merge` of llama.cpp"
        )
    # Llama 3's factors are a tensor, those of YaRN metadata.
    scaling = [tensor.name for tensor in reader.tensors if "rope_f" in tensor.name]
    types = [name for name in reader.fields if name.endswith(".rope.scaling.type")]
    scaling += [name for name in types if reader.get_field(name).contents() != "none"]
    if scaling and all(each["rope_type"] == "default" for each in kinds(config)):
        raise ModelError(
            f"{label!r} has a scaled rotary position embedding ({scaling[0]}), which Transformers does not read from "
            "GGUF files, so the model would compute something else; give its folder or Hugging Face id"
        )


def _read_tokenizer_as_it_is(folder: Path, tokenizer: Any) -> None:
    """Have Transformers take `tokenizer.json` for what it is, instead of building it again from its vocabulary.

    The classes of single model families, Gemma's among them, parse the file three times in Python and put their own
    tokenizer together from it: the same one, in two thirds of the time that loading the model takes.
    """
    config_file, tokenizer_file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    if not tokenizer_file.exists():
        return
    added = json.loads(tokenizer_file.read_text("utf-8"))["added_tokens"]
    config = json.loads(config_file.read_text("utf-8"))
    config |= {
        "tokenizer_class": "TokenizersBackend",
        # What those classes know without a file.
        "padding_side": tokenizer.padding_side,
        "added_tokens_decoder": {str(entry.pop("id")): entry for entry in added},
    }
    config_file.write_text(json.dumps(config, indent=2, ensure_ascii=False), "utf-8")


@contextlib.contextmanager
def _quick_gguf() -> Iterator[None]:
    """Make Transformers' GGUF loader three to five times as fast, and silent.

    Profiled on SmolLM2-135M (24 s) and Gemma 3 270M (over 90 s), most of its time goes to two things.
    It reads the vocabulary string by string into one NumPy array each, three times over, though all it wants
    of it here is the length (the tokenizer is built from another, faster reader). And it builds the same
    table of tensor names again for every submodule of the model. Neither changes a weight.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    swaps: list[tuple[Any, str, Any]] = [
        (gguf, "GGUFReader", _quick_reader()),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (loader, "tqdm", lambda tensors, **_: tensors),
    ]
    with contextlib.ExitStack() as undo:
        for owner, name, value in swaps:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


@functools.cache
def _quick_reader() -> type:
    import numpy as np
    from gguf import GGUFReader, GGUFValueType

    class QuickReader(GGUFReader):
        """A GGUF reader that steps over long arrays: all their entries read as the first one."""

        data: Any

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list, list, list]:
            # Slices of a memmap cost several times as much as slices of the same memory seen as an array.
            data = self.data = np.asarray(self.data)
            if raw_type != GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            item_type, count = struct.unpack_from("<IQ", data.data, orig_offs)
            if self.byte_order != "I" or count < _LONG_ARRAY or item_type == GGUFValueType.ARRAY:
                return super()._get_field_parts(orig_offs, raw_type)
            first = orig_offs + 12
            size, parts, indices, types = super()._get_field_parts(first, item_type)
            if item_type == GGUFValueType.STRING:
                end, buffer = first, data.data
                for _ in range(count):
                    end += 8 + struct.unpack_from("<Q", buffer, end)[0]
            else:
                end = first + count * size
            if end > len(data):
                raise ValueError("it ends in the middle of its metadata")
            return end - orig_offs, parts, indices * count, [GGUFValueType.ARRAY, *types]

    return QuickReader
