"""`evolkv generate`."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from evolkv.cli import console
from evolkv.cli.options import (
    Attention,
    Companion,
    Device,
    Dtype,
    Model,
    ModelOptions,
    PrefillChunk,
    Trust,
    accompanied,
    to_read,
    to_write,
    valid_seed,
)
from evolkv.errors import UsageError
from evolkv.report.words import mebibytes

if TYPE_CHECKING:
    from evolkv.generation import Generated

# In glibc's malloc.h.
_M_MMAP_THRESHOLD = -3


def generate(
    model: Model,
    stdin: Annotated[str | None, typer.Argument(metavar="[-]", help="Read the prompt from standard input.")] = None,
    profile: Annotated[
        str | None,
        typer.Option(
            "--profile", "-p", metavar="P.json", callback=to_read, help="How much cache to keep. (default: all of it)"
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            "-m",
            metavar="METHOD",
            callback=to_read,
            help="Instead of a profile, a method of eval: snapkv, adakv+snapkv.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            "-b",
            metavar="C",
            help="Mean cache entries per KV head, or a share of the prompt (10%); a profile has its own.",
        ),
    ] = None,
    companion: Companion = None,
    prefill_chunk: PrefillChunk = None,
    evict_every: Annotated[
        int | None,
        typer.Option(
            "--evict-every", metavar="N", help="Evict again after every N new tokens. (default: keep them all)"
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", metavar="TEXT", help="The prompt.")] = None,
    prompt_file: Annotated[
        str | None, typer.Option("--prompt-file", metavar="F", callback=to_read, help="A UTF-8 file with the prompt.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Most tokens to generate.")] = 64,
    raw: Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without chat template.")] = False,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy; above 0 samples.")] = 0.0,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", metavar="N", callback=valid_seed, help="Draws another text, where --temperature is above 0."
        ),
    ] = 0,
    save_cache: Annotated[
        str | None,
        typer.Option(
            "--save-cache",
            metavar="FILE",
            callback=to_write,
            help="Take the prompt as a document: save what is kept of it for later questions, and answer nothing "
            "(options of the answer do not count).",
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            "--cache",
            metavar="FILE",
            callback=to_read,
            help="Ask the prompt of the document that --save-cache wrote there.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of the text.")] = False,
    dtype: Dtype = None,
    device: Device = None,
    attn_implementation: Attention = None,
    trust_remote_code: Trust = False,
) -> int:
    """Answer a prompt, with as much cache as a profile or another method allows."""
    text = _prompt(stdin, prompt, prompt_file)
    if save_cache is not None and cache is not None:
        raise UsageError("--save-cache and --cache are both given; save a document first, then ask it")
    if cache is not None and (profile is not None or method is not None or budget is not None):
        raise UsageError("--cache holds what was kept of its document; leave out --profile, --method and --budget")
    if cache is not None and prefill_chunk is not None:
        raise UsageError("the document of --cache has been read; give --prefill-chunk with --save-cache")
    if cache is not None and evict_every is not None:
        raise UsageError("--cache says itself when it evicts again; give --evict-every with --save-cache")
    from evolkv.methods import chosen_method

    named = chosen_method(profile, method, budget)
    named = replace(named, selector=accompanied([named.selector], companion)[0])
    chosen = None if named.is_full else named
    if save_cache is not None and chosen is None:
        raise UsageError("--save-cache saves what is kept; add --profile FILE, or --method snapkv --budget 128")
    if save_cache is not None:
        from evolkv.cache.files import check_replaced
        from evolkv.whole_files import check_outputs

        check_outputs([save_cache], [path for path in (profile, prompt_file) if path is not None])
        check_replaced(save_cache)
    from evolkv.generation import check_request, check_text, generate_text, save_document

    check_request(
        chosen,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        prefill_chunk=prefill_chunk,
        evict_every=evict_every,
    )
    check_text("document" if save_cache is not None else "prompt", text)
    _return_large_blocks()
    load = ModelOptions(dtype, device, attn_implementation, trust_remote_code).load
    loaded, tokenizer = load(model, profiles=[named.profile])
    if save_cache is not None:
        assert chosen is not None
        saved = save_document(
            loaded,
            tokenizer,
            text,
            chosen,
            budget,
            save_cache,
            raw=raw,
            prefill_chunk=prefill_chunk,
            evict_every=evict_every,
        )
        if as_json:
            _write(json.dumps({**asdict(saved), "cache": save_cache}, ensure_ascii=False) + "\n")
        else:
            console.note(
                f"{saved.prompt_tokens:,} tokens read in {saved.seconds:.1f} s; KV cache "
                f"{_weight(saved.kv_bytes, saved.full_kv_bytes)}; written to {save_cache}"
            )
        return 0
    document = None
    if cache is not None:
        from evolkv.cache import CompressedCache

        document = CompressedCache.load(cache, loaded)
    result = generate_text(
        loaded,
        tokenizer,
        text,
        chosen,
        budget,
        max_new_tokens=max_new_tokens,
        raw=raw,
        temperature=temperature,
        seed=seed,
        prefill_chunk=prefill_chunk,
        evict_every=evict_every,
        on_text=None if as_json else _write,
        document=document,
    )
    if as_json:
        fields = asdict(result)
        del fields["decode_seconds"]
        _write(json.dumps(fields, ensure_ascii=False) + "\n")
        return 0
    _write("\n")
    rate = (result.new_tokens - 1) / result.decode_seconds if result.new_tokens > 1 else 0.0
    console.note(
        f"{result.prompt_tokens:,} prompt tokens; KV cache after prefill "
        f"{_weight(result.kv_bytes, result.full_kv_bytes)}{_of_companion(result)}; "
        f"{result.new_tokens} new tokens in {result.seconds:.1f} s" + (f", {rate:.1f} tokens/s" if rate else "")
    )
    return 0


def _weight(held: int, full: int) -> str:
    return f"{mebibytes(held)} MiB, {held / full:.1%} of {mebibytes(full)} MiB"


def _of_companion(result: Generated) -> str:
    """Return what of the cache a step needs, and what is the companion's, where there is one."""
    if not result.companion_bytes:
        return ""
    return f" (resident {mebibytes(result.resident_bytes)} MiB, companion {mebibytes(result.companion_bytes)} MiB)"


def _return_large_blocks() -> None:
    """Have glibc give back every large block as soon as it is free.

    Left to itself it keeps more and more of them, with what layers keep of the prompt strewn in between: a long prompt
    then takes as much memory under a small budget as under none (docs/performance.md).
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    # Other C libraries have no such setting.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def _prompt(stdin: str | None, prompt: str | None, prompt_file: str | None) -> str:
    """Read the prompt from the one place where it was given."""
    if stdin not in (None, "-"):
        raise UsageError(f"unexpected argument {stdin!r}; give the prompt with --prompt, --prompt-file or - (stdin)")
    if sum(source is not None for source in (stdin, prompt, prompt_file)) != 1:
        raise UsageError("give the prompt once: --prompt TEXT, --prompt-file FILE or - (stdin)")
    if prompt is not None:
        return prompt
    if prompt_file is not None:
        from evolkv.tasks.base import read_text

        return read_text(prompt_file)
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError("standard input is not UTF-8 text; convert it to UTF-8") from None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
