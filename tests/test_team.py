from __future__ import annotations

import pytest
from pydantic import ValidationError

from tpaw.team import All, Draw, FirstAndLast, Newest, Sampled, Spaced


@pytest.mark.parametrize(
    ("last", "history", "expected"),
    [
        (3, [0], (0,)),
        (3, [0, 1], (1, 0)),
        (3, [0, 1, 2], (2, 1, 0)),
        (3, [0, 1, 2, 3], (3, 2, 1)),  # appendix B of the paper: M_4 plays 3, 2, 1
        (1, [0, 1, 2, 3], (3,)),
        (2, [0, 1, 2], (2, 1)),
        (9, [0, 1], (1, 0)),
    ],
)
def test_the_newest_first_and_fewer_while_there_are_fewer(last, history, expected):
    assert Newest(last=last).select(history) == expected


@pytest.mark.parametrize("last", [0, -1, 1.5, "3"])
def test_refuses_a_team_without_players(last):
    with pytest.raises(ValidationError):
        Newest(last=last)


EVERY_RULE = pytest.mark.parametrize(
    "rule",
    [
        Newest(last=3),
        All(all=True),
        FirstAndLast(first_and_last=True),
        *(Spaced(spaced=n) for n in (1, 2, 3, 5)),
        *(Sampled(sampled=Draw(count=n, seed=s)) for n, s in ((1, 0), (3, 0), (3, 1))),
    ],
    ids=str,
)


@EVERY_RULE
@pytest.mark.parametrize("count", [1, 2, 3, 4, 9, 40])
def test_every_rule_selects_the_newest_first_and_nobody_twice(rule, count):
    history = [f"θ_{j}" for j in range(count)]
    selected = rule.select(history)
    indices = [history.index(name) for name in selected]
    assert indices[0] == count - 1
    assert indices == sorted(set(indices), reverse=True)
    assert rule.select(range(count)) == tuple(indices)


def test_all_and_both_ends():
    assert All(all=True).select(range(4)) == (3, 2, 1, 0)
    ends = FirstAndLast(first_and_last=True)
    assert [ends.select(range(n)) for n in (1, 2, 5)] == [(0,), (1, 0), (4, 0)]


@pytest.mark.parametrize(
    ("spaced", "count", "expected"),
    [
        (1, 6, (5,)),
        (2, 6, (5, 0)),
        (3, 7, (6, 3, 0)),
        (4, 10, (9, 6, 3, 0)),
        (3, 6, (5, 2, 0)),
        (5, 4, (3, 2, 1, 0)),
        (4, 4, (3, 2, 1, 0)),
    ],
)
def test_spaced_checkpoints_reach_from_one_end_to_the_other(spaced, count, expected):
    assert Spaced(spaced=spaced).select(range(count)) == expected


# Of the checkpoints 0 to 4, 0 to 9 and 0 to 19.
DRAWN = [(4, 2, 1), (9, 3, 0), (19, 6, 1)]


def test_a_draw_depends_on_seed_and_iteration_alone():
    rule = Sampled(sampled=Draw(count=3, seed=5))
    drawn = [rule.select(range(n)) for n in range(1, 30)]
    assert [len(players) for players in drawn] == [1, 2, *[3] * 27]
    assert drawn == [Sampled(sampled=Draw(count=3, seed=5)).select(range(n)) for n in range(1, 30)]
    # Written down: another machine, or a later version of numpy, must draw the same.
    assert [rule.select(range(n)) for n in (5, 10, 20)] == DRAWN
    others = [Sampled(sampled=Draw(count=3, seed=6)).select(range(n)) for n in range(1, 30)]
    assert others != drawn
    # Every older checkpoint is drawn about as often: each of 8 in 2 of 8 draws.
    times = [0] * 8
    for seed in range(400):
        for j in Sampled(sampled=Draw(count=3, seed=seed)).select(range(9))[1:]:
            times[j] += 1
    assert sum(times) == 800
    assert all(70 <= n <= 130 for n in times)  # three standard deviations are 26


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Spaced(spaced=0),
        lambda: Draw(count=0),
        lambda: All(all=False),
        lambda: FirstAndLast(first_and_last=False),
    ],
)
def test_a_rule_that_selects_nobody_is_refused(wrong):
    with pytest.raises(ValidationError):
        wrong()
