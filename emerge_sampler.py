"""Masks -> tokens: how a completion is drawn from a masked diffusion model.

A sampler here takes a callable `denoise(x, positions) -> logits` and knows nothing else of the model:

    x          (B, L) long        the sequence so far, mask tokens included
    positions  (B, L) bool        where the sampler will read
    logits     (N, V) float       predictions at the N True positions, in row-major order

Logits are computed only where they are read: a 126k-word head over every position is what runs out
of memory. `semi_autoregressive` is the text rollout of LLaDA, d1 and MaskGRPO: the completion is
filled block by block from left to right and, inside a block, k tokens per step, most confident first.

Departures from LLaDA's generate.py
 1. Noise is drawn per row from a generator of that row, in float64, only at the positions read. A
    row's tokens depend neither on its batch nor on the number of processes. (In bf16, Gumbel noise
    makes a 70% token win 99.6% of the time; float32 still cuts the tail off, arXiv 2409.02908.)
 2. Temperature T draws exactly from softmax(logits / T). Confidence is the probability of the drawn
    token at T = 1, as in LLaDA.
 3. What lies behind a row's first revealed EOS is not decoded any more: it stays masked while the row
    is finished, is never read, and is returned as the pad token with step -1.
 4. `eos_last=True` lets EOS wait until the rest of its block is filled, against "EOS flooding".

    python emerge_sampler.py    # parallel decoding on a distribution known in closed form
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = torch.Generator | Sequence[torch.Generator]


class Rollout(NamedTuple):
    """x: (B, L) long, no mask token left; unmask_step: (B, L) long, the step at which each token was
    revealed, counted from 0 (-1: prompt, or behind the EOS); forwards: calls of `denoise`."""

    x: Tensor
    unmask_step: Tensor
    forwards: int


# ---------------------------------------------------------------------------------------------
# One step, pure functions of tensors
# ---------------------------------------------------------------------------------------------


def exponential_noise(positions: Tensor, vocabulary: int, generator: Noise) -> Tensor:
    """(N, V) float64 draws of Exp(1) for the N True positions (B, L); one generator for all rows, or one per row."""
    if isinstance(generator, torch.Generator):
        generator, counts = [generator], [int(positions.sum())]
    else:
        counts = positions.sum(1).tolist()
    precision = torch.float32 if positions.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    noise = positions.new_empty(sum(counts), vocabulary, dtype=precision)
    for rows, g in zip(noise.split(counts), generator, strict=True):
        rows.exponential_(generator=g)
    return noise


def draw(logits: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """Tokens (N,) long from softmax(logits / T), logits (N, V); argmax if T = 0.

    argmax_v p_v / E_v with E ~ Exp(1) is distributed as p: the Gumbel-max trick without the double log.
    """
    if temperature == 0:
        return logits.argmax(-1)
    log_p = (logits.to(noise.dtype) / temperature).log_softmax(-1)  # float64: see departure 1
    return (log_p - noise.log()).argmax(-1)


def confidence_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """log of the probability (T = 1) of each token, (N,) float32, in log space as exp would only underflow."""
    return logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def most_confident(confidence: Tensor, candidates: Tensor, k: int) -> Tensor:
    """The k most confident candidates of each row, (B, L) bool; fewer where a row has fewer. Ties go to the left.

    confidence (N,) float belongs to the N True positions of candidates (B, L), row-major.
    """
    score = torch.full(candidates.shape, -torch.inf, device=candidates.device)
    score[candidates] = confidence.float()
    best = score.argsort(dim=1, descending=True, stable=True)[:, :k]  # (B, k); topk breaks ties by a row's width
    return torch.zeros_like(candidates).scatter_(1, best, True) & candidates


def through_eos(x: Tensor, completion: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """Completion positions up to and including each row's first EOS, (B, L) bool. No EOS: all of them."""
    eos = torch.isin(x, torch.tensor(list(eos_ids), dtype=x.dtype, device=x.device)) & completion
    return completion & (eos.cumsum(1) - eos.long() == 0)  # no EOS strictly before


def guided(denoise: Denoise, unconditional: Callable[[Tensor], Tensor], scale: float) -> Denoise:
    """Classifier-free guidance as a `denoise`: l_u + (1 + scale)(l_c - l_u); scale 0 is no guidance.

    `unconditional(x)` returns x with its prompt hidden. Two calls of the same batch, so that whatever
    `denoise` closes over (an attention mask, say) fits both.
    """
    if scale == 0:
        return denoise

    def call(x: Tensor, positions: Tensor) -> Tensor:
        conditional, free = denoise(x, positions), denoise(unconditional(x), positions)
        # a token forbidden by a logit of -inf stays forbidden: -inf - -inf would be nan
        return torch.where(conditional.isneginf(), conditional, free + (1 + scale) * (conditional - free))

    return call


# ---------------------------------------------------------------------------------------------
# Text: semi-autoregressive blocks, most confident first
# ---------------------------------------------------------------------------------------------


@torch.no_grad()
def semi_autoregressive(
    denoise: Denoise,
    x: Tensor,
    completion: Tensor,
    *,
    block_length: int,
    tokens_per_step: int,
    temperature: float,
    generator: Noise,
    eos_ids: Sequence[int],
    pad_id: int,
    eos_last: bool = False,
    everyone: Callable[[bool], bool] = lambda finished: finished,
) -> Rollout:
    """Fill the masked completion of x (B, L) long block by block; completion (B, L) bool.

    A row takes ceil(block_length / k) forwards per block, until it has ended. Every process makes the same
    number, so that sharded models cannot hang: before each one `everyone(finished)` is asked, and answers
    whether all processes have finished. A completion may start anywhere in a row, and have gaps. eos_ids
    may be empty: then nothing ends early.
    """
    x, masked = x.clone(), completion.clone()
    unmask_step = torch.full_like(x, -1)
    block = torch.where(completion, (completion.cumsum(1) - 1) // block_length, -1)  # (B, L)
    forwards = 0
    while True:
        unfinished = masked & through_eos(x, completion, eos_ids)  # what still has to be decoded, (B, L)
        if everyone(not bool(unfinished.any())):
            break
        current = block.masked_fill(~unfinished, x.shape[1]).amin(1, keepdim=True)  # each row's block, (B, 1)
        candidates = unfinished & (block == current)
        logits = denoise(x, candidates)  # (N, V)
        noise = exponential_noise(candidates, logits.shape[-1], generator) if temperature > 0 else None
        tokens = draw(logits, temperature, noise)
        confidence = confidence_of(logits, tokens)
        if eos_last:
            is_eos = torch.isin(tokens, torch.tensor(list(eos_ids), device=x.device))
            confidence = confidence - 1e4 * is_eos  # behind every other token of the block
        reveal = most_confident(confidence, candidates, tokens_per_step)
        x[reveal] = tokens[reveal[candidates]]
        unmask_step[reveal] = forwards
        masked &= ~reveal
        forwards += 1
    tail = completion & ~through_eos(x, completion, eos_ids)  # still masked, or revealed together with the EOS
    return Rollout(x.masked_fill(tail, pad_id), unmask_step.masked_fill(tail, -1), forwards)


# ---------------------------------------------------------------------------------------------
# python emerge_sampler.py
# ---------------------------------------------------------------------------------------------


class Joint:
    """A distribution over all sequences of n tokens from v words, and its exact conditionals as a denoiser."""

    def __init__(self, log_joint: Tensor):
        """log_joint: (v, ..., v) float64, n dimensions, normalised. The mask token is v."""
        self.log_joint, self.n, self.v = log_joint, log_joint.dim(), log_joint.shape[0]
        self.cache: dict[tuple[int, ...], Tensor] = {}

    def conditionals(self, row: tuple[int, ...]) -> Tensor:
        """log p(token at n | visible tokens of row) at every position, (n, v) float64."""
        if row not in self.cache:
            seen = self.log_joint[tuple(slice(None) if w == self.v else slice(w, w + 1) for w in row)]
            tables = []
            for n in range(self.n):
                others = [m for m in range(self.n) if m != n]
                table = seen.logsumexp(others) if others else seen
                tables.append(table.expand(self.v) - seen.logsumexp(list(range(self.n))))
            self.cache[row] = torch.stack(tables)
        return self.cache[row]

    def denoise(self, x: Tensor, positions: Tensor) -> Tensor:
        return torch.stack([self.conditionals(tuple(row)) for row in x.tolist()])[positions]


def markov_chain(n: int, v: int) -> Tensor:
    """log of a joint in which neighbours agree: stay with probability .7, else any other word, (v, ..., v)."""
    log_joint = torch.zeros([v] * n, dtype=torch.float64)
    for word in itertools.product(range(v), repeat=n):
        for a, b in itertools.pairwise(word):
            log_joint[word] += torch.log(torch.tensor(0.7 if a == b else 0.3 / (v - 1)))
    return log_joint - log_joint.flatten().logsumexp(0)


def compare(joint: Joint, rows: int, **settings) -> tuple[float, float, int]:
    """Total variation to the true joint, entropy in bits of what was drawn, and forwards, over `rows` samples."""
    x = torch.full((rows, joint.n), joint.v)
    settings = dict(temperature=1.0, generator=torch.Generator().manual_seed(0), eos_ids=(), pad_id=0) | settings
    out = semi_autoregressive(joint.denoise, x, torch.ones_like(x, dtype=torch.bool), **settings)
    flat = (out.x * joint.v ** torch.arange(joint.n - 1, -1, -1)).sum(1)
    drawn = flat.bincount(minlength=joint.v**joint.n) / rows
    distance = 0.5 * (drawn - joint.log_joint.flatten().exp()).abs().sum()
    return float(distance), float(-(drawn * drawn.clamp(min=1e-12).log2()).sum()), out.forwards


def main() -> None:
    """Parallel decoding against a joint distribution known in closed form."""
    joint, rows = Joint(markov_chain(4, 3)), 20_000
    p = joint.log_joint.flatten().exp()
    exact = torch.multinomial(p, rows, True, generator=torch.Generator().manual_seed(0)).bincount(minlength=len(p))
    floor = float(0.5 * (exact / rows - p).abs().sum())
    print(f"A chain of 4 tokens over 3 words, neighbours agree with probability .7; {rows:,} samples, T = 1.")
    print(
        f"Entropy of the truth {float(-(p * p.log2()).sum()):.2f} bits; distance of as many exact samples {floor:.3f}\n"
    )
    print(f"{'block':>5} {'tokens/step':>11} {'forwards':>8} {'total variation':>15} {'entropy, bits':>13}")
    for block_length, k in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)):
        distance, entropy, forwards = compare(joint, rows, block_length=block_length, tokens_per_step=k)
        print(f"{block_length:>5} {k:>11} {forwards:>8} {distance:>15.3f} {entropy:>13.2f}")
    print(
        "\nBlocks of 1 draw left to right and are exact. Most-confident-first is not, even at one token"
        "\nper step: it draws everywhere and keeps what came out likely, so likely words win too often."
        "\nSeveral tokens per step ignore each other: neighbours stop agreeing and the entropy rises."
    )


if __name__ == "__main__":
    main()
