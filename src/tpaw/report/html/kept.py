"""Which of several responses to a prompt an iteration learns from, for report.html."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tpaw.config.schema import RunConfig
from tpaw.critic.selection import are_whole, best_of, choose, read_scores
from tpaw.data.examples import read_examples
from tpaw.data.token_ids import TokenSequence
from tpaw.generation.responses import Response, Responses, read_responses
from tpaw.scoring.sequences import sequence_keys
from tpaw.scoring.store import LogprobStore
from tpaw.storage.artifacts import is_published, read_manifest, read_sealed
from tpaw.storage.run_directory import RunDirectory


def kept_responses(run: RunDirectory, config: RunConfig, t: int) -> tuple[str, list[Response]]:
    """Of each prompt, the response of θ_t that the method chooses.

    Args:
        run: the run directory.
        config: its configuration.
        t: of a published D_t.

    Returns:
        What the choice is called, and the chosen responses. There are none if each prompt has a
        single response, if the method chooses none, or if it has not chosen yet.
    """
    of = config.generate.samples
    is_critic = config.method == "critic"
    if of == 1 or not (is_critic or config.objective.needs.responses == "likeliest"):
        return "", []
    iteration = run.iteration(t)
    responses = read_responses(iteration.responses)
    parts = responses.in_parts_of(len(responses) // of)
    if is_critic:
        if not is_published(iteration.critic):
            return "", []
        name = f"the critic's best of {of}"
        prompts, numbers = choose(read_scores(iteration.critic), parts, config.critic.agree)
    else:
        logps = _logps_under_their_player(run, t, parts)
        if logps is None:
            return "", []
        name = f"the likeliest of {of}"
        prompts, numbers = best_of(logps, are_whole(parts))
    return name, [parts[k][int(i)] for i, k in zip(prompts, numbers, strict=True)]


def _logps_under_their_player(
    run: RunDirectory, t: int, parts: list[Responses]
) -> NDArray[np.float64] | None:
    """log π_t of the responses of θ_t, (samples, prompts), in nats; None if they are not stored."""
    player = read_manifest(run.checkpoint(t)) if t else read_sealed(run.initial_player_file)
    store = LogprobStore(run.logprobs(player["fingerprint"]))
    examples = read_examples(run.inputs / "train.parquet")
    prompts = dict(zip(examples.ids, examples.prompt_ids, strict=True))
    keys = sequence_keys(
        TokenSequence(prompts[example_id], ids)
        for part in parts
        for example_id, ids in zip(part.example_ids, part.token_ids, strict=True)
    )
    return store.logps(keys).reshape(len(parts), -1) if store.contains(keys).all() else None
