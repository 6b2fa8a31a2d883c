"""`tpaw plan --measure`: what a run takes, from a few real steps."""

from __future__ import annotations

import tempfile
import time

import numpy as np
import pytest
import torch
from messages import complains, refused

import tpaw.pipeline.costs
import tpaw.pipeline.players
import tpaw.pipeline.training
from tpaw.config.plan import plan_run
from tpaw.config.schema import RunConfig
from tpaw.data.examples import Example, Examples
from tpaw.errors import InputError, MemoryShortageError
from tpaw.pipeline.costs import STEPS, Costs, Memory, measure_costs
from tpaw.pipeline.engines import InProcess
from tpaw.pipeline.preflight import read_inputs
from tpaw.pipeline.stages import Stages
from tpaw.report.costs import described_costs, readable_time
from tpaw.runtime.interrupt import StopSignal
from tpaw.team import Player


@pytest.fixture
def config(finished):
    return finished[1]


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_the_seconds_of_an_iteration_by_hand(config):
    costs = Costs(
        records=8,
        loading={"generate": 1.0, "score": 3.0, "evaluate": 2.0},
        response=0.5,
        sequence=0.25,
        distinct=0.8,
        steps={1: 2.0, 3: 4.0},
        around_training=10.0,
        heldout=(0.3, 0.2),
        memory=Memory("this machine", 1, 2),
    )
    first, second, third, fourth = plan_run(config, 24)  # batches of 8, epochs 2, 1, 1, 1
    assert costs.of_iteration(first, 100) == {
        "generate": 1 + 12.0,
        "critic": 0.0,
        "score": pytest.approx(3 + 0.25 * 0.8 * 48),
        "train": 10 + 2.0 * 6,  # one opponent, 24 triples twice
        "evaluate": 2 + 20.0,
    }
    assert costs.of_iteration(second, 0)["evaluate"] == 0
    assert costs.of_iteration(second, 0)["train"] == 10 + 3.0 * 6  # between one and three
    assert costs.of_iteration(third, 0)["train"] == 10 + 4.0 * 9
    assert costs.of_iteration(third, 0)["generate"] == 1 + 12.0  # θ_2 answers once
    assert fourth.main_players == (3, 2, 1)  # θ_3 scores all, the two others what is new
    assert costs.of_iteration(fourth, 0)["score"] == pytest.approx(
        3 * 3 + 0.25 * 0.8 * (4 * 24 + 2 * 24)
    )
    assert costs.of_evaluation(100, is_first=True) == 2 + 30.0
    with_critic = costs._replace(critic=(0.5, 0.125), critic_steps=(100, 20, 20, 20))
    assert with_critic.of_iteration(first, 0)["critic"] == 50 + 0.125 * 24
    assert with_critic.of_iteration(second, 0)["critic"] == 10 + 0.125 * 24


def test_what_takes_known_times(config, monkeypatch):
    """Stages that sleep as long as they have work."""
    naps = {"generate": 0.03, "step": 0.03, "around": 0.2}
    sleep = time.sleep

    def generate(self, player, examples, t):
        real(self, player, examples, t)
        sleep(naps["generate"] * len(examples))

    def train(self, job, triples, progress):
        asked.append((len(job.opponents), job.steps))
        with progress as advance:
            advance(0)
            for _ in range(job.steps):
                sleep(naps["step"] * len(job.opponents))
                advance(1)
        sleep(naps["around"])

    asked, real = [], Stages.generate
    monkeypatch.setattr(Stages, "generate", generate)
    monkeypatch.setattr(InProcess, "train", train)
    costs = measure_costs(config, read_inputs(config), StopSignal())
    assert asked == [(1, 3), (3, 9)]  # epochs count for nothing here
    assert costs.records == 24
    assert naps["generate"] < costs.response < 2.5 * naps["generate"]
    assert costs.steps[1] == pytest.approx(naps["step"], rel=0.5)
    assert costs.steps[3] == pytest.approx(3 * naps["step"], rel=0.5)
    assert costs.around_training == pytest.approx(naps["around"], rel=0.5)


def test_loading_is_not_paid_for_by_each_record(config, monkeypatch):
    """What happens once in a stage must not grow with the number of records."""
    nap, load = 1.0, tpaw.pipeline.players.load_model

    def slowly(*args, **kwargs):
        time.sleep(nap)
        return load(*args, **kwargs)

    monkeypatch.setattr(tpaw.pipeline.players, "load_model", slowly)
    costs = measure_costs(config, read_inputs(config), StopSignal())
    for stage in ("generate", "score", "evaluate"):
        assert nap < costs.loading[stage] < nap + 1
    assert costs.around_training > nap
    assert costs.response < nap / 24
    assert costs.sequence < nap / 48
    assert max(costs.heldout) < nap / 10


def test_few_records_show_steps_too(config):
    inputs = read_inputs(config)
    train = config.train.model_copy(update={"batch_size": 64, "warmup": 0.5})
    costs = measure_costs(config.model_copy(update={"train": train}), inputs, StopSignal())
    assert costs.around_training > 0


def test_a_large_team_is_tried_for_a_few_steps(config, monkeypatch):
    ends, timed = [], tpaw.pipeline.costs._timed

    def noting(title, steps, found, *, is_whole):
        ends.append(found)
        return timed(title, steps, found, is_whole=is_whole)

    monkeypatch.setattr(tpaw.pipeline.costs, "_timed", noting)
    costs = measure_costs(config, read_inputs(config), StopSignal())
    assert [len(found) for found in ends] == [3, STEPS]
    assert set(costs.steps) == {1, 3}
    assert all(seconds > 0 for seconds in (costs.sequence, costs.response, *costs.heldout))
    assert 0 < costs.distinct <= 1


@pytest.mark.parametrize("seed", range(5))
def test_the_longest_records_are_among_those_that_are_tried(config, seed):
    rng = np.random.default_rng(seed)
    ids = lambda count: np.ones(count, dtype=np.int32)  # noqa: E731
    lengths = [(5, 9), *((rng.integers(1, 5), rng.integers(1, 9)) for _ in range(200)), (3, 15)]
    examples = [
        Example(str(i), ids(p), ids(t), "", "") for i, (p, t) in enumerate(map(tuple, lengths))
    ]
    inputs = read_inputs(config)._replace(examples=Examples.of(examples))
    asked = config.model_copy(
        update={
            "seed": seed,
            "train": config.train.model_copy(update={"batch_size": 2}),
            "generate": config.generate.model_copy(update={"tokens_per_batch": 1}),
        }
    )
    chosen = [e.id for e in tpaw.pipeline.costs._chosen(asked, inputs).examples]
    assert len(chosen) == len(set(chosen)) == 2 * STEPS
    assert {"0", "201"} < set(chosen)  # the longest prompt, and the longest of both together


@pytest.mark.parametrize(("count", "is_said"), [(300, False), (60, True)])
def test_four_batches_of_heldout_prompts_are_tried(config, count, is_said, capsys):
    """Generation holds more memory after a few batches than after one."""
    ids = np.ones(5, dtype=np.int32)
    examples = Examples.of([Example(str(i), ids, ids, "", "") for i in range(count)])
    inputs = read_inputs(config)._replace(examples=examples, heldout=examples)
    generate = {"max_new_tokens": 15, "tokens_per_batch": 20 * (5 + 15)}  # twenty in a batch
    asked = config.model_copy(
        update={
            "train": config.train.model_copy(update={"batch_size": 2}),
            "generate": config.generate.model_copy(update=generate),
        }
    )
    chosen = tpaw.pipeline.costs._chosen(asked, inputs)
    assert (len(chosen.examples), len(chosen.heldout)) == (2 * 20, min(4 * 20, count))
    assert (f"uses 40 of {count} records" in capsys.readouterr().err) is is_said


def test_memory_goes_back_when_a_player_is_replaced_or_released(config, monkeypatch):
    given_back = []
    monkeypatch.setattr(
        tpaw.pipeline.players, "return_free_memory", lambda: given_back.append("memory")
    )
    players = tpaw.pipeline.players.LoadedPlayers(config)
    for fingerprint, times in (("a", 1), ("a", 1), ("b", 2)):
        players.for_scoring(Player(0, config.model.path, fingerprint))
        assert len(given_back) == times
    players.release()
    assert len(given_back) == 3


@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_other_methods(config, method, monkeypatch):
    inputs = read_inputs(config)
    changed = config.model_copy(update={"method": method})
    if method == "dpo":
        pairs = [e._replace(rejected_ids=e.target_ids[:1]) for e in inputs.examples]
        inputs = inputs._replace(examples=Examples.of(pairs))
    costs = measure_costs(changed, inputs, StopSignal())
    assert costs.response == 0
    assert (costs.sequence > 0) is (method == "dpo")
    assert set(costs.steps) == {0}
    [plan] = plan_run(changed, 24)[:1]
    assert costs.of_iteration(plan, 0)["train"] > 0


def test_the_command_measures_and_keeps_nothing(tpaw_, config, tmp_path, temporary, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    from tpaw.config.files import to_yaml

    (tmp_path / "config.yaml").write_text(to_yaml(config, comments=False))
    command = ("plan", str(tmp_path / "config.yaml"), "--measure", "--price-per-hour", "3600")
    code, out, _ = tpaw_(*command)
    assert code == 0
    assert "generate" in out
    assert "device hours" in out
    [paid] = [line for line in out.splitlines() if line.startswith("In all")]
    price = float(paid.partition("price: ")[2].partition(",")[0])
    shown = float(paid.partition("In all: ")[2].partition(" s")[0])
    assert price == pytest.approx(shown, abs=0.06)  # 3600 an hour is 1 a second
    assert "Peak memory:" in out
    assert list(temporary.iterdir()) == []
    assert list((tmp_path / "here").iterdir()) == []


def test_memory_that_runs_out_is_found_now(config, temporary, monkeypatch):
    def too_large(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(tpaw.pipeline.training, "train_iteration", too_large)
    with refused("train.tokens_per_row: 256", error=MemoryShortageError):
        measure_costs(config, read_inputs(config), StopSignal())
    assert list(temporary.iterdir()) == []


def test_what_is_refused(tpaw_, config, tmp_path):
    code, _, err = tpaw_("plan", "starter", "--price-per-hour", "2")
    assert code != 0
    complains(err, "--price-per-hour 2", "--measure")
    right_ones = RunConfig.load(
        config.model_dump(mode="json", by_alias=True) | {"objective": {"name": "self_training"}}
    )
    with pytest.raises(InputError, match="none of the 24 responses that were tried is right"):
        measure_costs(right_ones, read_inputs(right_ones), StopSignal())


def test_nothing_is_measured_without_a_whole_response(config, monkeypatch):
    none = np.empty(0, dtype=np.int64)  # every response was truncated
    kept = lambda self, triples, players: triples.only(none)  # noqa: E731
    monkeypatch.setattr(tpaw.pipeline.training.TrainingData, "kept", kept)
    likeliest = RunConfig.load(config.model_dump(mode="json", by_alias=True), "sharpening")
    with pytest.raises(InputError, match="none of the 96 responses that were tried is whole"):
        measure_costs(likeliest, read_inputs(likeliest), StopSignal())


def test_for_people():
    assert [readable_time(s) for s in (0.04, 99.9, 100, 5999, 6001, 90_000)] == [
        "0.0 s", "99.9 s", "2 min", "1 h 40 min", "1 h 40 min", "25 h 00 min",
    ]  # fmt: skip
    memory = Memory("a GPU", 5 * 10**9, 8 * 10**10)._asdict()
    texts = described_costs({"θ_1": {"generate": 1800.0, "train": 5400.0}}, memory, 2.5)
    assert texts[0] == "In all: 2 h 00 min, 2 device hours; price: 5.00, of 2.5 an hour."
    assert texts[1] == "Peak memory: 5.0 GB of 80.0 GB on a GPU."
