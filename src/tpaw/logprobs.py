"""The one place that computes log π(y|x). Scoring and training both call it.

Shape suffixes: B rows, L tokens in a row, T response tokens in the batch, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def response_logps(model: nn.Module, input_ids_BL: Tensor, response_mask_BL: Tensor) -> Tensor:
    """log π(y|x): the sum over response tokens, end-of-sequence included where there is one.

    The model is entered by its own forward, so that DDP, FSDP and DeepSpeed see the call.

    Args:
        model: a causal language model of transformers, wrapped or not.
        input_ids_BL: int64, rows as `layout.pad_rows` makes them.
        response_mask_BL: bool, true on response tokens; never on the first token of a row.

    Returns:
        float64 of shape (B,), natural logs; differentiable. A row without response tokens is 0.
    """
    logits_BLV = model(input_ids=input_ids_BL, use_cache=False).logits
    # The logits at a token predict the next one.
    is_response_BL = response_mask_BL[:, 1:]
    logits_TV = logits_BLV[:, :-1][is_response_BL].float()
    labels_T = input_ids_BL[:, 1:][is_response_BL]
    logps_T = -F.cross_entropy(logits_TV, labels_T, reduction="none")
    # Summed in float64: rewards are small differences of these sums.
    logps_BL = torch.zeros(is_response_BL.shape, dtype=torch.float64, device=logps_T.device)
    logps_BL[is_response_BL] = logps_T.double()
    return logps_BL.sum(dim=1)
