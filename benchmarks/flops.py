"""The arithmetic of a decoder, counted from its shape: the floor under every timing.

A multiplication and its addition are 2 FLOPs. For a prompt of P tokens with responses of R_1 … R_n
tokens, which share it,

    T        = P + ΣR_i                                     tokens
    linear   = 2 · T · (weights of the matrices in the layers)
    keys     = P(P+1)/2 + Σ(R_i·P + R_i(R_i+1)/2)            query-key pairs that are not masked
    attention= 4 · layers · heads · head size · keys        QKᵀ and the product with V
    head     = 2 · hidden · vocabulary · ΣR_i               at positions that predict a response
    forward  = linear + attention + head

A training step is 3 forwards: the backward computes a gradient by each matrix and one by its
input. These are the MODEL FLOPs. The HARDWARE FLOPs add what activation checkpointing computes a
second time: the layers' forward, without the last matrix of each, whose result no gradient needs
(torch stops before it). Norms, activations, softmax, embeddings, biases and the optimizer are not
counted, nor is what a fused attention or a head without logits recomputes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from workload import Shape, Triple

# A row: tokens of the prompt, and tokens of each response that shares it.
Row = tuple[int, Sequence[int]]


def forward_flops(shape: Shape, rows: Iterable[Row]) -> float:
    """FLOPs of one forward over these rows."""
    rows = list(rows)
    return layer_flops(shape, rows) + head_flops(shape, rows)


def layer_flops(shape: Shape, rows: Iterable[Row]) -> float:
    """Of a forward, the part inside the layers: linear and attention."""
    linear = keys = 0
    for prompt, responses in rows:
        linear += 2 * shape.linear_parameters * (prompt + sum(responses))
        keys += visible_keys(prompt, responses)
    return float(linear + attention_flops(shape, keys))


def head_flops(shape: Shape, rows: Iterable[Row]) -> float:
    """Of a forward, the head's part."""
    return float(sum(2 * shape.hidden * shape.vocab * sum(responses) for _, responses in rows))


def attention_flops(shape: Shape, keys: int) -> int:
    """FLOPs of attention over so many pairs of a query and a key that it sees."""
    return 4 * shape.layers * shape.hidden * keys


def visible_keys(prompt: int, responses: Sequence[int]) -> int:
    """Pairs of a query and a key that the query sees: its prompt and its own past."""
    own = sum(length * prompt + length * (length + 1) // 2 for length in responses)
    return prompt * (prompt + 1) // 2 + own


def training_flops(shape: Shape, rows: Iterable[Row], *, recomputed: bool = False) -> float:
    """FLOPs of forward and backward over these rows.

    Args:
        recomputed: count what activation checkpointing computes again: hardware FLOPs.
    """
    rows = list(rows)
    again = 0.0
    if recomputed:
        tokens = sum(prompt + sum(responses) for prompt, responses in rows)
        last_matrix = 2 * shape.layers * shape.hidden * shape.intermediate * tokens
        again = layer_flops(shape, rows) - last_matrix
    return 3 * forward_flops(shape, rows) + again


def shared_rows(triples: Iterable[Triple]) -> list[Row]:
    """A row a triple, the prompt computed once: the floor of training."""
    return [(len(t.prompt), (len(t.target), len(t.generated))) for t in triples]
