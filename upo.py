"""UPO: unmasking policy optimisation, in one file. The base model is frozen; the order learns.

Paper: "Improving Discrete Diffusion Unmasking Policies Beyond Explicit Reference Policies", ICLR 2026.
Which token of a masked completion is revealed next is an action, the frozen base that fills it is the environment,
and a small policy g learns to choose by GRPO, held to a reference order. Everything of the paper is in the first
part of this file, and `train_step` is its algorithm box. Without --model the tiny base of maskgrpo.py is trained
first; published checkpoints run through the same lines. A sudoku's blanks are filled in place, as in the authors' code.

    symbol        shape            meaning
    x_n, x_0      (B, W) long      the sequence with n tokens of its completion masked; the finished one
    a_n           (S,) long        the position that is revealed in x_n; with k of them per step, an action each
    g, g_old      (U, W) float32   the policy, log g(a | x_n); as it was in the rollout
    g_ref         (U, W) float32   the reference: max_confidence, softmax_confidence, topk
    pi            (N, V) float32   the frozen base's logits at N positions
    L             (B,) long        steps of a trajectory, each a forward of the base
    S, U, W       int              actions of a batch's trajectories; different states among them; columns of x
    rho, A, G     (S,), (B,), int  g / g_old at a_n; advantage; group size
    K, tau        int, float       of topk and softmax_confidence

Departures from the paper
 1. Proposition 1 holds at g = g_old alone (tests/test_upo.py measures how the gradients part), and for sums over a
    trajectory's steps, as the authors have: with an EOS L depends on the policy, and a mean is another objective.
 2. The KL of the softmax_confidence and topk references is the KL over trajectories, an upper bound of
    the output-level one; its gradient is estimated (`kl_gradient`), its value is only reported.
 3. The MLP sees the top-8 probabilities, but no flags "masked" and "in the block": g is read only where both hold.
Departures from the authors' code
 4. Left padding is attended to by no one, so an action does not depend on the batch it was taken in.
 5. Everything on trajectories stays in log space and float32; no product of probabilities is formed.
 6. The head is the paper's 134M one; their code copies the base's last block, 269M. A base with rotary positions has
    no absolute ones in its hidden states: the head's layer adds them (`sinusoids`).
 7. Log-probabilities of positions are taken at the temperature that positions are sampled at.
 8. --steps_per_update draws its steps stratified over the trajectory, with known inclusion probability.
 9. The softmax_confidence reference is a softmax over positions; in their code it sums over the vocabulary.
10. A step is a rollout with its updates; their `max_steps` counts updates, 3,500 of which are 219 steps at mu = 16.
11. The tiny sudoku base has seen digits in several spellings, so that it knows more than its confidence says.
12. --positions_per_step k, which neither has: k positions are drawn from g without replacement and filled from one
    forward of the base. Each is an action, g's choice among those that are left (Plackett-Luce), and all above holds.

    python upo.py --task sudoku --ref topk                 # the tiny default, minutes on a laptop
    accelerate launch upo.py --task gsm8k --model GSAI-ML/LLaDA-8B-Instruct
    python upo.py --task gsm8k --model runs/maskgrpo-...   # on top of what maskgrpo.py has trained
    python upo.py --resume --output_dir runs/NAME          # goes on where a run was stopped
    python upo.py --eval_only --policy runs/NAME [--data FILE.csv] [--model OTHER]    # transfer
"""

import contextlib
import dataclasses
import json
import math
import sys
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import rewards
from emerge_sampler import draw, exponential_noise, through_eos
from maskgrpo import Common, Run, base_path, check, cli, flag, group_advantages
from maskgrpo import in_one_line, load_model, parse, require, start
from remask import seeded, shuffled
from rewards import TASKS, Problem, judge_all, mean_of

# --- The paper, 1: unmasking as a Markov decision process -------------------------------------------------------------

TOP = 8  # token probabilities that the policy sees of each candidate


class State(NamedTuple):
    """What g sees of U partly masked sequences x_n."""

    hidden: Tensor  # (U, W, D): the hidden state that enters the base's last block
    top: Tensor  # (U, W, 8) float32: the largest token probabilities at the candidates, 0 elsewhere
    attention: Tensor  # (U, W) bool: False at padding
    candidates: Tensor  # (U, W) bool: masked, and in the current block
    allowed: Tensor  # (U, W) bool: g's support, less what the same step has revealed before


class Trajectories(NamedTuple):
    """B trajectories x_L, a_L, ..., x_0, and the S of their actions that updates see, in U different states. Evaluation
    keeps none: None."""

    x: Tensor  # (B, W) long: x_0
    unmask_step: Tensor  # (B, W) long: the step that revealed a position, -1: nothing was, or behind the EOS
    length: Tensor  # (B,) long: L
    log_ratio: Tensor | None = None  # (B,) float32: log g_old - log g_ref of the whole trajectory
    entropy: Tensor | None = None  # (B,) float32: of g, mean over steps, nats
    row: Tensor | None = None  # (S,) long: whose action it is
    at: Tensor | None = None  # (S,) long: in which state
    action: Tensor | None = None  # (S,) long: a_n
    log_old: Tensor | None = None  # (S,) float32: log g_old(a_n | x_n)
    weight: Tensor | None = None  # (S,) float32: 1 / the chance that the step is among the S
    state: State | None = None  # of the U states, on the CPU if offloaded
    log_ref: Tensor | None = None  # (U, W) float32: log g_ref


def reveal(log_g: Tensor, candidates: Tensor, k: Tensor, logits_at: Callable, temperature: float, for_a, for_token):
    """One step of the MDP, p(x_{n-1} | x_n) = g(a_n | x_n) pi(x_{n-1} | x_n, a_n), in R rows, of which each reveals k
    (R,) long: (positions (R, max of k) long, the first k in the order drawn; where they are (R, W) bool; their tokens).
    log_g (R, W), -inf where g is 0; candidates (R, W) bool; logits_at(R, W) -> (N, V); for_a, for_token: one generator
    per row. Without for_a the most probable positions are taken, at temperature 0 the most likely tokens."""
    if for_a is not None:  # Gumbel top-k: the k largest g(a) / E_a, E_a ~ Exp(1), are k draws without replacement
        noise = exponential_noise(candidates, 1, for_a)[:, 0].log().float()  # at candidates: padding uses none up
        log_g = log_g - torch.zeros_like(log_g).masked_scatter(candidates, noise)
    a = log_g.sort(dim=1, descending=True, stable=True).indices[:, : int(k.max())]
    first_k = torch.arange(a.shape[1], device=a.device) < k[:, None]
    chosen = torch.zeros_like(candidates).scatter(1, a, first_k)
    noise = exponential_noise(chosen, 1, for_token)[:, 0] if temperature > 0 else None
    return a, chosen, draw(logits_at(chosen), temperature, noise)


# --- The paper, 2: the references, log g_ref(a | x_n), (U, W) float32, -inf where g_ref is 0 --------------------------
# confidence (U, W) float32: the largest token probability of each position, max_v pi(x^a = v | x_n)


def uniform(allowed: Tensor) -> Tensor:
    """g_ref(a) = 1 / |allowed|; of Top-K, over its K positions."""
    return torch.where(allowed, -allowed.sum(1, keepdim=True).float().log(), -torch.inf)


def max_confidence(confidence: Tensor, candidates: Tensor) -> Tensor:
    """g_ref(a) = 1[a = argmax_a' confidence(a')], shared between ties."""
    return uniform(candidates & (confidence == confidence.masked_fill(~candidates, -1).amax(1, keepdim=True)))


def softmax_confidence(confidence: Tensor, candidates: Tensor, tau: float) -> Tensor:
    """g_ref(a) = exp(confidence(a) / tau) / sum_a' exp(confidence(a') / tau)."""
    return (confidence / tau).masked_fill(~candidates, -torch.inf).log_softmax(1)


def most_confident_k(confidence: Tensor, candidates: Tensor, k: int) -> Tensor:
    """The K most confident candidates (U, W) bool, of ties the leftmost; all where there are fewer. Top-K:
    g_ref(a) = 1[a among them] / K, and g itself is restricted to them."""
    order = confidence.masked_fill(~candidates, -1).sort(dim=1, descending=True, stable=True).indices
    return torch.zeros_like(candidates).scatter_(1, order[:, :k], True) & candidates


def log_reference(cfg: "Config", confidence: Tensor, allowed: Tensor) -> Tensor:
    """log g_ref of cfg.ref over the positions that g may choose; none: uniform, with beta 0."""
    if cfg.ref == "max_confidence":
        return max_confidence(confidence, allowed)
    return softmax_confidence(confidence, allowed, cfg.tau) if cfg.ref == "softmax_confidence" else uniform(allowed)


# --- The paper, 3: the policy g, one transformer layer and an MLP over what the frozen base sees ----------------------


def sinusoids(position: Tensor, width: int) -> Tensor:
    """Sines and cosines of position (U, W) long at width / 2 frequencies spaced evenly up to pi, (U, W, width) float32:
    positions less than width / 2 apart have orthogonal codes, so that one linear map can attend to any of them. The
    usual geometric spacing spends most of a narrow width on wavelengths far beyond the sequence."""
    rate = math.pi * (torch.arange(width // 2, device=position.device) + 0.5) / (width // 2)
    angle = position[..., None] * rate
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)


def place(values: Tensor, positions: Tensor) -> Tensor:
    """values (N,) at the N True positions (B, W), -inf elsewhere; float32."""
    return torch.full(positions.shape, -torch.inf, device=values.device).masked_scatter(positions, values.float())


def layer_at(layer: nn.TransformerEncoderLayer, h: Tensor, attention: Tensor, allowed: Tensor) -> Tensor:
    """The layer's output where g is not 0, (N, D) row-major: all other positions are keys and values, nothing more."""
    first = allowed.long().argsort(dim=1, descending=True, stable=True)[:, : int(allowed.sum(1).max())]
    here = first[..., None].expand(-1, -1, h.shape[-1])  # each row's allowed positions, then some others
    normed = layer.norm1(h)  # (U, W, D)
    # on a CPU PyTorch's fused attention is slower than its plain one for sequences this short
    with sdpa_kernel(SDPBackend.MATH) if h.device.type == "cpu" else contextlib.nullcontext():
        queries = normed.gather(1, here)
        attended, _ = layer.self_attn(queries, normed, normed, key_padding_mask=~attention, need_weights=False)
    x = (h.gather(1, here) + attended)[allowed.gather(1, first)]  # (N, D)
    return x + layer.linear2(F.gelu(layer.linear1(layer.norm2(x))))


class UnmaskingPolicy(nn.Module):
    """g: State -> log g(a | x_n). width: of the base's hidden states. For LLaDA-8B's 4096 it has 134.5M parameters."""

    def __init__(self, width: int, heads: int = 32):
        super().__init__()
        options = dict(activation="gelu", batch_first=True, norm_first=True)
        self.layer = nn.TransformerEncoderLayer(width, heads, width // 2, 0.0, **options)
        inputs = width + TOP
        hidden = [part for _ in range(3) for part in (nn.Linear(inputs, inputs), nn.GELU())]
        self.mlp = nn.Sequential(*hidden, nn.Linear(inputs, 1))

    def forward(self, hidden, top, attention, candidates, allowed, temperature: float = 1.0) -> Tensor:
        """The fields of a State -> log g at the position temperature, (U, W) float32, -inf where not allowed."""
        # the residual stream of an 8B model has outliers of several hundred: bring it to unit scale, in float32
        h = F.layer_norm(hidden.float(), hidden.shape[-1:])
        position = (attention.cumsum(1) - 1).clamp(min=0)  # counted from the first token behind the padding
        h = layer_at(self.layer, h + sinusoids(position, h.shape[-1]), attention, allowed)  # (N, D), where g is not 0
        with torch.autocast(h.device.type, enabled=False):  # a score in bf16 would move rho by 1%
            scores = self.mlp(torch.cat([h.float(), top[allowed]], dim=-1))[:, 0]
        return place(scores / temperature, allowed).log_softmax(1)  # softmax over the allowed positions only


# --- The paper, 4: the objective --------------------------------------------------------------------------------------


def per_row(values: Tensor, row: Tensor, rows: int) -> Tensor:
    """Sums of values (S,) over the actions of each trajectory, (B,); row (S,) long says whose each is."""
    return torch.zeros(rows, device=values.device).index_add(0, row, values)


def sum_over_steps(values: Tensor, e: Trajectories) -> Tensor:
    """(1/B) sum_b sum_n of values (S,), a scalar; the weights make a subset of the steps unbiased for all of them."""
    return per_row(e.weight * values, e.row, len(e.length)).mean()


def mean_over_actions(values: Tensor, e: Trajectories) -> float:
    """(1/B) sum_b of the weighted mean of values (S,) over b's actions, for what is reported."""
    total, count = (per_row(e.weight * v, e.row, len(e.length)) for v in (values.detach(), torch.ones_like(values)))
    return (total / count).mean().item()


def surrogate(log_g: Tensor, log_old: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """min(rho A, clip(rho, 1 - clip, 1 + clip) A) of each step, (S,) float32; rho = g / g_old at a_n."""
    rho = (log_g - log_old).exp()
    return torch.minimum(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage)


def kl_gradient(log_g: Tensor, log_old: Tensor, log_ratio: Tensor, weight: Tensor, row: Tensor) -> Tensor:
    """A scalar with the gradient of KL(g || g_ref) over trajectories; its value means nothing.

    grad KL = E_g[(1 + log g(traj) - log g_ref(traj)) grad log g(traj)], and the trajectories are g_old's:
    clip(g / g_old, 1/2, 2) weighs them. The base's own factors are the same in g and g_ref and cancel. log_g, log_old,
    weight, row (S,); log_ratio (B,), over whole trajectories. Exact in the mean at g = g_old.
    """
    along = per_row(weight * log_g, row, len(log_ratio))  # log g(traj), but for a constant
    moved = along - per_row(weight * log_old, row, len(log_ratio))  # log g - log g_old
    rho = moved.exp().clamp(0.5, 2)
    return ((rho * (1 + moved + log_ratio)).detach() * along).mean()


def cross_entropy(log_g: Tensor, log_ref: Tensor) -> Tensor:
    """- sum_a g_ref(a) log g(a) of each state, (U,); log_g and log_ref (U, W), -inf outside the supports."""
    there = ~log_ref.isneginf()
    return -torch.where(there, log_ref.exp() * log_g.masked_fill(~there, 0.0), 0.0).sum(1)


def upo_loss(log_g: Tensor, e: Trajectories, advantages: Tensor, *, ref: str, clip: float, beta: float):
    """L_token = - [ (1/B) sum_b sum_n min(rho A_b, clip(rho) A_b) - beta D ] of one update: (a scalar, its figures).
    Proposition 1: at g = g_old it has the gradient of L_output = - E[p_g(x_0) / p_g_old(x_0) A(x_0)], whose p_g(x_0) is
    a sum over all orders. log_g (U, W): g on the states of e; advantages (B,). D is L_KL, the KL over trajectories,
    with softmax_confidence and topk; with max_confidence, whose g_ref is 0 almost everywhere, the cross-entropy, summed
    over steps; and nothing with none. The figures are the loss and, over actions, the mean cross-entropy, the share of
    ratios outside the clip, and mean |log rho|.
    """
    at_action = log_g[e.at, e.action]  # log g(a_n | x_n), (S,)
    gain = surrogate(at_action, e.log_old, advantages[e.row], clip)
    loss, divergence = -sum_over_steps(gain, e), cross_entropy(log_g, e.log_ref)[e.at]
    if beta and ref == "max_confidence":
        loss = loss + beta * sum_over_steps(divergence, e)
    elif beta and ref != "none":
        loss = loss + beta * kl_gradient(at_action, e.log_old, e.log_ratio, e.weight, e.row)
    log_rho = at_action - e.log_old
    outside = ((log_rho.exp() - 1).abs() > clip).float()
    figures = {"cross_entropy": divergence, "clipped": outside, "log_ratio": log_rho.abs()}
    return loss, {"loss": loss.item()} | {name: mean_over_actions(values, e) for name, values in figures.items()}


# --- The paper, 5: the algorithm --------------------------------------------------------------------------------------


def train_step(run: Run, base: "FrozenBase", g: nn.Module, optimizer, problems: list[Problem], step: int) -> dict:
    """One step of UPO, the paper's algorithm box; returns its metrics. Raises UsageError if a loss is not finite.

    base: pi, frozen; g: the policy as Accelerate has wrapped it; problems: what prompts are taken from. The rest of the
    file only prepares these."""
    cfg, updates, losses = run.cfg, [], []
    # Roll out G trajectories of each prompt: a_n ~ g_old(. | x_n), x_{n-1} ~ pi(. | x_n, a_n), until x_0, whose reward
    # is r. g_old is g as it is now.
    g_old = learned(run.accelerator.unwrap_model(g), cfg, sampled=True)
    e, r, metrics = sample_groups(run, base, g_old, problems, step, ROLLOUT)
    # A_b = (r_b - mean r) / std r
    A = group_advantages(r, cfg.group_size, cfg.advantage).to(run.device)
    for rows, part in micro_batches(run, e):
        with run.accelerator.accumulate(g):
            # g(. | x_n) on the states of the rollout, which need no forward of the base
            log_g = g(*part.state, cfg.position_temperature)
            # rho = g / g_old -> - [ (1/B) sum_b sum_n min(rho A_b, clip(rho) A_b) - beta D(g || g_ref) ]
            loss, figures = upo_loss(log_g, part, A[rows], ref=cfg.ref, clip=cfg.clip, beta=cfg.beta)
            run.accelerator.backward(loss)  # divided by the number of micro-batches of an update there
        losses.append(figures)
        if len(losses) == cfg.shape()[1]:
            # phi <- phi + AdamW(gradient), after a warm-up, once per minibatch
            done = step * cfg.mu * cfg.shape()[0] + len(updates)
            lr = cfg.lr * min(1.0, (done + 1) / max(cfg.warmup, 1)) * (1 - cfg.lr_decay * step / cfg.max_steps)
            updates.append(run.update(g, optimizer, lr, cfg.max_grad_norm, losses, f"step {step + 1}"))
            losses = []
    return metrics | mean_of(updates)


# --- Settings: maskgrpo.py's and these. A default is the paper's value; the tables behind them change it --------------

# What a reference is trained with; a flag given by hand wins over its row.
REFERENCES = {
    "max_confidence": dict(init="pretrained"),
    "softmax_confidence": dict(init="pretrained"),
    "topk": dict(init="random"),
    "none": dict(init="random", beta=0.0),  # no reference, as in DColT (Huang et al., 2025)
}


@dataclasses.dataclass
class Config(Common):
    """Every setting of a run of upo.py."""

    ref: str = flag("topk", "reference order, a row of REFERENCES", choices=tuple(REFERENCES))
    task: str | None = flag(None, "sudoku, or that of --policy", choices=[t for t in TASKS if not TASKS[t].codebook])
    policy: str | None = flag(None, "with --eval_only: run directory of a trained policy; has its base and settings")
    position_temperature: float = flag(0.8, "of the positions, in rollouts")
    positions_per_step: int = flag(1, "positions revealed per forward of the base")
    nfe_weight: float = flag(0.0, "what each forward costs of the reward")
    threshold: float = flag(0.9, "the order `threshold` of the table reveals all that are surer, at least one")
    heads: int = flag(32, "attention heads of the layer")
    topk: int = flag(5, "K of topk and topk_random")
    tau: float = flag(0.05, "temperature of softmax_confidence")
    init: str = flag("random", "of g: random, or by cross-entropy to g_ref first", choices=("random", "pretrained"))
    init_steps: int = flag(500, "steps of that cross-entropy")
    init_lr: float = flag(1e-4, "AdamW learning rate of that cross-entropy")
    minibatch_size: int = flag(6, "trajectories per process and micro-batch")
    steps_per_update: int = flag(32, "steps of each trajectory that an update sees, 0: all")
    offload: bool = flag(False, "keep the rollout's features in CPU memory")
    lr_decay: bool = flag(False, "the learning rate falls linearly to zero at max_steps")
    corpus: str = flag("plain", "tiny sudoku: digits in its base's training", choices=("plain", "spelled"))
    pass_n: int = flag(0, "held-out problems for pass@N of random and top-K orders, 0: none")

    def batches(self, processes: int) -> list[int]:
        """What a run that goes on must have again: sizes over all processes, and the micro-batches of an update."""
        return [self.batch_size * processes, self.minibatch_size * processes, self.accumulation]

    def shape(self) -> tuple[int, int]:
        """(updates per pass over a rollout, micro-batches per update)."""
        parts = self.batch_size // self.minibatch_size
        return parts // (self.accumulation or parts), self.accumulation or parts


# What differs from maskgrpo.py's values, and what a task changes, for published checkpoints.
PAPER = dict(max_steps=219, block_length=32, temperature=0.0, batch_size=18, accumulation=0, mu=16, clip=0.5)
PAPER |= dict(warmup=196, beta=1e-4, eval_every=25)
TASK = {"sudoku": dict(gen_length=64, block_length=16, advantage="mean")}
# The tiny model's values, and what a task changes in them.
TINY = dict(max_steps=350, save_every=25, bf16=False, gen_length=16, block_length=4, position_temperature=1.0, heads=4)
TINY |= dict(topk=3, init_steps=10, init_lr=2e-3, group_size=8, batch_size=256, minibatch_size=64, mu=2, clip=0.2)
TINY |= dict(steps_per_update=0, advantage="mean", lr=2e-3, lr_decay=True, warmup=40, weight_decay=0.0, accumulation=1)
TINY |= dict(beta=2.4e-3, tau=0.2, max_grad_norm=1.0, eval_n=1500, eval_every=50, eval_batch_size=1024, pass_n=200)
TINY_TASK = {
    "mbpp": dict(max_steps=80),  # programs take time to run
    "zebra": dict(max_steps=100, eval_n=1000),
    "sudoku": dict(gen_length=20, block_length=16, topk=8, corpus="spelled", max_steps=200, lr=3e-3)
    | dict(batch_size=512, minibatch_size=256),
}
# What a policy was trained with, and needs when it is evaluated; and what its task needs, unless that is another.
OF_THE_POLICY = "ref tau heads temperature position_temperature positions_per_step mask_token bf16 seed".split()
OF_ITS_TASK = "task topk gen_length block_length data eval_data corpus".split()


def tables(cfg: Config) -> list[dict]:
    """Where a run's defaults come from: its model, its reference, its task, its --policy; the last one wins."""
    trained = {}
    if cfg.policy:
        with in_one_line(f"--policy {cfg.policy}: no trained policy there"):
            saved = json.loads((Path(cfg.policy) / "policy" / "config.json").read_text())
            names = OF_THE_POLICY + OF_ITS_TASK * (cfg.task in (None, saved["task"]))
            trained = {name: saved[name] for name in names if name in saved} | {"model": saved["base"]}
        if file := cfg.eval_data or cfg.data:  # all of it is evaluated
            trained |= dict(eval_data=None) if file == "generated" else dict(data=file, eval_data=file, eval_n=0)
    tiny = dataclasses.replace(cfg, model=cfg.model or trained.get("model")).tiny()
    task = cfg.task or trained.get("task", "sudoku")
    of_task, of_ref = (TINY_TASK if tiny else TASK).get(task, {}), REFERENCES[trained.get("ref", cfg.ref)]
    of_model = {"corpus": "plain"} if cfg.model else {}  # its base is trained already
    return [PAPER, TINY if tiny else {}, of_task, of_ref, of_model, {"task": task}, trained]


def rules(cfg: Config) -> dict[str, object]:
    """What only upo.py has to check."""
    positions = min(cfg.block_length, cfg.gen_length)
    update = cfg.minibatch_size * max(cfg.accumulation, 1)
    parts = f"--batch_size {cfg.batch_size} is no multiple of {update}, --minibatch_size x --accumulation"
    few = f"--topk {cfg.topk}: at most {positions} positions are masked at once (--block_length)"
    many = f"--positions_per_step {cfg.positions_per_step}: from 1 to the K of --ref topk, {cfg.topk}"
    pair = "--eval_only needs --policy, the run directory of a trained policy, and --policy needs --eval_only"
    none = "--ref none has no reference: --init random, --beta 0"
    return {
        parts: update > 0 and cfg.batch_size % update == 0,
        few: cfg.topk <= positions or cfg.ref != "topk",
        many: 1 <= cfg.positions_per_step and (cfg.positions_per_step <= cfg.topk or cfg.ref != "topk"),
        f"--corpus {cfg.corpus}: of the tiny sudoku base, which is trained here": cfg.corpus == "plain"
        or (TASKS[cfg.task].corpus and (cfg.policy or not cfg.model)),
        none: cfg.ref != "none" or (cfg.init == "random" and not cfg.beta),
        pair: cfg.eval_only == bool(cfg.policy),
    }


# --- The frozen base, and a policy on it ------------------------------------------------------------------------------


class FrozenBase:
    """pi, read at two places: the logits at some positions, and the hidden state that enters its last block."""

    def __init__(self, model: nn.Module):
        self.model, self.width = model.eval().requires_grad_(False), model.hf.config.hidden_size
        stacks = [m for m in model.hf.modules() if isinstance(m, nn.ModuleList)]
        keep = lambda block, args, kwargs: setattr(self, "hidden", args[0] if args else kwargs["hidden_states"])
        max(stacks, key=len)[-1].register_forward_pre_hook(keep, with_kwargs=True)

    def read(self, x: Tensor, attention: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(hidden (B, W, D), logits (N, V) float32 at the N True positions); all of one forward."""
        logits = self.model(x, attention, positions, rough=True)
        if not self.model.shifted:
            return self.hidden, logits
        # Dream predicts position i at i - 1: what it knows about i stands there; nothing stands before the first
        known = F.pad(attention, (1, 0))[:, :-1, None]
        return F.pad(self.hidden, (0, 0, 1, 0))[:, :-1] * known, logits


def frozen_base(run: Run, data: dict[str, list[Problem]]) -> tuple[FrozenBase, str, bool]:
    """(the base, where it lies, whether it was there already); without --model maskgrpo.py's tiny one for the task."""
    cfg = run.cfg
    flags = ["--task", cfg.task, "--seed", str(cfg.seed), "--output_dir", cfg.output_dir]
    flags += ["--model", cfg.model] * bool(cfg.model) + ["--mask_token", cfg.mask_token] * bool(cfg.mask_token)
    training = Run(parse(flags), run.accelerator)
    training.cfg.bf16, training.cfg.resume = cfg.bf16, cfg.resume
    spell = run.task.corpus if cfg.corpus == "spelled" else lambda problem, i: problem
    lessons = [spell(problem, i) for i, problem in enumerate(data["train"])]
    path, cached = base_path(training, data | {"train": lessons})
    run.accelerator.free_memory()  # of its training
    run.seconds["base"], run.began = training.seconds["base"], min(run.began, training.began)
    base = FrozenBase(load_model(path, training.cfg, trainable=False).to(run.device))
    base.model.check_problems(run.task, data, cfg.gen_length, run.say)
    return base, path, cached


def new_policy(cfg: Config, base: FrozenBase, device) -> UnmaskingPolicy:
    """The head for a base, its random weights from the seed; with --policy, those of that policy."""
    require({f"--heads {cfg.heads} does not divide the base's width, {base.width}": base.width % cfg.heads == 0})
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cfg.seed)
        policy = UnmaskingPolicy(base.width, cfg.heads)
    if cfg.policy:
        with in_one_line(f"--policy {cfg.policy}: cannot be loaded"):
            weights = load_file(Path(cfg.policy) / "policy" / "model.safetensors")
            width = weights["mlp.0.weight"].shape[1] - TOP
            misfit = f"--policy {cfg.policy}: made for bases of width {width}, this one has {base.width}"
            require({misfit: width == base.width})
            policy.load_state_dict(weights)
    return policy.to(device)


# --- Rollouts ---------------------------------------------------------------------------------------------------------

# First key of every seeded generator, so that no two uses share their noise.
DATA, ROLLOUT, SUBSET, PRETRAIN, EVALUATION = range(100, 105)


class Order(NamedTuple):
    """How positions are chosen."""

    scores: Callable[[State, Tensor], Tensor]  # (x_n, logits (N, V) of its candidates) -> (U, W) float32; g's are log g
    sampled: bool  # by draws from the scores' softmax; else the highest
    threshold: float | None = None  # all whose score is above it, at least one; else --positions_per_step


def learned(policy: nn.Module, cfg: Config, sampled: bool) -> Order:
    """The policy: sampled in rollouts, its most probable position in evaluation."""
    return Order(lambda state, logits: policy(*state, cfg.position_temperature), sampled)


def see(base: FrozenBase, x: Tensor, attention: Tensor, candidates: Tensor, cfg: Config):
    """(what g sees of x_n, a State; the base's token logits at the candidates (N, V) float32)."""
    hidden, logits = base.read(x, attention, candidates)
    best = logits.softmax(-1).topk(min(TOP, logits.shape[1]), dim=1).values
    top = torch.zeros(*x.shape, TOP, device=x.device)
    top[candidates] = F.pad(best, (0, TOP - best.shape[1]))
    allowed = most_confident_k(top[..., 0], candidates, cfg.topk) if cfg.ref == "topk" else candidates
    hidden = hidden.bfloat16() if cfg.bf16 else hidden  # as it is kept: rollouts and updates see the same
    return State(hidden, top, attention, candidates, allowed), logits


def step_weights(cfg: Config, most: list[int], keys) -> Tensor:
    """(B, steps) float32: 1 / the chance that a step is in an update, 0 where it is not. most: the positions of each
    row, which say how many steps it has unless EOS comes first; keys: as in `unmask`.

    All steps, or with --steps_per_update the first one and, of every `stride` that follow, one at random: the chance
    is 1 / stride exactly, however long the trajectory turns out to be. All passes over a rollout share the draw, so
    that the features of no other step need be kept."""
    rows, of = [], lambda positions: -(-positions // cfg.positions_per_step)
    for (blocks, rest), key in zip([divmod(n, cfg.block_length) for n in most], keys, strict=True):
        steps = blocks * of(cfg.block_length) + of(rest)
        row, stride = torch.ones(steps), -(-steps // cfg.steps_per_update) if cfg.steps_per_update else 1
        if stride > 1:
            offsets = torch.randint(stride, (-(-(steps - 1) // stride),), generator=seeded(*key, SUBSET))
            row[1:] = stride * (offsets[:, None] == torch.arange(stride)).flatten()[: steps - 1]
        rows.append(row)
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


class Record:
    """The steps that updates will see, gathered as they happen; weights (B, steps): of `step_weights`."""

    def __init__(self, cfg: Config, weights: Tensor):
        self.cfg, self.weights, self.states, self.steps, self.seen = cfg, weights, [], [], 0
        self.log_ratio, self.entropy = torch.zeros(2, len(weights), device=weights.device)

    def add(self, rows: Tensor, same: Tensor, n: Tensor, state: State, log_g: Tensor, a: Tensor, k: Tensor) -> None:
        """Rows (R,), in the states `same` (R,) of U, have taken n (R,) steps and now the first k (R,) actions of a
        (R, most of k)."""
        log_ref, log_old = log_reference(self.cfg, state.top[..., 0], state.allowed), log_g[same, a[:, 0]]
        self.log_ratio[rows] += log_old - log_ref[same, a[:, 0]]  # infinite with max_confidence, which does not use it
        self.entropy[rows] += torch.special.entr(log_g.exp()).sum(1)[same]
        weight = self.weights[rows, n]  # (R,)
        kept = weight > 0
        used, at = same[kept].unique(return_inverse=True)
        self.states.append((*(v[used].cpu() if self.cfg.offload else v[used] for v in state), log_ref[used]))
        self.steps.append((rows[kept], at + self.seen, a[kept, 0], log_old[kept], weight[kept]))
        self.seen += len(used)
        if (more := k > 1).any():  # the next action is g's choice among the positions that are left
            left = state.allowed[same].scatter(1, a[:, :1], False)[more]
            different, same = torch.cat([same[more, None], left], dim=1).unique(dim=0, return_inverse=True)
            at, left = different[:, 0], different[:, 1:].bool()
            log_g = log_g[at].masked_fill(~left, -torch.inf).log_softmax(1)
            state = State(*(v[at] for v in state))._replace(allowed=left)
            self.add(rows[more], same, n[more], state, log_g, a[more, 1:], k[more] - 1)

    def trajectories(self, x: Tensor, unmask_step: Tensor, length: Tensor) -> Trajectories:
        steps, (*state, log_ref) = ([torch.cat(pieces) for pieces in zip(*of)] for of in (self.steps, self.states))
        of_rows = (x, unmask_step, length, self.log_ratio, self.entropy / length)
        return Trajectories(*of_rows, *steps, State(*state), log_ref)


@torch.no_grad()
def unmask(base: FrozenBase, batch, orders: list[Order], cfg: Config, keys, eos_ids, keep: bool = False):
    """Reveal k positions per step and row of a batch of maskgrpo.py's until all are finished -> Trajectories.

    orders: of the B rows; keys: of their noise, so that a row's actions depend on no batch; keep: with what updates
    need. A row that has finished is not computed any more; rows in the same state, as a group's at first, are computed
    once, whatever their orders. The base is not wrapped by DDP: processes need not agree on how many forwards."""
    x, masked = batch.x.clone(), batch.completion.clone()
    unmask_step, length = torch.full_like(x, -1), torch.zeros(len(x), dtype=torch.long, device=x.device)
    block = torch.where(masked, (masked.cumsum(1) - 1) // cfg.block_length, x.shape[1])  # (B, W)
    for_a, for_token = ([seeded(*key, use, device=x.device) for key in keys] for use in range(2))
    record = Record(cfg, step_weights(cfg, masked.sum(1).tolist(), keys).to(x.device)) if keep else None
    while True:
        unfinished = masked & through_eos(x, batch.completion, eos_ids)
        rows = unfinished.any(1).nonzero()[:, 0]  # (R,)
        if not len(rows):
            break
        current = block.masked_fill(~unfinished, x.shape[1])
        candidates = unfinished & (current == current.amin(1, keepdim=True))  # (B, W)
        _, same = torch.cat([x, batch.attention, candidates], dim=1)[rows].unique(dim=0, return_inverse=True)  # (R,)
        u = rows.new_empty(int(same.max()) + 1).scatter_(0, same, rows)  # a row in each of the U different states
        state, logits = see(base, x[u], batch.attention[u], candidates[u], cfg)
        nth = state.candidates.flatten().cumsum(0).view(len(u), -1) - 1  # which of the N candidates
        for order in {orders[r] for r in rows.tolist()}:
            its = torch.tensor([orders[r] is order for r in rows.tolist()], device=x.device)  # (R,)
            at, of = same[its].unique(return_inverse=True)  # its states among the U, and in which of them each row is
            seen, mine = State(*(v[at] for v in state)), rows[its]
            # g(a_n | x_n), and pi(x_{n-1} | x_n, a_n) at the chosen positions
            log_g = order.scores(seen, logits[nth[at][seen.candidates]])
            most = cfg.positions_per_step if order.threshold is None else (log_g > order.threshold).sum(1).clamp(min=1)
            k = log_g.isfinite().sum(1).clamp(max=most)[of]  # (M,)
            logits_at = lambda chosen: logits[nth[at][of][chosen]]  # noqa: B023
            noise = [for_a[r] for r in mine.tolist()] if order.sampled else None, [for_token[r] for r in mine.tolist()]
            a, chosen, tokens = reveal(log_g[of], candidates[mine], k, logits_at, cfg.temperature, *noise)
            if keep:
                record.add(mine, of, length[mine], seen, log_g, a, k)
            now = torch.zeros_like(masked).index_put_((mine,), chosen)
            x[now], masked[now], unmask_step[now] = tokens, False, length[now.nonzero()[:, 0]]
        length[rows] += 1
    tail = batch.completion & ~through_eos(x, batch.completion, eos_ids)
    done = x.masked_fill(tail, base.model.pad_id), unmask_step.masked_fill(tail, -1), length
    return record.trajectories(*done) if keep else Trajectories(*done)


def complete(run: Run, base: FrozenBase, problems: list[Problem], orders: list[Order], keys, keep: bool = False):
    """(Trajectories of one completion per problem, by its order; its text); keep: with what updates need."""
    n, ends = run.cfg.gen_length, base.model.ends_of(run.task)
    batch = base.model.open_batch(run.task, problems, n, run.device)
    e = unmask(base, batch, orders, run.cfg, keys, ends, keep)
    return e, base.model.texts(batch._replace(x=e.x), through_eos(e.x, batch.completion, ends), n)


def sample_groups(run: Run, base: FrozenBase, order: Order, train: list[Problem], step: int, use: int):
    """(Trajectories, rewards (B,) float32, metrics averaged over processes) of G trajectories of each prompt. A group
    never straddles processes, so that advantages need no communication."""
    cfg, g, groups = run.cfg, run.cfg.group_size, run.cfg.batch_size // run.cfg.group_size
    first, counter = run.rank * groups, (step * run.world + run.rank) * groups
    problems = [train[i] for i in shuffled(len(train), groups, counter, cfg.seed, DATA, use) for _ in range(g)]
    keys = [(cfg.seed, use, step, first + i, k) for i in range(groups) for k in range(g)]
    with run.clock("rollout"):
        e, texts = complete(run, base, problems, [order] * len(keys), keys, keep=True)
        r = torch.tensor([sum(terms.values()) for terms, _ in judge_all(run.task, texts, problems)])
        r -= cfg.nfe_weight * e.length.cpu()
    metrics = {"reward": r.mean().item(), "group_reward_std": r.view(-1, g).std(1).mean().item()}
    metrics |= {"entropy": e.entropy.mean().item(), "steps": e.length.float().mean().item()}
    metrics |= {"kl": e.log_ratio.mean().item()} if cfg.ref in ("softmax_confidence", "topk") else {}
    return e, r, run.average(metrics)


def micro_batches(run: Run, e: Trajectories) -> Iterator[tuple[Tensor, Trajectories]]:
    """mu times all of e, in micro-batches: (rows (b,) long, these trajectories with their steps and states, on the
    device). Every m-th row shares one: the same trajectories, whatever the number of processes."""
    m = run.cfg.batch_size // run.cfg.minibatch_size
    for first in [*range(m)] * run.cfg.mu:
        rows, index = torch.arange(first, run.cfg.batch_size, m, device=run.device), torch.full_like(e.length, -1)
        index[rows] = torch.arange(len(rows), device=run.device)
        mine = index[e.row] >= 0
        used, at = e.at[mine].unique(return_inverse=True)
        of_steps = {name: getattr(e, name)[mine] for name in ("action", "log_old", "weight")}
        of_states = dict(state=State(*(v[used.to(v.device)].to(run.device) for v in e.state)), log_ref=e.log_ref[used])
        of_rows = dict(length=e.length[rows], log_ratio=e.log_ratio[rows])
        yield rows, e._replace(row=index[e.row[mine]], at=at, **of_steps, **of_states, **of_rows)


# --- Evaluation: every order on the same problems ---------------------------------------------------------------------

# Orders to compare with: name -> (score of a position from its token log-probabilities (N, V), is it sampled?).
# Sampled scores are log-probabilities up to a constant per row; of the others the highest is taken.
ORDERS: dict[str, tuple[Callable[[Tensor, float], Tensor], bool]] = {
    "random": (lambda log_p, tau: torch.zeros(len(log_p), device=log_p.device), True),
    "max_confidence": (lambda log_p, tau: log_p.amax(1), False),
    "margin": (lambda log_p, tau: log_p.exp().topk(2, dim=1).values.diff(dim=1)[:, 0].neg(), False),
    "entropy": (lambda log_p, tau: -torch.special.entr(log_p.exp()).sum(1), False),
    "softmax_confidence": (lambda log_p, tau: log_p.amax(1).exp() / tau, True),
    "topk_random": (lambda log_p, tau: torch.zeros(len(log_p), device=log_p.device), True),  # restricted to top K
    "threshold": (lambda log_p, tau: log_p.amax(1), False),  # max_confidence, as many as are above --threshold
}
LUCKY, PASS_AT = ("random", "topk_random"), (1, 2, 4, 8, 16)  # the orders whose pass@N is measured, and at which N


def rule(name: str, cfg: Config) -> Order:
    """One of ORDERS, over the candidates, or over the K most confident of them."""
    (score, sampled), k = ORDERS[name], cfg.topk if name == "topk_random" else cfg.block_length  # never more at once

    def scores(state: State, logits: Tensor) -> Tensor:
        best = most_confident_k(state.top[..., 0], state.candidates, k)
        return place(score(logits.log_softmax(-1), cfg.tau), state.candidates).masked_fill(~best, -torch.inf)

    return Order(scores, sampled, math.log(cfg.threshold) if name == "threshold" else None)


def answer_confidence(base: FrozenBase) -> Order:
    """max_confidence of one who knows the spellings: probabilities are summed over tokens that are equal under NFKC."""
    tokenizer, classes = base.model.tokenizer, {}
    plain = [unicodedata.normalize("NFKC", tokenizer.decode([i])) for i in range(base.model.hf.config.vocab_size)]
    of = torch.tensor([classes.setdefault(text, len(classes)) for text in plain])

    def scores(state: State, logits: Tensor) -> Tensor:
        p = torch.zeros_like(logits).index_add(1, of.to(logits.device), logits.softmax(-1))
        return place(p.amax(1), state.candidates)

    return Order(scores, sampled=False)


def evaluate(run: Run, base: FrozenBase, orders: dict[str, Order], problems: list[Problem]) -> list[dict]:
    """Completions of every problem by every order, of the first --pass_n PASS_AT[-1] by LUCKY ones; the same on all
    processes. A problem's are side by side: a state that several of a batch come through is computed once. Dicts of
    method, problem (index), sample, completion, nfe (forwards of the base, had it been alone), steps (that revealed its
    tokens, -1: none did), tokens, score (0 to 1)."""
    cfg, n, done = run.cfg, run.cfg.gen_length, []
    draws = lambda name, i: range(PASS_AT[-1] if name in LUCKY and i < cfg.pass_n else 1)
    mine = [(name, i, s) for i in range(run.rank, len(problems), run.world) for name in orders for s in draws(name, i)]
    with run.clock("eval"):
        for first in range(0, len(mine), cfg.eval_batch_size):
            rows = mine[first : first + cfg.eval_batch_size]
            asked, keys = [problems[i] for _, i, _ in rows], [(cfg.seed, EVALUATION, i, s) for _, i, s in rows]
            e, texts = complete(run, base, asked, [orders[name] for name, *_ in rows], keys)
            scores = [score for _, score in judge_all(run.task, texts, asked)]
            columns = texts, e.length.tolist(), e.unmask_step[:, -n:].tolist(), e.x[:, -n:].tolist(), scores
            done += [(*row, *cells) for row, *cells in zip(rows, *columns)]
    names = ("method", "problem", "sample", "completion", "nfe", "steps", "tokens", "score")
    return [dict(zip(names, row)) for row in sorted(gather_object(done))]


def measure(run: Run, base: FrozenBase, policy: nn.Module, problems: list[Problem]) -> dict[str, list[dict]]:
    """{method: its rows of evaluate}."""
    cfg, methods = run.cfg, {name: rule(name, run.cfg) for name in ORDERS}
    methods |= {"answer_confidence": answer_confidence(base)} if cfg.corpus == "spelled" else {}
    methods["upo"] = learned(policy, cfg, sampled=False)
    found = evaluate(run, base, methods, problems)
    return {name: [row for row in found if row["method"] == name] for name in methods}


# --- The run ----------------------------------------------------------------------------------------------------------


def init_step(run: Run, base: FrozenBase, g: nn.Module, optimizer, problems: list[Problem], step: int) -> dict:
    """One step of --init pretrained: g learns the choices of g_ref, on trajectories of g_ref; its metrics."""
    cfg, updates, losses = run.cfg, [], []
    # g_ref, as scores whose draws without replacement are its choices one after the other: max_confidence, which is 0
    # but at one position, is the limit of softmax_confidence
    like = dataclasses.replace(cfg, ref="softmax_confidence", tau=1e-10) if cfg.ref == "max_confidence" else cfg
    g_ref = Order(lambda state, logits: log_reference(like, state.top[..., 0], state.allowed), sampled=True)
    e, _, metrics = sample_groups(run, base, g_ref, problems, step, PRETRAIN)
    for _, part in micro_batches(run, e):
        with run.accelerator.accumulate(g):
            log_g = g(*part.state, cfg.position_temperature)
            entropy = cross_entropy(log_g, part.log_ref)[part.at]
            loss = sum_over_steps(entropy, part)
            run.accelerator.backward(loss)
        figures = dict(cross_entropy=mean_over_actions(entropy, part), clipped=0.0, log_ratio=0.0)
        losses.append({"loss": loss.item()} | figures)
        if len(losses) == cfg.shape()[1]:
            updates.append(run.update(g, optimizer, cfg.init_lr, cfg.max_grad_norm, losses, f"init step {step + 1}"))
            losses = []
    return metrics | mean_of(updates)


def train_policy(run: Run, base: FrozenBase, g: nn.Module, optimizer, data: dict) -> None:
    """init_steps of cross-entropy to the reference (--init pretrained), then max_steps of UPO."""
    cfg, policy = run.cfg, run.accelerator.unwrap_model(g)
    warm = cfg.init_steps if cfg.init == "pretrained" else 0
    total = warm + cfg.max_steps
    updates = cfg.mu * cfg.shape()[0]
    run.say(f"updates   {cfg.max_steps} rollouts, {updates} each: {cfg.max_steps * updates:,}")
    for step in run.steps(total, "steps", cfg.save_every):
        phase, one_step, n = ("init", init_step, step) if step < warm else ("upo", train_step, step - warm)
        with run.clock("update"):
            line = {"step": step + 1, "phase": phase} | one_step(run, base, g, optimizer, data["train"], n)
        if cfg.eval_every and ((step + 1 - warm) % cfg.eval_every == 0 or step + 1 in (warm, total)):
            rows = evaluate(run, base, {"upo": learned(policy, cfg, sampled=False)}, data["validation"])
            line["validation_accuracy"] = rewards.accuracy([row["score"] for row in rows])["accuracy"]
            shown = ("reward", "group_reward_std", "entropy", "validation_accuracy")
            run.say(f"  {phase:>4} {step + 1:>5}/{total}  " + "  ".join(f"{name} {line[name]:.3f}" for name in shown))
        run.log(line)


# --- Report -----------------------------------------------------------------------------------------------------------


def figures_of(run: Run, rows: dict, problems: list[Problem]) -> dict:
    """The figures of results.json: accuracy, paired differences, pass@N, seconds; rows: of `measure`."""
    cfg, seconds, most, few = run.cfg, run.total(), PASS_AT[-1], min(run.cfg.pass_n, len(problems))
    once = {name: [row for row in of if row["sample"] == 0] for name, of in rows.items()}
    scores = {name: [row["score"] for row in of] for name, of in once.items()}
    accuracy = {name: rewards.accuracy(of) for name, of in scores.items()}
    # paired over problems: the mean difference, its standard error, and the p of the exact sign test
    better = {name: [a - b for a, b in zip(scores["upo"], of)] for name, of in scores.items() if name != "upo"}
    gain = {name: rewards.accuracy(of) for name, of in better.items()}
    p = {name: rewards.paired_p(scores[name], scores["upo"]) for name in better}
    nfe = {name: round(sum(row["nfe"] for row in of) / len(of), 4) for name, of in once.items()}
    groups = lambda of: [[row["score"] for row in of[i : i + most]] for i in range(0, most * few, most)]
    passes = {name: {n: round(rewards.pass_at(groups(rows[name]), n), 6) for n in PASS_AT} for name in LUCKY if few}
    seconds["train"] = seconds["rollout"] + seconds["update"]
    return {name: getattr(cfg, name) for name in ("task", "ref", "seed")} | {
        "n": len(problems),
        "accuracy": {k: {"mean": v["accuracy"], "stderr": v["stderr"], "nfe": nfe[k]} for k, v in accuracy.items()},
        "paired": {k: {"difference": v["accuracy"], "stderr": v["stderr"], "p": p[k]} for k, v in gain.items()},
        "pass_at_n": passes,
        "seconds": {name: round(seconds[name], 1) for name in ("base", "train", "eval", "total")},
    }


def report(run: Run, rows: dict, problems: list[Problem], **more) -> None:
    """results.json and completions.jsonl, and the same as a table."""
    results = figures_of(run, rows, problems) | more
    lines = [json.dumps(row) + "\n" for of in rows.values() for row in of if row["sample"] == 0]
    run.write("completions.jsonl", "".join(lines))
    lines = [f"{len(problems)} held-out problems, --positions_per_step {run.cfg.positions_per_step}"]
    lines += [f"{'order':<19} accuracy ± stderr   forwards   upo is better by, paired p"]
    for name, a in results["accuracy"].items():
        of = results["paired"].get(name)
        gap = f"{of['difference']:+.3f} ± {of['stderr']:.3f}, {of['p']:.0e}" if of else ""
        lines += [f"{name:<19} {a['mean']:.3f} ± {a['stderr']:.3f}       {a['nfe']:>6.2f}     {gap}".rstrip()]
    for name, values in results["pass_at_n"].items():
        cells = "  ".join(f"@{n} {value:.3f}" for n, value in values.items())
        lines += [f"pass {cells}   {name}, {min(run.cfg.pass_n, len(problems))} problems"]
    lines += ["seconds   " + "  ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items())]
    run.conclude(results, "\n".join(lines))


def main(argv: list[str] | None = None) -> None:
    """Parse; get a base; then train a policy, or load one; measure it beside the fixed orders."""
    cfg = parse(argv, Config, __doc__, tables)
    check(cfg, "position_temperature heads topk tau threshold init_lr", rules(cfg))
    run, data = start(cfg, "UPO")
    base, path, cached = frozen_base(run, data)
    policy = new_policy(cfg, base, run.device)
    if cfg.eval_only:
        policy = run.accelerator.prepare_model(policy, evaluation_mode=True)
    else:
        g, optimizer = run.prepare(policy, cfg.weight_decay, accumulation=cfg.shape()[1])
        train_policy(run, base, g, optimizer, data)
        # what --policy needs: the weights, and the settings that go with them
        run.accelerator.save_model(policy, run.path / "policy")
        about = {name: getattr(cfg, name) for name in OF_THE_POLICY + OF_ITS_TASK}
        about["base"] = str(Path(path).resolve()) if Path(path).is_dir() else path
        run.write("policy/config.json", json.dumps(about, indent=1))
    report(run, measure(run, base, policy, data["test"]), data["test"], base=path, base_cached=cached)


if __name__ == "__main__":
    sys.exit(cli(main=main, name="upo.py"))
