"""Every setting of a run: its type, its default and its description.

This file is the reference for settings. `tpaw config show CONFIG` prints each description as a
comment, and `tpaw config schema` prints the JSON schema. `files.py` reads and writes YAML.
`messages.py` turns validation errors into messages.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from tpaw.config.chosen import Chosen, refusal
from tpaw.config.files import load_tree
from tpaw.config.messages import nearest, validate_as
from tpaw.config.methods import imported, method_names, settings_of
from tpaw.errors import brief, printable, public_url
from tpaw.objectives.base import NamedObjective, ObjectiveNeeds
from tpaw.team import RULES, Newest, Rule, rule_keys

Scalar = TypeVar("Scalar")


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_strings(value: Any) -> Any:
    return (value,) if isinstance(value, str) else _as_tuple(value)


# One value for all iterations, or a list with one value for each iteration.
PerIteration = Annotated[Scalar | tuple[Scalar, ...], BeforeValidator(_as_tuple)]
# Upper bounds find typing errors. A larger value would overflow, or the run would never end.
Count = Annotated[int, Field(ge=1, le=1_000_000_000)]
Rounds = Annotated[int, Field(ge=1, le=1_000)]
LARGEST = 1e6
EXACT_MATCH = "exact_match"
LOWEST_TEMPERATURE = 1e-5
LOWEST_SERVER_TEMPERATURE = 0.01
Positive = Annotated[float, Field(gt=0, le=LARGEST)]
Strings = Annotated[tuple[str, ...], BeforeValidator(_as_strings)]


def _can_divide(temperature: float) -> float:
    if 0 < temperature < LOWEST_TEMPERATURE:
        raise ValueError(
            f"{temperature}: must be 0, which is greedy, or at least {LOWEST_TEMPERATURE}, "
            "because a logit divided by less could overflow"
        )
    return temperature


Temperature = Annotated[float, Field(ge=0, le=1000), AfterValidator(_can_divide)]

# Settings that only a method with an objective over triples uses. For sft and dpo, and for critic
# by sft, a value other than the default is refused, because a setting without effect would mislead
# the user.
_OF_SELF_PLAY: Mapping[str, tuple[str, ...]] = {
    "team": ("opponents", "main_players"),
    "objective": ("lambda_", "eta", "gamma", "min_player_weight", "target_weight", "player_weight"),
    "data": ("chunks",),
    "generate": ("samples",),
    "train": ("group_by_prompt", "weights"),
}

# `json_schema_extra` of a setting that may change when a run is resumed. Such a setting controls
# memory, speed or display. It changes results by rounding at most; where it decides which random
# numbers a response gets, its description says so.
CHANGEABLE: JsonDict = {"changeable": True}


_SECRET = re.compile(r"(^|_)(token|api_?key|password|passwd|secret|credentials?)$", re.IGNORECASE)


class Section(BaseModel):
    """One section of the configuration: strict types, no unknown keys, immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


_COLUMNS = (
    {"prompt", "target"},
    {"messages"},
    {"chosen", "rejected"},
    {"prompt", "chosen", "rejected"},
)


class Columns(Section):
    """Names of the columns to read. Only the combinations in `_COLUMNS` are allowed."""

    prompt: str | None = Field(
        None, description="Column that holds the prompt, as text or as a list of messages."
    )
    target: str | None = Field(
        None, description="Column that holds the target, as text or as a list of messages."
    )
    messages: str | None = Field(
        None,
        description="Column that holds a conversation: a list of messages with role and content.",
    )
    chosen: str | None = Field(
        None,
        description="Column that holds the chosen response: text, a message, or a conversation. "
        "A conversation may include the prompt. TPAW uses the chosen response as the target.",
    )
    rejected: str | None = Field(
        None,
        description="Column that holds the rejected response, in the same form as chosen. Only "
        "method dpo trains on it.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> Columns:
        given = {name: column for name, column in self if column is not None}
        if given.keys() not in _COLUMNS:
            raise ValueError(
                f"{brief(given)}: not a valid combination; give prompt and target, or messages "
                "alone, or chosen and rejected with or without prompt"
            )
        return self


class DataConfig(Section):
    """Which records to read, and how to turn each record into a prompt and a target."""

    path: str = Field(
        description="Where the records are: a .json, .jsonl, .ndjson, .parquet, .csv or .arrow "
        "file; a folder that the method save_to_disk of the library datasets wrote; the id of a "
        "dataset on the Hugging Face Hub, or a folder with a copy of it; or "
        "tpaw://starter/train.jsonl."
    )
    name: str | None = Field(
        None,
        description="Configuration of a Hub dataset that has several, such as main for "
        "openai/gsm8k. It has no effect on a single file or a saved dataset.",
    )
    split: str = Field(
        "train",
        description="Split of a Hub dataset or of a saved DatasetDict. A Hub dataset also takes a "
        "slice such as train[:50000]. It has no effect on a single file.",
    )
    revision: str | None = Field(
        None,
        description="Branch, tag or commit of a Hub dataset. Default: the main branch. It has no "
        "effect on local files.",
    )
    columns: Columns | None = Field(
        None,
        description="Names of the columns to read. Default: TPAW looks for the following columns "
        "and uses the first set that the records have: chosen and rejected (with prompt or "
        "conversations, or alone); prompt and completion; messages; conversations (ShareGPT); "
        "instruction, input and output (Alpaca); question and answer (GSM8K).",
    )
    turn: Literal["first", "last"] = Field(
        "first",
        description="Which assistant turn of a conversation is the target. first: the first "
        "assistant turn, as in the paper. last: the last assistant turn; the prompt is every turn "
        "before it. It applies to the columns messages and conversations. It has no effect on "
        "other columns.",
    )
    template: Literal["auto", "chat", "none"] = Field(
        "auto",
        description="When to apply the tokenizer's chat template. auto: always to conversations; "
        "never to the columns prompt and completion if they hold text (as TRL does); to all other "
        "text if the tokenizer has a chat template. chat: always. none: never; the tokenizer "
        "reads the plain text.",
    )
    limit: Count | None = Field(
        None,
        description="Read only this many records, from the first on. Default: all. Of a Hub "
        "dataset, or a folder with a copy of one, the library datasets still prepares the whole "
        "split in its cache, once.",
    )
    max_skipped: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Largest share of records that TPAW may skip because they are unusable, for "
        "example longer than max_length. If more records are unusable, the run is refused.",
    )
    chunks: Rounds = Field(
        1,
        description="Divide the examples into this many parts of one shuffle; iteration i uses "
        "part i alone, and after the last part the first again (IRFT). So an iteration is as many "
        "times smaller. It needs team.opponents {last: 1}. 1: every iteration uses all examples. "
        "It has no effect on held-out records.",
    )


class AdapterConfig(Section):
    """A LoRA adapter of PEFT. The model below it, the base, never changes."""

    rank: int = Field(
        64, ge=1, le=65_536, description="Rank of the adapter: the inner size of A and B."
    )
    alpha: Positive | None = Field(
        None,
        description="The adapter adds alpha ÷ rank times BA to a weight, as in PEFT. Default: "
        "twice the rank.",
    )
    target_modules: Strings = Field(
        ("all-linear",),
        description="Layers that get an adapter: all-linear for every linear layer but the output "
        "head, or a list of the last parts of their names, such as [q_proj, v_proj].",
    )
    dropout: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Must be 0. An implicit reward compares the log-probs of two forward passes, "
        "so a forward pass must not be random.",
    )
    each_iteration: Literal["continue", "fresh"] = Field(
        "continue",
        description="continue: each iteration trains the same adapter further, so its rank stays. "
        "fresh: each iteration trains a new adapter of this rank on top of those before, which no "
        "longer change. A checkpoint is then one adapter: the exact concatenation of all of them. "
        "Its rank grows by `rank` in each iteration.",
    )

    @field_validator("dropout")
    @classmethod
    def _no_dropout(cls, dropout: float) -> float:
        if dropout != 0:
            raise ValueError(
                f"{dropout}: must be 0, because an implicit reward compares the log-probs of two "
                "forward passes, and dropout makes them random; remove the setting"
            )
        return dropout

    @property
    def scaling(self) -> float:
        """The factor of BA."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank

    @property
    def targets(self) -> str | list[str]:
        """`target_modules` in PEFT's form."""
        return "all-linear" if self.target_modules == ("all-linear",) else [*self.target_modules]


class ModelConfig(Section):
    """θ_0, and how to load every checkpoint."""

    path: str = Field(
        json_schema_extra=CHANGEABLE,  # a resumed run checks the model's fingerprint
        description="θ_0, the SFT model: a folder, a model id on the Hugging Face Hub, or "
        "tpaw://starter/model. It must be a decoder-only model that transformers can load, or a "
        "LoRA adapter of PEFT over one. Without `adapter`, such an adapter is merged into its "
        "base when it is loaded. With it, the same adapter is trained further.",
    )
    revision: str | None = Field(
        None,
        json_schema_extra=CHANGEABLE,
        description="Branch, tag or commit of a Hub model. Default: the main branch. It has no "
        "effect on a folder.",
    )
    eos_token: str | None = Field(
        None,
        description="The token that ends a response, if it differs from the tokenizer's "
        "end-of-sequence token. Example: <|im_end|> for a Qwen base model that was fine-tuned on "
        "conversations. Default: the tokenizer's token.",
    )
    attn_implementation: str | None = Field(
        None,
        description="Attention implementation of transformers: sdpa, eager, flash_attention_2, … "
        "Default: transformers chooses. Only sdpa supports sequence packing; any other value "
        "disables it, which makes training slower.",
    )
    trust_remote_code: bool = Field(
        False,
        description="Run the Python code that comes with the model. Set it to true only for a "
        "model whose authors you trust.",
    )
    allow_pickle: bool = Field(
        False,
        json_schema_extra=CHANGEABLE,
        description="Read weights from pickled files (pytorch_model.bin). A pickled file can run "
        "code when it is read, so set it to true only for a model whose authors you trust. "
        "safetensors files need no permission.",
    )
    adapter: AdapterConfig | None = Field(
        None,
        description="Train a LoRA adapter instead of all weights, and keep only adapters as "
        "checkpoints. It needs the extra `lora`. The adapter's weights are always fp32; with "
        "precision bf16 the base is bf16, in training, scoring and generation. `adapter: {}` uses "
        "the defaults. Default: null, which trains all weights.",
    )
    quantization: Literal["nf4"] | None = Field(
        None,
        description="nf4: hold the base in 4 bits (QLoRA, by bitsandbytes), in training, scoring "
        "and generation. It needs `adapter` and the extra `qlora`. Default: null.",
    )


def _rule_of(content: Mapping[str, Any]) -> type[Rule]:
    rules = rule_keys()
    given = [key for key in content if key in rules]
    if len(given) > 1:
        text = f"{brief(dict(content))}: several rules; give one of {', '.join(rules)}"
        raise refusal("", content, text)
    if content and not given:
        hint = nearest(str(next(iter(content))), list(rules))
        raise refusal("", content, f"{brief(dict(content))}: unknown rule{hint}")
    return rules[given[0]] if given else Newest


AnyRule = Annotated[SerializeAsAny[Rule], Chosen(_rule_of, lambda: RULES)]


class TeamConfig(Section):
    """Which checkpoints play. No effect on method sft or dpo, which refuse other values.

    A rule is one of `last: n`, `all: true`, `first_and_last: true`, `spaced: n` and
    `sampled: {count: n, seed: s}`. Each selects the newest checkpoint.
    """

    opponents: AnyRule = Field(
        Newest(last=3),
        description="Opponents: the checkpoints whose responses the policy learns to reject. "
        "D_O has one triple for each prompt and opponent, so more opponents mean more optimizer "
        "steps. One rule: last: n, all: true, first_and_last: true, spaced: n, or "
        "sampled: {count: n, seed: s}.",
    )
    main_players: AnyRule = Field(
        Newest(last=3),
        description="Main players: the reference models of the objective. Each one scores every "
        "sequence once. One rule, as for opponents. An objective with one reference takes "
        "{last: 1} alone, and an objective without references takes no such setting.",
    )


class ObjectiveConfig(NamedObjective):
    """Parameters of equations 2 to 8. Method sft uses none of them; method dpo uses lambda only."""

    model_config = ConfigDict(populate_by_name=True)

    name: Literal["tpaw"] = Field(
        "tpaw",
        description="The method: a file in tpaw/objectives, such as space, or the dotted name of a "
        "module of your own (docs/how-to/add-a-method.md). It decides which other settings this "
        "section has. tpaw: the paper's.",
    )

    lambda_: PerIteration[Positive] = Field(
        0.1,
        alias="lambda",
        description="λ > 0: scale of every implicit reward (TRL calls it beta). One value, or a "
        "list with one value for each iteration. The value of an iteration that has not begun to "
        "train may change when the run is resumed.",
    )
    eta: float = Field(
        6.0,
        ge=1,
        le=LARGEST,
        description="η ≥ 1: target weight of a triple whose target reward is not positive. A "
        "larger value prevents the targets from losing likelihood. It has no effect if "
        "target_weight is one.",
    )
    gamma: float = Field(
        0.5,
        ge=0,
        le=LARGEST,
        description="γ ≥ 0: how strongly the player weight depends on the margin; 0 gives uniform "
        "weights. It has no effect if player_weight is uniform or if there is one main player.",
    )
    min_player_weight: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="Player weights below this value become 0. The other weights are then scaled "
        "to sum to 1. It has no effect if player_weight is uniform.",
    )
    target_weight: Literal["adaptive", "one"] = Field(
        "adaptive",
        description="Target weight α_j. adaptive: equation 4. one: always 1 (the paper's ablation "
        "w/o TRW).",
    )
    player_weight: Literal["softmax", "uniform"] = Field(
        "softmax",
        description="Player weight β_j. softmax: equation 7. uniform: 1 divided by the number of "
        "main players (the paper's ablation w/o MPW).",
    )

    needs: ClassVar = ObjectiveNeeds(references="team")


def _objective_of(content: Mapping[str, Any]) -> type[NamedObjective]:
    name = content.get("name", "tpaw")
    return ObjectiveConfig if name == "tpaw" else settings_of(name)


def _objectives() -> list[type[NamedObjective]]:
    return [_objective_of({"name": name}) for name in method_names()]


# A method of somebody else has a dotted name.
_OTHER_OBJECTIVE: Mapping[str, Any] = {
    "type": "object",
    "required": ["name"],
    "properties": {"name": {"type": "string", "pattern": r"\.", "description": "A module."}},
}

AnyObjective = Annotated[
    SerializeAsAny[NamedObjective], Chosen(_objective_of, _objectives, _OTHER_OBJECTIVE)
]


# What a template of the section `generate.server` may contain in braces.
_OF_COMMAND = ("model", "adapter", "index", "port")
_OF_NAME = ("model", "index")


class ServerConfig(Section):
    """The servers of the backend server: OpenAI-compatible, with token ids (vLLM, SGLang).

    Set command or endpoints. If the servers need a key, set TPAW_SERVER_API_KEY in the environment.
    """

    command: str | None = Field(
        None,
        json_schema_extra=CHANGEABLE,
        description="Command that starts a server on this machine, without a shell. TPAW starts it "
        "for the newest checkpoint and ends it before training. {model}: the "
        "checkpoint's folder; with model.adapter, the base's. {port}: a free port; both are "
        "needed. {index}: t of θ_t. {adapter}: the checkpoint's folder with model.adapter; an "
        "argument with it is left out for θ_0, which has none. Example: "
        "vllm serve {model} --port {port} --host 127.0.0.1 --generation-config vllm. Write "
        "`env NAME=value` before it to set an environment variable.",
    )
    endpoints: Strings = Field(
        (),
        json_schema_extra=CHANGEABLE,
        description="Base URLs of servers that you run, such as http://gpu-7:8000/v1. They must "
        "serve the newest checkpoint; a run stops if they serve another model, and goes on with "
        "the same command once they serve this one. With model.adapter, vLLM with "
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING loads the adapter itself. Prompts of an endpoint that "
        "fails go to the others.",
    )
    model: str = Field(
        "{model}",
        json_schema_extra=CHANGEABLE,
        description="Name under which a server serves the checkpoint. {model}: the checkpoint's "
        "folder, which is the name that vLLM and SGLang use if they are given none. {index}: t of "
        "θ_t, as in theta-{index}.",
    )
    in_flight: Count = Field(
        256,
        json_schema_extra=CHANGEABLE,
        description="Largest number of requests that wait for a reply at a time, for each server. "
        "With launch.engine ray every worker may send as many, also to the same endpoint.",
    )
    logprobs: bool = Field(
        True,
        json_schema_extra=CHANGEABLE,
        description="Ask for the log-prob of each response token, and report how far the server's "
        "log-probs are from TPAW's. Training never uses them. Set it to false for a server that "
        "gives none.",
    )
    start_timeout: Positive = Field(
        1800.0,
        json_schema_extra=CHANGEABLE,
        description="Seconds that a server started by command may take to get ready. It has no "
        "effect on endpoints.",
    )
    request_timeout: Positive = Field(
        1800.0,
        json_schema_extra=CHANGEABLE,
        description="Seconds until the reply to a request must be complete, waiting time inside "
        "the server included.",
    )

    @field_validator("command")
    @classmethod
    def _can_be_filled(cls, command: str | None) -> str | None:
        if command is None:
            return None
        try:
            parts = shlex.split(command)
        except ValueError as error:
            raise ValueError(f"{brief(command)}: {str(error).lower()}") from None
        _check_placeholders(command, _OF_COMMAND)
        if not parts:
            raise ValueError(f"{brief(command)}: it names no program")
        for name in ("port", "model"):
            if f"{{{name}}}" not in command:
                raise ValueError(f"{brief(command)}: it must contain {{{name}}}")
        for part in parts:
            name = part.partition("=")[0].lstrip("-").replace("-", "_")
            if _SECRET.search(name):
                raise ValueError(
                    f"the option {printable(name)} cannot be in it: the configuration is stored in "
                    "the run directory; set the server's own variable in the environment, such as "
                    "VLLM_API_KEY"
                )
        return command

    @field_validator("model")
    @classmethod
    def _is_name(cls, model: str) -> str:
        _check_placeholders(model, _OF_NAME)
        return model

    @field_validator("endpoints")
    @classmethod
    def _are_urls(cls, endpoints: tuple[str, ...]) -> tuple[str, ...]:
        for url in endpoints:
            try:
                parts = urlsplit(url)
                is_url = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
            except ValueError:
                is_url = False
            if not is_url:
                raise ValueError(
                    f"{brief(public_url(url))}: not a URL; it must begin with http:// or https://"
                )
            if public_url(url) != url:
                raise ValueError(
                    f"{brief(public_url(url))}: a user name, a password or a query cannot be in "
                    "it: the configuration is stored in the run directory; set "
                    "TPAW_SERVER_API_KEY in the environment"
                )
        if len(set(endpoints)) < len(endpoints):
            raise ValueError(f"{brief(list(endpoints))}: an endpoint occurs twice")
        return endpoints


def _check_placeholders(template: str, known: Sequence[str]) -> None:
    for name in re.findall(r"{(\w*)}", template):
        if name not in known:
            allowed = ", ".join(f"{{{k}}}" for k in known)
            raise ValueError(f"{brief(template)}: {{{name}}} is not known; known: {allowed}")


class GenerateConfig(Section):
    """How the newest checkpoint generates responses.

    The paper states no sampling parameters; the defaults are those of SPIN's code. Methods sft and
    dpo generate responses only to evaluate held-out records.
    """

    backend: Literal["hf", "server"] = Field(
        "hf",
        json_schema_extra=CHANGEABLE,
        description="hf: the model in this process. server: an OpenAI-compatible server that takes "
        "and gives token ids, such as vLLM or SGLang (docs/how-to/vllm.md). A seed gives other "
        "responses from another backend. Published responses are kept. Benchmark suites use the "
        "model in this process with either.",
    )
    server: ServerConfig = ServerConfig()
    temperature: Temperature = Field(
        1.0,
        description="Sampling temperature. 0: greedy, always the likeliest token. Otherwise at "
        "least 1e-5, or 0.01 with the backend server. Values below 1 favour likely tokens. It has "
        "no effect on exact match, which decodes greedily.",
    )
    samples: int = Field(
        1,
        ge=1,
        le=1000,
        description="Responses to each prompt. D_O has a triple for each of them, so an iteration "
        "has as many times more steps. More than one needs a temperature above 0. Evaluation and "
        "`tpaw answer` generate one.",
    )
    top_p: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Nucleus sampling: sample from the likeliest tokens whose probabilities sum "
        "to top_p. 1 disables it.",
    )
    top_k: int = Field(
        0,
        ge=0,
        le=1_000_000_000,
        description="Sample from the k likeliest tokens. 0 disables the limit.",
    )
    max_new_tokens: Count = Field(
        1024,
        description="Longest response in tokens. It must be less than max_length. A response is "
        "also cut where prompt plus response reach max_length.",
    )
    tokens_per_batch: Count = Field(
        131072,
        json_schema_extra=CHANGEABLE,
        description="Token budget of a generation batch: (prompt + max_new_tokens) × sequences. "
        "Lower it if generation runs out of memory. It decides only memory use and speed, except "
        "for a model without continuous batching (a note names it): there, a seed gives other "
        "responses for another budget. Published responses are kept. It has no effect on a server.",
    )
    shard_size: Count = Field(
        1024,
        json_schema_extra=CHANGEABLE,  # responses that have begun keep their size
        description="Prompts in one shard of responses. TPAW publishes shard by shard, so a "
        "killed run loses at most one shard of work. The random numbers of a response depend on "
        "its place in its shard. When a run is resumed, another size applies to iterations whose "
        "generation has not begun.",
    )


class ScoreConfig(Section):
    """How to compute the log-probs of the main players. It changes results by rounding at most."""

    tokens_per_row: Count = Field(
        8192,
        json_schema_extra=CHANGEABLE,
        description="Token budget of one forward pass. It decides only memory use and speed. "
        "Lower it if scoring runs out of memory.",
    )
    shard_size: Count = Field(
        8192,
        description="Sequences in one shard of log-probs. TPAW publishes shard by shard, so a "
        "killed run loses at most one shard of work.",
    )
    sharded: bool = Field(
        False,
        json_schema_extra=CHANGEABLE,
        description="Spread each main player over all workers of launch.engine ray (FSDP2), for a "
        "model that does not fit on one device in fp32. Otherwise each worker holds a whole "
        "player, which is faster.",
    )


class CriticConfig(Section):
    """The critic of method critic: a classifier that learns to tell targets from responses."""

    path: str | None = Field(
        None,
        description="A classifier or encoder of transformers to start from: a folder, or an id on "
        "the Hugging Face Hub. With another vocabulary than the run's it reads text, with its "
        "own tokenizer. Default: a small encoder from scratch, which reads the run's token ids.",
    )
    lora_rank: Count | None = Field(
        None,
        description="Train a LoRA adapter of this rank on all linear layers of path, and a new "
        "head, instead of all weights. The path of the SFT model makes it its own critic. Needs "
        "the extra lora.",
    )
    layers: int = Field(
        2, ge=1, le=100, description="Layers of the small encoder. It has no effect with path."
    )
    width: int = Field(
        64,
        ge=32,
        le=8192,
        multiple_of=32,
        description="Width of the small encoder, a multiple of 32. It has no effect with path.",
    )
    steps: PerIteration[Count] = Field(
        2000,
        description="Optimizer steps of a fit, at most; patience may end it earlier. One value, or "
        "a list with one value for each iteration.",
    )
    learning_rate: Positive = Field(
        1e-3, description="Highest learning rate of the critic. It falls to 0 along a cosine."
    )
    weight_decay: float = Field(0.01, ge=0, le=10, description="Weight decay of the critic.")
    batch_size: Count = Field(
        64, description="Pairs of a target and a response in one step of the critic."
    )
    heldout: float = Field(
        0.2,
        gt=0,
        lt=1,
        description="Share of the prompts that the critic does not learn from. Half of them decide "
        "which weights are kept: those that order most pairs rightly. Its AUC is measured on the "
        "other half.",
    )
    evaluate_every: Count = Field(
        200, description="Steps of the critic between two evaluations on the held-out prompts."
    )
    patience: Count = Field(
        10,
        description="The fit ends after this many evaluations in a row without a gain.",
    )
    each_iteration: Literal["continue", "fresh"] = Field(
        "continue",
        description="continue: the critic of an iteration goes on from the one before. fresh: it "
        "starts anew.",
    )
    team: Count = Field(
        1,
        description="How many critics judge a response: those of the newest iterations. Earlier "
        "iterations, which have fewer, use all of them.",
    )
    agree: Literal["mean", "min"] = Field(
        "mean",
        description="The score of a response by several critics: their mean, or the least of them. "
        "Each critic's scores are standardised first.",
    )
    at_chance: Literal["stop", "go_on"] = Field(
        "stop",
        description="What to do if the 95 % interval of the critic's AUC contains 0.5, or if "
        "nothing shows that it knows more than how long targets are: stop the run, or go on.",
    )
    train_by: Literal["sft", "objective"] = Field(
        "sft",
        description="sft: SFT on the chosen responses, by TRL. objective: the section objective, "
        "with the chosen responses as targets against all others of the opponents.",
    )


class TrainConfig(Section):
    """How one iteration trains its policy."""

    learning_rate: PerIteration[Positive] = Field(
        1e-6,
        description="Peak learning rate. One value, or a list with one value for each iteration. "
        "The value of an iteration that has not begun to train may change when the run is resumed.",
    )
    epochs: PerIteration[Rounds] = Field(
        2,
        description="Passes over the triples of an iteration (D_O). One value, or a list with one "
        "value for each iteration. The value of an iteration that has not begun to train may "
        "change when the run is resumed.",
    )
    batch_size: Count = Field(
        64,
        description="Triples in one optimizer step. TPAW splits a batch into micro-batches, so "
        "this value does not change memory use.",
    )
    tokens_per_row: Count = Field(
        8192,
        json_schema_extra=CHANGEABLE,
        description="Token budget of one micro-batch, that is of one forward and backward pass. "
        "It decides only memory use and speed. Lower it if training runs out of memory.",
    )
    group_by_prompt: bool = Field(
        False,
        description="Shuffle prompts instead of triples. The model then computes prompt and "
        "target once for all opponents; training with three opponents is a third to a half "
        "faster. But a batch then contains a third as many prompts, and the model learns less "
        "(docs/log.md). Each epoch still contains every triple once.",
    )
    optimizer: str = Field(
        "rmsprop",
        description="Name of an optimizer, as in TrainingArguments.optim of transformers.",
    )
    weights: Literal["fp32", "split"] = Field(
        "fp32",
        description="How to store the weights during training. fp32: ordinary fp32 weights, 14 "
        "bytes a parameter with gradients and optimizer state. split: each fp32 weight is stored "
        "as two halves of 16 bits, and gradients and squared gradients are bf16; 8 bytes a "
        "parameter, so that a model of 8B parameters fits on one 80 GB GPU. The optimizer updates "
        "the full fp32 value. The model computes with the upper half, which is the weight rounded "
        "to bf16. Checkpoints are fp32. split needs precision bf16 and optimizer rmsprop.",
    )
    parallel: Literal["ddp", "fsdp2"] = Field(
        "ddp",
        json_schema_extra=CHANGEABLE,
        description="How the processes of launch.engine ray train together. ddp: each holds the "
        "whole model. fsdp2: each holds a part of weights, gradients and optimizer state; it needs "
        "GPUs. Both change results by rounding at most. It has no effect in one process.",
    )
    schedule: str = Field(
        "cosine",
        description="Learning rate schedule, as in TrainingArguments.lr_scheduler_type of "
        "transformers. Each iteration starts a new schedule.",
    )
    warmup: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="Share of an iteration's optimizer steps during which the learning rate rises "
        "from 0. A schedule without warmup ignores it.",
    )
    activation_checkpointing: bool = Field(
        False,
        json_schema_extra=CHANGEABLE,
        description="Recompute activations in the backward pass instead of storing them. Training "
        "needs less memory and takes about a third more time. Results do not change.",
    )
    log_every: Count = Field(
        10,
        json_schema_extra=CHANGEABLE,
        description="Optimizer steps between two lines of training.jsonl.",
    )
    save_every: Count = Field(
        100,
        json_schema_extra=CHANGEABLE,
        description="Optimizer steps between two saved training states. A killed run loses at "
        "most this many steps.",
    )
    report_to: Strings = Field(
        (),
        json_schema_extra=CHANGEABLE,
        description="Experiment trackers: tensorboard, wandb, mlflow, trackio. One name or a list "
        "of names. Each gets one run over all iterations. Default: none.",
    )
    training_arguments: Mapping[str, Any] = Field(
        {},
        description="Further TrainingArguments of transformers, by their own names. An argument "
        "is refused if another setting decides it or if TPAW cannot support it; the error names "
        "the setting or the reason.",
    )

    @field_validator("training_arguments")
    @classmethod
    def _no_secrets(cls, arguments: Mapping[str, Any]) -> Mapping[str, Any]:
        for name in _keys_within(arguments):
            if _SECRET.search(name):
                raise ValueError(
                    f"the key {printable(name)} cannot be set: the configuration is stored in the "
                    "run directory; set HF_TOKEN, or the tracker's own variable, in the environment"
                )
        return arguments


class LaunchConfig(Section):
    """Where the run computes: in one process, or on many devices and machines by Ray."""

    engine: Literal["in_process", "ray"] = Field(
        "in_process",
        json_schema_extra=CHANGEABLE,
        description="in_process: everything in the process of `tpaw run`, on one device. ray: "
        "generation, scoring and evaluation in shards, and training by data parallelism, on the "
        "devices of one or more machines. It needs the extra `ray`.",
    )
    address: str | None = Field(
        None,
        json_schema_extra=CHANGEABLE,
        description="Address of the Ray cluster to join: auto, or host:port. Default: start Ray on "
        "this machine for the time of the run. The machines must share the run directory, the "
        "model and tpaw's environment.",
    )
    workers: Literal["all"] | Count = Field(
        "all",
        json_schema_extra=CHANGEABLE,
        description="Number of worker processes. all: one for each gpus_per_worker GPUs of the "
        "cluster; without GPUs, one for each CPU core. On CPUs each worker has one thread, so "
        "responses and log-probs are those of in_process with OMP_NUM_THREADS=1.",
    )
    gpus_per_worker: Count = Field(
        1,
        json_schema_extra=CHANGEABLE,
        description="GPUs of a worker that generates. More than one is for a server with tensor "
        "parallelism; scoring and training use one GPU for each process. It has no effect without "
        "GPUs.",
    )
    max_retries: int = Field(
        3,
        ge=0,
        le=1000,
        json_schema_extra=CHANGEABLE,
        description="How often a shard or a training is tried again after a worker or its machine "
        "died.",
    )


class EvaluateConfig(Section):
    """What to measure on θ_0 and after each iteration."""

    data: DataConfig | None = Field(
        None,
        description="Held-out records, with the same settings as data. Default: none.",
    )
    exact_match: bool | None = Field(
        None,
        description="Generate greedy responses and let the checker tell which are right; by "
        "default their `#### number` is compared with that of the target. Default: true if the "
        "checker can tell for every held-out target, else false.",
    )
    max_new_tokens: Count | None = Field(
        None,
        description="Longest greedy response in tokens. Default: generate.max_new_tokens. It has "
        "no effect without exact_match.",
    )
    temperatures: Annotated[tuple[Temperature, ...], BeforeValidator(_as_tuple)] = Field(
        (),
        description="Also answer each held-out prompt once at each of these temperatures, with "
        "generate.top_p and top_k, and check these answers too. They need exact_match.",
    )
    samples: int = Field(
        1,
        ge=1,
        le=1000,
        description="Answers to each held-out prompt at each of temperatures. With more than one, "
        "the number of different right answers to a prompt is measured too. It has no effect on "
        "the greedy answers.",
    )
    suites: Strings = Field(
        (),
        json_schema_extra=CHANGEABLE,
        description="Benchmark suites to evaluate θ_0 and every checkpoint on: names or YAML "
        "files, as in `tpaw evaluate --suite`. They need the extra `evaluate`. Default: none.",
    )
    stop_when_worse: bool = Field(
        False,
        json_schema_extra=CHANGEABLE,
        description="End the run after an iteration whose checkpoint is worse than θ_0 on the "
        "held-out records (exact McNemar test, p < 0.05). It needs exact match.",
    )


class RunConfig(Section):
    """The complete configuration of a run. `RunConfig.load("file.yaml")` reads one."""

    method: Literal["self_play", "sft", "dpo", "critic"] = Field(
        "self_play",
        description="self_play: Algorithm 1. sft: supervised fine-tuning on the targets, by TRL. "
        "dpo: DPO on preference data; λ is TRL's beta. critic: SFT on the best of several "
        "responses, as a critic sees them that learns to tell targets from responses "
        "(docs/concepts/critic.md). Each iteration trains from the newest checkpoint.",
    )
    model: ModelConfig
    data: DataConfig
    iterations: Rounds = Field(
        4, description="T, the number of iterations. Iteration i trains θ_i from θ_{i−1}."
    )
    keep: Literal["all", "team", "last"] = Field(
        "all",
        json_schema_extra=CHANGEABLE,  # what is removed is not needed again
        description="Which checkpoints keep their weights. all: every one. team: those of the "
        "newest team, the opponents and main players of another iteration; older weights are "
        "removed after θ_i is published and evaluated. last: those that a later stage of this run "
        "reads; they are removed before θ_i trains, and at the end only θ_T has weights. "
        "Responses, log-probs and evaluations always stay, and model.path is never touched. "
        "Removed weights do not come back when this setting changes. Methods sft and dpo have no "
        "team: team and last keep the newest checkpoint.",
    )
    max_length: int = Field(
        2048,
        ge=2,
        le=1_000_000_000,
        description="Longest prompt plus response, in tokens. TPAW skips a longer record (see "
        "data.max_skipped).",
    )
    checker: str = Field(
        EXACT_MATCH,
        description="What tells whether a response is right. exact_match: its `#### number` is "
        "that of the target. Otherwise the dotted name of a module of yours with a function "
        "is_right(prompt, target, response), which takes three texts and returns True or False "
        "(docs/how-to/own-data.md). Evaluation and the objective self_training use it.",
    )
    team: TeamConfig = TeamConfig()
    objective: AnyObjective = Field(
        ObjectiveConfig(), description="The method: its name, and the settings of its loss."
    )
    generate: GenerateConfig = GenerateConfig()
    critic: CriticConfig = CriticConfig()
    score: ScoreConfig = ScoreConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    launch: LaunchConfig = LaunchConfig()
    seed: int = Field(
        0,
        ge=0,
        lt=2**31,
        description="Seed of sampling and shuffling. Each shard and each iteration derives its "
        "own seed from it.",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "bf16",
        description="Type of the model's computation. The optimizer always updates weights of "
        "fp32 precision.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Device of the model. auto: cuda if torch sees a CUDA device, else cpu."
    )
    deterministic: bool = Field(
        False,
        description="Use only kernels that give the same result every time. On one CPU process, a "
        "run that was killed and resumed then produces the same bytes as an uninterrupted run.",
    )

    @field_validator("checker")
    @classmethod
    def _has_a_function(cls, name: str) -> str:
        if name == EXACT_MATCH:
            return name
        try:
            module = imported(name)
        except ValueError as error:
            raise ValueError(
                f"{brief(name)}: {error}; it must be {EXACT_MATCH}, or a module of yours"
            ) from None
        if not callable(getattr(module, "is_right", None)):
            raise ValueError(f"{brief(name)}: the module has no function is_right")
        return name

    @model_validator(mode="after")
    def _what_needs_answers_has_them(self) -> RunConfig:
        found = self.evaluate.temperatures
        if self.evaluate.samples > 1 and not found:
            raise ValueError(
                f"evaluate.samples: {self.evaluate.samples}: the greedy answers to a prompt are "
                "equal; set evaluate.temperatures, or remove this setting"
            )
        if 0 in found or len(set(found)) < len(found):
            raise ValueError(
                f"evaluate.temperatures: {brief(list(found))}: each must be above 0 and occur "
                "once; the greedy answers are always checked"
            )
        if found and self.evaluate.exact_match is False:
            raise ValueError(
                f"evaluate.temperatures: {brief(list(found))}: nothing would be checked, because "
                "exact_match is false; remove one of the two settings"
            )
        if self.evaluate.stop_when_worse and self.evaluate.exact_match is False:
            raise ValueError(
                "evaluate.stop_when_worse: true: there is no accuracy, because exact_match is "
                "false; remove one of the two settings"
            )
        return self

    @model_validator(mode="after")
    def _settings_fit_together(self) -> RunConfig:
        for key, value in self.per_iteration().items():
            if isinstance(value, tuple) and len(value) != self.iterations:
                raise ValueError(
                    f"{key}: {brief(list(value))}: lists {len(value)} values; give one value, or "
                    f"one for each of the {self.iterations} iterations"
                )
        if self.train.weights == "split" and self.train.optimizer != "rmsprop":
            raise ValueError(
                "train.weights: split: cannot be used with optimizer "
                f"{brief(self.train.optimizer)}; set train.optimizer to rmsprop, or "
                "train.weights to fp32"
            )
        if self.train.weights == "split" and self.precision != "bf16":
            raise ValueError(
                f"train.weights: split: cannot be used with precision {self.precision}; set "
                "precision to bf16, or train.weights to fp32"
            )
        if self.score.sharded and self.launch.engine != "ray":
            raise ValueError(
                "score.sharded: true: needs the workers of launch.engine ray; set launch.engine to "
                "ray, or score.sharded to false"
            )
        if self.score.sharded and self.model.adapter is not None:
            raise ValueError(
                "score.sharded: true: cannot be used with model.adapter; set it to false, and "
                "model.quantization to nf4 if the model does not fit on one device"
            )
        if self.train.weights == "split" and self.train.parallel == "fsdp2":
            raise ValueError(
                "train.parallel: fsdp2: cannot be used with train.weights split, which needs whole "
                "weights; set train.weights to fp32"
            )
        if self.train.weights == "split" and self.model.adapter is not None:
            raise ValueError(
                "train.weights: split: cannot be used with model.adapter, whose weights are always "
                "fp32; set train.weights to fp32"
            )
        adapter = self.model.adapter
        if adapter and adapter.each_iteration == "fresh" and self.train.parallel == "fsdp2":
            raise ValueError(
                "train.parallel: fsdp2: cannot be used with model.adapter.each_iteration fresh, "
                "which needs whole weights; set train.parallel to ddp, or each_iteration to "
                "continue"
            )
        if self.model.quantization is not None and self.train.parallel == "fsdp2":
            raise ValueError(
                "train.parallel: fsdp2: cannot be used with model.quantization "
                f"{self.model.quantization}: FSDP2 does not shard these weights; set "
                "train.parallel to ddp"
            )
        if self.model.quantization is not None and self.model.adapter is None:
            raise ValueError(
                f"model.quantization: {self.model.quantization}: quantised weights cannot be "
                "trained; set model.adapter, for example to {}, or remove this setting"
            )
        if self.generate.max_new_tokens >= self.max_length:
            raise ValueError(
                f"generate.max_new_tokens: {self.generate.max_new_tokens}: leaves no room for a "
                f"prompt; it must be less than max_length {self.max_length}"
            )
        players = len(self.team.main_players.select(range(self.iterations)))
        tpaw = self.objective if isinstance(self.objective, ObjectiveConfig) else None
        if tpaw and tpaw.min_player_weight * players > 1:
            raise ValueError(
                f"objective.min_player_weight: {tpaw.min_player_weight}: with {players} "
                f"main players every weight could be below it; it must be at most 1/{players}"
            )
        return self

    @model_validator(mode="after")
    def _objective_fits(self) -> RunConfig:
        name, needs, team = self.objective.name, self.objective.needs, self.team
        if not isinstance(needs, ObjectiveNeeds):
            raise ValueError(f"objective.name: {name}: its needs is not an ObjectiveNeeds")
        if not self.has_objective:
            if name != "tpaw":
                raise ValueError(
                    f"objective.name: {brief(name)}: {self._method_shown} does not use this "
                    "setting; remove it"
                )
            return self
        shown = brief(team.main_players.model_dump())
        if needs.references == "none" and team.main_players != TeamConfig().main_players:
            raise ValueError(
                f"team.main_players: {shown}: objective.name {name} reads no reference, so no "
                "checkpoint is a main player; remove this setting"
            )
        if needs.references == "newest" and team.main_players.select(range(2)) != (1,):
            raise ValueError(
                f"team.main_players: {shown}: objective.name {name} has one reference, the newest "
                "checkpoint; set team.main_players to {last: 1}"
            )
        if needs.responses == "likeliest" and needs.references == "none":
            raise ValueError(
                f"objective.name: {name}: it trains on the likeliest responses, but its needs has "
                "no reference that could tell them"
            )
        if needs.responses == "likeliest" and self.generate.samples == 1:
            raise ValueError(
                f"generate.samples: 1: objective.name {name} trains on the likeliest of several "
                "responses to a prompt; set it to 2 or more"
            )
        if needs.one_response and self.generate.samples > 1:
            raise ValueError(
                f"generate.samples: {self.generate.samples}: objective.name {name} takes one "
                "response to a prompt; set it to 1"
            )
        return self

    @model_validator(mode="after")
    def _samples_fit(self) -> RunConfig:
        samples = self.generate.samples
        if samples > 1 and self.generate.temperature == 0:
            raise ValueError(
                f"generate.samples: {samples}: with generate.temperature 0 all responses to a "
                "prompt are equal; set it to 1, or raise the temperature"
            )
        if self.method == "critic" and samples == 1:
            raise ValueError(
                "generate.samples: 1: method critic chooses among several responses to a prompt; "
                "set it to 2 or more"
            )
        return self

    @model_validator(mode="after")
    def _critic_fits(self) -> RunConfig:
        default = CriticConfig()
        if self.method != "critic":
            given = {key: value for key, value in self.critic if value != getattr(default, key)}
            if given:
                raise ValueError(
                    f"critic: {brief(given)}: method {self.method} does not use this section; "
                    "remove it"
                )
            return self
        if self.critic.path is None:
            if self.critic.lora_rank is not None:
                raise ValueError(
                    f"critic.lora_rank: {self.critic.lora_rank}: the small critic has no adapter; "
                    "set critic.path to a model, the SFT model for example"
                )
        else:
            for key in ("layers", "width"):
                if getattr(self.critic, key) != getattr(default, key):
                    raise ValueError(
                        f"critic.{key}: {getattr(self.critic, key)}: it has no effect with "
                        "critic.path; remove one of the two settings"
                    )
        needs = self.objective.needs
        if self.has_objective and (needs.responses != "all" or needs.initial_responses):
            raise ValueError(
                f"objective.name: {self.objective.name}: method critic chooses the responses "
                "itself; choose another objective, or set critic.train_by to sft"
            )
        return self

    @model_validator(mode="after")
    def _chunks_fit(self) -> RunConfig:
        chunks, needs = self.data.chunks, self.objective.needs
        if self.method != "self_play":
            chunks = 1  # `_nothing_is_ignored` refuses more
        if self.evaluate.data is not None and self.evaluate.data.chunks > 1:
            raise ValueError(
                f"evaluate.data.chunks: {self.evaluate.data.chunks}: every held-out record is "
                "evaluated each time; remove this setting"
            )
        if chunks > 1 and self.team.opponents.select(range(2)) != (1,):
            raise ValueError(
                f"data.chunks: {chunks}: team.opponents is "
                f"{brief(self.team.opponents.model_dump())}, but only the newest checkpoint "
                "answered the prompts of an iteration's part; set team.opponents to {last: 1}"
            )
        if chunks > 1 and needs.initial_responses:
            raise ValueError(
                f"data.chunks: {chunks}: objective.name {self.objective.name} reads θ_0's response "
                "to every prompt, and θ_0 answers the first part alone; set data.chunks to 1"
            )
        return self

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> RunConfig:
        for name, fields in _OF_SELF_PLAY.items() if self.method != "self_play" else ():
            section = getattr(self, name)
            for field in fields:
                key, value = f"{name}.{field.rstrip('_')}", getattr(section, field)
                is_used = self._uses_of_self_play(key)
                if not is_used and value != type(section).model_fields[field].default:
                    raise ValueError(
                        f"{key}: {brief(_plain(value))}: {self._method_shown} does not use this "
                        "setting; remove it"
                    )
        return self

    def _uses_of_self_play(self, key: str) -> bool:
        """Whether another method than self_play uses one of its settings."""
        if self.method == "critic" and key in ("generate.samples", "team.opponents"):
            return True
        if key == "data.chunks":
            return False
        return self.has_objective or (self.method == "dpo" and key == "objective.lambda")

    @property
    def generates(self) -> bool:
        """Whether the newest checkpoint answers the prompts in each iteration."""
        return self.method in ("self_play", "critic")

    @property
    def has_objective(self) -> bool:
        """Whether it trains by the section objective over triples with several players."""
        return self.method == "self_play" or (
            self.method == "critic" and self.critic.train_by == "objective"
        )

    @property
    def trains_by_sft(self) -> bool:
        """Whether TRL's SFT trains the policy."""
        return self.method == "sft" or (self.method == "critic" and not self.has_objective)

    @property
    def _method_shown(self) -> str:
        by = " with critic.train_by sft" if self.method == "critic" and self.trains_by_sft else ""
        return f"method {self.method}{by}"

    @model_validator(mode="after")
    def _backend_fits(self) -> RunConfig:
        server, default = self.generate.server, ServerConfig()
        given = {key: value for key, value in server if value != getattr(default, key)}
        if self.generate.backend == "hf":
            if given:
                raise ValueError(
                    f"generate.server: {brief(given)}: the backend hf does not use this; set "
                    "generate.backend to server, or remove these settings"
                )
            return self
        if (server.command is None) == (not server.endpoints):
            found = "both are set" if server.endpoints else "neither is set"
            raise ValueError(f"generate.server: {found}; set either command or endpoints")
        if self.model.quantization is not None:
            raise ValueError(
                f"model.quantization: {self.model.quantization}: a server would generate with a "
                "base that is not quantised; set generate.backend to hf, or remove this setting"
            )
        command = server.command
        if self.model.adapter is not None and command is not None and "{adapter}" not in command:
            raise ValueError(
                f"generate.server.command: {brief(command)}: with model.adapter it must contain "
                "{adapter}, or the server would serve the base (docs/how-to/vllm.md)"
            )
        temperatures = [("generate.temperature", self.generate.temperature)]
        temperatures += [("evaluate.temperatures", value) for value in self.evaluate.temperatures]
        for setting, temperature in temperatures:
            if 0 < temperature < LOWEST_SERVER_TEMPERATURE:
                raise ValueError(
                    f"{setting}: {temperature}: with the backend server it must be 0, which is "
                    f"greedy, or at least {LOWEST_SERVER_TEMPERATURE}, because vLLM would raise it "
                    "to that"
                )
        return self

    def per_iteration(self) -> dict[str, Any]:
        """The settings that take one value or one value for each iteration.

        Returns:
            Key path to value. A tuple holds one value for each iteration.
        """
        found = {"train.learning_rate": self.train.learning_rate, "train.epochs": self.train.epochs}
        if isinstance(self.objective, ObjectiveConfig):
            found["objective.lambda"] = self.objective.lambda_
        if self.method == "critic":
            found["critic.steps"] = self.critic.steps
        return found

    @classmethod
    def load(cls, *sources: str | Mapping[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
        """Read a configuration from YAML files, recipes or mappings.

        Args:
            sources: paths of YAML files, names of recipes, or mappings with the same content as
                a file. A later source overrides an earlier one.
            overrides: texts of the form `section.key=value`. They override every source.

        Returns:
            The validated configuration.

        Raises:
            InputError: with one line for each problem: the key path, the value and what is
                allowed.
        """
        return validate_as(cls, load_tree(sources, overrides))


def at_iteration(value: Scalar | tuple[Scalar, ...], t: int) -> Scalar:
    """The value of a per-iteration setting.

    Args:
        value: one value for all iterations, or a tuple with one value for each.
        t: the iteration that trains θ_{t+1} from θ_t; counts from 0.
    """
    return value[t] if isinstance(value, tuple) else value


def _keys_within(value: Any) -> Iterator[str]:
    if isinstance(value, Mapping):
        yield from map(str, value)
    parts = value.values() if isinstance(value, Mapping) else value
    for part in parts if isinstance(value, Mapping | list) else ():
        yield from _keys_within(part)


def _plain(value: Any) -> Any:
    return value.model_dump() if isinstance(value, BaseModel) else value
