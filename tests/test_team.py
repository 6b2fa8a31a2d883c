from __future__ import annotations

import pytest
from pydantic import ValidationError

from tpaw.team import Newest


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
