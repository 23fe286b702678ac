"""Masks -> tokens (-> pixels): how a completion is drawn from a masked diffusion model, and how it is seen.

A sampler here takes a callable `denoise(x, positions) -> logits` and knows nothing else of the model:

    x          (B, L) long        the sequence so far, mask tokens included
    positions  (B, L) bool        where the sampler will read
    logits     (N, V) float       predictions at the N True positions, in row-major order

Logits are computed only where they are read: a 126k-word head over every position is what runs out of memory.
Three samplers share one loop, `fill`, and differ in where they read and what they reveal:

    semi_autoregressive   text, of LLaDA, d1 and MaskGRPO: block by block, in it k tokens per step, most confident first
    emerge                images, MaskGRPO's Alg. 4: every masked token emerges by itself, with the
                          probability that the schedule gives it, and is drawn from the model
    maskgit               images, what the paper compares with: a fixed number per step, most confident
                          first, with Gumbel noise that is annealed

    symbol     shape     meaning
    t, s       float     time before and after a step, 1 -> 0; 1: all is masked
    alpha_t    float     share of tokens that are visible at time t
    pi, q_s    (N, V), (N, V + 1)   the model's distribution; Alg. 4's, whose last outcome is "stays masked"

Departures from LLaDA's generate.py, and from the paper's and MMaDA's code
 1. A token is drawn from softmax(logits / T) by one number in float64, not by Gumbel noise on every word, which in
    bf16 makes a 70% token win 99.6% of the time and in float32 still cuts the tail off (arXiv 2409.02908). It comes
    from a generator of the row: a row's tokens depend neither on its batch nor on the number of processes.
 2. Confidence is the probability of the drawn token at T = 1, as in LLaDA.
 3. What lies behind a row's first revealed EOS is not decoded any more: what is still masked there stays so
    while the row is finished, is never read, and is returned as the pad token with step -1. Tokens that were
    revealed there before the EOS are returned with their steps: the later ones were drawn in their presence.
 4. `eos_last` lets EOS wait until the rest of its block is filled; `threshold` is Fast-dLLM's.
 5. q_s is Alg. 4's, normalised, as in the official image sampler. Its variant for text, which no trainer calls, is
    not: it leaves a third of the tokens to the last step whatever the number of steps.

    python emerge_sampler.py    # the three samplers on distributions known in closed form
"""

import itertools
import json
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors.torch import load_file
from torch import Tensor, nn

Denoise = Callable[[Tensor, Tensor], Tensor]
Noise = torch.Generator | Sequence[torch.Generator]


class Rollout(NamedTuple):
    """x: (B, L) long, no mask token left; unmask_step: (B, L) long, the step at which each token was
    revealed, counted from 0 (-1: prompt, or never, behind the EOS); forwards: calls of `denoise`."""

    x: Tensor
    unmask_step: Tensor
    forwards: int


# --- One step, pure functions of tensors ------------------------------------------------------------------------------


def exponential_noise(positions: Tensor, columns: int, generator: Noise) -> Tensor:
    """(N, columns) float64 draws E of Exp(1) for the N True positions (B, L), of one generator for all rows or one per
    row; e^-E is uniform on (0, 1), -log E is Gumbel noise."""
    if isinstance(generator, torch.Generator):
        generator, counts = [generator], [int(positions.sum())]
    else:
        counts = positions.sum(1).tolist()
    precision = torch.float32 if positions.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
    noise = positions.new_empty(sum(counts), columns, dtype=precision)
    for rows, g in zip(noise.split(counts), generator, strict=True):
        rows.exponential_(generator=g)
    return noise


def first_above(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(where the running sum of weights (N, V) is first above target (N, 1), what is left of that there), (N, 1) both.
    In target's float64: in float32 the sum of 100,000 words would swallow the rare ones at its end."""
    running = weights.to(target.dtype).cumsum(1)
    target = torch.minimum(target, running[:, -1:] * (1 - torch.finfo(target.dtype).eps))  # sums may round
    index = torch.searchsorted(running, target, right=True)
    return index, target - F.pad(running, (1, 0)).gather(1, index)


def inverse_cdf(p: Tensor, u: Tensor) -> Tensor:
    """Words (N,) long distributed as p (N, V) float; u (N,) float64, uniform. p is read once: summed over runs of 2048
    words, for which float32 is exact enough. Then the run in which u lies is found, and the word in it."""
    runs = torch.stack([of.sum(1) for of in p.split(2048, dim=1)], dim=1)
    run, left = first_above(runs, u[:, None] * runs.sum(1, keepdim=True, dtype=u.dtype))
    words = run * 2048 + torch.arange(min(2048, p.shape[1]), device=p.device)
    inside = p.gather(1, words.clamp(max=p.shape[1] - 1)) * (words < p.shape[1])
    return words.gather(1, first_above(inside, left)[0])[:, 0]


def draw(logits: Tensor, temperature: float, noise: Tensor | None) -> Tensor:
    """Tokens (N,) long from softmax(logits / T), logits (N, V), noise (N,) of Exp(1); argmax if T = 0."""
    if temperature == 0:
        return logits.argmax(-1)
    return inverse_cdf((logits.float() / temperature).softmax(-1), (-noise).exp())


def confidence_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """log of the probability (T = 1) of each token, (N,) float32, in log space as exp would only underflow."""
    return logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]


def most_confident(confidence: Tensor, candidates: Tensor, k: int | Tensor) -> Tensor:
    """The k most confident candidates of each row, (B, L) bool, of ties the leftmost; fewer where a row has fewer.

    confidence (N,) float belongs to the N True positions of candidates (B, L), row-major; k int, or (B, 1) long.
    """
    score = torch.full(candidates.shape, -torch.inf, device=candidates.device)
    score[candidates] = confidence.float()
    best = score.sort(dim=1, descending=True, stable=True).indices  # (B, L)
    first_k = (torch.arange(best.shape[1], device=best.device) < k).expand_as(best)
    return torch.zeros_like(candidates).scatter_(1, best, first_k) & candidates


def through_eos(x: Tensor, completion: Tensor, eos_ids: Sequence[int]) -> Tensor:
    """Completion positions up to and including each row's first EOS, (B, L) bool. No EOS: all of them."""
    eos = torch.isin(x, torch.tensor(list(eos_ids), dtype=x.dtype, device=x.device)) & completion
    return completion & (eos.cumsum(1) - eos.long() == 0)  # no EOS strictly before


def guided(conditional: Denoise, unconditional: Denoise, scale: float) -> Denoise:
    """Classifier-free guidance as a `denoise`: l_u + (1 + scale)(l_c - l_u); scale 0 is no guidance, and one call."""
    if scale == 0:
        return conditional

    def call(x: Tensor, positions: Tensor) -> Tensor:
        c, u = conditional(x, positions), unconditional(x, positions)
        # a token forbidden by a logit of -inf stays forbidden: -inf - -inf would be nan
        return torch.where(c.isneginf(), c, u + (1 + scale) * (c - u))

    return call


# --- The loop of all samplers -----------------------------------------------------------------------------------------

Read = Callable[[Tensor], Tensor]  # what is unfinished (B, L) bool -> the candidates among it (B, L) bool
# (step counted from 0, logits (N, V), candidates) -> tokens (N,) long, and which of them to keep (B, L) bool
Step = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
alone = lambda finished: finished  # one process need not ask the others


@torch.no_grad()
def fill(
    denoise: Denoise,
    x: Tensor,
    completion: Tensor,
    read: Read,
    step: Step,
    *,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    first_id: int = 0,
    everyone: Callable[[bool], bool] = alone,
) -> Rollout:
    """Predict, draw, keep some, until the masked completion of x (B, L) long is full; completion (B, L) bool.

    Every process makes the same number of forwards, so that sharded models cannot hang: before each one
    `everyone(finished)` is asked, and answers whether all processes have finished. A completion may start
    anywhere in a row, and have gaps. eos_ids may be empty: then nothing ends early. first_id: the token that
    the first column of the logits stands for.
    """
    x, masked = x.clone(), completion.clone()
    unmask_step = torch.full_like(x, -1)
    forwards = 0
    while True:
        unfinished = masked & through_eos(x, completion, eos_ids)  # what still has to be decoded, (B, L)
        if everyone(not bool(unfinished.any())):
            break
        candidates = read(unfinished)
        tokens, reveal = step(forwards, denoise(x, candidates), candidates)
        x[reveal] = tokens[reveal[candidates]] + first_id
        unmask_step[reveal] = forwards
        masked &= ~reveal
        forwards += 1
    return Rollout(x.masked_fill(masked, pad_id), unmask_step, forwards)  # behind an EOS some are still masked


# --- Text: semi-autoregressive blocks, most confident first -----------------------------------------------------------


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
    eos_last: bool = False,
    threshold: float = 1.0,
    **rest,
) -> Rollout:
    """Fill the masked completion of x (B, L) long block by block; completion (B, L) bool; rest: of `fill`, as eos_ids.

    Until it has ended a row takes ceil(block_length / k) forwards per block; fewer by what is surer than `threshold`.
    """
    block = torch.where(completion, (completion.cumsum(1) - 1) // block_length, -1)  # (B, L)

    def read(unfinished: Tensor) -> Tensor:
        return unfinished & (block == block.masked_fill(~unfinished, x.shape[1]).amin(1, keepdim=True))

    def step(n: int, logits: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """(a token (N,) long for each candidate, which of them stay (B, L) bool) of forward n; logits (N, V)."""
        noise = exponential_noise(candidates, 1, generator)[:, 0] if temperature > 0 else None
        tokens = draw(logits, temperature, noise)
        confidence = confidence_of(logits, tokens)
        if eos_last:
            confidence -= 1e4 * torch.isin(tokens, torch.tensor(list(eos_ids), device=x.device))  # behind all others
        sure = candidates.masked_scatter(candidates, confidence > math.log(threshold))
        return tokens, sure | most_confident(confidence, candidates, tokens_per_step)

    return fill(denoise, x, completion, read, step, eos_ids=eos_ids, **rest)


# --- Images: emerge (Alg. 4) and MaskGIT, over all of the completion at once ------------------------------------------

# alpha_t, the share of visible tokens, of the time t that falls from 1 to 0. Cosine reveals few at first.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda t: 1 - math.sin(math.pi / 2 * t),
    "linear": lambda t: 1 - t,
}

# What is left of MaskGIT's noise at step n = 0 ... steps - 1: falling linearly to 0, from 4.5 in MaskGIT itself, or
# multiplied by each step's 1 - (n + 1) / steps, from 1 in MMaDA's and MaskGRPO's code: soon all but gone.
DECAYS: dict[str, Callable[[int, int], float]] = {
    "linear": lambda n, steps: 1 - (n + 1) / steps,
    "compounding": lambda n, steps: math.prod(1 - (i + 1) / steps for i in range(n + 1)),
}


def alphas(schedule: str, n: int, steps: int) -> tuple[float, float]:
    """(alpha_t, alpha_s) of step n = 0 ... steps - 1; the last step's alpha_s is 1 exactly."""
    alpha = SCHEDULES[schedule]
    return alpha(1 - n / steps), alpha(1 - (n + 1) / steps) if n + 1 < steps else 1.0


def emerge_probabilities(pi: Tensor, alpha_t: float, alpha_s: float) -> Tensor:
    """Alg. 4: q_s = (alpha_s - alpha_t) / (1 - alpha_t) pi + delta_m (1 - alpha_s) / (1 - alpha_t).

    pi (N, V) float -> (N, V + 1) of the same dtype, rows summing to 1; the last column is m, "stays masked".
    """
    stays = (1 - alpha_s) / (1 - alpha_t)
    return torch.cat([(1 - stays) * pi, pi.new_full((len(pi), 1), stays)], dim=-1)


def emerge_step(logits: Tensor, alpha_t: float, alpha_s: float, temperature: float, noise: Tensor):
    """One step of Alg. 4: (tokens (N,) long, emerged (N,) bool) from q_s; logits (N, V), noise (N,) of Exp(1)."""
    pi = (logits.float() / temperature).softmax(-1)
    outcome = inverse_cdf(emerge_probabilities(pi, alpha_t, alpha_s), (-noise).exp())
    return outcome, outcome < logits.shape[-1]


def maskgit_step(logits: Tensor, candidates: Tensor, kept: Tensor, temperature: float, gumbel: float, noise: Tensor):
    """One step of MaskGIT: (tokens (N,) long, reveal (B, L) bool). Of each row's candidates all but `kept` (B, 1) long
    are revealed, at least one, those of the highest log pi(token) + gumbel x Gumbel noise; noise (N, 2) of Exp(1)."""
    tokens = draw(logits, temperature, noise[:, 0])
    confidence = confidence_of(logits, tokens) - gumbel * noise[:, 1].log()
    return tokens, most_confident(confidence, candidates, (candidates.sum(1, keepdim=True) - kept).clamp(min=1))


def emerge(
    denoise, x: Tensor, completion: Tensor, *, steps: int, schedule: str, temperature: float, generator: Noise, **rest
) -> Rollout:
    """Fill the completion in at most `steps` forwards by Alg. 4: each token emerges by itself, the last step reveals
    what is left. schedule: a row of SCHEDULES; temperature > 0; rest: first_id and everyone of `fill`."""

    def step(n: int, logits: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        noise = exponential_noise(candidates, 1, generator)[:, 0]
        tokens, emerged = emerge_step(logits, *alphas(schedule, n, steps), temperature, noise)
        return tokens, candidates.masked_scatter(candidates, emerged)

    return fill(denoise, x, completion, lambda unfinished: unfinished, step, **rest)


def maskgit(
    denoise: Denoise,
    x: Tensor,
    completion: Tensor,
    *,
    steps: int,
    schedule: str,
    temperature: float,
    generator: Noise,
    gumbel: float = 1.0,
    decay: str = "compounding",
    **rest,
) -> Rollout:
    """Fill the completion in at most `steps` forwards as MaskGIT does: after step n, floor((1 - alpha_s) |o|) tokens
    are still masked. gumbel: weight of the choice's noise, which falls by a row of DECAYS; the rest as in `emerge`."""
    length = completion.sum(1, keepdim=True)  # |o|, (B, 1)

    def step(n: int, logits: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        noise = exponential_noise(candidates, 2, generator)
        kept = ((1 - alphas(schedule, n, steps)[1]) * length).floor().long()
        return maskgit_step(logits, candidates, kept, temperature, gumbel * DECAYS[decay](n, steps), noise)

    return fill(denoise, x, completion, lambda unfinished: unfinished, step, **rest)


SAMPLERS = {"semi_autoregressive": semi_autoregressive, "emerge": emerge, "maskgit": maskgit}


# --- Tokens -> pixels: the decoder of MAGVIT-v2 -----------------------------------------------------------------------


class ResnetBlock(nn.Module):
    """x + f(x) with f = conv(swish(norm(conv(swish(norm(x)))))); a 1x1 convolution carries x to another width."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, width, 1e-6), nn.Conv2d(width, out, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(32, out, 1e-6), nn.Conv2d(out, out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class AttnBlock(nn.Module):
    """x + attention among all places of x, one head."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(32, width, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).mT for conv in (self.q, self.k, self.v))  # (B, places, C)
        return x + self.proj_out(F.scaled_dot_product_attention(q, k, v).mT.reshape(x.shape))


class MagvitDecoder(nn.Module):
    """The image tokenizer's decoder that Show-o published and MMaDA uses (MAGVIT-v2, arXiv 2310.05737), its parameters
    and sizes under their published names: channels at the finest level, of each level in units of ch and residual
    blocks of each level, both finest first, and the bits of a code. The defaults are showlab/magvitv2's."""

    def __init__(self, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=(4, 4, 3, 4, 3), z_channels=13):
        super().__init__()
        named = lambda **modules: nn.Sequential(OrderedDict(modules))
        width, bits, self.bits = ch * ch_mult[-1], z_channels, z_channels
        self.post_quant_conv, self.conv_in = nn.Conv2d(bits, bits, 1), nn.Conv2d(bits, width, 3, padding=1)
        self.mid = named(block_1=ResnetBlock(width, width), attn_1=AttnBlock(width), block_2=ResnetBlock(width, width))
        levels = []
        for level, (multiple, count) in reversed([*enumerate(zip(ch_mult, num_res_blocks))]):  # coarsest first
            out = ch * multiple
            parts = {"block": nn.Sequential(*(ResnetBlock(out if i else width, out) for i in range(count)))}
            if level:
                parts["upsample"] = named(nearest=nn.Upsample(scale_factor=2), conv=nn.Conv2d(out, out, 3, padding=1))
            levels.append(named(**parts))
            width = out
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out, self.conv_out = nn.GroupNorm(32, width, 1e-6), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, codes: Tensor) -> Tensor:
        """(B, h * h) long codes, row by row -> (B, 3, H, H) float, about -1 to 1; H is 16 h as published."""
        # Lookup-free quantisation: a code's bits, the most significant first, are its vector of -1 and 1
        z = codes[:, None, :] >> torch.arange(self.bits - 1, -1, -1, device=codes.device)[:, None] & 1
        h = (2 * z - 1).to(self.conv_in.weight.dtype).unflatten(-1, (math.isqrt(codes.shape[1]), -1))
        h = self.mid(self.conv_in(self.post_quant_conv(h)))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))

    @torch.no_grad()
    def pixels(self, codes: Tensor, batch: int = 8) -> Tensor:
        """(B, h * h) long codes -> (B, H, H, 3) uint8, `batch` images at a time. ValueError for codes that are no
        square, or outside the codebook."""
        if math.isqrt(codes.shape[1]) ** 2 != codes.shape[1] or not (0 <= codes.min() and codes.max() < 2**self.bits):
            raise ValueError(f"an image is a square of codes from 0 to {2**self.bits - 1}; MMaDA's has 32 x 32")
        images = torch.cat([self(part) for part in codes.to(self.conv_in.weight.device).split(batch)])
        return (127.5 * (images.float().clamp(-1, 1) + 1)).round().to(torch.uint8).permute(0, 2, 3, 1)


def load_magvit(where: str, device: str | torch.device = "cpu") -> MagvitDecoder:
    """The decoder from a weights file, a folder that holds one, or a hub id such as showlab/magvitv2; the sizes from
    config.json beside it where that names any. The encoder's weights are skipped. Raises ValueError, one line."""
    try:
        path = Path(where)
        if not path.exists():
            path = Path(snapshot_download(where, allow_patterns=["config.json", "*.safetensors", "*.bin", "*.pth"]))
        files = [file for kind in ("*.safetensors", "*.bin", "*.pth") for file in sorted(path.glob(kind))]
        file = path if path.is_file() else files[0]
        beside, names = file.with_name("config.json"), ("ch", "ch_mult", "num_res_blocks", "z_channels")
        raw = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        with torch.device("meta"):
            decoder = MagvitDecoder(**{name: raw[name] for name in names if name in raw})
        weights = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        own = {name.removeprefix("decoder."): w.float() for name, w in weights.items() if name.startswith("decoder.")}
        decoder.load_state_dict(own, assign=True)
    except Exception as error:  # what the hub, a broken file or nonsensical sizes raise has no common class
        reason = "no weights file" if isinstance(error, IndexError) else " ".join(str(error).split())[:300]
        raise ValueError(f"{where}: not to be had as a MAGVIT-v2 decoder ({reason})") from None
    return decoder.requires_grad_(False).eval().to(device)


# --- python emerge_sampler.py -----------------------------------------------------------------------------------------


class Joint:
    """A distribution over all sequences of n tokens from v words, and its exact conditionals as a denoiser.

    With variants (one int per word) each word is spelled by so many interchangeable codes, as a picture's patch is in
    a large codebook; the tokens are codes then, and `word` (codes + 1,) long maps them to words. The mask comes last.
    """

    def __init__(self, log_joint: Tensor, variants: Sequence[int] | None = None):
        """log_joint: (v, ..., v) float64, n dimensions, normalised."""
        self.log_joint, self.n, self.v = log_joint, log_joint.dim(), log_joint.shape[0]
        self.variants = torch.tensor(variants or [1] * self.v)
        self.word = torch.arange(self.v + 1).repeat_interleave(torch.cat([self.variants, torch.ones(1, dtype=int)]))
        self.mask = len(self.word) - 1
        self.cache: dict[tuple[int, ...], Tensor] = {}

    def conditionals(self, row: tuple[int, ...]) -> Tensor:
        """log p(word at n | visible words of row) at every position, (n, v) float64."""
        if row not in self.cache:
            seen = self.log_joint[tuple(slice(None) if w == self.v else slice(w, w + 1) for w in row)]
            tables = []
            for n in range(self.n):
                table = seen.logsumexp([m for m in range(self.n) if m != n])
                tables.append(table.expand(self.v) - seen.logsumexp(list(range(self.n))))
            self.cache[row] = torch.stack(tables)
        return self.cache[row]

    def denoise(self, x: Tensor, positions: Tensor) -> Tensor:
        rows, same = self.word[x].unique(dim=0, return_inverse=True)
        log_p = torch.stack([self.conditionals(tuple(row)) for row in rows.tolist()])[same][positions]
        return (log_p - self.variants.log())[:, self.word[:-1]]  # (N, codes)


def markov_chain(n: int, v: int) -> Tensor:
    """log of a joint in which neighbours agree: stay with probability .7, else any other word, (v, ..., v)."""
    log_joint = torch.zeros([v] * n, dtype=torch.float64)
    for word in itertools.product(range(v), repeat=n):
        for a, b in itertools.pairwise(word):
            log_joint[word] += torch.log(torch.tensor(0.7 if a == b else 0.3 / (v - 1)))
    return log_joint - log_joint.flatten().logsumexp(0)


def compare(joint: Joint, rows: int, sampler: Callable, **settings) -> tuple[float, float, list[float]]:
    """Total variation of the drawn words to the truth, their entropy in bits, tokens revealed per step and row."""
    x = torch.full((rows, joint.n), joint.mask)
    settings = dict(temperature=1.0, generator=torch.Generator().manual_seed(0)) | settings
    out = sampler(joint.denoise, x, torch.ones_like(x, dtype=torch.bool), **settings)
    flat = (joint.word[out.x] * joint.v ** torch.arange(joint.n - 1, -1, -1)).sum(1)
    drawn = flat.bincount(minlength=joint.v**joint.n) / rows
    distance = 0.5 * (drawn - joint.log_joint.flatten().exp()).abs().sum()
    entropy = -(drawn * drawn.clamp(min=1e-12).log2()).sum()
    return float(distance), float(entropy), (out.unmask_step.flatten().bincount() / rows).tolist()


def show_text(joint: Joint, rows: int) -> None:
    """Blocks and tokens per step of the text sampler."""
    print(f"{'block':>5} {'tokens/step':>11} {'forwards':>8} {'total variation':>15} {'entropy, bits':>13}")
    for block_length, k in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)):
        settings = dict(block_length=block_length, tokens_per_step=k, eos_ids=(), pad_id=0)
        distance, entropy, revealed = compare(joint, rows, semi_autoregressive, **settings)
        print(f"{block_length:>5} {k:>11} {len(revealed):>8} {distance:>15.3f} {entropy:>13.2f}")
    print(
        "\nBlocks of 1 draw left to right and are exact. Most-confident-first is not, even at one token"
        "\nper step: it draws everywhere and keeps what came out likely, so likely words win too often."
        "\nSeveral tokens per step ignore each other: neighbours stop agreeing and the entropy rises.\n"
    )


def show_images(log_joint: Tensor, rows: int) -> None:
    """The two image samplers by number of steps, and on larger and larger codebooks."""
    print("Images, cosine schedule: total variation, entropy, tokens revealed per step; 4.5: MaskGIT's own noise")
    samplers = {"emerge": emerge, "maskgit": maskgit, "maskgit 4.5": partial(maskgit, gumbel=4.5, decay="linear")}
    for name, sampler in samplers.items():
        for steps in (1, 2, 4, 8, 32):
            distance, entropy, revealed = compare(Joint(log_joint), rows, sampler, steps=steps, schedule="cosine")
            shown = " ".join(f"{n:.2f}" for n in revealed[:8]) + (" ..." if len(revealed) > 8 else "")
            print(f"{name:<11} {steps:>3} steps {distance:>7.3f} {entropy:>6.2f} bits   {shown}")
    print(
        "\nEmerge converges to the truth as the steps grow; MaskGIT, with little noise, stays too sure."
        "\nTotal variation on larger codebooks, 8 steps: m codes spell a word."
    )
    print(f"{'m':<24}" + "".join(f"{m:>7}" for m in (1, 8, 64)))
    for name, sampler in samplers.items():
        for kind, first in (("every word", lambda m: m), ("all but one", lambda m: 1)):
            joints = [Joint(log_joint, [first(m), m, m]) for m in (1, 8, 64)]
            cells = [compare(joint, rows, sampler, steps=8, schedule="cosine")[0] for joint in joints]
            print(f"{name + ', ' + kind:<24}" + "".join(f"{value:>7.3f}" for value in cells))
    print(
        "\nEmerge does not look at confidence. MaskGIT prefers what one code spells to what many share, however"
        "\nlikely: flat patches over textured ones. Where all words have as many codes it does not matter."
    )


def streaks(x: Tensor, positions: Tensor, v: int = 6, stay: float = 0.85) -> Tensor:
    """The exact `denoise` of rows that are Markov chains as in markov_chain, of any length; the mask token is v.

    p(x_i | nearest visible neighbours a and b) = P^d[a, x_i] P^e[x_i, b] / Z with their distances d and e.
    """
    change = (1 - stay) / (v - 1)
    # P^d has stay_d on its diagonal, the rest is shared; d = infinity, nothing visible there: uniform
    power = lambda d: (stay - change) ** d
    log_p = torch.zeros(*x.shape, v)
    place = torch.arange(x.shape[1]).expand_as(x)
    for reverse in (False, True):
        tokens, at = (x.flip(1), place) if reverse else (x, place)
        last = torch.where(tokens < v, at, -1).cummax(1).values  # the nearest visible one at or before i
        same = F.one_hot(tokens.gather(1, last.clamp(min=0)), v + 1)[..., :v] * power((at - last).float())[..., None]
        side = (same + (1 - same.sum(-1, keepdim=True)) / v).where(last[..., None] >= 0, 1 / v).log()
        log_p += side.flip(1) if reverse else side
    return log_p[positions]


def draw_emerging(path: str = "emerge_sampler.png", size: int = 48, steps: int = 12, v: int = 6) -> None:
    """A picture appearing under both samplers: each row is a chain whose neighbours agree with probability .85."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("\n(pip install matplotlib, and this also draws emerge_sampler.png)")
        return
    shown = (0, 2, 5, 8, 10, 11)
    figure, axes = plt.subplots(2, len(shown), figsize=(1.7 * len(shown), 3.9))
    for row, (name, sampler) in zip(axes, (("emerge", emerge), ("MaskGIT", maskgit))):
        x = torch.full((size, size), v)
        settings = dict(steps=steps, schedule="cosine", temperature=1.0, generator=torch.Generator().manual_seed(0))
        out = sampler(streaks, x, torch.ones_like(x, dtype=torch.bool), **settings)
        for ax, n in zip(row, shown):
            picture = out.x.float().masked_fill(out.unmask_step > n, torch.nan)
            ax.imshow(picture, cmap="viridis", vmin=0, vmax=v - 1)
            ax.set_title(f"{name}, step {n + 1}", fontsize=8)
            ax.axis("off")
    figure.savefig(path, dpi=130, bbox_inches="tight")
    print(f"\npicture: {path}")


def main() -> None:
    """Parallel decoding against a joint distribution known in closed form."""
    joint, rows = Joint(markov_chain(4, 3)), 20_000
    p = joint.log_joint.flatten().exp()
    exact = torch.multinomial(p, rows, True, generator=torch.Generator().manual_seed(0)).bincount(minlength=len(p))
    floor = float(0.5 * (exact / rows - p).abs().sum())
    print(f"A chain of 4 tokens over 3 words, neighbours agree with probability .7; {rows:,} samples, T = 1.")
    print(f"Truth: {float(-(p * p.log2()).sum()):.2f} bits of entropy; distance of as many exact samples {floor:.3f}\n")
    show_text(joint, rows)
    show_images(joint.log_joint, rows)
    draw_emerging()


if __name__ == "__main__":
    main()
