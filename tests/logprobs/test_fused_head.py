"""Log-probs of labels from hidden states, chunk by chunk, against torch's own in float64."""

from __future__ import annotations

import pytest
import torch

import tpaw.logprobs.fused_head
import tpaw.logprobs.response
from tpaw.logprobs.fused_head import LogitMap, token_logps


def reference_token_logps(hidden, weight, bias, labels, scale=1.0, cap=None):
    logits = (hidden @ weight.T + (0 if bias is None else bias)) * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return torch.log_softmax(logits, dim=1)[torch.arange(len(labels)), labels]


@pytest.mark.parametrize("tokens_in_a_chunk", [1, 3, 10, 11, 100])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("logit_map", [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0)])
def test_chunked_log_probs_and_their_gradients(
    tokens_in_a_chunk, has_bias, dtype, logit_map, monkeypatch
):
    monkeypatch.setattr(tpaw.logprobs.fused_head, "LOGITS_IN_A_CHUNK", tokens_in_a_chunk * 23 + 22)
    torch.manual_seed(tokens_in_a_chunk)
    leaves = [torch.randn(10, 7) * 3, torch.randn(23, 7), *([torch.randn(23)] if has_bias else [])]
    labels = torch.randint(0, 23, (10,))
    labels[3] = labels[4]
    upstream = torch.randn(10)

    def run(function, of):
        hidden, weight, bias = [x.detach().to(of).requires_grad_() for x in leaves] + [None] * (
            not has_bias
        )
        if function is token_logps:
            logps = function(hidden, weight, bias, labels, LogitMap(*logit_map))
        else:
            logps = function(hidden, weight, bias, labels, *logit_map)
        inputs = [x for x in (hidden, weight, bias) if x is not None]
        return [logps, *torch.autograd.grad((logps * upstream.to(of)).sum(), inputs)]

    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for found, wanted in zip(
        run(token_logps, dtype), run(reference_token_logps, torch.float64), strict=True
    ):
        assert found.dtype == dtype
        assert torch.allclose(found.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("scale", "cap"), [(1.0, None), (0.25, None), (1.0, 3.0), (2.0, 5.0)])
def test_a_logit_map_and_its_slope(scale, cap):
    outputs = torch.linspace(-20, 20, 81, dtype=torch.float64, requires_grad=True)
    expected = scale * outputs if cap is None else cap * torch.tanh(scale * outputs / cap)
    [slope] = torch.autograd.grad(expected.sum(), outputs)
    logit_map = LogitMap(scale, cap)
    for logits in (logit_map.of(outputs.detach()), logit_map.of_(outputs.detach().clone())):
        assert torch.allclose(logits, expected, rtol=1e-12)
        found = torch.as_tensor(logit_map.slope(logits), dtype=torch.float64).expand_as(slope)
        assert torch.allclose(found, slope, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("logit_map", [(1.0, None), (2.0, 5.0)])
def test_a_second_backward_gives_the_same_gradient_again(logit_map):
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
    logps = token_logps(hidden, weight, None, torch.arange(6), LogitMap(*logit_map))
    [first] = torch.autograd.grad(logps.sum(), hidden, retain_graph=True)
    [second] = torch.autograd.grad(logps.sum(), hidden)
    assert torch.allclose(first, second, atol=1e-6)


@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_large_logits_do_not_overflow(scale):
    hidden, weight = torch.tensor([[scale, 0.0]]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    logps = token_logps(hidden, weight, None, torch.tensor([0]))
    assert logps.item() == (0 if scale > 0 else -2e4)


@pytest.mark.parametrize("by", ["weights", "autocast"])
def test_bf16_loses_what_its_operands_round_and_no_more(by):
    """Logits from rounded operands, in fp32; a bf16 logit would be off by up to 0.06 at 16."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(200, 64), torch.randn(500, 64)
    labels = torch.randint(0, 500, (200,))
    rounded = (x.bfloat16() for x in (hidden, weight)) if by == "weights" else (hidden, weight)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=by == "autocast"):
        found = token_logps(*rounded, None, labels)
    assert found.dtype == torch.float32
    operands = [x.bfloat16() if by == "weights" else x for x in (hidden, weight)]
    expected = reference_token_logps(*(x.double() for x in operands), None, labels)
    # A CPU multiplies in fp32, so only the rounding of the operands, if any, is lost.
    assert (found - expected).abs().max() < 1e-4
    # Gradients are sums of products that were rounded to bf16 once.
    leaves = [x.detach().requires_grad_() for x in operands]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=by == "autocast"):
        gradients = torch.autograd.grad(token_logps(*leaves, None, labels).sum(), leaves)
    exact = [x.double().detach().requires_grad_() for x in operands]
    wanted = torch.autograd.grad(reference_token_logps(*exact, None, labels).sum(), exact)
    for gradient, expected_gradient, leaf in zip(gradients, wanted, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        error = (gradient - expected_gradient).norm() / expected_gradient.norm()
        assert error < 2**-8
    in_bf16 = torch.log_softmax(hidden.bfloat16() @ weight.bfloat16().T, dim=1).double()
    assert (in_bf16[torch.arange(200), labels] - expected).abs().max() > 1e-2
