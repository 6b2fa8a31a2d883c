"""TeamTrainer with an objective that is not TPAW's, and what it refuses when it is built."""

from __future__ import annotations

import pytest
import torch
from builders import PAPER, arguments, make_model, train, triples
from messages import refused
from oracles import oracle

from tpaw.data.token_ids import token_ids
from tpaw.objectives.base import FakeObjective, Objective, ObjectiveNeeds, ObjectiveOutput
from tpaw.objectives.tpaw import TeamObjective
from tpaw.training.batching import columns_for
from tpaw.training.trainer import TeamTrainer


def without_players(rows):
    return [{k: v for k, v in row.items() if not k.startswith("player_")} for row in rows]


def mean_target_logp(rows):
    model = make_model(seed=1).double()
    with torch.no_grad():
        logps = [oracle(model, row["prompt_ids"], row["target_ids"]).item() for row in rows]
    return sum(logps) / len(logps)


def test_any_objective_trains_and_its_own_metrics_are_logged(tmp_path):
    rows = without_players(triples(8, []))
    args = arguments(tmp_path, per_device_train_batch_size=8)
    line = train(make_model(seed=1), rows, args, FakeObjective()).state.log_history[0]
    assert line["loss"] == pytest.approx(-mean_target_logp(rows), rel=1e-5)
    assert line["fake/players"] == 0
    assert line["logps/target"] == pytest.approx(mean_target_logp(rows), rel=1e-5)
    assert not any(name.startswith(("rewards/", "weights/")) for name in line)


def test_the_log_prob_of_the_initial_response_is_given_where_it_is_needed(tmp_path):
    class AgainstInitial:
        needs = ObjectiveNeeds(references="none", initial_responses=True)

        def __call__(self, logps):
            loss_B = logps.policy_initial_B - logps.policy_generated_B
            return ObjectiveOutput(loss_B, {"initial": logps.policy_initial_B.detach()})

    rows = [
        row | {"initial_ids": token_ids([7 + i, 8, 9][: 1 + i % 3])}
        for i, row in enumerate(without_players(triples(8, [])))
    ]
    args = arguments(tmp_path, per_device_train_batch_size=8)
    for tokens_per_row in (40, 10_000):
        trainer = train(
            make_model(seed=1), rows, args, AgainstInitial(), tokens_per_row=tokens_per_row
        )
        line = trainer.state.log_history[0]
        model = make_model(seed=1).double()
        with torch.no_grad():
            initial, generated = (
                torch.stack([oracle(model, row["prompt_ids"], row[name]) for row in rows]).mean()
                for name in ("initial_ids", "generated_ids")
            )
        assert line["initial"] == pytest.approx(initial.item(), rel=1e-5)
        assert line["loss"] == pytest.approx((initial - generated).item(), rel=1e-4, abs=1e-5)


def test_team_objective_and_the_fake_are_objectives():
    assert isinstance(TeamObjective(**PAPER), Objective)
    assert isinstance(FakeObjective(), Objective)
    assert columns_for(FakeObjective().needs) == ("prompt_ids", "target_ids", "generated_ids")


@pytest.mark.parametrize(
    "objective",
    [PAPER, None, lambda logps: logps, torch.nn.MSELoss(), TeamObjective],
    ids=["settings", "nothing", "function", "module", "class"],
)
def test_what_is_no_objective_is_refused_when_the_trainer_is_built(tmp_path, objective):
    with refused("objective", error=TypeError):
        TeamTrainer(make_model(), arguments(tmp_path), triples(2, []), None, objective)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"lambda_": 0.0}, "lambda_"),
        ({"eta": 0.5}, "eta"),
        ({"gamma": -1.0}, "gamma"),
        ({"min_player_weight": 1.0}, "min_player_weight"),
        ({"target_weight": "both"}, "target_weight"),
    ],
)
def test_a_setting_outside_its_range_is_refused_when_the_objective_is_built(change, key):
    with refused(key, error=ValueError):
        TeamObjective(**(PAPER | change))


@pytest.mark.parametrize(
    ("players", "needs", "start_column", "key"),
    [
        (0, ObjectiveNeeds("team"), None, "player_target_logps"),
        (2, ObjectiveNeeds("newest"), None, "player_target_logps"),
        (2, ObjectiveNeeds("team"), 2, "start_column"),
        (2, ObjectiveNeeds("team"), -1, "start_column"),
        (2, ObjectiveNeeds("none"), 0, "start_column"),
    ],
)
def test_a_dataset_that_does_not_fit_the_objective_is_refused(
    tmp_path, players, needs, start_column, key
):
    rows = triples(2, [make_model(seed=k) for k in range(players)])
    with refused(key, error=ValueError):
        TeamTrainer(
            make_model(), arguments(tmp_path), rows, None, FakeObjective(needs), start_column
        )


def test_no_rows_and_an_iterable_are_refused(tmp_path):
    for dataset in ([], iter([1])):
        with refused("train_dataset", error=ValueError):
            TeamTrainer(make_model(), arguments(tmp_path), dataset, None, FakeObjective())


@pytest.mark.parametrize("start_column", [0, 1])
def test_the_column_that_the_policy_starts_as_is_the_one_that_is_named(tmp_path, start_column):
    """The other player's rewards are not 0, so its target weight is decided by their sign."""
    players = [make_model(seed=2), make_model(seed=3)]
    players[start_column] = make_model(seed=1)
    rows = triples(8, players)
    args = arguments(tmp_path, per_device_train_batch_size=8)
    line = train(make_model(seed=1), rows, args, start_column=start_column).state.log_history[0]
    assert line[f"rewards/target/player_{start_column}"] == 0
    assert line[f"rewards/generated/player_{start_column}"] == 0
    assert line[f"rewards/target/player_{1 - start_column}"] != 0
