"""The log-probs of a generation server beside those of the store."""

from __future__ import annotations

import numpy as np
import pytest
from messages import says

from tpaw.data.columns import key_array
from tpaw.data.token_ids import TokenSequence, token_ids, write_table
from tpaw.generation.responses import Response, Responses
from tpaw.scoring.drift import Drift, server_drift
from tpaw.scoring.store import LogprobStore, sequence_key
from tpaw.storage.artifacts import deliver

PROMPTS = [token_ids([5, 6]), token_ids([7]), token_ids([8, 9])]


def response(ids, logp):
    return Response("id", token_ids(ids), "", "stop", logp)


def store_of(folder, responses, logps):
    store = LogprobStore(folder)
    keys = [
        sequence_key(TokenSequence(prompt, found.token_ids))
        for prompt, found in zip(PROMPTS, responses, strict=False)
    ]
    counts = [len(found.token_ids) for found in responses]
    store.begin()
    columns = {"sequence": keys, "logp": list(logps), "tokens": counts}
    record = deliver(store.folder, "a.parquet", lambda path: write_table(path, columns), stage="s")
    store.receive(record, "s", key_array(b"".join(keys)), np.array(logps))
    return store


def test_the_difference_is_per_token_and_knows_its_sign(tmp_path):
    responses = [response([1, 4], -3.0), response([1, 2, 3, 4], -5.0), response([4], -1.0)]
    store = store_of(tmp_path, responses, [-2.5, -6.0, -1.0])
    # (-0.5 + 1.0 + 0.0) / 7 tokens, and (0.5 + 1.0 + 0.0) / 7
    assert server_drift(PROMPTS, Responses.of(responses), store) == Drift(
        3, 7, pytest.approx(0.5 / 7), pytest.approx(1.5 / 7)
    )


def test_what_has_no_partner_is_left_out(tmp_path):
    responses = [response([1, 4], None), response([1, 2, 4], -5.0), response([2, 4], -9.0)]
    store = store_of(tmp_path, responses[:2], [-2.0, -4.4])
    assert server_drift(PROMPTS, Responses.of(responses), store) == Drift(
        1, 3, pytest.approx(-0.2), pytest.approx(0.2)
    )
    assert server_drift(PROMPTS[:1], Responses.of(responses[:1]), store) is None


@pytest.mark.parametrize(("size", "warns"), [(0.01, False), (0.2, True)])
def test_a_large_difference_is_a_warning(size, warns):
    text = Drift(1500, 9000, -size / 2, size).described()
    says(text, f"{-size / 2:+.2g}", size, "1,500")
    assert text.startswith("Warning") == warns
