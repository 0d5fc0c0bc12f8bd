"""The server in a process of its own, as people start it, and a real client."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

REQUESTS = 500


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """The server's address, process and log."""
    port, log = free_port(), tmp_path_factory.mktemp("server") / "log.txt"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", tiny["model"]]
    command += ["--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", "512", "--block-size", "32", "--max-num-seqs", "32"]
    environment = dict(os.environ, EVOLKV_PROFILE=str(Path(tiny["folder"], "tiny-snapkv.json")))
    environment |= {"VLLM_LOGGING_LEVEL": "INFO", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            wait_until_ready(port, process, log)
            yield f"http://127.0.0.1:{port}", process, log
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)


def wait_until_ready(port, process, log, seconds=900):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-3000:])


def client(address):
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=f"{address}/v1", api_key="none", timeout=900, max_retries=0)


def blocks_in_use(address):
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    values = [line.split()[-1] for line in lines if line.startswith("vllm:kv_cache_usage_perc")]
    return sum(map(float, values))


def test_line_at_start_says_what_the_budgets_come_to(server):
    _, _, log = server
    lines = [line for line in log.read_text().splitlines() if "EvolKV: " in line]
    assert len(lines) == 1
    assert "a prompt of 512 tokens holds" in lines[0]
    assert "such prompts fit where" in lines[0]


def test_answers_are_those_of_the_engine(server, tiny):
    address, _, _ = server
    cases = [case for case in tiny["cases"] if case["profile"] == "snapkv"][10:14]

    async def ask(case):
        prompt = tiny["prompts"][case["prompt"]]
        extra = {"return_token_ids": True, "ignore_eos": True}
        async with client(address) as api:
            answer = await api.completions.create(
                model="tiny", prompt=prompt, max_tokens=len(case["tokens"]), temperature=0, extra_body=extra
            )
        return answer.choices[0].token_ids

    async def all_of_them():
        return await asyncio.gather(*map(ask, cases))

    assert asyncio.run(all_of_them()) == [case["tokens"] for case in cases]


def test_streams_chats_and_stops(server):
    address, _, _ = server

    async def run():
        async with client(address) as api:
            messages = [{"role": "user", "content": "What is hidden in this text? " * 8}]
            settings = {"model": "tiny", "messages": messages, "temperature": 0, "max_tokens": 20}
            whole = await api.chat.completions.create(**settings)
            parts = ""
            async for chunk in await api.chat.completions.create(**settings, stream=True):
                parts += chunk.choices[0].delta.content or ""
            text = whole.choices[0].message.content
            assert parts == text
            stopped = await api.chat.completions.create(**settings, stop=[text[5]])
            assert stopped.choices[0].message.content == text[: text.index(text[5])]

    asyncio.run(run())


def test_many_requests_at_once_and_clients_that_hang_up(server):
    address, process, _ = server

    async def ask(api, number):
        prompt = [number % 256, *range(number % 200)] * 2
        answer = await api.completions.create(model="tiny", prompt=prompt, max_tokens=6, temperature=0)
        return answer.choices[0].finish_reason

    async def hang_up(api):
        stream = await api.completions.create(model="tiny", prompt=[1] * 300, max_tokens=150, stream=True)
        async for _ in stream:
            break
        await stream.close()

    async def run():
        async with client(address) as api:
            asked = [ask(api, number) for number in range(REQUESTS)]
            return await asyncio.gather(*asked, *[hang_up(api) for _ in range(8)])

    reasons = asyncio.run(run())[:REQUESTS]
    assert len(reasons) == REQUESTS
    assert set(reasons) <= {"length", "stop"}
    until = time.monotonic() + 60
    while blocks_in_use(address) > 0 and time.monotonic() < until:
        time.sleep(0.5)
    assert blocks_in_use(address) == 0
    assert process.poll() is None


def test_sigterm_ends_it(server):
    """The last test: the server is gone afterwards."""
    address, process, _ = server
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) in (0, -signal.SIGTERM, 128 + signal.SIGTERM)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"{address}/health", timeout=5)


def test_a_wrong_profile_ends_the_start_with_one_clear_line(tiny):
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", tiny["model"]]
    command += ["--host", "127.0.0.1", "--port", str(free_port()), "--dtype", "float32"]
    environment = dict(os.environ, EVOLKV_PROFILE="/no/such/profile.json")
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=900)
    assert done.returncode != 0
    last = [line for line in done.stderr.splitlines() if line.strip()][-1]
    assert "EVOLKV_PROFILE: /no/such/profile.json" in last
