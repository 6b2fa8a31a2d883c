"""Apply the chat template to a dialogue and tokenise it.

No other module turns the text of examples into token ids, so generation, scoring and training use
the same ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tpaw.data.formats import Dialogue, Message, Unusable
from tpaw.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENDS_EARLY = Unusable("an end-of-sequence token within the target")


class ChatFormat:
    """Turns a dialogue into prompt ids and target ids.

    Args:
        tokenizer: the tokenizer, with `model.eos_token` applied.
        stop_ids: the token ids that end a response.
        template: the setting `data.template`: auto, chat or none.
        key: key path of that setting, for error messages.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], template: str, key: str
    ) -> None:
        self.tokenizer = tokenizer
        self.stop_ids = frozenset(stop_ids)
        self.template = template
        self.key = key
        self.has_template = tokenizer.chat_template is not None
        # Only some tokenizers put a beginning-of-sequence token before plain text.
        plain = tokenizer("a").input_ids
        bos = tokenizer.bos_token_id
        self.bos_ids = [bos] if bos is not None and plain[:1] == [bos] else []

    def encode(self, dialogue: Dialogue) -> tuple[list[int], list[int], str] | Unusable:
        """Apply the chat template, if it is wanted, and tokenise.

        Args:
            dialogue: the prompt and the target.

        Returns:
            Prompt ids, target ids (which end with an end-of-sequence token), and the text of the
            prompt as the model reads it; or the reason why the dialogue cannot be used.

        Raises:
            InputError: the dialogue is a conversation but the tokenizer has no chat template; or
                the chat template ends an assistant turn without an end-of-sequence token.
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
                f"{self.key}: {self.template}: the records are conversations, but the tokenizer "
                "has no chat template; add one to the model (tokenizer.chat_template)"
            )
        response: Message = {"role": "assistant", "content": target}
        try:
            prompt = self._render(messages, add_generation_prompt=True)
            whole = self._render([*messages, response], add_generation_prompt=False)
        except Exception as error:  # a template may raise any type
            return Unusable(f"the chat template raises an error: {str(error)[:80]}")
        if not whole.startswith(prompt):
            return Unusable(
                "the chat template renders the prompt differently if a response follows it"
            )
        prompt_ids, target_ids = self._split(prompt, whole[len(prompt) :])
        if not self.stop_ids.intersection(target_ids):
            stops = self.tokenizer.convert_ids_to_tokens(sorted(self.stop_ids))
            raise InputError(
                f"{self.key}: {self.template}: the chat template ends a response with "
                f"{whole[-20:]!r}, which contains none of the end-of-sequence tokens {stops}; set "
                "model.eos_token to the token that the template uses, or change the template"
            )
        if self.stop_ids.intersection(self._ids(target)):
            return _ENDS_EARLY
        # A template may add text after the end-of-sequence token. The model never generates that
        # text, so it is not part of the target.
        return prompt_ids, target_ids[: self._end(target_ids)], prompt

    def _render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        )

    def _split(self, prompt: str, rest: str) -> tuple[list[int], list[int]]:
        """Tokenise the prompt, and the rest as the continuation of the prompt."""
        prompt_ids = self._ids(prompt)
        for anchor in (prompt, "\n"):
            # Some tokenizers put a space before any text, so the rest cannot be encoded alone. It
            # is encoded after the prompt and the prompt's ids are cut off. If one token spans both,
            # it is encoded after a line break instead.
            anchor_ids, joint_ids = self._ids(anchor), self._ids(anchor + rest)
            if joint_ids[: len(anchor_ids)] == anchor_ids:
                return prompt_ids, joint_ids[len(anchor_ids) :]
        return prompt_ids, self._ids(rest)

    def _end(self, target_ids: list[int]) -> int:
        """Number of tokens up to and including the first end-of-sequence token."""
        return next(i for i, token in enumerate(target_ids, start=1) if token in self.stop_ids)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)


def _as_messages(prompt: str | list[Message]) -> list[Message]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _as_text(prompt: str | list[Message]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(message["content"] for message in prompt)
