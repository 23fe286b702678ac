"""upo.py against enumeration on a tabular masked diffusion model, and end to end on tiny bases."""

import dataclasses
import itertools
import json
import math
import shutil
import signal
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import LAUNCH_2, wait_for
from safetensors.torch import load_file, save_file
from torch import nn

import emerge_sampler
import maskgrpo as m
import rewards
import upo
from remask import seeded

# ---------------------------------------------------------------------------------------------
# A tabular masked diffusion model: n = 3 tokens, 2 words (0, 1), mask 2; random tables from a seed
# ---------------------------------------------------------------------------------------------

N, V, MASK = 3, 2, 2
STATES = list(itertools.product(range(V + 1), repeat=N))
INDEX = {state: i for i, state in enumerate(STATES)}
MASKED = torch.tensor([[token == MASK for token in state] for state in STATES])  # (27, 3)
START = (MASK,) * N


def code(x: torch.Tensor) -> torch.Tensor:
    """The index of each row of x (B, 3) in STATES."""
    return (x * (V + 1) ** torch.arange(N - 1, -1, -1)).sum(1)


class Tabular:
    """A frozen base with its own random logits in every state, and its `read`."""

    def __init__(self, seed: int):
        self.logits = 1.5 * torch.randn(len(STATES), N, V, generator=torch.Generator().manual_seed(seed))
        self.model = SimpleNamespace(pad_id=0)

    def read(self, x, attention, positions):
        hidden = nn.functional.one_hot(code(x), len(STATES))[:, None].expand(-1, N, -1).float()
        return hidden, self.logits[code(x)][positions]

    def after(self, state: tuple, a: int):
        """(probability, next state) of each token at position a."""
        p = self.logits[INDEX[state], a].softmax(0).tolist()
        return [(p[v], (*state[:a], v, *state[a + 1 :])) for v in range(V)]


def log_policy(theta: torch.Tensor) -> torch.Tensor:
    """log g (27, 3): softmax of theta over the masked positions of each state."""
    return theta.masked_fill(~MASKED, -torch.inf).log_softmax(1)


def random_theta(seed: int) -> torch.Tensor:
    return torch.randn(len(STATES), N, generator=torch.Generator().manual_seed(seed))


def every_trajectory(base: Tabular):
    """All (states, actions, x0, probability of its tokens), by recursion."""

    def go(state, states, actions, p):
        if MASK not in state:
            yield states, actions, state, p
            return
        for a in range(N):
            if state[a] == MASK:
                for q, new in base.after(state, a):
                    yield from go(new, [*states, INDEX[state]], [*actions, a], p * q)

    return list(go(START, [], [], 1.0))


def outputs(base: Tabular, log_g: torch.Tensor) -> dict[tuple, torch.Tensor]:
    """p_g(x0), by dynamic programming over states: independent of `every_trajectory`."""
    mass = {START: torch.ones(())}
    for _ in range(N):
        new = defaultdict(lambda: torch.zeros(()))
        for state, p in mass.items():
            for a in range(N):
                if state[a] == MASK:
                    for q, then in base.after(state, a):
                        new[then] = new[then] + p * log_g[INDEX[state], a].exp() * q
        mass = new
    return dict(mass)


def as_trajectories(base: Tabular, log_old: torch.Tensor, log_ref: torch.Tensor):
    """(upo.Trajectories with every trajectory as a row, their probabilities under g_old (B,), their x0)."""
    every = every_trajectory(base)
    states = torch.tensor([s for t in every for s in t[0]])  # (B N,)
    action = torch.tensor([a for t in every for a in t[1]])
    at = torch.arange(len(action))  # as if all states were different
    row = torch.arange(len(every)).repeat_interleave(N)
    old, ref = log_old[states, action].detach(), log_ref[states, action].detach()
    sums = lambda v: v.view(-1, N).sum(1)
    p = sums(old).exp() * torch.tensor([t[3] for t in every])
    e = upo.Trajectories(
        batch=None, unmask_step=None, length=torch.full((len(every),), N), log_ratio=sums(old - ref),
        entropy=None, state=states, row=row, at=at, action=action, log_old=old, weight=torch.ones(len(action)), log_ref=log_ref[states].detach(),
    )  # fmt: skip
    return e, p, [t[2] for t in every]


def expected_loss(theta, base, log_old, log_ref, value: dict, *, ref: str, clip: float, beta: float, divergence=None):
    """E over trajectories of g_old of upo_loss: every trajectory is a batch of one, weighted by its probability."""
    e, p, x0 = as_trajectories(base, log_old, log_ref)
    log_g = log_policy(theta)
    total = 0.0
    for b in range(len(p)):
        steps = slice(b * N, (b + 1) * N)
        one = e._replace(length=e.length[b : b + 1], log_ratio=e.log_ratio[b : b + 1], row=torch.zeros(N, dtype=torch.long), at=torch.arange(N), action=e.action[steps], log_old=e.log_old[steps], weight=torch.ones(N), log_ref=e.log_ref[steps])  # fmt: skip
        advantage = torch.tensor([value[x0[b]]])
        total = total + p[b] * upo.upo_loss(log_g[e.state[steps]], one, advantage, ref=ref, clip=clip, beta=beta).loss  # fmt: skip
    return total


def random_values(seed: int) -> dict[tuple, float]:
    g = torch.Generator().manual_seed(seed)
    return {x0: torch.randn((), generator=g).item() for x0 in itertools.product(range(V), repeat=N)}


def gradient(value: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value, theta, retain_graph=True)[0]


# ---------------------------------------------------------------------------------------------
# The MDP
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_outputs_sum_to_one_and_equal_the_sum_over_trajectories(seed):
    base, log_g = Tabular(seed), log_policy(random_theta(seed))
    assert torch.allclose(log_g.exp().sum(1)[:-1][MASKED.any(1)[:-1]], torch.ones(()))
    exact = outputs(base, log_g)
    assert len(exact) == V**N and sum(exact.values()).item() == pytest.approx(1, abs=1e-6)
    by_trajectory = defaultdict(float)
    for states, actions, x0, p in every_trajectory(base):
        by_trajectory[x0] += p * log_g[torch.tensor(states), torch.tensor(actions)].sum().exp().item()
    assert all(by_trajectory[x0] == pytest.approx(p.item(), abs=1e-6) for x0, p in exact.items())


def tabular_config(**changes) -> upo.Config:
    cfg, _ = m.parse([], upo.Config, upo.__doc__, "upo", "ref", upo.REFERENCES)
    return dataclasses.replace(cfg, temperature=1.0, block_length=N, gen_length=N, ref="none", **changes)


def open_rows(rows: int) -> m.Batch:
    whole = torch.ones(rows, N, dtype=torch.bool)
    return m.Batch(torch.full((rows, N), MASK), whole, whole)


def table_order(log_g: torch.Tensor) -> upo.Order:
    return upo.Order(lambda state, log_p: log_g[state.hidden[:, 0].argmax(1)], sampled=True)


def test_the_rollout_draws_from_p_g():
    """A chi-square test of 20,000 rollouts against the enumeration; false alarm once in 1,000 (7 degrees: 24.3)."""
    base, log_g, rows = Tabular(5), log_policy(random_theta(5)), 20_000
    keys = [(11, r) for r in range(rows)]
    weights = torch.ones(rows, N)
    e = upo.unmask(base, open_rows(rows), table_order(log_g), tabular_config(), keys, [], weights=weights)
    exact = outputs(base, log_g)
    counts = {x0: 0 for x0 in exact}
    for row in e.batch.x.tolist():
        counts[tuple(row)] += 1
    assert sum((counts[x0] - rows * p.item()) ** 2 / (rows * p.item()) for x0, p in exact.items()) < 24.3
    # what is kept for the updates is what happened
    assert e.length.eq(N).all() and sorted(set(e.unmask_step.flatten().tolist())) == [0, 1, 2]
    assert len(e.state.hidden) == 27 - 8  # each state once, however many rows were in it
    states = e.state.hidden[e.at, 0].argmax(1)
    assert torch.allclose(e.log_old, log_g[states, e.action])
    assert torch.allclose(e.log_ref.exp()[e.at].sum(1), torch.ones(()))
    steps = torch.zeros(rows, N).index_put((e.row, e.action), torch.ones(len(e.row)), accumulate=True)
    assert steps.eq(1).all()  # each position once
    first = torch.tensor([state == START for state in STATES])[states]
    assert (e.unmask_step[e.row[first]].argmin(1) == e.action[first]).all()
    entropy = torch.special.entr(log_g.exp()).sum(1)[states]
    assert torch.allclose(e.entropy, upo.per_row(entropy, e.row, rows) / N, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# The objective: Proposition 1, the KL, clipping
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_proposition_1(seed):
    """At g = g_old the token-level gradient is the output-level one divided by L, exactly. Away from it they part."""
    base, theta, value = Tabular(seed), random_theta(seed), random_values(seed)
    cosines = {}
    for distance in (0.0, 0.1, 1.0):
        old = log_policy(theta + distance * random_theta(100 + seed)).detach()
        moving = theta.clone().requires_grad_()
        token = gradient(-expected_loss(moving, base, old, old, value, ref="none", clip=0.999, beta=0.0), moving)
        # E_{x0 ~ p_old}[p_g(x0) / p_old(x0) A(x0)] = sum over x0 of p_g(x0) A(x0)
        output = gradient(sum(p * value[x0] for x0, p in outputs(base, log_policy(moving)).items()), moving)
        if distance == 0:
            assert torch.allclose(N * token, output, atol=1e-6)
        cosines[distance] = torch.cosine_similarity(token.flatten(), output.flatten(), dim=0).item()
    assert cosines[0.0] == pytest.approx(1, abs=1e-6) and 1 > cosines[0.1] > 0.97 and cosines[1.0] < cosines[0.1]


def kl_over_trajectories(base: Tabular, log_g: torch.Tensor, log_ref: torch.Tensor) -> torch.Tensor:
    """KL(g || g_ref) over trajectories, by enumeration."""
    total = 0.0
    for states, actions, _, p in every_trajectory(base):
        at = torch.tensor(states), torch.tensor(actions)
        total = total + p * log_g[at].sum().exp() * (log_g[at] - log_ref[at]).sum()
    return total


@pytest.mark.parametrize("seed", range(3))
def test_the_kl_gradient_is_exact_for_trajectories(seed):
    base, ref = Tabular(seed), log_policy(random_theta(50 + seed))
    theta = random_theta(seed).requires_grad_()
    exact = gradient(kl_over_trajectories(base, log_policy(theta), ref), theta)
    nothing = dict.fromkeys(random_values(0), 0.0)
    # at g = g_old, and where no weight g / g_old is clipped, the mean of the estimate is the gradient
    for distance in (0.0, 0.05):
        old = log_policy(theta.detach() + distance * random_theta(200 + seed))
        loss = expected_loss(theta, base, old, ref, nothing, ref="topk", clip=0.2, beta=0.5)
        assert torch.allclose(gradient(loss, theta), 0.5 * exact, atol=2e-6)
    # with g far from g_old the clip of the weight biases it
    far = log_policy(random_theta(300 + seed))
    biased = gradient(expected_loss(theta, base, far, ref, nothing, ref="topk", clip=0.2, beta=0.5), theta)
    assert not torch.allclose(biased, 0.5 * exact, atol=1e-3)
    # it is the KL over trajectories, which is above the KL over outputs
    p, q = outputs(base, log_policy(theta)), outputs(base, ref)
    over_outputs = sum(p[x0] * (p[x0] / q[x0]).log() for x0 in p)
    assert over_outputs.item() < kl_over_trajectories(base, log_policy(theta), ref).item()


def test_cross_entropy_is_the_divergence_of_max_confidence():
    base, theta, value = Tabular(1), random_theta(1).requires_grad_(), dict.fromkeys(random_values(0), 0.0)
    old = log_policy(theta.detach())
    ref = upo.max_confidence(base.logits.softmax(2).amax(2), MASKED)
    loss = expected_loss(theta, base, old, ref, value, ref="max_confidence", clip=0.2, beta=0.3)
    by_hand = 0.0
    for states, actions, _, p in every_trajectory(base):
        weight = p * old[torch.tensor(states), torch.tensor(actions)].sum().exp()
        by_hand = by_hand + weight * sum(-log_policy(theta)[s, ref[s].argmax()] for s in states) / N
    assert loss.item() == pytest.approx(0.3 * by_hand.item(), rel=1e-5)
    assert torch.allclose(gradient(loss, theta), 0.3 * gradient(by_hand, theta), atol=1e-6)


def test_clipping_by_hand():
    log_g = torch.tensor([0.5, 0.5, 0.9, 0.9, 0.6]).log().requires_grad_()
    log_old = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.9]).log()
    advantage = torch.tensor([2.0, -2.0, 1.0, -1.0, -1.0])  # rho: 1, 1, 1.8, 1.8, 2/3
    out = upo.surrogate(log_g, log_old, advantage, 0.2)
    assert torch.allclose(out, torch.tensor([2.0, -2.0, 1.2, -1.8, -0.8]))
    # a clipped step has no gradient, the pessimistic side keeps its own: d(rho A) / d log g = rho A
    assert torch.allclose(gradient(out.sum(), log_g), torch.tensor([2.0, -2.0, 0.0, -1.8, 0.0]))


def test_steps_left_out_change_no_expectation():
    """Every draw of step_weights is enumerated: the first step, and one of the two others; at g = g_old."""
    base, theta, value = Tabular(2), random_theta(2).requires_grad_(), random_values(2)
    old, ref = log_policy(theta.detach()), log_policy(random_theta(52))
    e, p, x0 = as_trajectories(base, old, ref)
    advantages = torch.tensor([value[x] for x in x0]) * p * len(p)  # linear in A: the mean becomes the expectation
    weigh = lambda e: upo.upo_loss(log_policy(theta)[e.state], e, advantages, ref="none", clip=0.2, beta=0.0).loss
    kl = lambda e: upo.kl_gradient(log_policy(theta)[e.state][e.at, e.action], e.log_old, e.log_ratio, e.weight, e.row)
    cfg = tabular_config(steps_per_update=2)
    draws = {tuple(upo.step_weights(cfg, [3], [(0, k)])[0].tolist()) for k in range(40)}
    assert draws == {(1, 2, 0), (1, 0, 2)}
    parts = []
    for draw in draws:
        weight = torch.tensor(draw).repeat(len(p))
        keep = weight > 0
        steps = {name: getattr(e, name)[keep] for name in ("row", "action", "log_old", "state", "log_ref")}
        parts.append(e._replace(**steps, at=torch.arange(int(keep.sum())), weight=weight[keep]))
    for quantity in (weigh, kl):
        mean = sum(gradient(quantity(part), theta) for part in parts) / len(parts)
        assert torch.allclose(mean, gradient(quantity(e), theta), atol=1e-6)
        assert not torch.allclose(gradient(quantity(parts[0]), theta), mean, atol=1e-4)
    # a row's stride follows from its own positions: of 3, 2 steps on average; of 2 and of 1, all; 0 behind its last
    few = upo.step_weights(cfg, [3, 2, 1], [(0, k) for k in range(3)])
    assert few[1].tolist() == [1, 1, 0] and few[2].tolist() == [1, 0, 0]
    shares = upo.step_weights(cfg, [3] * 4000, [(0, k) for k in range(4000)]).mean(0)
    assert (shares - 1).abs().max() < 0.08  # the mean weight is 1: five standard errors of 4,000 draws


# ---------------------------------------------------------------------------------------------
# Theorems 1 and 2, for the KL over trajectories, which is what is trained
# ---------------------------------------------------------------------------------------------


def soft_optimum(base: Tabular, log_ref: torch.Tensor, value: dict, beta: float) -> torch.Tensor:
    """log g of the maximiser of E[value(x0)] - beta KL(g || g_ref), by backward induction: V(x_n) = beta log sum_a
    g_ref(a) exp(Q(x_n, a) / beta), Q = E V(x_{n-1}), g(a) = g_ref(a) exp((Q(a) - V) / beta)."""
    worth, log_g = dict(value), torch.full((len(STATES), N), -torch.inf)
    for state in sorted(STATES, key=lambda s: s.count(MASK)):
        if MASK in state:
            q = torch.full((N,), -torch.inf)
            for a in range(N):
                if state[a] == MASK:
                    q[a] = sum(p * worth[new] for p, new in base.after(state, a))
            scores = log_ref[INDEX[state]] + q / beta
            worth[state] = beta * scores.logsumexp(0).item()
            log_g[INDEX[state]] = scores.log_softmax(0)
    return log_g


def test_training_by_the_loss_reaches_the_optimum_in_closed_form():
    base, value, beta = Tabular(3), random_values(3), 0.1
    ref = upo.softmax_confidence(base.logits.softmax(2).amax(2), MASKED, tau=0.3)
    theta = torch.zeros(len(STATES), N, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.1)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 150)
        loss = expected_loss(theta, base, log_policy(theta.detach()), ref, value, ref="topk", clip=0.2, beta=beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimum = soft_optimum(base, ref, value, N * beta)  # the surrogate is a mean over L = N steps, the KL a sum
    reached = [sum(p.item() * value[x0] for x0, p in outputs(base, g).items()) for g in (log_policy(theta), optimum)]
    assert reached[0] == pytest.approx(reached[1], abs=1e-3)
    assert torch.allclose(log_policy(theta)[INDEX[START]].exp(), optimum[INDEX[START]].exp(), atol=0.01)


def success(base: Tabular, log_g: torch.Tensor, right: set) -> float:
    return sum(p.item() for x0, p in outputs(base, log_g).items() if x0 in right)


def iterate(base: Tabular, ref: torch.Tensor, right: set, beta: float) -> tuple[list[float], torch.Tensor]:
    """Rewards of g_ref = g_0, g_1, ... and the last g: each the optimum for the standardised advantages of the one
    before, as GRPO has them, held to g_ref."""
    log_g, rewards_ = ref, [success(base, ref, right)]
    for _ in range(60):
        mean = rewards_[-1]
        std = math.sqrt(mean * (1 - mean))
        value = {x0: ((x0 in right) - mean) / std for x0 in random_values(0)}
        log_g = soft_optimum(base, ref, value, beta)
        rewards_.append(success(base, log_g, right))
    return rewards_, log_g


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["softmax_confidence", "topk"])
def test_theorems_1_and_2(kind, seed):
    """Theorem 1: the reward settles above the reference's. Theorem 2: so does the distance to the right answers."""
    base, right = Tabular(seed), {(0, 1, 0), (1, 1, 0), (1, 0, 1)}
    confidence = base.logits.softmax(2).amax(2)
    cfg = tabular_config(topk=2, tau=0.3)
    allowed = upo.most_confident_k(confidence, MASKED, cfg.topk) if kind == "topk" else MASKED
    ref = upo.log_reference(dataclasses.replace(cfg, ref=kind), confidence, allowed)
    rewards_, log_g = iterate(base, ref, right, beta=0.5)
    assert rewards_[-1] == pytest.approx(rewards_[-2], abs=1e-7)  # a fixed point
    assert rewards_[-1] > rewards_[0] + 0.005  # strictly above the reference: these cases have headroom
    p_ref, p_star = outputs(base, ref), outputs(base, log_g)
    # p_data: the model's own right answers, as in the paper's theorem
    total = sum(p_ref[x0] for x0 in right)
    data = {x0: p_ref[x0] / total for x0 in right}
    distance = lambda p: sum(data[x0] * (data[x0] / p[x0]).log() for x0 in right).item()
    assert distance(p_star) < distance(p_ref)


def test_without_headroom_nothing_is_gained():
    """Tokens that do not depend on each other: every order has the same outputs, and g* = g_ref."""
    base, right = Tabular(0), {(0, 1, 0), (1, 1, 0)}
    base.logits = base.logits[:1].expand(len(STATES), N, V)
    ref = log_policy(random_theta(1))
    rewards_, log_g = iterate(base, ref, right, beta=0.2)
    assert rewards_ == pytest.approx([rewards_[0]] * len(rewards_), abs=1e-6)
    assert torch.allclose(log_g[:-1].exp(), ref[:-1].exp().nan_to_num(), atol=1e-5)
    assert all(
        p.item() == pytest.approx(outputs(base, ref)[x0].item(), abs=1e-6) for x0, p in outputs(base, log_g).items()
    )


# ---------------------------------------------------------------------------------------------
# References and rules, by hand
# ---------------------------------------------------------------------------------------------

T, F_ = True, False
CONFIDENCE = torch.tensor([[0.9, 0.5, 0.7, 0.2], [0.6, 0.6, 0.3, 0.6], [0.1, 0.2, 0.3, 0.4]])
CANDIDATES = torch.tensor([[F_, T, T, T], [T, T, T, F_], [F_, F_, T, F_]])


def test_references_by_hand_ties_included():
    probability = lambda log_p: log_p.exp()
    expected = torch.tensor([[0, 0, 1, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0]])
    assert torch.allclose(probability(upo.max_confidence(CONFIDENCE, CANDIDATES)), expected)
    e = [[0, math.exp(5), math.exp(7), math.exp(2)], [math.exp(6), math.exp(6), math.exp(3), 0], [0, 0, 1, 0]]
    expected = torch.tensor([[v / sum(row) for v in row] for row in e])
    assert torch.allclose(probability(upo.softmax_confidence(CONFIDENCE, CANDIDATES, 0.1)), expected, atol=1e-6)
    # K = 2: of the ties the leftmost; where fewer are left, all of them
    best = upo.most_confident_k(CONFIDENCE, CANDIDATES, 2)
    assert best.tolist() == [[F_, T, T, F_], [T, T, F_, F_], [F_, F_, T, F_]]
    ties = upo.most_confident_k(torch.tensor([[0.3, 0.6, 0.6, 0.6]]), torch.tensor([[T, T, T, T]]), 2)
    assert ties.tolist() == [[F_, T, T, F_]]
    expected = torch.tensor([[0, 0.5, 0.5, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0]])
    assert torch.allclose(probability(upo.uniform(best)), expected)
    with pytest.raises(IndexError):
        upo.uniform(best[0])


def test_rules_by_hand():
    """Three positions over four words; 0.05 and 0.1 differ in max, margin and entropy."""
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.46, 0.18, 0.18, 0.18], [0.4, 0.3, 0.3, 0.0]])
    score = {name: rule(p.log(), 0.1) for name, (rule, _) in upo.ORDERS.items()}
    assert torch.allclose(score["max_confidence"], torch.tensor([0.5, 0.46, 0.4]).log())
    assert torch.allclose(score["margin"], torch.tensor([0.0, 0.28, 0.1]), atol=1e-6)
    entropy = [-sum(q * math.log(q) for q in row if q > 0) for row in p.tolist()]
    assert torch.allclose(score["entropy"], -torch.tensor(entropy))
    assert torch.allclose(score["softmax_confidence"], torch.tensor([5.0, 4.6, 4.0]), atol=1e-5)
    assert [score[name].argmax().item() for name in ("max_confidence", "margin", "entropy")] == [0, 1, 0]


def test_sampled_choices_follow_their_scores():
    """40,000 draws; each of 3 shares within 4.5 standard errors: false alarm once in 50,000."""
    rows = 40_000
    scores = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log().expand(rows, 4)
    candidates = ~scores.isneginf()
    a = upo.choose(scores, candidates, [seeded(3, r) for r in range(rows)])
    for position, p in ((0, 0.2), (1, 0.0), (2, 0.5), (3, 0.3)):
        assert abs((a == position).float().mean().item() - p) <= 4.5 * math.sqrt(p * (1 - p) / rows)


# ---------------------------------------------------------------------------------------------
# The head, on bases in the official formats
# ---------------------------------------------------------------------------------------------


def test_the_head_has_the_papers_size():
    with torch.device("meta"):
        policy = upo.UnmaskingPolicy(4096, heads=32)
    layer, mlp = (sum(p.numel() for p in part.parameters()) for part in (policy.layer, policy.mlp))
    assert (layer, mlp) == (83_924_992, 50_594_133)
    assert round((layer + mlp) / 8_015_581_184, 3) == 0.017  # of LLaDA-8B


def test_the_layer_where_it_is_needed_is_pytorchs_layer_everywhere():
    """Against nn.TransformerEncoderLayer on the whole sequence: values, and gradients of parameters and input."""
    generator = torch.Generator().manual_seed(0)
    policy = upo.UnmaskingPolicy(16, heads=4)
    attention = torch.ones(6, 9, dtype=torch.bool)
    attention[:3, :2] = False
    allowed = attention & (torch.rand(6, 9, generator=generator) < 0.4)
    allowed[4] = False  # a row without any; others have 1 to 6
    assert allowed.sum(1).tolist() != sorted(allowed.sum(1).tolist())
    weight, grads = torch.randn(int(allowed.sum()), 16, generator=generator), []
    h = torch.randn(6, 9, 16, generator=generator, requires_grad=True)
    outputs = [policy.at_allowed(h, attention, allowed), policy.layer(h, src_key_padding_mask=~attention)[allowed]]
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=1e-5)
    for output in outputs:
        grads.append(torch.autograd.grad((output * weight).sum(), [h, *policy.layer.parameters()]))
    for one, two in zip(*grads):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def config_for(path, **values) -> upo.Config:
    flags = [
        "--model",
        str(path),
        "--no-bf16",
        "--heads",
        "4",
        "--gen_length",
        "8",
        "--block_length",
        "4",
        "--topk",
        "3",
    ]
    return dataclasses.replace(m.parse(flags, upo.Config, upo.__doc__, "upo", "ref", upo.REFERENCES)[0], **values)


def frozen(path) -> upo.FrozenBase:
    settings = m.parse(["--model", str(path), "--no-bf16", "--no-gradient_checkpointing"])[0]
    return upo.FrozenBase(m.load_model(str(path), settings, trainable=False))


def modernbert(path, bpe):
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    names = dict(eos_token_id=0, bos_token_id=0, pad_token_id=0, cls_token_id=0, sep_token_id=0, mask_token_id=2)
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    torch.manual_seed(0)
    ModernBertForMaskedLM(ModernBertConfig(vocab_size=len(bpe), **sizes, **names)).save_pretrained(path)
    bpe.save_pretrained(path)
    return path


IDS = torch.tensor([[9, 40, 77, 100, 31, 55, 12, 80, 64]])
WHOLE = torch.ones(1, 9, dtype=torch.bool)


@pytest.mark.parametrize("kind", ["llada", "dream", "modernbert"])
def test_features_enter_the_last_block(kind, request, tmp_path, bpe):
    base = frozen(modernbert(tmp_path, bpe) if kind == "modernbert" else request.getfixturevalue(kind))
    hidden, _ = base.read(IDS, WHOLE, WHOLE)
    expected = base.model.hf(input_ids=IDS, output_hidden_states=True).hidden_states[-2]
    if kind == "dream":  # what predicts position i stands at i - 1
        assert hidden[:, 0].eq(0).all()
        hidden, expected = hidden[:, 1:], expected[:, :-1]
    torch.testing.assert_close(hidden, expected, atol=1e-6, rtol=1e-5)
    assert not hidden.requires_grad and not any(p.requires_grad for p in base.model.parameters())


@pytest.mark.parametrize("kind", ["llada", "dream"])
def test_block_head_starts_as_the_bases_last_block(kind, request):
    base = frozen(request.getfixturevalue(kind))
    block = upo.last_block(base.model)
    outputs_ = {}
    base.model.hf.base_model.layers[-1].register_forward_hook(lambda module, args, out: outputs_.update(last=out))
    base.read(IDS, WHOLE, WHOLE)  # leaves what enters the block in base.hidden
    got = block(inputs_embeds=base.hidden, attention_mask=WHOLE.long(), position_ids=torch.arange(9)[None])[0]
    torch.testing.assert_close(got, outputs_["last"], atol=1e-5, rtol=1e-5)
    assert all(p.requires_grad for p in block.parameters())
    got.sum().backward()
    assert all(p.grad is None for p in base.model.parameters())  # a copy


def test_block_head_is_refused_for_other_shapes(tmp_path, bpe):
    with pytest.raises(m.UsageError, match="--head block: not for ModernBertForMaskedLM"):
        upo.last_block(frozen(modernbert(tmp_path, bpe)).model)


@pytest.mark.parametrize("kind", ["llada", "dream", "modernbert"])
@pytest.mark.parametrize("head", ["layer", "block"])
def test_the_policy_is_a_distribution_over_allowed_positions_whatever_the_padding(kind, head, request, tmp_path, bpe):
    if (kind, head) == ("modernbert", "block"):
        pytest.skip("refused, as tested above")
    base = frozen(modernbert(tmp_path, bpe) if kind == "modernbert" else request.getfixturevalue(kind))
    cfg = config_for("x", head=head, ref="topk")
    policy = upo.new_policy(cfg, base, "cpu")
    pad = torch.full((1, 4), base.model.pad_id)
    got = []
    for wide in (False, True):
        x, attention = (torch.cat([pad, IDS], 1), torch.cat([pad < 0, WHOLE], 1)) if wide else (IDS, WHOLE)
        candidates = torch.zeros_like(attention)
        candidates[:, -5:] = True
        masked = candidates.clone()
        masked[:, -1] = False
        candidates[:, -1] = False
        state, _ = upo.see(base, x.masked_fill(masked, base.model.mask_id), attention, masked, candidates, cfg)
        with torch.no_grad():
            log_g = policy(*state, 0.8)
        assert state.allowed.sum() == 3 and (state.allowed <= candidates).all()
        assert log_g.isneginf().eq(~state.allowed).all() and log_g.exp().sum().item() == pytest.approx(1, abs=1e-5)
        got.append(log_g[:, -9:])
    torch.testing.assert_close(*got, atol=1e-5, rtol=1e-4)


def run_for(cfg, task: str = "gsm8k"):
    """A stand-in for Run: what batches and texts need."""
    return SimpleNamespace(cfg=cfg, task=rewards.TASKS[task], device=torch.device("cpu"))


@pytest.mark.parametrize("kind", ["llada", "dream"])
@pytest.mark.parametrize("name", [*upo.ORDERS, "upo"])
def test_actions_are_those_of_a_batch_of_one(kind, name, request):
    """Eight prompts of different lengths, padded on the left, against each alone."""
    base, cfg = frozen(request.getfixturevalue(kind)), config_for("x")
    policy = upo.new_policy(cfg, base, "cpu")
    order = upo.learned(policy, cfg, sampled=True) if name == "upo" else upo.rule(name, cfg)
    problems = [{"question": "Tom has 3 apples. " * (1 + i), "answer": "#### 3"} for i in range(8)]
    keys = [(5, i) for i in range(8)]
    go = lambda rows: upo.unmask(base, m.open_batch(run_for(cfg), base.model, [problems[i] for i in rows]), order, cfg, [keys[i] for i in rows], base.model.eos_ids)  # fmt: skip
    together = go(range(8))
    for i in range(8):
        alone = go([i])
        assert torch.equal(alone.unmask_step[0, -8:], together.unmask_step[i, -8:])
        assert torch.equal(alone.batch.x[0, -8:], together.batch.x[i, -8:])


def test_rows_in_the_same_state_share_it_only_with_the_same_candidates(llada):
    """Two rows that have come to the same x with different blocks: each acts as it does alone."""
    base, cfg = frozen(llada), config_for("x", block_length=2)
    x = IDS.repeat(2, 1)
    completion = torch.zeros(2, 9, dtype=torch.bool)
    completion[0, 3:8], completion[1, 5:8] = True, True  # blocks {3, 4}, {5, 6}, {7} and {5, 6}, {7}
    x[0, 3:5], x[:, 5:8] = base.model.mask_id, base.model.mask_id
    order = upo.Order(
        lambda state, logits: upo.place(torch.arange(int(state.candidates.sum())), state.candidates), False
    )
    go = lambda rows: upo.unmask(base, m.Batch(x[rows], x[rows] >= 0, completion[rows]), order, cfg, [(0, i) for i in rows], [])  # fmt: skip
    together = go([0, 1])
    assert together.unmask_step[0, 3:8].tolist() == [1, 0, 3, 2, 4] and together.unmask_step[1, 5:8].tolist() == [
        1,
        0,
        2,
    ]
    for i in range(2):
        assert torch.equal(go([i]).batch.x[0], together.batch.x[i])


def test_max_confidence_is_the_sampler_of_maskgrpo(llada):
    """Two implementations: `semi_autoregressive` at one token per step, greedy, and `unmask`."""
    base, cfg = frozen(llada), config_for("x", gen_length=12)
    problems = [{"question": f"{i} and {i}?", "answer": "#### 3"} for i in range(6)]
    batch = m.open_batch(run_for(cfg), base.model, problems)
    settings = dict(block_length=4, tokens_per_step=1, temperature=0, generator=[None] * 6, eos_ids=base.model.eos_ids, pad_id=base.model.pad_id)  # fmt: skip
    predict = lambda x, positions: base.model(x, batch.attention, positions)
    expected = emerge_sampler.semi_autoregressive(predict, batch.x, batch.completion, **settings)
    e = upo.unmask(base, batch, upo.rule("max_confidence", cfg), cfg, [(0, i) for i in range(6)], base.model.eos_ids)
    assert torch.equal(e.batch.x, expected.x) and torch.equal(e.unmask_step, expected.unmask_step)


def test_the_loss_does_not_depend_on_how_steps_share_states(llada):
    """unmask computes a state once however many rows are in it; the loss is that of each row by itself."""
    base, cfg = frozen(llada), config_for("x", ref="softmax_confidence")
    policy = upo.new_policy(cfg, base, "cpu")
    problems = [{"question": "Tom?", "answer": "#### 3"}] * 6
    weights = torch.ones(6, 8)
    batch = m.open_batch(run_for(cfg), base.model, problems)
    e = upo.unmask(base, batch, upo.learned(policy, cfg, True), cfg, [(1, i) for i in range(6)], [], weights=weights)
    assert len(e.log_ref) < len(e.row) == 48
    advantages = torch.tensor([1.0, -1, 2, 0, 0.5, -0.5])
    weigh = lambda e: upo.upo_loss(policy(*e.state, cfg.position_temperature), e, advantages, ref=cfg.ref, clip=0.2, beta=0.1).loss  # fmt: skip
    apart = e._replace(state=upo.State(*(v[e.at] for v in e.state)), log_ref=e.log_ref[e.at], at=torch.arange(48))
    grads = [torch.autograd.grad(weigh(v), list(policy.parameters())) for v in (e, apart)]
    assert weigh(e).item() == pytest.approx(weigh(apart).item(), abs=1e-6)
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    # in minibatches of 2: together the same
    total = 0
    for start in range(3):
        rows = torch.arange(start, 6, 3)
        part = upo.minibatch(e, rows, "cpu")
        loss = upo.upo_loss(policy(*part.state, cfg.position_temperature), part, advantages[rows], ref=cfg.ref, clip=0.2, beta=0.1).loss  # fmt: skip
        total += loss.item() / 3
    assert total == pytest.approx(weigh(e).item(), abs=1e-6)


# ---------------------------------------------------------------------------------------------
# End to end: the command line, resuming, two processes, transfer, bad input
# ---------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its precision for the life of a process; each run here starts as in a new one."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def tiny_base(tmp_path_factory):
    """A sudoku base after 40 steps of ELBO training, by maskgrpo.py."""
    path = tmp_path_factory.mktemp("base") / "run"
    flags = "--task sudoku --base_steps 40 --base_accuracy 1 --max_steps 0 --eval_n 2 --pass_k 0".split()
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        assert m.cli([*flags, "--output_dir", str(path)]) == 0
    return path / "model"


def flags_of(path, **values) -> list[str]:
    small = dict(max_steps=4, eval_n=6, pass_n=2, batch_size=16, minibatch_size=8, group_size=4, eval_every=2)
    values = small | dict(save_every=2, lr=1e-2, warmup=0, init_steps=2, init_lr=1e-3) | values
    return ["--output_dir", str(path), *(word for name, v in values.items() for word in (f"--{name}", str(v)))]


def upo_cli(argv) -> int:
    return m.cli([str(word) for word in argv], upo.main, "upo.py")


METHODS = ["random", "max_confidence", "margin", "entropy", "softmax_confidence", "topk_random", "upo"]


@pytest.fixture(scope="module")
def whole(tiny_base, tmp_path_factory):
    """An uninterrupted run."""
    path = tmp_path_factory.mktemp("whole") / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    assert upo_cli(flags_of(path, model=tiny_base, max_steps=6, topk=4)) == 0
    return path


def test_a_run_leaves_everything_it_is(whole):
    results = json.loads((whole / "results.json").read_text())
    assert list(results["accuracy"]) == METHODS and (results["task"], results["ref"], results["seed"]) == (
        "sudoku",
        "topk",
        0,
    )
    rows = [json.loads(line) for line in (whole / "completions.jsonl").read_text().splitlines()]
    assert len(rows) == 7 * 6
    task = rewards.TASKS["sudoku"]
    problems = task.generate("test", 6, task.test_draw)
    for name, figures in results["accuracy"].items():
        of = [row for row in rows if row["method"] == name]
        scores = torch.tensor([row["score"] for row in of])
        assert figures["mean"] == pytest.approx(scores.mean().item(), abs=1e-6)
        assert figures["stderr"] == pytest.approx(scores.std(correction=0).item() / 6**0.5, abs=1e-6)
        assert figures["nfe"] == pytest.approx(sum(p["question"].count("0") for p in problems) / 6, abs=1e-4)
        for row in of:  # each blank once, in some order; clues are given
            blanks = problems[row["problem"]]["question"].count("0")
            assert sorted(step for step in row["steps"] if step >= 0) == list(range(blanks)) and row["nfe"] == blanks
            assert row["score"] == rewards.sudoku_score(row["completion"], problems[row["problem"]])
    assert results["pass_at_n"].keys() == {"random", "topk_random"}
    assert list(results["pass_at_n"]["random"]) == ["1", "2", "4", "8", "16"]
    values = list(results["pass_at_n"]["random"].values())
    assert values == sorted(values) and results["ceiling"]["bayes"] == 1
    assert results["seconds"].keys() >= {"base", "train", "eval"}
    mine, other = ([r["score"] for r in rows if r["method"] == name] for name in ("upo", "margin"))
    assert results["paired"]["margin"]["difference"] == pytest.approx(
        sum(a - b for a, b in zip(mine, other)) / 6, abs=1e-6
    )
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert all(line["group_reward_std"] >= 0 and 0 < line["entropy"] < math.log(5) + 1e-6 for line in lines)
    assert any(line["grad_norm"] > 0 for line in lines)


@pytest.mark.parametrize("ref, init", [("max_confidence", "pretrained"), ("softmax_confidence", "pretrained"), ("topk", "random"), ("none", "random"), ("max_confidence", "random")])  # fmt: skip
def test_every_reference_trains(ref, init, tiny_base, tmp_path):
    flags = flags_of(
        tmp_path / "run", model=tiny_base, ref=ref, init=init, max_steps=2, mu=2, advantage="mean", pass_n=0
    )
    assert upo_cli(flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["phase"] for line in lines] == ["init"] * (2 if init == "pretrained" else 0) + ["upo"] * 2
    assert all(line["grad_norm"] > 0 for line in lines)


def policy_of(path):
    return load_file(path / "policy" / "model.safetensors")


def same_run(one, two):
    assert (one / "metrics.jsonl").read_text() == (two / "metrics.jsonl").read_text()
    assert (one / "completions.jsonl").read_text() == (two / "completions.jsonl").read_text()
    assert all(torch.equal(v, policy_of(two)[name]) for name, v in policy_of(one).items())


def test_kill_and_resume_to_the_same_numbers(tiny_base, whole, tmp_path, start):
    process = start(*flags_of(tmp_path / "run", model=tiny_base, max_steps=6, topk=4), file="upo.py")
    wait_for(tmp_path / "run" / "metrics.jsonl", process, 3)
    process.kill()  # kill -9
    process.wait()
    assert not (tmp_path / "run" / "results.json").exists()
    assert upo_cli(["--resume", "--output_dir", tmp_path / "run"]) == 0
    same_run(whole, tmp_path / "run")


def test_a_signal_saves_and_leaves(tiny_base, whole, tmp_path, start):
    process = start(*flags_of(tmp_path / "run", model=tiny_base, max_steps=6, topk=4, save_every=0), file="upo.py")
    wait_for(tmp_path / "run" / "metrics.jsonl", process, 1)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM and "--resume" in out, out + err
    assert upo_cli(["--resume", "--output_dir", tmp_path / "run"]) == 0
    same_run(whole, tmp_path / "run")


def test_two_processes_equal_one(tiny_base, tmp_path, script):
    """The same trajectories, losses and gradient norms, and after four steps the same policy."""
    common = dict(model=tiny_base, ref="softmax_confidence", init="pretrained", lr=1e-3)
    flags = flags_of(tmp_path / "two", batch_size=8, minibatch_size=4, **common)
    code, out, err = script(*flags, launch=LAUNCH_2, file="upo.py")
    assert code == 0 and "2 processes" in out, out + err
    assert upo_cli(flags_of(tmp_path / "one", batch_size=16, minibatch_size=8, **common)) == 0
    one, two = ([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()] for name in ("one", "two"))  # fmt: skip
    assert len(one) == len(two) == 6 and any(line["grad_norm"] > 0.01 for line in one)
    for a, b in zip(one, two):
        assert a.keys() == b.keys() and all(a[k] == pytest.approx(b[k], abs=1e-4) for k in a)
    for name, v in policy_of(tmp_path / "one").items():
        w = policy_of(tmp_path / "two")[name]
        # what is added to all keys, or to all scores, changes no softmax: its gradient is 0, and AdamW scales noise up
        if name.endswith("in_proj_bias"):
            v, w = (torch.cat([b[: len(b) // 3], b[-len(b) // 3 :]]) for b in (v, w))
        if name != "mlp.6.bias":
            torch.testing.assert_close(v, w, atol=1e-5, rtol=0)
    assert (tmp_path / "one" / "completions.jsonl").read_text() == (tmp_path / "two" / "completions.jsonl").read_text()
    # --eval_only on two processes, of a policy and its base
    again = ["--eval_only", "--policy", tmp_path / "two", "--eval_n", 6, "--pass_n", 0, "--output_dir", tmp_path / "again"]
    code, out, err = script(*again, launch=LAUNCH_2, file="upo.py")
    assert code == 0, out + err
    figures = [json.loads((tmp_path / name / "results.json").read_text())["accuracy"] for name in ("two", "again")]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("kind", ["llada", "dream"])
@pytest.mark.parametrize("head", ["layer", "block"])
def test_published_formats_on_published_data(kind, head, request, data_file, tmp_path):
    values = dict(task="gsm8k", model=request.getfixturevalue(kind), data=data_file, heads=4, head=head, gen_length=16)
    values |= dict(block_length=8, steps_per_update=4, temperature=0.7, eval_n=3, pass_n=0, max_steps=2, ref="topk")
    flags = flags_of(tmp_path / "run", **values)
    assert upo_cli([*flags, "--bf16", "--offload"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and lines[0]["log_ratio"] < 0.2


def test_offloaded_features_are_the_same(tiny_base, whole, tmp_path):
    flags = flags_of(tmp_path / "run", model=tiny_base, max_steps=2, topk=4, lr_decay=None, pass_n=0)
    flags = [word for word in flags if word not in ("--lr_decay", "None")]
    assert upo_cli([*flags, "--no-lr_decay"]) == 0
    flags[1] = str(tmp_path / "offloaded")
    assert upo_cli([*flags, "--no-lr_decay", "--offload"]) == 0
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == (tmp_path / "offloaded" / "metrics.jsonl").read_text()


def test_gsm8k_on_what_maskgrpo_has_trained(tmp_path, monkeypatch):
    """The two methods compose: the base is a run of maskgrpo.py."""
    monkeypatch.chdir(tmp_path)
    flags = "--task gsm8k --base_steps 30 --base_accuracy 1 --max_steps 1 --eval_n 2 --pass_k 0 --batch_size 8"
    assert m.cli([*flags.split(), "--output_dir", "grpo"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    assert upo_cli(flags_of("upo", task="gsm8k", model="grpo", max_steps=1, pass_n=0)) == 0
    results = json.loads((tmp_path / "upo" / "results.json").read_text())
    assert list(results["accuracy"]) == METHODS and results["config"]["topk"] == 3 and results["ceiling"] == {}
    assert all(0 < figures["nfe"] <= 16 for figures in results["accuracy"].values())


def test_k_above_the_number_of_blanks_is_named(tiny_base, tmp_path, capfd):
    assert upo_cli(flags_of(tmp_path / "run", model=tiny_base, topk=12)) == 2
    assert "--topk 12: at most 11 positions of a sudoku problem are masked" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()  # an earlier run there would have stayed where it was


def test_a_mistyped_base_is_named(tmp_path, capfd):
    assert upo_cli(flags_of(tmp_path / "run", model="runs/nothing")) == 2
    assert "--model runs/nothing: not a directory" in capfd.readouterr().err and not (tmp_path / "run").exists()


def test_generated_problems_for_a_policy_that_was_tested_on_a_file(whole, tmp_path):
    shutil.copytree(whole / "policy", tmp_path / "policy")
    file = tmp_path / "policy" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data": "a.csv", "eval_data": "b.csv"}))
    words = upo.with_policy(["--eval_only", "--policy", str(tmp_path), "--data", "generated"])
    assert "--eval_data" not in words and words[-2:] == ["--data", "generated"]


def test_a_policy_with_a_damaged_file_is_named(whole, tmp_path, capfd):
    shutil.copytree(whole, tmp_path / "copy")
    file = tmp_path / "copy" / "policy" / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"base": str(tmp_path / "gone")}))
    assert upo_cli(["--eval_only", "--policy", tmp_path / "copy", "--output_dir", tmp_path / "a"]) == 2
    file.write_text(json.dumps({name: v for name, v in settings.items() if name != "width"}))
    assert upo_cli(["--eval_only", "--policy", tmp_path / "copy", "--output_dir", tmp_path / "a"]) == 2
    assert upo_cli(["--eval_only", "--policy", whole, "--output_dir", whole]) == 2
    gone, lacks, same = [line for line in capfd.readouterr().err.splitlines() if "upo.py: error" in line]
    assert "is not there any more; give --model" in gone and "lacks ['width']" in lacks
    assert "is the run that is read; name another" in same and (whole / "policy").is_dir()


def csv_file(path, rows=12):
    lines = [f"{p['question']},{p['answer']}" for p in rewards.TASKS["sudoku"].generate("test", rows, 9)]
    path.write_text("\n".join(["Puzzle,Solution", *lines]) + "\n")
    return path


def test_transfer(whole, tmp_path, tiny_base):
    """--eval_only repeats the run's figures, evaluates all of another file, and on another base of the same width."""
    assert (
        upo_cli(["--eval_only", "--policy", whole, "--output_dir", tmp_path / "a", "--eval_n", 6, "--pass_n", 2]) == 0
    )
    again, before = (json.loads((path / "results.json").read_text()) for path in (tmp_path / "a", whole))
    assert again["accuracy"] == before["accuracy"] and again["pass_at_n"] == before["pass_at_n"]
    data = csv_file(tmp_path / "other.csv")
    flags = ["--eval_only", "--policy", whole, "--data", data, "--pass_n", 0]
    assert upo_cli([*flags, "--output_dir", tmp_path / "b"]) == 0
    other = json.loads((tmp_path / "b" / "results.json").read_text())
    assert other["n"] == 12 and list(other["accuracy"]) == METHODS
    shutil.copytree(tiny_base, tmp_path / "base")  # the other base: a changed copy
    weights = load_file(tmp_path / "base" / "model.safetensors")
    weights["lm_head.weight"] = weights["lm_head.weight"].roll(1, 0)
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    assert upo_cli([*flags, "--model", tmp_path / "base", "--output_dir", tmp_path / "c"]) == 0
    third = json.loads((tmp_path / "c" / "results.json").read_text())
    assert third["accuracy"]["max_confidence"] != other["accuracy"]["max_confidence"]
    assert third["base"] == str(tmp_path / "base") and third["config"]["topk"] == 4  # K belongs to the policy


BAD = {
    "unknown reference": (["--ref", "best"], "argument --ref: invalid choice: 'best'"),
    "K too large": (["--topk", "17"], "--topk 17: at most 16 positions are masked at once"),
    "not a multiple": (["--batch_size", "12"], "--batch_size 12 is not a multiple of --group_size 8"),
    "minibatch": (["--minibatch_size", "7"], "--batch_size 256 is not a multiple of --minibatch_size 7"),
    "no policy": (["--eval_only"], "--eval_only needs --policy"),
    "policy is no run": (["--eval_only", "--policy", "nowhere"], "--policy nowhere: no trained policy there"),
    "none has no reference": (["--ref", "none", "--init", "pretrained"], "--ref none has no reference"),
    "none has no KL": (["--ref", "none", "--beta", "0.1"], "--ref none has no reference"),
    "generated has its own": (["--eval_data", "x.csv"], "--eval_data needs published problems"),
    "policy without a value": (["--policy"], "argument --policy: expected one argument"),
    "temperature": (["--position_temperature", "0"], "--position_temperature 0.0 is outside (0, 10]"),
}


@pytest.mark.parametrize("case", BAD)
def test_usage_errors_are_one_line_and_exit_2(case, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, message = BAD[case]
    assert upo_cli(["--task", "sudoku", *flags]) == 2
    err = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(err) == 1 and err[0].startswith("upo.py: error: ") and message in err[0]
    assert not list(tmp_path.iterdir())  # nothing was begun


def test_a_policy_of_another_width_is_named(whole, llada, capfd, tmp_path):
    flags = ["--eval_only", "--policy", whole, "--model", llada, "--no-bf16", "--output_dir", tmp_path / "run"]
    data = csv_file(tmp_path / "a.csv")
    width = json.loads((whole / "policy" / "config.json").read_text())["width"]
    assert upo_cli([*flags, "--data", data]) == 2
    assert f"made for bases of width {width}, this one has 32" in capfd.readouterr().err


LINES = {
    "a letter": ("12x4000000000000,1234341221434321", "line 3: puzzle '12x4000000000000' is not 16 digits 0 to 4"),
    "too short": ("0,12", "line 3: solution '12' is not 16 digits 1 to 4"),
    "a field missing": ("1234341221434320", "line 3: 1 fields where the header has 2"),
    "no solution": ("1100000000000000,1234341221434321", "line 3: puzzle 1100000000000000 has no solution"),
    "wrong solution": ("2000000000000000,1234341221434321", "does not solve puzzle 2000000000000000"),
    "nothing to do": ("1234341221434321,1234341221434321", "line 3: puzzle 1234341221434321 has no empty cell"),
}


@pytest.mark.parametrize("case", LINES)
def test_malformed_puzzles_name_their_line(case, tiny_base, tmp_path, capfd):
    line, message = LINES[case]
    file = csv_file(tmp_path / "bad.csv", 1)
    file.write_text(file.read_text() + line + "\n")
    assert upo_cli(["--task", "sudoku", "--model", tiny_base, "--data", file, "--output_dir", tmp_path / "run"]) == 2
    err = capfd.readouterr().err
    assert f"{file}, line 3: " in err and message in err


def test_the_picture_shows_steps_and_mistakes():
    cells = [[upo.Cell("1", -1, True), upo.Cell("2", 0, True)], [upo.Cell("3", 11, False)]]
    assert upo.in_terminal(cells, colour=False) == ["1     2:1  ", "3:12x      "]
    coloured = upo.in_terminal(cells, colour=True)
    assert "\x1b[48;5;17;38;5;231m2:1\x1b[0m" in coloured[0] and "\x1b[48;5;220" in coloured[1]


def test_the_picture_keeps_rows_whatever_the_tokens(bpe):
    """A tokenizer with spaces of their own, as the sudoku's lines have them; an end; nothing at all."""
    ids = bpe("1 2\n3 4", add_special_tokens=False)["input_ids"]
    base = SimpleNamespace(model=SimpleNamespace(tokenizer=bpe, eos_ids=[bpe.eos_token_id]))
    task = SimpleNamespace(target=lambda problem: "1 2\n3 1", blanks=True)
    row = {"tokens": [*ids, bpe.eos_token_id, 9], "steps": list(range(len(ids) + 2))}
    lines = upo.cells_of(SimpleNamespace(task=task), base, row, None)
    assert [[cell.text for cell in line] for line in lines] == [["1", "2"], ["3", "4"]]
    assert [cell.right for line in lines for cell in line] == [True, True, True, False]
    row = {"tokens": [bpe.eos_token_id], "steps": [0]}
    assert upo.cells_of(SimpleNamespace(task=task), base, row, None) == [] == upo.in_terminal([], colour=False)


def test_the_picture_is_drawn_from_the_run(whole, tmp_path):
    pytest.importorskip("matplotlib")
    cells = [[upo.Cell("$1", -1, None), upo.Cell("word", 0, None)] * 8, [upo.Cell("3", 11, False)]]
    upo.draw_orders(tmp_path / "order.png", {"upo": cells, "margin": cells})
    upo.draw_orders(tmp_path / "empty.png", {"upo": []})
    assert (tmp_path / "order.png").stat().st_size > 5000 and (whole / "order.png").is_file()


@pytest.mark.parametrize("task", list(rewards.TASKS))
def test_every_task_runs_end_to_end(task, tmp_path, monkeypatch):
    """Two steps of maskgrpo.py on the tiny base; then, on what it leaves, two of upo.py where the paper has the task."""
    few = {"train": 300, "validation": 16, "test": 6, "unseen": 6}
    monkeypatch.setattr(
        rewards, "generated_splits", lambda row, n, seed: {s: row.generate(s, few[s], seed) for s in few}
    )
    monkeypatch.setattr(rewards, "code_execution_allowed", False)
    monkeypatch.chdir(tmp_path)
    small = "--base_steps 20 --base_accuracy 1 --max_steps 2 --mu 1 --batch_size 8 --group_size 4 --eval_n 6 --pass_k 0"
    flags = f"--task {task} {small} --eval_every 0 --sft_batch_size 16 --output_dir grpo".split()
    if rewards.TASKS[task].runs_code:
        assert m.cli(flags) == 2
        flags.append("--allow_code_execution")
    assert m.cli(flags) == 0
    lines = [json.loads(line) for line in (tmp_path / "grpo" / "metrics.jsonl").read_text().splitlines()]
    terms = rewards.TASKS[task].reward("", rewards.TASKS[task].generate("test", 1, 0)[0])
    assert len(lines) == 2 and all({f"reward/{term}" for term in terms} <= line.keys() for line in lines)
    if task in ("sudoku", "zebra", "gsm8k", "math500"):
        AcceleratorState._reset_state(reset_partial_state=True)
        flags = flags_of("upo", task=task, model="grpo", max_steps=2, pass_n=0, eval_every=0)
        assert upo_cli(flags) == 0
        results = json.loads((tmp_path / "upo" / "results.json").read_text())
        assert results["task"] == task and list(results["accuracy"]) == METHODS
