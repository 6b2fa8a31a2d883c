"""Generation with transformers' own `generate`, which supports every model but is slower."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
)

from tpaw.data.token_ids import TokenIds
from tpaw.generation.generator import SamplingParams
from tpaw.logprobs.packing import PromptGroup, assign_padded
from tpaw.models.finite import non_finite
from tpaw.runtime.progress import OnDone


def generate_in_batches(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    params: SamplingParams,
    batches: Sequence[Sequence[int]],
    seed: int,
    on_done: OnDone,
    *,
    use_cache: bool = True,
) -> list[list[int]]:
    """Generate batch by batch. A batch ends when its longest response ends.

    Args:
        prompts: int32 token ids.
        batches: positions in `prompts`, each exactly once; see `batches_of`.
        seed: seeds torch's global generator for the time of the call.
        on_done: called with the number of prompts of each finished batch. It may raise to stop the
            work.
        use_cache: if false, every step reads the whole sequence again.

    Returns:
        The emitted token ids, in the order of the prompts. They may continue after a stop token and
        beyond the limit of the prompt; `finish` cuts them.

    Raises:
        NonFiniteError: the model's logits are NaN or infinite.
    """
    emitted: dict[int, list[int]] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for batch in batches:
            chosen = [prompts[i] for i in batch]
            responses, _ = generate_padded(model, chosen, params, use_cache=use_cache)
            emitted.update(zip(batch, responses, strict=True))
            on_done(len(batch))
    return [emitted[i] for i in range(len(prompts))]


def batches_of(
    prompts: Sequence[TokenIds],
    params: SamplingParams,
    tokens_per_batch: int,
    *,
    of_equal_lengths: bool = False,
) -> Iterator[list[int]]:
    """Positions of the prompts of each batch, longest first, lengths as equal as possible.

    Args:
        tokens_per_batch: token budget of a batch: (prompt + longest response) × sequences.
        of_equal_lengths: only prompts of equal length share a batch.
    """
    by_length: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt) if of_equal_lengths else 0, []).append(i)
    for _, members in sorted(by_length.items(), reverse=True):
        lengths = [len(prompts[i]) + params.limit(prompts[i]) for i in members]
        for batch in assign_padded([PromptGroup.single(n) for n in lengths], tokens_per_batch):
            yield [members[i] for i in batch]


def generate_padded(
    model: PreTrainedModel,
    prompts: Sequence[TokenIds],
    params: SamplingParams,
    *,
    use_cache: bool = True,
    keep_logits: bool = False,
) -> tuple[list[list[int]], Tensor | None]:
    """Generate with one call of transformers' `generate`. Shorter prompts are padded.

    Args:
        use_cache: if false, every step reads the whole sequence again.
        keep_logits: whether to return the logits.

    Returns:
        The emitted token ids, and the logits of every step, (prompts, steps, vocabulary), or None.

    Raises:
        NonFiniteError: the model's logits are NaN or infinite.
    """
    longest = max(map(len, prompts))
    input_ids = torch.zeros((len(prompts), longest), dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    # Pad on the left: `generate` appends the responses on the right.
    for line, prompt in enumerate(prompts):
        input_ids[line, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[line, longest - len(prompt) :] = 1
    is_greedy = params.temperature == 0
    config = GenerationConfig(
        do_sample=not is_greedy,
        temperature=None if is_greedy else params.temperature,
        top_p=None if is_greedy else params.top_p,
        top_k=None if is_greedy else params.top_k,
        max_new_tokens=max(params.limit(prompt) for prompt in prompts),
        eos_token_id=list(params.stop_token_ids) or None,
        pad_token_id=0,  # `finish` removes it, because it only follows a stop token
        use_cache=use_cache,
        output_logits=keep_logits,
        return_dict_in_generate=True,
    )
    check = _FiniteCheck()
    with torch.inference_mode():
        if longest == 1:
            # RecurrentGemma keeps a state in its modules, and takes a single token for the
            # continuation of what it read last. A pass without a cache clears the state.
            model(input_ids=input_ids.new_zeros((1, 2)).to(model.device), use_cache=False)
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([check]),
        )
    emitted = list(output.sequences[:, longest:].tolist())
    if bool(check.has_failed):
        raise non_finite(model, "logits")
    return emitted, torch.stack(output.logits, 1) if keep_logits else None


class _FiniteCheck(LogitsProcessor):  # type: ignore[misc]
    """Notes rows of logits that are NaN or infinite, and replaces them.

    The note stays on the device, so no step waits for it. Without the replacement, sampling on a
    GPU would end the process's use of the device.
    """

    def __init__(self) -> None:
        self.has_failed: Tensor | bool = False

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # -inf for some tokens is allowed; the largest logit must be finite.
        failed_N1 = ~scores.amax(-1, keepdim=True).isfinite()
        self.has_failed = failed_N1.any() | self.has_failed
        return scores.masked_fill(failed_N1, 0.0)
