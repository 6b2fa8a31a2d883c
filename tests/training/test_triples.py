"""D_O as columns against a list of triples."""

from __future__ import annotations

import numpy as np
import pytest
from builders import team_rows
from messages import refused

from tpaw.data.columns import key_list
from tpaw.data.examples import Example
from tpaw.data.token_ids import token_ids
from tpaw.errors import ArtifactError
from tpaw.generation.responses import Response
from tpaw.scoring.store import sequence_key
from tpaw.training.batching import TripleSizes
from tpaw.training.triples import FROM_THE_DATA, Triples, preference_pairs


def make(count, opponents, seed):
    """Examples with few different prompts and responses."""
    rng = np.random.default_rng(seed)

    def ids(longest):
        return token_ids(rng.integers(0, 2, rng.integers(1, longest)))

    examples = [Example(f"{i}-x", ids(4), ids(4), f"p{i}", "t") for i in range(count)]
    responses = [
        [Response(e.id, ids(4), "r", rng.choice(["stop", "length"])) for e in examples]
        for _ in opponents
    ]
    return examples, list(zip(opponents, responses, strict=True))


@pytest.mark.parametrize("opponents", [[], [0], [3, 1, 2]])
def test_triples_are_those_of_one_opponent_after_those_of_another(opponents):
    examples, responses_of = make(12, opponents, seed=len(opponents))
    expected = [(e, r, j) for j, rs in responses_of for e, r in zip(examples, rs, strict=True)]
    triples = Triples(examples, responses_of)
    assert len(triples) == len(expected)
    wanted = {}
    for i, (example, response, opponent) in enumerate(expected):
        assert (triples[i].example.id, triples[i].opponent) == (example.id, opponent)
        assert triples[i].example.prompt_text == example.prompt_text
        assert triples[i].response.finish_reason == response.finish_reason
        assert triples.is_truncated[i] == (response.finish_reason == "length")
        ids = (example.prompt_ids, example.target_ids, response.token_ids)
        assert [part.tolist() for part in triples.token_ids(i)] == [p.tolist() for p in ids]
        for sequence in (ids[:2], ids[::2]):
            wanted.setdefault(sequence_key(sequence), sequence)
    sequences = triples.sequences()
    assert key_list(sequences.keys) == list(wanted)
    assert len(wanted) < 2 * len(expected) or not expected
    for i, (prompt, response) in enumerate(wanted.values()):
        assert sequences[i].prompt_ids.tolist() == prompt.tolist()
        assert sequences[i].response_ids.tolist() == response.tolist()
        assert sequences.lengths[i] == len(response)
        same = [p.tolist() == prompt.tolist() for p, _ in wanted.values()]
        assert (sequences.prompts == sequences.prompts[i]).tolist() == same
    with pytest.raises(IndexError):
        triples[len(expected)]


def test_responses_of_other_examples_are_refused():
    examples, [(_, responses)] = make(5, [0], seed=0)
    wrong = [*responses[:3], responses[3]._replace(example_id="9-y"), responses[4]]
    with refused("9-y", "3-x", "θ_2", error=ArtifactError):
        Triples(examples, [(2, wrong)])
    with refused("4", "5", "θ_2", error=ArtifactError):
        Triples(examples, [(2, responses[:4])])


def test_a_rejected_answer_plays_the_response():
    examples, [(_, responses)] = make(4, [0], seed=1)
    pairs = [e._replace(rejected_ids=r.token_ids) for e, r in zip(examples, responses, strict=True)]
    triples = preference_pairs(pairs)
    assert {triple.opponent for triple in triples} == {FROM_THE_DATA}
    found = [triple.response.token_ids.tolist() for triple in triples]
    assert found == [r.token_ids.tolist() for r in responses]
    assert len(preference_pairs(examples)) == 0


def test_rows_are_grouped_by_prompt_and_target_in_the_order_of_first_occurrence():
    rng = np.random.default_rng(0)
    rows = team_rows(6, 2) * 2
    rows = [rows[i] for i in rng.permutation(len(rows))]
    groups = {}
    expected = [
        groups.setdefault((r["prompt_ids"].tobytes(), r["target_ids"].tobytes()), len(groups))
        for r in rows
    ]
    assert TripleSizes(rows).group_of.tolist() == expected
