"""UPO: unmasking policy optimisation, in one file. The base model is frozen; the order learns.

Paper: "Improving Discrete Diffusion Unmasking Policies Beyond Explicit Reference Policies", ICLR 2026.
One step: prompts -> G trajectories each, in which g picks a masked position and the frozen model fills it
-> rewards -> group advantages -> mu passes of a clipped policy gradient on g, held to a reference order.
Without --model the tiny base of maskgrpo.py is trained first; published checkpoints run through the same lines.

    symbol        shape            meaning
    x_n, x_0      (B, W) long      the sequence with n tokens of its completion masked; the finished one
    a_n           (S,) long        the position that is revealed in x_n
    g, g_old      (U, W) float32   the policy, log g(a | x_n); as it was in the rollout
    g_ref         (U, W) float32   the reference: max_confidence, softmax_confidence, topk
    L             (B,) long        steps of a trajectory, one position each
    S, U, W       int              steps of a batch's trajectories; different states x_n among them; columns of x
    rho, A, G     (S,), (B,), int  g / g_old at a_n; advantage; group size
    K, tau        int, float       of topk and softmax_confidence

Departures from the paper
 1. Proposition 1 is used as it is meant: the token-level surrogate has the gradient of the output-level
    objective only at g = g_old, and up to the factor 1 / L (tests/test_upo.py measures both).
 2. The KL of the softmax_confidence and topk references is the KL over trajectories, an upper bound of
    the output-level one; its gradient is estimated (`kl_gradient`), its value is only reported.
 3. Sudoku: the clues stand in the completion and only its blanks are masked, so L is the number of empty
    cells. Top-8 probabilities are given at the candidates; elsewhere they are 0.
Departures from the authors' code
 4. Left padding is attended to by no one, so an action does not depend on the batch it was taken in.
 5. Everything on trajectories stays in log space and float32; no product of probabilities is formed.
 6. The head is the paper's 134M one; `--head block` copies the base's last block, as their code does. A base
    with rotary positions has no absolute ones in its hidden states: the head's layer adds them (`sinusoids`).
 7. Log-probabilities of positions are taken at the temperature that positions are sampled at.
 8. --steps_per_update draws its steps stratified over the trajectory, with known inclusion probability.

    python upo.py --task sudoku --ref topk                 # the tiny default, minutes on a laptop
    accelerate launch upo.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct
    python upo.py --task gsm8k --model runs/maskgrpo-...   # on top of what maskgrpo.py has trained
    python upo.py --resume --output_dir runs/NAME          # goes on where a run was stopped
    python upo.py --eval_only --policy runs/NAME [--data FILE.csv] [--model OTHER]    # transfer
"""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import rewards
from emerge_sampler import draw, exponential_noise, through_eos
from maskgrpo import (
    BETAS,
    Batch,
    MaskedDiffusionModel,
    Parser,
    Run,
    UsageError,
    base_path,
    check_ranges,
    cli,
    ends_of,
    first_line,
    group_advantages,
    is_tiny,
    load_checkpoint,
    load_model,
    load_splits,
    mean_of,
    open_batch,
    open_log,
    open_run,
    option,
    parse,
    read_json,
    require,
    save_checkpoint,
    say_settings,
    shuffled,
    texts_of,
    write_atomically,
)
from remask import seeded
from rewards import TASKS, Problem

TOP = 8  # token probabilities that the policy sees of each candidate
PASS_AT = (1, 2, 4, 8, 16)

# ---------------------------------------------------------------------------------------------
# Configuration: one field per flag. Two defaults where they follow the model.
# ---------------------------------------------------------------------------------------------

# A reference is a row of choices; a flag given by hand wins over its row.
REFERENCES = {
    "max_confidence": dict(init="pretrained", beta=1e-4),
    "softmax_confidence": dict(init="pretrained", beta=1e-4),
    "topk": dict(init="random", beta=1e-4),
    "none": dict(init="random", beta=0.0),  # stands for DColT
}


@dataclasses.dataclass
class Config:
    """Every setting of a run. Published checkpoints default to the paper's values, the tiny model to its own."""

    # what runs
    task: str = option(
        "task, a row of rewards.TASKS", "sudoku", choices=tuple(t for t in TASKS if not TASKS[t].codebook)
    )
    ref: str = option("reference order, a row of REFERENCES", "topk", choices=tuple(REFERENCES))
    model: str = option("frozen base: hub id, or path of a model or run; default: the tiny one, trained here")
    data: str = option('training problems, a FILE or "generated"; default: published, for tiny generated')
    eval_data: str = option("held-out problems, a FILE; default: published, or every tenth of --data")
    allow_code_execution: bool = option("task mbpp: run the programs that the model writes, in a sandbox", False)
    seed: int = option("seed of everything random", 0, within="[0, 4294967295]")
    output_dir: str = option("run directory; default runs/upo-TASK-REF-MODEL-sSEED")
    max_steps: int = option("RL steps (rollouts); the paper's sudoku run has 3500", paper=3500, tiny=350)
    resume: bool = option("go on from the last checkpoint in --output_dir", False)
    eval_only: bool = option("evaluate --policy, on all of --data where a FILE is given, and leave", False)
    policy: str = option("--eval_only: run directory of a trained policy; its base too, unless --model names another")
    log_with: str = option("a tracker of Accelerate's: tensorboard, wandb, ...")
    save_every: int = option("steps between checkpoints, 0: only when stopped", paper=20, tiny=25)
    bf16: bool = option("base and features in bfloat16", paper=torch.cuda.is_available(), tiny=False)
    # rollout
    gen_length: int = option("completion length, tokens", paper=256, tiny=16, within="[1, inf)")
    block_length: int = option(
        "tokens per semi-autoregressive block, what a position is chosen from", paper=32, tiny=4, within="[1, inf)"
    )
    temperature: float = option("of the tokens, 0: argmax, as in the official evaluation", 0.0, within="[0, 10]")
    position_temperature: float = option("of the positions, in rollouts", paper=0.8, tiny=1.0, within="(0, 10]")
    # policy and reference
    head: str = option("the paper's layer, or a copy of the base's last block", "layer", choices=("layer", "block"))
    heads: int = option("attention heads of the layer", paper=32, tiny=4, within="[1, inf)")
    feedforward: int = option("width of the layer's feed-forward part, 0: half the base's width", 0)
    topk: int = option("K of topk and topk_random", 5, within="[1, inf)")
    tau: float = option("temperature of softmax_confidence", 0.05, within="(0, inf)")
    init: str = option("random, or by cross-entropy to the reference first", choices=("random", "pretrained"))
    init_steps: int = option("steps of that cross-entropy", paper=500, tiny=10)
    init_lr: float = option("AdamW learning rate of that cross-entropy", paper=1e-4, tiny=2e-3, within="(0, inf)")
    # GRPO
    group_size: int = option("G, trajectories per prompt", paper=6, tiny=8, within="[2, inf)")
    batch_size: int = option(
        "trajectories per process and rollout, a multiple of G", paper=6, tiny=256, within="[1, inf)"
    )
    minibatch_size: int = option("trajectories per process and update", paper=6, tiny=64, within="[1, inf)")
    mu: int = option("passes over the minibatches of a rollout", paper=16, tiny=2, within="[1, inf)")
    steps_per_update: int = option("steps of each trajectory that an update sees, 0: all", paper=32, tiny=0)
    offload: bool = option("keep the rollout's features in CPU memory", False)
    advantage: str = option(
        "divide by the group's std or only subtract its mean", paper="std", tiny="mean", choices=("std", "mean")
    )
    beta: float = option("weight of the divergence from the reference")
    clip: float = option("PPO clip of the ratio", paper=0.5, tiny=0.2, within="(0, 1)")
    lr: float = option("AdamW learning rate after warm-up", paper=3e-6, tiny=2e-3, within="(0, inf)")
    lr_decay: bool = option("linearly to zero at max_steps, instead of constant", paper=False, tiny=True)
    warmup: int = option("steps of linear warm-up", paper=100, tiny=5)
    weight_decay: float = option("AdamW weight decay", paper=0.1, tiny=0.0)
    max_grad_norm: float = option("gradient norm is clipped to this", paper=0.2, tiny=1.0, within="(0, inf)")
    # evaluation
    eval_n: int = option("held-out problems of the table, 0: all", paper=0, tiny=4000)
    eval_every: int = option("steps between looks at 256 validation problems, 0: never", paper=250, tiny=50)
    eval_batch_size: int = option(
        "trajectories per process and batch of evaluation", paper=32, tiny=1024, within="[1, inf)"
    )
    pass_n: int = option("held-out problems for pass@N of random and top-K orders, 0: none", paper=0, tiny=200)


def check(cfg: Config) -> None:
    """Raise UsageError for a value out of range or a combination that makes no sense, naming its flag."""
    check_ranges(cfg)
    positions = min(cfg.block_length, cfg.gen_length)
    generated = cfg.data == "generated" or (cfg.data is None and is_tiny(cfg.model))
    same = lambda path: path is not None and Path(path).resolve() == Path(cfg.output_dir).resolve()
    rules = {
        f"--batch_size {cfg.batch_size} is not a multiple of --group_size {cfg.group_size}": not cfg.batch_size
        % cfg.group_size,
        f"--batch_size {cfg.batch_size} is not a multiple of --minibatch_size {cfg.minibatch_size}": not cfg.batch_size
        % cfg.minibatch_size,
        f"--topk {cfg.topk}: at most {positions} positions are masked at once (--block_length)": cfg.topk <= positions
        or cfg.ref != "topk",
        "--eval_only needs --policy, the run directory of a trained policy": cfg.policy or not cfg.eval_only,
        "--policy needs --eval_only": cfg.eval_only or not cfg.policy,
        "--ref none has no reference: --init random, --beta 0": cfg.ref != "none"
        or (cfg.init == "random" and not cfg.beta),
        "--eval_data needs published problems; generated ones have their own": not (cfg.eval_data and generated)
        or cfg.eval_only,
        f"--output_dir {cfg.output_dir} is the run that is read; name another": not same(cfg.policy)
        and not same(cfg.model),
    }
    require(rules)


# ---------------------------------------------------------------------------------------------
# The references: log g_ref(a | x_n), pure functions of the base's confidence
# ---------------------------------------------------------------------------------------------


def max_confidence(confidence: Tensor, candidates: Tensor) -> Tensor:
    """log g_ref (S, W): one on the most confident candidate, shared between ties. confidence (S, W) float32 is the
    largest token probability of each position, candidates (S, W) bool; -inf where g_ref is 0."""
    best = candidates & (confidence == confidence.masked_fill(~candidates, -1).amax(1, keepdim=True))
    return torch.where(best, -best.sum(1, keepdim=True).float().log(), -torch.inf)


def softmax_confidence(confidence: Tensor, candidates: Tensor, tau: float) -> Tensor:
    """log g_ref (S, W): log softmax of confidence / tau over the candidates; shapes as in max_confidence."""
    return (confidence / tau).masked_fill(~candidates, -torch.inf).log_softmax(1)


def most_confident_k(confidence: Tensor, candidates: Tensor, k: int) -> Tensor:
    """The k most confident candidates (S, W) bool, of ties the leftmost; all of them where there are fewer."""
    order = confidence.masked_fill(~candidates, -1).sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(candidates).scatter_(1, order[:, :k], True) & candidates


def uniform(allowed: Tensor) -> Tensor:
    """log of the uniform distribution over allowed (S, W) bool; topk's g_ref over its most confident positions."""
    return torch.where(allowed, -allowed.sum(1, keepdim=True).float().log(), -torch.inf)


def log_reference(cfg: Config, confidence: Tensor, allowed: Tensor) -> Tensor:
    """log g_ref (S, W) of cfg.ref over the positions that the policy may choose; none: uniform, with beta 0."""
    if cfg.ref == "max_confidence":
        return max_confidence(confidence, allowed)
    if cfg.ref == "softmax_confidence":
        return softmax_confidence(confidence, allowed, cfg.tau)
    return uniform(allowed)


# Orders to compare with: name -> (score of a position from its token log-probabilities (N, V), is it sampled?).
# Sampled scores are log-probabilities up to a constant per row; of the others the highest is taken.
ORDERS: dict[str, tuple[Callable[[Tensor, float], Tensor], bool]] = {
    "random": (lambda log_p, tau: torch.zeros(len(log_p), device=log_p.device), True),
    "max_confidence": (lambda log_p, tau: log_p.amax(1), False),
    "margin": (lambda log_p, tau: log_p.exp().topk(2, dim=1).values.diff(dim=1)[:, 0].neg(), False),
    "entropy": (lambda log_p, tau: -torch.special.entr(log_p.exp()).sum(1), False),
    "softmax_confidence": (lambda log_p, tau: log_p.amax(1).exp() / tau, True),
    "topk_random": (lambda log_p, tau: torch.zeros(len(log_p), device=log_p.device), True),  # restricted to top K
}

# ---------------------------------------------------------------------------------------------
# The policy: one transformer layer and an MLP over what the frozen base sees
# ---------------------------------------------------------------------------------------------


class State(NamedTuple):
    """What g sees of U partly masked sequences x_n. hidden (U, W, D): the hidden state that enters the base's last
    block; top (U, W, 8) float32: the largest token probabilities at the candidates, 0 elsewhere; (U, W) bool:
    attention (False at padding), masked, candidates (masked and in the current block), allowed (g's support)."""

    hidden: Tensor
    top: Tensor
    attention: Tensor
    masked: Tensor
    candidates: Tensor
    allowed: Tensor


def sinusoids(position: Tensor, width: int) -> Tensor:
    """Sines and cosines of position (U, W) long at width / 2 frequencies spaced evenly up to pi, (U, W, width) float32.

    Positions less than width / 2 apart have orthogonal codes, so that one linear map can point attention at any of
    them. The usual geometric spacing spends most of a narrow width on wavelengths far beyond the sequence.
    """
    rate = math.pi * (torch.arange(width // 2, device=position.device) + 0.5) / (width // 2)
    angle = position[..., None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


class UnmaskingPolicy(nn.Module):
    """g: State -> log g(a | x_n). width: of the base's hidden states. For LLaDA-8B's 4096 it has 134.5M parameters."""

    def __init__(self, width: int, heads: int = 32, feedforward: int = 0, block: nn.Module | None = None):
        super().__init__()
        self.block = block  # of `last_block`, instead of the layer
        if block is None:
            self.layer = nn.TransformerEncoderLayer(
                width, heads, feedforward or width // 2, 0.0, "gelu", batch_first=True, norm_first=True
            )
        inputs = width + 2 + TOP
        hidden = [part for _ in range(3) for part in (nn.Linear(inputs, inputs), nn.GELU())]
        self.mlp = nn.Sequential(*hidden, nn.Linear(inputs, 1))

    def forward(self, hidden, top, attention, masked, candidates, allowed, temperature: float = 1.0) -> Tensor:
        """The fields of a State -> log g at the position temperature, (U, W) float32, -inf where not allowed."""
        # the residual stream of an 8B model has outliers of several hundred: bring it to unit scale, in float32
        h = F.layer_norm(hidden.float(), hidden.shape[-1:])
        position = (attention.cumsum(1) - 1).clamp(min=0)  # counted from the first token behind the padding
        if self.block is None:
            h = self.at_allowed(h + sinusoids(position, h.shape[-1]), attention, allowed)
        else:
            h = self.block(inputs_embeds=hidden.float(), attention_mask=attention.long(), position_ids=position)[0]
            h = F.layer_norm(h[allowed].float(), h.shape[-1:])
        flags = torch.stack([candidates, masked], dim=-1)[allowed]  # in the current block?, masked?
        with torch.autocast(h.device.type, enabled=False):  # a score in bf16 would move rho by 1%
            scores = self.mlp(torch.cat([h.float(), flags, top[allowed]], dim=-1))[:, 0]
        log_g = torch.full(allowed.shape, -torch.inf, device=scores.device).masked_scatter(
            allowed, scores / temperature
        )
        return log_g.log_softmax(1)  # softmax over the candidates only

    def at_allowed(self, h: Tensor, attention: Tensor, allowed: Tensor) -> Tensor:
        """The layer's output where g is not 0, (S, D) row-major: all others are keys and values and nothing more."""
        first = allowed.long().argsort(dim=1, descending=True, stable=True)[:, : int(allowed.sum(1).max())]
        here = first[..., None].expand(-1, -1, h.shape[-1])  # each row's allowed positions, then some others
        layer, normed = self.layer, self.layer.norm1(h)
        # on a CPU PyTorch's fused attention is slower than its plain one for sequences this short
        with sdpa_kernel(SDPBackend.MATH) if h.device.type == "cpu" else contextlib.nullcontext():
            queries = normed.gather(1, here)
            attended, _ = layer.self_attn(queries, normed, normed, key_padding_mask=~attention, need_weights=False)
        x = (h.gather(1, here) + attended)[allowed.gather(1, first)]
        return x + layer.linear2(F.gelu(layer.linear1(layer.norm2(x))))


def last_block(model: MaskedDiffusionModel) -> nn.Module:
    """A trainable copy of the base's last block, in transformers' own model, which makes its masks and rotations."""
    body = model.hf.base_model
    if not isinstance(body, (transformers.LlamaModel, transformers.Qwen2Model)):
        raise UsageError(
            f"--head block: not for {type(model.hf).__name__}; Llama- and Qwen2-shaped bases have it, adapters merged"
        )
    layer = type(body.layers[-1])(body.config, layer_idx=0)
    layer.load_state_dict(body.layers[-1].state_dict())
    alone = copy.copy(body)  # the same model in all but its parts
    parts = {"layers": nn.ModuleList([layer]), "norm": nn.Identity(), "rotary_emb": copy.deepcopy(body.rotary_emb)}
    alone._modules = {"embed_tokens": None, **parts}
    alone.config = copy.deepcopy(body.config)
    alone.config.num_hidden_layers = 1
    return alone.float().requires_grad_(True)


class FrozenBase:
    """pi_theta, read at two places: the logits at some positions, and the hidden state that enters its last block."""

    def __init__(self, model: MaskedDiffusionModel):
        self.model = model.eval().requires_grad_(False)
        stacks = [m for m in model.hf.modules() if isinstance(m, nn.ModuleList)]
        self.width = model.hf.config.hidden_size
        max(stacks, key=len)[-1].register_forward_pre_hook(self.catch, with_kwargs=True)

    def catch(self, block, args, kwargs) -> None:
        self.hidden = args[0] if args else kwargs["hidden_states"]

    @torch.no_grad()
    def read(self, x: Tensor, attention: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden (B, W, D), logits (N, V) float32 at the N True positions); all of one forward."""
        logits = self.model(x, attention, positions)
        if not self.model.shifted:
            return self.hidden, logits
        # Dream predicts position i at i - 1: what it knows about i stands there; nothing stands before the first
        known = F.pad(attention, (1, 0))[:, :-1, None]
        return F.pad(self.hidden, (0, 0, 1, 0))[:, :-1] * known, logits


# ---------------------------------------------------------------------------------------------
# The MDP: p(x_{n-1} | x_n) = g(a_n | x_n) pi(x_{n-1} | x_n, a_n)
# ---------------------------------------------------------------------------------------------


class Trajectories(NamedTuple):
    """B trajectories, and those of their steps that updates see: S of them, in U different states.

    batch: with the finished x; unmask_step (B, W) long, -1 where nothing was revealed; length (B,) long, L;
    log_ratio (B,) float32: log g_old(trajectory) - log g_ref(trajectory), summed over all steps; entropy (B,): of g,
    mean over steps, nats. Of the S steps: row (S,) long, whose; at (S,) long, which state; action (S,) long, a_n;
    log_old (S,) float32; weight (S,) float32, 1 / the chance that the step is among the S. Of the U states: state,
    on the CPU if offloaded; log_ref (U, W) float32.
    """

    batch: Batch
    unmask_step: Tensor
    length: Tensor
    log_ratio: Tensor | None = None
    entropy: Tensor | None = None
    row: Tensor | None = None
    at: Tensor | None = None
    action: Tensor | None = None
    log_old: Tensor | None = None
    weight: Tensor | None = None
    state: State | None = None
    log_ref: Tensor | None = None


def place(values: Tensor, positions: Tensor) -> Tensor:
    """values (N,) at the N True positions (B, W), -inf elsewhere; float32."""
    return torch.full(positions.shape, -torch.inf, device=values.device).masked_scatter(positions, values.float())


def choose(scores: Tensor, candidates: Tensor, generators: list | None) -> Tensor:
    """a_n (B,) long: the highest score, or with generators a draw from the softmax of scores (B, W), -inf outside."""
    if generators is None:
        return scores.argmax(1)
    noise = exponential_noise(candidates, 1, generators)[:, 0]  # (N,), drawn at candidates: padding uses none up
    return (scores - place(noise.log(), candidates).masked_fill(~candidates, 0.0)).argmax(1)


class Order(NamedTuple):
    """How positions are chosen. scores: (state, token logits at its N candidates (N, V)) -> (U, W) float32, -inf
    where not allowed; sampled: by a draw from their softmax, else the highest. g's are log-probabilities."""

    scores: Callable[[State, Tensor], Tensor]
    sampled: bool


def rule(name: str, cfg: Config) -> Order:
    """One of ORDERS, over the candidates, or over the K most confident of them."""
    score, sampled = ORDERS[name]

    def scores(state: State, logits: Tensor) -> Tensor:
        full = place(score(logits.log_softmax(-1), cfg.tau), state.candidates)
        if name == "topk_random":
            full = full.masked_fill(~most_confident_k(state.top[..., 0], state.candidates, cfg.topk), -torch.inf)
        return full

    return Order(scores, sampled)


def learned(policy: nn.Module, cfg: Config, sampled: bool) -> Order:
    """The policy: sampled in rollouts, its most probable position in evaluation."""
    return Order(lambda state, logits: policy(*state, cfg.position_temperature), sampled)


def reference(cfg: Config) -> Order:
    """The reference as an order of its own, to pretrain on."""
    return Order(lambda state, logits: log_reference(cfg, state.top[..., 0], state.allowed), True)


def once(x: Tensor) -> tuple[Tensor, Tensor]:
    """(indices of rows of x (R, W) that are all different (U,), for each row which of them it equals (R,)), long."""
    _, same = x.unique(dim=0, return_inverse=True)
    first = torch.empty(int(same.max()) + 1, dtype=torch.long, device=x.device)
    return first.scatter_(0, same, torch.arange(len(x), device=x.device)), same


def see(base: FrozenBase, x: Tensor, attention: Tensor, masked: Tensor, candidates: Tensor, cfg: Config):
    """(what g sees of x_n, a State; the base's token logits at the candidates (N, V) float32)."""
    hidden, logits = base.read(x, attention, candidates)
    best = logits.softmax(-1).topk(min(TOP, logits.shape[1]), dim=1).values
    top = torch.zeros(*x.shape, TOP, device=x.device)
    top[candidates] = F.pad(best, (0, TOP - best.shape[1]))
    allowed = most_confident_k(top[..., 0], candidates, cfg.topk) if cfg.ref == "topk" else candidates
    return State(hidden, top, attention, masked, candidates, allowed), logits


class Record:
    """What a rollout's updates need of it, gathered step by step: the fields of Trajectories from log_ratio on."""

    def __init__(self, cfg: Config, weights: Tensor):
        """weights (B, steps) float32: 1 / the chance that a step is kept, 0 for steps that are not."""
        self.cfg, self.weights, self.states, self.steps, self.seen = cfg, weights, [], [], 0
        self.log_ratio, self.entropy = (torch.zeros(len(weights), device=weights.device) for _ in range(2))

    def add(self, rows: Tensor, same: Tensor, n: Tensor, state: State, scores: Tensor, a: Tensor) -> None:
        """One step: rows (R,), the state of each `same` (R,) among U, how many steps it has taken n (R,), the state,
        log g_old (U, W) and the actions (R,)."""
        log_ref, log_old = log_reference(self.cfg, state.top[..., 0], state.allowed), scores[same, a]
        if self.cfg.ref in ("softmax_confidence", "topk"):  # the others have no KL
            self.log_ratio[rows] += log_old - log_ref[same, a]
        self.entropy[rows] += torch.special.entr(scores.exp()).sum(1)[same]
        weight = self.weights[rows, n]  # (R,)
        kept = weight > 0
        used, at = same[kept].unique(return_inverse=True)
        state = State(
            *(v[used] for v in state._replace(hidden=state.hidden.bfloat16() if self.cfg.bf16 else state.hidden))
        )
        self.states.append((*(v.cpu() if self.cfg.offload else v for v in state), log_ref[used]))
        self.steps.append((rows[kept], at + self.seen, a[kept], log_old[kept], weight[kept]))
        self.seen += len(used)

    def fields(self, length: Tensor) -> dict:
        row, at, action, log_old, weight = (torch.cat(pieces) for pieces in zip(*self.steps))
        *state, log_ref = (torch.cat(pieces) for pieces in zip(*self.states))
        of_rows = dict(log_ratio=self.log_ratio, entropy=self.entropy / length)
        of_steps = dict(row=row, at=at, action=action, log_old=log_old, weight=weight)
        return of_rows | of_steps | dict(state=State(*state), log_ref=log_ref)


@torch.no_grad()
def unmask(base: FrozenBase, batch: Batch, order: Order, cfg: Config, keys, eos_ids, weights: Tensor | None = None):
    """Reveal one position per step and row until all are finished -> Trajectories. Source: the paper's MDP.

    keys: B keys of the rows' noise, so that a row's actions depend on no batch; weights: of a Record, None: nothing is
    kept for updates. A row that has finished is not computed any more, so a completion costs as many forwards as it
    has steps; rows that are in the same state, as those of a group are at first, are computed once. The base is not
    wrapped by DDP: processes need not agree on how many.
    """
    x, masked = batch.x.clone(), batch.completion.clone()
    unmask_step = torch.full_like(x, -1)
    block = torch.where(masked, (masked.cumsum(1) - 1) // cfg.block_length, x.shape[1])  # (B, W)
    length = torch.zeros(len(x), dtype=torch.long, device=x.device)
    for_positions, for_tokens = ([seeded(*key, use, device=x.device) for key in keys] for use in range(2))
    record = Record(cfg, weights) if weights is not None else None
    while True:
        unfinished = masked & through_eos(x, batch.completion, eos_ids)
        rows = unfinished.any(1).nonzero()[:, 0]  # (R,)
        if not len(rows):
            break
        current = block.masked_fill(~unfinished, x.shape[1])
        candidates = (unfinished & (current == current.amin(1, keepdim=True)))[rows]  # (R, W)
        first, same = once(torch.cat([x[rows], batch.attention[rows], candidates], dim=1))
        u = rows[first]  # a row in each of the U different states
        state, logits = see(base, x[u], batch.attention[u], masked[u], candidates[first], cfg)
        # g(a_n | x_n)
        scores = order.scores(state, logits)  # (U, W)
        a = choose(scores[same], candidates, [for_positions[r] for r in rows.tolist()] if order.sampled else None)
        # pi(x_{n-1} | x_n, a_n): the token of the chosen position, by argmax or drawn
        nth = state.candidates.flatten().cumsum(0).view(len(u), -1)[same, a] - 1  # a_n among the N candidates, (R,)
        noise = None
        if cfg.temperature > 0:
            chosen = torch.zeros_like(x[rows], dtype=torch.bool).scatter_(1, a[:, None], True)
            noise = exponential_noise(chosen, logits.shape[1], [for_tokens[r] for r in rows.tolist()])
        x[rows, a] = draw(logits[nth], cfg.temperature, noise)
        if record is not None:
            record.add(rows, same, length[rows], state, scores, a)
        unmask_step[rows, a] = length[rows]
        length[rows] += 1
        masked[rows, a] = False
    tail = batch.completion & ~through_eos(x, batch.completion, eos_ids)
    finished = batch._replace(x=x.masked_fill(tail, base.model.pad_id))
    done = Trajectories(finished, unmask_step.masked_fill(tail, -1), length)
    return done if record is None else done._replace(**record.fields(length))


# ---------------------------------------------------------------------------------------------
# The objective: pure functions of tensors
# ---------------------------------------------------------------------------------------------


class Loss(NamedTuple):
    """Scalars: the loss; the cross-entropy to the reference; the share of ratios outside the clip; mean |log rho|."""

    loss: Tensor
    cross_entropy: Tensor
    clipped: Tensor
    log_ratio: Tensor


def per_row(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Sums of values (S,) over the steps of each trajectory, (B,); row (S,) long says whose step it is."""
    return torch.zeros(rows, device=values.device).index_add(0, row, values)


def mean_over_steps(values: Tensor, e: Trajectories) -> Tensor:
    """(1/B) sum_b (1/L_b) sum_n of values (S,): L is known beforehand, so that a subset of steps is unbiased."""
    return (per_row(e.weight * values, e.row, len(e.length)) / e.length).mean()


def surrogate(log_g: Tensor, log_old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(rho A, clip(rho, 1 - clip, 1 + clip) A) of each step, (S,) float32; rho = g / g_old at a_n."""
    rho = (log_g - log_old).exp()
    return torch.minimum(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage)


def kl_gradient(log_g: Tensor, log_old: Tensor, log_ratio: Tensor, weight: Tensor, row: Tensor) -> Tensor:
    """A scalar with the gradient of KL(g || g_ref) over trajectories; its value means nothing.

    grad KL = E_g[(1 + log g(traj) - log g_ref(traj)) grad log g(traj)], and the trajectories are g_old's:
    clip(g / g_old, 1/2, 2) weighs them. The base's own factors are the same in g and g_ref and cancel.
    log_g, log_old, weight, row (S,): steps in this update, 1 / weight their chance to be in it; log_ratio (B,):
    log g_old - log g_ref over whole trajectories. Exact in the mean at g = g_old.
    """
    along = per_row(weight * log_g, row, len(log_ratio))  # log g(traj), but for a constant
    moved = along - per_row(weight * log_old, row, len(log_ratio))  # log g - log g_old
    rho = moved.exp().clamp(0.5, 2)
    return ((rho * (1 + moved + log_ratio)).detach() * along).mean()


def cross_entropy(log_g: Tensor, log_ref: Tensor) -> Tensor:
    """- sum_a g_ref(a) log g(a) of each state, (U,); log_g and log_ref (U, W), -inf outside the supports."""
    there = ~log_ref.isneginf()
    return -torch.where(there, log_ref.exp() * log_g.masked_fill(~there, 0.0), 0.0).sum(1)


def upo_loss(log_g, e: Trajectories, advantages: Tensor, *, ref: str, clip: float, beta: float) -> Loss:
    """- [ (1/B) sum_b (1/L_b) sum_n min(rho A_b, clip(rho) A_b) - beta D ] of one update.

    log_g (U, W): the policy on the U states of e; advantages (B,). D is the KL over trajectories with
    softmax_confidence and topk, the cross-entropy, mean over steps, with max_confidence, whose g_ref is 0 almost
    everywhere, and nothing with none.
    """
    at_action = log_g[e.at, e.action]  # (S,)
    gain = surrogate(at_action, e.log_old, advantages[e.row], clip)
    loss, divergence = -mean_over_steps(gain, e), mean_over_steps(cross_entropy(log_g, e.log_ref)[e.at], e)
    if beta and ref == "max_confidence":
        loss = loss + beta * divergence
    elif beta and ref != "none":
        loss = loss + beta * kl_gradient(at_action, e.log_old, e.log_ratio, e.weight, e.row)
    with torch.no_grad():
        log_rho = at_action - e.log_old
        outside = mean_over_steps(((log_rho.exp() - 1).abs() > clip).float(), e)
        return Loss(loss, divergence, outside, mean_over_steps(log_rho.abs(), e))


# ---------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------

# First key of every seeded generator, so that no two uses share their noise.
DATA, ROLLOUT, SUBSET, PRETRAIN, EVALUATION = range(100, 105)


class Trainer(NamedTuple):
    """What a step needs: the run, the base, the policy (wrapped for several processes, and bare), the optimiser."""

    run: Run
    base: FrozenBase
    wrapped: nn.Module
    policy: UnmaskingPolicy
    optimizer: torch.optim.Optimizer


def step_weights(cfg: Config, most: list[int], keys: list[tuple]) -> Tensor:
    """(B, max of most) float32: 1 / the chance that a step is in an update, 0 where it is not. most: the positions of
    each row, which are its steps unless EOS comes first; one key per row.

    All steps, or with --steps_per_update the first one and, of every `stride` that follow, one at random:
    stratified like this the chance is 1 / stride exactly, however long the trajectory turns out to be. All
    passes over a rollout share the draw, so that the features of no other step need be kept.
    """
    rows = []
    for steps, key in zip(most, keys, strict=True):
        row, stride = torch.ones(steps), stride_of(cfg, steps)
        if stride > 1:
            offsets = torch.randint(stride, (-(-(steps - 1) // stride),), generator=seeded(*key))
            row[1:] = stride * (offsets[:, None] == torch.arange(stride)).flatten()[: steps - 1]
        rows.append(row)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


def stride_of(cfg: Config, most: int) -> int:
    """One step in `stride` is in an update, of a trajectory of at most `most`."""
    return max(1, -(-most // cfg.steps_per_update)) if cfg.steps_per_update else 1


def complete(run: Run, base: FrozenBase, problems: list[Problem], order: Order, keys, for_updates: bool = False):
    """(Trajectories of one completion per problem, its text); for_updates: with what their steps need of them."""
    ends, batch, weights = ends_of(base.model, run.task), open_batch(run, base.model, problems), None
    if for_updates:
        most = batch.completion.sum(1).tolist()
        weights = step_weights(run.cfg, most, [(*key, SUBSET) for key in keys]).to(run.device)
    e = unmask(base, batch, order, run.cfg, keys, ends, weights)
    shown = through_eos(e.batch.x, batch.completion, ends)
    return e, texts_of(base.model, e.batch, shown, run.cfg.gen_length)


def collect(t: Trainer, train: list[Problem], step: int, order: Order, use: int) -> tuple[Trajectories, Tensor, dict]:
    """(trajectories of this process's prompts, their advantages (B,), metrics averaged over processes)."""
    run, cfg, g = t.run, t.run.cfg, t.run.cfg.group_size
    groups = cfg.batch_size // g  # a group never straddles processes: advantages need no communication
    first = run.rank * groups
    chosen = shuffled(len(train), groups, step * groups * run.world + first, cfg.seed, DATA, use)
    problems = [train[i] for i in chosen for _ in range(g)]
    with run.clock("rollout"):
        keys = [(cfg.seed, use, step, first + i, k) for i in range(groups) for k in range(g)]
        e, texts = complete(run, t.base, problems, order, keys, for_updates=True)
        reward = torch.tensor([sum(run.task.reward(*pair).values()) for pair in zip(texts, problems)])
    metrics = {"reward": reward.mean().item(), "group_reward_std": reward.view(-1, g).std(1).mean().item()}
    metrics |= {"entropy": e.entropy.mean().item(), "steps": e.length.float().mean().item()}
    if cfg.ref in ("softmax_confidence", "topk"):
        metrics["kl"] = e.log_ratio.mean().item()
    return e, group_advantages(reward, g, cfg.advantage).to(run.device), run.average(metrics)


def minibatch(e: Trajectories, rows: Tensor, device) -> Trajectories:
    """The trajectories `rows` (b,) long with their steps and the states of these, on the device."""
    index = torch.full((len(e.length),), -1, device=rows.device)
    index[rows] = torch.arange(len(rows), device=rows.device)
    mine = index[e.row] >= 0
    used, at = e.at[mine].unique(return_inverse=True)
    state = State(*(v[used.to(v.device)].to(device) for v in e.state))
    steps = dict(action=e.action[mine], log_old=e.log_old[mine], weight=e.weight[mine])
    of_rows = dict(length=e.length[rows], log_ratio=e.log_ratio[rows])
    return e._replace(row=index[e.row[mine]], at=at, **steps, **of_rows, state=state, log_ref=e.log_ref[used])


def update(t: Trainer, e: Trajectories, advantages: Tensor, loss_of: Callable, lr: float) -> dict:
    """mu passes over the minibatches, one optimiser step each; mean metrics. Raises UsageError if not finite."""
    run, cfg, history = t.run, t.run.cfg, []
    parts = cfg.batch_size // cfg.minibatch_size
    for _ in range(cfg.mu):
        for m in range(parts):
            # every parts-th row: the same trajectories share an update whatever the number of processes
            rows = torch.arange(m, cfg.batch_size, parts, device=run.device)
            part = minibatch(e, rows, run.device)
            log_g = t.wrapped(*part.state, cfg.position_temperature)
            loss = loss_of(log_g, part, advantages[rows])
            run.accelerator.backward(loss.loss)
            norm = float(run.accelerator.clip_grad_norm_(t.policy.parameters(), cfg.max_grad_norm))
            metrics = run.average({name: value.item() for name, value in loss._asdict().items()} | {"grad_norm": norm})
            if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
                raise UsageError(f"the loss or its gradient is not finite; lower --lr ({cfg.lr:g})")
            for group in t.optimizer.param_groups:
                group["lr"] = lr
            t.optimizer.step()
            t.optimizer.zero_grad()
            history.append(metrics)
    return mean_of(history)


def cloning_loss(log_g: Tensor, e: Trajectories, advantages: Tensor) -> Loss:
    """--init pretrained: the cross-entropy to the reference's choice, mean over steps."""
    value = mean_over_steps(cross_entropy(log_g, e.log_ref)[e.at], e)
    nothing = torch.zeros_like(value)
    return Loss(value, value.detach(), nothing, nothing)


def train_step(t: Trainer, train: list[Problem], step: int, warm: int) -> dict:
    """Step `step` of training, the first `warm` of them --init's: rollout and updates; its metrics."""
    cfg, n = t.run.cfg, step if step < warm else step - warm  # the phase's own step
    if step < warm:
        order, use, loss_of, lr = reference(cfg), PRETRAIN, cloning_loss, cfg.init_lr
    else:
        order, use = learned(t.policy, cfg, sampled=True), ROLLOUT
        loss_of = functools.partial(upo_loss, ref=cfg.ref, clip=cfg.clip, beta=cfg.beta)
        lr = cfg.lr * min(1.0, (n + 1) / max(cfg.warmup, 1)) * (1 - n / cfg.max_steps if cfg.lr_decay else 1.0)
    e, advantages, line = collect(t, train, n, order, use)
    with t.run.clock("update"):
        line |= update(t, e, advantages, loss_of, lr)
    return {"step": step + 1, "phase": "init" if step < warm else "upo"} | line


def train_policy(t: Trainer, data: dict, progress: dict) -> None:
    """init_steps of cross-entropy to the reference (--init pretrained), then max_steps of UPO.

    progress: steps done and, where a run was stopped between a step's last update and its validation, its metrics.
    """
    run, cfg, start = t.run, t.run.cfg, progress["step"]
    warm = cfg.init_steps if cfg.init == "pretrained" else 0
    total, log, began = warm + cfg.max_steps, open_log(run, start), time.perf_counter()
    with run.bar(total, "steps", initial=start) as bar:
        for step in range(start, total):
            run.save = functools.partial(save_checkpoint, run, run.path, progress)
            run.leave_if_stopped()
            line = progress.get("line") or train_step(t, data["train"], step, warm)
            run.save = functools.partial(save_checkpoint, run, run.path, {"step": step, "line": line})
            if cfg.eval_every and ((step + 1 - warm) % cfg.eval_every == 0 or step + 1 in (warm, total)):
                rows = evaluate(run, t.base, learned(t.policy, cfg, sampled=False), data["validation"], "validation")
                line = line | {"validation_accuracy": rewards.accuracy([row["score"] for row in rows])["accuracy"]}
                pace = (time.perf_counter() - began) / (step + 1 - start)
                run.say(progress_line(line, total, pace))
            if run.main:
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            run.accelerator.log({k: v for k, v in line.items() if k not in ("step", "phase")}, step=step + 1)
            bar.update()
            bar.set_postfix(reward=f"{line['reward']:.3f}", entropy=f"{line['entropy']:.2f}")
            progress = {"step": step + 1}
            if step + 1 == total or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                save_checkpoint(run, run.path, progress)
    run.save = lambda: None


def progress_line(line: dict, total: int, pace: float) -> str:
    """What a person wants to know in between; pace in seconds per step, measured over this session."""
    return (
        f"  {line['phase']:>4} {line['step']:>5}/{total}  "
        f"reward {line['reward']:.3f} ± {line['group_reward_std']:.3f} in a group  "
        f"entropy {line['entropy']:.2f}  validation {line['validation_accuracy']:.3f}  "
        f"{pace:.2f} s/step, {pace * (total - line['step']) / 60:.1f} min left"
    )


# ---------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------


def evaluate(
    run: Run, base: FrozenBase, order: Order, problems: list[Problem], label: str, samples: int = 1
) -> list[dict]:
    """Completions of every problem by an order, `samples` of each; the same on all processes.

    One dict per completion: problem (index), sample, score (0 to 1), nfe (forwards of the base), completion, and
    `steps`: the step that revealed each token of the completion, -1 for none.
    """
    size, n = run.cfg.eval_batch_size, run.cfg.gen_length
    todo = [(i, s) for i in range(len(problems)) for s in range(samples)]
    mine, done = todo[run.rank :: run.world], []
    with run.clock("eval"), run.bar(len(mine), label, leave=False) as bar:
        for first in range(0, -(-len(todo) // run.world), size):  # the same number of batches for every process
            run.leave_if_stopped()
            rows = mine[first : first + size]
            if not rows:
                continue
            keys = [(run.cfg.seed, EVALUATION, *row) for row in rows]
            e, texts = complete(run, base, [problems[i] for i, _ in rows], order, keys)
            steps, tokens = (v[:, -n:].tolist() for v in (e.unmask_step, e.batch.x))
            done += [(*row, *about) for row, about in zip(rows, zip(texts, e.length.tolist(), steps, tokens))]
            bar.update(len(rows))
    names = ("problem", "sample", "completion", "nfe", "steps", "tokens")
    rows = [dict(zip(names, row)) for row in sorted(gather_object(done) if run.world > 1 else done)]
    return [row | {"score": run.task.score(row["completion"], problems[row["problem"]])} for row in rows]


def measure(run: Run, base: FrozenBase, policy: nn.Module, problems: list[Problem]) -> tuple[dict, dict]:
    """({method: rows of evaluate}, {method: rows of PASS_AT[-1] samples}): every order on the same problems."""
    cfg = run.cfg
    methods = {name: rule(name, cfg) for name in ORDERS} | {"upo": learned(policy, cfg, sampled=False)}
    rows, lucky, few = {}, {}, problems[: cfg.pass_n]
    for name, order in methods.items():
        rows[name] = evaluate(run, base, order, problems, f"evaluation, {name}")
    for name in ("random", "topk_random") if few else ():
        lucky[name] = evaluate(run, base, methods[name], few, f"pass@N, {name}", PASS_AT[-1])
    return rows, lucky


def against(mine: list[float], other: list[float]) -> dict[str, float]:
    """Paired over problems: the mean difference, its standard error, and the p of the exact sign test."""
    difference = torch.tensor(mine, dtype=torch.float64) - torch.tensor(other, dtype=torch.float64)
    stderr = difference.std(correction=0).item() / math.sqrt(len(difference))
    figures = {"difference": round(difference.mean().item(), 6), "stderr": round(stderr, 6)}
    return figures | {"p": rewards.paired_p(other, mine)}


# ---------------------------------------------------------------------------------------------
# The picture of an order: each token with the step that revealed it
# ---------------------------------------------------------------------------------------------


LINES_DRAWN = 32


class Cell(NamedTuple):
    """One token of a completion; step -1: it was given; right: None where no token is the only right one."""

    text: str
    step: int
    right: bool | None


def cells_of(run: Run, base: FrozenBase, row: dict, problem: Problem) -> list[list[Cell]]:
    """The first lines of a completion, each a list of cells; long lines are wrapped."""
    tokenizer, lines = base.model.tokenizer, [[]]
    target = tokenizer(run.task.target(problem), add_special_tokens=False)["input_ids"] if run.task.blanks else []
    for i, (token, step) in enumerate(zip(row["tokens"], row["steps"])):
        text = "".join(c for c in tokenizer.decode([token]) if c.isprintable() or c == "\n")  # no control characters
        if token in base.model.eos_ids:
            break
        if text.strip():
            lines[-1].append(Cell(text.strip(), step, target[i : i + 1] == [token] if target else None))
        if "\n" in text or len(lines[-1]) == 16:
            lines.append([])
    return [line for line in lines if line][:LINES_DRAWN]


SHADES = (17, 19, 26, 32, 36, 70, 106, 142, 178, 220)  # of a terminal's 256 colours, from dark blue to yellow


def in_terminal(lines: list[list[Cell]], colour: bool) -> list[str]:
    """Lines of equal width: `3` given, `3:7` revealed at step 7, `3:7x` wrong; with colour late steps are yellow."""
    word = lambda c: c.text if c.step < 0 else f"{c.text}:{c.step + 1}{'x' if c.right is False else ''}"
    width = max((len(word(cell)) for line in lines for cell in line), default=0)
    last = max((cell.step for line in lines for cell in line), default=0)

    def paint(cell: Cell) -> str:
        if not colour or cell.step < 0:
            return f"{word(cell):<{width}}"
        shade = cell.step * (len(SHADES) - 1) // max(last, 1)
        text = f"\x1b[48;5;{SHADES[shade]};38;5;{231 if shade < 6 else 16}m{word(cell)}\x1b[0m"
        return text + " " * (width - len(word(cell)))

    longest = max(map(len, lines), default=0)
    pad = lambda line: " " * (width + 1) * (longest - len(line))
    return [" ".join(map(paint, line)) + pad(line) for line in lines]


def show_orders(run: Run, base: FrozenBase, rows: dict[str, list[dict]], problems: list[Problem]) -> None:
    """One held-out problem under three orders: the first that upo and max_confidence solve differently well."""
    scores = {name: [row["score"] for row in rows[name]] for name in ("upo", "max_confidence", "margin")}
    differ = [i for i, (a, b) in enumerate(zip(scores["upo"], scores["max_confidence"])) if a != b]
    i = differ[0] if differ else 0
    pictures = {name: cells_of(run, base, rows[name][i], problems[i]) for name in scores}
    reading = "digit:step, x is wrong" if run.task.blanks else "token:step"
    run.say(f"\nheld-out problem {i}, the first that upo and max_confidence solve differently well; {reading}")
    drawn = [in_terminal(lines, sys.stdout.isatty()) for lines in pictures.values()]
    titles = [f"{name} {scores[name][i]:.2f}" for name in pictures]
    columns = [
        max([len(line) for line in in_terminal(lines, False)] + [len(title)])
        for lines, title in zip(pictures.values(), titles)
    ]
    if sum(columns) + 8 <= shutil.get_terminal_size().columns:  # side by side
        run.say("    ".join(f"{title:<{n}}" for title, n in zip(titles, columns)))
        for line in itertools.zip_longest(*drawn, fillvalue=""):
            run.say("    ".join(line))
    else:
        for title, lines in zip(titles, drawn):
            run.say("\n".join([title, *lines]))
    with contextlib.suppress(ImportError):
        draw_orders(run.path / "order.png", dict(zip(titles, pictures.values())))
        run.say(f"picture   {run.path / 'order.png'}")


def draw_orders(path: Path, pictures: dict[str, list[list[Cell]]]) -> None:
    """The same as a PNG: cells coloured by step, the step below the token, a red frame and cross where it is wrong.
    Raises ImportError without matplotlib."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    longest = max((len(line) for lines in pictures.values() for line in lines), default=1)
    tall = max(max(map(len, pictures.values())), 1)
    wide = longest > 8  # text: below each other
    shape = (len(pictures), 1) if wide else (1, len(pictures))
    figure = Figure(figsize=(0.75 * longest * shape[1] + 0.5, (0.75 * tall + 0.6) * shape[0]))
    for axes, (title, lines) in zip(figure.subplots(*shape, squeeze=False).flat, pictures.items()):
        last = max(max((cell.step for line in lines for cell in line), default=0), 1)
        for r, line in enumerate(lines):
            for c, cell in enumerate(line):
                given, wrong = cell.step < 0, cell.right is False
                face = "0.92" if given else colormaps["YlGnBu"](0.05 + 0.45 * cell.step / last)
                edge = dict(edgecolor="tab:red", linewidth=2.5, zorder=2) if wrong else dict(edgecolor="white")
                axes.add_patch(Rectangle((c + 0.03, r + 0.03), 0.94, 0.94, facecolor=face, **edge))
                size = min(15, 60 / max(len(cell.text), 1))
                axes.text(c + 0.5, r + 0.42, cell.text, ha="center", va="center", fontsize=size, parse_math=False)
                note = "" if given else f"{cell.step + 1}{' ✗' if wrong else ''}"
                axes.text(
                    c + 0.5, r + 0.83, note, ha="center", va="center", fontsize=8, color="tab:red" if wrong else "black"
                )
        axes.set(xlim=(0, longest), ylim=(tall, 0), aspect="equal", title=title)
        axes.axis("off")
    figure.savefig(path, dpi=130, bbox_inches="tight")


# ---------------------------------------------------------------------------------------------
# Setting up, saving, reporting
# ---------------------------------------------------------------------------------------------

# What a policy was trained with, and needs when it is evaluated; and what its task needs, unless that is another.
OF_THE_POLICY = ("ref", "tau", "head", "heads", "feedforward", "temperature", "position_temperature", "bf16", "seed")
OF_ITS_TASK = ("task", "topk", "gen_length", "block_length", "data", "eval_data")


def new_policy(cfg: Config, base: FrozenBase, device) -> UnmaskingPolicy:
    """The head for a base, random weights from the seed; UsageError where --heads does not divide its width."""
    if base.width % cfg.heads:
        raise UsageError(f"--heads {cfg.heads} does not divide the base's width, {base.width}")
    block = last_block(base.model) if cfg.head == "block" else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cfg.seed)
        return UnmaskingPolicy(base.width, cfg.heads, cfg.feedforward, block).to(device)


def save_policy(run: Run, base: FrozenBase, base_name: str, policy: UnmaskingPolicy) -> None:
    """policy/model.safetensors, and policy/config.json with what it needs to be built and used again."""
    path = run.path / "policy"
    path.mkdir(exist_ok=True)
    save_file({name: v.contiguous() for name, v in policy.state_dict().items()}, path / "model.safetensors")
    settings = {name: getattr(run.cfg, name) for name in OF_THE_POLICY + OF_ITS_TASK}
    local = Path(base_name).is_dir()
    about = {"width": base.width, "base": str(Path(base_name).resolve()) if local else base_name, "local": local}
    write_atomically(path / "config.json", json.dumps(about | settings, indent=1))


def load_policy(run: Run, base: FrozenBase) -> UnmaskingPolicy:
    """The policy of --policy on this run's base; UsageError where it does not fit."""
    path = Path(run.cfg.policy) / "policy"
    width = read_json(path / "config.json")["width"]
    if width != base.width:
        raise UsageError(f"--policy {run.cfg.policy}: made for bases of width {width}, this one has {base.width}")
    policy = new_policy(run.cfg, base, run.device)
    try:
        policy.load_state_dict(load_file(path / "model.safetensors"))
    except (RuntimeError, SafetensorError, OSError) as error:
        raise UsageError(f"--policy {path}: cannot be loaded: {first_line(error)}") from None
    return policy


def with_policy(argv: list[str]) -> list[str]:
    """The flags, with those that a --policy was trained with in front, its base and, if it is the same, its task's."""
    parser = Parser(add_help=False, allow_abbrev=False)
    for name in ("policy", "model", "task", "data", "eval_data"):
        parser.add_argument(f"--{name}")
    given, _ = parser.parse_known_args(argv)
    if given.policy is None:
        return argv
    about = Path(given.policy) / "policy" / "config.json"
    if not about.is_file():
        raise UsageError(
            f"--policy {given.policy}: no trained policy there (no policy/config.json); name a run directory"
        )
    saved = read_json(about)
    if missing := {*OF_THE_POLICY, *OF_ITS_TASK, "width", "base", "local"} - saved.keys():
        raise UsageError(f"{about}: lacks {sorted(missing)}; it was written by another version of this script")
    if given.model is None and saved["local"] and not Path(saved["base"]).is_dir():
        raise UsageError(f"--policy {given.policy}: its base, {saved['base']}, is not there any more; give --model")
    names = OF_THE_POLICY + (OF_ITS_TASK if given.task in (None, saved["task"]) else ())
    flags = {name: saved[name] for name in names if saved[name] is not None} | {"model": given.model or saved["base"]}
    if file := given.eval_data or (given.data if given.data != "generated" else None):
        flags |= {"eval_data": file, "eval_n": 0}  # all of it, unless the flags behind these say how many
    elif given.data == "generated":
        flags.pop("eval_data", None)
    spelled = lambda name, value: (
        [f"--{'' if value else 'no-'}{name}"] if type(value) is bool else [f"--{name}", str(value)]
    )
    return [word for name, value in flags.items() for word in spelled(name, value)] + argv


def frozen_base(run: Run, train: list[Problem], validation: list[Problem]) -> tuple[FrozenBase, str, bool]:
    """(the base, where it lies, whether it was there already); without --model maskgrpo.py's tiny one for the task."""
    cfg, path, cached = run.cfg, run.cfg.model, True
    flags = ["--task", cfg.task, "--seed", str(cfg.seed), "--output_dir", cfg.output_dir]
    settings, _ = parse(flags + (["--model", path] if path else []))
    settings.bf16 = cfg.bf16
    if path is None:
        training = Run(settings, run.accelerator)
        listen(training)
        path, cached = base_path(training, train, validation)
        run.seconds["base"], run.signal = training.seconds["base"], training.signal
        listen(run)
    return FrozenBase(load_model(path, settings, trainable=False).to(run.device)), path, cached


def listen(run: Run) -> None:
    """SIGINT and SIGTERM go to this run."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.on_signal)


def describe(run: Run, source: dict[str, str], data: dict) -> None:
    """The first lines: what runs, on what, and every value with where it comes from."""
    cfg = run.cfg
    tiny = (
        "the tiny default of maskgrpo.py, trained here first on generated problems" if cfg.model is None else cfg.model
    )
    sizes = ", ".join(f"{len(data[split])} {split}" for split in ("train", "validation", "test") if data[split])
    run.say(f"UPO       task {cfg.task}, reference {cfg.ref}, seed {cfg.seed} -> {run.path}")
    run.say(f"base      {tiny}, frozen")
    run.say(f"data      {cfg.data or ('generated' if data['unseen'] else 'published')}: {sizes}")
    if run.task.runs_code:
        run.say(f"sandbox   {rewards.protections()}")
    tokens = "argmax" if cfg.temperature == 0 else f"temperature {cfg.temperature:g}"
    run.say(f"decoding  one position per forward, blocks of {cfg.block_length}; tokens by {tokens}")
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    run.say(f"device    {run.device}, {run.world} process{'es' * (run.world > 1)}{threads}")
    say_settings(run, source)


def memory_of(run: Run, base: FrozenBase, policy: nn.Module, problems: list[Problem]) -> str:
    """What the head is, and what a trajectory's features weigh: its kept steps, W positions each, of D numbers in the
    base's precision, 8 probabilities and a reference in float32, 4 flags. LLaDA-8B, 256 steps of 512 positions in
    bf16: 1.0 GiB, and an eighth of it with --steps_per_update 32."""
    cfg, batch = run.cfg, open_batch(run, base.model, problems[:256])
    most = int(batch.completion.sum(1).max())
    steps = 1 + -(-(most - 1) // stride_of(cfg, most))
    size = steps * batch.x.shape[1] * (base.width * (2 if cfg.bf16 else 4) + 4 * TOP + 4 + 4)
    mine, all_of_base = (sum(p.numel() for p in module.parameters()) for module in (policy, base.model))
    return (
        f"{mine / 1e6:.2f}M parameters train, the base has {all_of_base / 1e6:.2f}M; features of a trajectory: {steps} "
        f"steps x {batch.x.shape[1]} positions, {size / 2**20:.2f} MiB; of a rollout up to "
        f"{size * cfg.batch_size / 2**20:.0f} MiB"
    )


def figures_of(run: Run, rows: dict, lucky: dict, problems: list[Problem]) -> dict:
    """The figures of results.json: accuracy, paired differences, pass@N, ceilings, seconds."""
    cfg, seconds, most = run.cfg, run.stopwatch(), PASS_AT[-1]
    scores = {name: [row["score"] for row in of] for name, of in rows.items()}
    accuracy = {}
    for name, of in rows.items():
        figures, nfe = rewards.accuracy(scores[name]), sum(row["nfe"] for row in of) / len(of)
        accuracy[name] = {"mean": figures["accuracy"], "stderr": figures["stderr"], "nfe": round(nfe, 4)}
    groups = lambda of: [[row["score"] for row in of[i : i + most]] for i in range(0, len(of), most)]
    passes = {name: {n: round(rewards.pass_at(groups(of), n), 6) for n in PASS_AT} for name, of in lucky.items()}
    ceiling = {f"best_of_{most}_{name}": values[most] for name, values in passes.items()}
    if run.task.ceiling:
        ceiling = {"bayes": round(sum(map(run.task.ceiling, problems)) / len(problems), 6)} | ceiling
    clock = {"base": seconds["base"], "train": seconds["rollout"] + seconds["update"]}
    clock |= {name: seconds[name] for name in ("eval", "total")}
    return {
        **{"task": cfg.task, "ref": cfg.ref, "seed": cfg.seed, "n": len(problems), "accuracy": accuracy},
        **{"paired": {name: against(scores["upo"], scores[name]) for name in ORDERS}},
        **{"pass_at_n": passes, "ceiling": ceiling, "seconds": {name: round(v, 1) for name, v in clock.items()}},
    }


def report(run: Run, rows: dict, lucky: dict, problems: list[Problem], extra: dict) -> None:
    """results.json and completions.jsonl, and the same as a table."""
    figures, cfg = figures_of(run, rows, lucky, problems), run.cfg
    if run.device.type == "cuda":
        extra = extra | {"peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    results = figures | extra | {"config": dataclasses.asdict(cfg), "versions": versions}
    if run.main:
        lines = [{"method": name} | row for name, of in rows.items() for row in of]
        write_atomically(run.path / "completions.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        write_atomically(run.path / "results.json", json.dumps(results, indent=1))
    run.say(f"\n{len(problems)} held-out problems, one position per forward of the base")
    run.say(f"{'order':<19} accuracy ± stderr   forwards   upo is better by, paired p")
    for name, a in figures["accuracy"].items():
        of = figures["paired"].get(name)
        gap = f"{of['difference']:+.3f} ± {of['stderr']:.3f}, {of['p']:.0e}" if of else ""
        run.say(f"{name:<19} {a['mean']:.3f} ± {a['stderr']:.3f}       {a['nfe']:>6.2f}     {gap}".rstrip())
    for name, values in figures["pass_at_n"].items():
        cells = "  ".join(f"@{n} {value:.3f}" for n, value in values.items())
        run.say(f"pass {cells}   {name}, {min(cfg.pass_n, len(problems))} problems")
    if "bayes" in figures["ceiling"]:
        run.say(f"ceiling {figures['ceiling']['bayes']:.3f}: each cell's most probable digit, given the clues")
    run.say("seconds   " + "  ".join(f"{name} {value:.0f}" for name, value in figures["seconds"].items()))
    run.say(f"results   {run.path / 'results.json'}")


def splits_of(cfg: Config) -> dict[str, list[Problem]]:
    """Problems as in maskgrpo.py; --eval_only with a file: all of it, or its first --eval_n, is the test split."""
    if not (cfg.eval_only and cfg.eval_data):
        return load_splits(cfg)
    test = TASKS[cfg.task].load(cfg.eval_data, "test")[: cfg.eval_n or None]
    return {"train": [], "validation": [], "test": test, "unseen": []}


def check_blanks(cfg: Config, problems: list[Problem]) -> None:
    """Raise UsageError where K is larger than any number of blanks."""
    task = TASKS[cfg.task]
    if cfg.ref != "topk" or task.blanks is None or not problems:
        return
    most = max(sum(a != b for a, b in zip(task.blanks(p), task.target(p), strict=True)) for p in problems)
    if cfg.topk > most:
        raise UsageError(f"--topk {cfg.topk}: at most {most} positions of a {cfg.task} problem are masked")


def trained_policy(run: Run, base: FrozenBase, base_name: str, data: dict) -> UnmaskingPolicy:
    """The policy after training, from the last checkpoint on if the run goes on; saved."""
    cfg, accelerator = run.cfg, run.accelerator
    policy = new_policy(cfg, base, run.device)
    run.say("memory    " + memory_of(run, base, policy, data["train"]))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=cfg.lr, betas=BETAS, weight_decay=cfg.weight_decay)
    accelerator.gradient_accumulation_steps = 1
    wrapped, optimizer = accelerator.prepare(policy, optimizer)
    progress, _ = (load_checkpoint(run, run.path) if cfg.resume else None) or ({"step": 0}, {})
    if progress["step"]:
        run.say(f"resumed   after {progress['step']} steps")
    train_policy(Trainer(run, base, wrapped, policy, optimizer), data, progress)
    if run.main:
        save_policy(run, base, base_name, policy)
    return policy


def main(argv: list[str] | None = None) -> None:
    """Parse, set up Accelerate and the run directory, get a base, then train or evaluate."""
    cfg, source = parse(with_policy(sys.argv[1:] if argv is None else argv), Config, __doc__, "upo", "ref", REFERENCES)
    check(cfg)
    precision = "bf16" if cfg.bf16 else "no"
    accelerator = Accelerator(mixed_precision=precision, log_with=cfg.log_with, project_dir=cfg.output_dir)
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UsageError(f"accelerate: {accelerator.distributed_type.value} is not supported; use MULTI_GPU (DDP)")
    data = splits_of(cfg)
    check_blanks(cfg, data["train"])
    if accelerator.is_main_process:
        open_run(cfg)
    accelerator.wait_for_everyone()
    run = Run(cfg, accelerator)
    listen(run)
    accelerator.init_trackers("upo", config={k: str(v) for k, v in dataclasses.asdict(cfg).items()})
    describe(run, source, data)
    base, base_name, cached = frozen_base(run, data["train"], data["validation"])
    if cfg.eval_only:
        policy = accelerator.prepare_model(load_policy(run, base), evaluation_mode=True)
    else:
        policy = trained_policy(run, base, base_name, data)
    rows, lucky = measure(run, base, policy, data["test"])
    report(run, rows, lucky, data["test"], {"base": base_name, "base_cached": cached})
    if run.main:
        show_orders(run, base, rows, data["test"])
    run.finish()


if __name__ == "__main__":
    sys.exit(cli(main=main, name="upo.py"))
