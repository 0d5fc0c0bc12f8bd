"""A server of vLLM in a process of its own, and a client that streams from it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NAME = "served"
_START_SECONDS = 600


@dataclass
class Answer:
    """One streamed answer.

    Args:
        text: what the client got.
        times: when each piece came, in seconds since the request.
    """

    text: str = ""
    times: list[float] = field(default_factory=list)


@dataclass
class Load:
    """A server's answers to requests that came all at once, and the time that they took.

    Args:
        answers: in the order of the requests.
        seconds: until the last answer was complete.
        running: requests that ran at once, as the server told it several times a second.
        blocks: the part of the pool that was in use, likewise.
    """

    answers: list[Answer]
    seconds: float
    running: list[float]
    blocks: list[float]

    def facts(self) -> dict[str, float]:
        """Return the figures of the load: medians over requests, times in seconds."""
        first = [answer.times[0] for answer in self.answers]
        gaps = [
            (answer.times[-1] - answer.times[0]) / (len(answer.times) - 1)
            for answer in self.answers
            if len(answer.times) > 1
        ]
        return {
            "requests_per_second": len(self.answers) / self.seconds,
            "seconds_to_first_token": statistics.median(first),
            "seconds_between_tokens": statistics.median(gaps),
            "most_running": max(self.running, default=0.0),
            "mean_running": statistics.fmean(self.running) if self.running else 0.0,
            "most_blocks": max(self.blocks, default=0.0),
        }


class Server:
    """A running server on the loopback interface.

    Args:
        port: where it listens.
        log: its messages.
    """

    def __init__(self, port: int, log: Path):
        self.address, self.log = f"http://127.0.0.1:{port}", log

    def line(self, part: str) -> str | None:
        """Return the first line of the log with a text in it, from there on."""
        found = (line[line.index(part) :] for line in self.log.read_text().splitlines() if part in line)
        return next(found, None)

    def load(self, prompts: list[list[int]], tokens: int) -> Load:
        """Send all prompts at once, and stream the answers.

        Args:
            prompts: token ids of each, ``[tokens]``.
            tokens: length of each answer.
        """
        return asyncio.run(self._load(prompts, tokens))

    async def _load(self, prompts: list[list[int]], tokens: int) -> Load:
        from openai import AsyncOpenAI

        running: list[float] = []
        blocks: list[float] = []
        async with AsyncOpenAI(base_url=f"{self.address}/v1", api_key="none", timeout=900, max_retries=0) as client:
            watch = asyncio.create_task(self._watch(running, blocks))
            started = time.perf_counter()
            answers = await asyncio.gather(*(_ask(client, prompt, tokens) for prompt in prompts))
            seconds = time.perf_counter() - started
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch
        return Load(list(answers), seconds, running, blocks)

    async def _watch(self, running: list[float], blocks: list[float]) -> None:
        while True:
            await asyncio.sleep(0.5)
            text = await asyncio.to_thread(self._metrics)
            running.append(_value(text, "vllm:num_requests_running"))
            blocks.append(_value(text, "vllm:kv_cache_usage_perc"))

    def _metrics(self) -> str:
        with urllib.request.urlopen(f"{self.address}/metrics", timeout=60) as answer:
            return str(answer.read().decode())


async def _ask(client: Any, prompt: list[int], tokens: int) -> Answer:
    answer, started = Answer(), time.perf_counter()
    stream = await client.completions.create(
        model=_NAME, prompt=prompt, max_tokens=tokens, temperature=0, stream=True, extra_body={"ignore_eos": True}
    )
    async for piece in stream:
        if piece.choices:
            answer.text += piece.choices[0].text
            answer.times.append(time.perf_counter() - started)
    return answer


def _value(metrics: str, name: str) -> float:
    return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(name))


@contextlib.contextmanager
def serve(model: str, folder: Path, name: str, profile: str | None, options: list[str]) -> Iterator[Server]:
    """Run a server within the block.

    Args:
        model: folder of the model.
        folder: gets the server's log.
        name: of the log.
        profile: the plugin's settings as JSON, or None for plain vLLM.
        options: further ones of the command line.

    Raises:
        SystemExit: the server does not start.
    """
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--port", str(port)]
    command += ["--served-model-name", _NAME, "--host", "127.0.0.1", *options]
    command += [] if profile is None else ["--additional-config", profile]
    log = folder / f"{name}.log"
    with log.open("w") as file:
        # That variable goes before the option for the size of the pool.
        environment = {key: value for key, value in os.environ.items() if key != "VLLM_CPU_KVCACHE_SPACE"} | _QUIET
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait(process, port, log)
            yield Server(port, log)
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(120)


_QUIET = {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


def _wait(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < until:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return
        time.sleep(0.5)
    raise SystemExit(f"the server did not start; its last messages:\n{log.read_text()[-3000:]}")
