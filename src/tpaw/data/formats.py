"""Rows of any supported shape, as a prompt and a target.

Nothing is tokenised here. A row that cannot be used is `Unusable` with a reason, for `data` to
count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tpaw.config.schema import DataConfig
from tpaw.data.readers import Record
from tpaw.errors import InputError

Message = dict[str, str]

_SHAREGPT_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_SHAREGPT_ROLES |= {"system": "system"}


class Dialogue(NamedTuple):
    """A prompt and its target.

    `prompt` is text, or messages that end with a user turn. `is_chat` says that the chat template
    must be used, because the row is a conversation. `rejected` is the other answer of preference
    data, whose target is the chosen one.
    """

    prompt: str | list[Message]
    target: str
    is_chat: bool
    rejected: str | None = None


def prompt_as_text(prompt: str | Sequence[Message]) -> str:
    """A prompt before templating: the text, the only message, or all messages with their roles."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


class Unusable(NamedTuple):
    """Why a row cannot be used."""

    reason: str


SAME_ANSWERS = Unusable("chosen and rejected are the same")


def shape_of(
    rows: Sequence[Record], config: DataConfig, key: str, *, preferences: bool = False
) -> Callable[[Record], Any]:
    """How to turn a row into a `Dialogue` (or `Unusable`), from the columns that are there.

    Args:
        preferences: nothing but chosen and rejected answers will do.

    Raises:
        InputError: a named column is missing, or no supported shape fits.
    """
    present = set(rows[0])
    filled = {name for row in rows[:100] for name in row if row[name] is not None}
    name, there = f"{key}.path: {config.path}", ", ".join(sorted(present))
    columns = config.columns
    for column in (c for _, c in columns or () if c is not None):
        if column not in present:
            raise InputError(f"{name}: no column {column!r}; there are {there}")
    if preferences and not (columns.chosen if columns else {"chosen", "rejected"} <= filled):
        raise InputError(
            f"{name}: method dpo needs the columns chosen and rejected; there are "
            f"{there}; name yours in {key}.columns"
        )
    if columns is not None:
        if columns.chosen:
            names = columns.prompt or "", columns.chosen, columns.rejected or ""
            return lambda row: _preference(row, *names, _asked)
        if columns.messages:
            return lambda row: _conversation(row.get(columns.messages or ""), config.turn)
        return lambda row: _pair(row, columns.prompt or "", columns.target or "", _asked)
    asked_in = "conversations" if "conversations" in filled else "prompt"
    shapes: list[tuple[set[str], Callable[[Record], Any]]] = [
        (
            {"chosen", "rejected"},
            lambda row: _preference(row, asked_in, "chosen", "rejected", _checked),
        ),
        ({"prompt", "completion"}, lambda row: _pair(row, "prompt", "completion", _checked)),
        ({"messages"}, lambda row: _conversation(row.get("messages"), config.turn)),
        ({"conversations"}, lambda row: _sharegpt(row, config.turn)),
        ({"instruction", "output"}, _alpaca),
        ({"question", "answer"}, lambda row: _asked(row.get("question"), row.get("answer"))),
    ]
    for columns_there in (filled, present):  # files of several shapes leave some columns null
        for required, convert in shapes:
            if required <= columns_there:
                return convert
    raise InputError(
        f"{name}: columns {there} are none of chosen/rejected, prompt/completion, "
        f"messages, conversations, instruction/output, question/answer; name yours in {key}.columns"
    )


def _pair(
    row: Record,
    prompt_column: str,
    target_column: str,
    of_texts: Callable[..., Dialogue | Unusable],
) -> Dialogue | Unusable:
    prompt, target = row.get(prompt_column), row.get(target_column)
    if isinstance(prompt, list) or isinstance(target, list):
        prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        target = target if isinstance(target, list) else [{"role": "assistant", "content": target}]
        return _conversation(prompt + target, "last")
    return of_texts(prompt, target)


def _asked(prompt: Any, target: Any, system: Any = None) -> Dialogue | Unusable:
    dialogue = _checked(prompt, target)
    if isinstance(dialogue, Unusable) or not isinstance(prompt, str):
        return dialogue
    messages = [{"role": "user", "content": prompt}]
    if isinstance(system, str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return dialogue._replace(prompt=messages)


def _alpaca(row: Record) -> Dialogue | Unusable:
    instruction, extra = row.get("instruction"), row.get("input")
    if isinstance(instruction, str) and isinstance(extra, str) and extra.strip():
        instruction = f"{instruction}\n{extra}"
    return _asked(instruction, row.get("output"), row.get("system"))


def _preference(
    row: Record,
    prompt_column: str,
    chosen_column: str,
    rejected_column: str,
    of_texts: Callable[..., Dialogue | Unusable],
) -> Dialogue | Unusable:
    prompt, chosen, rejected = map(row.get, (prompt_column, chosen_column, rejected_column))
    if not any(isinstance(part, (list, Mapping)) for part in (prompt, chosen, rejected)):
        preferred, other = of_texts(prompt, chosen), of_texts(prompt, rejected)
    else:
        asked = _messages(prompt, "user")
        preferred, other = (
            _conversation(_with_system(row, _continued(asked, answer)), "last")
            for answer in (chosen, rejected)
        )
    if isinstance(preferred, Unusable):
        return preferred
    if isinstance(other, Unusable):
        return Unusable(f"rejected: {other.reason}")
    if preferred.prompt != other.prompt:
        return Unusable("chosen and rejected answer different prompts")
    if preferred.target == other.target:
        return SAME_ANSWERS
    return preferred._replace(rejected=other.target)


def _continued(asked: Any, answer: Any) -> Any:
    """The conversation; some answers bring their prompt along."""
    answered = _messages(answer, "assistant")
    if not isinstance(answered, list) or len(answered) > 1:
        return answered
    return [*asked, *answered] if isinstance(asked, list) else answered


def _sharegpt(row: Record, turn: str) -> Dialogue | Unusable:
    turns = row.get("conversations")
    if not isinstance(turns, list):
        return Unusable("the conversation is not a list of turns")
    return _conversation(_with_system(row, _messages(turns, "user")), turn)


def _with_system(row: Record, messages: Any) -> Any:
    """Some files keep the system message in a column of its own."""
    if isinstance(messages, list) and isinstance(row.get("system"), str) and row["system"].strip():
        return [{"role": "system", "content": row["system"]}, *messages]
    return messages


def _messages(turns: Any, role_of_text: str) -> Any:
    """Turns as role/content messages; what is none is left for `_conversation` to refuse."""
    if isinstance(turns, str):
        turns = {"role": role_of_text, "content": turns}
    turns = [turns] if isinstance(turns, Mapping) else turns
    if not isinstance(turns, list) or not all(isinstance(t, Mapping) for t in turns):
        return turns
    messages = []
    for t in turns:  # some files say role and content in a column of this name
        role = str(t.get("from", t.get("role")))
        content = t.get("value", t.get("content"))
        messages.append({"role": _SHAREGPT_ROLES.get(role, role), "content": content})
    return messages


def _conversation(messages: Any, turn: str) -> Dialogue | Unusable:
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        return Unusable("the conversation is not a list of messages")
    answers = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
    if not answers:
        return Unusable("no assistant turn")
    end = answers[0] if turn == "first" else answers[-1]
    prompt, target = messages[:end], messages[end].get("content")
    if not prompt or prompt[-1].get("role") != "user":
        return Unusable("the assistant turn does not follow a user turn")
    for message in prompt:
        if message.get("role") not in ("system", "user", "assistant"):
            return Unusable(f"a turn of role {str(message.get('role'))[:30]!r}")
        if not isinstance(message.get("content"), str):
            return Unusable("a message whose content is not text")
    plain = [{"role": m["role"], "content": m["content"]} for m in prompt]
    checked = _checked(plain[-1]["content"], target, is_chat=True)
    return checked if isinstance(checked, Unusable) else checked._replace(prompt=plain)


def _checked(prompt: Any, target: Any, *, is_chat: bool = False) -> Dialogue | Unusable:
    for name, text in (("prompt", prompt), ("target", target)):
        if not isinstance(text, str):
            return Unusable(f"the {name} is not text")
        if not text.strip():
            return Unusable(f"the {name} is empty")
        if any("\ud800" <= character <= "\udfff" for character in text):
            return Unusable(f"the {name} holds half a surrogate pair")
    return Dialogue(prompt, target, is_chat)
