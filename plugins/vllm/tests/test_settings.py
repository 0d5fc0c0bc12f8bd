"""What users ask for, and what they are told when it cannot be."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest

from evolkv.errors import RunError, UsageError
from evolkv.selectors import get_selector
from evolkv_vllm import checkpoint, checks, hooks, plan
from evolkv_vllm.settings import Settings
from tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def profile(model, tmp_path_factory):
    """A profile of the tiny model: the file, made as a search makes it, from the model with its weights."""
    from transformers import AutoModelForCausalLM

    from evolkv import BudgetProfile

    path = tmp_path_factory.mktemp("profiles") / "profile.json"
    loaded = AutoModelForCausalLM.from_pretrained(model)
    BudgetProfile.from_budgets(loaded, [40, 50, 60, 40, 50, 60], "snapkv:window=8").save(path)
    return path


def config_of(model, evolkv=None, **settings):
    """vLLM's configuration, as a server makes it."""
    from vllm.engine.arg_utils import EngineArgs

    additional = {} if evolkv is None else {"evolkv": evolkv}
    defaults = {"dtype": "float32", "block_size": 32, "max_model_len": 512, "skip_tokenizer_init": True}
    arguments = EngineArgs(model=str(model), additional_config=additional, **{**defaults, **settings})
    return arguments.create_engine_config()


def kept(rule, tokens):
    """Entries that each layer, or head, keeps of a prompt: rounded to blocks of one token, so not at all."""
    return (tokens - rule.evicts(tokens, 1))[list(rule.classes)]


def test_nothing_changes_without_a_profile(model, monkeypatch):
    monkeypatch.delenv("EVOLKV_PROFILE", raising=False)
    config = config_of(model)
    assert plan.rule_of(config) is None
    assert config.model_config.rswa_window is None


@pytest.mark.parametrize("way", ["variable", "configuration"])
def test_profile_by_variable_or_configuration(way, model, profile, monkeypatch):
    if way == "variable":
        monkeypatch.setenv("EVOLKV_PROFILE", str(profile))
    config = config_of(model, None if way == "variable" else {"profile": str(profile)})
    rule = plan.rule_of(config)
    assert rule.selector == get_selector("snapkv:window=8")
    assert kept(rule, 100).tolist() == [40, 50, 60, 40, 50, 60]
    assert kept(rule, 45).tolist() == [40, 45, 45, 40, 45, 45]
    assert rule.classes == (0, 1, 2, 0, 1, 2)
    # What travels with the configuration is JSON, which vLLM hashes.
    assert json.loads(json.dumps(config.additional_config))[plan.RULE] == rule.text


def test_configuration_goes_before_the_variable(model, profile, monkeypatch):
    monkeypatch.setenv("EVOLKV_PROFILE", "/no/such/profile.json")
    assert plan.rule_of(config_of(model, {"profile": str(profile)})) is not None


def test_method_and_budget(model):
    rule = plan.rule_of(config_of(model, {"method": "pyramidkv", "budget": 64}))
    budgets = kept(rule, 500)
    assert budgets.sum() == 6 * 64
    assert (budgets[:-1] >= budgets[1:]).all()
    assert budgets[0] > budgets[-1]
    # What the lowest layers cannot hold of a short prompt goes to the others, as where a method is evaluated.
    assert budgets[0] > 80
    assert kept(rule, 80).sum() == 6 * 64


@pytest.mark.parametrize("method", ["snapkv", "pyramidkv"])
def test_share_of_each_prompt(method, model):
    rule = plan.rule_of(config_of(model, {"method": method, "budget": "25%"}))
    for tokens in (200, 400):
        assert kept(rule, tokens).sum() == 6 * tokens // 4


def test_profile_carried_to_another_budget_or_a_share(model, profile):
    assert kept(plan.rule_of(config_of(model, {"profile": str(profile), "budget": 100})), 500).sum() == 600
    shares = plan.rule_of(config_of(model, {"profile": str(profile), "budget": "20%"}))
    assert kept(shares, 300).sum() == 6 * 60
    assert len(set(shares.classes)) == 3


def test_exact_budgets_are_not_rounded(model, profile):
    for exact, held in ((False, [57, 57, 89]), (True, [40, 50, 60])):
        rule = plan.rule_of(config_of(model, {"profile": str(profile), "exact": exact}))
        assert (185 - rule.evicts(185, 32)).tolist() == held


def test_window_of_a_layer_stays_vllms(tmp_path):
    folder = write_tiny_model(tmp_path / "windows", window=64)
    rule = plan.rule_of(config_of(folder, {"method": "snapkv", "budget": 40}))
    dropped = rule.evicts(400, 32)[list(rule.classes)] // 32
    assert dropped[::2].tolist() == [11, 11, 11]
    assert dropped[1::2].tolist() == [0, 0, 0]


@pytest.mark.parametrize(("budget", "warned"), [(450, False), (500, True), (600, True), ("50%", False)])
def test_settings_that_change_nothing_are_said(budget, warned, model, monkeypatch):
    said = []
    monkeypatch.setattr(plan.logger, "warning", lambda text, *args: said.append(text % args))
    config_of(model, {"method": "snapkv", "budget": budget})
    assert [("changes nothing" in each, "512 tokens" in each) for each in said] == [(True, True)] * warned


def test_windows_everywhere_are_said(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(plan.logger, "warning", lambda text, *args: said.append(text % args))
    from transformers import MistralConfig, MistralForCausalLM

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32, "vocab_size": 258}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    MistralForCausalLM(MistralConfig(**shape, **heads, sliding_window=64)).save_pretrained(tmp_path)
    config_of(tmp_path, {"method": "snapkv", "budget": 40})
    assert len(said) == 1
    assert "sliding window" in said[0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("profile.json", "expected a mapping such as"),
        ({}, "names neither a profile nor a method"),
        ({"profil": "p.json"}, "has no setting 'profil'"),
        ({"rule": "{}"}, "has no setting 'rule'"),
        ({"profile": 3}, r"\['profile'\] is 3; expected a text"),
        ({"method": "snapkv", "budget": True}, r"\['budget'\] is True"),
        ({"method": "snapkv", "budget": 1.5}, r"\['budget'\] is 1.5"),
        ({"method": "snapkv", "budget": 64, "exact": "yes"}, r"\['exact'\] is 'yes'; expected true or false"),
    ],
)
def test_settings_that_make_no_sense(given, message):
    with pytest.raises(UsageError, match=message):
        Settings.read({"evolkv": given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"profile": "/no/such.json"}, "no such"),
        ({"method": "snapkv"}, "needs a budget"),
        ({"method": "snapkv", "budget": "0%"}, "above 0%"),
        ({"method": "snapkv", "budget": 8}, "always keeps 32"),
        ({"method": "nothing", "budget": 8}, "nothing"),
        ({"rule": "x"}, "has no setting 'rule'"),
        ({"method": "full"}, "evicts nothing"),
        ({"method": "cake+snapkv", "budget": 64}, "for each prompt anew"),
        ({"method": "h2o", "budget": 64}, "looks at every query"),
        ({"method": "kvzip", "budget": 64}, "read the whole prompt a second time"),
        ({"method": "expected_attention", "budget": 64}, "looks at every query"),
    ],
)
def test_what_cannot_run_is_refused_before_weights_are_read(given, message, model):
    with pytest.raises(RunError, match=message) as refused:
        config_of(model, given)
    assert "\n" not in str(refused.value)


def test_profile_of_another_model_is_refused(model, profile, tmp_path):
    content = json.loads(profile.read_text())
    content["model"]["fingerprint"] = "0" * 16
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"was made for .*\(fingerprint 0{16}\), but the model is"):
        config_of(model, {"profile": str(other)})


def test_weights_of_the_hub_are_looked_for_where_vllm_puts_them(tmp_path):
    model = SimpleNamespace(model="org/name", revision=None)
    assert checkpoint.weights_folder(model, str(tmp_path)) is None
    folder = tmp_path / "models--org--name"
    for name, text in (("refs/main", "abc"), ("snapshots/abc/model.safetensors", "")):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text)
    assert checkpoint.weights_folder(model, str(tmp_path)) == folder / "snapshots" / "abc"


def test_a_model_that_is_not_downloaded_is_compared_by_its_shape(model, profile, monkeypatch):
    asked, said = [], []
    monkeypatch.setattr(checkpoint, "weights_folder", lambda model, cache: asked.append(cache))
    monkeypatch.setattr(plan.logger, "warning", lambda text, *args: said.append(text % args))
    rule = plan.rule_of(config_of(model, {"profile": str(profile)}, download_dir="/downloads"))
    assert kept(rule, 100).tolist() == [40, 50, 60, 40, 50, 60]
    assert asked == ["/downloads"]
    assert "the next start looks again" in said[0]


def test_a_profile_for_prompts_that_are_cut_earlier_is_said(model, profile, tmp_path, monkeypatch):
    said, path = [], tmp_path / "profile.json"
    monkeypatch.setattr(plan.logger, "warning", lambda text, *args: said.append(text % args))
    content = json.loads(profile.read_text())
    content["search"] = {"protocol": "agnostic", "prefill_chunk": 64}
    path.write_text(json.dumps(content))
    assert plan.rule_of(config_of(model, {"profile": str(path)})) is not None
    assert "evolved with --protocol agnostic --prefill-chunk 64, but vLLM" in said[0]
    assert said[0].endswith("without --protocol and --prefill-chunk")


@pytest.fixture
def by_head(profile, tmp_path):
    """A profile of the tiny model with budgets by head."""
    content = json.loads(profile.read_text())
    content["granularity"] = "head"
    content["budgets"] = [[row[0] - 5, row[0] + 5] for row in content["budgets"]]
    path = tmp_path / "heads.json"
    path.write_text(json.dumps(content))
    return {"profile": str(path)}


def test_budgets_by_head(model, by_head):
    rule = plan.rule_of(config_of(model, by_head))
    assert (rule.num_layers, rule.heads) == (6, 2)
    assert kept(rule, 100).tolist() == [35, 45, 45, 55, 55, 65] * 2
    assert rule.classes == (0, 1, 1, 2, 2, 3) * 2
    shares = plan.rule_of(config_of(model, {**by_head, "budget": "20%"}))
    assert kept(shares, 300).sum() == 6 * 2 * 60
    assert shares.classes == rule.classes


def test_heads_with_equal_budgets_share_their_layers_blocks(model, profile, by_head):
    content = json.loads(profile.read_text())
    content["granularity"] = "head"
    with open(by_head["profile"], "w") as file:
        json.dump(content, file)
    assert plan.rule_of(config_of(model, by_head)).heads == 1


def test_budgets_by_head_and_tensor_parallelism_are_refused(model, by_head, monkeypatch):
    config = config_of(model)
    config.additional_config = {"evolkv": by_head}
    config.parallel_config.tensor_parallel_size = 2
    with pytest.raises(RunError, match=r"budgets by head and tensor parallelism.*--granularity layer"):
        plan.configure(config)


def test_budgets_by_head_and_a_hybrid_model_are_refused(model):
    changed = stand_in(config_of(model), model_config={"is_hybrid": True})
    checks.check_config(changed, get_selector("snapkv"), classes=2)
    with pytest.raises(UsageError, match=r"budgets by head and a model with state-space.*--granularity layer"):
        checks.check_config(changed, get_selector("snapkv"), classes=2, by_head=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "of another type than the model's"),
        ({"kv_cache_dtype": "bfloat16"}, "of another type than the model's"),
        ({"disable_hybrid_kv_cache_manager": True}, "one block table for all layers"),
    ],
)
def test_features_that_do_not_go_together(settings, message, model, profile):
    with pytest.raises(RunError, match=message):
        config_of(model, {"profile": str(profile)}, **settings)


def stand_in(config, **changes):
    """A configuration with some fields changed: what this machine has no hardware or model for."""
    parts = {name: vars(getattr(config, name)) for name in ("model_config", "cache_config", "parallel_config")}
    scheduler = SimpleNamespace(disable_hybrid_kv_cache_manager=False)
    made = {"kv_transfer_config": None, "speculative_config": None, "scheduler_config": scheduler}
    base = {"runner_type": "generate", "is_encoder_decoder": False, "use_mla": False, "is_mm_prefix_lm": False}
    base["is_hybrid"] = False
    arch = SimpleNamespace(rswa_window=None)
    for name, fields in parts.items():
        own = {**fields, **(base | {"model_arch_config": arch} if name == "model_config" else {})}
        made[name] = SimpleNamespace(**{**own, **changes.pop(name, {})})
    return SimpleNamespace(**{**made, **changes})


@pytest.mark.parametrize(
    ("changes", "selector", "message"),
    [
        ({"model_config": {"use_mla": True}}, "snapkv", "latent attention"),
        ({"model_config": {"is_encoder_decoder": True}}, "snapkv", "encoder-decoder"),
        ({"model_config": {"runner_type": "pooling"}}, "snapkv", "generate text"),
        ({"model_config": {"is_mm_prefix_lm": True}}, "snapkv", "both directions"),
        ({"model_config": {"model_arch_config": SimpleNamespace(rswa_window=8)}}, "snapkv", "already evicts"),
        ({"kv_transfer_config": object()}, "snapkv", "KV connector"),
        ({"cache_config": {"kv_offloading_size": 1.0}}, "snapkv", "KV connector"),
        ({"cache_config": {"kv_sharing_fast_prefill": True}}, "snapkv", "share keys and values"),
        ({"parallel_config": {"decode_context_parallel_size": 2}}, "snapkv", "context parallelism"),
        ({"parallel_config": {"prefill_context_parallel_size": 2}}, "snapkv", "context parallelism"),
        ({"parallel_config": {"tensor_parallel_size": 2}}, "tova", "tensor parallelism"),
        ({"parallel_config": {"pipeline_parallel_size": 2}}, "chunkkv", "pipeline parallelism"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "snapkv", "speculative decoding by 'eagle'"),
    ],
)
def test_more_features_that_do_not_go_together(changes, selector, message, model):
    config = config_of(model)
    checks.check_config(stand_in(config), get_selector(selector), classes=2)
    with pytest.raises(UsageError, match=message):
        checks.check_config(stand_in(config, **changes), get_selector(selector), classes=2)


def test_prompts_that_grow_are_refused_one_by_one():
    """A client error of vLLM's, so that the others go on."""
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.input_processor import InputProcessor

    config = SimpleNamespace(additional_config={plan.RULE: "{}"})
    processor = SimpleNamespace(vllm_config=config)
    with pytest.raises(VLLMValidationError, match="sessions whose prompt grows"):
        InputProcessor.process_inputs(processor, "a", "prompt", SamplingParams(), (), resumable=True)


def test_layers_that_share_keys_and_values_are_refused():
    """vLLM asks only those with keys and values for their budgets."""
    from vllm.model_executor.layers.attention.attention import Attention

    layers = {}
    for number, target in enumerate([None, None, "model.layers.1.attn"]):
        layer = layers[f"model.layers.{number}.attn"] = Attention.__new__(Attention)
        layer.kv_sharing_target_layer_name = target
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
    with pytest.raises(UsageError, match=r"share keys and values \(model.layers.2.attn\)"):
        hooks._layer_number("model.layers.0.attn", config, 3)
    layers.popitem()
    assert hooks._layer_number("model.layers.1.attn", config, 2) == 1


@pytest.mark.parametrize(
    ("version", "known"),
    [("0.31.2", False), ("0.32.0+cpu", True), ("0.33.1", True), ("0.34.0", False), ("1.0.0", False)],
)
def test_versions(version, known, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "__version__", version)
    if known:
        assert checks.check_version() is None
    else:
        with pytest.raises(RunError, match=f"works with vLLM 0.32 to 0.33, but {version} is installed"):
            checks.check_version()


def test_vllm_has_every_symbol():
    assert hooks.check_symbols() is None


@pytest.mark.parametrize("symbol", hooks.SYMBOLS, ids=lambda symbol: symbol[1] if isinstance(symbol, tuple) else "")
def test_vllm_without_a_symbol_is_refused_in_one_line(symbol, monkeypatch):
    import importlib

    module, name, _ = symbol
    *path, last = name.split(".")
    owner = importlib.import_module(module)
    for part in path:
        owner = getattr(owner, part)
    for each in getattr(owner, "__mro__", [owner])[:-1] or [owner]:
        if last in vars(each):
            monkeypatch.delattr(each, last)
    with pytest.raises(RunError, match=r"is gone|takes no") as refused:
        hooks.check_symbols()
    assert last in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("symbol", [each for each in hooks.SYMBOLS if each[2]], ids=lambda symbol: symbol[1])
def test_vllm_with_other_arguments_is_refused_in_one_line(symbol, monkeypatch):
    module, name, arguments = symbol
    monkeypatch.setattr(hooks, "SYMBOLS", ((module, name, (*arguments, "of_another_version")),))
    with pytest.raises(RunError, match="takes no of_another_version"):
        hooks.check_symbols()


def test_unknown_vllm_refuses_profiles_and_serves_without(model, profile, tmp_path):
    """In a process of its own, because hooks are installed once."""
    import subprocess
    import sys

    code = """
import sys
import vllm
vllm.__version__ = "0.99.0"
from vllm.engine.arg_utils import EngineArgs
def start(**settings):
    EngineArgs(model=sys.argv[1], dtype="float32", skip_tokenizer_init=True, **settings).create_engine_config()
start()
try:
    start(additional_config={"evolkv": {"profile": sys.argv[2]}})
except RuntimeError as error:
    print(error)
"""
    environment = {key: value for key, value in os.environ.items() if key != "EVOLKV_PROFILE"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), str(profile)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "works with vLLM 0.32 to 0.33, but 0.99.0 is installed" in done.stdout
