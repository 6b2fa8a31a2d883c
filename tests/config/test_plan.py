from __future__ import annotations

import pytest
from messages import refused

from tpaw.config.plan import plan_run
from tpaw.config.schema import RunConfig

N = 100


def plan(*sources, **overrides):
    settings = [f"{key}={value}" for key, value in overrides.items()]
    return plan_run(RunConfig.load("starter", *sources, overrides=settings), N)


def test_tpaw_is_appendix_b_and_scores_6n_from_the_third_iteration_on():
    plans = plan()
    assert [p.starts_from for p in plans] == [0, 1, 2, 3]
    assert [p.opponents for p in plans] == [(0,), (1, 0), (2, 1, 0), (3, 2, 1)]
    assert [p.main_players for p in plans] == [(0,), (1, 0), (2, 1, 0), (3, 2, 1)]
    assert [p.triples for p in plans] == [N, 2 * N, 3 * N, 3 * N]
    assert [p.to_generate for p in plans] == [N] * 4
    # t=0: y and g0 under θ_0. t=1: y, g1, g0 under θ_1 and g1 under θ_0. From t=2 on: y and three
    # responses under the newest, the newest response under two older ones.
    assert [p.to_score for p in plans] == [2 * N, 4 * N, 6 * N, 6 * N]


@pytest.mark.parametrize(
    ("variant", "opponents", "players"),
    [
        ("no_target_weight", (3, 2, 1), (3, 2, 1)),
        ("no_player_weight", (3, 2, 1), (3, 2, 1)),
        ("no_adaptive_weights", (3, 2, 1), (3, 2, 1)),
        ("no_team", (3,), (3,)),
        ("spin", (3, 2), (3,)),
        ("tpaw", (3, 2, 1), (3, 2, 1)),
    ],
)
def test_variants_pick_their_teams(variant, opponents, players):
    last = plan(variant)[-1]
    assert (last.opponents, last.main_players) == (opponents, players)


def test_a_baseline_answers_nothing_and_dpo_scores_its_reference():
    sft = plan("sft_continue")
    assert [(p.opponents, p.main_players, p.to_score) for p in sft] == [((), (), 0)] * 4
    assert [(p.starts_from, p.triples, p.to_generate) for p in sft] == [(t, N, 0) for t in range(4)]
    assert [p.optimizer_steps for p in sft] == [2] * 4
    dpo = plan("dpo", iterations=2)
    assert [(p.opponents, p.main_players) for p in dpo] == [((), (0,)), ((), (1,))]
    # Chosen and rejected answers, under a reference that is new each time.
    assert [(p.to_score, p.optimizer_steps) for p in dpo] == [(2 * N, 4)] * 2


def test_steps_count_the_smaller_last_batch_of_each_epoch():
    plans = plan(**{"train.epochs": "[2, 1, 1, 1]", "train.batch_size": 64})
    # 100 triples: steps of 64 and 36, twice; 200: 64, 64, 64, 8; 300: four of 64 and one of 44.
    assert [p.optimizer_steps for p in plans] == [4, 4, 5, 5]


def test_settings_of_each_iteration():
    plans = plan(
        **{"train.learning_rate": "[4e-6,3e-6,2e-6,1e-6]", "objective.lambda": "[1,2,3,4]"}
    )
    assert [p.learning_rate for p in plans] == [4e-6, 3e-6, 2e-6, 1e-6]
    assert [p.lambda_ for p in plans] == [1, 2, 3, 4]


def test_an_iteration_that_would_change_nothing_is_refused():
    settings = {"train.epochs": "1", "train.batch_size": "256"}
    with refused("iteration 1"):
        plan(**settings)
    assert plan(**settings, **{"train.warmup": "0"})[0].optimizer_steps == 1
