"""Weights in two halves: the bits, the update, its state, and a run that trains with them."""

from __future__ import annotations

import io
import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from builders import contents, make_model, stopped_at_step
from messages import DIFFERENCE, refused
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import tpaw.training.iteration
import tpaw.training.split_weights
import tpaw.training.trainer
from tpaw.config.schema import RunConfig
from tpaw.errors import PolicyMismatchError
from tpaw.selfplay import self_play
from tpaw.storage.run_directory import RunDirectory
from tpaw.training.arguments import check_training, split_optimizer, training_arguments
from tpaw.training.split_weights import (
    SplitRMSprop,
    join_fp32,
    restore_fp32,
    round_stochastically,
    round_weights,
    split_fp32,
)

BF16_STEP = 2.0**-7  # between neighbours, relative to the power of two below


def floats(bits):
    """float32 of uint32 bit patterns."""
    return torch.from_numpy(np.asarray(bits, dtype=np.uint32).view(np.int32)).view(torch.float32)


def patterns():
    """Every lower half under telling upper ones, and many random words; NaN left out."""
    # ±0 and denormals, the least normal, 0.02, 1 and its neighbours, the largest bf16, ±inf.
    uppers = [0x0000, 0x0001, 0x007F, 0x0080, 0x3CA3, 0x3F7F, 0x3F80, 0x4000, 0x7F7E, 0x7F7F]
    words = [(u | s) << 16 | low for u in uppers for s in (0, 0x8000) for low in range(2**16)]
    words += [0x7F800000, 0xFF800000]
    drawn = np.random.default_rng(0).integers(0, 2**32, 2**20, dtype=np.uint32)
    words = floats(np.concatenate([np.array(words, dtype=np.uint32), drawn]))
    return words[~words.isnan()]


def joined_by_numpy(upper, lower):
    """The arithmetic of the definition, in 64 bits."""
    high = upper.view(torch.int16).numpy().astype(np.uint16).astype(np.int64)
    return floats(((high << 16) + lower.numpy().astype(np.int64)) % 2**32)


def same_bits(a, b):
    return a.dtype == b.dtype and torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_the_halves_join_to_the_same_bits():
    weight = patterns()
    upper, lower = split_fp32(weight)
    assert (upper.dtype, lower.dtype) == (torch.bfloat16, torch.int16)
    assert same_bits(join_fp32(upper, lower), weight)
    assert same_bits(joined_by_numpy(upper, lower), weight)


def test_the_upper_half_is_the_nearest_bf16_and_ties_go_away_from_zero():
    weight = patterns()
    upper, _ = split_fp32(weight)
    bits = weight.view(torch.int32)
    tie = (bits & 0xFFFF) == 0x8000
    assert int(tie.sum()) >= 20
    assert torch.equal(upper[~tie], weight[~tie].bfloat16())
    assert bool((upper[tie].double().abs() > weight[tie].double().abs()).all())


def test_what_is_not_finite():
    weight = floats([0x7F7F7FFF, 0x7F7F8000, 0xFF7FFFFF, 0x7F800000, 0xFF800000])
    upper, lower = split_fp32(weight)
    # As rounding to nearest does: from half a step above the largest bf16 on it is infinite.
    assert upper.isinf().tolist() == [False, True, True, True, True]
    assert same_bits(join_fp32(upper, lower), weight)
    # The last is CUDA's own; split by the bits alone, it would have an upper half of −0.
    nans = floats([0x7FC00000, 0x7F800001, 0xFFC00000, 0xFFFFFFFF, 0x7FFFFFFF])
    upper, lower = split_fp32(nans)
    assert bool(upper.isnan().all())
    assert bool(join_fp32(upper, lower).isnan().all())


def parameters(shapes, seed=0, scale=0.1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator) * scale) for shape in shapes]


def whole(optimizer):
    """The joined weights, in the order of the parameters."""
    return [
        joined_by_numpy(p.data, optimizer.state[p]["lower"])
        for group in optimizer.param_groups
        for p in group["params"]
    ]


@pytest.mark.parametrize("max_grad_norm", [0.0, 30.0])
@pytest.mark.parametrize("slice_size", [1000, 2**24])
def test_with_a_fp32_state_it_is_torchs_rmsprop_bit_for_bit(monkeypatch, slice_size, max_grad_norm):
    monkeypatch.setattr(tpaw.training.split_weights, "SLICE", slice_size)
    shapes = [(33, 65), (1,), (), (7, 5, 3), (4099,)]
    plain, split = parameters(shapes), parameters(shapes)

    def groups(p):
        return [{"params": p[:3], "weight_decay": 0.1}, {"params": p[3:]}]

    options = {"lr": 1e-6, "alpha": 0.95, "eps": 1e-6}
    expected = torch.optim.RMSprop(groups(plain), **options)
    optimizer = SplitRMSprop(
        groups(split), **options, state_dtype=torch.float32, max_grad_norm=max_grad_norm
    )
    generator = torch.Generator().manual_seed(1)
    norms = []
    for step in range(100):
        for number, (a, b) in enumerate(zip(plain, split, strict=True)):
            if (step + number) % 7 == 0:  # as a parameter that a batch does not touch
                a.grad = b.grad = None
                continue
            b.grad = (torch.randn(a.shape, generator=generator) * 10**-number).bfloat16()
            a.grad = b.grad.float()
        for group in (*expected.param_groups, *optimizer.param_groups):
            group["lr"] = 1e-6 * (1 + math.cos(step / 30))
        if max_grad_norm:
            norms.append(torch.nn.utils.clip_grad_norm_(plain, max_grad_norm))
        expected.step()
        optimizer.step()
        assert all(map(same_bits, whole(optimizer), plain))
    assert not norms or min(norms) < max_grad_norm < max(norms)
    for a, b in zip(plain, split, strict=True):
        assert b.dtype == torch.bfloat16
        assert torch.equal(expected.state[a]["square_avg"], optimizer.state[b]["square_avg"])
    restore_fp32(optimizer)
    assert all(map(same_bits, split, plain))
    assert not optimizer.state


def test_the_defaults_are_torchs():
    expected = torch.optim.RMSprop([torch.nn.Parameter(torch.ones(1))]).defaults
    found = SplitRMSprop([torch.nn.Parameter(torch.ones(1))]).defaults
    assert {name: expected[name] for name in found if name in expected} == {
        name: value for name, value in found.items() if name != "steps"
    }


def test_a_learning_rate_of_1e_7_moves_the_weights_as_fp32_does_and_not_those_of_bf16():
    count, steps = 2**15, 60
    start = torch.rand(count, generator=torch.Generator().manual_seed(0)) * 0.98 + 0.02
    plain, split, bf16 = (torch.nn.Parameter(start.clone()) for _ in range(3))
    bf16.data = start.bfloat16()
    options = {"lr": 1e-7}
    optimizers = [
        torch.optim.RMSprop([plain], **options),
        SplitRMSprop([split], **options),
        torch.optim.RMSprop([bf16], **options),
    ]
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        bf16.grad = (torch.randn(count, generator=generator) + 0.5).bfloat16()
        split.grad, plain.grad = bf16.grad, bf16.grad.float()
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(bf16.data, start.bfloat16())
    wanted = (plain.data.double() - start.double()).mean().item()
    moved = (whole(optimizers[1])[0].double() - start.double()).mean().item()
    assert wanted < -1e-6
    # The noise of v has a variance below (2^-7)²/4 / (1 − 0.99²), and 1/√v is convex: at most 3/8
    # of it. What the mean over so many weights leaves of the noise itself is less than that.
    assert moved == pytest.approx(wanted, rel=2 * 3 / 8 * BF16_STEP**2 / 4 / (1 - 0.99**2))


def test_stochastic_rounding_gives_the_neighbours_with_the_right_shares():
    share = torch.rand(64, generator=torch.Generator().manual_seed(0))
    low = torch.randn(64, generator=torch.Generator().manual_seed(1)).bfloat16()
    high = (low.view(torch.int16) + 1).view(torch.bfloat16)
    value = low.float() + share * (high.float() - low.float())
    share = (value - low.float()) / (high.float() - low.float())  # as float32 holds it
    times = 2**14
    generator = torch.Generator().manual_seed(2)
    found = round_stochastically(value.repeat(times, 1), generator)
    assert bool(((found == low) | (found == high)).all())
    deviation = (share * (1 - share) / times).sqrt() + 2**-16  # the noise has 16 bits
    assert bool((((found == high).float().mean(dim=0) - share).abs() < 5 * deviation).all())
    exact = torch.tensor([0.0, 1.0, -3.5, math.inf, -math.inf])
    assert torch.equal(round_stochastically(exact, generator), exact.bfloat16())


def test_a_bf16_state_is_unbiased_where_rounding_to_nearest_gets_stuck():
    count, steps = 2**12, 700
    plain, split, nearest = (torch.nn.Parameter(torch.ones(count)) for _ in range(3))
    nearest.data = nearest.data.bfloat16()
    optimizers = [
        torch.optim.RMSprop([plain]),
        SplitRMSprop([split]),
        torch.optim.RMSprop([nearest]),
    ]
    nearest.grad = torch.full((count,), 1.2, dtype=torch.bfloat16)  # its square is no bf16
    split.grad, plain.grad = nearest.grad, nearest.grad.float()
    for _ in range(steps):
        for optimizer in optimizers:
            optimizer.step()
    truth, found, stuck = (
        optimizer.state[p]["square_avg"].double()
        for optimizer, p in zip(optimizers, (plain, split, nearest), strict=True)
    )
    # An average of Bernoulli errors of one bf16 step, each step's weighing 0.99 of the next one's.
    deviation = BF16_STEP / 2 / math.sqrt(1 - 0.99**2)
    assert abs(found.mean() / truth.mean() - 1) < 5 * deviation / math.sqrt(count)
    assert deviation / 10 < found.std() / truth.mean() < deviation
    assert stuck.max() / truth.mean() < 0.9


def stepped(optimizer, params, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator).bfloat16()
        optimizer.step()


def test_a_saved_state_goes_on_with_the_same_bits():
    shapes = [(20, 30), (50,)]
    params = parameters(shapes)
    optimizer = SplitRMSprop(params, lr=1e-3)
    stepped(optimizer, params, 3, seed=1)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed = [torch.nn.Parameter(p.data.float()) for p in params]  # what is saved of the model
    # accelerate, which the Trainer wraps it in, loads its state once more.
    again = Accelerator(cpu=True).prepare(SplitRMSprop(resumed, lr=9.0))
    again.load_state_dict(torch.load(buffer, weights_only=True))
    stepped(optimizer, params, 3, seed=2)
    stepped(again.optimizer, resumed, 3, seed=2)
    assert all(map(same_bits, whole(again), whole(optimizer)))
    for a, b in zip(params, resumed, strict=True):
        assert torch.equal(optimizer.state[a]["square_avg"], again.state[b]["square_avg"])
    other = SplitRMSprop(parameters(shapes), state_dtype=torch.float32)
    with refused("square_avg", "torch.float32", error=ValueError):
        other.load_state_dict(optimizer.state_dict())
    foreign = torch.optim.RMSprop(parameters(shapes))
    with refused("lower", "torch.int16", error=ValueError):
        other.load_state_dict(SplitRMSprop(parameters(shapes)).state_dict() | {"state": {}})
    foreign.step()
    with refused("torch.bfloat16", error=ValueError):
        SplitRMSprop(params)


def test_every_step_draws_noise_of_its_own():
    value = [torch.nn.Parameter(torch.zeros(1000))]
    optimizer = SplitRMSprop(value)
    ups = []
    for _ in range(3):
        optimizer.state[value[0]]["square_avg"].zero_()
        value[0].grad = torch.full((1000,), 0.77, dtype=torch.bfloat16)
        optimizer.step()
        ups.append(optimizer.state[value[0]]["square_avg"].clone())
    assert len(ups[0].unique()) == 2
    assert not torch.equal(ups[0], ups[1])
    assert not torch.equal(ups[1], ups[2])


def test_a_gradient_that_is_not_finite_is_seen_in_the_weights():
    for grad in (math.nan, math.inf):
        [p] = parameters([(3,)])
        optimizer = SplitRMSprop([p])
        p.grad = torch.tensor([0.1, grad, 0.1]).bfloat16()
        optimizer.step()
        optimizer.step()
        assert p.isfinite().tolist() == [True, False, True]
        restore_fp32(optimizer)
        assert p.isfinite().tolist() == [True, False, True]


def test_tied_weights_are_one_weight():
    model, same = make_model("qwen2"), make_model("qwen2")
    optimizer = SplitRMSprop(model.parameters(), lr=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(optimizer.state) == len(list(model.parameters())) == len(list(same.parameters()))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    restore_fp32(optimizer)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, value in model.state_dict().items():
        assert same_bits(value, same.state_dict()[name])


def test_scoring_computes_with_the_weights_that_training_computes_with():
    scored, trained = make_model("llama"), make_model("llama")
    round_weights(scored)
    SplitRMSprop(trained.parameters())
    for a, b in zip(scored.parameters(), trained.parameters(), strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        assert torch.equal(a, b)
    assert [b.dtype for b in scored.buffers()] == [b.dtype for b in trained.buffers()]


@pytest.fixture
def split_settings(settings):
    settings |= {"precision": "bf16", "iterations": 2}
    settings["train"] |= {"weights": "split", "learning_rate": 1e-5, "warmup": 0.0}
    return settings


def test_a_run_that_was_stopped_goes_on_with_the_same_bytes(split_settings, tmp_path):
    # Three steps after the stop, as the noise of one shows in the weights of the next.
    split_settings["train"] |= {"activation_checkpointing": True, "epochs": 2}
    config = RunConfig.load(split_settings)
    self_play(config, tmp_path / "whole")
    stopped_at_step(2, config, tmp_path / "cut")
    saved = RunDirectory(tmp_path / "cut").last_saved_step(1)
    state = torch.load(saved / "optimizer.pt", weights_only=True)["state"]
    assert {s["lower"].dtype for s in state.values()} == {torch.int16}
    assert {s["square_avg"].dtype for s in state.values()} == {torch.bfloat16}
    weights = load_file(saved / "model.safetensors").values()
    assert {w.dtype for w in weights} == {torch.bfloat16}
    self_play(config, tmp_path / "cut")
    found = contents(tmp_path / "whole")
    assert sum(name.endswith("checkpoint/model.safetensors") for name in found) == 2
    assert found == contents(tmp_path / "cut")


def test_a_checkpoint_holds_the_joined_weights_in_fp32(
    split_settings, tmp_path, monkeypatch, model_folder
):
    expected = []

    def restore(optimizer):
        halves = [(p.data, optimizer.state[p]["lower"]) for p in optimizer.state]
        expected.append(sorted(joined_by_numpy(*pair).sum().item() for pair in halves))
        restore_fp32(optimizer)

    monkeypatch.setattr(tpaw.training.iteration, "restore_fp32", restore)
    self_play(RunConfig.load(split_settings), tmp_path / "r")
    assert len(expected) == 2
    before = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    for t, sums in enumerate(expected):
        folder = RunDirectory(tmp_path / "r").checkpoint(t + 1)
        model = AutoModelForCausalLM.from_pretrained(folder)  # in the type that it names
        assert model.dtype == torch.float32
        assert sorted(p.sum().item() for p in model.parameters()) == sums
        moved = 0.0
        for old, new in zip(before.parameters(), model.parameters(), strict=True):
            assert bool((new != new.bfloat16().float()).any())
            moved = max(moved, (new - old).abs().max().item())
        # A step of RMSprop is at most √(1 / (1 − 0.99)) = 10 learning rates long; there are 3 or 6.
        assert 1e-5 < moved < 6 * 10 * 1e-5
        before = model


def test_the_first_step_check_sees_rounding_only(split_settings, tmp_path, monkeypatch):
    """And what it would see if players were scored with weights that are not rounded alike."""
    monkeypatch.setattr(tpaw.training.first_step, "FIRST_STEP_TOLERANCE", {"bf16": 3e-5})
    assert self_play(RunConfig.load(split_settings), tmp_path / "r").index == 2
    monkeypatch.setattr("tpaw.pipeline.players.round_weights", lambda model: None)
    with refused(error=PolicyMismatchError, hide=DIFFERENCE):
        self_play(RunConfig.load(split_settings), tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"precision": "fp32"}, ["precision", "bf16", "fp32"]),
        ({"optimizer": "adamw_torch"}, ["optimizer", "'adamw_torch'", "rmsprop"]),
    ],
    ids=["precision", "optimizer"],
)
def test_what_split_weights_need_is_said(split_settings, changes, parts):
    split_settings["precision"] = changes.pop("precision", "bf16")
    split_settings["train"] |= changes
    with refused("train", "weights", "split", *parts):
        RunConfig.load(split_settings)


def test_options_that_it_lacks_are_refused_beforehand(split_settings):
    check_training(RunConfig.load(split_settings))
    split_settings["train"]["training_arguments"] = {"optim_args": "alpha=0.9,momentum=0.5"}
    with refused("train.optimizer", "rmsprop", "momentum"):
        check_training(RunConfig.load(split_settings))


@pytest.mark.parametrize(("given", "limit"), [({}, 1.0), ({"max_grad_norm": 0.3}, 0.3)])
def test_the_optimizer_clips_in_place_of_the_trainer(split_settings, tmp_path, given, limit):
    split_settings["train"]["training_arguments"] = given
    config = RunConfig.load(split_settings)
    arguments = training_arguments(config, 0, tmp_path)
    kind, options = split_optimizer(config, arguments)
    assert kind([torch.nn.Parameter(torch.ones(1))], **options).max_grad_norm == limit
    assert arguments.max_grad_norm == 0
    split_settings["train"]["weights"] = "fp32"
    assert training_arguments(RunConfig.load(split_settings), 0, tmp_path).max_grad_norm == limit


def test_what_it_cannot_do_is_refused(monkeypatch):
    with refused("max_grad_norm", -1.0, error=ValueError):
        SplitRMSprop([torch.nn.Parameter(torch.ones(1))], max_grad_norm=-1.0)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with refused("processes", error=ValueError):
        SplitRMSprop([torch.nn.Parameter(torch.ones(1))])


def test_it_trains_as_fp32_weights_do(split_settings, tmp_path, model_folder):
    """Through the Trainer: autocast over bf16 weights, clipping, accumulation, schedule."""
    split_settings |= {"iterations": 1}
    split_settings["train"] |= {"learning_rate": 1e-7, "epochs": 2}
    moves, norms = [], []
    for weights in ("fp32", "split"):
        split_settings["train"]["weights"] = weights
        run = RunDirectory(tmp_path / weights)
        self_play(RunConfig.load(split_settings), run.root)
        first = json.loads(run.training_log(1).read_text().splitlines()[0])
        norms.append(first["grad_norm"])
        files = (model_folder, run.checkpoint(1))
        before, after = (load_file(folder / "model.safetensors") for folder in files)
        moved = [(after[name].double() - w.double()).ravel() for name, w in before.items()]
        moves.append(torch.cat(moved))
    assert norms[0] > 1  # so that clipping works on bf16 gradients here
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
    # Both differ from fp32 computation by bf16's rounding, with a cosine of .95 (docs/log.md).
    assert float(torch.nn.functional.cosine_similarity(*moves, dim=0)) > 0.9
    assert float(moves[1].norm()) == pytest.approx(float(moves[0].norm()), rel=0.05)
