"""The request of one response in OpenAI's completions API, and the check of its reply.

Prompt and response are token ids, as vLLM and SGLang take and give them (`return_token_ids`). Text
would not do: encoding it again can give other tokens than those that the model emitted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tpaw.data.token_ids import TokenIds, token_ids
from tpaw.errors import brief
from tpaw.generation.endpoint import Unavailable
from tpaw.generation.generator import Completion, FinishReason, SamplingParams

# The server gave up this request, and not because of its content.
_GIVEN_UP = (None, "abort", "error")


class WrongReply(Exception):
    """A reply that must not be used: the server did something else than what it was asked."""


def completion_request(
    prompt: TokenIds,
    params: SamplingParams,
    *,
    seed: int,
    model: str,
    logprobs: bool,
    ignores_eos: bool,
) -> dict[str, Any]:
    """Build the body of a request. It gives every sampling setting that a server has a default for.

    Args:
        prompt: int32 token ids, of shape (prompt tokens,).
        params: sampling settings.
        seed: of this request alone.
        model: the name under which the server serves the player.
        logprobs: whether to ask for the log-prob of each token.
        ignores_eos: whether the stop tokens end a response in spite of `ignore_eos`, as in vLLM.
            The server's own end-of-sequence tokens then end none. In SGLang, `ignore_eos` switches
            all stop tokens off.
    """
    return {
        "model": model,
        "prompt": prompt.tolist(),
        "max_tokens": params.limit(prompt),
        "min_tokens": 0,
        "n": 1,
        "seed": seed,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k or -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": [],
        "stop_token_ids": list(params.stop_token_ids),
        "ignore_eos": ignores_eos,
        "skip_special_tokens": False,
        "return_token_ids": True,
        "logprobs": 0 if logprobs else None,
        "echo": False,
        "stream": False,
    }


def read_completion(
    reply: Any, prompt: TokenIds, params: SamplingParams, *, model: str, logprobs: bool
) -> Completion:
    """Check a reply and return its response.

    Args:
        reply: the body of the reply, decoded.
        prompt: the prompt of the request.
        params: the sampling settings of the request.
        model: the model that the request named.
        logprobs: whether the request asked for log-probs.

    Raises:
        WrongReply: naming what differs from the request.
        Unavailable: the server gave up the request; a later try may succeed.
    """
    if not isinstance(reply, dict):
        raise WrongReply("the reply is not a completion")
    if reply.get("model") != model:
        raise WrongReply(f"the reply is of model {brief(reply.get('model'))}, not {brief(model)}")
    choices = reply.get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        count = len(choices) if isinstance(choices, list) else "no"
        raise WrongReply(f"the reply has {count} responses; 1 was asked for")
    [choice] = choices
    emitted = choice.get("token_ids")
    if emitted is None:
        raise WrongReply(
            "the server returns text only; TPAW needs a server that returns token ids "
            "(return_token_ids), such as vLLM or SGLang"
        )
    if not _are_ids(emitted):
        raise WrongReply(f"token_ids is {brief(emitted)}, not a list of token ids")
    _check_prompt(reply, choice, prompt)
    reason = choice.get("finish_reason")
    if reason in _GIVEN_UP:
        raise Unavailable(f"the server gave up the request (finish_reason {brief(reason)})")
    for key in ("stop_reason", "matched_stop"):
        if isinstance(choice.get(key), str):  # no stop string was given
            raise WrongReply(f"the response was ended by {brief(choice[key])}")
    finish_reason = _checked_end(emitted, reason, params, params.limit(prompt))
    logp = _summed_logps(choice, len(emitted)) if logprobs else None
    return Completion(token_ids(emitted), finish_reason, logp)


def _are_ids(value: Any) -> bool:
    # `type` and not `isinstance`, because True is an int.
    return isinstance(value, list) and all(type(i) is int and 0 <= i < 2**31 for i in value)


def _check_prompt(reply: Mapping[str, Any], choice: Mapping[str, Any], prompt: TokenIds) -> None:
    echoed = choice.get("prompt_token_ids", reply.get("prompt_token_ids"))
    if echoed is not None:
        if echoed != prompt.tolist():
            raise WrongReply(
                f"the server answered another prompt: it has the token ids {brief(echoed)}, and "
                f"{brief(prompt.tolist())} were sent"
            )
        return
    usage = reply.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    if count != len(prompt):
        raise WrongReply(
            f"the server does not return the prompt's token ids, and counts {brief(count)} prompt "
            f"tokens; {len(prompt)} were sent"
        )


def _checked_end(
    emitted: list[int], reason: Any, params: SamplingParams, limit: int
) -> FinishReason:
    if reason not in ("stop", "length"):
        raise WrongReply(f"finish_reason is {brief(reason)}; it must be 'stop' or 'length'")
    if len(emitted) > limit:
        raise WrongReply(f"the response has {len(emitted)} tokens; the limit was {limit}")
    stops = [i for i, token in enumerate(emitted) if token in params.stop_token_ids]
    if stops and stops[0] < len(emitted) - 1:
        raise WrongReply(f"the response goes on after the stop token {emitted[stops[0]]}")
    if stops:  # SGLang says "length" if the limit was reached with a stop token
        return "stop"
    if reason == "stop":
        raise WrongReply(
            f"the response ended with token {emitted[-1] if emitted else 'none'}, which is not one "
            f"of the stop tokens {list(params.stop_token_ids)}; check the end-of-sequence tokens "
            "in the model's config.json and generation_config.json, and model.eos_token"
        )
    if len(emitted) < limit:
        raise WrongReply(
            f"the response was cut after {len(emitted)} tokens; the limit was {limit}; raise the "
            "server's longest sequence (--max-model-len for vLLM) to max_length"
        )
    return "length"


def _summed_logps(choice: Mapping[str, Any], count: int) -> float:
    logprobs = choice.get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(values, list) or len(values) != count:
        raise WrongReply(
            "the reply has no log-prob for each token; set generate.server.logprobs to false if "
            "the server has none"
        )
    if not all(isinstance(v, float | int) and math.isfinite(v) for v in values):
        raise WrongReply("a log-prob of the reply is NaN or infinite")
    return math.fsum(values)
