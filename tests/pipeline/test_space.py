"""Disk space: what each stage is said to need, against a count of what is on the disk."""

from __future__ import annotations

import itertools

import pytest
from builders import make_tokenizer

import tpaw.pipeline.space
from tpaw.config.plan import plan_run
from tpaw.config.schema import CriticConfig, RunConfig
from tpaw.critic.model import small_critic
from tpaw.models.size import ModelSize
from tpaw.pipeline.space import (
    bytes_of_critic,
    bytes_of_evaluation,
    bytes_of_responses,
    bytes_of_temporary_files,
    plan_space,
    space_for_responses,
    space_for_training,
)
from tpaw.storage.run_directory import RunDirectory

PARAMETERS = 1000


@pytest.fixture
def asked(monkeypatch):
    found = []
    require = lambda folder, needed, work, advice="": found.append(needed)  # noqa: E731
    monkeypatch.setattr(tpaw.pipeline.space, "require_space", require)
    return found


def most_on_the_disk(steps, save_every, moments):
    """Bytes, step by step: a saved step goes when the next one is whole, the last at the end.

    A stop, which may come in any step, saves that step too.
    """
    checkpoint = 4 * PARAMETERS
    saved_step = checkpoint + 4 * moments * PARAMETERS
    most = 0
    for stops in itertools.product([False, True], repeat=steps - 1):
        held = 0
        for step, is_stopped in enumerate(stops, start=1):
            if is_stopped or step % save_every == 0:
                most = max(most, held + saved_step)
                held = saved_step
        most = max(most, held + checkpoint)
    return most


@pytest.mark.parametrize(("optimizer", "moments"), [("rmsprop", 1), ("adamw_torch", 2)])
@pytest.mark.parametrize(
    ("steps", "save_every"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (4, 4), (9, 100)]
)
def test_training_needs_the_most_that_is_there_at_a_time(
    settings, tmp_path, asked, optimizer, moments, steps, save_every
):
    settings["train"] |= {"optimizer": optimizer, "save_every": save_every}
    config = RunConfig.load(settings)
    iteration = RunDirectory(tmp_path).iteration(0)
    expected = most_on_the_disk(steps, save_every, moments)
    for parameters in (PARAMETERS, 0):  # without parameters, the small files are left
        space_for_training(iteration, config, ModelSize(parameters, 320), steps)
    saved = iteration.training / "checkpoint-1"
    saved.mkdir(parents=True)
    (saved / "optimizer.pt").write_bytes(b"x" * 100)
    space_for_training(iteration, config, ModelSize(PARAMETERS, 320), steps)
    assert asked[0] - asked[1] == expected
    assert asked[0] - asked[2] == 100


def test_responses_may_be_as_long_as_the_longer_of_both_limits(settings, tmp_path, asked):
    for generate, evaluate in ((8, 16), (16, 8), (16, None), (17, 8)):
        settings["generate"] = {"max_new_tokens": generate}
        settings["evaluate"] |= {"max_new_tokens": evaluate}
        space_for_responses(RunDirectory(tmp_path), RunConfig.load(settings), 10)
    assert asked[0] == asked[1] == asked[2] > 10 * 16 * 8
    assert asked[3] - asked[2] == 10 * 8  # 4 bytes of id and about 4 of text for each token


@pytest.mark.parametrize(("layers", "width"), [(1, 32), (2, 64), (4, 128)])
def test_the_weights_of_a_critic_are_counted(settings, layers, width, tmp_path):
    settings |= {"method": "critic", "critic": {"layers": layers, "width": width}}
    settings["generate"] |= {"samples": 2}
    tokenizer = make_tokenizer()
    model = small_critic(CriticConfig(layers=layers, width=width), tokenizer)
    there = 4 * sum(weight.numel() for weight in model.parameters())
    planned = bytes_of_critic(RunConfig.load(settings), len(tokenizer))
    assert there <= planned < 1.1 * there
    model.half().save_pretrained(tmp_path / "critic")
    settings["critic"] = {"path": str(tmp_path / "critic")}
    assert there <= bytes_of_critic(RunConfig.load(settings), len(tokenizer)) < 1.2 * there + 10_000


def test_a_run_with_a_critic_needs_room_for_its_steps(settings):
    """Weights, two moments and the best weights, in two saved steps, beside the critics before."""
    settings["generate"] |= {"samples": 2}
    peaks = []
    for critic in ({}, {"layers": 9, "width": 512}):
        changed = settings | {"method": "critic", "critic": critic, "iterations": 2}
        config = RunConfig.load(changed)
        spaces = plan_space(config, plan_run(config, 100), ModelSize(1000, 320), 10, 0)
        peaks.append((spaces[0].peak, spaces[1].peak, bytes_of_critic(config, 320)))
    (first, second, small), (large_first, large_second, large) = peaks
    assert large_first - 9 * large == pytest.approx(first - 9 * small, abs=100_000)
    assert large_second - 10 * large == pytest.approx(second - 10 * small, abs=100_000)


def test_each_sampled_response_to_a_held_out_prompt_is_counted(settings):
    settings["evaluate"] |= {"temperatures": [0.5, 1.0], "samples": 1}
    one = bytes_of_evaluation(RunConfig.load(settings), 10)
    settings["evaluate"] |= {"samples": 4}
    # Three kinds of greedy results, and at two temperatures four responses in place of one.
    assert bytes_of_evaluation(RunConfig.load(settings), 10) == one / 5 * 11


@pytest.mark.parametrize(
    ("method", "opponents", "samples", "parts"),
    [
        ("tpaw", 1, 1, 1),
        ("sharpening", 1, 4, 4),
        ("sharpening", 3, 4, 12),
        ("tpaw", 3, 2, 6),
        ("tspin", 1, 2, 4),  # each response beside the one of θ_0
    ],
)
def test_temporary_files_hold_all_that_is_played_with(settings, method, opponents, samples, parts):
    """Relative to one response to each prompt."""
    settings["generate"] |= {"samples": samples}
    settings |= {"iterations": 3}
    own = {"team": {"opponents": {"last": opponents}}}
    config = RunConfig.load(settings, *([] if method == "tpaw" else [method]), own | settings)
    found = bytes_of_temporary_files(config, plan_run(config, 100_000), 0)
    one = bytes_of_responses(config, 100_000)
    assert found == pytest.approx(parts * one, rel=1e-3)
