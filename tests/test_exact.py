"""exact.py: likelihoods against the sampler's procedure played through draw by draw."""

import itertools
import math

import pytest
import torch
from exact import log_likelihood
from slow import Enumerable

WORDS, LENGTH = 3, 4
MASK, T = WORDS, 0.7
STRINGS = list(itertools.product(range(WORDS), repeat=LENGTH))
SIZES = [(4, 1), (4, 2), (4, 3), (4, 4), (2, 1), (2, 2), (3, 2), (1, 1)]  # block length, tokens per step


def denoiser(model):
    return lambda x, positions: model(x, None, positions)


def exact(model, rows, order, block, k, threshold=1.0):
    """exp of log_likelihood of completions that fill their rows."""
    x = torch.tensor(rows)
    settings = dict(order=order, block_length=block, tokens_per_step=k, temperature=T, threshold=threshold)
    return log_likelihood(denoiser(model), x, torch.ones_like(x, dtype=torch.bool), MASK, **settings).exp()


def next_states(model, state, order, block, k, threshold):
    """Every (state, probability) that one step leads to: all draws at all hidden positions of the block, with loops."""
    first = state.index(MASK) // block * block
    hidden = [i for i in range(first, min(first + block, LENGTH)) if state[i] == MASK]
    with torch.no_grad():
        log_q = model(torch.tensor([state]), None, torch.tensor([[i in hidden for i in range(LENGTH)]]))
    p, q = (log_q / T).softmax(-1).tolist(), log_q.log_softmax(-1).tolist()
    for draw in itertools.product(range(WORDS), repeat=len(hidden)):
        chance = math.prod(p[i][v] for i, v in enumerate(draw))
        if order == "confident":
            ranked = enumerate(sorted(range(len(draw)), key=lambda i: (-q[i][draw[i]], i)))
            ways = [[i for rank, i in ranked if rank < k or q[i][draw[i]] > math.log(threshold)]]
        else:
            ways = list(itertools.combinations(range(len(draw)), min(k, len(draw))))
        for chosen in ways:
            after = list(state)
            for i in chosen:
                after[hidden[i]] = draw[i]
            yield tuple(after), chance / len(ways)


def played_through(model, order, block, k, threshold):
    """{completion: probability} by following every draw of every step."""
    states, done = {(MASK,) * LENGTH: 1.0}, dict.fromkeys(STRINGS, 0.0)
    while states:
        reached = {}
        for state, chance in states.items():
            for after, step in next_states(model, state, order, block, k, threshold):
                where = reached if MASK in after else done
                where[after] = where.get(after, 0.0) + chance * step
        states = reached
    return torch.tensor([done[string] for string in STRINGS], dtype=torch.float64)


def tied():
    """A model with the same prediction everywhere: ties in every state, which are taken from the left."""
    model = Enumerable(True, LENGTH, WORDS)
    with torch.no_grad():
        model.mix.round_().clamp_(0, 1)
        model.bias.copy_(model.bias[:1].round())
        model.mix.copy_(model.mix[:, :, :1])
    return model


@pytest.mark.parametrize("order,threshold", [("random", 1.0), *(("confident", of) for of in (1.0, 0.6, 0.3))])
@pytest.mark.parametrize("block,k", SIZES)
def test_likelihoods_equal_the_sampler_played_through_and_sum_to_one(order, threshold, block, k):
    for model in (Enumerable(True, LENGTH, WORDS, 0), Enumerable(True, LENGTH, WORDS, 1), tied()):
        got = exact(model, STRINGS, order, block, k, threshold)
        assert got.sum().item() == pytest.approx(1, abs=1e-6)
        expected = played_through(model, order, block, k, threshold)
        torch.testing.assert_close(got.detach(), expected, atol=1e-6, rtol=1e-5)


def test_an_eos_at_the_end_of_a_block_ends_the_sum():
    """What lies behind is not decoded: the probability of the two tokens is the sum over all that could follow."""
    model = Enumerable(True, LENGTH, WORDS)
    for first in range(WORDS):
        row = torch.tensor([[first, 0, MASK, MASK]])
        p = log_likelihood(denoiser(model), row, row != MASK, MASK, order="confident", block_length=2, temperature=T)
        follow = [string for string in STRINGS if string[:2] == (first, 0)]
        torch.testing.assert_close(p.exp(), exact(model, follow, "confident", 2, 1).sum(0, keepdim=True))


@pytest.mark.parametrize("order", ["confident", "random"])
def test_gradients(order):
    """All completions keep their sum of 1, so its gradient is 0; one of them follows its finite difference."""
    model = Enumerable(True, LENGTH, WORDS)
    model.bias.data, model.mix.data = model.bias.data * 3, model.mix.data * 3  # some F are 0 to float32
    p = exact(model, STRINGS, order, 4, 1)
    whole = torch.autograd.grad(p.sum(), list(model.parameters()), retain_graph=True)
    one = torch.autograd.grad(p[40].log(), list(model.parameters()))
    assert all(g.abs().max() < 1e-5 for g in whole) and max(g.abs().max() for g in one) > 1e-2
    values, h = [], 1e-3
    for step in (h, -2 * h):
        model.bias.data += step * one[0]
        values.append(exact(model, STRINGS, order, 4, 1)[40].log().item())
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(one[0].square().sum().item(), rel=0.02)


@pytest.mark.parametrize("order", ["confident", "random"])
def test_every_prompt_has_its_own_distribution_in_its_own_columns(order):
    """Prompts of 1 and 2 words in one batch, one behind padding, one before masks that are not of its completion: each
    distribution sums to 1, and is what it is alone."""
    model, pad, settings = Enumerable(True, 6, WORDS), 0, dict(order=order, block_length=2, temperature=T)
    rows = torch.tensor([[*left, *s, *right] for left, right in (((pad, 2), ()), ((1,), (MASK,))) for s in STRINGS])
    where = torch.arange(6).expand_as(rows)
    where = torch.cat([where[:81] > 1, (where[81:] > 0) & (where[81:] < 5)])
    of = lambda some: log_likelihood(denoiser(model), rows[some], where[some], MASK, **settings).exp()
    p = of(slice(None))
    torch.testing.assert_close(p.view(2, -1).sum(1), torch.ones(2, dtype=torch.float64), atol=1e-6, rtol=0)
    assert (p[:81] - p[81:]).abs().max() > 1e-3
    for alone in (slice(40, 41), slice(90, 91)):
        torch.testing.assert_close(of(alone), p[alone], rtol=1e-5, atol=0)


@pytest.mark.parametrize("order,lengths", [("confident", (2, 4)), ("left to right", (4, 4))])
def test_what_it_cannot_take_is_refused(order, lengths):
    where = torch.arange(4) < torch.tensor(lengths)[:, None]
    with pytest.raises(ValueError, match="want one length, a known order"):
        log_likelihood(denoiser(tied()), torch.zeros(2, 4).long(), where, MASK, order=order, block_length=2)
