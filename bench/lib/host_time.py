"""An engine of vLLM in a process of its own, which does steps of decoding when it is asked and says what they took.

vLLM keeps much of its state in globals, so each engine has a process. All of them live at the same time and take turns.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

#: What a step does besides computing the model and choosing tokens: the scheduler's part, and the runner's.
SCHEDULER = ("schedule", "update_from_output")
RUNNER = ("_update_states", "_prepare_inputs", "_get_slot_mappings", "_build_attention_metadata")


class Engine:
    """A process with an engine whose requests are all past their prompts.

    Args:
        model: folder of the model.
        evolkv: the plugin's settings, or None for plain vLLM.
        prompts: token ids of each request, ``[tokens]``.
        tokens: how many tokens each request can still write.
        settings: further arguments of vLLM's `LLM`.
    """

    def __init__(
        self, model: str, evolkv: dict[str, Any] | None, prompts: list[list[int]], tokens: int, **settings: Any
    ):
        # Not forked: vLLM and PyTorch have threads.
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, model, evolkv, prompts, tokens, settings))
        self._process.start()
        other.close()

    def steps(self, number: int) -> dict[str, float]:
        """Do some steps, and return the seconds of CPU that each part of a step took on average.

        Raises:
            SystemExit: the engine could not be started, or has failed.
        """
        self._pipe.send(number)
        try:
            seconds: dict[str, float] = self._pipe.recv()
        except EOFError:
            raise SystemExit("an engine has failed; see its messages above") from None
        return seconds

    def close(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.join()


def _serve(
    pipe: Connection,
    model: str,
    evolkv: dict[str, Any] | None,
    prompts: list[list[int]],
    tokens: int,
    settings: dict[str, Any],
) -> None:
    # The engine is to run in this process, so that its parts can be timed.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        additional_config={} if evolkv is None else {"evolkv": evolkv},
        max_num_seqs=len(prompts),
        enforce_eager=True,
        skip_tokenizer_init=True,
        **settings,
    )
    engine = llm.llm_engine
    core: Any = engine.engine_core.engine_core
    scheduler, runner = core.scheduler, core.model_executor.driver_worker.worker.model_runner
    spent: dict[str, float] = {}
    for owner, names in ((scheduler, SCHEDULER), (runner, RUNNER)):
        for name in names:
            setattr(owner, name, _watched(getattr(owner, name), name, spent))
    parameters = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
    while scheduler.waiting or any(each.num_output_tokens == 0 for each in scheduler.running):
        engine.step()
    while True:
        try:
            number = pipe.recv()
        except EOFError:
            return
        spent.clear()
        for _ in range(number):
            engine.step()
        if len(scheduler.running) < len(prompts):
            raise SystemExit("a request ended; let requests write more tokens")
        pipe.send({name: seconds / number for name, seconds in spent.items()})


def _watched(plain: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    """Return a function that adds the CPU seconds of its calls to those spent under a name."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.thread_time()
        try:
            return plain(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.thread_time() - started

    return timed
