"""Players in memory: one at a time, for generation, scoring or training."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import numpy as np
import torch

from tpaw.config.schema import RunConfig
from tpaw.generation.generator import OpenGenerator
from tpaw.generation.hf import hf_opener
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.models.adapters import AdaptedBase
from tpaw.models.loading import load_base, load_model, pick_device
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
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.device = pick_device(config.device)
        self.precision = Precision(self.device.type, config.precision == "bf16")
        self._base: AdaptedBase | None = None
        self._kept: tuple[str, torch.dtype, PreTrainedModel] | None = None
        self._scorer: ScoringModel | None = None  # of the model that is kept

    @property
    def open_generator(self) -> OpenGenerator:
        """Generation with the Hugging Face model in this process."""
        return hf_opener(lambda player: self._load(player, self.precision.dtype))

    def for_scoring(self, player: Player) -> ScoringModel:
        """A player whose log-probs agree with those that training computes."""
        model = self._load(player, torch.float32)
        if self._scorer is None:
            layout, notes = prepare_for_logprobs(model, self.config.max_length)
            for text in notes:
                note_once(text)
            self._scorer = ScoringModel(model, layout, self.precision)
        return self._scorer

    def for_training(self, player: Player, t: int) -> PreTrainedModel | PeftModel:
        """A policy that nobody else holds: in fp32, or a base with an adapter in fp32."""
        adapter = self.config.model.adapter
        self.release(keep_base=True)
        if adapter is None:
            return load_model(player, self.config.model, dtype=torch.float32, device=self.device)
        seed = int(np.random.SeedSequence((self.config.seed, t)).generate_state(2)[1])
        return self._base_of(player).policy(player.adapter_folder, adapter, seed)

    def release(self, *, keep_base: bool = False) -> None:
        """Free the memory of the player that is kept.

        Args:
            keep_base: keep the base of the adapters, if there is one.
        """
        self._kept = self._scorer = None
        if self._base is not None:
            self._base.take_off()
        if not keep_base:
            self._base = None
        gc.collect()  # a trainer and its policy refer to each other
        torch.cuda.empty_cache()

    def _load(self, player: Player, dtype: torch.dtype) -> PreTrainedModel:
        if self.config.model.adapter is not None:
            dtype = self.precision.dtype  # the base's, in every stage
        if self._kept is None or self._kept[:2] != (player.fingerprint, dtype):
            self._kept = self._scorer = None
            if self.config.model.adapter is not None:
                model = self._base_of(player).put_on(player.adapter_folder)
            else:
                model = load_model(player, self.config.model, dtype=dtype, device=self.device)
            if dtype == torch.float32 and self.config.train.weights == "split":
                round_weights(model)  # scored with the weights that it trains with
            self._kept = player.fingerprint, dtype, model
        return self._kept[2]

    def _base_of(self, player: Player) -> AdaptedBase:
        if self._base is None:
            model, dtype = self.config.model, self.precision.dtype
            self._base = AdaptedBase(load_base(player, model, dtype=dtype, device=self.device))
        return self._base
