"""Rows become examples: templated once, tokenised once, the ids kept for good.

Generation gets exactly the ids that training sees, because both read them from here.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tpaw.config.data import DataConfig
from tpaw.data.formats import SAME_ANSWERS, Dialogue, Message, Unusable, shape_of
from tpaw.data.readers import read_rows
from tpaw.data.token_ids import TokenIds, read_table, token_ids, write_table
from tpaw.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OnDone = Callable[[int], None]

_ENDS_EARLY = Unusable("an end-of-sequence token within the target")


class Example(NamedTuple):
    """A prompt and its target.

    Attributes:
        id: row number in the source and a hash of the ids; the same when the run is made again.
        prompt_ids, target_ids: int32, final; the target ends with its end-of-sequence token.
        prompt, target: the same as text, for people and for exact match.
        rejected_ids: as target_ids, of preference data where a method wants both answers.
    """

    id: str
    prompt_ids: TokenIds
    target_ids: TokenIds
    prompt: str
    target: str
    rejected_ids: TokenIds | None = None


class Prepared(NamedTuple):
    """Examples, and how many rows were skipped for which reason."""

    examples: list[Example]
    skipped: dict[str, int]


class ChatFormat:
    """Turns a dialogue into prompt and target ids, the only place where text becomes ids."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], template: str, key: str
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.template = template
        self.key = key
        self.has_template = tokenizer.chat_template is not None
        # Some tokenizers put a beginning-of-sequence token before plain text, some do not.
        plain = tokenizer("a").input_ids
        bos = tokenizer.bos_token_id
        self.bos_ids = [bos] if bos is not None and plain[:1] == [bos] else []

    def encode(self, dialogue: Dialogue) -> tuple[list[int], list[int], str] | Unusable:
        """Prompt ids, target ids and the prompt as the model sees it; or why there are none.

        Raises:
            InputError: a conversation without a chat template, or a template that ends a turn
                without an end-of-sequence token.
        """
        wants_template = (
            dialogue.is_chat
            or self.template == "chat"
            or (self.template == "auto" and isinstance(dialogue.prompt, list) and self.has_template)
        )
        if wants_template and self.template != "none":
            return self._templated(_as_messages(dialogue.prompt), dialogue.target)
        prompt = _as_text(dialogue.prompt)
        prompt_ids, target_ids = self._split(prompt, dialogue.target)
        if prompt_ids[: len(self.bos_ids)] != self.bos_ids:
            prompt_ids = self.bos_ids + prompt_ids
        if not self.stop_ids.intersection(target_ids):
            target_ids.append(int(self.tokenizer.eos_token_id))
        if self._end(target_ids) != len(target_ids):
            return _ENDS_EARLY
        return prompt_ids, target_ids, prompt

    def _templated(
        self, messages: list[Message], target: str
    ) -> tuple[list[int], list[int], str] | Unusable:
        if not self.has_template:
            raise InputError(
                f"{self.key}: the rows are conversations and the tokenizer has no chat template; "
                "give the model one (tokenizer.chat_template)"
            )
        answer: Message = {"role": "assistant", "content": target}
        try:
            prompt = self._render(messages, add_generation_prompt=True)
            whole = self._render([*messages, answer], add_generation_prompt=False)
        except Exception as error:  # a template raises whatever its author chose
            return Unusable(f"the chat template refuses it: {str(error)[:80]}")
        if not whole.startswith(prompt):
            return Unusable("the chat template renders a prompt differently once an answer follows")
        prompt_ids, target_ids = self._split(prompt, whole[len(prompt) :])
        if not self.stop_ids.intersection(target_ids):
            stops = self.tokenizer.convert_ids_to_tokens(sorted(self.stop_ids))
            raise InputError(
                f"{self.key}: the chat template ends an answer with {whole[-20:]!r}, which holds "
                f"none of the end-of-sequence tokens {stops}; set model.eos_token to the one that "
                "it uses, or give the model a template that ends an answer with one"
            )
        if self.stop_ids.intersection(self._ids(target)):
            return _ENDS_EARLY
        # What a template puts after the end of the turn is never generated, so it is no part of y.
        return prompt_ids, target_ids[: self._end(target_ids)], prompt

    def _render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _split(self, prompt: str, rest: str) -> tuple[list[int], list[int]]:
        """Ids of the prompt, and of the rest as it reads on from there."""
        prompt_ids = self._ids(prompt)
        for anchor in (prompt, "\n"):
            # Some tokenizers begin any text with a space, so the rest is never encoded alone. Where
            # a token spans the border to the prompt, a line break stands in for it.
            anchor_ids, joint_ids = self._ids(anchor), self._ids(anchor + rest)
            if joint_ids[: len(anchor_ids)] == anchor_ids:
                return prompt_ids, joint_ids[len(anchor_ids) :]
        return prompt_ids, self._ids(rest)

    def _end(self, target_ids: list[int]) -> int:
        """Position after the first end-of-sequence token, where generation would stop."""
        return next(i for i, token in enumerate(target_ids, start=1) if token in self.stop_ids)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def prepare_examples(
    config: DataConfig,
    key: str,
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: Sequence[int],
    max_length: int,
    on_done: OnDone = lambda count: None,
    *,
    preferences: bool = False,
) -> Prepared:
    """Read, template and tokenise; count what cannot be used.

    Args:
        key: `data` or `evaluate.data`, for errors.
        preferences: keep the rejected answers, and refuse data that has none.
        on_done: called with the number of rows read since the last call.

    Raises:
        InputError: no usable row, or more unusable ones than `max_skipped`.
    """
    rows = read_rows(config, key)
    convert = shape_of(rows, config, key, preferences=preferences)
    chat = ChatFormat(tokenizer, stop_ids, config.template, f"{key}.template")
    examples: list[Example] = []
    skipped: Counter[str] = Counter()
    first_skipped: dict[str, int] = {}
    for number, row in enumerate(rows):
        dialogue = convert(row)
        if not isinstance(dialogue, Unusable):
            if not preferences:
                dialogue = dialogue._replace(rejected=None)
            dialogue = _tokenised(dialogue, number, chat, max_length)
        if isinstance(dialogue, Unusable):
            skipped[dialogue.reason] += 1
            first_skipped.setdefault(dialogue.reason, number + 1)
        else:
            examples.append(dialogue)
        on_done(1)
    share = skipped.total() / len(rows)
    if not examples or share > config.max_skipped:
        reasons = "; ".join(
            f"{reason}: {count} (first: row {first_skipped[reason]})"
            for reason, count in skipped.most_common()
        )
        allowed = (
            f"{key}.max_skipped allows {config.max_skipped:.1%}" if examples else "none is left"
        )
        raise InputError(
            f"{key}.path: {config.path}: {skipped.total()} of {len(rows)} rows ({share:.1%}) "
            f"cannot be used, {allowed}: {reasons}"
        )
    return Prepared(examples, dict(skipped))


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples as parquet."""
    fields = [name for name in Example._fields if name != "rejected_ids"]
    if examples and examples[0].rejected_ids is not None:
        fields.append("rejected_ids")
    write_table(path, {name: [getattr(example, name) for example in examples] for name in fields})


def read_examples(path: Path) -> list[Example]:
    """Read what `write_examples` wrote."""
    table = read_table(path)
    columns = [table[name] for name in Example._fields if name in table]
    return [Example(*row) for row in zip(*columns, strict=True)]


def _tokenised(
    dialogue: Dialogue, number: int, chat: ChatFormat, max_length: int
) -> Example | Unusable:
    encoded = chat.encode(dialogue)
    if isinstance(encoded, Unusable):
        return encoded
    prompt_ids, target_ids, prompt = encoded
    if not prompt_ids or not target_ids:
        return Unusable("no tokens")
    if len(prompt_ids) + len(target_ids) > max_length:
        return Unusable(f"longer than max_length {max_length}")
    ids = token_ids(prompt_ids), token_ids(target_ids)
    digest = hashlib.sha256(ids[0].tobytes() + b"|" + ids[1].tobytes()).hexdigest()
    example = Example(f"{number}-{digest[:12]}", *ids, prompt, dialogue.target)
    if dialogue.rejected is None:
        return example
    other = dialogue._replace(target=dialogue.rejected, rejected=None)
    rejected = _tokenised(other, number, chat, max_length)
    if isinstance(rejected, Unusable):
        return Unusable(f"rejected: {rejected.reason}")
    if rejected.target_ids.tolist() == example.target_ids.tolist():
        return SAME_ANSWERS
    return example._replace(rejected_ids=rejected.target_ids)


def _as_messages(prompt: str | list[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _as_text(prompt: str | list[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt)
