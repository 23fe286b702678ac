"""Tokens -> masks: how a finished completion is turned back into a partly masked one.

MaskGRPO (ICLR 2026) cannot read the likelihood of a completion off a masked diffusion model. It
re-masks the completion, lets the model predict what was hidden, and compares policies on that.
*Which* tokens are hidden decides what the comparison sees; this file holds the choices:

    fading_out       MaskGRPO, Alg. 1: late tokens are hidden more often ("AR-like"), for text
    uniform          MaskGRPO, Alg. 2: every token is hidden with the same probability, for images
    full             diffu-GRPO: the whole completion, and 15% of the prompt
    whole_range      UniGRPO: uniform, at mu ratios spaced evenly from a random start up to 1
    coupled          DiffuCoder: a random mask and what it leaves, turn and turn about
    quadrature       GDPO: uniform, at the nodes of a Gauss quadrature over t
    trace            TraceRL: the recorded order of generation, replayed slice by slice
    rotated_trace    not of a paper: the same slices, but each completion begins with another one
    random_step      AGRPO: the tokens of one random step of the recorded order
    left_to_right    JustGRPO: slices from left to right, whatever the recorded order

Each is a pure function of tensors and returns a `Remask`: what to hide, what to score, at which t.

    symbol       shape            meaning
    completion   (B, L) bool      positions of the completion, up to and including its first EOS
    r, t         float or (B,)    mask ratio in (0, 1]; 1 hides the whole completion
    gamma, mu    float, int       truncation (lowest ratio) and number of inner updates
    d, p         (B, L) float     Alg. 1's ramp over the completion, and the probability to *keep*
    u            (B, L) float     uniform noise in [0, 1): the only randomness, passed in

Departures from the paper and from its official code
 1. The ramp spans each row's own completion. The official code spans prompt and completion together,
    taking the first element of the mask for the prompt's length, so a nominal ratio of .633 becomes .768.
 2. Alg. 1 as printed gives p > 1 at the start once r < 1/2; a probability is clamped to 1, and the expected
    ratio is then 1/(4(1-r)), r = .3 masks .357 (`expected_ratio`). With the paper's gamma = 0.6 it never happens.
 3. The noise comes from a generator of the caller's. The official code reseeds the global one.
 4. Each mask is an update of its own, one of mu. DiffuCoder sums both masks of a pair, and a full one, in
    one loss, GDPO its three nodes, JustGRPO all tokens, one forward for each: as with mu = L here.

    python remask.py            # mask probability by position, scheme by scheme
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Remask(NamedTuple):
    """One re-masking of a batch of completions.

    masked: (B, L) bool, positions that show the mask token in x_t (prompt positions too, for `full`)
    scored: (B, L) bool, the masked positions whose prediction counts; a subset of `masked`
    t:      (B,) float32, what the 1/t weight divides by: the mask ratio, but in quadrature and traces
    """

    masked: Tensor
    scored: Tensor
    t: Tensor


# --- Time and noise ---------------------------------------------------------------------------------------------------


def inner_time(j: int, mu: int, gamma: float) -> float:
    """Mask ratio of inner update j = 1 ... mu: t_j = gamma + (1 - gamma) j / mu  (MaskGRPO, Loss).

    j is an argument, never read off a step counter: with gradient accumulation a counter of
    micro-batches would skip half of the masks. The last update, and the only one if mu = 1, has t = 1.
    """
    if not 1 <= j <= mu:
        raise ValueError(f"j = {j} is outside 1..mu = {mu}")
    return gamma + (1 - gamma) * j / mu


def seeded(*key: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that depends on `key` (non-negative integers) alone; the global one is not touched.

    numpy's SeedSequence mixes the key, so (seed, step, j) = (1, 2, 3) and (1, 3, 2) are unrelated.
    """
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator(device).manual_seed(seed)


def shuffled(n: int, count: int, start: int, *key: int) -> list[int]:
    """Items start ... start + count of an endless series of shuffles of range(n), from a key; needs no state."""
    epochs = range(start // n, (start + count - 1) // n + 1)
    order = {epoch: torch.randperm(n, generator=seeded(*key, epoch)) for epoch in epochs}
    return [int(order[c // n][c % n]) for c in range(start, start + count)]


def ratio_column(r: float | Tensor, rows: int, device: torch.device) -> Tensor:
    """r as a (B, 1) float32 column: one ratio for all rows, or one per row."""
    return torch.as_tensor(r, dtype=torch.float32, device=device).reshape(-1, 1).expand(rows, 1)


# --- MaskGRPO: fading-out for text (Alg. 1), uniform for images (Alg. 2) ----------------------------------------------


def keep_probability(completion: Tensor, r: float | Tensor) -> Tensor:
    """Alg. 1: the probability that each completion token stays visible, (B, L) float32, 0 elsewhere."""
    length = completion.sum(1, keepdim=True)  # L_o, (B, 1)
    position = completion.cumsum(1) - 1  # 0 ... L_o - 1 inside the completion, wherever it starts
    d = (1 - position / (length - 1).clamp(min=1)) * completion  # d = linspace(1, 0, L_o), (B, L)
    # p = d (1 - r) L_o / sum(d); sum(d) is L_o / 2, so p starts at 2 (1 - r) and fades out to 0
    r = ratio_column(r, len(completion), completion.device)
    p = d * (1 - r) * length / d.sum(1, keepdim=True).clamp(min=1e-9)
    return p.clamp(max=1)  # only bites below r = 1/2, see departure 2


def expected_ratio(completion: Tensor, r: float | Tensor) -> Tensor:
    """The ratio that `fading_out` really masks on average after the clamp, (B,) float32; r if r >= 1/2."""
    return 1 - keep_probability(completion, r).sum(1) / completion.sum(1)


def fading_out(completion: Tensor, r: float | Tensor, u: Tensor) -> Remask:
    """MaskGRPO Alg. 1, text. completion (B, L) bool, u (B, L) uniform noise. The 1/t weight has t = r, as in the paper:
    exact for masks that hide every token alike; here early tokens are hidden more rarely, and weigh too little."""
    masked = completion & (u >= keep_probability(completion, r))
    return Remask(masked, masked, ratio_column(r, len(completion), completion.device)[:, 0])


def uniform(completion: Tensor, r: float | Tensor, u: Tensor) -> Remask:
    """MaskGRPO Alg. 2, images; also the masks of the ELBO (Eq. 2). Hidden with probability r each."""
    r = ratio_column(r, len(completion), completion.device)
    masked = completion & (u < r)
    return Remask(masked, masked, r[:, 0])


# --- The compared methods ---------------------------------------------------------------------------------------------


def full(completion: Tensor, prompt: Tensor, u: Tensor, prompt_ratio: float = 0.15) -> Remask:
    """diffu-GRPO (d1): the completion is fully masked, and prompt tokens with probability 15%."""
    masked = completion | (prompt & (u < prompt_ratio))
    return Remask(masked, completion, torch.ones(len(completion), device=completion.device))


def whole_range(completion: Tensor, u: Tensor, u_ratio: Tensor, j: int, mu: int) -> Remask:
    """UniGRPO (MMaDA, Alg. 1): uniform masks at r_j = r_1 + (1 - r_1) (j - 1) / (mu - 1), evenly spaced from a random
    r_1 = 1 - u_ratio up to the full mask; of a single update r_1. u_ratio (B,) uniform noise, the same for all j."""
    start = 1 - u_ratio
    return uniform(completion, start + (1 - start) * (j - 1) / max(mu - 1, 1), u)


def coupled(completion: Tensor, u: Tensor, u_ratio: Tensor, second: bool) -> Remask:
    """Coupled-GRPO (DiffuCoder): uniform masks at r = .2 + .6 u_ratio and, of the same noise, `second`: all that the
    first one leaves, at 1 - r. Together they score each token exactly once; of an odd mu the last has no partner."""
    first = uniform(completion, 0.2 + 0.6 * u_ratio, u)
    rest = completion & ~first.masked
    return Remask(rest, rest, 1 - first.t) if second else first


def quadrature(completion: Tensor, u: Tensor, j: int, mu: int) -> Remask:
    """GDPO: uniform masks at node t_j of the Gauss-Legendre rule of mu nodes on (0, 1), whose weight is put into t: the
    mean over j of (1/t) sum is the rule, exact where E sum / t is a polynomial in t of degree 2 mu - 1 or less."""
    nodes, weights = np.polynomial.legendre.leggauss(mu)  # on (-1, 1)
    masks = uniform(completion, (1 + nodes[j - 1]) / 2, u)
    return masks._replace(t=masks.t / (mu * weights[j - 1] / 2))


def trace(completion: Tensor, unmask_step: Tensor, j: int | Tensor, mu: int) -> Remask:
    """TraceRL: replay of the recorded order. unmask_step (B, L) long, as the sampler returns it; j may be (B, 1) long.

    Each row's steps are cut into mu slices of equal length. Update j hides what had not been revealed
    before slice j, and scores what slice j revealed: over j = 1 ... mu each token is scored exactly
    once, in very nearly the state in which it was drawn (the very state, with one step per slice).
    Tokens behind the EOS that were revealed before it belong to that state, and are never scored.
    t is set so that the 1/t weight undoes the slicing: E over j of (1/t) sum equals the full sum.
    """
    current = unmask_step * mu // steps_of(completion, unmask_step) + 1  # the slice 1 ... mu of each token, (B, L)
    masked, scored = (unmask_step >= 0) & (current >= j), completion & (current == j)
    return Remask(masked, scored, torch.full((len(completion),), 1 / mu, device=completion.device))


def rotated_trace(completion: Tensor, unmask_step: Tensor, phase: Tensor, j: int, mu: int) -> Remask:
    """TraceRL's slices in an order of each row's own: update j scores slice (j - 1 + floor(phase mu)) mod mu + 1.

    phase (B,) is uniform noise, the same in all mu updates of a rollout, so that they still score each token exactly
    once, in the same states, as `trace` does. But one update of `trace` sees the beginning of every completion, and
    the next one what follows; here each of them is an unbiased sample of their sum: E over phase of ell is, for every
    j, the mean of trace's ell over j = 1 ... mu.
    """
    return trace(completion, unmask_step, (j - 1 + (phase[:, None] * mu).long()) % mu + 1, mu)


def steps_of(completion: Tensor, unmask_step: Tensor) -> Tensor:
    """Steps that each row's completion took, (B, 1) long, at least 1."""
    return unmask_step.masked_fill(~completion, -1).amax(1, keepdim=True).clamp(min=0) + 1


def random_step(completion: Tensor, unmask_step: Tensor, u_ratio: Tensor) -> Remask:
    """AGRPO: the tokens of one step of the rollout, any with the same probability, in the state in which they were
    drawn. 1/t is the number of steps: E ell is the sum over the trace. u_ratio (B,) uniform noise."""
    steps = steps_of(completion, unmask_step)
    n = (u_ratio[:, None] * steps).long()
    return Remask(unmask_step >= n, completion & (unmask_step == n), 1 / steps[:, 0])


def left_to_right(completion: Tensor, j: int, mu: int) -> Remask:
    """JustGRPO: `trace` as if tokens had been drawn from left to right; with --block_length 1 they have, and it is."""
    return trace(completion, (completion.cumsum(1) * completion) - 1, j, mu)


SCHEMES = ("fading_out", "uniform", "full", "whole_range", "coupled", "quadrature")
SCHEMES += ("trace", "rotated_trace", "random_step", "left_to_right")
TRACES = ("trace", "rotated_trace", "random_step")  # schemes that replay the rollout's own states
Noise = Callable[[int], tuple[Tensor, Tensor]]  # j, 0: the rollout -> uniform draws of it, u (B, L), u_ratio (B,)


def by_name(scheme: str, completion, prompt, unmask_step, noise: Noise, j: int, mu: int, gamma: float) -> Remask:
    """The masks of inner update j by the name of their scheme; arguments as above, each scheme uses its own. What all
    updates of a rollout share comes from noise(0); of a pair, 1 and 2, 3 and 4, both have the noise of the first."""
    u, r, odd = (lambda: noise(j)[0]), inner_time(j, mu, gamma), j - 1 + j % 2
    return {
        "fading_out": lambda: fading_out(completion, r, u()),
        "uniform": lambda: uniform(completion, r, u()),
        "full": lambda: full(completion, prompt, u()),
        "whole_range": lambda: whole_range(completion, u(), noise(0)[1], j, mu),
        "coupled": lambda: coupled(completion, *noise(odd), second=j > odd),
        "quadrature": lambda: quadrature(completion, u(), j, mu),
        "trace": lambda: trace(completion, unmask_step, j, mu),
        "rotated_trace": lambda: rotated_trace(completion, unmask_step, noise(0)[1], j, mu),
        "random_step": lambda: random_step(completion, unmask_step, noise(j)[1]),
        "left_to_right": lambda: left_to_right(completion, j, mu),
    }[scheme]()


# --- python remask.py -------------------------------------------------------------------------------------------------


def mask_probability(scheme: str, length: int = 24, gamma: float = 0.6, mu: int = 4, draws: int = 20_000) -> Remask:
    """Measured probability that each completion position is masked, and scored, over all updates j; (length,) each."""
    completion = torch.ones(draws, length, dtype=torch.bool)
    order = torch.arange(length).expand(draws, length) // 2  # left to right, two tokens a step
    masked, scored = torch.zeros(length), torch.zeros(length)
    noise = lambda j: (torch.rand(draws, length, generator=seeded(0, j)), torch.rand(draws, generator=seeded(1, j)))
    for j in range(1, mu + 1):
        masks = by_name(scheme, completion, ~completion, order, noise, j, mu, gamma)
        masked, scored = masked + masks.masked.float().mean(0) / mu, scored + masks.scored.float().mean(0) / mu
    return Remask(masked, scored, torch.ones(1))


def main() -> None:
    """Each scheme's mask probability by position."""
    # the other traces have, over a rollout, nearly what trace has
    probabilities = {name: mask_probability(name) for name in SCHEMES if name not in TRACES[1:]}
    curves = {name: p.masked for name, p in probabilities.items()} | {"trace, scored": probabilities["trace"].scored}
    print("Probability that a completion token is masked, by position: 24 tokens, gamma = 0.6, mu = 4, mean over")
    print("j = 1 ... mu and 20,000 draws. What is masked is scored, but of traces a slice of it.\n")
    print(f"{'position':<14}" + "".join(f"{n:>5}" for n in (*range(1, 25, 4), 24)) + "   mean")
    for name, p in curves.items():
        cells = "".join(f"{v:5.2f}" for v in (*p[::4], p[-1]))
        print(f"{name:<14}{cells}  {p.mean():5.3f}  " + "".join(" ▁▂▃▄▅▆▇█"[round(float(v) * 8)] for v in p))
    row, ratios = torch.ones(1, 256, dtype=torch.bool), (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
    print("\nAlg. 1 clamps its ramp below r = 1/2; the ratio that 256 tokens really expect:")
    print("  r        " + "".join(f"{r:7.1f}" for r in ratios))
    print("  expected " + "".join(f"{expected_ratio(row, r).item():7.3f}" for r in ratios))


if __name__ == "__main__":
    main()
