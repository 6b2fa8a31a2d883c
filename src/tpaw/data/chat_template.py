"""Apply the chat template to a dialogue and tokenise it.

No other module turns the text of examples into token ids, so generation, scoring and training use
the same ids.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from tpaw.data.formats import Dialogue, Message, Unusable, is_unicode
from tpaw.errors import InputError, printable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENDS_EARLY = Unusable("an end-of-sequence token within the target")
_EMPTY = Unusable("the target is empty but for an end-of-sequence token")
_REWRITES = Unusable(
    "the chat template renders the prompt differently if a response follows it",
    "if the chat template opens the response with a token of its own, such as <think>, set "
    "chat_template_kwargs in the records (such as enable_thinking: false), or give records as "
    "rendered text in the columns prompt and completion, or change the chat template of the model",
)
# A text with more characters per allowed token than this is tokenised in part first.
_LONG_TEXT = 32
_CHARACTERS_PER_CALL = 2**20
# How far from the end of a prompt an added token is looked for, and how many ends are remembered.
_TAIL = 200
_TAILS = 64


class Encoded(NamedTuple):
    """A dialogue as token ids.

    Attributes:
        prompt_ids: the token ids of the prompt.
        target_ids: the token ids of the target, which end with an end-of-sequence token.
        prompt: the text of the prompt as the model reads it.
    """

    prompt_ids: list[int]
    target_ids: list[int]
    prompt: str


class _Rendered(NamedTuple):
    """A dialogue as text.

    Attributes:
        prompt: the prompt.
        rest: the text that follows the prompt: the target and what the template adds.
        target: the part of `rest` that comes from the record.
        is_templated: whether the chat template was applied.
        is_call: whether the target has tool calls.
    """

    prompt: str
    rest: str
    target: str
    is_templated: bool
    is_call: bool = False


class ChatFormat:
    """Turns dialogues into prompt ids and target ids.

    Args:
        tokenizer: the tokenizer, with `model.eos_token` applied.
        stop_ids: the token ids that end a response.
        template: the setting `data.template`: auto, chat or none.
        key: key path of that setting, for error messages.
        max_length: longest prompt plus target, in tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Sequence[int],
        template: str,
        key: str,
        max_length: int,
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.template = template
        self.key = key
        self.max_length = max_length
        self.too_long = Unusable(f"longer than max_length {max_length}")
        self.has_template = tokenizer.chat_template is not None
        # Only some tokenizers put a beginning-of-sequence token before plain text.
        plain = tokenizer("a").input_ids
        bos = tokenizer.bos_token_id
        self.bos_ids = [bos] if bos is not None and plain[:1] == [bos] else []
        self._borders = _Borders(tokenizer, self.stop_ids, self._ids)

    def encode(self, dialogues: Sequence[Dialogue]) -> list[Encoded | Unusable]:
        """Apply the chat template, where it is wanted, and tokenise.

        Args:
            dialogues: prompts and targets.

        Returns:
            For each dialogue its token ids, or the reason why it cannot be used.

        Raises:
            InputError: a dialogue is a conversation but the tokenizer has no chat template; or
                the chat template ends an assistant turn without an end-of-sequence token.
        """
        rendered = [self._rendered(dialogue) for dialogue in dialogues]
        usable = [r for r in rendered if isinstance(r, _Rendered)]
        # One call for many texts lets the tokenizer use all cores.
        joint = self._tokenised(r.prompt + r.rest for r in usable)
        encoded = (self._encoded(r, whole) for r, whole in zip(usable, joint, strict=True))
        return [next(encoded) if isinstance(r, _Rendered) else r for r in rendered]

    def _rendered(self, dialogue: Dialogue) -> _Rendered | Unusable:
        wants_template = (
            dialogue.is_chat
            or self.template == "chat"
            or (self.template == "auto" and isinstance(dialogue.prompt, list) and self.has_template)
        )
        if wants_template and self.template != "none":
            rendered = self._templated(dialogue)
        else:
            rendered = _plain(dialogue)
        if isinstance(rendered, Unusable):
            return rendered
        text = rendered.prompt + rendered.rest
        if not is_unicode(text + rendered.target):
            return Unusable("the rendered text contains half of a surrogate pair")
        return self.too_long if self._is_surely_too_long(text) else rendered

    def _templated(self, dialogue: Dialogue) -> _Rendered | Unusable:
        if not self.has_template:
            raise InputError(
                f"{self.key}: {self.template}: the records are conversations, but the tokenizer "
                "has no chat template; add one to the model (tokenizer.chat_template)"
            )
        options = _template_options(dialogue)
        if isinstance(options, Unusable):
            return options
        messages, target = _as_messages(dialogue.prompt), dialogue.target
        response = {"role": "assistant", "content": target} if isinstance(target, str) else target
        try:
            prompt = self._render(messages, options, add_generation_prompt=True)
            whole = self._render([*messages, response], options)
        except Exception as error:  # a template may raise any type
            return Unusable(f"the chat template raises an error: {printable(str(error), 80)}")
        if not whole.startswith(prompt):
            return _REWRITES
        for what, changed in _probes([*messages, response]):
            if self._renders_same(whole, changed, options):
                return Unusable(f"the chat template leaves out {what}")
        rest = whole[len(prompt) :]
        if isinstance(target, str):
            return _Rendered(prompt, rest, target, is_templated=True)
        text = json.dumps(target, default=str, ensure_ascii=False)
        is_call = bool(target.get("tool_calls"))
        return _Rendered(prompt, rest, text, is_templated=True, is_call=is_call)

    def _renders_same(self, text: str, messages: list[Message], options: Mapping[str, Any]) -> bool:
        try:
            return self._render(messages, options) == text
        except Exception:  # the template looks at what was changed
            return False

    def _render(
        self,
        messages: list[Message],
        options: Mapping[str, Any],
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **options,
            )
        )

    def _encoded(self, rendered: _Rendered, whole: _Tokenised) -> Encoded | Unusable:
        joint_ids = whole.ids
        prompt_ids = self._borders.prompt_ids(rendered.prompt, whole) or self._ids(rendered.prompt)
        if joint_ids[: len(prompt_ids)] == prompt_ids:
            target_ids = joint_ids[len(prompt_ids) :]
        else:
            target_ids = self._continuation(rendered.rest)
        if not rendered.is_templated:
            if prompt_ids[: len(self.bos_ids)] != self.bos_ids:
                prompt_ids = self.bos_ids + prompt_ids
            if not self.stop_ids.intersection(target_ids):
                target_ids.append(int(self.tokenizer.eos_token_id))
            if self._end(target_ids) != len(target_ids):
                return _ENDS_EARLY
            if len(target_ids) == 1:
                return _EMPTY
        else:
            if not self.stop_ids.intersection(target_ids):
                if rendered.is_call:
                    return Unusable("the chat template ends a tool call without end of sequence")
                stops = self.tokenizer.convert_ids_to_tokens(sorted(self.stop_ids))
                end = (rendered.prompt + rendered.rest)[-20:]
                raise InputError(
                    f"{self.key}: {self.template}: the chat template ends a response with "
                    f"{end!r}, which contains none of the end-of-sequence tokens {stops}; set "
                    "model.eos_token to the token that the template uses, or change the template"
                )
            text = rendered.target
            if self._borders.may_have_stop(text) and self.stop_ids.intersection(self._ids(text)):
                return _ENDS_EARLY
            # A template may add text after the end-of-sequence token. The model never generates
            # that text, so it is not part of the target.
            target_ids = target_ids[: self._end(target_ids)]
        if not prompt_ids or not target_ids:
            return Unusable("no tokens")
        if len(prompt_ids) + len(target_ids) > self.max_length:
            return self.too_long
        return Encoded(prompt_ids, target_ids, rendered.prompt)

    def _continuation(self, rest: str) -> list[int]:
        """Tokenise what follows the prompt, where one token would span the border.

        Some tokenizers put a space before any text, so the text is encoded after a line break.
        """
        anchor_ids, joint_ids = self._ids("\n"), self._ids("\n" + rest)
        if joint_ids[: len(anchor_ids)] == anchor_ids:
            return joint_ids[len(anchor_ids) :]
        return self._ids(rest)

    def _end(self, target_ids: list[int]) -> int:
        """Number of tokens up to and including the first end-of-sequence token."""
        return next(i for i, token in enumerate(target_ids, start=1) if token in self.stop_ids)

    def _is_surely_too_long(self, text: str) -> bool:
        """Whether the beginning of the text alone has more tokens than allowed.

        Tokenising a text takes hundreds of times its memory, so a text of many megabytes is cut.
        What follows a text changes its tokens near its end at most. Twice the allowed number
        leaves room for that.
        """
        length = _LONG_TEXT * self.max_length
        while length < len(text):
            if len(self._ids(text[:length])) > 2 * self.max_length:
                return True
            length *= 2
        return False

    def _ids(self, text: str) -> list[int]:
        return next(self._tokenised([text])).ids

    def _tokenised(self, texts: Iterable[str]) -> Iterator[_Tokenised]:
        batch: list[str] = []
        characters = 0
        for text in texts:
            batch.append(text)
            characters += len(text)
            if characters > _CHARACTERS_PER_CALL:
                yield from self._tokenised_at_once(batch)
                batch, characters = [], 0
        if batch:
            yield from self._tokenised_at_once(batch)

    def _tokenised_at_once(self, texts: list[str]) -> Iterator[_Tokenised]:
        found = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
        )
        encodings = found.encodings or [None] * len(texts)
        return map(_Tokenised, found.input_ids, encodings)


def is_templated(tokenizer: PreTrainedTokenizerBase, prompt: str) -> bool:
    """Whether the chat template made a prompt: it begins or ends as the template's user turns do.

    Args:
        tokenizer: the tokenizer.
        prompt: the text of a prompt as the model reads it; see `Encoded`.
    """
    before, after = around_a_user_turn(tokenizer)
    begins, ends = (bool(part.strip()) for part in (before, after))
    return (begins and prompt.startswith(before)) or (ends and prompt.endswith(after))


def around_a_user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template puts before and after a prompt of one user turn; empty without one."""
    if tokenizer.chat_template is None:
        return "", ""
    user = "TPAW"
    try:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": user}], tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template may raise any type
        return "", ""
    before, found, after = str(rendered).partition(user)
    return (before, after) if found else ("", "")


class _Tokenised(NamedTuple):
    """Token ids of a text.

    Attributes:
        ids: the token ids.
        encoding: what the library tokenizers knows about them; None for a tokenizer in Python.
    """

    ids: list[int]
    encoding: Any


class _Borders:
    """What can be said about a part of a text whose whole is tokenised already.

    A tokenizer of the library tokenizers first cuts a text at its added tokens, such as
    `<|im_start|>`, and then treats each piece by itself. So the ids before such a token do not
    depend on what follows it.

    Args:
        tokenizer: the tokenizer.
        stop_ids: the token ids that end a response.
        ids: returns the token ids of a text.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop_ids: Collection[int],
        ids: Callable[[str], list[int]],
    ) -> None:
        self._ids = ids
        self._tails: dict[str, list[int]] = {}
        core = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
        # Tokens that are cut out of a text before anything else is done with it.
        added = core.get_added_tokens_decoder() if core is not None else {}
        self._id_of: dict[str, int] = {
            token.content: i for i, token in added.items() if not token.normalized and token.content
        }
        alternatives = "|".join(map(re.escape, sorted(self._id_of, key=len, reverse=True)))
        self._last_added = re.compile(f"(?s:.*)({alternatives})") if self._id_of else None
        # Texts without which no stop token can be in the ids of a text.
        self._stop_texts: list[str] | None = None
        content_of = {i: content for content, i in self._id_of.items()}
        if core is not None and all(i in content_of for i in stop_ids):
            plain = set(core.get_vocab(with_added_tokens=False).values())
            if core.normalizer is None or plain.isdisjoint(stop_ids):
                self._stop_texts = [content_of[i] for i in stop_ids]

    def prompt_ids(self, prompt: str, whole: _Tokenised) -> list[int] | None:
        """The ids of a prompt, from those of a text that begins with it.

        Args:
            prompt: the prompt.
            whole: the tokenised text.

        Returns:
            The ids; None if they must be computed.
        """
        found = self._last_added and self._last_added.match(prompt, max(0, len(prompt) - _TAIL))
        if not found or whole.encoding is None:
            return None
        begin, end = found.span(1)
        place = whole.encoding.char_to_token(begin)
        if place is None or whole.encoding.token_to_chars(place) != (begin, end):
            return None
        if whole.ids[place] != self._id_of[found[1]]:
            return None
        tail = prompt[begin:]
        if tail not in self._tails:
            if len(self._tails) > _TAILS:
                self._tails.clear()
            self._tails[tail] = self._ids(tail)
        tail_ids = self._tails[tail]
        if tail_ids[:1] != whole.ids[place : place + 1]:
            return None
        return whole.ids[:place] + tail_ids

    def may_have_stop(self, text: str) -> bool:
        """Whether the ids of a text may contain a token that ends a response."""
        return self._stop_texts is None or any(stop in text for stop in self._stop_texts)


def _plain(dialogue: Dialogue) -> _Rendered | Unusable:
    messages = [*_as_messages(dialogue.prompt), dialogue.target]
    if any(isinstance(m, Mapping) and not isinstance(m.get("content"), str) for m in messages):
        return Unusable("a message is a tool call, which needs the chat template")
    prompt = dialogue.prompt
    if not isinstance(prompt, str):
        prompt = "\n".join(message["content"] for message in prompt)
    target = dialogue.target if isinstance(dialogue.target, str) else dialogue.target["content"]
    return _Rendered(prompt, target, target, is_templated=False)


def _as_messages(prompt: str | list[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _template_options(dialogue: Dialogue) -> dict[str, Any] | Unusable:
    """The keyword arguments of the template: the record's tools and chat_template_kwargs."""
    given = {"tools": dialogue.tools, "chat_template_kwargs": dialogue.chat_template_kwargs}
    for name, value in given.items():
        if isinstance(value, str):
            try:
                given[name] = json.loads(value) if value.strip() else None
            except (ValueError, RecursionError):
                return Unusable(f"the column {name} is malformed JSON")
    tools, kwargs = given.values()
    if not isinstance(tools, list | None):
        return Unusable("the column tools is not a list")
    if not isinstance(kwargs, Mapping | None):
        return Unusable("the column chat_template_kwargs is not a mapping")
    return {"tools": tools, **(kwargs or {})}


def _probes(messages: list[Message]) -> Iterator[tuple[str, list[Message]]]:
    """Changed copies of a conversation, each with the part that was changed.

    Some templates leave out turns and fields that they do not know. The model would then be asked
    another question than the record has. Such a template renders the copy as the conversation.
    """
    seen = {"system", "user", "assistant"}
    for position, message in enumerate(messages):
        role, calls = message["role"], message.get("tool_calls")
        copy: Message | None = None
        if role not in seen:
            seen.add(role)
            what, copy = (
                f"a turn of role {role!r}",
                {**message, "content": f"{message['content']}x"},
            )
        elif calls and "tool_calls" not in seen:
            seen.add("tool_calls")
            what = "tool calls"
            copy = {name: value for name, value in message.items() if name != "tool_calls"}
        if copy is not None:
            yield what, [*messages[:position], copy, *messages[position + 1 :]]
