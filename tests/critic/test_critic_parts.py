"""The parts of the critic, each against its definition or an independent computation."""

from __future__ import annotations

import itertools
import json
import math
import random

import numpy as np
import peft
import pytest
import torch
from builders import make_model, make_tokenizer
from messages import refused
from transformers import BertConfig
from transformers import BertForSequenceClassification as Bert

from tpaw.config.schema import CriticConfig
from tpaw.critic.comparisons import comparisons, halves, only_counts_tokens, split
from tpaw.critic.encoding import encode_ids, encode_text
from tpaw.critic.fit import fit
from tpaw.critic.model import (
    load_critic,
    reader_of,
    scores_of,
    set_padding,
    small_critic,
    with_lora,
    with_stored_lora,
)
from tpaw.critic.selection import best_of, judged
from tpaw.data.examples import Example, Examples
from tpaw.data.token_ids import token_ids
from tpaw.errors import Interrupted
from tpaw.generation.responses import Response, Responses
from tpaw.runtime.interrupt import StopSignal
from tpaw.statistics.auc import Auc, auc_within_prompts

END = 1


def test_the_auc_within_prompts_is_a_mean_over_prompts():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 4, 30).astype(float)  # with ties
    responses = rng.integers(0, 4, (30, 5)).astype(float)
    counts = rng.random((30, 5)) < 0.5
    shares, pairs = [], 0
    for i in range(30):
        wins = [
            1.0 if targets[i] > responses[i, k] else 0.5 if targets[i] == responses[i, k] else 0.0
            for k in range(5)
            if counts[i, k]
        ]
        pairs += len(wins)
        if wins:
            shares.append(sum(wins) / len(wins))
    found = auc_within_prompts(targets, responses, counts)
    assert found.value == pytest.approx(sum(shares) / len(shares))
    assert (found.pairs, found.prompts) == (pairs, len(shares))
    variance = sum((s - found.value) ** 2 for s in shares) / (len(shares) - 1)
    half = 1.959963984540054 * math.sqrt(variance / len(shares))
    assert found.interval_95 == pytest.approx((found.value - half, found.value + half))


def test_without_pairs_there_is_no_auc():
    found = auc_within_prompts(np.zeros(3), np.zeros((3, 2)), np.zeros((3, 2), dtype=bool))
    assert math.isnan(found.value)
    assert found.pairs == found.prompts == 0
    one = auc_within_prompts(np.ones(1), np.zeros((1, 2)), np.ones((1, 2), dtype=bool))
    assert one.value == 1
    assert math.isnan(one.interval_95[0])


def test_critics_are_standardised_before_they_agree():
    scores = np.array([[1.0, 2.0, 3.0], [100.0, 500.0, 300.0]])
    first = (scores[0] - 2) / scores[0].std()
    second = (scores[1] - 300) / scores[1].std()
    assert judged(scores, "mean") == pytest.approx((first + second) / 2)
    assert judged(scores, "min") == pytest.approx(np.minimum(first, second))
    assert judged(np.zeros((1, 3)), "mean").tolist() == [0, 0, 0]  # no spread, and no NaN


def test_the_best_whole_response_is_chosen():
    scores = np.array([[3.0, 1.0, 5.0, 2.0], [9.0, 1.0, 4.0, 1.0]])
    is_whole = np.array([[True, True, False, False], [False, True, True, False]])
    kept, number = best_of(scores, is_whole)
    assert kept.tolist() == [0, 1, 2]  # all of the last prompt's were truncated
    assert number.tolist() == [0, 0, 1]


def test_a_prompt_is_never_on_both_sides():
    prompts = np.array([0, 1, 2, 0, 3, 4, 1, 5, 6, 7])
    learned, held = split(prompts, 0.25, seed=3)
    assert sorted([*learned, *held]) == list(range(10))
    assert not set(prompts[learned]) & set(prompts[held])
    assert len(set(prompts[held])) == 2  # a quarter of eight
    assert split(prompts, 0.25, seed=3)[1].tolist() == held.tolist()
    assert len(set(prompts[split(prompts, 0.001, seed=0)[1]])) == 1


def test_what_measures_a_critic_did_not_choose_its_weights():
    prompts = np.array([0, 1, 2, 0, 3, 4, 1, 5, 6, 7])
    held = np.array([0, 1, 3, 5, 6, 8])  # the prompts 0, 1, 4 and 6
    watched, measured = halves(prompts, held)
    assert sorted([*watched, *measured]) == held.tolist()
    assert len(set(prompts[watched])) == len(set(prompts[measured])) == 2
    assert not set(prompts[watched]) & set(prompts[measured])


def one_part(examples, responses, reasons):
    return Responses.of(
        Response(e.id, token_ids(ids), "", reason)
        for e, ids, reason in zip(examples, responses, reasons, strict=True)
    )


def examples_of(targets):
    return Examples.of(
        Example(str(i), token_ids([5, 6 + i]), token_ids(ids), "p", "t")
        for i, ids in enumerate(targets)
    )


def test_what_is_compared():
    examples = examples_of([[9, 9, END], [8, END]])
    first = one_part(examples, [[9, 9, END], [7, END]], ["stop", "stop"])
    second = one_part(examples, [[7, 7, 7], [7, 7, 7, END]], ["length", "stop"])
    found = comparisons(examples, [first, second], encode_ids([END], longest=10))
    # The first response to the first prompt equals its target; the second was truncated.
    assert found.counts.tolist() == [[False, False], [True, True]]
    pairs = found.pairs(np.array([0, 1]))
    assert [(a.tolist(), b.tolist()) for a, b in pairs] == [
        ([5, 7, 8], [5, 7, 7]),
        ([5, 7, 8], [5, 7, 7, 7, 7]),
    ]
    scores = np.array([1.0, 2.0, 3.0, 4.0])  # the first of both prompts, then the second
    assert found.matrix(scores).tolist() == [[1, 3], [2, 4]]
    rows = np.array([0, 1])
    # Targets have 3 and 2 tokens; the compared responses 2 and 4.
    assert found.auc_of_length(rows).value == 0.25  # a tie and a loss
    alike = found.auc(rows, np.array([0.0, 5.0]), np.zeros((2, 2)), of_like_length=True)
    assert (alike.value, alike.pairs) == (1.0, 1)


def test_the_end_is_hidden_and_a_long_prompt_is_cut_at_its_start():
    encode = encode_ids([END, 2], longest=4)
    assert encode(token_ids([5, 6]), token_ids([7, END])).tolist() == [5, 6, 7]
    assert encode(token_ids([5, 6]), token_ids([7, 2])).tolist() == [5, 6, 7]
    assert encode(token_ids([5, 6]), token_ids([7, 8])).tolist() == [5, 6, 7, 8]
    assert encode(token_ids([5, 6, 7]), token_ids([8, 9])).tolist() == [6, 7, 8, 9]
    assert encode(token_ids([5]), token_ids([])).tolist() == [5]


def test_a_critic_with_a_tokenizer_of_its_own_reads_text():
    tokenizer, own = make_tokenizer(), make_tokenizer()
    own.add_tokens(["####"])
    prompt = token_ids(tokenizer("What is 1 + 2?", add_special_tokens=False).input_ids)
    response = tokenizer("#### 3", add_special_tokens=False).input_ids
    encode = encode_text(tokenizer, own, [tokenizer.eos_token_id], longest=64)
    found = encode(prompt, token_ids([*response, tokenizer.eos_token_id]))
    assert found.tolist() == own("What is 1 + 2?", "#### 3").input_ids
    assert own.convert_tokens_to_ids("####") in found


def test_scores_in_padded_batches_are_those_of_each_sequence_alone():
    torch.manual_seed(0)
    model = small_critic(CriticConfig(), make_tokenizer()).eval()
    rng = random.Random(0)
    sequences = [
        token_ids([rng.randrange(5, 200) for _ in range(rng.randrange(1, 40))]) for _ in range(37)
    ]
    found = scores_of(model, sequences)
    for ids, score in zip(sequences, found, strict=True):
        alone = model(input_ids=torch.tensor(ids.tolist())[None]).logits.item()
        assert score == pytest.approx(alone, abs=1e-5)


def test_the_small_critic_sees_both_directions():
    torch.manual_seed(0)
    model = small_critic(CriticConfig(), make_tokenizer()).eval()
    assert model.config.classifier_pooling == "mean"
    ids = torch.tensor([[5, 6, 7, 8]])
    hidden = model.model(input_ids=ids).last_hidden_state[0, 0]
    changed = model.model(input_ids=torch.tensor([[5, 6, 7, 9]])).last_hidden_state[0, 0]
    assert not torch.allclose(hidden, changed)  # the first token sees the last one


def separable(count, seed):
    """Targets with the token 9 somewhere, and responses without."""
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        response = [rng.randrange(10, 30) for _ in range(6)]
        target = [*response]
        target[rng.randrange(6)] = 9
        pairs.append((token_ids(target), token_ids(response)))
    return pairs


def fitted(model, folder, *, stop=None, advance=lambda n, note="": None, **changes):
    config = CriticConfig(evaluate_every=10, batch_size=16, **changes)
    saved = sorted(
        (p for p in folder.glob("steps/checkpoint-*") if (p / "manifest.json").is_file()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    return fit(
        model,
        separable(200, 0),
        separable(48, 1),  # whole batches: TRL's accuracy is a mean over them
        config,
        make_tokenizer(),
        steps=60,
        seed=0,
        use_cpu=True,
        saved_steps=folder / "steps",
        log_file=folder / "critic.jsonl",
        resume_from=saved[-1] if saved else None,
        advance=advance,
        stop=stop or StopSignal(),
    )


def new_model():
    torch.manual_seed(0)
    return small_critic(CriticConfig(), make_tokenizer())


def history_of(folder):
    last = max(folder.glob("steps/checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def test_the_weights_of_the_highest_accuracy_are_kept(tmp_path):
    found = fitted(new_model(), tmp_path, learning_rate=3.0, patience=100)  # goes up and down
    accuracies = {e["step"]: e["eval_accuracy"] for e in history_of(tmp_path) if "eval_loss" in e}
    assert found.accuracy == max(accuracies.values()) > min(accuracies.values())
    assert accuracies[found.best_step] == found.accuracy


def test_a_critic_learns_what_can_be_told_and_keeps_its_best_weights(tmp_path):
    model = new_model()
    found = fitted(model, tmp_path)
    watched = separable(48, 1)
    targets = scores_of(model, [t for t, _ in watched])
    responses = scores_of(model, [r for _, r in watched])
    assert found.accuracy == pytest.approx((targets > responses).mean())  # of what was kept
    assert found.accuracy > 0.9
    history = history_of(tmp_path)
    losses = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    # Bradley and Terry's loss, of the weights that were kept.
    loss = np.log1p(np.exp(responses - targets)).mean()
    assert losses[found.best_step] == pytest.approx(loss, abs=1e-4)


def test_a_fit_that_does_not_get_better_ends_early(tmp_path):
    found = fitted(new_model(), tmp_path, learning_rate=1e-12, patience=2)
    assert (found.best_step, found.steps) == (10, 30)


@pytest.mark.parametrize("changes", [{}, {"learning_rate": 1e-2, "patience": 100}])
def test_an_interrupted_fit_ends_with_the_same_weights(tmp_path, changes):
    whole = new_model()
    expected = fitted(whole, tmp_path / "whole", **changes)
    if changes:  # the best weights are from before the interruption
        assert expected.best_step <= 20
    stop, steps = StopSignal(), itertools.count()

    def advance(count, note=""):
        if count and next(steps) == 24:
            stop.signal_number = 15

    with pytest.raises(Interrupted):
        fitted(new_model(), tmp_path / "cut", stop=stop, advance=advance, **changes)
    model = new_model()
    found = fitted(model, tmp_path / "cut", **changes)
    assert (found.steps, found.best_step) == (expected.steps, expected.best_step)
    for name, weight in whole.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, rtol=0, atol=0)


def test_a_critic_of_another_vocabulary_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    small = BertConfig(vocab_size=100, intermediate_size=32, num_labels=1, **shape)
    Bert(small).save_pretrained(tmp_path / "alone")
    config = CriticConfig(path=str(tmp_path / "alone"))
    with refused("critic.path", "alone", 100, len(tokenizer)):
        reader_of(config, tokenizer, [END], 64)
    tokenizer.save_pretrained(tmp_path / "alone")
    with refused("critic.path", "alone", 100, len(tokenizer)):
        reader_of(config, tokenizer, [END], 64)
    # One that reads other ids: larger than any model rounds its vocabulary up.
    large = BertConfig(vocab_size=30_522, intermediate_size=32, num_labels=1, **shape)
    Bert(large).save_pretrained(tmp_path / "large")
    with refused("critic.path", "large", 30_522, len(tokenizer), "no tokenizer of its own"):
        reader_of(CriticConfig(path=str(tmp_path / "large")), tokenizer, [END], 64)
    with refused("critic.path", "nothing"):
        reader_of(CriticConfig(path=str(tmp_path / "nothing")), tokenizer, [END], 64)


def test_an_encoder_of_the_users_gets_a_head_of_one_output(tmp_path):
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    fits = BertConfig(
        vocab_size=len(tokenizer), intermediate_size=32, max_position_embeddings=20, **shape
    )
    users = Bert(fits)  # with two outputs
    users.save_pretrained(tmp_path / "bert")
    config = CriticConfig(path=str(tmp_path / "bert"))
    reader = reader_of(config, tokenizer, [END], 64)
    assert reader.tokenizer is tokenizer  # it has none of its own
    long = token_ids(range(5, 35))
    assert len(reader.encode(long, long)) == 20  # its positions
    model = load_critic(config.path)
    assert isinstance(model, Bert)
    assert model.config.num_labels == 1
    assert scores_of(model, [reader.encode(long, long)]).shape == (1,)
    encoders = [dict(bert.bert.named_parameters()) for bert in (users, model)]
    torch.testing.assert_close(*encoders, rtol=0, atol=0)


def test_a_critic_whose_weights_are_not_those_of_its_config_is_refused(tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    Bert(BertConfig(vocab_size=400, intermediate_size=32, **shape)).save_pretrained(tmp_path)
    BertConfig(vocab_size=500, intermediate_size=32, **shape).save_pretrained(tmp_path)
    with refused("critic.path", str(tmp_path), "word_embeddings"):
        load_critic(str(tmp_path))


def test_a_lora_critic_over_a_decoder_trains_its_adapter_and_head_alone(tmp_path):
    """The SFT model with a head: a base that does not change, and an adapter that is stored."""
    make_model().save_pretrained(tmp_path / "sft")
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = load_critic(str(tmp_path / "sft"))
        set_padding(base, tokenizer)
        critic = with_lora(base, 4)
    assert isinstance(critic, peft.PeftModelForSequenceClassification)
    trained = {name for name, weight in critic.named_parameters() if weight.requires_grad}
    assert {name for name in trained if "lora_" not in name} == {
        "base_model.model.score.modules_to_save.default.weight"
    }
    frozen = {n: w.clone() for n, w in critic.named_parameters() if n not in trained}
    assert fitted(critic, tmp_path, learning_rate=1e-2).accuracy > 0.65
    for name, weight in critic.named_parameters():
        if name in frozen:
            torch.testing.assert_close(weight, frozen[name], rtol=0, atol=0)
    critic.save_pretrained(tmp_path / "critic")
    names = {file.name for file in (tmp_path / "critic").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "model.safetensors" not in names
    again = load_critic(str(tmp_path / "sft"))
    set_padding(again, tokenizer)
    stored = with_stored_lora(again, str(tmp_path / "critic"))
    sequences = [sequence for pair in separable(20, 2) for sequence in pair]
    expected = scores_of(critic, sequences)
    np.testing.assert_allclose(scores_of(stored, sequences), expected, atol=1e-6)
    assert any(w.requires_grad for w in stored.parameters())


def test_a_critic_that_only_counts_tokens_is_told():
    of = lambda value, half: Auc(value, (value - half, value + half), 100, 50)  # noqa: E731
    assert only_counts_tokens(of(0.51, 0.05), of(0.3, 0.02))
    assert only_counts_tokens(of(0.51, 0.05), of(0.7, 0.02))
    assert not only_counts_tokens(of(0.60, 0.05), of(0.3, 0.02))  # it knows more
    assert not only_counts_tokens(of(0.51, 0.05), of(0.45, 0.02))  # lengths tell little
    nothing = Auc(math.nan, (math.nan, math.nan), 0, 0)  # no pair is of like length
    assert only_counts_tokens(nothing, of(0.9, 0.02))


@pytest.mark.parametrize("value", [0.7, math.nan])
def test_an_auc_comes_back_from_json(value):
    auc = Auc(value, (value, 0.8), 7, 3)
    text = json.dumps(auc.as_json(), allow_nan=False)
    assert repr(Auc.from_json(json.loads(text))) == repr(auc)
