"""What every benchmark computes on: models of known shape with random weights, and random triples.

Lengths are drawn from lognormal distributions (sigma 0.55 of the logarithm) with means of 120
prompt, 280 target and 240 generated tokens, clipped so that prompt and response together stay
within 1,024 tokens. Token ids are uniform over the vocabulary without id 0, which pads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tpaw.data.token_ids import TokenIds, token_ids

MEAN_TOKENS = {"prompt": 120.0, "target": 280.0, "generated": 240.0}
SIGMA = 0.55
MAX_LENGTH = 1024


@dataclass(frozen=True)
class Shape:
    """A decoder's dimensions, as the published configurations name them.

    Attributes:
        head: size of a head; None for hidden / heads.
        experts: MLPs in a layer; all are counted as parameters.
        other: settings of the family's own.
    """

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool
    family: str = "qwen2"
    head: int | None = None
    experts: int = 1
    other: Mapping[str, Any] = field(default_factory=dict)

    @property
    def linear_parameters(self) -> int:
        """Weights of all matrices inside the layers; the head is counted apart."""
        head = self.head or self.hidden // self.heads
        attention = self.hidden * head * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate * self.experts)

    @property
    def parameters(self) -> int:
        """All weights but norms and biases."""
        return self.linear_parameters + self.hidden * self.vocab * (1 if self.tied else 2)

    def title(self, name: str) -> str:
        """Its name and size, for a table."""
        return f"{name} ({self.parameters / 1e6:,.1f} M parameters, vocabulary {self.vocab:,})"


SHAPES = {
    "tiny": Shape(64, 2, 4, 2, 128, 512, tied=True),
    "39m": Shape(512, 8, 8, 2, 1408, 32_000, tied=True),
    "100m": Shape(768, 12, 12, 4, 2048, 32_000, tied=True),
    "qwen2.5-1.5b": Shape(1536, 28, 12, 2, 8960, 151_936, tied=True),
    "llama-3.1-8b": Shape(4096, 32, 32, 8, 14_336, 128_256, tied=False, family="llama"),
    # Gemma 3 1B with every width and the vocabulary divided by 4, and 6 of its 26 layers. As there:
    # 4 heads to 1, 5 sliding layers to 1 full one, the window (for lengths are as they are).
    "gemma-3-small": Shape(
        288, 6, 4, 1, 1728, 65_536, tied=True, family="gemma3_text", head=64,
        other={"sliding_window": 512, "query_pre_attn_scalar": 64},
    ),
    # gpt-oss-20b with every width, the heads and the vocabulary divided by 8, 8 of its 32 experts
    # and 4 of its 24 layers. As there: the size of a head, 8 heads to 1, 4 experts for each token,
    # sinks, every second layer sliding, the window.
    "gpt-oss-small": Shape(
        360, 4, 8, 1, 360, 25_136, tied=False, family="gpt_oss", head=64, experts=8,
        other={"sliding_window": 128, "num_local_experts": 8, "num_experts_per_tok": 4},
    ),
}  # fmt: skip


class Triple(NamedTuple):
    """(x, y, y_gen) as token ids; `opponent` generated the last, 0 being the newest."""

    prompt: TokenIds
    target: TokenIds
    generated: TokenIds
    opponent: int = 0

    @property
    def tokens(self) -> int:
        """Useful tokens: the prompt once and both responses, no padding."""
        return len(self.prompt) + len(self.target) + len(self.generated)


class LogpsPair(NamedTuple):
    """Summed log-probs of every triple under every player, newest first; float64 (N, K)."""

    target_NK: NDArray[np.float64]
    generated_NK: NDArray[np.float64]


def shape_named(name: str, vocab: int | None = None, hidden: int | None = None) -> Shape:
    """A shape of `SHAPES`, with another vocabulary or width if given.

    Another width keeps the heads and scales the MLP along.
    """
    shape = SHAPES[name]
    if hidden is not None:
        intermediate = shape.intermediate * hidden // shape.hidden
        shape = replace(shape, hidden=hidden, intermediate=intermediate)
    return shape if vocab is None else replace(shape, vocab=vocab)


def make_model(
    shape: Shape,
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """A model of that shape with random weights, in evaluation mode."""
    sizes = {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": 4 * MAX_LENGTH,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        **({} if shape.head is None else {"head_dim": shape.head}),
        **shape.other,
    }
    config = AutoConfig.for_model(shape.family, **sizes)
    torch.manual_seed(seed)
    # Made where it will live: filling 8B weights on a CPU takes minutes.
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    finally:
        torch.set_default_dtype(default)
    return model.eval()


def perturb(model: PreTrainedModel, seed: int, relative: float = 0.02) -> PreTrainedModel:
    """The model itself, its weights moved by noise: a player that is close to the others."""
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            noise = torch.empty_like(weight).normal_(generator=generator)
            weight.add_(noise, alpha=relative * float(weight.std()))
    return model


def make_triples(
    prompts: int, opponents: int, vocab: int, seed: int = 0, length_scale: float = 1.0
) -> list[Triple]:
    """`opponents` triples a prompt, in an order shuffled once.

    The triples of a prompt share its prompt and target and differ in the generated response.
    """
    rng = np.random.default_rng(seed)
    triples: list[Triple] = []
    for _ in range(prompts):
        prompt = _ids(rng, "prompt", vocab, length_scale, MAX_LENGTH // 2)
        room = MAX_LENGTH - len(prompt)
        target = _ids(rng, "target", vocab, length_scale, room)
        for opponent in range(opponents):
            generated = _ids(rng, "generated", vocab, length_scale, room)
            triples.append(Triple(prompt, target, generated, opponent))
    return [triples[i] for i in rng.permutation(len(triples))]


def useful_tokens(triples: Sequence[Triple]) -> int:
    """See `Triple.tokens`."""
    return sum(triple.tokens for triple in triples)


def random_logps(triples: Sequence[Triple], players: int, vocab: int, seed: int = 0) -> LogpsPair:
    """Reference log-probs as a random model's would be, for timing a step without scoring."""
    rng = np.random.default_rng(seed)
    columns = []
    for kind in ("target", "generated"):
        lengths_N1 = np.array([[len(getattr(triple, kind))] for triple in triples])
        noise_NK = rng.normal(0.0, 1.0, (len(triples), players))
        columns.append(-math.log(vocab) * lengths_N1 + noise_NK)
    return LogpsPair(*columns)


def _ids(
    rng: np.random.Generator, kind: str, vocab: int, length_scale: float, longest: int
) -> TokenIds:
    mean = MEAN_TOKENS[kind] * length_scale
    # The mean of a lognormal is exp(mu + sigma²/2).
    drawn = rng.lognormal(math.log(mean) - SIGMA**2 / 2, SIGMA)
    length = int(np.clip(round(drawn), 1, longest))
    return token_ids(rng.integers(1, vocab, length))
