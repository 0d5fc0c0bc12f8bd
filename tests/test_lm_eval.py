"""The model `evolkv` of lm-evaluation-harness, against the harness's own `hf` and against a hand-made computation."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing

from evolkv import BudgetProfile, CompressedCache, load_model
from evolkv.errors import ModelError, ProfileError, UsageError
from evolkv.integrations import lm_eval_command
from evolkv.models import ALIASES

# They run where the harness is installed: make lm-eval test-slow.
pytestmark = pytest.mark.slow

SMALL = {"method": "snapkv", "budget": 36}
COVERING = {"method": "snapkv", "budget": 512}
FOLDER = Path(__file__).parent / "fixtures" / "lm_eval"
GENERATE, CHOOSE = "safe_generate", "safe_choice"


@pytest.fixture(scope="module")
def harness():
    """The parts of the harness that tests use; tests without it are skipped."""
    pytest.importorskip("lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from evolkv.integrations.lm_eval import EvolKVLM

    def evaluate(model, tasks, **kwargs):
        manager = TaskManager(include_defaults=False)
        return simple_evaluate(
            model=model, tasks=copy.deepcopy(tasks), task_manager=manager, bootstrap_iters=0, **kwargs
        )

    def score(lm, pairs):
        requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
        return lm.loglikelihood(requests, disable_tqdm=True)

    return SimpleNamespace(evaluate=evaluate, score=score, HFLM=HFLM, EvolKVLM=EvolKVLM, Instance=Instance)


@pytest.fixture(scope="module")
def make(harness, smollm2):
    """Makes the model with given settings."""
    model, tokenizer = smollm2
    return lambda **settings: harness.EvolKVLM(model, **{"tokenizer": tokenizer, "batch_size": 4, **settings})


@pytest.fixture(scope="module")
def rows():
    """Ten texts of different lengths, each with a number in it and two wrong ones."""
    return [json.loads(line) for line in (FOLDER / "rows.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """The rows as a generate_until task and as a multiple_choice task."""
    data = {"data_files": {"test": str(FOLDER / "rows.jsonl")}, "cache_dir": str(tmp_path_factory.mktemp("cache"))}
    configs = [yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8")) for name in (GENERATE, CHOOSE)]
    return [{**config, "dataset_kwargs": data} for config in configs]


@pytest.fixture(scope="module")
def reference(harness, smollm2, tasks):
    """Results of the harness's own model on the same weights."""
    model, tokenizer = smollm2
    return harness.evaluate(harness.HFLM(model, tokenizer=tokenizer, batch_size=4), tasks)


@pytest.fixture(scope="module")
def compressed(harness, make, tasks):
    """Results under a small budget, continuations and prompts in batches of four."""
    return harness.evaluate(make(**SMALL), tasks)


@pytest.fixture(scope="module")
def pairs(rows):
    """Contexts and continuations of several tokens; two contexts with two continuations each, one with one."""
    contexts = [row["text"] for row in rows[:3]]
    endings = [" The code is easy to remember.", " Nobody knew it."]
    return [(contexts[0], endings[0]), (contexts[1], endings[0]), (contexts[0], endings[1]), (contexts[2], endings[0])]


def texts(results):
    return [sample["resps"] for sample in results["samples"][GENERATE]]


def log_likelihoods(results):
    return torch.tensor([[pair[0][0] for pair in sample["resps"]] for sample in results["samples"][CHOOSE]])


def scores(results):
    return results["results"][GENERATE]["exact_match,strip"], results["results"][CHOOSE]["acc,none"]


@pytest.mark.model
def test_without_profile_results_are_those_of_hf(harness, make, tasks, reference):
    results = harness.evaluate(make(), tasks)
    assert scores(results) == scores(reference)
    assert scores(results)[1] > 0.5
    assert texts(results) == texts(reference)
    assert torch.equal(log_likelihoods(results), log_likelihoods(reference))


@pytest.mark.model
def test_an_eos_that_the_tokenizer_appends_changes_nothing(harness, make, smollm2, tasks, compressed):
    appending = copy.deepcopy(smollm2[1])
    appending.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|im_end|>", special_tokens=[("<|im_end|>", appending.eos_token_id)]
    )
    results = harness.evaluate(make(**SMALL, tokenizer=appending), tasks)
    assert texts(results) == texts(compressed)
    assert torch.equal(log_likelihoods(results), log_likelihoods(compressed))


@pytest.mark.model
def test_registered_name_takes_an_alias_and_the_arguments_of_hf(harness, tasks, reference):
    arguments = {"pretrained": "smollm2-135m", "dtype": "float32", "max_length": 1024, "method": "full"}
    results = harness.evaluate("evolkv", tasks[1:], model_args=arguments, batch_size=4, device="cpu", limit=2)
    assert results["max_length"] == 1024
    torch.testing.assert_close(log_likelihoods(results), log_likelihoods(reference)[:2], rtol=0, atol=1e-4)


@pytest.mark.model
def test_budget_covering_the_prompt_changes_nothing(harness, make, tasks, reference):
    results = harness.evaluate(make(**COVERING), tasks)
    assert scores(results) == scores(reference)
    assert texts(results) == texts(reference)
    torch.testing.assert_close(log_likelihoods(results), log_likelihoods(reference), rtol=0, atol=1e-4)


@pytest.mark.model
def test_small_budget_gives_other_answers_and_says_so_in_the_results(compressed, reference):
    difference = (log_likelihoods(compressed) - log_likelihoods(reference)).abs()
    assert difference.max() > 1.0
    assert texts(compressed) != texts(reference)


@pytest.mark.model
def test_batch_size_changes_nothing(harness, make, tasks, compressed):
    results = harness.evaluate(make(**SMALL, batch_size=1), tasks)
    assert texts(results) == texts(compressed)
    torch.testing.assert_close(log_likelihoods(results), log_likelihoods(compressed), rtol=0, atol=1e-3)


@pytest.mark.model
def test_loglikelihood_is_that_of_tokens_fed_one_by_one_to_a_compressed_cache(harness, make, smollm2, pairs):
    model, tokenizer = smollm2
    profile = BudgetProfile.uniform(model, 34, selector="streaming_llm")
    answers = harness.score(make(profile=profile), pairs)
    for (context, continuation), (total, greedy) in zip(pairs, answers, strict=True):
        prompt = tokenizer(context, return_tensors="pt").input_ids
        cache = CompressedCache(model, profile)
        expected, best = 0.0, True
        with torch.inference_mode():
            logits = model(prompt, cache=cache, use_cache=True).logits[0, -1]
            for token in tokenizer(continuation).input_ids:
                expected += float(logits.log_softmax(-1)[token])
                best = best and int(logits.argmax()) == token
                position = torch.tensor([[cache.get_seq_length()]])
                logits = model(torch.tensor([[token]]), cache=cache, position_ids=position).logits[0, -1]
        assert total == pytest.approx(expected, abs=1e-3)
        assert greedy == best


@pytest.mark.model
def test_continuation_that_greedy_decoding_gives_is_marked_greedy(harness, make, smollm2, rows):
    model, tokenizer = smollm2
    profile = BudgetProfile.uniform(model, 36)
    prompt = tokenizer(rows[0]["text"], return_tensors="pt")
    cache = CompressedCache(model, profile)
    generated = model.generate(**prompt, cache=cache, max_new_tokens=4, do_sample=False)
    own = tokenizer.decode(generated[0, prompt.input_ids.shape[1] :])
    answers = harness.score(make(profile=profile), [(rows[0]["text"], own), (rows[0]["text"], own + " yellow")])
    assert [greedy for _, greedy in answers] == [True, False]


@pytest.mark.model
def test_context_of_several_continuations_is_prefilled_once(harness, make, smollm2, pairs):
    model, tokenizer = smollm2
    lm = make(**SMALL, batch_size=1)
    shapes = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append((args[0] if args else kwargs["input_ids"]).shape), with_kwargs=True
    )
    try:
        harness.score(lm, pairs)
    finally:
        handle.remove()
    lengths = sorted((len(tokenizer(context).input_ids) for context in {context for context, _ in pairs}), reverse=True)
    assert [tuple(shape) for shape in shapes[::2]] == [(1, length) for length in lengths]
    assert sorted(shape[0] for shape in shapes[1::2]) == [1, 1, 2]


@pytest.mark.model
def test_contexts_are_cut_from_the_left_like_those_of_hf(harness, make, smollm2, pairs, caplog):
    model, tokenizer = smollm2
    expected = harness.score(harness.HFLM(model, tokenizer=tokenizer, batch_size=4, max_length=24), pairs)
    answers = harness.score(make(**COVERING, max_length=24), pairs)
    assert [total for total, _ in answers] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert "4 of 4 contexts are cut to the model's 24 tokens" in caplog.text


@pytest.mark.model
def test_empty_context_is_scored_after_the_prefix_token(harness, make, smollm2):
    model, tokenizer = smollm2
    pair = [("", "The river was low that summer.")]
    expected = harness.score(harness.HFLM(model, tokenizer=tokenizer), pair)
    assert harness.score(make(**SMALL), pair)[0][0] == pytest.approx(expected[0][0], abs=1e-4)


@pytest.mark.model
def test_answers_are_stored_for_the_harness_cache(harness, make, pairs):
    stored = {}
    lm = make(**SMALL)
    lm.set_cache_hook(SimpleNamespace(add_partial=lambda kind, request, answer: stored.update({request: answer})))
    answers = harness.score(lm, pairs)
    assert stored == dict(zip(pairs, answers, strict=True))


@pytest.mark.model
def test_profile_file_is_expanded_to_a_budget_and_named_in_the_results(make, smollm2, tmp_path):
    model, _ = smollm2
    path = tmp_path / "profile.json"
    BudgetProfile.uniform(model, 64).save(path)
    assert make(profile=str(path)).get_model_info()["evolkv"]["mean_budget"] == 64
    lm = make(profile=str(path), budget=48)
    told = lm.get_model_info()["evolkv"]
    assert (told["method"], told["mean_budget"], told["selector"]["name"]) == (str(path), 48, "snapkv")
    assert "evolkv" not in make().get_model_info()


@pytest.mark.model
def test_methods_that_go_by_the_prompt_run_too(harness, make, pairs):
    lm = make(method="adakv+snapkv", budget=36)
    assert lm.get_model_info()["evolkv"]["mean_budget"] == 36
    assert harness.score(lm, pairs) != harness.score(make(**SMALL), pairs)


@pytest.mark.model
def test_gguf_file_is_converted_like_a_model_of_load_model(harness, smollm2, pairs):
    (path,) = ALIASES["smollm2-135m"].paths("smollm2-135m")
    lm = harness.EvolKVLM(str(path), device="cpu")
    loaded, _ = load_model(path, dtype="float32", device="cpu")
    assert lm.model.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(lm.model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.model
@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"profile": "nowhere.json"}, ProfileError, "nowhere.json: no such file"),
        ({"method": "snapkw", "budget": 64}, UsageError, "snapkv"),
        ({"method": "snapkv"}, UsageError, "method 'snapkv' needs a budget; add a budget, such as 128"),
        ({"method": "snapkv", "budget": 8}, UsageError, "the budget is 8, but snapkv always keeps"),
        ({"method": "snapkv", "budget": 64.5}, UsageError, "the budget is 64.5; expected a whole number"),
        ({"budget": 64}, UsageError, "add a profile, or a method such as snapkv"),
        ({"method": "snapkv", "budget": 64, "profile": "p.json"}, UsageError, "both given"),
    ],
)
def test_bad_settings_get_one_clear_line(make, settings, error, message):
    with pytest.raises(error) as raised:
        make(**settings)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.model
def test_profile_of_another_model_is_refused(make, smollm2, tmp_path):
    profile = BudgetProfile.uniform(smollm2[0], 64).to_dict()
    profile["model"] = {**profile["model"], "name": "other", "fingerprint": "0" * 16}
    path = tmp_path / "other.json"
    path.write_text(json.dumps(profile), "utf-8")
    with pytest.raises(ProfileError, match="the profile was made for other"):
        make(profile=str(path))


@pytest.mark.model
def test_rolling_loglikelihood_is_refused_under_a_profile_only(harness, make, rows):
    requests = [harness.Instance("loglikelihood_rolling", {}, (rows[0]["text"],), 0)]
    with pytest.raises(UsageError, match="no prompt that could be compressed"):
        make(**SMALL).loglikelihood_rolling(requests)
    assert make().loglikelihood_rolling(requests)[0] < 0


@pytest.mark.model
def test_continuation_without_tokens_is_refused(harness, make, rows):
    with pytest.raises(UsageError, match="a continuation has 0 tokens"):
        harness.score(make(**SMALL), [(rows[0]["text"], "")])


def test_missing_gguf_file_is_named(harness):
    with pytest.raises(ModelError, match=r"no such model file: 'nowhere\.gguf'"):
        harness.EvolKVLM("nowhere.gguf")


def test_command_says_one_line_about_bad_input(harness, monkeypatch, tasks, tmp_path, capsys):
    path = tmp_path / "task.yaml"
    path.write_text(json.dumps(tasks[1]), "utf-8")
    arguments = ["--model", "evolkv", "--model_args", "pretrained=smollm2-135m,profile=nowhere.json"]
    monkeypatch.setattr(sys, "argv", ["evolkv-lm-eval", *arguments, "--tasks", str(path)])
    assert lm_eval_command.main() == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert errors == [
        "evolkv: error: nowhere.json: no such file; expected a profile made by `evolkv search` or BudgetProfile.save"
    ]


@pytest.mark.model
def test_command_prints_the_table_of_the_harness(harness, monkeypatch, tasks, tmp_path, capsys):
    path = tmp_path / "task.yaml"
    path.write_text(json.dumps(tasks[1]), "utf-8")
    arguments = ["--model", "evolkv", "--model_args", "pretrained=smollm2-135m,method=pyramidkv,budget=40"]
    out = tmp_path / "out.json"
    options = ["--tasks", str(path), "--limit", "2", "--device", "cpu", "--output_path", str(out)]
    monkeypatch.setattr(sys, "argv", ["evolkv-lm-eval", *arguments, *options])
    assert lm_eval_command.main() == 0
    assert f"|{CHOOSE}|" in capsys.readouterr().out
    (written,) = tmp_path.glob("out*.json")
    assert json.loads(written.read_text("utf-8"))["config"]["evolkv"]["method"] == "pyramidkv"


def test_without_the_harness_the_command_says_how_to_install_it(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "evolkv.integrations.lm_eval", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert lm_eval_command.main() == 2
    assert "install it with: pip install 'evolkv[lm-eval]'" in capsys.readouterr().err
