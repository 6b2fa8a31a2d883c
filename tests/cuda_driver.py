"""What a GPU runs, on a pretended one: a process that calls one of the functions below.

python cuda_driver.py NAME [FOLDER]
"""

from __future__ import annotations

import copy
import gc
import importlib
import json
import sys
import weakref
from pathlib import Path

import peft
import pretended_gpu
import pytest
import safetensors.torch
import torch
import transformers
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device
from builders import PAPER, SAMPLING, make_model, score, team_rows
from oracles import expected_logps, ragged, ragged_team
from pretended_gpu import GPU, calls
from transformers import TrainingArguments

import tpaw.starter
from tpaw.config.schema import AdapterConfig, RunConfig
from tpaw.errors import InputError
from tpaw.generation.batching import Batching, _in_fp32, choose_batching
from tpaw.generation.hf import HFGenerator
from tpaw.generation.padded_batches import batches_of, generate_in_batches
from tpaw.logprobs.attention import packed_attention
from tpaw.logprobs.fused_head import LogitMap, token_logps
from tpaw.logprobs.packing import PACKED_LAYOUT, PADDED_LAYOUT, packed_batch
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.logprobs.response import response_logps
from tpaw.models.adapters import AdaptedBase
from tpaw.models.loading import cast_weights
from tpaw.objectives.tpaw import TeamObjective
from tpaw.pipeline.players import LoadedPlayers
from tpaw.pipeline.preflight import read_inputs
from tpaw.scoring.score import Precision, ScoringModel, score_sequences
from tpaw.team import Player
from tpaw.training.split_weights import SplitRMSprop, restore_fp32
from tpaw.training.trainer import TeamTrainer

TINY = {
    "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 4,
}  # fmt: skip
# Besides a plain one: a window, a cap on scores and logits, sinks, heads that share no keys.
MODELS = {
    "qwen2": {},
    "mistral": {"sliding_window": 6},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 6},
    "gpt_oss": {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 6},
    "llama": {"num_key_value_heads": 4},
}
HAS_KERNEL = ("qwen2", "mistral", "llama")


def model_of(kind):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **TINY | MODELS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others do not take float64
    return model


def gradients(model):
    return {name: p.grad.cpu().double() for name, p in model.named_parameters()}


def relative(found, expected):
    """The largest norm of a difference, for any tensor, over the norm of the expected one."""
    return max(
        float((found[name] - expected[name]).norm() / expected[name].norm().clamp(min=1e-6))
        for name in expected
    )


def logprobs():
    """Packed rows and the head, forward and backward, against one row in float64 on the CPU."""
    for kind in MODELS:
        sequences = ragged_team(2, seed=3)
        exact = model_of(kind).double()
        weights = torch.linspace(-1, 1, len(sequences), dtype=torch.float64)
        expected = expected_logps(exact, sequences)
        (weights * expected).sum().backward()
        for use_bf16 in (True, False):
            model = model_of(kind).to(GPU)
            layout, notes = prepare_for_logprobs(model, 256)
            assert layout is PACKED_LAYOUT, (kind, notes)
            assert not notes, (kind, notes)
            calls.clear()
            batch = send_to_device(layout.collate(sequences), GPU)
            with Precision("cuda", use_bf16).autocast():
                found = response_logps(model, batch)
            assert found.device == GPU
            assert found.dtype == torch.float64
            (weights.to(GPU) * found).sum().backward()
            assert all(p.grad.device == GPU for p in model.parameters())
            assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
            # The kernels that only a GPU has, where they are meant to be used, and nowhere else.
            by_kernel = use_bf16 and kind in HAS_KERNEL
            assert (calls["varlen"] == calls["varlen backward"] == 2) == by_kernel, (kind, calls)
            assert bool(calls["mm"]) == use_bf16
            assert not calls["sdpa: math"], (kind, use_bf16, calls)
            tolerance = {"rtol": 0.03, "atol": 0.1} if use_bf16 else {"rtol": 1e-5, "atol": 1e-5}
            assert torch.allclose(found.cpu(), expected, **tolerance), (kind, use_bf16)
            own = {name: p.grad for name, p in exact.named_parameters()}
            error = relative(gradients(model), own)
            assert error < (0.15 if use_bf16 else 1e-4), (kind, use_bf16, error)


def head():
    """Log-probs and gradients of labels, where the operands are bf16 and their sums are fp32."""
    torch.manual_seed(0)
    for logit_map in (LogitMap(), LogitMap(0.5, 3.0)):
        for bias in (None, torch.randn(50)):
            parts = [torch.randn(9, 16), torch.randn(50, 16), *([] if bias is None else [bias])]
            rounded = [x.bfloat16().to(GPU).requires_grad_() for x in parts]
            exact = [x.detach().cpu().double().requires_grad_() for x in rounded]
            labels = torch.arange(9)
            calls.clear()
            found = token_logps(*rounded[:2], *(rounded[2:] or [None]), labels.to(GPU), logit_map)
            logits = exact[0] @ exact[1].T + (exact[2] if bias is not None else 0)
            expected = torch.log_softmax(logit_map.of(logits), 1)[torch.arange(9), labels]
            assert calls["mm"] == 1
            assert found.dtype == torch.float32
            assert torch.allclose(found.cpu().double(), expected, rtol=1e-4, atol=1e-4)
            found.sum().backward()
            expected.sum().backward()
            for ours, theirs in zip(rounded, exact, strict=True):
                assert torch.allclose(ours.grad.cpu().double(), theirs.grad, rtol=0.03, atol=0.03)


def attention():
    """A head size, dtypes and masks that the kernel does not take, and heads that share keys."""
    rows = send_to_device(packed_batch(ragged(4, seed=1, longest=9)), GPU)
    L = rows["input_ids_BL"].numel()
    for size, value_size, dtype, kernel in (
        (16, 16, torch.bfloat16, True),
        (12, 12, torch.bfloat16, False),
        (16, 8, torch.bfloat16, False),
        (264, 264, torch.bfloat16, False),
        (16, 16, torch.float32, False),
    ):
        states = [
            torch.randn(1, heads, L, d, device=GPU, dtype=dtype)
            for heads, d in ((4, size), (2, size), (2, value_size))
        ]
        calls.clear()
        output, _ = packed_attention(None, *states, None, tpaw_spans=rows["spans"])
        assert bool(calls["varlen"]) == kernel, (size, calls)
        assert not calls["sdpa: math"], (size, calls)
        assert output.dtype == dtype


def scoring():
    """`score_sequences` on the GPU, whose thread prepares batches, against the CPU."""
    sequences = ragged(20, seed=2)
    expected = score(make_model(), sequences, tokens_per_row=60)
    for layout in (PACKED_LAYOUT, PADDED_LAYOUT):
        for use_bf16 in (False, True):
            model = make_model().to(GPU)
            prepare_for_logprobs(model, 256)
            done = []
            calls.clear()
            found = score_sequences(
                ScoringModel(model, layout, Precision("cuda", use_bf16)),
                sequences,
                tokens_per_row=60,
                on_done=done.append,
            )
            assert sum(done) == len(sequences)
            assert len(done) > 3
            assert bool(calls["mm"]) == use_bf16
            assert bool(calls["varlen"]) == (use_bf16 and layout is PACKED_LAYOUT)
            error = abs(found - expected).max()
            assert error < (0.2 if use_bf16 else 1e-4), error


def training(folder):
    """Steps of TeamTrainer against the same steps on the CPU, which FOLDER holds."""
    rows = team_rows(6, 2)
    known = json.loads((Path(folder) / "cpu.json").read_text())
    for name, changes in {
        "fp32": {},
        "bf16": {"bf16": True},
        "checkpointing": {"bf16": True, "activation_checkpointing": True},
        "split": {"bf16": True, "max_grad_norm": 0.0},
    }.items():
        policy = make_model(seed=1)
        args = TrainingArguments(
            str(Path(folder) / name),
            **{**known["arguments"], "use_cpu": False} | changes,
        )
        assert args.device == GPU
        options = {}
        if name == "split":
            policy.to(GPU)
            limit = known["arguments"]["max_grad_norm"]
            options["optimizer_cls_and_kwargs"] = (
                SplitRMSprop,
                {"lr": args.learning_rate, "max_grad_norm": limit},
            )
        trainer = TeamTrainer(
            model=policy,
            args=args,
            train_dataset=rows,
            processing_class=None,
            objective=TeamObjective(**PAPER),
            tokens_per_row=80,
            **options,
        )
        calls.clear()
        trainer.train()
        if name == "split":
            assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
            restore_fp32(trainer.optimizer)
        assert all(p.device == GPU and p.dtype == torch.float32 for p in policy.parameters())
        assert bool(calls["varlen backward"]) == bool(calls["mm"]) == args.bf16, calls
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        assert len(losses) == len(known["losses"]) == 3
        for ours, theirs in zip(losses, known["losses"], strict=True):
            assert abs(ours - theirs) < (0.05 if args.bf16 else 1e-4), (name, losses, known)
        moved = torch.cat([p.detach().cpu().flatten() for p in policy.parameters()])
        start = torch.cat([p.detach().flatten() for p in make_model(seed=1).parameters()])
        cosine = torch.cosine_similarity(moved - start, torch.tensor(known["moved"]), dim=0)
        assert cosine > (0.8 if args.bf16 else 0.999), (name, cosine)


def adapters(folder):
    """A base in bf16 or fp32 on the GPU with adapters in fp32: scoring, steps, and one on another.

    FOLDER holds an adapter, and what a CPU computes in fp32. 4-bit layers are not here: their
    kernels are bitsandbytes' own, and only CUDA runs them.
    """
    folder = Path(folder)
    known = json.loads((folder / "cpu.json").read_text())
    # PEFT lets the library safetensors write into the memory of the GPU.
    peft.utils.save_and_load.safe_load_file = lambda path, device: {
        name: tensor.to(device) for name, tensor in safetensors.torch.load_file(path).items()
    }
    sequences, settings = ragged(12, seed=2), AdapterConfig(rank=4)
    adapter = str(folder / "adapter")
    for dtype in (torch.float32, torch.bfloat16):
        is_bf16 = dtype == torch.bfloat16
        base = make_model().to(GPU)
        cast_weights(base, dtype)
        host = AdaptedBase(base)

        def check(policy, dtype=dtype):
            kinds = {("lora_" in n, p.dtype) for n, p in policy.named_parameters()}
            assert kinds == {(True, torch.float32), (False, dtype)}
            assert all(p.device == GPU for p in policy.parameters())

        player = host.put_on(adapter)
        check(player)
        found = score(player, sequences, tokens_per_row=60, use_bf16=is_bf16)
        error = abs(found - known["scores"]).max()
        assert error < (0.1 if is_bf16 else 1e-4), error

        policy = host.policy(adapter, settings, seed=0)
        check(policy)
        start = {n: p.detach().cpu().clone() for n, p in policy.named_parameters()}
        args = TrainingArguments(
            str(folder / "steps"), **known["arguments"] | {"use_cpu": False, "bf16": is_bf16}
        )
        trainer = TeamTrainer(
            model=policy,
            args=args,
            train_dataset=team_rows(6, 2),
            processing_class=None,
            objective=TeamObjective(**PAPER),
            tokens_per_row=80,
        )
        trainer.train()
        check(policy)
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        assert len(losses) == len(known["losses"]) == 3
        for ours, theirs in zip(losses, known["losses"], strict=True):
            assert abs(ours - theirs) < (0.05 if is_bf16 else 1e-4), (losses, known["losses"])
        moved = {n: p.detach().cpu() - start[n] for n, p in policy.named_parameters()}
        assert not any(change.any() for n, change in moved.items() if "lora_" not in n)
        trained = torch.cat([c.flatten() for n, c in moved.items() if "lora_" in n])
        cosine = torch.cosine_similarity(trained, torch.tensor(known["moved"]), dim=0)
        assert cosine > (0.8 if is_bf16 else 0.999), cosine

        # Another adapter on top: the ranks of the first come first, and the new B is 0.
        fresh = AdapterConfig(rank=2, each_iteration="fresh")
        stacked = host.policy(adapter, fresh, seed=3)
        check(stacked)
        first = safetensors.torch.load_file(folder / "adapter" / "adapter_model.safetensors")
        for name, parameter in stacked.named_parameters():
            if "lora_" not in name:
                continue
            kept, both = first[name.replace(".default", "")], parameter.detach().cpu()
            is_a = "lora_A" in name
            old, new = both.split([4, 2], dim=0 if is_a else 1)
            assert torch.equal(old, kept), name
            assert bool(new.any()) == is_a, name


def generation(folder):
    """Every way of batching, greedy and sampled, against the CPU's responses in FOLDER."""
    known = json.loads((Path(folder) / "cpu.json").read_text())
    prompts = [prompt for prompt, _ in ragged(6, seed=5, longest=20)]
    for kind, by_sampling in known.items():
        model = make_model(kind).to(GPU)
        assert choose_batching(model).batching is Batching.CONTINUOUS
        for temperature, expected in by_sampling.items():
            params = SAMPLING._replace(temperature=float(temperature), top_k=50)
            found = HFGenerator(model, 100).generate(prompts, params, 7, lambda count: None)
            assert [c.token_ids.tolist() for c in found] == expected, (kind, temperature)
        state = torch.cuda.get_rng_state()
        batches = list(batches_of(prompts, params, 100))
        twice = [
            generate_in_batches(model, prompts, params, batches, 3, lambda count: None)
            for _ in range(2)
        ]
        assert twice[0] == twice[1]  # drawn on the GPU, whose generator is seeded and restored
        assert torch.equal(torch.cuda.get_rng_state(), state)
        # bf16 weights are tried in fp32 where that fits into the memory that is free.
        for free in (2**40, 0):
            torch.cuda.mem_get_info = lambda device, free=free: (free, 2**40)
            rounded = make_model(kind).bfloat16().to(GPU)
            with _in_fp32(rounded) as is_precise:
                assert is_precise == (free > 0)
                assert rounded.dtype == (torch.float32 if free else torch.bfloat16)
            found = HFGenerator(rounded, 100).generate(prompts, params, 7, lambda count: None)
            assert len(found) == len(prompts)
            assert {p.dtype for p in rounded.parameters()} == {torch.bfloat16}


def top_p():
    """torch has no deterministic cumulative sum on a GPU, and `deterministic: true` asks for it."""
    torch.use_deterministic_algorithms(True)
    prompts = [prompt for prompt, _ in ragged(6, seed=5, longest=20)]
    params = SAMPLING._replace(top_p=0.9)
    model = make_model()
    expected = HFGenerator(copy.deepcopy(model), 100).generate(prompts, params, 7, print)
    found = HFGenerator(model.to(GPU), 100).generate(prompts, params, 7, print)
    assert [c.token_ids.tolist() for c in found] == [c.token_ids.tolist() for c in expected]


def gpus():
    """One process uses one GPU. Ray's controller may see many GPUs, or none, and uses none."""
    config = RunConfig.load("starter", {"device": "cuda"})
    on_cluster = RunConfig.load("starter", {"device": "cuda", "launch": {"engine": "ray"}})
    torch.cuda.device_count = lambda: 8
    with pytest.raises(InputError, match="8 GPUs are visible"):
        read_inputs(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    calls.clear()
    read_inputs(on_cluster)
    torch.cuda.device_count, torch.cuda.is_available = (lambda: 0), (lambda: False)
    read_inputs(on_cluster)
    assert not calls["moved"], calls


def freed():
    """A player's memory is free before the next one is loaded, without waiting for a collection."""
    config = RunConfig.load("starter", {"device": "auto", "precision": "fp32"})
    players = LoadedPlayers(config)
    folder = str(Path(tpaw.starter.__file__).parent / "model")
    players_of = [Player(i, folder, f"fingerprint {i}") for i in range(2)]
    gc.disable()
    kept = weakref.ref(players.for_scoring(players_of[0]).model.get_output_embeddings().weight)
    assert kept() is not None
    rope = players.for_scoring(players_of[0]).model.model.rotary_emb
    assert rope.inv_freq.tolist()[:2] == pytest.approx([1, 10000 ** (-1 / 16)])
    del rope
    players.for_scoring(players_of[1])
    assert kept() is None


def main():
    _, name, *rest = sys.argv
    # bitsandbytes would look for its CUDA library. PEFT 0.18 imports it late, so it comes first.
    importlib.import_module("bitsandbytes")
    pretended_gpu.start()
    globals()[name](*rest)


if __name__ == "__main__":
    main()
