"""Which model an endpoint serves, and adapters that it loads while it runs.

vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING loads and unloads adapters on request:
https://docs.vllm.ai/en/latest/features/lora/. So one server over the base serves all players.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tpaw.errors import InputError, ServerError, printable
from tpaw.generation.endpoint import Endpoint, Refused, Unavailable
from tpaw.runtime.progress import note
from tpaw.team import Player

# Name of the environment variable with the key of the servers.
API_KEY = "TPAW_SERVER_API_KEY"
SECONDS_TO_LIST_MODELS = 30.0
SECONDS_BETWEEN_TRIES = 0.5
# A server that is busy first finishes what it computes.
SECONDS_TO_LOAD_ADAPTER = 300.0

Cards = list[Mapping[str, Any]]


@dataclass(frozen=True)
class Adapter:
    """The adapter of a player, as an endpoint may load it.

    Attributes:
        name: name under which TPAW loads it. It has the fingerprint, because the folder may hold
            another adapter later, after `--restart-iteration`.
        folder: absolute path.
        base_names: the server serves the base if it serves a model with one of these names, or
            from one of these folders.
    """

    name: str
    folder: str
    base_names: tuple[str, ...]


@dataclass(frozen=True)
class Wanted:
    """What an endpoint must serve.

    Attributes:
        name: `generate.server.model`, filled.
        adapter: None if the player has none.
    """

    name: str
    adapter: Adapter | None = None

    @classmethod
    def of(cls, player: Player, name: str, name_of_base: str) -> Wanted:
        """The player under a name.

        Args:
            name_of_base: the name that the base would have as θ_0.
        """
        if player.adapter_folder is None or player.base is None:
            return cls(name)
        folder, base = Path(player.adapter_folder).resolve(), Path(player.base.path).resolve()
        own = f"{name}@{player.fingerprint[:12]}"
        return cls(name, Adapter(own, str(folder), (name_of_base, str(base), player.base.name)))


@dataclass(eq=False)
class Served:
    """An endpoint that serves a player.

    Attributes:
        model: the name that requests give.
        ignores_eos: see `completion_request`.
        successes: replies so far.
        failure: why it is no longer asked; None while it is.
    """

    endpoint: Endpoint
    wanted: Wanted
    model: str = ""
    ignores_eos: bool = False
    successes: int = 0
    failure: str | None = None

    def revive(self) -> None:
        """Ask the endpoint again if it answers again."""
        with contextlib.suppress(ServerError, InputError):
            found = serving(self.endpoint, self.wanted, tries=1)
            self.model, self.ignores_eos, self.failure = found.model, found.ignores_eos, None
            note(f"{self.endpoint.url} answers again")

    def unload(self) -> None:
        """Unload the adapter, if TPAW has loaded it. Whatever goes wrong, the server goes on."""
        if self.wanted.adapter is not None and self.model == self.wanted.adapter.name:
            with contextlib.suppress(Unavailable, Refused):
                self.endpoint.unload_adapter(self.model, SECONDS_TO_LIST_MODELS)


def serving(endpoint: Endpoint, wanted: Wanted, tries: int = 3) -> Served:
    """Check that an endpoint serves the player. Its adapter is loaded if it is not there.

    Raises:
        InputError: it serves another model, and cannot load the adapter.
        ServerError: it does not answer.
    """
    cards = _models(endpoint, tries)
    found = _served(endpoint, wanted, cards)
    if found is None and wanted.adapter is not None:
        _load(endpoint, wanted, wanted.adapter, cards)
        found = _served(endpoint, wanted, _models(endpoint, tries))
    if found is None:
        raise InputError(
            f"generate.server: {endpoint.url} serves {_listed(cards)}, and {wanted.name} is "
            "needed; start the server for this model, or set generate.server.model to the name "
            "that it has there"
        )
    return found


def explain_a_wrong_key(error: Unavailable | Refused) -> None:
    """Raise a ServerError if a server wants another key: no later try would help."""
    if isinstance(error, Refused) and error.status in (401, 403):
        raise ServerError(
            f"{error}; set {API_KEY} in the environment to the key of the server"
        ) from None


def _models(endpoint: Endpoint, tries: int) -> Cards:
    while True:
        try:
            return endpoint.models(SECONDS_TO_LIST_MODELS)
        except Refused as error:
            explain_a_wrong_key(error)
            raise ServerError(f"{error}; the URL of an endpoint ends with /v1") from None
        except Unavailable as error:
            tries -= 1
            if not tries:
                raise ServerError(str(error)) from None
            time.sleep(SECONDS_BETWEEN_TRIES)


def _served(endpoint: Endpoint, wanted: Wanted, cards: Cards) -> Served | None:
    for card in cards:
        if _is_wanted(card, wanted):
            return Served(endpoint, wanted, card["id"], card.get("owned_by") == "vllm")
    return None


def _is_wanted(card: Mapping[str, Any], wanted: Wanted) -> bool:
    name, adapter = card.get("id"), wanted.adapter
    if adapter is None or name != wanted.name:
        return name == (wanted.name if adapter is None else adapter.name)
    # The name may be the same for all players. vLLM gives an adapter its base as parent.
    return wanted.name not in adapter.base_names or bool(card.get("parent"))


def _load(endpoint: Endpoint, wanted: Wanted, adapter: Adapter, cards: Cards) -> None:
    """Let an endpoint load an adapter.

    Raises:
        InputError: it serves another base, loads no adapters while it runs, or not this one.
        ServerError: it does not answer.
    """
    served = {str(card.get(key)) for card in cards for key in ("id", "root")}
    if not served & set(adapter.base_names):
        raise InputError(
            f"generate.server: {endpoint.url} serves {_listed(cards)}, and neither {wanted.name} "
            f"nor the base of its adapter, {adapter.base_names[-1]}; start the server for this "
            "base, or serve the adapter under this name"
        )
    try:
        endpoint.load_adapter(adapter.name, adapter.folder, SECONDS_TO_LOAD_ADAPTER)
    except Refused as error:
        if error.status in (404, 405) and adapter.folder not in str(error):
            raise InputError(
                f"generate.server: {endpoint.url} serves {_listed(cards)}, and not the adapter "
                f"{adapter.folder}. It loads no adapter while it runs: start vLLM with "
                "--enable-lora and with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, "
                f"or let it serve the adapter: --lora-modules={wanted.name}={adapter.folder}"
            ) from None
        if _served(endpoint, wanted, _models(endpoint, tries=1)) is None:
            raise _not_loaded(endpoint, adapter, error) from None
        # Another process of the run was faster.
    except Unavailable as error:
        if error.status != 500:
            raise ServerError(str(error)) from None
        raise _not_loaded(endpoint, adapter, error) from None


def _not_loaded(endpoint: Endpoint, adapter: Adapter, error: Exception) -> InputError:
    return InputError(
        f"generate.server: {endpoint.url} does not load the adapter {adapter.folder}: {error}. The "
        "server must see this folder under this path, and needs --enable-lora and a "
        "--max-lora-rank of at least the adapter's rank"
    )


def _listed(cards: Iterable[Mapping[str, Any]]) -> str:
    return printable(", ".join(str(card.get("id")) for card in cards) or "no model")
