"""upo.py against enumeration on a tabular masked diffusion model, and end to end on tiny bases."""

import dataclasses
import itertools
import math
import signal
from collections import Counter, defaultdict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from runs import dies, ended, forked, forked_pair, lines_of, one_error, results_of, same_metrics, spied
from safetensors.torch import load_file
from slow import SCORE, advantage_by_hand, plain, slow_policy, slow_trajectory, upo_step_by_hand
from torch import nn

import maskgrpo as m
import rewards
import upo
from remask import shuffled

# --- A tabular masked diffusion model: n = 3 tokens, 2 words (0, 1), mask 2; random tables from a seed ----------------

N, V, MASK = 3, 2, 2
STATES = list(itertools.product(range(V + 1), repeat=N))
INDEX = {state: i for i, state in enumerate(STATES)}
MASKED = torch.tensor([[token == MASK for token in state] for state in STATES])  # (27, 3)
START = (MASK,) * N
seed_of = lambda seed: torch.Generator().manual_seed(seed)
index_of = lambda x: (x * (V + 1) ** torch.arange(N - 1, -1, -1)).sum(1)  # of each row of x (B, 3) in STATES
log_policy = lambda theta, open=MASKED: theta.masked_fill(~open, -torch.inf).log_softmax(1)  # log g (27, 3)
random_theta = lambda seed: torch.randn(len(STATES), N, generator=seed_of(seed))
OUTPUTS = list(itertools.product(range(V), repeat=N))
random_values = lambda seed: dict(zip(OUTPUTS, torch.randn(V**N, generator=seed_of(seed)).tolist()))
gradient = lambda value, theta: torch.autograd.grad(value, theta, retain_graph=True)[0]
# with an EOS, which is word 1: what lies behind it is not decoded
masks_of = lambda state, eos=False: [a for a in range(N) if state[a] == MASK and not (eos and 1 in state[:a])]
OPEN = torch.tensor([[a in masks_of(state, True) for a in range(N)] for state in STATES])
policy_of = lambda path: load_file(path / "policy" / "model.safetensors")
parse = lambda *flags: m.parse([*flags], upo.Config, upo.__doc__, upo.tables)
TABULAR = dataclasses.replace(parse(), temperature=1.0, block_length=N, gen_length=N, ref="none")


class Tabular:
    """A frozen base with its own random logits in every state, and its `read`."""

    def __init__(self, seed: int):
        self.logits = 1.5 * torch.randn(len(STATES), N, V, generator=seed_of(seed))
        self.model = SimpleNamespace(pad_id=0)

    def read(self, x, attention, positions):
        hidden = nn.functional.one_hot(index_of(x), len(STATES))[:, None].expand(-1, N, -1).float()
        return hidden, self.logits[index_of(x)][positions]

    def after(self, state: tuple, *positions: int):
        """(probability, next state) of all tokens at these positions, drawn from what the base says of one state."""
        p = self.logits[INDEX[state]].softmax(1).tolist()
        for words in itertools.product(range(V), repeat=len(positions)):
            new = dict(enumerate(state)) | dict(zip(positions, words))
            yield math.prod(p[a][v] for a, v in zip(positions, words)), tuple(new[i] for i in range(N))


def picks_of(state: tuple, eos: bool, k: int):
    """Every k positions, in every order, that a step may reveal; all of them where fewer are masked."""
    open = masks_of(state, eos)
    return itertools.permutations(open, min(k, len(open)))


def every_trajectory(base: Tabular, eos=False, k=1):
    """All (states, what is open before each action (S, 3) bool, actions, x0, probability of its tokens)."""
    found, ended = [([], [], [], START, 1.0)], []
    while found:
        ended += [one for one in found if not masks_of(one[3], eos)]
        going, found = [one for one in found if masks_of(one[3], eos)], []
        for states, opens, actions, x, p in going:
            for picks in picks_of(x, eos, k):
                left = [[a in masks_of(x, eos) and a not in picks[:i] for a in range(N)] for i in range(len(picks))]
                entries = [*states, *[INDEX[x]] * len(picks)], opens + left, [*actions, *picks]
                found += [(*entries, new, p * q) for q, new in base.after(x, *picks)]
    return [(torch.tensor(s), torch.tensor(open), torch.tensor(a), x0, p) for s, open, a, x0, p in ended]


def log_chance(log_g, at, open, actions):
    """Log of the probability of a trajectory's actions, each among what is open before it."""
    return log_policy(log_g[at], open).gather(1, actions[:, None]).sum()


def outputs(base: Tabular, log_g: torch.Tensor, eos=False, k=1) -> dict[tuple, torch.Tensor]:
    """p_g(x0), the sum over all orders."""
    found = defaultdict(lambda: torch.zeros(()))
    for *taken, x0, p in every_trajectory(base, eos, k):
        found[x0] = found[x0] + p * log_chance(log_g, *taken).exp()
    return found


def expected_loss(theta, base, log_old, log_ref, value: dict, *, weight=(1.0,) * N, eos=False, k=1, **options):
    """E over trajectories of g_old of upo_loss: every trajectory is a batch of one, weighted by its probability."""
    total = 0.0
    for states, open, actions, x0, p in every_trajectory(base, eos, k):
        log_g, *fixed = (log_policy(of[states], open) for of in (theta, log_old.detach(), log_ref.detach()))
        old, ref = (of.gather(1, actions[:, None])[:, 0] for of in fixed)
        steps = dict(row=torch.zeros_like(actions), at=torch.arange(len(actions)), action=actions, log_old=old)
        steps |= dict(weight=torch.tensor(weight[: len(actions)]), log_ref=fixed[1])
        e = upo.Trajectories(None, None, torch.tensor([len(actions)]), (old - ref).sum()[None], **steps)
        total = total + p * old.sum().exp() * upo.upo_loss(log_g, e, torch.tensor([value[x0]]), **options)[0]
    return total


# --- The MDP, and the objective: Proposition 1, the KL, clipping ------------------------------------------------------


@pytest.mark.parametrize("k, steps, states", [(1, 3, 27 - 8), (2, 2, 1 + 3 + 12), (3, 1, 1 + 3 + 6)])
def test_the_rollout_draws_from_p_g(k, steps, states):
    """A chi-square test of 20,000 rollouts against the enumeration, of what is drawn and of the orders it is drawn in;
    false alarm once in 1,000 (7 degrees of freedom: 24.3, 5: 20.5)."""
    base, log_g, rows = Tabular(5), log_policy(random_theta(5)), 20_000
    order = upo.Order(lambda state, logits: log_g[state.hidden[:, 0].argmax(1)], sampled=True)
    batch = m.Batch(torch.full((rows, N), MASK), *torch.ones(2, rows, N, dtype=torch.bool))
    cfg = dataclasses.replace(TABULAR, positions_per_step=k)
    e = upo.unmask(base, batch, [order] * rows, cfg, [(11, r) for r in range(rows)], [], keep=True)
    exact, by_row = outputs(base, log_g, k=k), e.row.sort(stable=True).indices.view(rows, N)
    assert sum(exact.values()).item() == pytest.approx(1, abs=1e-6)
    counts = Counter(map(tuple, e.x.tolist()))
    assert sum((counts[x0] - rows * p.item()) ** 2 / (rows * p.item()) for x0, p in exact.items()) < 24.3
    # each state once with what is left in it, however many rows were in it
    assert e.length.eq(steps).all() and len(e.state.hidden) == states
    # what each row has drawn, in its order, with the probability of that order
    chance = defaultdict(float)
    for *taken, _, p in every_trajectory(base, k=k):
        chance[tuple(taken[2].tolist())] += p * log_chance(log_g, *taken).exp().item()
    drawn = Counter(map(tuple, e.action[by_row].tolist()))
    assert sum(chance.values()) == pytest.approx(1, abs=1e-6) and len(chance) == 6
    assert sum((drawn[a] - rows * p) ** 2 / (rows * p) for a, p in chance.items()) < 20.5
    at = e.state.hidden[e.at, 0].argmax(1)
    exact_log = log_policy(log_g[at], e.state.allowed[e.at]).gather(1, e.action[:, None])[:, 0]
    torch.testing.assert_close(e.log_old, exact_log, atol=1e-5, rtol=0)
    assert e.state.allowed[e.at, e.action].all() and e.action[by_row].sort(1).values.eq(torch.arange(N)).all()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("eos", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_proposition_1(seed, eos, k):
    """At g = g_old the token-level gradient is the output-level one, exactly, also where an EOS makes L depend on the
    policy, and with two positions per step. Away from g_old they part."""
    base, theta, open = Tabular(seed), random_theta(seed), OPEN if eos else MASKED
    ended = outputs(base, log_policy(theta, open), eos, k)
    cosines, value = {}, dict(zip(ended, torch.randn(len(ended), generator=seed_of(seed)).tolist()))
    for distance in (0.0, 0.1, 1.0):
        old = log_policy(theta + distance * random_theta(100 + seed), open).detach()
        moving = theta.clone().requires_grad_()
        loss = expected_loss(moving, base, old, old, value, ref="none", clip=0.999, beta=0.0, eos=eos, k=k)
        # E_{x0 ~ p_old}[p_g(x0) / p_old(x0) A(x0)] = sum over x0 of p_g(x0) A(x0)
        of_g = outputs(base, log_policy(moving, open), eos, k)
        token, output = gradient(-loss, moving), gradient(sum(p * value[x0] for x0, p in of_g.items()), moving)
        if distance == 0:
            assert torch.allclose(token, output, atol=1e-6)
        cosines[distance] = torch.cosine_similarity(token.flatten(), output.flatten(), dim=0).item()
    assert cosines[0.0] == pytest.approx(1, abs=1e-6) and 1 > cosines[0.1] > 0.97 and cosines[1.0] < cosines[0.1]


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_the_kl_gradient_is_exact_for_trajectories(seed, k):
    base, ref = Tabular(seed), log_policy(random_theta(50 + seed))
    theta, kl = random_theta(seed).requires_grad_(), 0.0
    for *taken, _, p in every_trajectory(base, k=k):  # KL(g || g_ref) over trajectories, by enumeration
        log_g, log_ref = (log_chance(v, *taken) for v in (theta, ref))
        kl = kl + p * log_g.exp() * (log_g - log_ref)
    exact = gradient(kl, theta)
    # at g = g_old, and where no weight g / g_old is clipped, the mean of the estimate is the gradient
    for distance in (0.0, 0.05):
        old = log_policy(theta.detach() + distance * random_theta(200 + seed))
        loss = expected_loss(theta, base, old, ref, dict.fromkeys(OUTPUTS, 0.0), ref="topk", clip=0.2, beta=0.5, k=k)
        assert torch.allclose(gradient(loss, theta), 0.5 * exact, atol=2e-6)


def test_cross_entropy_is_the_divergence_of_max_confidence():
    base, theta, value = Tabular(1), random_theta(1).requires_grad_(), dict.fromkeys(OUTPUTS, 0.0)
    old = log_policy(theta.detach())
    ref = upo.max_confidence(base.logits.softmax(2).amax(2), MASKED)
    loss = expected_loss(theta, base, old, ref, value, ref="max_confidence", clip=0.2, beta=0.3)
    by_hand = 0.0
    for states, _, actions, _, p in every_trajectory(base):
        weight = p * old[states, actions].sum().exp()
        by_hand = by_hand + weight * sum(-log_policy(theta)[s, ref[s].argmax()] for s in states)
    assert loss.item() == pytest.approx(0.3 * by_hand.item(), rel=1e-5)
    assert torch.allclose(gradient(loss, theta), 0.3 * gradient(by_hand, theta), atol=1e-6)


def test_steps_left_out_change_no_expectation():
    """Every draw of step_weights is enumerated: the first step, and one of the two others; at g = g_old."""
    base, theta, value = Tabular(2), random_theta(2).requires_grad_(), random_values(2)
    old, ref = log_policy(theta.detach()), log_policy(random_theta(52))
    cfg = dataclasses.replace(TABULAR, steps_per_update=2)
    draws = {tuple(upo.step_weights(cfg, [3], [(0, k)])[0].tolist()) for k in range(40)}
    assert draws == {(1, 2, 0), (1, 0, 2)}
    for beta in (0.0, 0.5):
        settings = dict(ref="topk", clip=0.2, beta=beta)
        go = lambda **of: gradient(expected_loss(theta, base, old, ref, value, **settings, **of), theta)  # noqa: B023
        one, other = (go(weight=draw) for draw in draws)
        assert torch.allclose((one + other) / 2, go(), atol=1e-6) and not torch.allclose(one, other, atol=1e-4)
    two = dataclasses.replace(cfg, positions_per_step=2, steps_per_update=5)
    assert upo.step_weights(two, [7], [(0, 0)]).tolist() == [[1] * 5]  # blocks of 3, 3 and 1: no step is left out
    shares = upo.step_weights(cfg, [3] * 4000, [(0, k) for k in range(4000)]).mean(0)
    assert (shares - 1).abs().max() < 0.08  # the mean weight is 1: five standard errors of 4,000 draws


# --- Theorems 1 and 2, for the KL over trajectories, which is what is trained -----------------------------------------


def soft_optimum(base: Tabular, log_ref: torch.Tensor, value: dict, beta: float) -> torch.Tensor:
    """log g of the maximiser of E[value(x0)] - beta KL(g || g_ref), by backward induction: V(x_n) = beta log sum_a
    g_ref(a) exp(Q(x_n, a) / beta), Q = E V(x_{n-1}), g(a) = g_ref(a) exp((Q(a) - V) / beta)."""
    worth, log_g = dict(value), torch.full((len(STATES), N), -torch.inf)
    for state in sorted(STATES, key=lambda s: s.count(MASK)):
        if MASK in state:
            q = torch.full((N,), -torch.inf)
            for a in masks_of(state):
                q[a] = sum(p * worth[new] for p, new in base.after(state, a))
            scores = log_ref[INDEX[state]] + q / beta
            worth[state] = beta * scores.logsumexp(0).item()
            log_g[INDEX[state]] = scores.log_softmax(0)
    return log_g


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["softmax_confidence", "topk"])
def test_theorems_1_and_2(kind, seed):
    """g_0 = g_ref, g_1, ...: each the optimum for the standardised advantages of the one before, as GRPO has them, held
    to g_ref. Theorem 1: the reward settles above the reference's. Theorem 2, which the paper has for the KL over
    outputs: under the KL over trajectories nothing guarantees it, but in each of these cases the fixed point's
    distribution is nearer to p_data than the reference's."""
    base, right = Tabular(seed), {(0, 1, 0), (1, 1, 0), (1, 0, 1)}
    confidence, cfg = base.logits.softmax(2).amax(2), dataclasses.replace(TABULAR, ref=kind, topk=2, tau=0.3)
    allowed = upo.most_confident_k(confidence, MASKED, cfg.topk) if kind == "topk" else MASKED
    log_g = ref = upo.log_reference(cfg, confidence, allowed)
    mean = lambda log_g: sum(p.item() for x0, p in outputs(base, log_g).items() if x0 in right)
    reached = [mean(ref)]
    for _ in range(60):
        std = math.sqrt(reached[-1] * (1 - reached[-1]))
        log_g = soft_optimum(base, ref, {x0: ((x0 in right) - reached[-1]) / std for x0 in OUTPUTS}, beta=0.5)
        reached.append(mean(log_g))
    assert reached[-1] == pytest.approx(reached[-2], abs=1e-7)  # a fixed point
    assert reached[-1] > reached[0] + 0.005  # strictly above the reference: these cases have headroom
    p_ref, p_star = outputs(base, ref), outputs(base, log_g)
    # p_data: the reference's own outputs given that they are right, as in the paper's theorem
    data = {x0: p_ref[x0] / sum(p_ref[x0] for x0 in right) for x0 in right}
    distance = lambda p: sum(data[x0] * (data[x0] / p[x0]).log() for x0 in right).item()
    assert distance(p_star) < distance(p_ref)


# --- References and rules, by hand ------------------------------------------------------------------------------------


def test_references_by_hand_ties_included():
    confidence = torch.tensor([[0.9, 0.5, 0.7, 0.2], [0.6, 0.6, 0.3, 0.6], [0.1, 0.2, 0.3, 0.4]])
    candidates = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 0], [0, 0, 1, 0]]).bool()
    close = lambda log_p, expected: torch.allclose(log_p.exp(), torch.tensor(expected), atol=1e-6)
    assert close(upo.max_confidence(confidence, candidates), [[0, 0, 1, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0]])
    e = (confidence / 0.1).exp() * candidates
    assert close(upo.softmax_confidence(confidence, candidates, 0.1), (e / e.sum(1, keepdim=True)).tolist())
    # K = 2: of the ties the leftmost; where fewer are left, all of them
    best = upo.most_confident_k(confidence, candidates, 2)
    assert best.long().tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 0]]
    assert close(upo.uniform(best), [[0, 0.5, 0.5, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0]])


def test_the_table_has_each_order_as_it_is_and_the_policy_s_best_position(monkeypatch):
    """What evaluate is asked for; scores of three candidates in one row, by hand."""
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.46, 0.18, 0.18, 0.18], [0.4, 0.3, 0.3, 0.0]])
    candidates, there = torch.tensor([[True, False, True, True]]), [0, 2, 3]
    state = SimpleNamespace(candidates=candidates, top=torch.tensor([[[0.5], [0.9], [0.46], [0.4]]]))
    # tokens 1 and 2 are two spellings of one digit: together they are surer than token 0
    model = SimpleNamespace(tokenizer=SimpleNamespace(decode=lambda ids: "7\uff11\U0001d7cf2"[ids[0]]))
    model.hf = SimpleNamespace(config=SimpleNamespace(vocab_size=4))
    looks, values = [], dict(topk=2, position_temperature=0.7, tau=0.1, corpus="spelled")
    monkeypatch.setattr(upo, "evaluate", lambda run, base, *asked: looks.append(asked) or [{"method": "upo"}])
    run = SimpleNamespace(cfg=dataclasses.replace(TABULAR, **values))
    rows, ((orders, problems),) = upo.measure(run, SimpleNamespace(model=model), lambda *g: g[-1], [5, 6, 7]), looks
    assert [*rows] == [*orders] == [*upo.ORDERS, "answer_confidence", "upo"] and problems == [5, 6, 7]
    assert rows["upo"] == [{"method": "upo"}] and orders["upo"].scores((1, 2), None) == 0.7
    sampled = [name for name, order in orders.items() if order.sampled]
    assert sampled == ["random", "softmax_confidence", "topk_random"]
    assert [name for name, order in orders.items() if order.threshold is not None] == ["threshold"]
    surest, sums = torch.tensor([0.5, 0.46, 0.4]), torch.distributions.Categorical(p).entropy()
    expected = {"random": [0, 0, 0], "max_confidence": surest.log(), "margin": [0, 0.28, 0.1], "entropy": -sums}
    expected |= {"softmax_confidence": surest * 10, "topk_random": [0, 0, -torch.inf], "threshold": surest.log()}
    for name, by_hand in (expected | {"answer_confidence": [0.5, 0.46, 0.6]}).items():
        got = orders[name].scores(state, p.log() + 3)
        torch.testing.assert_close(got[0, there], torch.as_tensor(by_hand).float(), atol=1e-5, rtol=0, msg=name)
        assert got[0, 1] == -torch.inf


# --- The head, on bases in the official formats -----------------------------------------------------------------------


def test_the_head_has_the_papers_size():
    with torch.device("meta"):
        policy = upo.UnmaskingPolicy(4096, heads=32)
    layer, mlp = (sum(p.numel() for p in part.parameters()) for part in (policy.layer, policy.mlp))
    assert (layer, mlp) == (83_924_992, 50_544_865)


frozen = lambda path: upo.FrozenBase(m.load_model(str(path), m.parse(["--bf16", "false"]), trainable=False))


def config_for(**values) -> upo.Config:
    small = dict(heads=4, gen_length=8, block_length=4, topk=3, bf16=False, steps_per_update=0) | values
    return dataclasses.replace(parse("--model", "x"), **small)


IDS = torch.tensor([[9, 40, 77, 100, 31, 55, 12, 80, 64]])


def test_rows_in_the_same_state_share_it_only_with_the_same_candidates(llada):
    """Two rows that have come to the same x with different blocks: each acts as it does alone."""
    base, cfg, x = frozen(llada), config_for(block_length=2), IDS.repeat(2, 1)
    completion = torch.zeros(2, 9, dtype=torch.bool)
    completion[0, 3:8], completion[1, 5:8] = True, True  # blocks {3, 4}, {5, 6}, {7} and {5, 6}, {7}
    x[0, 3:5], x[:, 5:8] = base.model.mask_id, base.model.mask_id
    scores = lambda state, logits: upo.place(torch.arange(int(state.candidates.sum())), state.candidates)
    batch = lambda rows: m.Batch(x[rows], x[rows] >= 0, completion[rows])
    order = upo.Order(scores, sampled=False)
    go = lambda rows: upo.unmask(base, batch(rows), [order] * len(rows), cfg, [(0, i) for i in rows], [])
    together = go([0, 1])
    assert together.unmask_step[:, 3:8].tolist() == [[1, 0, 3, 2, 4], [-1, -1, 1, 0, 2]]
    assert all(torch.equal(go([i]).x[0], together.x[i]) for i in range(2))
    # all that score above a threshold, at least one, and never beyond the block
    order, cfg = upo.Order(scores, sampled=False, threshold=0.5), config_for(block_length=4)
    assert [go([i]).unmask_step[0, 3:8].tolist() for i in range(2)] == [[1, 0, 0, 0, 2], [-1, -1, 1, 0, 0]]
    order = upo.Order(scores, sampled=False, threshold=9.0)
    assert [go([i]).unmask_step[0, 3:8].tolist() for i in range(2)] == [[3, 2, 1, 0, 4], [-1, -1, 2, 1, 0]]


@pytest.mark.parametrize("k, size", [(1, 1000), (2, 7)])
def test_orders_that_share_states_complete_as_each_does_alone(llada, k, size):
    """With an EOS, tokens drawn, a threshold and batches that part a problem; in none is a state computed twice. Each
    of the samples for pass@N has noise of its own."""
    values = dict(task="gsm8k", positions_per_step=k, eval_batch_size=size, temperature=0.7, threshold=0.5, pass_n=1)
    base, cfg, computed = frozen(llada), config_for(ref="topk", **values), []
    base.model.eos_ids, read = [*base.model.eos_ids, *range(40, 500, 9)], base.read
    base.read = lambda *asked: computed.append(torch.cat(asked, dim=1).tolist()) or read(*asked)
    run, problems = m.Run(cfg, Accelerator()), rewards.TASKS["gsm8k"].generate("train", 3, 0)
    orders = {name: upo.rule(name, cfg) for name in upo.ORDERS}
    orders["upo"] = upo.learned(upo.new_policy(cfg, base, "cpu"), cfg, sampled=False)
    together, shared = upo.evaluate(run, base, orders, problems), sum(map(len, computed))
    assert all(len(set(map(tuple, states))) == len(states) for states in computed)
    alone = {name: upo.evaluate(run, base, {name: order}, problems) for name, order in orders.items()}
    assert together == [row for name in sorted(alone) for row in alone[name]]
    assert shared < 0.85 * (sum(map(len, computed)) - shared)
    samples, alike = alone["random"][:16], lambda rows, name: len({tuple(row[name]) for row in rows})
    assert [(row["problem"], row["sample"]) for row in samples] == [(0, s) for s in range(16)]
    assert alike(samples, "tokens") == 16 and alike(samples, "steps") > 10 and len({row["nfe"] for row in together}) > 2


SMALL = dict(batch_size=8, minibatch_size=4, group_size=2, mu=2, warmup=6, max_grad_norm=0.02, max_steps=5)
SMALL |= dict(gen_length=8, init_lr=1.0, lr=0.9, position_temperature=0.7, temperature=0.6, accumulation=1)
STEPS = {  # each argument of a step has several values
    "topk": dict(kind="llada", lr_decay=True, beta=0.3, clip=0.02, advantage="std", positions_per_step=2)
    | dict(nfe_weight=0.1),
    "softmax_confidence": dict(kind="dream", steps_per_update=3, beta=0.4, clip=0.002, advantage="mean", temperature=0)
    | dict(accumulation=0, positions_per_step=2),
    "max_confidence": dict(kind="llada", beta=0.6, positions_per_step=3, clip=0.05, position_temperature=1.3, warmup=0)
    | dict(temperature=1.2),
}


@pytest.mark.parametrize("ref", STEPS)
def test_pretraining_and_two_steps_equal_a_loop_by_hand(ref, request, monkeypatch):
    """Rollouts position by position, weights and metrics; with SGD, as AdamW hides a scale."""
    values = SMALL | STEPS[ref]
    base, cfg = frozen(request.getfixturevalue(kind := values.pop("kind"))), config_for(ref=ref, task="gsm8k", **values)
    run, twin, calls, sample = m.Run(cfg, Accelerator()), plain(base.model), [], upo.sample_groups
    problems, texts = rewards.TASKS["gsm8k"].generate("train", 20, 0), []
    base.model.eos_ids = [*base.model.eos_ids, *range(40, 500, 9)]  # so that some completions end early
    judge = lambda task, got, asked: texts.append(got) or [(SCORE(text), 0.0) for text in got]
    monkeypatch.setattr(upo, "judge_all", judge)
    monkeypatch.setattr(upo, "sample_groups", lambda *args: calls.append(sample(*args)) or calls[-1])
    g, by_hand = (upo.new_policy(cfg, base, "cpu") for _ in range(2))
    run.accelerator.gradient_accumulation_steps = cfg.shape()[1]
    for p in (*g.mlp.parameters(), *by_hand.mlp.parameters()):
        p.data *= 3  # far from uniform
    optimizer, mask_id, ended, signs = torch.optim.SGD(g.parameters(), lr=9.0), base.model.mask_id, set(), set()
    like_g = lambda state, log_ref: slow_policy(by_hand, state, cfg.position_temperature)

    @torch.no_grad()
    def read(x):
        out, shift = twin(input_ids=torch.tensor([x]), output_hidden_states=True), int(kind == "dream")
        hidden, logits = (v[0].roll(shift, 0) for v in (out.hidden_states[-2], out.logits))  # Dream: i at i - 1
        hidden[:shift], logits[:, mask_id] = 0, -torch.inf
        return hidden, logits

    for step, init in ((1, True), (0, False), (1, False)):
        got, rows = (upo.init_step if init else upo.train_step)(run, base, g, optimizer, problems, step), []
        e, use = calls[-1][0], upo.PRETRAIN if init else upo.ROLLOUT
        asked = shuffled(20, 4, 4 * step, cfg.seed, upo.DATA, use)
        for i in range(8):
            prompt, key = base.model.prompt_ids(run.task, problems[asked[i // 2]]), (cfg.seed, use, step, i // 2, i % 2)
            choose, weights = (lambda state, log_ref: log_ref) if init else like_g, upo.step_weights(cfg, [8], [key])[0]
            row = slow_trajectory(cfg, read, choose, prompt + [mask_id] * 8, base.model.eos_ids, mask_id, key, weights)
            assert e.unmask_step[i, -8:].tolist() == row[1][-8:] and e.length[i] == row[3]
            assert all(x == y for x, y, when in zip(e.x[i, -8:].tolist(), row[0][-8:], row[1][-8:]) if when >= 0)
            rows.append(row[2:])
        r = [sum(SCORE(text).values()) - cfg.nfe_weight * n for text, (_, n) in zip(texts[-1], rows)]
        a = [advantage_by_hand(r, i, cfg) for i in range(8)]
        updates = 4 if cfg.accumulation else 2
        warm = lambda i: min(1, (step * updates + i + 1) / max(cfg.warmup, 1))  # noqa: B023
        lr = lambda i: cfg.init_lr if init else cfg.lr * warm(i) * (1 - cfg.lr_decay * step / 5)  # noqa: B023
        names = "loss cross_entropy clipped log_ratio grad_norm reward group_reward_std entropy kl".split()
        expected = upo_step_by_hand(cfg, by_hand, rows, a, lr, init)
        apart = [abs(r[i] - r[i + 1]) / 2**0.5 for i in range(0, 8, 2)]
        entropy = [sum(torch.special.entr(log_g.exp()).sum() for _, log_g, *_ in row) / n for row, n in rows]
        kl = [sum(log_g[n] - log_ref[n] for _, log_g, log_ref, n, _ in row) for row, _ in rows]
        expected += [sum(r) / 8, sum(apart) / 4, sum(entropy).item() / 8, sum(kl).item() / 8]
        assert all(got[name] == pytest.approx(v, rel=1e-4, abs=1e-5) for name, v in zip(names, expected) if name in got)
        assert got["grad_norm"] > 2 * cfg.max_grad_norm and (init or got["clipped"] > 0)
        ended, signs = ended | {len(row) < 8 for row, _ in rows}, signs | {v > 0 for v in a}
        for one, two in zip(g.parameters(), by_hand.parameters()):
            torch.testing.assert_close(one, two, atol=2e-6, rtol=1e-4)
    assert ended == signs == {True, False}


# --- End to end: the command line, resuming, two processes, transfer, bad input ---------------------------------------


def upo_cli(argv) -> int:
    AcceleratorState._reset_state(reset_partial_state=True)  # keeps its precision for the life of a process
    return m.cli([str(word) for word in argv], upo.main, "upo.py")


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory):
    """A file of 60, of which a run tests on 6."""
    lines = [f"{p['question']},{p['answer']}" for p in rewards.TASKS["sudoku"].generate("test", 60, 9)]
    path = tmp_path_factory.mktemp("puzzles") / "a.csv"
    path.write_text("\n".join(["Puzzle,Solution", *lines]) + "\n")
    return path


@pytest.fixture(scope="module")
def tiny_base(puzzles, tmp_path_factory):
    """A sudoku base after 40 steps of ELBO training, by maskgrpo.py."""
    path = tmp_path_factory.mktemp("base") / "run"
    flags = "--task sudoku --base_steps 40 --base_accuracy 1 --max_steps 0 --eval_n 2 --pass_k 0".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path.parent)
        assert m.cli([*flags, "--data", str(puzzles), "--output_dir", str(path)]) == 0
    return path / "model"


def flags_of(path, **values) -> list[str]:
    small = dict(max_steps=4, eval_n=6, pass_n=2, batch_size=16, minibatch_size=8, group_size=4, eval_every=2)
    values = small | dict(save_every=2, lr=1e-2, warmup=0, init_steps=2, init_lr=1e-3) | values
    return ["--output_dir", str(path), *(word for name, v in values.items() for word in (f"--{name}", str(v)))]


@pytest.fixture(scope="module")
def whole(tiny_base, puzzles, tmp_path_factory):
    """An uninterrupted run, on what maskgrpo.py has trained: the two methods compose."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert upo_cli(flags_of(path, model=tiny_base.parent, data=puzzles, max_steps=6, topk=4)) == 0
    return path


def test_the_tables_figures_are_those_of_the_completions(whole, puzzles):
    results, rows, task = results_of(whole), lines_of(whole, "completions"), rewards.TASKS["sudoku"]
    assert [results[name] for name in ("task", "ref", "seed", "n")] == ["sudoku", "topk", 0, 6]
    assert list(rows[0]) == "method problem sample completion nfe steps tokens score".split() and len(rows) == 8 * 6
    problems, scores = task.load(str(puzzles), "train")[9::10], {}
    for row in rows:  # each blank once, in some order; clues are given
        problem = problems[row["problem"]]
        blanks = problem["question"].count("0")
        taken = sorted(step for step in row["steps"] if step >= 0)
        assert len(taken) == blanks and (taken == list(range(blanks)) or row["method"] == "threshold")
        assert sorted(set(taken)) == list(range(row["nfe"]))
        assert row["score"] == task.score(row["completion"], problem)
        scores.setdefault(row["method"], []).append(row["score"])
    assert list(results["accuracy"]) == [*upo.ORDERS, "upo"] == list(scores)
    for name, figures in results["accuracy"].items():
        assert figures["mean"] == pytest.approx(sum(scores[name]) / 6, abs=1e-6)
    for name, figures in results["paired"].items():
        assert figures["difference"] == pytest.approx((sum(scores["upo"]) - sum(scores[name])) / 6, abs=1e-6)
    for values in results["pass_at_n"].values():
        assert list(values) == ["1", "2", "4", "8", "16"] and list(values.values()) == sorted(values.values())


def test_what_a_run_gives_its_steps_and_its_looks(tiny_base, puzzles, tmp_path, monkeypatch):
    line = dict.fromkeys(("reward", "group_reward_std", "entropy"), 0.0)
    warm, steps = (spied(monkeypatch, upo, f"{name}_step", line) for name in ("init", "train"))
    looks, loops = spied(monkeypatch, upo, "evaluate"), spied(monkeypatch, upo, "train_policy")
    values = dict(model=tiny_base, data=puzzles, init="pretrained", max_steps=2, weight_decay=0.3, pass_n=0)
    assert upo_cli(flags_of(tmp_path / "run", **values)) == 0
    (*_, data), group = loops[0], loops[0][3].param_groups[0]
    assert [[n for *_, n in calls] for calls in (warm, steps)] == [[0, 1]] * 2
    assert all(problems is data["train"] for *_, problems, _ in warm + steps)
    splits = ("validation", "validation", "test")  # after init_steps, at the end, and the table
    assert [problems is data[split] for (*_, problems), split in zip(looks, splits, strict=True)] == [True] * 3
    assert not any(order.sampled for *_, orders, _ in looks[:2] for order in orders.values())
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.99), 0.3)


def test_kill_and_resume_to_the_same_numbers(tiny_base, whole, puzzles, tmp_path):
    argv = flags_of(path := tmp_path / "run", model=tiny_base, data=puzzles, max_steps=6, topk=4)
    dying = dies("upo_loss", 14, signal.SIGKILL, upo)  # kill -9 in step 4, of 4 updates each
    assert ended(forked(argv, tmp_path, dying, run=upo_cli)) == [-signal.SIGKILL]
    assert len(lines_of(path)) == 3 and not (path / "results.json").exists()
    assert upo_cli(["--resume", "--output_dir", path]) == 0
    assert all(lines_of(path, name) == lines_of(whole, name) for name in ("metrics", "completions"))
    assert all(torch.equal(v, policy_of(path)[name]) for name, v in policy_of(whole).items())


def test_two_processes_equal_one(tiny_base, puzzles, tmp_path):
    """The same trajectories, losses and gradient norms, and after four steps the same policy."""
    common = dict(model=tiny_base, data=puzzles, ref="softmax_confidence", init="pretrained", lr=1e-3)
    argv = flags_of(tmp_path / "two", batch_size=8, minibatch_size=4, **common)
    assert forked_pair(argv, tmp_path, run=upo_cli) == [0, 0], (tmp_path / "out").read_text()
    assert upo_cli(flags_of(tmp_path / "one", batch_size=16, minibatch_size=8, **common)) == 0
    same_metrics(tmp_path / "one", tmp_path / "two")
    for name, v in policy_of(tmp_path / "one").items():
        # what is added to all keys, or to all scores, changes no softmax: its gradient is 0, and AdamW scales noise up
        if not name.endswith(("in_proj_bias", "mlp.6.bias")):
            torch.testing.assert_close(v, policy_of(tmp_path / "two")[name], atol=1e-5, rtol=0)
    assert lines_of(tmp_path / "one", "completions") == lines_of(tmp_path / "two", "completions")


@pytest.mark.parametrize("kind, ref", [("dream", "none"), ("llada", "max_confidence")])
def test_published_formats_on_published_data(kind, ref, request, data_file, tmp_path):
    values = dict(task="gsm8k", model=request.getfixturevalue(kind), data=data_file, heads=4, gen_length=16)
    values |= dict(block_length=8, steps_per_update=4, temperature=0.7, eval_n=3, pass_n=0, max_steps=2, ref=ref)
    assert upo_cli([*flags_of(tmp_path / "run", **values), "--bf16", "--offload"]) == 0
    lines = lines_of(tmp_path / "run")
    assert [line["phase"] for line in lines] == ["init"] * 2 * (ref == "max_confidence") + ["upo"] * 2
    assert lines[0]["log_ratio"] < 0.2 and (ref == "none" or lines[0]["grad_norm"] > 0)


def test_transfer(whole, puzzles, tmp_path):
    """--eval_only repeats the run's figures; a file that is named is evaluated whole, with the policy's settings."""
    flags = ["--eval_only", "--policy", str(whole)]
    assert upo_cli([*flags, "--output_dir", tmp_path / "a", "--eval_n", 6, "--pass_n", 2]) == 0
    again, before = results_of(tmp_path / "a"), results_of(whole)
    assert again["accuracy"] == before["accuracy"] and again["pass_at_n"] == before["pass_at_n"]
    assert upo_cli([*flags, "--data", puzzles, "--pass_n", 0, "--output_dir", tmp_path / "b"]) == 0
    assert results_of(tmp_path / "b")["n"] == 60
    names = ("task", "topk", "heads", "data", "eval_data", "eval_n", "gen_length")
    parsed = lambda *more: [getattr(parse(*flags, *more), name) for name in names]
    assert parsed("--topk", "2", "--data", "c.csv") == ["sudoku", 2, 4, "c.csv", "c.csv", 0, 20]
    assert parsed("--task", "gsm8k", "--eval_n", "5") == ["gsm8k", 3, 4, None, None, 5, 16]


BAD = {
    "--ref best": "argument --ref: invalid choice: 'best'", "--eval_only": "--eval_only needs --policy",
    "--topk 17": "--topk 17: at most 16 positions are masked at once", "--ref none --init pretrained": "no reference",
    "--minibatch_size 7": "--batch_size 512 is no multiple of 7, --minibatch_size",
    "--temperature -1": "--temperature -1.0: must be at least 0",
    "--data bad.csv": "bad.csv, line 2: '1234341221434321' is no solution of '1100000000000000'",
    "--eval_only --policy nowhere": "--policy nowhere: no trained policy there",
    "--eval_only --policy WHOLE --output_dir WHOLE": "is the run that is read",
    "--eval_only --policy WHOLE --model LLADA": "made for bases of width 48, this one has 32",
}  # fmt: skip


@pytest.mark.parametrize("flags", BAD)
def test_usage_errors_are_one_line_and_exit_2(flags, whole, llada, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text("Puzzle,Solution\n1100000000000000,1234341221434321\n")
    argv = [{"WHOLE": whole, "LLADA": llada}.get(word, word) for word in flags.split()]
    assert BAD[flags] in one_error(argv, capfd, upo_cli, "upo.py")
    assert len(list(tmp_path.iterdir())) == 1 + ("LLADA" in flags)  # nothing was begun, but to load a model
