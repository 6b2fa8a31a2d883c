"""What the first step of self-play is made of: its gradient beside that of SFT on the same rows.

    python benchmarks/first_gradient.py runs/starter [--batch 64] [--eta 1 2 4 6 8 10]

At θ_0 every reward is 0 and every target weight η, so the gradient of the loss is
−λ/2 · (η ∇log π(y|x) − ∇log π(y_gen|x)). The second term has the mean 0 over what the policy
samples at temperature 1 (the score function's), the first is SFT's; so the expected gradient is
SFT's, times λη/2, and what differs is noise. The run must have answered its prompts (iteration 1).
For small models: the gradients of all batches are held.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from common import print_table, spread
from torch import Tensor
from torch.nn.functional import cosine_similarity, cross_entropy
from torch.nn.utils.rnn import pad_sequence

from tpaw.data.inputs import load_inputs
from tpaw.generation.responses import read_responses
from tpaw.models.loading import load_model
from tpaw.models.references import find_checkpoint
from tpaw.storage.run_directory import RunDirectory

IGNORED = -100
Ids = npt.NDArray[np.int32]


def main(argv: Sequence[str] | None = None) -> int:
    """Read the run, and print how close the two gradients are."""
    options_of = argparse.ArgumentParser(description=__doc__)
    options_of.add_argument("run")
    options_of.add_argument("--batch", type=int, default=64)
    options_of.add_argument("--eta", type=float, nargs="+", default=[1, 2, 4, 6, 8, 10])
    options = options_of.parse_args(argv)
    run = RunDirectory(options.run)
    prompts = {e.id: e for e in load_inputs(run.inputs, run.load_config()).examples}
    answers = read_responses(run.responses(1))
    start = find_checkpoint(f"{options.run}@0")
    model = load_model(start.player, start.model, dtype=torch.float32, device=torch.device("cpu"))

    of_targets, of_answers = [], []
    for first in range(0, len(answers) - options.batch + 1, options.batch):
        batch = answers[first : first + options.batch]
        triples = [(prompts[answer.example_id], answer) for answer in batch]
        of_targets.append(gradient(model, [(e.prompt_ids, e.target_ids) for e, _ in triples]))
        of_answers.append(gradient(model, [(e.prompt_ids, a.token_ids) for e, a in triples]))
    sft_BP, generated_BP = torch.stack(of_targets), torch.stack(of_answers)
    rows = []
    for eta in options.eta:
        step_BP = eta * sft_BP - generated_BP
        of_batches = spread(cosine_similarity(step_BP, sft_BP).tolist())
        of_all = cosine_similarity(step_BP.mean(0), sft_BP.mean(0), dim=0)
        rows.append([f"{eta:g}", of_batches.text(), f"{of_all:.3f}"])
    print_table(
        "cosine with SFT's gradient",
        ["η", f"a batch of {options.batch}", f"all {len(sft_BP)} batches"],
        rows,
    )
    return 0


def gradient(model: torch.nn.Module, pairs: Sequence[tuple[Ids, Ids]]) -> Tensor:
    """∇ of the mean over the pairs of log π(response | prompt), of all parameters in one row."""
    ids = [torch.tensor([*prompt, *response]) for prompt, response in pairs]
    labels = [torch.tensor([IGNORED] * len(p) + list(r)) for p, r in pairs]
    # Padded on the right and causal: no real token sees padding.
    logits_BTV = model(pad_sequence(ids, batch_first=True), use_cache=False).logits
    labels_BT = pad_sequence(labels, batch_first=True, padding_value=IGNORED)
    loss = cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1), labels_BT[:, 1:].flatten(), reduction="sum"
    )
    found = torch.autograd.grad(-loss / len(pairs), list(model.parameters()))
    return torch.cat([part.flatten() for part in found]).double()


if __name__ == "__main__":
    sys.exit(main())
