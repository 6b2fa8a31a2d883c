"""What a run starts from: examples, held-out examples and the tokenizer, checked and kept.

Once they are published, the run directory holds all of it, and the sources are not read again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tpaw.config.schema import RunConfig
from tpaw.data.examples import Example, read_examples, write_examples
from tpaw.models.tokenizers import load_tokenizer
from tpaw.storage.artifacts import publishing, read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Inputs(NamedTuple):
    """Everything a run reads from outside but the weights of θ_0.

    Attributes:
        examples: the SFT rows, or the preference pairs.
        heldout: rows to evaluate on; may be empty.
        skipped: of both files, how many rows could not be used, by reason.
        tokenizer: of θ_0, with `model.eos_token` applied.
        stop_ids: any of them ends a response.
    """

    examples: list[Example]
    heldout: list[Example]
    skipped: Mapping[str, Mapping[str, int]]
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]

    def described(self) -> str:
        """One line on what there is and what was left out."""
        skipped = {key: dict(reasons) for key, reasons in self.skipped.items() if reasons}
        return (
            f"{len(self.examples):,} examples, {len(self.heldout):,} held out; "
            f"skipped: {json.dumps(skipped) if skipped else 'none'}; "
            f"held-out prompts that are trained on: {self.heldout_prompts_in_training()}"
        )

    def first_rows(self) -> list[str]:
        """The first row of each file as the model sees it, for people to look at."""
        rows = [("data", self.examples), ("evaluate.data", self.heldout)]
        shown = []
        for key, examples in rows:
            if examples:
                example = examples[0]
                parts = {"prompt": example.prompt_ids, "target": example.target_ids}
                if example.rejected_ids is not None:
                    parts["rejected"] = example.rejected_ids
                texts = {name: self.tokenizer.decode(ids.tolist()) for name, ids in parts.items()}
                lines = [f"\n  {name} {text!r}" for name, text in texts.items()]
                shown.append(f"first row of {key}:{''.join(lines)}")
        return shown

    def heldout_prompts_in_training(self) -> int:
        """How many held-out rows ask what a training row asks."""
        known = {example.prompt_ids.tobytes() for example in self.examples}
        return sum(example.prompt_ids.tobytes() in known for example in self.heldout)


def publish_inputs(folder: Path, inputs: Inputs) -> None:
    """Keep the inputs in the run directory."""
    meta = {
        "stop_ids": list(inputs.stop_ids),
        "skipped": inputs.skipped,
        "rows": len(inputs.examples),
        "heldout_rows": len(inputs.heldout),
        "heldout_prompts_in_training": inputs.heldout_prompts_in_training(),
    }
    with publishing(folder, meta) as temporary:
        write_examples(temporary / "train.parquet", inputs.examples)
        write_examples(temporary / "heldout.parquet", inputs.heldout)
        inputs.tokenizer.save_pretrained(str(temporary / "tokenizer"))


def load_inputs(folder: Path, config: RunConfig) -> Inputs:
    """Read what `publish_inputs` kept."""
    manifest = read_manifest(folder)
    return Inputs(
        read_examples(folder / "train.parquet"),
        read_examples(folder / "heldout.parquet"),
        manifest["skipped"],
        load_tokenizer(config.model, str(folder / "tokenizer")),
        tuple(manifest["stop_ids"]),
    )
