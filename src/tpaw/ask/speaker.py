"""A loaded checkpoint that answers a prompt token by token, as `tpaw answer` would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from tpaw.config.schema import RunConfig
from tpaw.data.chat_template import ChatFormat, is_templated
from tpaw.data.formats import Dialogue, Unusable
from tpaw.data.inputs import first_prompt
from tpaw.data.token_ids import TokenIds, token_ids
from tpaw.errors import InputError
from tpaw.generation.batching import Batching, choose_batching
from tpaw.generation.continuous_batching import generate_tokens
from tpaw.generation.generator import SamplingParams
from tpaw.models.checks import check_model
from tpaw.models.loading import load_model, pick_device
from tpaw.models.references import Checkpoint, tokenizer_of
from tpaw.runtime.progress import note
from tpaw.scoring.score import Precision


class Speaker:
    """A checkpoint that answers prompts.

    Args:
        name: name for display.
        model: the loaded checkpoint.
        tokenizer: its tokenizer.
        chat: turns a prompt into token ids.
        params: sampling settings.
        seed: seeds the draws.

    Attributes:
        name: name for display.
    """

    def __init__(
        self,
        name: str,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chat: ChatFormat,
        params: SamplingParams,
        seed: int,
    ) -> None:
        self.name = name
        self._model = model
        self._tokenizer = tokenizer
        self._chat = chat
        self._params = params
        self._seed = seed
        self._asked = 0
        self._use_cache = choose_batching(model).batching is Batching.CONTINUOUS

    def answer(self, prompt: str) -> Answer:
        """Begin to answer a prompt. Each answer of a speaker has draws of its own.

        Args:
            prompt: one user turn, as text.

        Raises:
            InputError: the prompt cannot be used, for example because it is too long.
        """
        tokens = generate_tokens(
            self._model,
            self.prompt_ids(prompt),
            self._params,
            (self._seed, self._asked),
            use_cache=self._use_cache,
        )
        self._asked += 1
        return Answer(self, tokens)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))

    def prompt_ids(self, prompt: str) -> TokenIds:
        """The token ids of a prompt, as the run has trained on them.

        Raises:
            InputError: the prompt cannot be used.
        """
        # The ids of a prompt do not depend on what follows it.
        encoded = self._chat.encode([Dialogue(prompt, "x", is_chat=False)])[0]
        if isinstance(encoded, Unusable):
            raise InputError(f"the prompt cannot be used by {self.name}: {encoded.reason}")
        size = self._model.get_input_embeddings().num_embeddings
        if max(encoded.prompt_ids) >= size:
            raise InputError(
                f"the prompt cannot be used by {self.name}: its tokenizer gives token id "
                f"{max(encoded.prompt_ids)}, the model has {size} tokens"
            )
        return token_ids(encoded.prompt_ids)


class Answer:
    """An answer that is being made. Nothing is computed until a token is asked for."""

    def __init__(self, speaker: Speaker, tokens: Iterator[int]) -> None:
        self.speaker = speaker
        self._tokens = tokens
        self._ids: list[int] = []

    def advance(self) -> bool:
        """Add a token; false if the answer has ended."""
        token = next(self._tokens, None)
        if token is not None:
            self._ids.append(token)
        return token is not None

    @property
    def text(self) -> str:
        """The text so far."""
        return self.speaker.decode(self._ids)


def load_speaker(
    checkpoint: Checkpoint,
    *,
    greedy: bool,
    max_new_tokens: int | None,
    overrides: Sequence[str],
) -> Speaker:
    """Load a checkpoint with the prompt format, the sampling and the precision of its run.

    A model without a run has the defaults; it gets the chat template if it has one.

    Args:
        checkpoint: the checkpoint.
        greedy: use greedy decoding.
        max_new_tokens: longest answer in tokens. Default: the run's.
        overrides: settings as section.key=value.

    Raises:
        InputError: a setting or the model cannot be used.
    """
    for override in overrides:
        if override.startswith("model."):
            raise InputError(
                f"--set {override}: the checkpoint decides what is loaded; name another one"
            )
    config = _configured(checkpoint, overrides)
    device = pick_device(config.device)
    model = checkpoint.model
    player = checkpoint.player
    path = player.path if checkpoint.run is None else player.base_folder
    found = check_model(model.model_copy(update={"path": path, "revision": None}))
    positions = getattr(found.get_text_config(), "max_position_embeddings", None)
    max_length = min(config.max_length, positions or config.max_length)
    tokenizer, stop_ids = tokenizer_of(checkpoint, model)
    params = SamplingParams.of(config.generate, max_length, stop_ids)
    if max_new_tokens is not None:
        params = params._replace(max_new_tokens=max_new_tokens)
    if greedy:
        params = params.greedy()
    note(f"load {checkpoint.name}")
    dtype = Precision(device.type, config.precision == "bf16").dtype
    loaded = load_model(player, model, dtype=dtype, device=device)
    loaded.generation_config = GenerationConfig()
    chat = ChatFormat(
        tokenizer, stop_ids, _template(checkpoint, config, tokenizer), "data.template", max_length
    )
    return Speaker(checkpoint.name, loaded, tokenizer, chat, params, config.seed)


def _configured(checkpoint: Checkpoint, overrides: Sequence[str]) -> RunConfig:
    if checkpoint.run is not None:
        return RunConfig.load(str(checkpoint.run.config_file), overrides=overrides)
    # The data of a model are the prompts that a person types.
    alone = {"model": {"path": checkpoint.player.path}, "data": {"path": "-"}}
    return RunConfig.load(alone, overrides=overrides)


def _template(checkpoint: Checkpoint, config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """Whether prompts get the chat template: chat or none.

    `auto` depends on the form of the records, so the prompts that the run has stored decide it.
    """
    if config.data.template != "auto":
        return config.data.template
    if checkpoint.run is None:
        return "chat" if tokenizer.chat_template is not None else "none"
    return "chat" if is_templated(tokenizer, first_prompt(checkpoint.run.inputs)) else "none"
