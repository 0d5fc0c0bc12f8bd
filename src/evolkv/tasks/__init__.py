"""Tasks: where examples come from."""

from evolkv.tasks.base import SPLITS, Example, Split, Task, fingerprint
from evolkv.tasks.mixture import Mixture
from evolkv.tasks.prompts import encode_prompt
from evolkv.tasks.spec import TASKS, format_spec, get_task, get_tasks

__all__ = [
    "SPLITS",
    "TASKS",
    "Example",
    "Mixture",
    "Split",
    "Task",
    "encode_prompt",
    "fingerprint",
    "format_spec",
    "get_task",
    "get_tasks",
]
