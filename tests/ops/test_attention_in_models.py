"""Penalties of discriminators that call attention themselves or through PyTorch's layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgan
from fastgan import ops
from tests.harness import device_of
from tests.ops.attention_problem import WAYS


class Attention(nn.Module):
    def __init__(self, attend=F.scaled_dot_product_attention, **options):
        super().__init__()
        torch.manual_seed(0)
        self.attend, self.options = attend, options
        self.embed, self.qkv, self.out = nn.Linear(6, 24), nn.Linear(24, 72), nn.Linear(24, 1)

    def forward(self, x):
        h = F.leaky_relu(self.embed(x), 0.2)
        q, k, v = self.qkv(h).unflatten(-1, (3, 3, 8)).permute(2, 0, 3, 1, 4)
        return self.out(h + self.attend(q, k, v, **self.options).transpose(1, 2).flatten(2)).mean((1, 2))


def parameter_gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)


def r1(model, x):
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return 5 * g.square().sum() / len(x)


def expected(model, x):
    with sdpa_kernel(SDPBackend.MATH):
        return parameter_gradients(model, r1(model, x))


def penalize(model, x):
    return parameter_gradients(model, fastgan.gradient_penalty(model, x, kind="r1"))


def with_logits(model, x):
    return parameter_gradients(model, fastgan.logits_and_penalty(model, x, kind="r1")[1])


def rerouted(model, x):
    x = x.detach().requires_grad_()
    with fastgan.twice_differentiable():
        logits = model(x)
    return parameter_gradients(model, fastgan.penalty_from_logits(logits, x, kind="r1"))


def by_the_module(model, x):
    return parameter_gradients(model, fastgan.nn.GradientPenalty("r1")(model, x))


class Tokens(nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call, self.out = layer, call, nn.Linear(24, 1)

    def forward(self, x):
        return self.out(self.call(self.layer, x)).mean((1, 2))


PADDING = torch.tensor([[False] * 7, [False] * 4 + [True] * 3])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(7, dtype=torch.float64)
EIGHT = {"nhead": 4, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
LAYERS = {
    "heads": lambda: Tokens(nn.MultiheadAttention(24, 4, batch_first=True), lambda m, x: m(x, x, x)[0]),
    "heads without weights": lambda: Tokens(
        nn.MultiheadAttention(24, 4, batch_first=True), lambda m, x: m(x, x, x, need_weights=False)[0]
    ),
    "padded": lambda: Tokens(
        nn.MultiheadAttention(24, 4, batch_first=True, add_bias_kv=True),
        lambda m, x: m(x, x, x, key_padding_mask=PADDING, need_weights=False)[0],
    ),
    "padded and masked": lambda: Tokens(
        nn.MultiheadAttention(24, 4, batch_first=True),
        lambda m, x: m(x, x, x, key_padding_mask=PADDING, attn_mask=CAUSAL, need_weights=False, is_causal=True)[0],
    ),
    "causal, tokens first": lambda: Tokens(
        nn.MultiheadAttention(24, 4),
        lambda m, x: m(*[x.transpose(0, 1)] * 3, attn_mask=CAUSAL, is_causal=True, need_weights=False)[0].transpose(
            0, 1
        ),
    ),
    "encoder layer": lambda: Tokens(nn.TransformerEncoderLayer(24, **EIGHT), lambda m, x: m(x)),
    "encoder layer, norm first": lambda: Tokens(
        nn.TransformerEncoderLayer(24, **EIGHT, activation=F.gelu, norm_first=True), lambda m, x: m(x)
    ),
    "encoder, padded": lambda: Tokens(
        nn.TransformerEncoder(nn.TransformerEncoderLayer(24, **EIGHT), 2),
        lambda m, x: m(x, src_key_padding_mask=PADDING),
    ),
    "decoder layer": lambda: Tokens(
        nn.TransformerDecoderLayer(24, **EIGHT), lambda m, x: m(x, x.flip(1), tgt_mask=CAUSAL, tgt_is_causal=True)
    ),
}


@pytest.mark.parametrize("by", [penalize, with_logits, rerouted, by_the_module])
@pytest.mark.parametrize("small", [False, pytest.param(True, marks=pytest.mark.small)])
def test_penalties_go_through_attention_that_a_model_calls_itself(by, small):
    x = torch.randn(3, 11, 6, dtype=torch.float64)
    for options in ({}, {"is_causal": True}, {"attn_mask": torch.randn(11, 11, dtype=torch.float64)}, {"scale": 0.2}):
        model = Attention(**options).double()
        for _ in range(2):
            for a, b in zip(by(model, x), expected(model, x), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.small
def test_operands_by_keyword_are_rerouted_too():
    x = torch.randn(3, 11, 6, dtype=torch.float64)
    model = Attention(lambda q, k, v: F.scaled_dot_product_attention(query=q, key=k, value=v)).double()
    for a, b in zip(penalize(model, x), expected(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("small", [False, pytest.param(True, marks=pytest.mark.small)])
@pytest.mark.parametrize("name", LAYERS)
def test_penalties_go_through_pytorchs_layers_with_attention(name, training, small):
    model = LAYERS[name]().double().train(training)
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    want = expected(model, x)
    for by in (penalize, with_logits, rerouted):
        for a, b in zip(by(model, x), want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


def test_dropout_of_a_model_draws_pytorchs_numbers():
    model = Attention(dropout_p=0.4).double()
    x = torch.randn(3, 11, 6, dtype=torch.float64)
    torch.manual_seed(3)
    want = expected(model, x)
    torch.manual_seed(3)
    for a, b in zip(penalize(model, x), want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_the_weights_of_heads_are_differentiated_too():
    """A loss may use the second result of need_weights=True."""
    model = Tokens(nn.MultiheadAttention(24, 4, batch_first=True), lambda m, x: m(x, x, x)[1] @ x).double()
    x = torch.randn(2, 7, 24, dtype=torch.float64)
    for a, b in zip(penalize(model, x), expected(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-11)


@pytest.mark.small
def test_a_small_model_that_attends_later_is_seen_where_its_mode_or_shapes_change():
    class Later(Attention):
        def forward(self, x):
            return super().forward(x) if self.training else self.out(self.embed(x)).mean((1, 2))

    model = Later().double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    for training in (False, False, True, True):
        model.train(training)
        for a, b in zip(penalize(model, x), expected(model, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_attention_is_no_part_of_one_pass():
    x = torch.randn(3, 11, 6)
    assert fastgan.explain_penalty(Attention(), x).startswith("general path")
    heads = LAYERS["heads without weights"]()
    assert fastgan.explain_penalty(heads, torch.randn(2, 7, 24)).startswith("general path")


def test_attention_that_a_model_writes_itself_stays_as_it_is(monkeypatch):
    monkeypatch.setattr(ops.attention.autograd, "attend", None)
    x = torch.randn(3, 11, 6, dtype=torch.float64)
    model = Attention(lambda q, k, v: (q @ k.mT / 8**0.5).softmax(-1) @ v).double()
    for a, b in zip(penalize(model, x), expected(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("backend", WAYS[1:])
def test_a_loss_and_a_penalty_in_one_backward_add_up(backend):
    x = torch.randn(3, 11, 6, dtype=torch.float64)
    model = Attention().double()
    device = device_of(backend)
    model, x = model.to(device), x.to(device)
    with fastgan.use_backend(backend):
        logits, penalty = fastgan.logits_and_penalty(model, x, kind="r1")
        both = parameter_gradients(model, F.softplus(-logits).mean() + penalty)
    with sdpa_kernel(SDPBackend.MATH):
        want = parameter_gradients(model, F.softplus(-model(x)).mean() + r1(model, x))
    for a, b in zip(both, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
