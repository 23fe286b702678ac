"""The exact likelihood of a completion under the semi-autoregressive sampler, by dynamic programming over each block.

log p(o | c) is the sum over blocks of log P(block | c, earlier blocks), with later blocks hidden. The m tokens of a
block are revealed k at a time along some path through its subsets, and every path counts:

    alpha({}) = 1,  alpha(R + A) = sum over A of alpha(R) P(A | R),  P(block) = alpha(all m)

    P(A | R)   the probability that the sampler, with R revealed, reveals the set A next, and as o's tokens. It has k
               tokens, or all that are left. Each hidden position i draws a token from p_i = softmax(logits_i / T),
               independently given R, and what is drawn has the confidence q_i(v) = softmax(logits_i)(v), at T = 1.

    "confident"  A holds the k most confident draws, of equal ones those on the left. Its draws are o's, and every
                 other draw comes behind the weakest of them, w:
                 P(A | R) = prod_{a in A} p_a(o_a)  prod_{i not in A} F_i(w)
                 F_i(w) = sum of p_i(v) over the v with q_i(v) < q_w(o_w), or = if w is left of i
                 With a threshold A may be more than k, if all in A are drawn with a q above it, and no other is.
    "random"     A is any k of the h hidden positions: P(A | R) = prod_{a in A} p_a(o_a) / C(h, k)

2^m - 1 states per block, all in one forward. As a function of the weights "random" is smooth. "confident" jumps where
two confidences change places; its gradient here is the one between the jumps.
"""

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from emerge_sampler import Denoise

FLOOR = 1e-300  # of F: log 0 would turn gradients into nan, and log 1e-300 is as good as impossible


def log_likelihood(
    denoise: Denoise,
    x: Tensor,
    completion: Tensor,
    mask_id: int,
    *,
    order: str,
    block_length: int,
    tokens_per_step: int = 1,
    temperature: float = 1.0,
    threshold: float = 1.0,
) -> Tensor:
    """log p(o | c) of finished rows x (B, L) long, (B,) float64, with gradients; completion (B, L) bool, through EOS.

    All completions have the same length, and an EOS stands only at the end of a block: tokens that it cuts off may
    have been revealed before it, and their sum is not taken here. What lies behind a completion should hold the mask
    token, as in the rollout. `denoise` gets the states of a row one behind the other, B * (2^m - 1) rows.
    Raises ValueError for lengths that differ and for another order than "confident" and "random", without threshold.
    """
    if len(set(completion.sum(1).tolist())) > 1 or order not in ("confident", "random")[: 1 + (threshold == 1)]:
        raise ValueError(f"lengths {completion.sum(1).tolist()}, order {order!r}: want one length, a known order")
    places = completion.nonzero()[:, 1].view(len(x), -1)  # columns of the completion, (B, |o|)
    total, hidden = torch.zeros(len(x), dtype=torch.float64), completion
    for block in places.split(block_length, dim=1):  # (B, m)
        behind = hidden.scatter(1, block, False)
        seen = predictions(denoise, x, behind, block, mask_id, temperature, threshold)
        step = functools.partial(confident_step if order == "confident" else random_step, *seen)
        total = total + sum_over_paths(step, block.shape[1], tokens_per_step, more=threshold < 1)
        hidden = behind
    return total


def predictions(denoise, x, behind, block, mask_id: int, temperature: float, threshold: float) -> tuple[Tensor, ...]:
    """In every state of a block but the finished one, S of them, state bit i meaning that its place i is revealed:
    log p_i(o_i) float64, log q_i(o_i) float32, how far that is above the threshold, log of the chance of a draw that is
    not, float64, all (B, S, m), and log F_i(w), (B, S, m, m) float64; 0 if i is revealed.

    block (B, m) long, its columns; behind (B, L) bool, what is hidden besides it.
    """
    rows, m = block.shape
    hidden = torch.tensor([[not state >> i & 1 for i in range(m)] for state in range(2**m - 1)])  # (S, m)
    hidden = hidden.expand(rows, -1, -1)  # (B, S, m)
    columns = block[:, None].expand_as(hidden)
    positions = torch.zeros(rows, hidden.shape[1], x.shape[1], dtype=torch.bool).scatter(2, columns, hidden)
    x_t = x[:, None].masked_fill(positions | behind[:, None], mask_id)  # (B, S, L)
    logits = denoise(x_t.flatten(0, 1), positions.flatten(0, 1))  # (N, V), in the order of hidden's True
    right = x.gather(1, block)[:, None].expand_as(hidden)
    p, confidence = (logits.double() / temperature).log_softmax(-1), logits.detach().float().log_softmax(-1)
    back = lambda values: values.new_zeros(hidden.shape + values.shape[1:]).index_put((hidden,), values)
    of_o = lambda table: back(table.gather(1, right[hidden][:, None])[:, 0])
    log_p, q = of_o(p), of_o(confidence)
    q_w = q[:, :, None].expand(-1, -1, m, -1)[hidden][:, :, None]  # (N, m, 1)
    left = torch.ones(m, m).tril(-1).bool().expand(*hidden.shape, m)[hidden][:, :, None]  # w is left of i
    unsure = confidence[:, None] <= math.log(threshold)  # (N, 1, V)
    weaker = unsure & ((confidence[:, None] < q_w) | ((confidence[:, None] == q_w) & left))  # (N, m, V)
    log_f, log_unsure = ((p.exp()[:, None] * of).sum(-1).clamp(min=FLOOR).log() for of in (weaker, unsure))
    return log_p, q, q - math.log(threshold), back(log_unsure[:, 0]), back(log_f)


def confident_step(log_p, q, above, log_unsure, log_f, state: int, chosen: list, others: list, k: int) -> Tensor:
    """log P(A | R) of "confident", (B,): A = chosen, others are the hidden places left over, R = state."""
    if len(chosen) > k:
        found = log_p[:, state, chosen].sum(1) + log_unsure[:, state, others].sum(1)
        return torch.where((above[:, state, chosen] > 0).all(1), found, math.log(FLOOR))
    # of equally confident ones the rightmost is the weakest; argmin takes the first it meets
    weakest = torch.tensor(chosen[::-1])[q[:, state, chosen[::-1]].argmin(1)]  # w, (B,)
    beaten = log_f[:, state, others].gather(2, weakest[:, None, None].expand(-1, len(others), 1))
    return log_p[:, state, chosen].sum(1) + beaten.sum((1, 2))


def random_step(log_p, q, above, log_unsure, log_f, state: int, chosen: list, others: list, k: int) -> Tensor:
    """log P(A | R) of "random", (B,)."""
    return log_p[:, state, chosen].sum(1) - math.log(math.comb(len(chosen) + len(others), len(chosen)))


def sum_over_paths(step: Callable[[int, list, list, int], Tensor], m: int, k: int, more: bool) -> Tensor:
    """log P(block), (B,): the sum over all paths from nothing to all m places, k at a time, or more."""
    alpha: dict[int, list[Tensor]] = {}  # log probabilities of the ways into a state
    for state in range(2**m - 1):  # a subset comes before what contains it
        if state and state not in alpha:
            continue  # not a multiple of k
        here = torch.stack(alpha[state]).logsumexp(0) if state else 0.0
        hidden = [i for i in range(m) if not state >> i & 1]
        least = min(k, len(hidden))
        sizes = range(least, (len(hidden) if more else least) + 1)
        for chosen in map(list, itertools.chain(*(itertools.combinations(hidden, size) for size in sizes))):
            others = [i for i in hidden if i not in chosen]
            reached = state | sum(1 << i for i in chosen)
            alpha.setdefault(reached, []).append(here + step(state, chosen, others, k))
    return torch.stack(alpha[2**m - 1]).logsumexp(0)
