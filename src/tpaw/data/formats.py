"""Turn records of any supported format into dialogues: a prompt and a target, as text.

A record that cannot be used becomes `Unusable` with a reason. `examples.py` counts the reasons.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tpaw.config.schema import DataConfig
from tpaw.data.readers import Record, Records
from tpaw.errors import InputError

Message = Mapping[str, Any]

# The columns of all formats.
_COLUMNS = frozenset(
    [
        "prompt",
        "completion",
        "messages",
        "conversations",
        "chosen",
        "rejected",
        "question",
        "answer",
        "instruction",
        "input",
        "output",
    ]
)
# Columns that go with any format. TRL reads `tools` and `chat_template_kwargs` too.
_COMMON_COLUMNS = frozenset(("system", "tools", "chat_template_kwargs"))

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


class Dialogue(NamedTuple):
    """A prompt and its target.

    Attributes:
        prompt: text, or messages that end with a user turn or a tool turn.
        target: the response of the data. For preference data it is the chosen response. A message
            if it has other fields than role and content, such as tool_calls; otherwise text.
        is_chat: whether the record is a conversation, which needs the chat template.
        rejected: the rejected response of preference data, as `target`; None for other data.
        tools: the record's column `tools`: a list, or a list as JSON.
        chat_template_kwargs: the record's column of that name: a mapping, or a mapping as JSON.
    """

    prompt: str | list[Message]
    target: str | Message
    is_chat: bool
    rejected: str | Message | None = None
    tools: Any = None
    chat_template_kwargs: Any = None


def message_text(message: str | Message) -> str:
    """The text of a message. Tool calls are JSON."""
    if isinstance(message, str):
        return message
    calls = message.get("tool_calls")
    parts = [message.get("content"), json.dumps(calls, default=str) if calls else None]
    return "\n".join(part for part in parts if part)


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
        return message_text(prompt[0])
    return "\n\n".join(f"{message['role']}: {message_text(message)}" for message in prompt)


class Unusable(NamedTuple):
    """The reason why a record cannot be used, and what the user can do about it."""

    reason: str
    advice: str = ""


SAME_ANSWERS = Unusable("chosen and rejected are equal")


def columns_to_read(config: DataConfig) -> frozenset[str]:
    """Names of all columns that `shape_of` may use."""
    named = frozenset(column for _, column in config.columns or () if column is not None)
    return (named or _COLUMNS) | _COMMON_COLUMNS


def shape_of(
    records: Records, config: DataConfig, key: str, *, preferences: bool = False
) -> Callable[[Record], Dialogue | Unusable]:
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
    convert = _format_of(records, config, key, preferences=preferences)

    def with_template_options(record: Record) -> Dialogue | Unusable:
        dialogue = convert(record)
        if isinstance(dialogue, Unusable):
            return dialogue
        tools, kwargs = record.get("tools"), record.get("chat_template_kwargs")
        return dialogue._replace(tools=tools, chat_template_kwargs=kwargs)

    return with_template_options


def _format_of(
    records: Records, config: DataConfig, key: str, *, preferences: bool
) -> Callable[[Record], Dialogue | Unusable]:
    present = set(records.columns)
    filled = {name for record in records[:100] for name in record if record[name] is not None}
    name, available = f"{key}.path: {config.path}", ", ".join(sorted(present))
    columns = config.columns
    for column in (c for _, c in columns or () if c is not None):
        if column not in present:
            similar = difflib.get_close_matches(column, present, n=1)
            hint = f"; did you mean {similar[0]}?" if similar else ""
            raise InputError(f"{name}: has no column {column!r}; available: {available}{hint}")
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
        "conversations, instruction/output or question/answer; if the columns have other names, "
        f"set {key}.columns, or use `tpaw new … --columns prompt=NAME,target=NAME`"
        f"{_similar_names(present)}"
    )


def _similar_names(present: set[str]) -> str:
    """A hint for each column whose name is almost that of a known column."""
    hints = ""
    for column in sorted(present - _COLUMNS):
        for known in difflib.get_close_matches(column, _COLUMNS - present, n=1, cutoff=0.7):
            hints += f"; {column}: did you mean {known}?"
    return hints


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
    messages: list[Message] = [{"role": "user", "content": prompt}]
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
    return [_message(turn) for turn in turns]


def _message(turn: Message) -> Message:
    """A message with role and content. ShareGPT says from and value; some files mix the two."""
    role = str(turn.get("from", turn.get("role")))
    content = turn.get("value", turn.get("content"))
    others = {name: turn[name] for name in turn if name not in ("from", "value")}
    if role == "function_call" and (calls := _calls(content)):
        return {**others, "role": "assistant", "content": "", "tool_calls": calls}
    return {**others, "role": _SHAREGPT_ROLES.get(role, role), "content": content}


def _calls(text: Any) -> list[Message]:
    """The tool calls of a turn `function_call`; empty if the text is not JSON with a name."""
    try:
        calls = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return []
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, Mapping) and "name" in call for call in calls):
        return []
    return [{"type": "function", "function": call} for call in calls]


def _conversation(messages: Any, turn: str) -> Dialogue | Unusable:
    if not isinstance(messages, list) or not all(isinstance(m, Mapping) for m in messages):
        return Unusable("the conversation is not a list of messages")
    positions = [i for i, m in enumerate(messages) if m.get("role") == "assistant"]
    if not positions:
        return Unusable("the conversation has no assistant turn")
    end = positions[0] if turn == "first" else positions[-1]
    # A null is a field that is not there: parquet files fill up missing fields with it.
    prompt: list[Message] = [
        {name: value for name, value in m.items() if value is not None or name == "content"}
        for m in messages[: end + 1]
    ]
    response = prompt.pop()
    if not prompt or prompt[-1].get("role") not in ("user", "tool"):
        return Unusable("the assistant turn does not follow a user turn or a tool turn")
    for message in prompt:
        if message.get("role") not in _ROLES:
            return Unusable(f"a turn has the unknown role {str(message.get('role'))[:30]!r}")
        if problem := _problem_of_message("content of a message", message, may_be_empty=True):
            return problem
    # The result of a tool may be empty.
    if problem := _problem_of_message(
        "prompt", prompt[-1], may_be_empty=prompt[-1]["role"] == "tool"
    ):
        return problem
    if problem := _problem_of_message("target", response):
        return problem
    is_plain = response.keys() <= {"role", "content"}
    return Dialogue(prompt, response["content"] if is_plain else response, is_chat=True)


def _checked(prompt: Any, target: Any) -> Dialogue | Unusable:
    problem = _problem("prompt", prompt) or _problem("target", target)
    return problem or Dialogue(prompt, target, is_chat=False)


def _problem_of_message(
    name: str, message: Message, *, may_be_empty: bool = False
) -> Unusable | None:
    """Why a message cannot be used. A tool call needs no text."""
    has_calls = bool(message.get("tool_calls"))
    content = message.get("content")
    if has_calls and content is None:
        return None
    return _problem(name, content, may_be_empty=may_be_empty or has_calls)


def _problem(name: str, text: Any, *, may_be_empty: bool = False) -> Unusable | None:
    if not isinstance(text, str):
        return Unusable(f"the {name} is not text")
    if not is_unicode(text):
        return Unusable(f"the {name} contains half of a surrogate pair")
    if not (text.strip() or may_be_empty):
        return Unusable(f"the {name} is empty")
    return None


def is_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8. JSON may contain half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
