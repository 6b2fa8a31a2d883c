"""Work whose peak memory is known; called by test_benchmarks.py in a process of its own."""

from __future__ import annotations

import numpy as np


def keeps_little(mebibytes):
    return lambda: np.ones(mebibytes * 2**20, dtype=np.uint8).sum()


def trains(shape):
    # Importing these takes longer than all of the work above.
    import ours
    from contender import DPO_OBJECTIVE, Settings
    from workload import make_model, make_triples, random_logps

    model, triples = make_model(shape), make_triples(2, 1, shape.vocab, length_scale=0.05)
    logps = random_logps(triples, 1, shape.vocab)
    return lambda: ours.train(model, triples, logps, Settings(2, DPO_OBJECTIVE))
