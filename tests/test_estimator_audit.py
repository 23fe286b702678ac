"""What each estimator's mean is: by enumeration of its masks through the code, against sums written with loops."""

import itertools

import numpy as np
import pytest
import torch
from slow import MASK, Enumerable, batch_of, chance, masks_of
from test_remask import keep_by_hand

import maskgrpo as m
import remask
from experiments.estimator_audit import inverse_weights

X0, WHOLE = [1, 3, 0, 2], torch.ones(1, 4, dtype=torch.bool)


def ell_of(model, masks, inverse=False):
    """The sequence term of one re-masking of X0, by the functions that training and the audit use."""
    log_p = m.token_log_probs(model, batch_of([X0]), masks.masked, masks.scored, MASK)
    return m.sequence_ell(log_p * inverse_weights(WHOLE, masks) if inverse else log_p, masks.t).item()


def log_p_of(model, n, hidden):
    """log p(X0[n] | X0 with `hidden` masked), by loops."""
    return model.slow([MASK if i in hidden else word for i, word in enumerate(X0)])[n, X0[n]].item()


def mean_over_masks(model, scheme, chances, hiding, **options):
    """E ell over the noise. Each position's noise takes the value that hides it, `hiding`, or one that does not."""
    total = 0.0
    for hide in masks_of(4):
        if p := chance(hide, chances):
            masks = scheme(torch.where(hide, hiding, 0.9999999 - hiding)[None])
            assert torch.equal(masks.masked[0], hide)
            total += p * ell_of(model, masks, **options)
    return total


@pytest.mark.parametrize("r", [0.3, 0.5, 0.7, 1.0])
def test_fading_out_counts_a_token_by_its_chance_over_r_and_inverse_weights_count_it_once(r):
    """Below r = 1/2 the first tokens are never hidden: no weight brings them back."""
    model, scheme = Enumerable(True), lambda u: remask.fading_out(WHOLE, r, u)
    chances, hidden = [1 - keep for keep in keep_by_hand(4, r)], lambda mask: mask.nonzero()[:, 0].tolist()
    # of each n P(n is hidden) E[log p(X0[n] | x_t) | n is hidden]
    log_p = [sum(chance(h, chances) * log_p_of(model, n, hidden(h)) for h in masks_of(4) if h[n]) for n in range(4)]
    got = mean_over_masks(model, scheme, chances, hiding=0.9999999)
    assert got == pytest.approx(sum(log_p) / r, rel=1e-5)
    got = mean_over_masks(model, scheme, chances, hiding=0.9999999, inverse=True)
    assert got == pytest.approx(sum(v / c for v, c in zip(log_p, chances) if c), rel=1e-5)
    assert (min(chances) < r) == (r < 1)  # and 1/t is another weight


def test_whole_range_is_the_mean_over_all_orders_of_generation():
    """UniGRPO's masks sample the any-order likelihood bound. In r the mean is a polynomial: 8 nodes integrate it."""
    model, got = Enumerable(True), 0.0
    for node, weight in zip(*np.polynomial.legendre.leggauss(8)):
        r = (node + 1) / 2
        scheme = lambda u: remask.whole_range(WHOLE, u, torch.tensor([1 - r]), 1, 1)
        got += weight / 2 * mean_over_masks(model, scheme, r, hiding=0.0)
    orders = list(itertools.permutations(range(4)))
    expected = sum(log_p_of(model, n, order[i:]) for order in orders for i, n in enumerate(order)) / len(orders)
    assert got == pytest.approx(expected, rel=1e-4)


STEPS = torch.tensor([[1, 0, 3, 2]])  # a trace: the step that revealed each token


@pytest.mark.parametrize("mu", [1, 2, 4])
def test_the_mean_of_trace_and_of_every_update_of_rotated_trace_is_the_sum_in_the_states_of_its_slices(mu):
    model, phases = Enumerable(True), torch.arange(mu) / mu + 0.3 / mu  # one in every slice
    step, size = STEPS[0].tolist(), 4 // mu  # steps of a slice; hidden in it is what comes at its first step or later
    states = [[i for i in range(4) if step[i] >= step[n] // size * size] for n in range(4)]
    expected = pytest.approx(sum(log_p_of(model, n, states[n]) for n in range(4)), rel=1e-5)
    assert sum(ell_of(model, remask.trace(WHOLE, STEPS, j, mu)) for j in range(1, mu + 1)) / mu == expected
    rotated = lambda phase, j: remask.rotated_trace(WHOLE, STEPS, phase.view(1), j, mu)
    for j in range(1, mu + 1):
        assert sum(ell_of(model, rotated(phase, j)) for phase in phases) / mu == expected
