"""What is kept of the harness's samples."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from tpaw.evaluation.benchmarks.results import item_outcomes


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (np.float32(0.25), 0.25),
        (True, 1.0),
        ([0.0, 1.0], 0.5),
        (math.nan, None),  # JSON has no such numbers
        (-math.inf, None),
        ([0.0, math.inf], None),
        ((1, 0), None),
    ],
)
def test_a_metric_of_an_item_is_a_finite_number_or_absent(value, score):
    sample = {"doc_id": 0, "doc_hash": "h", "resps": [["a"]], "target": "a", "filter": "none"}
    sample |= {"metrics": ["m"], "m": value}
    [item] = item_outcomes([sample], ["m,none"], "generate_until")
    assert item["score"] == item["metrics"]["m,none"] == score
    assert ("correct" in item) == (score in (0, 1))
    json.dumps(item, allow_nan=False)
