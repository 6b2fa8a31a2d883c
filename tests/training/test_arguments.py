"""TrainingArguments: what a setting of ours decides, and what cannot be set."""

from __future__ import annotations

import dataclasses

import pytest
from messages import refused
from transformers import TrainingArguments

from tpaw.config.schema import RunConfig
from tpaw.training.arguments import CANNOT_BE_SET, RESERVED, USE_INSTEAD, check_training


@pytest.mark.parametrize("name", sorted(RESERVED))
def test_a_reserved_argument_is_refused_by_name(name):
    config = RunConfig.load("starter", overrides=[f"train.training_arguments={{{name}: 1}}"])
    with refused(f"train.training_arguments.{name}"):
        check_training(config)


def test_reserved_names_are_names_of_transformers():
    assert set(RESERVED) <= {f.name for f in dataclasses.fields(TrainingArguments)}
    assert not set(USE_INSTEAD) & set(CANNOT_BE_SET)
