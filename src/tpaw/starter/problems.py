"""Generate grade-school word problems with worked solutions from templates.

The starter needs a task that a tiny model can learn on a CPU and that exact match can check. The
problems resemble GSM8K: each solution has several steps and ends in a line such as ``#### 42``.
The problems are generated, so no third-party licence applies.

This module uses only the standard library, and only methods of `random.Random` whose results are
the same in every supported Python version. A seed therefore gives the same problems everywhere.
"""

import random
import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

PRONOUN_OF_NAME = {
    "Ada": "She",
    "Ben": "He",
    "Carla": "She",
    "David": "He",
    "Emma": "She",
    "Felix": "He",
    "Grace": "She",
    "Hugo": "He",
    "Iris": "She",
    "Jonas": "He",
    "Kim": "She",
    "Leo": "He",
    "Maria": "She",
    "Noah": "He",
    "Olga": "She",
    "Paul": "He",
}
THINGS = (
    "apples",
    "beads",
    "books",
    "buttons",
    "cards",
    "cookies",
    "eggs",
    "marbles",
    "pears",
    "pens",
    "plums",
    "rocks",
    "shells",
    "stamps",
    "stickers",
    "toys",
)
CONTAINERS = ("bags", "baskets", "boxes", "jars", "trays")
GAINED = ("buys", "finds", "gets")
LOST = ("drops", "loses", "sells")
KIND_OF_WORD = {
    word: kind
    for kind, words in {
        "NAME": PRONOUN_OF_NAME,
        "PRONOUN": ("He", "She"),
        "THINGS": THINGS,
        "CONTAINERS": CONTAINERS,
        "GAINED": GAINED,
        "LOST": LOST,
    }.items()
    for word in words
}
"""Every word that a template chooses at random, and its kind. Only numbers are chosen besides."""


@dataclass(frozen=True)
class Problem:
    """A question and its worked solution. The field names are the column names of GSM8K."""

    question: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """The people and things of a problem.

    Attributes:
        name: the main person.
        pronoun: the pronoun of the main person.
        friend: a different person.
        things: what they count, in the plural.
    """

    name: str
    pronoun: str
    friend: str
    things: str


Template = Callable[[random.Random, Scene], Problem]


def generate_problems(count: int, seed: int, exclude: Collection[str] = ()) -> list[Problem]:
    """Generate problems. No question occurs twice.

    Each template is used equally often. The order is shuffled.

    Args:
        count: number of problems.
        seed: seed of the problems.
        exclude: questions that must not occur.

    Example:
        >>> train = generate_problems(1000, seed=0)
        >>> heldout = generate_problems(200, seed=1, exclude={p.question for p in train})
    """
    rng = random.Random(seed)
    taken = set(exclude)
    problems: list[Problem] = []
    while len(problems) < count:
        template = TEMPLATES[len(problems) % len(TEMPLATES)]
        problem = template(rng, _pick_scene(rng))
        if problem.question not in taken:
            taken.add(problem.question)
            problems.append(problem)
    rng.shuffle(problems)
    return problems


def pattern(question: str) -> str:
    """Return a question with its randomly chosen words replaced by their kinds.

    Two questions with one pattern have the same numbers and the same calculation.

    Example:
        >>> pattern("Leo has 9 eggs. Hugo has 4 times as many.")
        'NAME has 9 THINGS. NAME has 4 times as many.'
    """
    return re.sub(r"[A-Za-z]+", lambda word: KIND_OF_WORD.get(word[0], word[0]), question)


def _pick_scene(rng: random.Random) -> Scene:
    names = tuple(PRONOUN_OF_NAME)
    name = rng.choice(names)
    friend = rng.choice([other for other in names if other != name])
    return Scene(name, PRONOUN_OF_NAME[name], friend, rng.choice(THINGS))


def _worked(*steps: str, result: int) -> str:
    """Join the sentences of a solution and append the result in the format of GSM8K."""
    return " ".join(steps) + f"\n#### {result}"


def _gain_then_lose(rng: random.Random, scene: Scene) -> Problem:
    start, gained = rng.randint(5, 60), rng.randint(3, 39)
    total = start + gained
    lost = rng.randint(2, total - 1)
    left = total - lost
    return Problem(
        f"{scene.name} has {start} {scene.things}. {scene.pronoun} {rng.choice(GAINED)} {gained} "
        f"more and {rng.choice(LOST)} {lost}. How many {scene.things} are left?",
        _worked(
            f"{scene.name} has {start}+{gained}={total} {scene.things}.",
            f"Then {total}-{lost}={left} are left.",
            result=left,
        ),
    )


def _lose_then_gain(rng: random.Random, scene: Scene) -> Problem:
    start = rng.randint(20, 90)
    given, gained = rng.randint(2, start - 5), rng.randint(3, 39)
    left = start - given
    total = left + gained
    return Problem(
        f"{scene.name} had {start} {scene.things} and gave {given} to {scene.friend}. Then "
        f"{scene.name} got {gained} more. How many {scene.things} does {scene.name} have now?",
        _worked(
            f"{scene.name} kept {start}-{given}={left} {scene.things}.",
            f"Now there are {left}+{gained}={total}.",
            result=total,
        ),
    )


def _groups_then_lose(rng: random.Random, scene: Scene) -> Problem:
    groups, size = rng.randint(2, 9), rng.randint(3, 9)
    total = groups * size
    lost = rng.randint(1, total - 1)
    left = total - lost
    return Problem(
        f"{scene.name} fills {groups} {rng.choice(CONTAINERS)} with {size} {scene.things} each and "
        f"{rng.choice(LOST)} {lost}. How many {scene.things} are left?",
        _worked(
            f"{scene.name} has {groups}*{size}={total} {scene.things}.",
            f"Then {total}-{lost}={left} are left.",
            result=left,
        ),
    )


def _groups_then_gain(rng: random.Random, scene: Scene) -> Problem:
    groups, size, extra = rng.randint(2, 9), rng.randint(3, 9), rng.randint(2, 29)
    packed = groups * size
    total = packed + extra
    return Problem(
        f"{scene.name} has {groups} {rng.choice(CONTAINERS)} of {size} {scene.things} and {extra} "
        f"loose ones. How many {scene.things} is that?",
        _worked(
            f"The full ones hold {groups}*{size}={packed} {scene.things}.",
            f"In all that is {packed}+{extra}={total}.",
            result=total,
        ),
    )


def _more_than_friend(rng: random.Random, scene: Scene) -> Problem:
    friend_has, more = rng.randint(4, 45), rng.randint(2, 9)
    name_has = friend_has + more
    total = friend_has + name_has
    return Problem(
        f"{scene.friend} has {friend_has} {scene.things}. {scene.name} has {more} more than "
        f"{scene.friend}. How many {scene.things} do they have together?",
        _worked(
            f"{scene.name} has {friend_has}+{more}={name_has} {scene.things}.",
            f"Together they have {friend_has}+{name_has}={total}.",
            result=total,
        ),
    )


def _times_as_many(rng: random.Random, scene: Scene) -> Problem:
    friend_has, factor = rng.randint(3, 9), rng.randint(2, 9)
    name_has = friend_has * factor
    more = name_has - friend_has
    return Problem(
        f"{scene.friend} has {friend_has} {scene.things}. {scene.name} has {factor} times as many. "
        f"How many more {scene.things} does {scene.name} have?",
        _worked(
            f"{scene.name} has {friend_has}*{factor}={name_has} {scene.things}.",
            f"That is {name_has}-{friend_has}={more} more.",
            result=more,
        ),
    )


def _share(rng: random.Random, scene: Scene) -> Problem:
    people, each = rng.randint(2, 9), rng.randint(3, 9)
    total = people * each
    start = rng.randint(2, total - 2)
    gained = total - start
    return Problem(
        f"{scene.name} has {start} {scene.things} and {rng.choice(GAINED)} {gained} more. "
        f"{scene.pronoun} shares them among {people} friends. How many does each friend get?",
        _worked(
            f"{scene.name} has {start}+{gained}={total} {scene.things}.",
            f"Each friend gets {total}/{people}={each}.",
            result=each,
        ),
    )


def _change(rng: random.Random, scene: Scene) -> Problem:
    bought, price = rng.randint(2, 9), rng.randint(2, 9)
    cost = bought * price
    change = rng.randint(1, 99 - cost)
    paid = cost + change
    return Problem(
        f"{scene.name} has ${paid} and buys {bought} {scene.things} for ${price} each. How many "
        "dollars are left?",
        _worked(
            f"The {scene.things} cost {bought}*{price}={cost} dollars.",
            f"Then {paid}-{cost}={change} are left.",
            result=change,
        ),
    )


def _two_kinds(rng: random.Random, scene: Scene) -> Problem:
    first, first_price = rng.randint(2, 9), rng.randint(2, 9)
    second, second_price = rng.randint(2, 9), rng.randint(2, 9)
    other = rng.choice([things for things in THINGS if things != scene.things])
    first_cost, second_cost = first * first_price, second * second_price
    total = first_cost + second_cost
    return Problem(
        f"{scene.name} buys {first} {scene.things} for ${first_price} each and {second} {other} "
        f"for ${second_price} each. How many dollars does {scene.name} pay?",
        _worked(
            f"The {scene.things} cost {first}*{first_price}={first_cost} dollars.",
            f"The {other} cost {second}*{second_price}={second_cost} dollars.",
            f"In all that is {first_cost}+{second_cost}={total}.",
            result=total,
        ),
    )


def _three_days(rng: random.Random, scene: Scene) -> Problem:
    monday, more, fewer = rng.randint(10, 30), rng.randint(2, 9), rng.randint(2, 9)
    tuesday = monday + more
    wednesday = tuesday - fewer
    total = monday + wednesday
    return Problem(
        f"{scene.name} sold {monday} {scene.things} on Monday, {more} more on Tuesday, and on "
        f"Wednesday {fewer} fewer than on Tuesday. How many on Monday and Wednesday together?",
        _worked(
            f"On Tuesday it was {monday}+{more}={tuesday}.",
            f"On Wednesday it was {tuesday}-{fewer}={wednesday}.",
            f"In all that is {monday}+{wednesday}={total}.",
            result=total,
        ),
    )


TEMPLATES: tuple[Template, ...] = (
    _gain_then_lose,
    _lose_then_gain,
    _groups_then_lose,
    _groups_then_gain,
    _more_than_friend,
    _times_as_many,
    _share,
    _change,
    _two_kinds,
    _three_days,
)
