"""SmallKV: a companion chooses what each token reads of a large model's cache, which is held whole."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
import torch

import evolkv
import smallkv_reference
from evolkv import BudgetProfile, CompressedCache
from evolkv.cache.companion import attention_received, matching_heads, register_companion
from evolkv.errors import RunError, UsageError
from evolkv.evaluation import ReplayEngine
from evolkv.evaluation.decode import greedy, target_log_probs
from evolkv.report.tables import results_table
from evolkv.selectors import PromptAttention, SmallKV, get_selector
from tiny import HEAD_DIM, KV_HEADS, LAYERS, padded, tiny_model, tokens

HEADS, ENTRY, PARTS = 8, 2 * HEAD_DIM * 4, ("keys", "values")
ALONG = "smallkv:model=companion"


@pytest.fixture(scope="module")
def model():
    return tiny_model(initializer_range=0.2)


@pytest.fixture(scope="module", autouse=True)
def companion(model):
    """Two layers of one KV head, with the model's vocabulary; the model is a companion, too."""
    small = tiny_model("qwen3", seed=1, num_hidden_layers=2, num_key_value_heads=1, initializer_range=0.2)
    register_companion("companion", small)
    register_companion("itself", model)
    return small


def new(model, selector=ALONG, budget=16):
    return CompressedCache(model, BudgetProfile.uniform(model, budget, selector))


def prefilled(model, ids, selector=ALONG, budget=16):
    return CompressedCache.prefill(model, BudgetProfile.uniform(model, budget, selector), ids)


def steps(model, cache, ids):
    """Logits of tokens that are read one by one, ``[batch, tokens, vocabulary]``."""
    with torch.inference_mode():
        return torch.cat([model(ids[:, [i]], cache=cache).logits for i in range(ids.shape[1])], dim=1)


# What is chosen.


@pytest.mark.parametrize(
    ("spec", "budget", "tokens", "expected"),
    [
        # The paper's 20 %: 10 % critical, 5 % recent, and 10 % marginal, whose values alone take 5 %.
        ("smallkv", 200, 1000, (100, 50, 100)),
        ("smallkv", 1, 1000, (0, 1, 0)),
        ("smallkv:marginal=0", 30, 100, (20, 10, 0)),
        ("smallkv:recent=0", 30, 100, (20, 0, 20)),
        # Nothing is left for further marginal entries, so more are read exactly.
        ("smallkv", 90, 100, (58, 22, 20)),
        ("smallkv", 100, 100, None),
    ],
)
def test_a_budget_is_shared_out_in_entries_of_which_marginal_ones_take_a_half(spec, budget, tokens, expected):
    selector = get_selector(spec)
    split = selector.split(budget, tokens)
    assert expected == (None if split is None else (split.critical, tokens - split.older, split.marginal))
    assert expected == smallkv_reference.classes(selector, budget, tokens)
    if expected is not None:
        critical, recent, marginal = expected
        assert critical + recent + marginal // 2 == budget


def test_heads_match_where_the_most_attended_tokens_have_the_greatest_jaccard_index():
    torch.manual_seed(0)
    own, theirs = torch.rand(6, 40) ** 4, torch.rand(9, 40) ** 4
    expected = [smallkv_reference.partner(each, theirs) for each in own]
    assert matching_heads(own, theirs).tolist() == expected
    assert len(set(expected)) > 2
    # A head's equal is found among others with the same tokens on top.
    own[1] = own[0] * 1.1
    assert matching_heads(own[:2], own).tolist() == [0, 1]


def test_what_an_entry_receives_is_summed_over_queries_for_each_query_head():
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 30, 8), torch.randn(2, 2, 30, 8)
    logits = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    weights = logits.masked_fill(torch.ones(30, 30).triu(1).bool(), float("-inf")).softmax(-1)
    for first in (30, 7):
        received = attention_received(PromptAttention(query, key, key, 0.3), first)
        assert torch.allclose(received, weights[:, :, :first, :first].sum(2), atol=1e-5)


def test_a_step_is_the_papers_equation(model):
    ids, new_token = tokens(1, 40), tokens(1, 1, seed=1)
    cache, seen = prefilled(model, ids), []
    layer = cache.kv_layers[0]

    class Watched(type(layer)):
        def attend(self, own, module, query, key, value, mask, **kwargs):
            output = super().attend(own, module, query, key, value, mask, **kwargs)
            seen.extend([query[0, :, 0], kwargs["scaling"], self.companion.received, self.companion.latest, output[0]])
            return output

    layer.__class__ = Watched
    steps(model, cache, new_token)
    query, scaling, received, latest, output = seen
    critical, recent, marginal = smallkv_reference.classes(layer.selector, 16, 40)
    for head in range(KV_HEADS):
        queries = slice(head * HEADS // KV_HEADS, (head + 1) * HEADS // KV_HEADS)
        partners = layer.heads[0, queries]
        keys, values = ((getattr(group, part)[group.rows == head]) for group in layer.groups for part in PARTS)
        exact, rest = smallkv_reference.chosen(received[0, partners, : 40 - recent].mean(0), critical, marginal)
        weights = torch.zeros(len(partners), 41)
        weights[:, rest] = latest[0, partners][:, rest]
        expected = smallkv_reference.attended(
            query[queries], keys[0], values[0], [*exact, *range(40 - recent, 41)], weights, scaling
        )
        torch.testing.assert_close(output[0, 0, queries], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("family", "dtype", "off"),
    [
        *((family, torch.float32, 1e-5) for family in ("llama", "gemma2", "gpt_oss", "lfm2")),
        ("llama", torch.bfloat16, 0.03),
        ("qwen3", torch.float16, 0.003),
    ],
)
def test_a_model_that_is_its_own_companion_gives_full_attention_where_all_is_critical_or_marginal(family, dtype, off):
    model = tiny_model(family).to(dtype)
    register_companion("twin", model)
    ids, later = tokens(2, 40), tokens(2, 6, seed=1)
    cache = prefilled(model, ids, "smallkv:model=twin,critical=1,recent=1,marginal=20", 26)
    split = cache.kv_layers[-1].selector.split(26, 40)
    assert split.marginal > 2 * split.critical > 0
    assert split.critical + split.marginal == split.older
    with torch.inference_mode():
        expected = model(torch.cat([ids, later], dim=1)).logits[:, 40:]
    assert float((steps(model, cache, later) - expected).abs().max()) <= off
    # Without the marginal part it is another text.
    exact = prefilled(model, ids, "smallkv:model=twin,critical=1,recent=1,marginal=0", 12)
    assert float((steps(model, exact, later) - expected).abs().max()) > 2 * off


def test_a_budget_that_covers_the_prompt_changes_nothing(model):
    ids, later = tokens(1, 30), tokens(1, 6, seed=1)
    with torch.inference_mode():
        expected = model(torch.cat([ids, later], dim=1)).logits[:, 30:]
    assert torch.allclose(steps(model, prefilled(model, ids, ALONG, 30), later), expected, atol=1e-4)


def test_a_token_that_was_left_out_comes_back_when_scores_shift(model):
    cache = prefilled(model, tokens(1, 40), f"{ALONG},marginal=0", 10)
    split = cache.kv_layers[0].selector.split(10, 40)
    left_out, back = defaultdict(set), 0
    for token in tokens(24, 1, 1, seed=1):
        steps(model, cache, token)
        for i, layer in enumerate(cache.kv_layers):
            received = cache.companion.received[0, layer.heads[0].view(KV_HEADS, -1), : split.older].mean(1)
            for head, ranked in enumerate(received.argsort(descending=True).tolist()):
                back += len(left_out[i, head] & set(ranked[: split.critical]))
                left_out[i, head] |= set(ranked[split.critical :])
    assert back
    assert all(head.tolist() == list(range(40)) for layer in cache.positions for head in layer)


def test_bytes_are_held_then_resident_then_the_companions(model):
    cache = prefilled(model, tokens(2, 40))
    rows, sums = 2 * LAYERS * KV_HEADS, 2 * 2 * HEADS * 40 * 4
    companion = 2 * 2 * 40 * ENTRY + sums
    assert cache.companion_bytes == companion
    assert cache.kv_bytes == rows * 40 * ENTRY + companion
    # 8 critical ones, 4 recent ones, and the values of 8.
    assert cache.resident_bytes == rows * 16 * ENTRY
    assert cache.read_bytes == cache.resident_bytes + companion
    steps(model, cache, tokens(2, 1, seed=1))
    assert cache.resident_bytes == rows * 17 * ENTRY
    for whole, each in (
        (cache.kv_bytes, cache.kv_bytes_by_sequence),
        (cache.companion_bytes, cache.companion_bytes_by_sequence),
    ):
        assert each == [whole // 2] * 2
    plain = prefilled(model, tokens(2, 40), "snapkv:window=4")
    assert (plain.resident_bytes, plain.companion_bytes) == (plain.kv_bytes, 0)


# A cache like others.


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_padded_batch_are_read_as_if_alone(model, side):
    rows, batch, mask = padded([50, 17, 35], side)
    later = tokens(3, 4, seed=9)
    profile = BudgetProfile.uniform(model, 16, ALONG)
    together = CompressedCache.prefill(model, profile, batch, mask, "40%")
    places = torch.tensor([[50], [17], [35]]) + torch.arange(4)
    with torch.inference_mode():
        whole = torch.cat([mask, torch.ones(3, 4, dtype=torch.long)], dim=1)
        got = model(later, attention_mask=whole, position_ids=places, cache=together).logits
    for i, row in enumerate(rows):
        alone = CompressedCache.prefill(model, profile, row[None], budget="40%")
        torch.testing.assert_close(got[i], steps(model, alone, later[i : i + 1])[0], atol=1e-4, rtol=1e-4)
        assert together.read_bytes_by_sequence[i] >= alone.read_bytes


def test_a_batch_goes_on_without_its_longest_sequence(model):
    rows, batch, mask = padded([50, 17], "left")
    profile = BudgetProfile.uniform(model, 10, ALONG)
    cache = CompressedCache.prefill(model, profile, batch, mask)
    cache.batch_select_indices([1])
    alone = CompressedCache.prefill(model, profile, rows[1][None])
    later = tokens(1, 3, seed=9)
    going, single = (each.followed_by(later) for each in (cache, alone))
    settings = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    got, expected = (torch.cat(model.generate(**each, **settings).logits) for each in (going, single))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_a_sequence_of_padding_alone_leaves_the_others_as_they_are(model):
    ids, later, profile = tokens(2, 40), tokens(2, 1, seed=1), BudgetProfile.uniform(model, 16, ALONG)
    cache = CompressedCache.prefill(model, profile, ids, torch.tensor([[1], [0]]).expand(-1, 40))
    expected = steps(model, prefilled(model, ids[:1]), later[:1])
    torch.testing.assert_close(steps(model, cache, later)[:1], expected, atol=1e-5, rtol=0)


def test_copies_repeated_chosen_and_merged_sequences_go_on_alike(model):
    ids, later = tokens(2, 40), tokens(2, 6, seed=1)
    cache = prefilled(model, ids)
    steps(model, cache, later[:, :3])
    twin = cache.copy()
    twin.batch_repeat_interleave(2)
    expected = steps(model, cache, later[:, 3:])
    assert torch.allclose(steps(model, twin, later[:, 3:].repeat_interleave(2, 0))[::2], expected, atol=1e-5)
    twin.reorder_cache(torch.tensor([3, 0]))
    swapped = steps(model, twin, later[[1, 0], :1])
    assert torch.allclose(swapped, steps(model, cache, later[:, :1])[[1, 0]], atol=1e-5)
    cache.batch_select_indices(torch.tensor([True, False]))
    assert cache.companion.received.shape[0] == cache.num_rows == 1
    cache.reset()
    assert (cache.companion, cache.companion_bytes) == (None, 0)
    parts = [prefilled(model, row[None]) for row in (ids[0], ids[1, :30])]
    whole = [steps(model, part.copy(), later[i : i + 1]) for i, part in enumerate(parts)]
    merged = CompressedCache.merge(model, parts, 6)
    places = torch.tensor([40, 30])
    with torch.inference_mode():
        got = [
            model(later[:, [i]], cache=merged, position_ids=(places + i)[:, None]).logits for i in range(later.shape[1])
        ]
    torch.testing.assert_close(torch.cat(got, dim=1), torch.cat(whole), atol=1e-4, rtol=1e-4)


def test_given_answers_are_scored_and_questions_read_token_by_token(model):
    ids, question, target = tokens(1, 40), tokens(3, seed=1), tokens(5, seed=2)
    with torch.inference_mode():
        logits = model(ids).logits[:, -1]
        (scored,) = target_log_probs(model, prefilled(model, ids), logits, [40], [target], [question])
        text = torch.cat([question, target])[None]
        each = steps(model, prefilled(model, ids), text)[0, 2:-1].log_softmax(-1)
    assert torch.allclose(scored, each.gather(1, target[:, None])[:, 0], atol=1e-4)


def test_generate_goes_on_greedily_in_a_block_with_beams_and_from_what_was_read(model):
    ids, settings = tokens(2, 40), {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": 999}
    got = model.generate(ids, cache=new(model), **settings)
    texts = greedy(model, prefilled(model, ids), model(ids).logits[:, -1], [40, 40], [6, 6], ())
    assert got[:, 40:].tolist() == texts
    with evolkv.compress(model, BudgetProfile.uniform(model, 16, "smallkv:model=itself")):
        inside = model.generate(ids, **settings)
        model.generate(ids, num_beams=3, **settings)
    assert torch.equal(inside, model.generate(ids, cache=new(model, "smallkv:model=itself"), **settings))
    read, asked = prefilled(model, ids), tokens(2, 3, seed=3)
    texts = [model.generate(**cache.followed_by(asked), **settings) for cache in (read.copy(), read)]
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"vocab_size": 100}, r"another vocabulary than the model \(100 tokens, the model 128\)"),
        ({"family": "mistral"}, "sliding window in every layer"),
        ({"max_position_embeddings": 42}, "companion can read 42"),
    ],
)
def test_companions_that_cannot_read_along_are_refused(model, changes, reason):
    register_companion("unfit", tiny_model(**changes))
    read = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: read.append(1))
    with pytest.raises(UsageError, match=reason):
        CompressedCache.prefill(model, "smallkv:model=unfit", tokens(1, 43), budget=16)
    hook.remove()
    assert not read


def test_what_a_companion_cannot_follow_is_refused_with_the_reason(model, tmp_path):
    ids, cache = tokens(1, 40), prefilled(model, tokens(1, 40))
    for error, reason, act in (
        (UsageError, "needs a small model .* --companion MODEL", lambda: new(model, "smallkv")),
        (UsageError, "which a file does not have", lambda: cache.save(tmp_path / "a.cache")),
        (RunError, "cannot take tokens back", lambda: cache.crop(-1)),
        (UsageError, "decoding takes drafts back", lambda: new(model).activate_past_recording()),
        (UsageError, "evicts once", lambda: CompressedCache(model, ALONG, 16, prefill_chunk=8)),
        (UsageError, "'adakv.*budgets that are fixed", lambda: CompressedCache(model, f"adakv+{ALONG}", 16)),
        (UsageError, "inputs_embeds", lambda: model(inputs_embeds=torch.zeros(1, 1, 64), cache=cache)),
        (UsageError, "a prepared one", lambda: model(ids[:, :1], attention_mask=torch.zeros(1, 1, 1, 1), cache=cache)),
        (UsageError, "'smallkv'.*add --engine naive", lambda: ReplayEngine(model, None, [], get_selector(ALONG))),
        (UsageError, "critical, recent and marginal are all 0", lambda: SmallKV("a", 0, 0, 0)),
        (UsageError, "match is 0", lambda: get_selector("smallkv:match=0")),
    ):
        with pytest.raises(error, match=reason):
            act()
    # What is refused before anything is read leaves the cache as it was.
    assert torch.equal(steps(model, cache, ids[:, :1]), steps(model, prefilled(model, ids), ids[:, :1]))
    cache.release()
    assert not model.config._attn_implementation.startswith("evolkv")


def test_a_call_that_failed_half_way_leaves_no_trace_after_reset(model, companion):
    ids, later, cache = tokens(1, 40), tokens(1, 3, seed=1), prefilled(model, tokens(1, 40))
    expected = steps(model, cache.copy(), later)
    hook = companion.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        steps(model, cache, later)
    hook.remove()
    with pytest.raises(UsageError, match="failed half-way"):
        steps(model, cache, later)
    cache.reset()
    with torch.inference_mode():
        model(ids, cache=cache)
    assert torch.allclose(steps(model, cache, later), expected, atol=1e-5)


# In evaluations and searches.


def test_in_an_evaluation_each_method_reads_along_for_itself(small, small_folder):
    model, tokenizer = small
    spec = f"smallkv:model={small_folder},match=40"
    settings = {"task": "niah:context=200", "samples": 2, "metric": "logprob"}
    rows = evolkv.evaluate(model, tokenizer, methods=["full", spec, "snapkv:window=4"], budgets=[40], **settings)
    full, along, plain = rows
    assert along["kv_bytes"] == pytest.approx(full["kv_bytes"] + along["companion_bytes"])
    # What snapkv holds is what a step needs here.
    assert along["resident_bytes"] == pytest.approx(plain["kv_bytes"])
    assert along["read_bytes"] == pytest.approx(along["resident_bytes"] + along["companion_bytes"])
    table = results_table(rows)
    assert table.columns[-4:] == ["of full", "resident MiB", "companion MiB", "read MiB"]


def test_the_command_line_names_the_companion(small_folder, tmp_path, capsys):
    from evolkv.cli.app import main

    model = str(small_folder)
    words = ["generate", model, "--prompt", "one two three " * 20, "-n", "3", "--method", "smallkv", "--budget", "16"]
    assert main([*words, "--companion", model, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kv_bytes"] == found["full_kv_bytes"] + found["companion_bytes"]
    assert 0 < found["resident_bytes"] < found["full_kv_bytes"]
    assert main([*words, "--companion", model]) == 0
    assert "(resident " in capsys.readouterr().err
    assert main(words) == 2
    assert "needs a small model that reads along" in capsys.readouterr().err
    assert main([*words[:-3], "snapkv", "--budget", "40", "--companion", model]) == 2
    assert "--companion" in capsys.readouterr().err


def test_a_comparison_names_the_companion_in_its_rows(small_folder, capsys):
    from evolkv.cli.app import main

    model = str(small_folder)
    words = ["eval", model, "-t", "niah:context=200", "-m", "full", "smallkv:match=40", "-b", "40", "-n", "1"]
    assert main([*words, "--companion", model, "--metric", "logprob", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"] for row in rows] == ["full", SmallKV(model=model, match=40).spec]


@pytest.mark.slow
def test_a_search_has_each_candidate_read_along(small_folder, tmp_path):
    from evolkv.cli.app import main

    model, out = str(small_folder), tmp_path / "p.json"
    words = ["search", model, "-t", "niah:context=200", "-b", "40", "-s", "smallkv:match=40", "-o", str(out)]
    words += ["--train", "1", "--val", "1", "--max-evals", "3", "--granularity", "layer", "--storage", "none"]
    assert main([*words, "--companion", model]) == 2
    assert main([*words, "--companion", model, "--engine", "naive"]) == 0
    profile = BudgetProfile.load(out)
    assert profile.selector == SmallKV(model=model, match=40).to_dict()
    assert profile.mean_budget == 40
