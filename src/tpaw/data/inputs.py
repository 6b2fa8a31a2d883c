"""The inputs of a run: examples, held-out examples and the tokenizer.

A run publishes its inputs when it begins. From then on it reads the published inputs and never the
data files again.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tpaw.config.schema import RunConfig
from tpaw.data.chat_template import around_a_user_turn
from tpaw.data.examples import Examples, described_skips, read_examples, write_examples
from tpaw.models.tokenizers import load_tokenizer
from tpaw.storage.artifacts import publishing, read_manifest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Inputs(NamedTuple):
    """Everything that a run reads from outside, except the weights of θ_0.

    Attributes:
        examples: the training examples, or the preference pairs of method dpo.
        heldout: the examples to evaluate on; may be empty.
        skipped: `data` and `evaluate.data`, each to the number of skipped records by reason.
        tokenizer: the tokenizer of θ_0, with `model.eos_token` applied.
        stop_ids: the token ids that end a response.
    """

    examples: Examples
    heldout: Examples
    skipped: Mapping[str, Mapping[str, int]]
    tokenizer: PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Number of tokens of all examples: prompts, targets and rejected responses."""
        return sum(
            len(ids.flat)
            for part in (self.examples, self.heldout)
            for ids in (part.prompt_ids, part.target_ids, part.rejected_ids)
            if ids is not None
        )

    def described(self) -> str:
        """One line for display: the number of examples, of skipped records and of duplicates."""
        skipped = described_skips_by_source(self.skipped)
        duplicates = ", ".join(f"{n:,} in {key}" for key, n in self.duplicates().items() if n)
        return (
            f"{len(self.examples):,} examples, {len(self.heldout):,} held out; "
            f"skipped: {skipped}; duplicates: {duplicates or 'none'}; "
            f"held-out prompts in the training data: {self.heldout_prompts_in_training()}"
        )

    def first_rows(self) -> list[str]:
        """The first example of each data set, decoded from its token ids, for display."""
        shown = []
        for key, examples in (("data", self.examples), ("evaluate.data", self.heldout)):
            if examples:
                example = examples[0]
                parts = {"prompt": example.prompt_ids, "target": example.target_ids}
                if example.rejected_ids is not None:
                    parts["rejected"] = example.rejected_ids
                texts = {name: self.tokenizer.decode(ids.tolist()) for name, ids in parts.items()}
                lines = [f"\n  {name} {text!r}" for name, text in texts.items()]
                shown.append(f"first example of {key}:{''.join(lines)}")
        return shown

    def duplicates(self) -> dict[str, int]:
        """`data` and `evaluate.data`, each to the number of examples that equal an earlier one."""
        return {
            key: len(examples) - len(np.unique(Examples.of(examples).content_keys))
            for key, examples in (("data", self.examples), ("evaluate.data", self.heldout))
        }

    def heldout_prompts_in_training(self) -> int:
        """Number of held-out examples whose prompt is also a training prompt."""
        training, heldout = (Examples.of(e).prompt_keys for e in (self.examples, self.heldout))
        return int(np.isin(heldout, training).sum())


def described_skips_by_source(skipped: Mapping[str, Mapping[str, int]]) -> str:
    """How many records of `data` and of `evaluate.data` were skipped, and why."""
    found = (f"in {key} {described_skips(reasons)}" for key, reasons in skipped.items() if reasons)
    return ", ".join(found) or "none"


def publish_inputs(folder: Path, inputs: Inputs) -> None:
    """Publish the inputs as an artifact.

    Args:
        folder: the artifact to publish.
        inputs: the inputs of the run.
    """
    meta = {
        "stop_ids": list(inputs.stop_ids),
        "skipped": inputs.skipped,
        "duplicates": inputs.duplicates(),
        "rows": len(inputs.examples),
        "heldout_rows": len(inputs.heldout),
        "tokens": inputs.tokens,
        "around_prompts": around_a_user_turn(inputs.tokenizer),
        "heldout_prompts_in_training": inputs.heldout_prompts_in_training(),
    }
    with publishing(folder, meta) as temporary:
        write_examples(temporary / "train.parquet", inputs.examples)
        write_examples(temporary / "heldout.parquet", inputs.heldout)
        inputs.tokenizer.save_pretrained(str(temporary / "tokenizer"))


def first_prompt(folder: Path) -> str:
    """The text of the first training prompt of published inputs, as the model reads it.

    Args:
        folder: the artifact that `publish_inputs` wrote.
    """
    from pyarrow.parquet import ParquetFile

    with ParquetFile(folder / "train.parquet") as file:
        return str(next(file.iter_batches(1, columns=["prompt"]))["prompt"][0].as_py())


def load_inputs(folder: Path, config: RunConfig) -> Inputs:
    """Read published inputs.

    Args:
        folder: the artifact that `publish_inputs` wrote.
        config: the configuration of the run.
    """
    manifest = read_manifest(folder)
    return Inputs(
        read_examples(folder / "train.parquet"),
        read_examples(folder / "heldout.parquet"),
        manifest["skipped"],
        load_tokenizer(config.model, str(folder / "tokenizer")),
        tuple(manifest["stop_ids"]),
    )
