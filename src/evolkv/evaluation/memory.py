"""Memory that is still free where a model computes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from evolkv.models.forward import execution_device

#: The part of free memory that engines use.
USABLE = 0.9
_PROCESS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
#: Files of a control group of version 2 and 1: its limit, what it uses, and the field of memory.stat for file pages
#: that the kernel gives up first.
_FILES = {
    2: ("memory.max", "memory.current", "inactive_file"),
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory(model: PreTrainedModel) -> int:
    """Return how many bytes of keys and values, over all layers, can still be allocated.

    Where layers are on several devices, each device takes the share of its layers, and the fullest one decides.
    """
    layers = getattr(model.get_decoder(), "layers", None) or [model]
    devices = Counter(execution_device(layer, model.device) for layer in layers)
    return min(free_on(device) * len(layers) // count for device, count in devices.items())


def free_on(device: torch.device) -> int:
    """Return how many bytes a device can still give to this process; on a CPU a container's limit counts, too."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    import psutil

    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups() -> Iterator[int]:
    """Yield what each control group with a limit leaves to this process: a container's, a job's, or a service's."""
    try:
        lines = _PROCESS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        version, root = (1, _GROUPS / "memory") if controllers else (2, _GROUPS)
        own = root / path.lstrip("/")
        # In a container the path may be the host's, of which only the end, or nothing, can be seen.
        for folder in (own, *own.parents):
            if folder.is_relative_to(root):
                yield from _left(folder, *_FILES[version])


def _left(folder: Path, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    try:
        # Version 2 says "max" where there is no limit, version 1 a number beyond any memory.
        most, used = int((folder / limit).read_text()), int((folder / usage).read_text())
        fields = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return
    yield max(0, most - used + int(fields.get(reclaimable, 0)))
