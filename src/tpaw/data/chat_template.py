"""A dialogue becomes prompt ids and target ids. This is the only place where text becomes ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tpaw.data.formats import Dialogue, Message, Unusable
from tpaw.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENDS_EARLY = Unusable("an end-of-sequence token within the target")


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


def _as_messages(prompt: str | list[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _as_text(prompt: str | list[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt)
