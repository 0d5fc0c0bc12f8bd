"""One prompt, answered with the full or a compressed cache, and what its cache weighed."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, StopStringCriteria, TextStreamer
from transformers.cache_utils import DynamicLayer

from evolkv.budgets import BudgetSpec
from evolkv.cache.compressed import CompressedCache
from evolkv.cache.reeviction import Reeviction
from evolkv.errors import EvolKVError, ModelError, TaskError, UsageError, enough_memory
from evolkv.evaluation.decode import end_tokens
from evolkv.methods import Method
from evolkv.models import model_facts
from evolkv.models.chat import around_message, user_message
from evolkv.models.forward import check_token_ids, input_device
from evolkv.tasks.prompts import encode_text, special_tokens

logger = logging.getLogger(__name__)

#: Settings of a generation config that choose among the next tokens, or say where a text ends.
_SERVED = {
    "stop_strings",
    *("bos_token_id", "eos_token_id", "pad_token_id", "min_length", "min_new_tokens"),
    *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
    *("bad_words_ids", "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "watermarking_config"),
    *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
    *("remove_invalid_values", "renormalize_logits"),
    *("top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
}
#: Settings that make another text than one that is decoded token by token, and the value at which they do not.
_OTHER_TEXTS = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "guidance_scale"), 1),
    **dict.fromkeys(("penalty_alpha", "dola_layers", "constraints", "force_words_ids", "token_healing")),
}


@dataclass(frozen=True)
class Generated:
    """A continuation and its cost.

    Args:
        text: the new text.
        prompt_tokens: length of the prompt, chat template included.
        new_tokens: tokens generated.
        kv_bytes: what keys and values held right after prefill, those of a companion model included.
        full_kv_bytes: what they would have held uncompressed.
        resident_bytes: of that, what a new token needs of the model's own; all where there is no companion.
        companion_bytes: of that, what the companion held.
        seconds: wall-clock time, prefill included.
        decode_seconds: of that, the time after the first new token.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    kv_bytes: int
    full_kv_bytes: int
    resident_bytes: int
    companion_bytes: int
    seconds: float
    decode_seconds: float


@dataclass(frozen=True)
class SavedDocument:
    """A saved document and its cost; the fields are those of `Generated`."""

    prompt_tokens: int
    kv_bytes: int
    full_kv_bytes: int
    seconds: float


def save_document(
    model: Any,
    tokenizer: Any,
    document: str,
    method: Method,
    budget: BudgetSpec | None,
    path: str,
    *,
    raw: bool = False,
    prefill_chunk: int | None = None,
    evict_every: int | None = None,
) -> SavedDocument:
    """Read a document, and save what a method keeps of it, for questions that come later.

    Args:
        model: a transformers decoder-only model.
        tokenizer: its tokenizer.
        document: what the user's message begins with, where the tokenizer has a chat template.
        method: what to keep.
        budget: as for `generate_text`.
        path: where the cache goes; see `CompressedCache.load`.
        raw: as for `generate_text`.
        prefill_chunk: as for `generate_text`.
        evict_every: as for `generate_text`; the file says so, and answers go by it.

    Raises:
        UsageError, ModelError, ProfileError, RunError: as for `generate_text`, and if the file cannot be written.
    """
    check_text("document", document)
    before = "" if raw else around_message(tokenizer)[0]
    ids = encode_text(tokenizer, before + document)
    _check_fits(model, "document", ids)
    inputs = torch.tensor([ids])
    check_token_ids(model, inputs)
    started = time.perf_counter()
    with enough_memory(f"on a document of {len(ids)} tokens", _with_less(method, prefill_chunk)):
        cache = CompressedCache.prefill(
            model, method, inputs, budget=budget, prefill_chunk=prefill_chunk, evict_every=evict_every
        )
    cache.save(path)
    return SavedDocument(len(ids), cache.kv_bytes, _full_bytes(model, len(ids)), time.perf_counter() - started)


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    method: Method | None = None,
    budget: BudgetSpec | None = None,
    *,
    max_new_tokens: int = 64,
    raw: bool = False,
    temperature: float = 0.0,
    seed: int = 0,
    prefill_chunk: int | None = None,
    evict_every: int | None = None,
    on_text: Callable[[str], None] | None = None,
    document: CompressedCache | None = None,
) -> Generated:
    """Continue a prompt, or ask it of a document.

    Args:
        model: a transformers decoder-only model.
        tokenizer: its tokenizer.
        prompt: the user's message; put in the tokenizer's chat template where there is one.
        method: what to keep of the prompt; None for all of it.
        budget: mean cache entries per KV head, or a share of the prompt; None for that of the method's profile.
        max_new_tokens: most tokens to generate.
        raw: take the prompt as it is, without chat template.
        temperature: 0 for greedy, above 0 to sample.
        seed: of the sampling.
        prefill_chunk: read the prompt in chunks of so many tokens, evicting as it goes; see `CompressedCache`.
        evict_every: cut the cache to its budgets again after so many new tokens; see `CompressedCache`.
        on_text: called with each piece of text as it is generated. What it raises comes out as it is.
        document: holds what `save_document` read; the prompt is the question, and `method`, `budget`, `prefill_chunk`
            and `evict_every` are left out.

    Raises:
        UsageError: an empty prompt, one that does not fit the model's context, or a setting out of range.
        ModelError: token ids that the model has no embeddings for, or a generation config that cannot be used.
        ProfileError: a profile for another model.
        RunError: if memory does not suffice.
    """
    check_request(
        method,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        prefill_chunk=prefill_chunk,
        evict_every=evict_every,
    )
    check_text("prompt", prompt)
    if document is not None:
        inputs = _question_inputs(tokenizer, document, prompt, raw)
    else:
        chats = not raw and bool(getattr(tokenizer, "chat_template", None))
        text = user_message(tokenizer, prompt) if chats else prompt
        read = torch.tensor([encode_text(tokenizer, text)], device=input_device(model))
        check_token_ids(model, read)
        inputs = {"input_ids": read, "attention_mask": torch.ones_like(read)}
        inputs["cache"] = (
            DynamicCache(config=model.config)
            if method is None
            else CompressedCache(model, method, budget, prefill_chunk=prefill_chunk, evict_every=evict_every)
        )
    cache, ids = inputs["cache"], inputs["input_ids"][0].tolist()
    limit = _check_fits(model, "prompt", ids)
    if temperature:
        torch.manual_seed(seed)
    meter = _Meter(tokenizer, cache, on_text or (lambda text: None))
    started = time.perf_counter()
    try:
        settings = _settings(model, tokenizer, temperature, min(max_new_tokens, limit - len(ids)))
        less = _with_less(method, prefill_chunk) if document is None else "use a shorter one"
        with enough_memory(f"on a prompt of {len(ids)} tokens", less):
            output = model.generate(**{**inputs, **settings}, streamer=meter)
    except EvolKVError:
        raise
    except (ValueError, TypeError, IndexError) as error:
        if error is meter.error:
            raise
        message = " ".join(str(error).split())
        raise ModelError(f"the model's generation config cannot be used ({message}); mend or remove it") from error
    finished = time.perf_counter()
    new = output[0, len(ids) :]
    return Generated(
        text=tokenizer.decode(new, skip_special_tokens=True),
        prompt_tokens=len(ids),
        new_tokens=len(new),
        kv_bytes=meter.kv_bytes,
        full_kv_bytes=meter.kv_bytes if isinstance(cache, DynamicCache) else _full_bytes(model, len(ids)),
        resident_bytes=meter.resident_bytes,
        companion_bytes=meter.companion_bytes,
        seconds=finished - started,
        decode_seconds=finished - meter.first_token_at,
    )


def _with_less(method: Method | None, prefill_chunk: int | None) -> str:
    """Return what takes less memory to read a text with."""
    if method is None:
        return "keep less of it, with --profile FILE or --method snapkv --budget 128, or use a shorter one"
    if prefill_chunk is not None:
        return "use a smaller --prefill-chunk or a shorter text"
    try:
        if method.selector is not None:
            Reeviction(512).check_selector(method.selector)
    except UsageError:
        return "use a shorter one"
    return "read it in chunks, with --prefill-chunk 512, or use a shorter one"


def _settings(model: Any, tokenizer: Any, temperature: float, max_new_tokens: int) -> dict[str, Any]:
    """Return what `generate` must be told for one text, decoded token by token, from the cache that it is given.

    A published model's generation config may say more: beams, a kind of cache, outputs for programs. That is set aside.
    """
    published = {name: value for name, value in vars(model.generation_config).items() if value is not None}
    ignored = {name: published[name] for name in _OTHER_TEXTS if published.get(name) not in (None, _OTHER_TEXTS[name])}
    if ignored:
        named = ", ".join(f"{name} {value}" for name, value in ignored.items())
        logger.warning("the model's generation config asks for %s, which is set aside here", named)
    settings: dict[str, Any] = {name: None for name in published if name not in _SERVED and not name.startswith("_")}
    if "stop_strings" in published:
        settings["tokenizer"] = tokenizer
        try:
            StopStringCriteria(tokenizer, published["stop_strings"])
        except (ValueError, TypeError, AttributeError):
            logger.warning(
                "the tokenizer cannot make the stop strings %r; they are left out", published["stop_strings"]
            )
            settings["stop_strings"] = None
    settings |= {"use_cache": True, "num_beams": 1, "num_return_sequences": 1, "max_new_tokens": max_new_tokens}
    settings["eos_token_id"] = sorted(end_tokens(model, tokenizer)) or None
    settings |= {"do_sample": temperature > 0, "temperature": temperature or None}
    return settings if temperature else {**settings, "top_p": None, "top_k": None}


def _question_inputs(tokenizer: Any, document: CompressedCache, question: str, raw: bool) -> dict[str, Any]:
    if document.num_rows != 1:
        raise UsageError(f"the cache holds {document.num_rows} sequences; ask a cache that was made of one document")
    try:
        before, after = around_message(tokenizer)
    except TaskError:
        if not raw:
            raise
        before, after = "", ""
    # What follows may hold a date, and the last token may be one with the document's first.
    start = encode_text(tokenizer, before)[:-1][:4] if before else []
    # What any text begins with says nothing of the template.
    known, any_start = document.input_ids, special_tokens(tokenizer)[0][: len(start)]
    if known is not None and start != any_start and (known[0, : len(start)].tolist() == start) == raw:
        raise UsageError(
            "the document of --cache was read in the chat template; ask without --raw"
            if raw
            else "the document of --cache was read without the chat template, as by --raw; ask with --raw, too"
        )
    # In a message the question stands apart from the document; without a template it is for the user to say how.
    text = question if raw else f"\n\n{question}{after}"
    ids = torch.tensor([tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]], dtype=torch.long)
    check_token_ids(document.model(), ids)
    return document.followed_by(ids)


def check_request(
    method: Method | None,
    *,
    max_new_tokens: int,
    temperature: float,
    prefill_chunk: int | None,
    evict_every: int | None,
) -> None:
    """Check the settings of `generate_text`, as far as that needs no model.

    Raises:
        UsageError: one is out of its range, or they do not go together.
    """
    if max_new_tokens < 1:
        raise UsageError(f"--max-new-tokens is {max_new_tokens}; generate at least one token")
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"--temperature is {temperature}; use 0 for greedy, or a positive number")
    again = Reeviction(prefill_chunk, evict_every=evict_every)
    if method is None and again.wanted:
        raise UsageError(
            "--prefill-chunk and --evict-every need to know what to keep; add --method snapkv --budget 128"
        )
    if method is not None and method.selector is not None:
        again.check_selector(method.selector)


def check_text(what: str, text: str) -> None:
    """Check that a prompt, or what else is called so in messages, has text that can be encoded.

    Raises:
        UsageError: it is empty, or holds halves of characters.
    """
    if not text.strip():
        raise UsageError(f"the {what} is empty; give it some text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"the {what} is not valid UTF-8; convert it to UTF-8") from None


def _check_fits(model: Any, what: str, ids: list[int]) -> int:
    """Check that a text leaves room for an answer; return the tokens that the model's context holds."""
    limit = model_facts(model).max_context
    if len(ids) >= limit:
        raise UsageError(
            f"the {what} has {len(ids)} tokens, but the model's context holds {limit}, answer included; "
            f"shorten the {what} or use a model with a longer context"
        )
    return limit


def _full_bytes(model: Any, tokens: int) -> int:
    """Return the bytes of a prompt's full cache; layers with a sliding window hold no more than that."""
    facts = model_facts(model)
    return int(facts.most_held(tokens).sum()) * facts.num_kv_heads * 2 * facts.head_dim * model.dtype.itemsize


class _Meter(TextStreamer):
    """Passes text on, and weighs the cache when the first new token is there: it then holds the prompt alone."""

    def __init__(self, tokenizer: Any, cache: Any, on_text: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.cache, self.on_text = cache, on_text
        self.kv_bytes, self.resident_bytes, self.companion_bytes = 0, 0, 0
        self.first_token_at = 0.0
        #: What `on_text` has raised.
        self.error: Exception | None = None

    def put(self, value: Tensor) -> None:
        """Take the prompt, then each new token."""
        is_prompt = self.next_tokens_are_prompt
        if not is_prompt and not self.first_token_at:
            self.first_token_at = time.perf_counter()
            if isinstance(self.cache, CompressedCache):
                self.kv_bytes, self.resident_bytes = self.cache.kv_bytes, self.cache.resident_bytes
                self.companion_bytes = self.cache.companion_bytes
            else:
                with_keys = [layer for layer in self.cache.layers if isinstance(layer, DynamicLayer)]
                self.kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in with_keys)
                self.resident_bytes = self.kv_bytes
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take text that will not change any more."""
        if not text:
            return
        try:
            self.on_text(text)
        except Exception as error:
            self.error = error
            raise
