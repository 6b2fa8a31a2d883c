"""Turn records of any supported format into dialogues: a prompt and a target, as text.

A record that cannot be used becomes `Unusable` with a reason. `examples.py` counts the reasons.
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
    """A prompt and its target, as text.

    Attributes:
        prompt: text, or messages that end with a user turn.
        target: the response of the data. For preference data it is the chosen response.
        is_chat: whether the record is a conversation, which needs the chat template.
        rejected: the rejected response of preference data; None for other data.
    """

    prompt: str | list[Message]
    target: str
    is_chat: bool
    rejected: str | None = None


def prompt_as_text(prompt: str | Sequence[Message]) -> str:
    """The prompt without the chat template.

    Args:
        prompt: text or messages.

    Returns:
        The text, the content of a single message, or several messages with their roles.
    """
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


class Unusable(NamedTuple):
    """The reason why a record cannot be used."""

    reason: str


SAME_ANSWERS = Unusable("chosen and rejected are equal")


def shape_of(
    records: Sequence[Record], config: DataConfig, key: str, *, preferences: bool = False
) -> Callable[[Record], Any]:
    """Find the format of the records from their columns.

    Args:
        records: all records of the source; at least one.
        config: where the records are and which columns to read.
        key: key path of `config` for error messages, for example `data`.
        preferences: whether chosen and rejected responses are required.

    Returns:
        A function that turns a record into a `Dialogue` or `Unusable`.

    Raises:
        InputError: a column that `columns` names is missing, or the records have no supported
            format.
    """
    present = set(records[0])
    filled = {name for record in records[:100] for name in record if record[name] is not None}
    name, available = f"{key}.path: {config.path}", ", ".join(sorted(present))
    columns = config.columns
    for column in (c for _, c in columns or () if c is not None):
        if column not in present:
            raise InputError(f"{name}: has no column {column!r}; available: {available}")
    if preferences and not (columns.chosen if columns else {"chosen", "rejected"} <= filled):
        raise InputError(
            f"{name}: has columns {available}; method dpo needs chosen and rejected; if the "
            f"columns have other names, set {key}.columns"
        )
    if columns is not None:
        if columns.chosen:
            names = columns.prompt or "", columns.chosen, columns.rejected or ""
            return lambda record: _preference(record, *names, _question)
        if columns.messages:
            return lambda record: _conversation(record.get(columns.messages or ""), config.turn)
        return lambda record: _pair(record, columns.prompt or "", columns.target or "", _question)
    prompt_column = "conversations" if "conversations" in filled else "prompt"
    shapes: list[tuple[set[str], Callable[[Record], Any]]] = [
        (
            {"chosen", "rejected"},
            lambda record: _preference(record, prompt_column, "chosen", "rejected", _checked),
        ),
        ({"prompt", "completion"}, lambda record: _pair(record, "prompt", "completion", _checked)),
        ({"messages"}, lambda record: _conversation(record.get("messages"), config.turn)),
        ({"conversations"}, lambda record: _sharegpt(record, config.turn)),
        ({"instruction", "output"}, _alpaca),
        (
            {"question", "answer"},
            lambda record: _question(record.get("question"), record.get("answer")),
        ),
    ]
    # A file with records of several formats has null columns, so prefer columns with values.
    for available_columns in (filled, present):
        for required, convert in shapes:
            if required <= available_columns:
                return convert
    raise InputError(
        f"{name}: has columns {available}; must have chosen/rejected, prompt/completion, messages, "
        f"conversations, instruction/output or question/answer; if the columns have other names, "
        f"set {key}.columns"
    )


def _pair(
    record: Record,
    prompt_column: str,
    target_column: str,
    of_texts: Callable[..., Dialogue | Unusable],
) -> Dialogue | Unusable:
    prompt, target = record.get(prompt_column), record.get(target_column)
    if isinstance(prompt, list) or isinstance(target, list):
        prompt = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        target = target if isinstance(target, list) else [{"role": "assistant", "content": target}]
        return _conversation(prompt + target, "last")
    return of_texts(prompt, target)


def _question(prompt: Any, target: Any, system: Any = None) -> Dialogue | Unusable:
    dialogue = _checked(prompt, target)
    if isinstance(dialogue, Unusable) or not isinstance(prompt, str):
        return dialogue
    messages = [{"role": "user", "content": prompt}]
    if isinstance(system, str) and system.strip():
        messages.insert(0, {"role": "system", "content": system})
    return dialogue._replace(prompt=messages)


def _alpaca(record: Record) -> Dialogue | Unusable:
    instruction, extra = record.get("instruction"), record.get("input")
    if isinstance(instruction, str) and isinstance(extra, str) and extra.strip():
        instruction = f"{instruction}\n{extra}"
    return _question(instruction, record.get("output"), record.get("system"))


def _preference(
    record: Record,
    prompt_column: str,
    chosen_column: str,
    rejected_column: str,
    of_texts: Callable[..., Dialogue | Unusable],
) -> Dialogue | Unusable:
    prompt, chosen, rejected = map(record.get, (prompt_column, chosen_column, rejected_column))
    if not any(isinstance(part, (list, Mapping)) for part in (prompt, chosen, rejected)):
        preferred, other = of_texts(prompt, chosen), of_texts(prompt, rejected)
    else:
        prompt = _messages(prompt, "user")
        preferred, other = (
            _conversation(_with_system(record, _continued(prompt, response)), "last")
            for response in (chosen, rejected)
        )
    if isinstance(preferred, Unusable):
        return preferred
    if isinstance(other, Unusable):
        return Unusable(f"rejected: {other.reason}")
    if preferred.prompt != other.prompt:
        return Unusable("chosen and rejected have different prompts")
    if preferred.target == other.target:
        return SAME_ANSWERS
    return preferred._replace(rejected=other.target)


def _continued(prompt: Any, response: Any) -> Any:
    """The conversation of prompt and response. Some responses already include the prompt."""
    messages = _messages(response, "assistant")
    if not isinstance(messages, list) or len(messages) > 1:
        return messages
    return [*prompt, *messages] if isinstance(prompt, list) else messages


def _sharegpt(record: Record, turn: str) -> Dialogue | Unusable:
    turns = record.get("conversations")
    if not isinstance(turns, list):
        return Unusable("the conversation is not a list of turns")
    return _conversation(_with_system(record, _messages(turns, "user")), turn)


def _with_system(record: Record, messages: Any) -> Any:
    """Prepend the system message, which some files store in a separate column."""
    system = record.get("system")
    if isinstance(messages, list) and isinstance(system, str) and system.strip():
        return [{"role": "system", "content": system}, *messages]
    return messages


def _messages(turns: Any, role_of_text: str) -> Any:
    """Turns as messages with role and content. `_conversation` refuses anything else."""
    if isinstance(turns, str):
        turns = {"role": role_of_text, "content": turns}
    turns = [turns] if isinstance(turns, Mapping) else turns
    if not isinstance(turns, list) or not all(isinstance(t, Mapping) for t in turns):
        return turns
    messages = []
    for t in turns:  # ShareGPT says from and value, but some files say role and content
        role = str(t.get("from", t.get("role")))
        content = t.get("value", t.get("content"))
        messages.append({"role": _SHAREGPT_ROLES.get(role, role), "content": content})
    return messages


def _conversation(messages: Any, turn: str) -> Dialogue | Unusable:
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        return Unusable("the conversation is not a list of messages")
    positions = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
    if not positions:
        return Unusable("the conversation has no assistant turn")
    end = positions[0] if turn == "first" else positions[-1]
    prompt, target = messages[:end], messages[end].get("content")
    if not prompt or prompt[-1].get("role") != "user":
        return Unusable("the assistant turn does not follow a user turn")
    for message in prompt:
        if message.get("role") not in ("system", "user", "assistant"):
            return Unusable(f"a turn has the unknown role {str(message.get('role'))[:30]!r}")
        if not isinstance(message.get("content"), str):
            return Unusable("the content of a message is not text")
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
            return Unusable(f"the {name} contains half of a surrogate pair")
    return Dialogue(prompt, target, is_chat)
