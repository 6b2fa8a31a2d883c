from __future__ import annotations

import random

import pytest
from messages import refused

from tpaw.config.plan import kept_checkpoints, plan_run
from tpaw.config.schema import RunConfig
from tpaw.pipeline.baselines import baseline
from tpaw.selfplay import algorithm_1

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


@pytest.mark.parametrize(
    ("rule", "drawn"),
    [
        ("{all: true}", [(0,), (1, 0), (2, 1, 0), (3, 2, 1, 0), (4, 3, 2, 1, 0)]),
        ("{first_and_last: true}", [(0,), (1, 0), (2, 0), (3, 0), (4, 0)]),
        ("{spaced: 3}", [(0,), (1, 0), (2, 1, 0), (3, 1, 0), (4, 2, 0)]),
        ("{sampled: {count: 1}}", [(0,), (1,), (2,), (3,), (4,)]),
    ],
)
def test_rules_are_drawn(rule, drawn):
    options = {"iterations": 5, "train.learning_rate": 1e-4, "train.epochs": 1}
    plans = plan(**options, **{"team.opponents": "{last: 1}", "team.main_players": rule})
    assert [p.main_players for p in plans] == drawn
    # Each of them scores the newest response; a player that is new scores the targets too.
    assert [p.to_score for p in plans] == [
        (len(players) + (i + 1 - len({j for d in drawn[:i] for j in d} & {*range(i + 1)}) > 0)) * N
        for i, players in enumerate(drawn)
    ]
    plans = plan(**options, **{"team.opponents": rule})
    assert [p.opponents for p in plans] == drawn
    assert [p.triples for p in plans] == [len(players) * N for players in drawn]


@pytest.mark.parametrize("keep", ["last", "team"])
def test_a_rule_that_reaches_back_keeps_what_it_comes_back_to(keep):
    options = {"iterations": 7, "train.learning_rate": 1e-4, "train.epochs": 1, "keep": keep}
    options |= {"team.opponents": "{last: 1}", "team.main_players": "{spaced: 3}"}
    settings = [f"{key}={value}" for key, value in options.items()]
    config = RunConfig.load("starter", overrides=settings)
    # θ_1 plays beside θ_2 and θ_3, θ_2 beside θ_4 and θ_5, θ_3 beside θ_6; between its first and
    # its last game none may go.
    assert [p.main_players for p in plan_run(config, N)] == [
        *((0,), (1, 0), (2, 1, 0), (3, 1, 0), (4, 2, 0), (5, 2, 0), (6, 3, 0)),
    ]
    assert kept_checkpoints(config, 2, is_trained=True) == {0, 1, 2, 3}
    assert kept_checkpoints(config, 3, is_trained=True) == {0, 2, 3, 4}
    assert kept_checkpoints(config, 5, is_trained=True) == {0, 3, 6}


def test_an_iteration_that_would_change_nothing_is_refused():
    settings = {"train.epochs": "1", "train.batch_size": "256"}
    with refused("iteration 1"):
        plan(**settings)
    assert plan(**settings, **{"train.warmup": "0"})[0].optimizer_steps == 1


class Recording:
    """Stages that note whose weights are read, and where `keep` removes some."""

    def __init__(self, config):
        self.config = config
        self.scored = set()
        self.newest = 0
        self.read = []  # a checkpoint whose weights are read, or a point: (t, is trained, newest)
        self.teams = []

    def load_examples(self, t):
        return ["an example"]

    def initial_player(self):
        return 0

    def generate(self, player, examples, t):
        self.read.append(player)

    def build_triples(self, examples, opponents):
        self.opponents = opponents
        return [-1, *opponents]  # who wrote the sequences; -1: the data

    def score(self, triples, players, t):
        self.teams.append({*self.opponents, *players})
        missing = {(j, author) for j in players for author in triples} - self.scored
        self.read += sorted({j for j, _ in missing})
        self.scored |= missing
        self.read.append((t, False, self.newest))

    def train(self, policy, triples, team, t):
        self.read.append(policy)
        self.newest = t + 1
        return t + 1

    def train_by_sft(self, policy, t):
        return self.train(policy, None, None, t)

    def train_by_dpo(self, policy, t):
        self.opponents = ()
        self.score([-1, -2], [policy], t)
        return self.train(policy, None, None, t)

    def evaluate(self, player):
        self.read.append(player)
        if player > 0:
            self.read.append((player - 1, True, player))

    def report(self, t):
        return True


def recorded(config):
    stages = Recording(config)
    (algorithm_1 if config.method == "self_play" else baseline)(config, stages)
    return stages


def random_config(rng, method):
    changes = {"iterations": rng.randint(1, 9), "train.learning_rate": 1e-3, "train.epochs": 1}
    changes["objective.lambda"] = 0.1
    if method == "self_play":
        for who in ("opponents", "main_players"):
            rule = {
                "last": rng.randint(1, 7),
                "all": "true",
                "first_and_last": "true",
                "spaced": rng.randint(1, 5),
                "sampled": f"{{count: {rng.randint(1, 4)}, seed: {rng.randint(0, 9)}}}",
            }
            key = rng.choice([*rule, "last"])
            changes[f"team.{who}.{key}"] = rule[key]
    variant = {"self_play": "tpaw", "sft": "sft_continue", "dpo": "dpo"}[method]
    return RunConfig.load(
        "starter", variant, overrides=[f"{key}={value}" for key, value in changes.items()]
    )


@pytest.mark.parametrize("method", ["self_play", "sft", "dpo"])
def test_weights_are_kept_until_nothing_reads_them(method):
    rng = random.Random(0)
    for _ in range(60 if method == "self_play" else 5):
        config = random_config(rng, method)
        stages = recorded(config)
        points = [(k, point) for k, point in enumerate(stages.read) if isinstance(point, tuple)]
        assert len(points) == config.iterations * (1 if method == "sft" else 2)
        # What one more iteration reads and plays with.
        longer = recorded(config.model_copy(update={"iterations": config.iterations + 1}))
        for k, (t, is_trained, newest) in points:
            later = {j for j in stages.read[k:] if isinstance(j, int) and j <= newest}

            def kept(keep, config=config, t=t, is_trained=is_trained):
                changed = config.model_copy(update={"keep": keep})
                return kept_checkpoints(changed, t, is_trained=is_trained)

            assert kept("last") == later | {newest}
            assert kept("all") == set(range(newest + 1))
            assert kept("last") <= kept("team") <= kept("all")
            if is_trained and method == "self_play":
                assert kept("team") == longer.teams[t + 1] | kept("last")
            elif is_trained:
                assert kept("team") == {newest}
