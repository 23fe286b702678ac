"""What each estimator's mean is: by enumeration of its masks through the code, against sums written with loops."""

import itertools

import numpy as np
import pytest
import torch
from slow import MASK, Enumerable, batch_of, chance, masks_of
from test_remask import keep_by_hand

import maskgrpo as m
import remask
from emerge_sampler import semi_autoregressive
from experiments.estimator_audit import as_in_the_rollout, upper_bound

X0, WHOLE = [1, 3, 0, 2], torch.ones(1, 4, dtype=torch.bool)


def ell_of(model, masks):
    """The sequence term of one re-masking of X0, by the functions that training and the audit use."""
    return m.sequence_ell(m.token_log_probs(model, batch_of([X0]), masks.masked, masks.scored, MASK), masks.t).item()


def log_p_of(model, n, hidden):
    """log p(X0[n] | X0 with `hidden` masked), by loops."""
    return model.slow([MASK if i in hidden else word for i, word in enumerate(X0)])[n, X0[n]].item()


def mean_over_masks(model, scheme, chances, hiding):
    """E ell over the noise. Each position's noise takes the value that hides it, `hiding`, or one that does not."""
    total = 0.0
    for hide in masks_of(4):
        if p := chance(hide, chances):
            masks = scheme(torch.where(hide, hiding, 0.9999999 - hiding)[None])
            assert torch.equal(masks.masked[0], hide)
            total += p * ell_of(model, masks)
    return total


@pytest.mark.parametrize("r", [0.3, 0.5, 0.7, 1.0])
def test_fading_out_counts_a_token_by_its_chance_over_r(r):
    model, scheme = Enumerable(True), lambda u: remask.fading_out(WHOLE, r, u)
    chances, hidden = [1 - keep for keep in keep_by_hand(4, r)], lambda mask: mask.nonzero()[:, 0].tolist()
    # of each n P(n is hidden) E[log p(X0[n] | x_t) | n is hidden]
    log_p = [sum(chance(h, chances) * log_p_of(model, n, hidden(h)) for h in masks_of(4) if h[n]) for n in range(4)]
    got = mean_over_masks(model, scheme, chances, hiding=0.9999999)
    assert got == pytest.approx(sum(log_p) / r, rel=1e-5)
    assert (min(chances) < r) == (r < 1)  # and 1/t is another weight


ORDERS = list(itertools.permutations(range(4)))


def any_order(model):
    """The mean over all orders of generation of log p(X0)."""
    return sum(log_p_of(model, n, order[i:]) for order in ORDERS for i, n in enumerate(order)) / len(ORDERS)


def test_whole_range_is_the_mean_over_all_orders_of_generation():
    """UniGRPO's masks sample the any-order likelihood bound. In r the mean is a polynomial: 8 nodes integrate it."""
    model, got = Enumerable(True), 0.0
    for node, weight in zip(*np.polynomial.legendre.leggauss(8)):
        r = (node + 1) / 2
        scheme = lambda u: remask.whole_range(WHOLE, u, torch.tensor([1 - r]), 1, 1)
        got += weight / 2 * mean_over_masks(model, scheme, r, hiding=0.0)
    assert got == pytest.approx(any_order(model), rel=1e-4)


@pytest.mark.parametrize("mu", [1, 2, 3, 12])
def test_quadrature_has_the_same_mean_from_two_nodes_on(mu):
    """Of 4 tokens it is a polynomial of degree 3 in t, so that one node is not enough."""
    model, nodes = Enumerable(True), (np.polynomial.legendre.leggauss(mu)[0] + 1) / 2
    each = [lambda u, j=j: remask.quadrature(WHOLE, u, j, mu) for j in range(1, mu + 1)]
    got = sum(mean_over_masks(model, scheme, r, hiding=0.0) for scheme, r in zip(each, nodes)) / mu
    assert (got == pytest.approx(any_order(model), rel=1e-4)) == (mu > 1)


def test_a_pair_of_coupled_masks_scores_each_token_once_at_r_and_at_1_minus_r():
    model, u_ratio, got = Enumerable(True), torch.tensor([0.25]), 0.0  # r = .35
    for hide in masks_of(4):
        pair = [remask.coupled(WHOLE, torch.where(hide, 0.3, 0.4)[None], u_ratio, second) for second in (False, True)]
        assert torch.equal(pair[0].masked[0], hide) and torch.equal(pair[1].masked[0], ~hide)
        assert [masks.t.item() for masks in pair] == pytest.approx([0.35, 0.65])
        got += chance(hide, 0.35) * sum(ell_of(model, masks) for masks in pair) / 2
    uniform = [mean_over_masks(model, lambda u, r=r: remask.uniform(WHOLE, r, u), r, hiding=0.0) for r in (0.35, 0.65)]
    assert got == pytest.approx(sum(uniform) / 2, rel=1e-5)


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


def test_the_mean_of_random_step_is_the_sum_over_the_steps():
    """In the very states of the rollout, of however many steps: here 3, with two tokens in one of them."""
    model, order = Enumerable(True), torch.tensor([[1, 0, 2, 1]])
    steps = [ell_of(model, remask.random_step(WHOLE, order, torch.tensor([(n + 0.5) / 3]))) for n in range(3)]
    states = {0: [0, 2, 3], 1: [0, 1, 2, 3], 2: [2], 3: [0, 2, 3]}
    assert sum(steps) / 3 == pytest.approx(sum(log_p_of(model, n, hidden) for n, hidden in states.items()), rel=1e-5)


def test_left_to_right_is_the_likelihood_of_that_order():
    model = Enumerable(True)
    got = sum(ell_of(model, remask.left_to_right(WHOLE, j, 4)) for j in range(1, 5)) / 4
    assert got == pytest.approx(sum(log_p_of(model, n, range(n, 4)) for n in range(4)), rel=1e-5)


def test_the_upper_bound_is_one_and_of_a_single_mask_the_sum():
    """Over all 24 orders, step by step, as 96 masks. With an exponent of the length it is above the exact likelihood of
    random order, by Hoelder, which is above the mean over orders, by Jensen."""
    model, scored = Enumerable(True), torch.eye(4).bool()[torch.tensor(ORDERS)].view(96, 1, 4)
    masked = torch.stack([scored[k : k // 4 * 4 + 4].any(0) for k in range(96)])
    log_of = lambda *masks: m.token_log_probs(model, batch_of([X0]), *masks, MASK)
    log_p = torch.stack([log_of(*pair) for pair in zip(masked, scored)]).detach()
    log_of_order = log_p.double().view(24, 4, 4).sum((1, 2))
    bound = lambda beta: upper_bound(log_p, scored, torch.full((96, 1), 1 / 4), beta).item()
    by_loops = [np.log(np.mean([np.exp(3 * v[n]) for v in log_p.view(24, 4, 4).sum(1).numpy()])) / 3 for n in range(4)]
    assert bound(3) == pytest.approx(sum(by_loops), rel=1e-5)
    exact = log_of_order.logsumexp(0).item() - np.log(24)
    assert bound(4) > exact > log_of_order.mean().item() == pytest.approx(any_order(model), rel=1e-5)
    alone = log_p[:1].requires_grad_()
    upper_bound(alone, scored[:1], torch.full((1, 1), 0.3)).sum().backward()
    assert torch.equal(alone.grad, scored[:1].float())


@pytest.mark.parametrize("cache", m.CACHES)
def test_the_exact_likelihood_of_a_cached_rollout_is_made_of_the_logits_that_it_saw(cache):
    base, cfg = m.tiny_model(["a b c d e f g h"], 0).eval(), m.Config(cache=cache)
    x = torch.cat([torch.arange(4, 9), torch.full((7,), base.mask_id)])[None]
    attention, seen = torch.ones_like(x, dtype=torch.bool), []
    ask = m.asking(base, lambda x: (x, attention), cache, base.shifted)
    record = lambda x, positions: seen.append((x.clone(), positions, ask(x, positions))) or seen[-1][2]
    options = dict(block_length=4, tokens_per_step=1, temperature=1.0, eos_ids=())
    semi_autoregressive(record, x, x == base.mask_id, generator=torch.Generator().manual_seed(0), **options)
    apart = []
    for n, (x, positions, logits) in enumerate(seen):
        first, there, _ = seen[n // 4 * 4]  # of the block
        denoise = as_in_the_rollout(cfg, base, attention)
        again = denoise(torch.cat([first, x]), torch.cat([there, positions]))[-len(logits) :]
        torch.testing.assert_close(again, logits, atol=2e-5, rtol=0)
        apart.append((base(x, attention, positions) - logits).nan_to_num().abs().max().item())
    assert (max(apart) > 1e-3) == (cache != "off")
