"""The private interfaces of other libraries are those of docs/reference/compatibility.md."""

from __future__ import annotations

import inspect
import re
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
import transformers.cache_utils
import transformers.masking_utils
import transformers.trainer_callback
from packaging.requirements import Requirement
from packaging.version import Version
from torch.nn.attention.varlen import varlen_attn
from transformers.models.auto import modeling_auto

import tpaw

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "compatibility.md"
PACKAGE = Path(tpaw.__file__).parent


def rows():
    section = PAGE.read_text(encoding="utf-8").partition("## Private")[2]
    cells = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in cells][1:]


def test_every_row_names_a_file_that_uses_the_interface():
    found = rows()
    assert len(found) > 20
    for interface, files, why, breaks in found:
        assert why
        assert breaks
        sources = [(PACKAGE / name).read_text() for name in re.findall(r"`([\w/]+\.py)`", files)]
        assert sources, interface
        for name in re.findall(r"`([^`]*)`", interface):
            last = re.split(r"[.(]", name.partition("(")[0])[-1] or name
            assert any(last in source for source in sources), f"{name} is not in {files}"


def test_varlen_attn_takes_the_arguments_that_the_cuda_path_passes():
    source = (PACKAGE / "logprobs" / "attention.py").read_text()
    call = source.partition("= varlen_attn(")[2].partition("    )\n")[0]
    passed = re.findall(r"^\s+(\w+)=", call, flags=re.M)
    assert {"scale", "window_size", "enable_gqa"} == set(passed)
    assert set(passed) <= set(inspect.signature(varlen_attn).parameters)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (transformers.Trainer, "get_batch_samples"),
        (transformers.Trainer, "_prepare_inputs"),
        (transformers.Trainer, "training_step"),
        (transformers.Trainer, "get_optimizer_cls_and_kwargs"),
        (transformers.TrainerState, "compute_steps"),
        (transformers.trainer_callback, "PrinterCallback"),
        (transformers.PreTrainedModel, "is_backend_compatible"),
        (transformers.PreTrainedModel, "set_attn_implementation"),
        (transformers.GenerationMixin, "_supports_default_dynamic_cache"),
        (transformers, "AttentionInterface"),
        (transformers, "AttentionMaskInterface"),
        (transformers.masking_utils, "sdpa_mask"),
        (transformers.cache_utils, "DynamicLayer"),
        (transformers.cache_utils, "DynamicSlidingWindowLayer"),
        (transformers.cache_utils, "CacheLayerMixin"),
        (modeling_auto, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
        (torch.utils.deterministic, "fill_uninitialized_memory"),
    ],
)
def test_it_is_still_there(owner, name):
    assert hasattr(owner, name)


def test_the_trainer_reads_the_flag_that_switches_its_scaling_off():
    assert "loss_is_scaled_for_ga" in inspect.getsource(transformers.Trainer)


def test_the_harness_has_what_is_used_of_it():
    utils = pytest.importorskip("lm_eval.models.utils")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    for name in ("handle_stop_sequences", "normalize_gen_kwargs", "postprocess_generated_text"):
        assert hasattr(utils, name)
    assert hasattr(huggingface.HFLM, "_loglikelihood_tokens")
    assert "cache_hook" in inspect.getsource(huggingface.HFLM._loglikelihood_tokens)


def test_the_lower_bounds_are_the_versions_that_the_lowest_run_uses():
    root = PAGE.parents[2]
    lowest = dict(
        line.split("==")
        for line in (root / "constraints-lowest.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    lowest = {name.lower().replace("_", "-"): Version(v) for name, v in lowest.items()}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    given = project["dependencies"] + [r for name in extras if name != "dev" for r in extras[name]]
    for requirement in map(Requirement, given):
        [bound] = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        assert lowest[requirement.name] == bound, requirement
