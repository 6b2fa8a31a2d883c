"""Try a tokenizer's chat template once, in a child process with limits.

A template is a program. transformers runs it in a sandbox that keeps it from the system, but not
from running for ever or from filling the memory, and a thread cannot be stopped from outside.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import time
from typing import TYPE_CHECKING

from tpaw.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CPU_SECONDS = 2
SECONDS = 20.0
BYTES = 256 * 2**20
CHARACTERS = 1_000_000

_PASSED: set[str] = set()
_CONVERSATION = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


def try_template(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Refuse a chat template that does not end or grows without bound on three short turns.

    A template that raises an error passes: whether it takes a conversation depends on the
    conversation. A template that grows only with certain text passes too.

    Args:
        tokenizer: one without a template passes.
        name: the model, for the error.

    Raises:
        InputError: the template needs more time, memory or text than three short turns can need.
    """
    template = str(tokenizer.chat_template)
    if tokenizer.chat_template is None or template in _PASSED:
        return
    child = os.fork()
    if child == 0:
        _render_within_limits(tokenizer)  # never returns
    deadline = time.monotonic() + SECONDS
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.001)
    if ended[1] != 0:
        raise InputError(
            f"model.path: {name}: the chat template needs more than {CPU_SECONDS} s, "
            f"{BYTES // 2**20} MB or {CHARACTERS} characters for three short turns; correct the "
            "tokenizer's chat_template"
        )
    _PASSED.add(template)


def _render_within_limits(tokenizer: PreTrainedTokenizerBase) -> None:
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
        with contextlib.suppress(OSError, ValueError):  # a system without /proc has no such limit
            pages = int(open("/proc/self/statm", encoding="ascii").read().split()[0])  # noqa: SIM115
            limit = pages * resource.getpagesize() + BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        code = 0
        for prompts in (True, False):
            try:
                text = tokenizer.apply_chat_template(
                    _CONVERSATION, tokenize=False, add_generation_prompt=prompts
                )
                code |= len(text) > CHARACTERS
            except MemoryError:
                code = 1
            except Exception:  # a template may raise any type
                continue
    finally:
        os._exit(code)
