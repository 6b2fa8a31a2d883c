"""Settings of the data: where rows come from and which columns are read. Part of `config.py`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of the file: strict types, no unknown keys, frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_COLUMNS = (
    {"prompt", "target"},
    {"messages"},
    {"chosen", "rejected"},
    {"prompt", "chosen", "rejected"},
)


class Columns(Section):
    """Names of the columns to read, one of `_COLUMNS`."""

    prompt: str | None = Field(None, description="Column of the prompt's text (or messages).")
    target: str | None = Field(None, description="Column of the target's text (or messages).")
    messages: str | None = Field(None, description="Column of a list of role/content messages.")
    chosen: str | None = Field(
        None,
        description="Column of the preferred answer: text, a message, or a conversation, which "
        "may bring the prompt along. It is the target.",
    )
    rejected: str | None = Field(None, description="Column of the answer that is not preferred.")

    @model_validator(mode="after")
    def _one_way(self) -> Columns:
        if {name for name, column in self if column is not None} not in _COLUMNS:
            raise ValueError(
                "give prompt and target, or messages alone, or chosen and rejected with or "
                "without prompt"
            )
        return self


class DataConfig(Section):
    """Where rows come from and how they become prompt and target."""

    path: str = Field(
        description="A json, jsonl, parquet, csv or arrow file, a folder of datasets' "
        "save_to_disk, a hub id, or tpaw://starter/train.jsonl."
    )
    split: str = Field("train", description="Split of a hub id; slices such as train[:50000] work.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id.")
    columns: Columns | None = Field(
        None,
        description="Columns to read. Default, the first that fits: chosen/rejected with prompt or "
        "conversations or alone, prompt/completion, messages, conversations (ShareGPT), "
        "instruction/input/output (Alpaca), question/answer (GSM8K).",
    )
    turn: Literal["first", "last"] = Field(
        "first",
        description="Of a conversation: the first round (as the paper), or everything up to the "
        "last assistant turn.",
    )
    template: Literal["auto", "chat", "none"] = Field(
        "auto",
        description="The tokenizer's chat template. auto: for messages always, for a plain "
        "prompt/completion never (as TRL), for the other shapes where there is one. none: the "
        "text as it stands.",
    )
    limit: int | None = Field(None, ge=1, description="Read only the first rows. Default: all.")
    max_skipped: float = Field(
        0.01, ge=0, le=1, description="Share of rows that may be unusable before it is an error."
    )
