"""NEFTune: how large the noise is, and when there is none."""

import math

import pytest
import torch
from torch import nn

from workers.engine.noise import noisy_embeddings

TOKENS = torch.arange(12).reshape(2, 6)
LENGTHS = torch.tensor([[2, 2, 4, 4, 4, 4], [6] * 6])


def test_each_document_gets_noise_of_its_own_length() -> None:
    torch.manual_seed(0)
    layer = nn.Embedding(12, 1024)
    with noisy_embeddings(layer, LENGTHS, 5.0):
        noise = (layer(TOKENS) - layer.weight[TOKENS]).detach().abs()

    for places, length in (((0, slice(0, 2)), 2), ((0, slice(2, 6)), 4), ((1, slice(0, 6)), 6)):
        bound = 5.0 / math.sqrt(length * 1024)
        assert float(noise[places].max()) == pytest.approx(bound, rel=0.01)
        assert float(noise[places].mean()) == pytest.approx(bound / 2, rel=0.05)


def test_there_is_none_without_alpha_in_evaluation_and_afterwards() -> None:
    layer = nn.Embedding(12, 8)
    plain = layer(TOKENS)
    with noisy_embeddings(layer, LENGTHS, 0.0):
        assert torch.equal(layer(TOKENS), plain)
    with noisy_embeddings(layer, LENGTHS, 5.0):
        assert not torch.equal(layer(TOKENS), plain)
        layer.eval()
        assert torch.equal(layer(TOKENS), plain)
        layer.train()
    assert torch.equal(layer(TOKENS), plain)


def test_the_gradient_passes_as_if_there_were_no_noise() -> None:
    layer = nn.Embedding(12, 8)
    with noisy_embeddings(layer, LENGTHS, 5.0):
        layer(TOKENS).sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.ones(12, 8))
