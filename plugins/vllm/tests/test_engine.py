"""The engine as a whole, on a tiny model: what serving adds to one prompt after the other."""

from __future__ import annotations

import functools
import random
from pathlib import Path

import pytest
import torch

from conftest import answers, engine, pool, scheduler


def random_prompts(count, longest, seed=0):
    generator = random.Random(seed)
    return [[generator.randrange(256) for _ in range(generator.randrange(20, longest))] for _ in range(count)]


@pytest.fixture(scope="module", params=["snapkv", "heads"])
def profile(tiny, request):
    """Budgets by layer, and by head."""
    return {"profile": str(Path(tiny["folder"], f"tiny-{request.param}.json"))}


@pytest.fixture
def scarce(profile):
    """Blocks of a pool in which some requests have to wait; each layer or head has a table of its own."""
    return 260 if "heads" in profile["profile"] else 130


@pytest.fixture(scope="module")
def prompts():
    return random_prompts(40, 300)


@pytest.fixture(scope="module")
def undisturbed(tiny, profile, prompts):
    """Answers of 60 tokens, each request on its own; and the free blocks before and after."""
    with engine(tiny["model"], profile, max_num_seqs=1, max_num_batched_tokens=512) as llm:
        return answers(llm, prompts, 60)


def test_requests_side_by_side_answer_as_alone(tiny, profile, prompts, undisturbed):
    # vLLM for CPUs never schedules asynchronously; test_blocks has steps in flight.
    for settings in ({}, {"max_num_batched_tokens": 64}):
        with engine(tiny["model"], profile, **settings) as llm:
            free = pool(llm).get_num_free_blocks()
            assert answers(llm, prompts, 60) == undisturbed
            assert pool(llm).get_num_free_blocks() == free


def test_metadata_of_the_step_before_is_brought_up_to_date(tiny, profile, prompts, monkeypatch):
    from vllm import _custom_ops as ops

    from evolkv_vllm.groups import AllGroups

    plain, planned, renewed = AllGroups.build, ops.cpu_attn_get_scheduler_metadata, 0
    plans = []

    @functools.wraps(planned)
    def plan(**arguments):
        plans.append(readable(arguments))
        return planned(**arguments)

    def readable(values):
        return {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in values.items()}

    def made(self):
        # The plan of the kernel's work is an opaque buffer with addresses in it, so what it is made of is compared.
        return [readable(vars(each) | {"scheduler_metadata": None}) for each in self._built], plans

    def compared(self, common):
        nonlocal renewed, plans
        before, plans = self._built, []
        first = plain(self, common)
        if self._built is before:
            renewed += 1
            again, plans, self._decoded = made(self), [], ()
            plain(self, common)
            assert made(self) == again
        return first

    monkeypatch.setattr(ops, "cpu_attn_get_scheduler_metadata", plan)
    monkeypatch.setattr(AllGroups, "build", compared)
    with engine(tiny["model"], profile) as llm:
        answers(llm, prompts, 20)
    assert renewed > 20


def test_a_traced_model_answers_as_an_eager_one(tiny, profile, prompts, undisturbed, monkeypatch):
    # Traced by PyTorch, and run as it is: compiling takes a minute.
    monkeypatch.setenv("VLLM_CPU_CI_ENV", "1")
    with engine(tiny["model"], profile, enforce_eager=False, max_num_batched_tokens=64) as llm:
        assert answers(llm, prompts[:10], 60) == undisturbed[:10]


def test_preempted_requests_answer_as_if_they_had_not_been(tiny, profile, prompts, undisturbed, scarce, monkeypatch):
    from vllm.v1.core.sched.scheduler import Scheduler

    preempted, plain = [], Scheduler._preempt_request

    def noted(self, request, *args, **kwargs):
        preempted.append((request.request_id, request.num_output_tokens))
        return plain(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    for caching in (False, True):
        preempted.clear()
        settings = {"num_gpu_blocks_override": scarce, "enable_prefix_caching": caching}
        with engine(tiny["model"], profile, **settings) as llm:
            free = pool(llm).get_num_free_blocks()
            assert answers(llm, prompts, 60) == undisturbed
            assert pool(llm).get_num_free_blocks() == free
        assert any(written for _, written in preempted), "the pool was too large for this test"


def test_exact_budgets_survive_small_chunks_and_preemption(tiny, profile, prompts, scarce):
    exact = {**profile, "exact": True}
    with engine(tiny["model"], exact, max_num_seqs=1, max_num_batched_tokens=512) as llm:
        alone = answers(llm, prompts, 60)
    settings = {"num_gpu_blocks_override": scarce, "enable_prefix_caching": True, "max_num_batched_tokens": 64}
    with engine(tiny["model"], exact, **settings) as llm:
        assert answers(llm, prompts, 60) == alone


def test_prefix_caching_changes_no_answer(tiny, profile):
    from vllm import SamplingParams

    # Long ones, ones that begin like them, and the same again.
    long = random_prompts(6, 400, seed=1)
    prompts = [*long, *(prompt[: len(prompt) // 2] for prompt in long), *long]
    with engine(tiny["model"], profile) as llm:
        expected = answers(llm, prompts, 20)
    with engine(tiny["model"], profile, enable_prefix_caching=True) as llm:
        parameters = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False)
        found = 0
        for prompt, tokens in zip(prompts, expected, strict=True):
            (output,) = llm.generate([{"prompt_token_ids": prompt}], parameters, use_tqdm=False)
            assert list(output.outputs[0].token_ids) == tokens
            found += output.num_cached_tokens
        # And all at once, while the blocks of some are shared.
        assert answers(llm, prompts, 20) == expected
    assert found > 0


def test_several_answers_to_one_prompt(tiny, profile, prompts):
    from vllm import SamplingParams

    def sampled(llm, number, seed):
        parameters = SamplingParams(n=number, seed=seed, max_tokens=20, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts[:10]], parameters, use_tqdm=False)
        return [[list(each.token_ids) for each in output.outputs] for output in outputs]

    with engine(tiny["model"], profile) as llm:
        # vLLM gives the answers to one prompt seeds that follow each other.
        alone = [sampled(llm, 1, 5 + number) for number in range(3)]
    with engine(tiny["model"], profile, enable_prefix_caching=True) as llm:
        together = sampled(llm, 3, 5)
    assert together == [[*first, *second, *third] for first, second, third in zip(*alone, strict=True)]
    assert len({str(answer) for answers in together for answer in answers}) > 10


def test_a_budget_that_covers_every_prompt_changes_nothing(tiny, prompts):
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True, detokenize=False, logprobs=5)
    seen = []
    for config in (None, {"method": "snapkv", "budget": 512}):
        with engine(tiny["model"], config) as llm:
            outputs = llm.generate([{"prompt_token_ids": each} for each in prompts[:12]], parameters, use_tqdm=False)
        completions = [output.outputs[0] for output in outputs]
        seen.append(
            [
                (
                    list(each.token_ids),
                    [{token: entry.logprob for token, entry in step.items()} for step in each.logprobs],
                )
                for each in completions
            ]
        )
    assert seen[0] == seen[1]


def test_shares_of_each_prompt(tiny, prompts, kept):
    with engine(tiny["model"], {"method": "pyramidkv", "budget": "50%"}) as llm:
        answers(llm, prompts[:10], 4)
    long = [len(prompt) for prompt in prompts[:10] if len(prompt) > 150]
    assert long
    for tokens in long:
        held = sum(len(kept[tokens, layer][0][0]) if kept.get((tokens, layer)) else tokens for layer in range(6))
        assert 6 * tokens / 2 <= held < 6 * (tokens / 2 + 33)


def test_blocks_in_use_are_those_of_the_budgets(tiny, profile):
    prompt = random_prompts(1, 400, seed=3)[0] + [1] * 300
    from vllm import SamplingParams

    from evolkv_vllm.plan import rule_of

    with engine(tiny["model"], profile, max_model_len=1024) as llm:
        free = pool(llm).get_num_free_blocks()
        core = llm.llm_engine
        parameters = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)
        core.add_request("a", {"prompt_token_ids": prompt}, parameters)
        used = []
        while core.has_unfinished_requests():
            core.step()
            used.append(free - pool(llm).get_num_free_blocks())
        rule = rule_of(core.vllm_config)
        groups = len(scheduler(llm).kv_cache_manager.coordinator.single_type_managers)
        whole = groups * -(-len(prompt) // 32)
        dropped = rule.evicts(len(prompt), 32) // 32
        kept = sum(-(-(len(prompt) + 30) // 32) - int(dropped[each]) for each in rule.classes)
        assert max(used) >= whole
        assert max(used[4:-2]) <= kept * groups // len(rule.classes)
        assert pool(llm).get_num_free_blocks() == free


def test_aborted_requests_give_everything_back(tiny, profile, prompts):
    from vllm import SamplingParams

    with engine(tiny["model"], profile, max_num_batched_tokens=48) as llm:
        free = pool(llm).get_num_free_blocks()
        core = llm.llm_engine
        parameters = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
        for number, prompt in enumerate(prompts[:16]):
            core.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
        for number in range(16):
            core.step()
            core.abort_request([str(number)])
        while core.has_unfinished_requests():
            core.step()
        assert pool(llm).get_num_free_blocks() == free
        managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
        assert all(not manager.req_to_blocks and not manager._compressed for manager in managers)


def test_three_times_as_many_requests_run_in_the_same_pool(tiny):
    from vllm import SamplingParams

    parameters = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, detokenize=False)
    prompts = [[number, *random_prompts(1, 21, seed=number)[0] * 20][:400] for number in range(24)]
    most = []
    for config in (None, {"profile": str(Path(tiny["folder"], "tiny-uniform.json"))}):
        with engine(tiny["model"], config, num_gpu_blocks_override=60, max_num_seqs=24) as llm:
            core = llm.llm_engine
            for number, prompt in enumerate(prompts):
                core.add_request(str(number), {"prompt_token_ids": prompt}, parameters)
            running = []
            while core.has_unfinished_requests():
                core.step()
                running.append(len(scheduler(llm).running))
            most.append(max(running))
    assert most[1] >= 3 * most[0]
