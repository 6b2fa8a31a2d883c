"""Tiny random models of the architectures of transformers, and what TPAW does with each.

Windows, chunks and sparse top-k are 16 tokens, so that they bind in the sequences of `examined`,
which have up to 60 tokens. Weights are large, so that no part of a layer is lost in rounding.
"""

from __future__ import annotations

import copy
import re
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tpaw.data.token_ids import TokenSequence, token_ids
from tpaw.errors import InputError
from tpaw.generation.batching import Batching
from tpaw.generation.generator import SamplingParams
from tpaw.generation.hf import HFGenerator
from tpaw.logprobs.packing import PACKED_LAYOUT
from tpaw.logprobs.prepare import prepare_for_logprobs
from tpaw.logprobs.response import response_logps
from tpaw.models.loading import disable_dropout

VOCABULARY, WINDOW, LONGEST = 544, 16, 60
# Largest difference of a log-prob, in nats per token; of a gradient, relative to its norm.
LOGP_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1.2e-5

# Where a configuration has the attribute, it is set to this.
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "sliding_window": WINDOW,
    "sliding_window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "index_topk": WINDOW,
    "index_n_heads": 32,  # with few heads, ties at 0 depend on the length of a row
    "index_head_dim": 16,
    "query_pre_attn_scalar": 8,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "zero_expert_num": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 48,
    "shared_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_experts_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "intermediate_size_mlp": 48,
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    # linear attention and state spaces
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "state_size": 8,
    "n_groups": 1,
    # layers that read the token ids again
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    # decoders of encoder-decoders, and older names
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "ffn_dim": 48,
    "embedding_size": 32,
    "word_embed_proj_dim": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SMALL_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "image_size": 16,
    "patch_size": 8,
    "depth": 1,
    "num_heads": 2,
    "out_hidden_size": 32,
}
SLIDING = ("sliding_attention", "full_attention")

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
ROPE = {"rope_theta": 10000.0, "original_max_position_embeddings": 16}
LONG_ROPE = ROPE | {"rope_type": "longrope", "factor": 16.0}
LONG_ROPE |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}

# Name, which is the model type unless `type` says otherwise -> changes to TINY.
# None removes a setting, so that the class's default or its own computation decides.
ARCHITECTURES: dict[str, dict] = {
    "afmoe": {},
    "apertus": {},
    "arcee": {},
    "aria_text": {},
    "axk1": {},
    "axk2": {},
    "bailing_hybrid": {},
    "bamba": {"attn_layer_indices": [1]},
    "bart": {},
    "beam": {},
    "bert": {},
    "bert-dec": {"type": "bert", "is_decoder": True},
    "bert-generation": {},
    "big_bird": {},
    "bigbird_pegasus": {},
    "biogpt": {},
    "bitnet": {},
    "blenderbot": {},
    "blenderbot-small": {},
    "bloom": {},
    "camembert": {},
    "codegen": {"rotary_dim": 4},
    "cohere": {},
    "cohere2": {"layer_types": SLIDING},
    "cohere2_moe": {},
    "cohere_compass_text": {
        "layer_types": SLIDING,
        "rope_parameters": dict.fromkeys(SLIDING, DEFAULT_ROPE),
    },
    "ctrl": {"dff": 48},
    "cwm": {},
    "data2vec-text": {},
    "dbrx": {
        "n_heads": 4,
        "n_layers": 2,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_top_k": 2},
        "num_hidden_layers": None,
        "num_attention_heads": None,
    },
    "deepseek_v2": {},
    "deepseek_v3": {},
    "deepseek_v32": {},
    "deepseek_v4": {},
    "diffllama": {},
    "doge": {},
    "dots1": {},
    "dots3_note_text": {"head_dim": 16, "per_layer_config": {}},
    "electra": {},
    "electra-dec": {"type": "electra", "is_decoder": True},
    "ernie": {},
    "ernie4_5": {},
    "ernie4_5_moe": {},
    "exaone4": {"layer_types": SLIDING},
    "exaone_moe": {},
    "falcon": {"head_dim": None, "new_decoder_architecture": False, "multi_query": True},
    "falcon-alibi": {
        "type": "falcon",
        "head_dim": None,
        "new_decoder_architecture": False,
        "alibi": True,
    },
    "falcon-new": {
        "type": "falcon",
        "head_dim": None,
        "new_decoder_architecture": True,
        "num_kv_heads": 2,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "falcon_mamba": {},
    "flex_olmo": {},
    "flint": {},
    "gemma": {},
    "gemma2": {"layer_types": SLIDING},
    "gemma2-nocap": {
        "type": "gemma2",
        "layer_types": SLIDING,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    "gemma3": {},
    "gemma3-noswa": {"type": "gemma3_text", "layer_types": ("full_attention",) * 2},
    "gemma3_text": {"layer_types": SLIDING},
    "gemma3n_text": {"num_kv_shared_layers": 0, "activation_sparsity_pattern": [0.95, 0.0]},
    "gemma4": {},
    "gemma4_text": {},
    "gemma4_unified_text": {},
    "glm": {},
    "glm4": {},
    "glm4_moe": {},
    "glm4_moe_lite": {},
    "glm_moe_dsa": {},
    "gpt-sw3": {},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": {"layer_types": SLIDING},
    "gptj": {"rotary_dim": 4},
    "granite": {"logits_scaling": 4.0},
    "granite_swa": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {"layer_types": ("linear_attention", "full_attention")},
    "granitemoeshared": {},
    "helium": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "hyperclovax": {},
    "inkling2_text": {},
    "inkling_text": {},
    "internlm3": {},
    "iquestcoder": {},
    "jais2": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    "jetmoe": {},
    "kimi_linear": {},
    "kolibri1": {},
    "laguna": {},
    "lfm2": {"layer_types": ("conv", "full_attention")},
    "lfm2_moe": {"layer_types": ("conv", "full_attention")},
    "lfm3": {},
    "llama": {},
    "llama-dynamic": {
        "type": "llama",
        "rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 4.0},
    },
    "llama-llama3": {
        "type": "llama",
        "rope_parameters": ROPE
        | {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
    },
    "llama-yarn": {"type": "llama", "rope_parameters": ROPE | {"rope_type": "yarn", "factor": 4.0}},
    "llama4_text": {"floor_scale": 8, "no_rope_layers": [1, 0]},
    "llama4_text-real": {"type": "llama4_text", "no_rope_layers": [1, 0]},
    "longcat_flash": {},
    "mamba": {},
    "mamba2": {"num_heads": 8, "head_dim": 8, "chunk_size": 16},
    "marian": {},
    "mbart": {},
    "megatron-bert": {},
    "mellum": {},
    "mimo_v2_flash": {},
    "minicpm3": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl_text": {},
    "ministral": {},
    "ministral3": {},
    "mistral": {},
    "mixtral": {"sliding_window": None},
    "mixtral-swa": {"type": "mixtral"},
    "modernbert-decoder": {},
    "mpt": {},
    "mvp": {},
    "nanochat": {},
    "nemotron": {},
    "nemotron_h": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"layer_types": SLIDING},
    "olmo_hybrid": {},
    "olmoe": {},
    "openai-gpt": {},
    "opt": {},
    "pegasus": {},
    "persimmon": {},
    "phi": {},
    "phi3": {"sliding_window": None},
    "phi3-long": {
        "type": "phi3",
        "sliding_window": None,
        "rope_parameters": LONG_ROPE,
        "original_max_position_embeddings": 16,
    },
    "phimoe": {"sliding_window": 256},
    "phimoe-nojit": {"type": "phimoe", "sliding_window": 256, "router_jitter_noise": 0.0},
    "plbart": {},
    "prophetnet": {
        "num_hidden_layers": None,
        "num_encoder_layers": 1,
        "num_decoder_layers": 2,
        "num_encoder_attention_heads": 4,
        "num_decoder_attention_heads": 4,
    },
    "qwen2": {},
    "qwen2-swa": {"type": "qwen2", "layer_types": SLIDING, "use_sliding_window": True},
    "qwen2_moe": {},
    "qwen3": {},
    "qwen3_5": {},
    "qwen3_5_moe_text": {},
    "qwen3_5_text": {},
    "qwen3_moe": {},
    "qwen3_next": {},
    "recurrent_gemma": {
        "num_hidden_layers": 3,
        "attention_window_size": WINDOW,
        "lru_width": 32,
    },
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"],
        "num_hidden_layers": None,
        "attention_head_size": 8,
        "axial_pos_embds": False,
        "feed_forward_size": 48,
        "local_attn_chunk_length": WINDOW,
        "lsh_attn_chunk_length": WINDOW,
        "num_buckets": 4,
    },
    "rembert": {},
    "roberta": {},
    "roberta-dec": {"type": "roberta", "is_decoder": True},
    "roberta-prelayernorm": {},
    "roc_bert": {
        "pronunciation_embed_dim": 8,
        "pronunciation_vocab_size": 16,
        "shape_embed_dim": 8,
        "shape_vocab_size": 16,
    },
    "roformer": {},
    "rwkv": {},
    "seed_oss": {},
    "smollm3": {},
    "solar_open": {},
    "stablelm": {},
    "starcoder2": {},
    "vaultgemma": {},
    "xglm": {},
    "xlm": {},
    "xlm-roberta": {},
    "xlm-roberta-xl": {},
    "xlnet": {
        "max_position_embeddings": None,
        "num_hidden_layers": None,
        "n_layer": 2,
        "d_head": 8,
        "d_inner": 48,
    },
    "xmod": {"default_language": "en_XX"},
    "youtu": {},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "in_float64": True,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "num_key_value_heads": 4,
        "mamba_dt_rank": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
        "num_hidden_layers": 4,
        "in_float64": True,
        "mamba_headdim": 8,
        "chunk_size": 16,
        "num_key_value_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def config_of(name: str):
    """The configuration of a tiny model."""
    changes = dict(ARCHITECTURES[name])
    kind = changes.pop("type", name)
    changes.pop("in_float64", None)
    cls = CONFIG_MAPPING[kind]
    if "text_config" in (cls.sub_configs or {}):
        text = cls.sub_configs["text_config"]
        other = {name: SMALL_VISION for name in cls.sub_configs if name == "vision_config"}
        return cls(text_config=_settings(text, changes), **other)
    return cls(**_settings(cls, changes))


def _settings(cls, changes: dict) -> dict:
    default = cls()
    known = set(default.to_dict()) | set(getattr(cls, "attribute_map", ()))
    settings = {key: value for key, value in TINY.items() if key in known}
    if "kv_lora_rank" in known:
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    settings["num_hidden_layers"] = 2
    # A layer of each kind that the default has, unless the changes say otherwise.
    patterns = {
        key: list(changes.pop(key, None) or dict.fromkeys(getattr(default, key, None) or ()))
        for key in ("layer_types", "mlp_layer_types")
        if key in vars(default) or key in changes
    }
    patterns = {key: kinds for key, kinds in patterns.items() if kinds}
    if patterns:
        layers = max(2, *map(len, patterns.values()))
        settings["num_hidden_layers"] = layers
        for key, kinds in patterns.items():
            settings[key] = kinds + kinds[-1:] * (layers - len(kinds))
    return _unless_none(settings | changes)


def _unless_none(settings: dict) -> dict:
    return {key: value for key, value in settings.items() if value is not None}


def build(name: str):
    """A tiny random model in evaluation mode, without dropout."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(name)).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.25)
    disable_dropout(model)
    # Large activations: in fp32 their rounding is larger than the tolerances.
    return model.double() if ARCHITECTURES[name].get("in_float64") else model


class Examined(NamedTuple):
    """What TPAW does with an architecture, and whether it is right.

    Attributes:
        layout: "packed", "one sequence per row" or "refused".
        head: "fused" or "logits held"; empty if refused.
        generation: how prompts are answered; empty if refused.
        notes: why something is done the slower way, or why the model is refused.
        failures: what is wrong; empty if all is right.
        numbers: largest errors, for the log.
    """

    layout: str
    head: str
    generation: str
    notes: tuple[str, ...]
    failures: tuple[str, ...]
    numbers: dict[str, float]


def sequences(seed: int = 1) -> list[TokenSequence]:
    """Prompts of 1 to 30 tokens, each with responses of 1 to 30 tokens."""
    rng = np.random.default_rng(seed)

    def ids(length):
        return token_ids(rng.integers(3, VOCABULARY, length))

    return [
        TokenSequence(prompt, ids(length))
        for prompt in map(ids, (1, 7, 19, 30))
        for length in (1, 12, 30)
    ]


def _alone(model, prompt, response):
    """log π(y|x) by the plain forward of one sequence, in float64."""
    input_ids = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
    logits = model(input_ids=input_ids, use_cache=False).logits[0].double()
    logps = torch.log_softmax(logits, -1)[len(prompt) - 1 : -1]
    return logps.gather(1, input_ids[0, len(prompt) :, None]).sum()


def _gradients(model, logps_S, weights_S):
    model.zero_grad(set_to_none=True)
    (logps_S * weights_S).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _relative(found: dict, expected: dict) -> float:
    """‖found − expected‖ / ‖expected‖ over all weights."""
    norm = torch.stack([g.double().norm() for g in expected.values()]).norm()
    zero = torch.zeros(())
    differences = [
        (found.get(n, zero) - expected.get(n, zero)).double().norm() for n in found | expected
    ]
    return float(torch.stack(differences).norm() / norm)


def cells(found: Examined) -> tuple[str, ...]:
    """The row of `docs/reference/models.md`, without the name. No number depends on the machine."""
    if found.failures:
        note = "WRONG: " + "; ".join(found.failures)
    else:
        notes = (re.sub(r" by [-+.e\d]+ nats on a few tokens", "", note) for note in found.notes)
        notes = (re.sub(r"off(?= |\))", "other log-probs", note) for note in notes)
        notes = (note.partition("; choose")[0].partition(", so each")[0] for note in notes)
        note = " ".join(_reason(note) for note in notes)
    return found.layout, found.head, found.generation, note


def _reason(note: str) -> str:
    for start, end in (("Sequence packing", ". Training"), ("All logits", ". Lower")):
        if note.startswith(start):
            return note.partition(": ")[2].rpartition(end)[0] + "."
    return note + "."


def examined(name: str) -> Examined:
    """Prepare a tiny model, and compare everything with the model's own plain forward.

    The reference is a copy that was never prepared: one sequence at a time for log-probs and
    gradients, `generate` with one prompt at a time for greedy answers.
    """
    reference = build(name)
    model = copy.deepcopy(reference)
    try:
        layout, notes = preparation = prepare_for_logprobs(model, LONGEST)
    except InputError as error:
        return Examined("refused", "", "", (str(error),), (), {})
    given = sequences()
    weights_S = torch.linspace(-1, 1, len(given), dtype=torch.float64)
    expected_S = torch.stack([_alone(reference, *sequence) for sequence in given])
    found_S = response_logps(model, layout.collate(given))
    lengths_S = torch.tensor([len(response) for _, response in given])
    numbers = {
        "logps": float(((found_S - expected_S).abs() / lengths_S).max()),
        "gradient": _relative(
            _gradients(model, found_S, weights_S), _gradients(reference, expected_S, weights_S)
        ),
    }
    with torch.no_grad():
        in_modes = []
        for mode in (True, False):
            model.train(mode)
            in_modes.append(response_logps(model, layout.collate(given)))
        numbers["training mode"] = float((in_modes[0] - in_modes[1]).abs().max())
        # A new model: RecurrentGemma keeps a state from one forward pass to the next.
        generation, equal = _greedy(model, build(name))
    limits = {"logps": LOGP_TOLERANCE, "gradient": GRADIENT_TOLERANCE, "training mode": 0.0}
    failures = [
        f"{what}: off by {numbers[what]:.1g}"
        for what, limit in limits.items()
        if not numbers[what] <= limit
    ]
    if equal < 5:
        failures.append(f"greedy answers: {equal} of 5 equal those of generate")
    return Examined(
        "packed" if layout is PACKED_LAYOUT else "one sequence per row",
        "logits held" if preparation.holds_logits else "fused",
        generation,
        notes,
        tuple(failures),
        numbers,
    )


def _greedy(model, reference) -> tuple[str, int]:
    """Who generates, and how many of five greedy answers are those of `generate` alone."""
    rng = np.random.default_rng(2)
    prompts = [token_ids(rng.integers(3, VOCABULARY, n)) for n in (1, 4, 9, 17, 30)]
    params = SamplingParams(
        temperature=0.0,
        top_p=1.0,
        top_k=0,
        max_new_tokens=12,
        max_length=LONGEST,
        stop_token_ids=(2,),
    )
    generator = HFGenerator(model, 10_000)
    answers = generator.generate(prompts, params, 0, lambda count: None)
    reference.generation_config = GenerationConfig()
    plain = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
    equal = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        input_ids = torch.from_numpy(prompt.astype(np.int64))[None]
        output = reference.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=plain,
            # With its cache, such a model gives other answers than without.
            use_cache=generator.batching is not Batching.WITHOUT_CACHE,
        )
        equal += output[0, len(prompt) :].tolist() == answer.token_ids.tolist()
    return generator.batching.value, equal
