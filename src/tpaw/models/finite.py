"""Name the cause when a player's logits or log-probs are NaN or infinite."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tpaw.errors import NonFiniteError

if TYPE_CHECKING:
    import torch


def non_finite(model: torch.nn.Module, what: str) -> NonFiniteError:
    """Build the error for a model whose numbers are NaN or infinite. It reads every weight.

    Args:
        model: a model of transformers, or one that PEFT has wrapped. The error names the folder
            that it was loaded from.
        what: what is not finite, for example "logits".
    """
    name = getattr(model, "name_or_path", "") or type(model).__name__
    damaged = next((n for n, p in model.named_parameters() if not bool(p.isfinite().all())), None)
    if damaged is not None:
        return NonFiniteError(
            f"{name}: the model's {what} are NaN or infinite, because its weight {damaged} is; "
            "restore the model or use another one"
        )
    return NonFiniteError(
        f"{name}: the model's {what} are NaN or infinite, though its weights are finite: its "
        "activations overflow; set precision to fp32, or use another model"
    )
