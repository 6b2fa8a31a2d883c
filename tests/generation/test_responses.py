"""D_t on disk: one response per prompt and checkpoint, kept for good."""

from __future__ import annotations

import contextlib
import functools

import pytest
from builders import SAMPLING, ignore, make_tokenizer
from messages import says

from tpaw.data.examples import Example
from tpaw.data.token_ids import token_ids
from tpaw.generation.generator import FakeGenerator
from tpaw.generation.responses import (
    deliver_responses,
    generate_responses,
    read_responses,
    response_facts,
)
from tpaw.runtime.shards import do_here
from tpaw.storage.artifacts import is_published, read_manifest
from tpaw.team import Player


class Counting(FakeGenerator):
    def __init__(self):
        super().__init__(lambda prompt, seed: [int(prompt[0]), seed % 97 + 5, 4])
        self.answered = 0

    def generate(self, prompts, sampling, seed, on_done, first=0):
        self.answered += len(prompts)
        return super().generate(prompts, sampling, seed, on_done)


def answer(folder, examples, generator, on_done=ignore, seed=0, shard_size=4):
    tokenizer = make_tokenizer()

    def compute(shards):
        for shard in shards:
            yield deliver_responses(folder, shard, generator, SAMPLING, tokenizer.decode, on_done)

    generate_responses(
        folder,
        Player(2, "", "f"),
        examples,
        compute,
        SAMPLING,
        shard_size=shard_size,
        seed=seed,
        on_done=on_done,
    )


def make_examples(count):
    return [
        Example(f"{i}-x", token_ids([i + 5, 6]), token_ids([i + 5, 7, 4]), "p", "t")
        for i in range(count)
    ]


def test_responses_are_one_per_example_in_order_with_what_was_counted(tmp_path):
    examples = make_examples(10)
    answer(
        tmp_path / "r",
        examples,
        FakeGenerator(lambda prompt, seed: [int(prompt[0]), 7, *([4] * int(prompt[0] % 3 == 2))]),
    )
    responses = read_responses(tmp_path / "r")
    assert [r.example_id for r in responses] == [e.id for e in examples]
    assert [r.finish_reason for r in responses] == [
        "stop" if i % 3 == 0 else "length" for i in range(10)
    ]
    assert responses[0].token_ids.tolist() == [5, 7, 4]
    assert responses[1].token_ids.tolist() == [
        6,
        7,
    ]
    facts = response_facts(tmp_path / "r")
    # Every third example is answered with its target's very ids; the others without the last.
    assert (facts["rows"], facts["identical"], facts["truncated"], facts["tokens"]) == (
        10,
        4,
        6,
        24,
    )
    assert read_manifest(tmp_path / "r")["player"] == 2


def test_a_kill_costs_one_shard_and_nothing_is_answered_twice(tmp_path):
    examples = make_examples(10)
    answer(tmp_path / "whole", examples, Counting())
    generator = Counting()
    with pytest.raises(KeyboardInterrupt):
        answer(tmp_path / "r", examples, generator, interrupt_after(6))
    assert not is_published(tmp_path / "r")
    assert generator.answered == 8
    rest = Counting()
    answer(tmp_path / "r", examples, rest)
    assert rest.answered == 6  # the second shard again, and the third
    for shard in (tmp_path / "whole").glob("*.parquet"):
        assert shard.read_bytes() == (tmp_path / "r" / shard.name).read_bytes()


def test_responses_that_have_begun_keep_the_size_of_their_shards(tmp_path):
    examples = make_examples(10)
    answer(tmp_path / "whole", examples, Counting())
    with pytest.raises(KeyboardInterrupt):
        answer(tmp_path / "r", examples, Counting(), interrupt_after(5))
    answer(tmp_path / "r", examples, Counting(), shard_size=3)
    for shard in (tmp_path / "whole").glob("*.parquet"):
        assert shard.read_bytes() == (tmp_path / "r" / shard.name).read_bytes()
    answer(tmp_path / "other", examples, Counting(), shard_size=3)
    assert len(list((tmp_path / "other").glob("*.parquet"))) == 4


def interrupt_after(count):
    """Raise KeyboardInterrupt once so many prompts are answered."""
    answered = 0

    def on_done(more):
        nonlocal answered
        answered += more
        if answered == count:
            raise KeyboardInterrupt

    return on_done


@pytest.mark.parametrize(("truncated", "is_told"), [(9, False), (10, True)])
def test_responses_that_are_nearly_all_truncated_are_worth_a_warning(
    tmp_path, capsys, truncated, is_told
):
    generator = FakeGenerator(
        lambda prompt, seed: [7, *([4] if prompt[0] - 5 >= truncated else [8] * 20)]
    )
    answer(tmp_path / "r", make_examples(10), generator)
    warned = capsys.readouterr().err
    if is_told:
        says(warned.strip(), "10 of 10", "θ_2", "generate.max_new_tokens", 12, "model.eos_token")
    else:
        assert not warned
    answer(tmp_path / "r", make_examples(10), generator)


def test_the_model_is_loaded_once_and_only_if_a_shard_is_missing(tmp_path):
    loads, done, generator = [], [], Counting()

    class Loading:
        @contextlib.contextmanager
        def opened(self, holder):
            loads.append(holder)
            with generator.opener(None, None) as opened:
                yield lambda shard, on_done: deliver_responses(
                    tmp_path / "r", shard, opened, SAMPLING, make_tokenizer().decode, on_done
                )

    for _ in range(2):
        generate_responses(
            tmp_path / "r",
            Player(0, "", "f"),
            make_examples(10),
            functools.partial(do_here, Loading(), "here", on_done=done.append),
            SAMPLING,
            shard_size=4,
            seed=0,
            on_done=done.append,
        )
    assert loads == ["here"]
    assert not generator.is_open
    assert sum(done) == 20  # shards that are there count as done


def test_shards_and_players_have_their_own_seeds(tmp_path):
    examples = make_examples(8)
    answer(tmp_path / "a", examples, Counting(), seed=0)
    answer(tmp_path / "b", examples, Counting(), seed=1)
    a, b = ([int(r.token_ids[1]) for r in read_responses(tmp_path / x)] for x in "ab")
    assert len({a[0], a[4], b[0], b[4]}) == 4
    assert a[0] == a[3]
