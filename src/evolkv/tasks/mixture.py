"""Several tasks as one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from evolkv.errors import TaskError
from evolkv.tasks.base import Example, Split, Task, check_request


@dataclass(frozen=True)
class Mixture(Task):
    """Examples of several tasks, the same number of each: budgets evolved on it serve them all.

    Each example keeps its own task's metric. Where the number asked for is not a multiple of the number of tasks, the
    first tasks give one more.

    Args:
        tasks: at least two, each of them once.

    Raises:
        TaskError: fewer tasks, or one given twice.
    """

    name: ClassVar[str] = "mixture"

    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        if len(self.tasks) < 2:
            raise TaskError("a mixture needs at least two tasks; give the one task itself")
        for index, task in enumerate(self.tasks):
            if task in self.tasks[:index]:
                raise TaskError(f"task {task.name} is given twice with the same settings; give each once")

    @property
    def labelled(self) -> bool:
        """True if examples of all tasks have reference answers."""
        return all(task.labelled for task in self.tasks)

    @property
    def free_text(self) -> bool:
        """True if the examples of any task are."""
        return any(task.free_text for task in self.tasks)

    @property
    def kinds(self) -> int:
        """Number of examples that have every kind of every task."""
        return len(self.tasks) * max(task.kinds for task in self.tasks)

    def check_files(self) -> None:
        """Check the files of all tasks."""
        for task in self.tasks:
            task.check_files()

    def haystack_used(self) -> str | None:
        """Return those of all tasks that have one."""
        used = {f"{task.name}: {text}": None for task in self.tasks if (text := task.haystack_used())}
        return "; ".join(used) or None

    def files(self) -> list[str]:
        """Return those of all tasks."""
        return [path for task in self.tasks for path in task.files()]

    def examples(self, split: Split, n: int, tokenizer: Any, seed: int = 0) -> list[Example]:
        """Draw n examples, task after task; fewer, with a warning, where a task has no more.

        Raises:
            TaskError: `n` is less than the number of tasks, or a task cannot draw its examples.
        """
        check_request(split, n)
        if n < len(self.tasks):
            raise TaskError(
                f"{n} {split} examples cannot cover a mixture of {len(self.tasks)} tasks; ask for {len(self.tasks)} "
                "or more"
            )
        share, more = divmod(n, len(self.tasks))
        examples: list[Example] = []
        for index, task in enumerate(self.tasks):
            examples += task.examples(split, share + (index < more), tokenizer, seed)
        return examples
