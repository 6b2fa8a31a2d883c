"""Players in memory: one at a time, for generation, scoring or training."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from tpaw.config.schema import GenerateConfig, RunConfig
from tpaw.generation.generator import Generator, OpenGenerator
from tpaw.generation.hf import hf_opener
from tpaw.generation.server import Servers
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.models.adapters import AdaptedBase
from tpaw.models.loading import load_base, load_model, pick_device
from tpaw.models.sharding import ALONE, Member, shard
from tpaw.runtime.interrupt import StopSignal
from tpaw.runtime.memory import return_free_memory
from tpaw.runtime.processes import process_count
from tpaw.runtime.progress import note_once
from tpaw.scoring.score import Precision, ScoringModel
from tpaw.team import Player
from tpaw.training.split_weights import round_weights

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class LoadedPlayers:
    """Loads players and keeps the last one, for as long as the next stage needs the same.

    Generation and scoring use the same weights where both compute in fp32. In bf16, generation
    loads weights rounded to bf16, and scoring computes with fp32 weights under autocast, as
    training does.

    Players that are adapters share one base. It is loaded once, in bf16 if that is the precision
    of the run: nobody trains it, so it needs no more bits. All stages use it, with one adapter at
    a time on top.

    A generation server ends before training begins. On a GPU it also ends before a player is
    loaded, because both need the memory.

    Args:
        config: the run's configuration.
        stop: tells a server that starts whether the user asked for a stop.
        member: this process in the group that scores together.

    Attributes:
        seconds_of_loading: spent so far on loading players and on starting servers.
    """

    def __init__(
        self, config: RunConfig, stop: StopSignal | None = None, member: Member = ALONE
    ) -> None:
        self.config = config
        self.member = member
        self.servers = Servers((stop or StopSignal()).check)
        self.device = pick_device(config.device)
        self.precision = Precision(self.device.type, config.precision == "bf16")
        self.seconds_of_loading = 0.0
        self._base: AdaptedBase | None = None
        self._kept: tuple[str, torch.dtype, PreTrainedModel] | None = None
        self._scorer: ScoringModel | None = None  # of the model that is kept

    @property
    def open_generator(self) -> OpenGenerator:
        """Generation with the backend of the configuration."""
        if self.config.generate.backend == "server":
            return self._open_server
        return hf_opener(lambda player: self._load(player, self.precision.dtype))

    def for_scoring(self, player: Player) -> ScoringModel:
        """A player whose log-probs agree with those that training computes."""
        is_sharded = self.member.size > 1
        model = self._load(player, torch.float32, torch.device("cpu") if is_sharded else None)
        if self._scorer is None:
            with self._loading():
                layout, notes = prepare_for_logprobs(model, self.config.max_length)
                if is_sharded:
                    shard(model, self.device)
            for text in notes:
                note_once(text)
            self._scorer = ScoringModel(model, layout, self.precision, self.member)
        return self._scorer

    def for_training(self, player: Player, t: int) -> PreTrainedModel | PeftModel:
        """A policy that nobody else holds: in fp32, or a base with an adapter in fp32."""
        adapter = self.config.model.adapter
        self.release(keep_base=True)
        if adapter is None:
            # FSDP2 moves its part of the weights to the device itself; all of them may not fit.
            is_sharded = process_count() > 1 and self.config.train.parallel == "fsdp2"
            device = torch.device("cpu") if is_sharded else self.device
            return load_model(player, self.config.model, dtype=torch.float32, device=device)
        seed = int(np.random.SeedSequence((self.config.seed, t)).generate_state(2)[1])
        return self._base_of(player).policy(player.adapter_folder, adapter, seed)

    def release(self, *, keep_base: bool = False) -> None:
        """Free the memory of the player that is kept, and end its server.

        Args:
            keep_base: keep the base of the adapters, if there is one.
        """
        self.servers.close()
        self._kept = self._scorer = None
        if self._base is not None:
            self._base.take_off()
        if not keep_base:
            self._base = None
        gc.collect()  # a trainer and its policy refer to each other
        torch.cuda.empty_cache()
        return_free_memory()

    @property
    def _shares_memory(self) -> bool:
        """Whether a server and a player in this process must not be in memory together."""
        return self.device.type == "cuda"

    @contextlib.contextmanager
    def _open_server(self, player: Player, config: GenerateConfig) -> Iterator[Generator]:
        is_in_memory = self._kept is not None or self._base is not None
        if config.server.command is not None and self._shares_memory and is_in_memory:
            self.release()
        with contextlib.ExitStack() as stack:
            with self._loading():
                generator = stack.enter_context(self.servers.open(player, config))
            yield generator

    def _load(
        self, player: Player, dtype: torch.dtype, device: torch.device | None = None
    ) -> PreTrainedModel:
        device = device or self.device
        if self.config.model.adapter is not None:
            dtype = self.precision.dtype  # the base's, in every stage
        if self._kept is None or self._kept[:2] != (player.fingerprint, dtype):
            self._kept = self._scorer = None
            if self._shares_memory:
                self.servers.close()
                gc.collect()  # an output head and the `LogprobHead` on it refer to each other
            return_free_memory()
            with self._loading():
                if self.config.model.adapter is not None:
                    model = self._base_of(player).put_on(player.adapter_folder)
                else:
                    model = load_model(player, self.config.model, dtype=dtype, device=device)
            if dtype == torch.float32 and self.config.train.weights == "split":
                round_weights(model)  # scored with the weights that it trains with
            self._kept = player.fingerprint, dtype, model
        return self._kept[2]

    @contextlib.contextmanager
    def _loading(self) -> Iterator[None]:
        begin = time.monotonic()
        try:
            yield
        finally:
            self.seconds_of_loading += time.monotonic() - begin

    def _base_of(self, player: Player) -> AdaptedBase:
        if self._base is None:
            model, dtype = self.config.model, self.precision.dtype
            self._base = AdaptedBase(load_base(player, model, dtype=dtype, device=self.device))
        return self._base
