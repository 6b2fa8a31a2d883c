"""Every setting of a run, with the paper's symbol and the default beside it.

This file is the reference: `tpaw config show RECIPE` and `tpaw config schema` print what stands
here. `files.py` reads and writes YAML, `messages.py` words the errors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

from tpaw.config.files import load_tree
from tpaw.config.messages import validate_as
from tpaw.team import Newest

Scalar = TypeVar("Scalar")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_strings(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _as_tuple(value)


# One value for all iterations, or a list with one value for each.
PerIteration = Annotated[Scalar | tuple[Scalar, ...], BeforeValidator(_as_tuple)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_as_strings)]

# What a baseline has no use for; a value other than the default is refused rather than ignored.
_OF_SELF_PLAY: Mapping[str, tuple[str, ...]] = {
    "team": ("opponents", "main_players"),
    "objective": ("lambda_", "eta", "gamma", "min_player_weight", "target_weight", "player_weight"),
    "train": ("group_by_prompt", "weights"),
}

# `json_schema_extra` of a setting that may change when a run goes on: it decides how the work is
# cut up or what is shown, and changes results by no more than rounding.
CHANGEABLE: JsonDict = {"changeable": True}


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


class ModelConfig(Section):
    """θ_0 and how models are loaded."""

    path: str = Field(
        json_schema_extra=CHANGEABLE,  # the weights are known by their fingerprint
        description="θ_0, the SFT model: a folder, a hub id, or tpaw://starter/model. "
        "Any decoder-only model of transformers.",
    )
    revision: str | None = Field(
        None, json_schema_extra=CHANGEABLE, description="Branch, tag or commit of a hub id."
    )
    eos_token: str | None = Field(
        None,
        description="The token that ends a response, where it is not the tokenizer's own "
        "(e.g. <|im_end|> for a Qwen base model tuned on chats).",
    )
    attn_implementation: str | None = Field(
        None,
        description="sdpa, eager, flash_attention_2, …; default: what transformers chooses. With "
        "sdpa, rows are packed where the model allows it; any other has one sequence a row.",
    )
    trust_remote_code: bool = Field(
        False, description="Run code that comes with the model. Only for models you trust."
    )


class TeamConfig(Section):
    """Who plays, as rules over the history of checkpoints."""

    opponents: Newest = Field(
        Newest(last=3), description="Whose responses are played against: the newest N_max."
    )
    main_players: Newest = Field(
        Newest(last=3), description="Who are the reference models: the newest N_max."
    )


class ObjectiveConfig(Section):
    """Equations 2 to 8."""

    model_config = ConfigDict(populate_by_name=True)

    lambda_: PerIteration[Annotated[float, Field(gt=0)]] = Field(
        0.1, alias="lambda", description="λ > 0: scale of every implicit reward (TRL's beta)."
    )
    eta: float = Field(
        6.0, ge=1, description="η ≥ 1: target weight where the target's reward is not positive."
    )
    gamma: float = Field(0.5, ge=0, description="γ ≥ 0: sharpness of the player weights.")
    min_player_weight: float = Field(
        0.01, ge=0, lt=1, description="Player weights below it become 0, the rest sum to 1."
    )
    target_weight: Literal["adaptive", "one"] = Field(
        "adaptive", description="α_j: adaptive as equation 4, or always one (w/o TRW)."
    )
    player_weight: Literal["softmax", "uniform"] = Field(
        "softmax", description="β_j: softmax as equation 7, or uniform (w/o MPW)."
    )


class GenerateConfig(Section):
    """How the newest checkpoint answers; SPIN's sampling, as the paper states none."""

    temperature: float = Field(1.0, gt=0, description="SamplingParams temperature.")
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; 1 is off.")
    top_k: int = Field(0, ge=0, description="Sample among the k likeliest tokens; 0 is off.")
    max_new_tokens: int = Field(1024, ge=1, description="Longest response, in tokens.")
    tokens_per_batch: int = Field(
        131072,
        ge=1,
        description="Tokens answered at a time, padding included: of prompts and of their longest "
        "possible answers, for which memory is kept. Lower it when memory is short.",
    )
    shard_size: int = Field(
        1024, ge=1, description="Prompts in a shard; a kill costs at most one shard."
    )


class ScoreConfig(Section):
    """How reference log-probs are computed; changes nothing but speed and rounding."""

    tokens_per_row: int = Field(
        8192,
        ge=1,
        json_schema_extra=CHANGEABLE,
        description="Tokens in one forward pass. Lower it when memory is short.",
    )
    shard_size: int = Field(
        8192, ge=1, description="Sequences in a shard; a kill costs at most one shard."
    )


class TrainConfig(Section):
    """One iteration's training."""

    learning_rate: PerIteration[Annotated[float, Field(gt=0)]] = Field(
        1e-6, description="Peak learning rate."
    )
    epochs: PerIteration[Annotated[int, Field(ge=1)]] = Field(2, description="Passes over D_O.")
    batch_size: int = Field(64, ge=1, description="Triples in an optimizer step.")
    tokens_per_row: int = Field(
        8192,
        ge=1,
        json_schema_extra=CHANGEABLE,
        description="Tokens in one forward pass. A batch is shared out to rows of about as many. "
        "Lower it when memory is short.",
    )
    group_by_prompt: bool = Field(
        False,
        description="Shuffle prompts instead of triples, so that prompt and target go through the "
        "model once for all opponents. A third to a half faster with three of them; but a batch "
        "then holds a third as many prompts, which learns less (docs/log.md).",
    )
    optimizer: str = Field(
        "rmsprop", description="Any optimizer of transformers' TrainingArguments.optim."
    )
    weights: Literal["fp32", "split"] = Field(
        "fp32",
        description="How weights are kept while they train. split: in two halves of 16 bits, with "
        "gradients and squared gradients in bf16. The update is fp32's at 8 bytes a parameter "
        "instead of 14, so that 8B parameters fit on one 80 GB card. The model computes with the "
        "upper half, its bf16 rounding; checkpoints are fp32. Needs precision bf16 and rmsprop.",
    )
    schedule: str = Field("cosine", description="Any of TrainingArguments.lr_scheduler_type.")
    warmup: float = Field(0.1, ge=0, lt=1, description="Share of the steps that warm up.")
    activation_checkpointing: bool = Field(
        False,
        json_schema_extra=CHANGEABLE,
        description="Recompute activations in the backward pass: less memory, a third more time.",
    )
    log_every: int = Field(
        10, ge=1, json_schema_extra=CHANGEABLE, description="Steps between lines of training.jsonl."
    )
    save_every: int = Field(
        100,
        ge=1,
        json_schema_extra=CHANGEABLE,
        description="Steps between saved training states; a kill costs at most as many.",
    )
    report_to: Strings = Field(
        (),
        json_schema_extra=CHANGEABLE,
        description="Trackers of transformers: wandb, tensorboard, mlflow, trackio, …",
    )
    training_arguments: Mapping[str, Any] = Field(
        {}, description="Anything else of transformers' TrainingArguments, by its own name."
    )

    @model_validator(mode="after")
    def _fits(self) -> TrainConfig:
        if self.weights == "split" and self.optimizer != "rmsprop":
            raise ValueError(
                f"weights split: optimizer {self.optimizer!r} cannot update them; it must be "
                "rmsprop, or weights fp32"
            )
        return self


class EvaluateConfig(Section):
    """What is measured after each iteration."""

    data: DataConfig | None = Field(
        None, description="Held-out rows, in any shape that `data` takes. Default: none."
    )
    exact_match: bool | None = Field(
        None,
        description="Greedy answers compared with the target's `#### answer`. "
        "Default: where every held-out target has one.",
    )
    max_new_tokens: int | None = Field(
        None, ge=1, description="Longest greedy answer. Default: generate.max_new_tokens."
    )


class RunConfig(Section):
    """A whole run. `RunConfig.load("file.yaml")` reads one; every field is documented here."""

    method: Literal["self_play", "sft", "dpo"] = Field(
        "self_play",
        description="self_play: Algorithm 1. sft, dpo: a baseline trained by TRL, each iteration "
        "from the newest checkpoint, on the targets or on preference data (λ is TRL's beta).",
    )
    model: ModelConfig
    data: DataConfig
    iterations: int = Field(4, ge=1, description="T: iterations; iteration i makes θ_i.")
    max_length: int = Field(2048, ge=2, description="Longest prompt plus response, in tokens.")
    team: TeamConfig = TeamConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    generate: GenerateConfig = GenerateConfig()
    score: ScoreConfig = ScoreConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of sampling and shuffling.")
    precision: Literal["fp32", "bf16"] = Field(
        "bf16",
        description="Type of the computation. The weights that the optimizer updates have the "
        "precision of fp32 whatever it is.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if there.")
    deterministic: bool = Field(
        False,
        description="Refuse kernels whose results vary from run to run. On one CPU process a run "
        "that was killed and resumed is then byte-identical to one that was not.",
    )

    @model_validator(mode="after")
    def _one_value_per_iteration(self) -> RunConfig:
        for key, value in self.per_iteration().items():
            if isinstance(value, tuple) and len(value) != self.iterations:
                raise ValueError(
                    f"{key} lists {len(value)} values ({list(value)}); give one, or one for each "
                    f"of the {self.iterations} iterations"
                )
        if self.train.weights == "split" and self.precision != "bf16":
            raise ValueError(
                f"train.weights split: the model computes with bf16 weights, so precision must be "
                f"bf16, not {self.precision}"
            )
        if self.generate.max_new_tokens >= self.max_length:
            raise ValueError(
                f"generate.max_new_tokens {self.generate.max_new_tokens} leaves no room for a "
                f"prompt; it must be less than max_length {self.max_length}"
            )
        players = min(self.team.main_players.last, self.iterations)
        if self.objective.min_player_weight * players > 1:
            raise ValueError(
                f"objective.min_player_weight {self.objective.min_player_weight}: with {players} "
                f"main players every weight could be below it; it must be at most 1/{players}"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> RunConfig:
        for name, fields in _OF_SELF_PLAY.items() if self.method != "self_play" else ():
            section = getattr(self, name)
            for field, info in ((f, type(section).model_fields[f]) for f in fields):
                is_beta = self.method == "dpo" and field == "lambda_"
                if not is_beta and getattr(section, field) != info.default:
                    raise ValueError(
                        f"{name}.{info.alias or field}: method {self.method} has no use for it; "
                        "leave it out"
                    )
        return self

    def per_iteration(self) -> dict[str, Any]:
        """The settings that take one value, or one for each iteration, by key."""
        return {
            "train.learning_rate": self.train.learning_rate,
            "train.epochs": self.train.epochs,
            "objective.lambda": self.objective.lambda_,
        }

    @classmethod
    def load(cls, *sources: str | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
        """Read YAML files or recipes by name. Later sources override earlier ones.

        Args:
            sources: a mapping stands for the content of a file.
            overrides: texts `section.key=value`; they override every source.

        Raises:
            InputError: naming the key path, the value and what is allowed.
        """
        return validate_as(cls, load_tree(sources, overrides))


def at_iteration(value: Scalar | tuple[Scalar, ...], t: int) -> Scalar:
    """The value for the iteration that trains θ_{t+1} from θ_t; t counts from 0."""
    return value[t] if isinstance(value, tuple) else value
