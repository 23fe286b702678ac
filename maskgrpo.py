"""MaskGRPO: group relative policy optimisation of a masked diffusion language model, in one file.

Paper: "Consolidating Reinforcement Learning for Multimodal Discrete Diffusion Models", ICLR 2026.
The likelihood of a completion is intractable for a masked diffusion model, so GRPO's importance ratio and KL
are taken from something computable: re-mask the finished completion, predict what was hidden, and compare the
new, the old and the reference policy on the same masks. Everything of the paper is in the first part of this
file, and `train_step` is its algorithm box. Without --model a tiny model is trained first on generated problems
and stopped while it is still imperfect; a published checkpoint runs through the same lines.

    symbol        shape            meaning
    c, o          (L,) long        a prompt, a completion of it; a batch x (B, L) has both
    x0, x_t       (B, L) long      a finished sequence, a partly masked one; x_1 hides the whole completion
    completion    (B, L) bool      the completion's positions, through its first EOS
    t, j, mu      float, int       mask ratio; inner update 1 ... mu; t_j = gamma + (1 - gamma) j / mu
    ell           (B,) float32     (1/t) sum over masked positions of log pi(x0^n | c, x_t)
    rho, D        (B,) or (B, L)   importance ratio and KL estimate, on ell (Eq. 9, 10) or token by token
    A, G, |o|     (B,), int, (B,)  advantage, group size, completion length

Departures from the paper
 1. As printed the objective is A (rho - beta D): a negative advantage would reward divergence. Here
    it is A rho - beta D, and rho A is clipped as in PPO.
 2. `--ratio token`, the default, has a ratio and a D per token, as the authors' code; `--ratio sequence` is Eq. 9
    and 10 as printed, whose interval dt is a constant that drops out. Where the policies are equal their gradients
    differ only in the denominator, the number of masked tokens instead of its expectation t |o|.
 3. Exponentials of log ratios beyond 1 go on as tangents (`tame_exp`), which the sequence form needs.
 4. Tokens behind the first EOS do not count. Random masks hide all of them; a trace (`--method tracerl`) shows those
    that the rollout had revealed before the EOS, as the model saw them.
 5. "Controlled random seeds" is read as: one mask noise for the completions of a group. In the authors' code only the
    old, the new and the reference policy share it.
Departures from the authors' code
 6. Only masked completion tokens enter the loss; there the loss mask is not indexed by j.
 7. j is a loop index, so each rollout sees all mu masks whatever the gradient accumulation.
 8. Masks come from a generator keyed by (seed, step, j, group): the same for old, new and reference
    policy and for any number of processes. The global generator is never reseeded.
 9. The token loss is a mean per completion and then over completions; theirs is one mean over all scored tokens of a
    micro-batch, in which a long completion weighs more, and which depends on how rows are spread over processes.
10. A step is a rollout with its mu updates. Their `max_steps` counts updates: 6,000 of them are 500 steps at mu = 12.
11. Log-probabilities are taken at the rollout's temperature. The rollout also *selects* positions by
    confidence, and may be guided (--guidance); as in every method compared here, ell knows neither.
12. With --bf16 tokens are drawn in bf16, but log-probabilities are computed in float32 (TF32 on a GPU): an
    update at 3e-6 moves them by less than bf16 rounds them. experiments/README.md has the measurement.
13. No dropout, in LoRA neither (theirs: 0.05): the old, the new and the reference policy are the same function.
14. The reward asks for GSM8K's own `#### 42` (rewards.py), the masks' ramp is per row (remask.py).
15. The tiny images have advantages without std, and no guidance, unless flags say so: experiments/README.md
    says why.

    python maskgrpo.py --task gsm8k                        # the tiny default, minutes on a laptop
    accelerate launch maskgrpo.py --task gsm8k             # the same through Accelerate's launcher
    accelerate launch --config_file configs/one_gpu.yaml maskgrpo.py --task gsm8k \\
        --model GSAI-ML/LLaDA-8B-Instruct --lora 128       # the paper's run
    python maskgrpo.py --resume --output_dir runs/NAME     # goes on where a run was stopped
    python maskgrpo.py --eval_only --model runs/NAME       # accuracy and pass@k of any model or adapter
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, gather_object
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, Qwen2ForCausalLM
from transformers.utils.peft_utils import find_adapter_config_file

import remask
import rewards
from emerge_sampler import DECAYS, SAMPLERS, guided, load_magvit, through_eos
from remask import Remask, seeded, shuffled
from rewards import TASKS, Problem, first_line, judge_all, mean_of
from rewards import DataError as UsageError  # something the caller has to change, in one line

# --- The paper, 1: the likelihood of a masked diffusion model (Eq. 2) -------------------------------------------------


class Batch(NamedTuple):
    """B prompts, padded on the left, and gen_length columns behind them. x: (B, L) long; attention: (B, L) bool, False
    at padding; completion: (B, L) bool, what the model writes: all of the last columns, or the blanks among them."""

    x: Tensor
    attention: Tensor
    completion: Tensor


def token_log_probs(
    model: nn.Module, batch: Batch, hidden: Tensor, scored: Tensor, mask_id: int, temperature=1.0, first_id=0
) -> Tensor:
    """log pi(x0^n | c, x_t) where scored (B, L) bool, else 0; (B, L) float32. x_t hides `hidden` (B, L) bool; first_id
    is the token that column 0 of the logits stands for."""
    x_t = batch.x.masked_fill(hidden, mask_id)
    log_p = model(x_t, batch.attention, scored, batch.x[scored] - first_id, temperature)  # (N,), at the scored ones
    return torch.zeros(batch.x.shape, device=log_p.device).masked_scatter(scored, log_p)


def sequence_ell(log_p: Tensor, t: Tensor) -> Tensor:
    """Eq. 2: ell = (1/t) sum_n log pi(x0^n | c, x_t) over scored positions; log_p (B, L), 0 elsewhere; t (B,)."""
    return log_p.sum(1) / t


def elbo_loss(model: nn.Module, batch: Batch, r: Tensor, u: Tensor, mask_id: int, first_id: int = 0) -> Tensor:
    """- E ell / |o|, the masked ELBO per token (Eq. 2), by which bases are trained; a scalar. r (B,) mask ratios, u
    (B, L) uniform noise."""
    masks = remask.uniform(batch.completion, r, u)
    log_p = token_log_probs(model, batch, masks.masked, masks.scored, mask_id, first_id=first_id)
    return -(sequence_ell(log_p, masks.t) / batch.completion.sum(1)).mean()


# --- The paper, 2: advantage, importance ratio (Eq. 9) and KL (Eq. 10) ------------------------------------------------


def group_advantages(rewards: Tensor, group_size: int, convention: str) -> Tensor:
    """A = r - mean over the group, divided by the group's std ("std", the paper) or not ("mean", d1).

    rewards (B,) float, groups contiguous, B a multiple of G. A group without variance has A = 0 exactly.
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    centred = centred * (groups != groups[:, :1]).any(1, keepdim=True)  # a mean may round
    if convention == "std":
        std = groups.std(1, keepdim=True)  # unbiased, as in most GRPO code
        centred = torch.where(std > 1e-6, centred / std, 0.0)
    return centred.reshape(-1)


def tame_exp(x: Tensor, limit: float = 1.0) -> Tensor:
    """e^x up to `limit`, then its tangent there: monotone and smooth, with a gradient of at most e^limit.

    ell sums a whole completion over 1/t, so log ratios of 5 or 10 do occur; one such e^x would own the clipped
    gradient of the update. Cutting x off instead would take the pull-back away where it is needed most.
    """
    bounded = x.clamp(max=limit)
    return bounded.exp() * (1 + x - bounded)


def surrogate(log_rho: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's pessimistic min(rho A, clip(rho, 1 - clip, 1 + clip) A), elementwise; rho = exp(log_rho), tamed."""
    rho = tame_exp(log_rho)
    return torch.minimum(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage)


def kl_estimate(d: Tensor) -> Tensor:
    """D = e^d - d - 1, elementwise, d = log pi_ref - log pi: >= 0, and on samples of pi unbiased for KL(pi || pi_ref)
    as long as d <= 1; beyond, the tangent of e^d makes it grow like |d| instead of exploding."""
    return tame_exp(d) - d - 1


# --- The paper, 3: the masks of update j, o^{t_j} ~ Rev(o, t_j, S_j) with t_j = gamma + (1 - gamma) j / mu ------------

# First key of every seeded generator, so that no two uses share their noise.
DATA, ELBO, ROLLOUT, MASKS, EVALUATION = range(5)


class Rollouts(NamedTuple):
    """Finished completions o, kept for their mu updates. batch.completion spans all that the model could write,
    `completion` (B, L) bool ends with the first EOS; unmask_step (B, L) long: the sampler's step that revealed a token;
    groups (B,) long, of training: each row's group over all processes; forwards: of the rollout; texts: B strings."""

    batch: Batch
    completion: Tensor
    unmask_step: Tensor
    groups: Tensor | None
    forwards: int
    texts: list[str]


def mask_noise(cfg: "Config", o: Rollouts, step: int, j: int) -> tuple[Tensor, Tensor]:
    """S_j: uniform noise of inner update j (0: of the rollout), u (B, L) for positions, u_ratio (B,); float32, CPU.

    Keyed by (seed, step, j, group): the same for the old, the new and the reference policy, whichever process
    holds the group and however it is padded. With managed randomness a group's completions share it, so that
    they are compared on the same hidden positions; else each has its own.
    """
    u, u_ratio = torch.zeros(o.batch.x.shape), torch.zeros(len(o.batch.x))
    width, drawn = u.shape[1] - cfg.gen_length, {}
    for row, (group, prompt) in enumerate(zip(o.groups.tolist(), o.batch.attention[:, :width].sum(1).tolist())):
        key = (cfg.seed, MASKS, step, j, group, 0 if cfg.managed_randomness else 1 + row % cfg.group_size)
        if key not in drawn:
            noise = seeded(*key)
            drawn[key] = [torch.rand(n, generator=noise) for n in (cfg.gen_length, 1, prompt)]
        u[row, width:], u_ratio[row : row + 1], u[row, width - prompt : width] = drawn[key]
    return u, u_ratio


def remasked(cfg: "Config", o: Rollouts, step: int, j: int) -> tuple[Tensor, Remask]:
    """(what x_t hides (B, L) bool, the masks) of update j: remask.py has t_j and the schemes; the tail behind EOS is
    hidden too, but for what a trace shows."""
    noise = lambda j: [v.to(o.completion.device) for v in mask_noise(cfg, o, step, j)]
    prompt, tail = o.batch.attention & ~o.batch.completion, o.batch.completion & ~o.completion
    masks = remask.by_name(cfg.remask, o.completion, prompt, o.unmask_step, noise, j, cfg.mu, cfg.gamma)
    return masks.masked | (tail & (o.unmask_step < 0) if cfg.remask in remask.TRACES else tail), masks


# --- The paper, 4: the objective --------------------------------------------------------------------------------------


def policy_loss(log_p, old, ref, masks: Remask, advantages, lengths, *, ratio: str, clip: float, beta: float):
    """-(1/G) sum_i (A_i rho_i - beta D_i) / |o_i| of one inner update j, averaged over groups: (the loss, a scalar;
    {"kl": the mean of D, "clipped": the share of ratios outside the clip, "log_ratio": the mean of |log rho|}).

    log_p, old, ref (None without KL): (B, L) float32 token log-probabilities, 0 where not scored;
    advantages, lengths: (B,) float32, lengths = |o|. Raises ValueError where shapes disagree.
    """
    ref = log_p.detach() if ref is None else ref
    shapes = [tuple(v.shape) for v in (log_p, old, ref, masks.scored, advantages, lengths)]
    if shapes != [shapes[3]] * 4 + [shapes[3][:1]] * 2:  # a broadcast would be silent
        raise ValueError(f"shapes disagree: log_p, old, ref, scored, A, |o| are {shapes}")
    if ratio == "sequence":
        # Eq. 9: log rho = ell_theta - ell_old;  Eq. 10: d = ell_ref - ell_theta; one of each per completion, (B, 1).
        difference = lambda a, b: sequence_ell(a - b, masks.t)[:, None]
        counted = torch.ones_like(lengths)[:, None]
        weight = 1 / lengths[:, None]  # 1/|o_i|: ell sums over tokens, this makes it a mean; length gains nothing
    else:
        # The authors' code: a ratio and a D per token, (B, L), and their mean over the row's scored tokens. These are
        # t |o_i| on average: the same as (1/t) sum / |o_i|, without the noise of how many tokens were masked.
        difference, counted = torch.sub, masks.scored.float()
        weight = counted / counted.sum(1, keepdim=True).clamp(min=1)
    log_rho, d = difference(log_p, old), difference(ref, log_p)
    kl = kl_estimate(d)
    objective = ((surrogate(log_rho, advantages[:, None], clip) - beta * kl) * weight).sum(1)  # (B,)
    loss = -objective.mean()  # B = groups x G rows: 1/G and the mean over groups at once
    with torch.no_grad():
        row_mean = lambda v: (v * counted / counted.sum(1, keepdim=True).clamp(min=1)).sum(1).mean()
        outside = ((tame_exp(log_rho) - 1).abs() > clip).float()
        metrics = {"kl": row_mean(kl), "clipped": row_mean(outside), "log_ratio": row_mean(log_rho.abs())}
    return loss, {"loss": loss.item()} | {name: value.item() for name, value in metrics.items()}


# --- The paper, 5: the algorithm --------------------------------------------------------------------------------------


def train_step(run: "Run", policy: nn.Module, base, reference: Callable, optimizer, problems: list, step: int) -> dict:
    """One step of MaskGRPO, the paper's algorithm box; returns its metrics. Raises UsageError if a loss is not finite.

    policy: pi_theta as Accelerate has wrapped it, base: the same without the wrapping; reference() is a context that
    yields pi_ref; problems: what prompts are taken from. The rest of the file only prepares these.
    """
    cfg, experience, rollouts, updates = run.cfg, [], [], []
    ids = base.mask_id, cfg.temperature, base.first_id
    log_probs = lambda pi, o, hidden, masks: token_log_probs(pi, o.batch, hidden, masks.scored, *ids)
    for micro in range(cfg.accumulation):
        # Sample a group o_1 ... o_G ~ pi_old(. | c) of each prompt c, and reward it: r_i. pi_old is pi_theta as of now.
        o, r, metrics = sample_groups(run, policy, base, problems, step, micro)
        # A_i = (r_i - mean r) / std r
        A = group_advantages(r, cfg.group_size, cfg.advantage).to(run.device)
        # Re-mask: o^{t_j} ~ Rev(o, t_j, S_j), and log pi_old and log pi_ref of what each of the mu masks hides
        views = {j: remasked(cfg, o, step, j) for j in range(1, cfg.mu + 1)}
        with torch.no_grad():  # at j = 1 pi_old is pi_theta itself
            old = {j: log_probs(policy, o, *views[j]) for j in range(2, cfg.mu + 1)}
        ref = dict.fromkeys(views)
        if cfg.beta:
            with reference() as pi_ref:
                ref = {j: log_probs(pi_ref, o, *views[j]) for j in views}
        experience.append((o, A, views, old, ref))
        rollouts.append(metrics)
    policy.train()
    for j in range(1, cfg.mu + 1):
        losses = []
        for o, A, views, old, ref in experience:
            with run.accelerator.accumulate(policy):
                # log pi_theta of what is hidden
                log_p, masks = log_probs(policy, o, *views[j]), views[j][1]
                # Eq. 9 and 10 -> -(1/G) sum_i (A_i rho_i - beta D_i) / |o_i|
                lengths, pi_old = o.completion.sum(1).float(), old.get(j, log_p.detach())
                loss, metrics = policy_loss(
                    log_p, pi_old, ref[j], masks, A, lengths, ratio=cfg.ratio, clip=cfg.clip, beta=cfg.beta
                )
                run.accelerator.backward(loss)  # divided by the number of micro-batches there
            losses.append(metrics)
        # One step of AdamW per j, on the clipped gradient, after a warm-up
        lr = cfg.lr * min(1.0, (step * cfg.mu + j) / max(cfg.warmup, 1))
        updates.append(run.update(policy, optimizer, lr, cfg.max_grad_norm, losses, f"step {step + 1}, update {j}"))
    return mean_of(rollouts) | mean_of(updates)


# --- Settings. A field's default is the paper's value, for published checkpoints; the tables behind them change it. ---

METHODS = {
    "maskgrpo": dict(remask="fading_out", gamma=0.6, managed_randomness=True, advantage="std"),  # the paper, for text
    "diffu-grpo": dict(remask="full", gamma=0.0, managed_randomness=False, advantage="mean"),  # d1
    "unigrpo": dict(remask="whole_range", gamma=0.0, managed_randomness=False, advantage="std"),  # MMaDA
    "tracerl": dict(remask="trace", gamma=0.0, managed_randomness=False, advantage="std"),
    "truncation": dict(remask="uniform", gamma=0.6, managed_randomness=True, advantage="std"),  # the paper's ablation
    "rotated-trace": dict(remask="rotated_trace", gamma=0.0, managed_randomness=False, advantage="std"),  # of no paper
    "coupled-grpo": dict(remask="coupled", gamma=0.0, managed_randomness=False, advantage="std"),  # DiffuCoder
    "gdpo": dict(remask="quadrature", gamma=0.0, managed_randomness=False, advantage="mean", ratio="sequence"),
    "agrpo": dict(remask="random_step", gamma=0.0, managed_randomness=False, advantage="std"),
    "justgrpo": dict(remask="left_to_right", gamma=0.0, managed_randomness=False, advantage="std")
    | dict(block_length=1, tokens_per_step=1),
}
# What of a text is computed in a block's first forward alone: nothing, what stands before the block, all around it.
CACHES = ("off", "prefix", "dual")
# What two of them have instead where the completion is an image; the sampler of the others is maskgit.
OF_IMAGES = {"maskgrpo": dict(remask="uniform", gamma=0.8, sampler="emerge"), "truncation": dict(gamma=0.8)}


def flag(default, help: str, **more):
    """A field of a configuration, which is a flag of the command line too."""
    return dataclasses.field(default=default, metadata={"help": help, **more})


@dataclasses.dataclass
class Common:
    """What maskgrpo.py and upo.py both ask."""

    task: str = flag("gsm8k", "a row of rewards.TASKS", choices=tuple(TASKS))
    model: str | None = flag(None, "hub id, or path of a model, adapter or run; default: a tiny model, trained here")
    mask_token: str | None = flag(None, "the mask token of a --model whose config.json has no mask_token_id")
    data: str | None = flag(None, 'training problems, a FILE or "generated"; default: published, for tiny generated')
    eval_data: str | None = flag(None, "held-out problems, a FILE; default: published, or every tenth of --data")
    allow_code_execution: bool = flag(False, "task mbpp: run the programs that the model writes, in a sandbox")
    seed: int = flag(0, "seed of everything random")
    output_dir: str | None = flag(None, "run directory; default runs/SCRIPT-TASK-METHOD-MODEL-sSEED")
    max_steps: int = flag(500, "RL steps, each a rollout and its updates; the papers' max_steps count updates")
    save_every: int = flag(10, "steps between checkpoints, 0: only when stopped and at the end")
    resume: bool = flag(False, "go on from the last checkpoint in --output_dir")
    eval_only: bool = flag(False, "evaluate and leave")
    log_with: str | None = flag(None, "a tracker that is installed", choices=tuple(map(str, get_available_trackers())))
    bf16: bool = flag(torch.cuda.is_available(), "frozen weights, rollouts and upo.py's policy in bfloat16")
    gen_length: int = flag(256, "completion length, tokens")
    block_length: int = flag(16, "tokens per semi-autoregressive block")
    temperature: float = flag(0.9, "of rollouts; in maskgrpo.py of log-probabilities, in upo.py of evaluation, too")
    group_size: int = flag(6, "G, completions per prompt")
    batch_size: int = flag(6, "completions per process and micro-batch, a multiple of G")
    mu: int = flag(12, "updates per rollout")
    advantage: str = flag("std", "divide by the group's std, or only subtract its mean", choices=("std", "mean"))
    beta: float = flag(0.01, "weight of the KL to the reference")
    clip: float = flag(0.2, "PPO clip of the ratio")
    lr: float = flag(3e-6, "AdamW learning rate after warm-up")
    accumulation: int = flag(2, "micro-batches per update; in upo.py 0: all of a rollout")
    warmup: int = flag(100, "updates of linear warm-up of the learning rate")
    weight_decay: float = flag(0.1, "AdamW weight decay")
    max_grad_norm: float = flag(0.2, "gradient norm is clipped to this")
    eval_n: int = flag(0, "held-out problems, 0: all")
    eval_every: int = flag(50, "steps between looks at 256 validation problems, 0: never")
    eval_batch_size: int = flag(32, "completions per process and batch of evaluation")

    def tiny(self) -> bool:
        """Whether the model is the embedded default, or was trained from it: then the tiny tables apply."""
        file = Path(resolve(self.model)[0], "config.json") if self.model else None
        return file is None or (file.is_file() and '"embedded_default": true' in file.read_text())

    def generated(self) -> bool:
        """Whether the problems come from the task's generator."""
        return self.data == "generated" or (self.data is None and self.tiny())


@dataclasses.dataclass
class Config(Common):
    """Every setting of a run of maskgrpo.py."""

    method: str = flag("maskgrpo", "a row of METHODS, which the next flags change", choices=tuple(METHODS))
    remask: str = flag("fading_out", "re-masking scheme of remask.py", choices=remask.SCHEMES)
    gamma: float = flag(0.6, "truncation: the lowest mask ratio")
    managed_randomness: bool = flag(True, "one mask noise for a whole group instead of one per completion")
    ratio: str = flag("token", "ratio and KL per token, or of the sequence (Eq. 9, 10)", choices=("token", "sequence"))
    sampler: str = flag("semi_autoregressive", "text has this one, images the others", choices=tuple(SAMPLERS))
    tokens_per_step: int = flag(2, "tokens of a text revealed per step")
    threshold: float = flag(1.0, "tokens of a text that are surer than this are revealed in the same step, too")
    eos_last: bool = flag(False, "EOS waits until the rest of its block is filled")
    cache: str = flag("off", "text: computed once per block, before it or all around; approximate", choices=CACHES)
    steps: int = flag(12, "steps of an image")
    gumbel: float = flag(1.0, "maskgit: weight of the noise of its choice; MaskGIT's own is 4.5")
    gumbel_decay: str = flag("compounding", "maskgit: how that falls; MaskGIT's own is linear", choices=tuple(DECAYS))
    guidance: float = flag(0.0, "classifier-free guidance, 0: none")
    rewards: str | None = flag(None, "with --model: of pixels, clip=1,http://HOST:PORT/hpsv3=0.5; tiny: a verifier")
    decoder: str = flag("showlab/magvitv2", "MAGVIT-v2's weights: a file, a folder or a hub id")
    pass_k: int = flag(0, "samples per problem for pass@k at --temperature, 0: greedy only")
    lora: int = flag(0, "LoRA rank (alpha = rank / 2), the authors have 128; 0: train all weights")
    gradient_checkpointing: bool = flag(True, "recompute activations to save memory; with LoRA it is off")
    sft_steps: int = flag(0, "with --model: steps of supervised ELBO training before RL (SFT + MaskGRPO)")
    sft_batch_size: int = flag(8, "sequences per process and step of ELBO training")
    sft_lr: float = flag(1e-5, "AdamW learning rate of ELBO training")
    base_steps: int = flag(4000, "tiny: its ELBO training ends after this many steps at the latest")
    base_accuracy: float = flag(0.4, "tiny: or at this validation accuracy")

    def batches(self, processes: int) -> list[int]:
        """What a run that goes on must have again: the batch of RL over all processes, and that of ELBO training."""
        sft = self.sft_batch_size if self.sft_steps or not self.model else 0
        return [self.batch_size * self.accumulation * processes, sft * processes]


# What a task changes for published checkpoints: a sudoku's grid; all codes of an image and one end-of-image token.
TASK = {
    "sudoku": dict(gen_length=64, tokens_per_step=1),
    "t2i": dict(gen_length=1025, guidance=3.5, temperature=1.0, rewards="clip=1"),
}
# The tiny model's values, and what a task changes in them.
TINY = dict(max_steps=250, save_every=25, bf16=False, gradient_checkpointing=False, sft_batch_size=64, sft_lr=3e-3)
TINY |= dict(gen_length=16, block_length=4, tokens_per_step=4, temperature=0.7, group_size=8, batch_size=128, mu=4)
TINY |= dict(accumulation=1, lr=1.5e-4, warmup=20, weight_decay=0.0, max_grad_norm=1.0)
TINY |= dict(eval_every=25, eval_batch_size=256, pass_k=8)
TINY_TASK = {
    "math500": dict(base_accuracy=0.1),
    "mbpp": dict(max_steps=80, pass_k=0),  # programs take time to run
    "countdown": dict(base_accuracy=0.12),
    "zebra": dict(base_accuracy=0.5, sft_lr=1e-3, max_steps=100),  # share of right entries; a third by chance
    # a fixed number of steps: accuracy, the share of right cells, jumps between two looks
    "sudoku": dict(gen_length=20, block_length=16, tokens_per_step=1, base_accuracy=1.0, base_steps=450),
    # 8 x 8 codes. Divided by its std, a group whose images all miss the prompt pushes as hard, by fidelity alone, as
    # one in which some are right: fewer objects then.
    "t2i": dict(gen_length=65, temperature=1.0, base_accuracy=0.25, batch_size=64, lr=1e-4, max_steps=120, pass_k=0)
    | dict(advantage="mean"),
}
BETAS = (0.9, 0.99)  # AdamW: a shorter memory than 0.999 for the spikes of the 1/t weight


def tables(cfg: Config) -> list[dict]:
    """Where a run's defaults come from: its model, its method, its task; the last one wins."""
    of_model, of_task = (TINY, TINY_TASK) if cfg.tiny() else ({}, TASK)
    image = dict(sampler="maskgit") | OF_IMAGES.get(cfg.method, {}) if TASKS[cfg.task].codebook else {}
    adapted = {"gradient_checkpointing": False} if cfg.lora or (cfg.model and resolve(cfg.model)[1]) else {}
    whole = {"eval_data": cfg.data} if cfg.eval_only and cfg.data != "generated" else {}  # a file is evaluated whole
    return [of_model, adapted, METHODS[cfg.method], image, of_task.get(cfg.task, {}), whole]


def require(rules: dict[str, object]) -> None:
    """Raise UsageError with the first message whose rule does not hold."""
    for message, holds in rules.items():
        if not holds:
            raise UsageError(message)


@contextlib.contextmanager
def in_one_line(what: str) -> Iterator[None]:
    """Whatever goes wrong in the block, in somebody else's code, is a UsageError that begins with `what`."""
    try:
        yield
    except Exception as error:  # what broken files raise has no common class
        cause = error.__context__  # of a full disk torch's own words do not say so
        reason = cause if isinstance(error, RuntimeError) and isinstance(cause, OSError) else error
        lacks = f"lacks {error}" if isinstance(error, KeyError) else first_line(reason)[:300]
        raise error if isinstance(error, UsageError) else UsageError(f"{what}: {lacks}") from None


def parse(argv: list[str] | None = None, kind: type = Config, about: str = __doc__, tables: Callable = tables):
    """The configuration, a `kind`: field < tables < flag. With --resume: the saved run's, which flags may repeat but
    not contradict. Raises UsageError."""
    argv = sys.argv[1:] if argv is None else argv
    parser = transformers.HfArgumentParser(kind, description=about.splitlines()[0], allow_abbrev=False)
    parser.error = lambda message: require({f"{message} (see --help)": False})  # one line, not a page of usage
    first, _ = parser.parse_known_args([word for word in argv if word not in ("-h", "--help")])
    defaults = {k: v for table in tables(kind(**vars(first))) for k, v in table.items() if hasattr(first, k)}
    row = [*kind.__annotations__][0]  # the method or the reference
    task, row = (getattr(first, name) or defaults.get(name) for name in ("task", row))
    name = f"{about.split(':')[0].lower()}-{task}-{row}-{Path(first.model or 'tiny').name}-s{first.seed}"
    saved, path = {}, first.output_dir or f"runs/{name}{'-eval' * first.eval_only}"
    if first.resume:
        with in_one_line(f"--resume: {path} holds no run of this script and version"):
            saved = vars(kind(**json.loads(Path(path, "config.json").read_text())))
    # so that --help shows the defaults of this model, method and task
    parser.set_defaults(**(saved or defaults) | {"output_dir": path, "resume": first.resume})
    cfg = kind(**vars(parser.parse_args(argv)))
    for name in ("model", "data", "eval_data", "policy"):  # a run may go on, and be read, from another directory
        if (given := vars(cfg).get(name)) and os.path.exists(given):
            setattr(cfg, name, os.path.abspath(given))
    # with anything else changed it would be another run; of batches Run.checkpoint compares what they are in all
    free = "resume output_dir max_steps save_every log_with eval_batch_size lr max_grad_norm "
    free += "batch_size accumulation minibatch_size sft_batch_size"
    changed = [f"--{name}" for name in saved.keys() - set(free.split()) if vars(cfg)[name] != saved[name]]
    require({f"--resume: {', '.join(changed)} contradicts {path}/config.json": not changed})
    return cfg


def check(cfg, positive: str, rules: dict[str, object]) -> None:
    """Raise UsageError for what either script would compute something wrong from without a word, and for a script's own
    `rules`, message -> whether it holds; positive: names of its fields that must be above 0."""
    names = f"gen_length block_length batch_size mu eval_batch_size lr max_grad_norm clip {positive}"
    rules = {f"--{k} {vars(cfg)[k]}: must be above 0": vars(cfg)[k] > 0 for k in names.split()} | rules
    numbers = {k: v for k, v in vars(cfg).items() if type(v) in (int, float)}
    rules |= {f"--{k} {v}: must be at least 0 and below 2**63": 0 <= v < 2**63 for k, v in numbers.items()}
    whole_groups = cfg.group_size > 1 and cfg.batch_size % cfg.group_size == 0
    rules[f"--batch_size {cfg.batch_size} is no multiple of --group_size {cfg.group_size}, 2 or more"] = whole_groups
    read = [Path(path).resolve() for path in (cfg.model, getattr(cfg, "policy", None)) if path]
    held = Path(cfg.output_dir).resolve() in read + [path.parent for path in read]
    rules[f"--output_dir {cfg.output_dir} is the run that is read, or holds it; name another"] = not held
    rules[rewards.CODE_REFUSED.format(cfg.task)] = cfg.allow_code_execution or not TASKS[cfg.task].runs_code
    rules["--eval_data needs published problems"] = cfg.eval_only or not (cfg.eval_data and cfg.generated())
    rules["--mask_token is one of a --model"] = cfg.model or not cfg.mask_token
    require(rules)
    if cfg.allow_code_execution:
        rewards.allow_code_execution()


# --- The base model: published checkpoints of several kinds and the tiny default; text <-> tensors --------------------

# Names in a LLaDA or MMaDA checkpoint -> names in transformers' Llama; applied one after the other.
LLADA_KEYS = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    r"^model\.transformer\.blocks\.": "model.layers.",
    r"\.attn_norm\.": ".input_layernorm.",
    r"\.ff_norm\.": ".post_attention_layernorm.",
    r"\.([qkv]_proj)\.": r".self_attn.\1.",
    r"\.attn_out\.": ".self_attn.o_proj.",
    r"\.ff_proj\.": ".mlp.gate_proj.",
    r"\.up_proj\.": ".mlp.up_proj.",
    r"\.ff_out\.": ".mlp.down_proj.",  # a block's; the top-level one is renamed above
}
# The same for its config.json; embedding_size, where it is given, counts the rows of padding too.
LLADA_SIZES = {name: name for name in ("vocab_size", "rms_norm_eps", "eos_token_id", "mask_token_id", "codebook_size")}
LLADA_SIZES |= dict(d_model="hidden_size", mlp_hidden_size="intermediate_size", n_layers="num_hidden_layers")
LLADA_SIZES |= dict(n_heads="num_attention_heads", n_kv_heads="num_key_value_heads", weight_tying="tie_word_embeddings")
LLADA_SIZES |= dict(embedding_size="vocab_size", max_sequence_length="max_position_embeddings")
# What bidirectional models have in common. A pad_token_id would become the embedding's padding_idx, and LLaDA's pad is
# its EOS, whose embedding has to learn.
BIDIRECTIONAL = dict(is_causal=False, use_cache=False, pad_token_id=None, bos_token_id=None)
# transformers' own classes that is_causal=False makes bidirectional
NATIVE = ("llama", "qwen2", "qwen3", "qwen3_moe", "gpt2")
# The embedded default: initializer_range 0.1 learns the first words faster than Llama's 0.02.
TINY_SIZES = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4)
TINY_SIZES |= dict(initializer_range=0.1, max_position_embeddings=128, embedded_default=True)
TINY_SIZES_OF = {"sudoku": dict(hidden_size=48, intermediate_size=128, num_hidden_layers=2)}  # quick upo.py rollouts
# The tokens around an image. MMaDA's tokenizer does not spell its own: these are the ids it reserves for them.
IMAGE_MARKS = {"<|t2i|>": 126088, "<|soi|>": 126084, "<|eoi|>": 126085, "<|pad|>": 126093}


def load_published(path: str, dtype: torch.dtype) -> tuple[nn.Module, object]:
    """(a published or saved model in transformers' own class, bidirectional; its tokenizer); no remote code. UsageError
    where weights are missing or misfit, of which the library only warns."""
    raw, _ = PreTrainedConfig.get_config_dict(path)
    kind = str(raw.get("model_type")).lower()
    own = "qwen2" if kind == "dream" else kind.removeprefix("a2d-")  # dllm's name for masked diffusion models
    family, words = transformers.AutoModelForCausalLM, AutoTokenizer
    options = {"trust_remote_code": False, "ignore_mismatched_sizes": True}  # but named below
    if "d_model" in raw:  # LLaDA, iLLaDA, MMaDA
        rope = dict(rope_type="default", rope_theta=raw.get("rope_theta", 1e4))
        sizes = {"eos_token_id": None} | {LLADA_SIZES[k]: raw[k] for k in LLADA_SIZES if raw.get(k) is not None}
        options |= dict(config=LlamaConfig(**sizes, **BIDIRECTIONAL, rope_parameters=rope), key_mapping=LLADA_KEYS)
    elif own in NATIVE:  # a2d-* and Dream are bidirectional by their names, others if is_causal says so
        causal = f'--model {path}: a causal {kind}, unless "is_causal": false stands in its config.json'
        require({causal: own != kind or not raw.get("is_causal", True)})
        sizes = {name: v for name, v in raw.items() if name not in ("architectures", "auto_map", "model_type")}
        sizes = {"shifted_logits": kind == "dream"} | sizes | BIDIRECTIONAL  # Dream predicts position i at i - 1
        options["config"] = transformers.AutoConfig.for_model(own, **sizes)
        words = transformers.Qwen2Tokenizer if kind == "dream" else words
    else:
        family = transformers.AutoModelForMaskedLM
    hf, info = family.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    wrong = {kind: sorted(names)[:3] for kind, names in info.items() if names}
    require({f"--model {path}: its weights do not fit its config.json: {wrong}": not wrong})
    if dtype == torch.bfloat16:
        in_bf16(hf)
    return hf, words.from_pretrained(path, trust_remote_code=False)


def resolve(path: str) -> tuple[str, str | None]:
    """(base model, adapter or None) of a hub id, a model directory, an adapter directory or a run directory."""
    path = str(inner) if (inner := Path(path) / "model").is_dir() else path
    require({f"--model {path}: a run of upo.py, or not finished (--resume)": not Path(path, "lock").is_file()})
    hub_id = path.count("/") < 2 and not path.startswith(("/", ".", "~", "runs/"))
    require({f"--model {path}: not a directory, and not a hub id either (OWNER/NAME)": Path(path).is_dir() or hub_id})
    with in_one_line(f"--model {path}: adapter_config.json"):
        path = str(Path(path).resolve()) if Path(path).is_dir() else path  # an adapter keeps its base's
        file = find_adapter_config_file(path)
        base = json.loads(Path(file).read_text())["base_model_name_or_path"] if file else path
        return os.fspath(base), path if file else None


def llama_name(name: str) -> str:
    """The name in transformers' Llama of a weight, or of an adapter's, of LLaDA."""
    for pattern, ours in LLADA_KEYS.items():
        name = re.sub(pattern, ours, name)
    return name


def load_model(path: str, cfg: Config, trainable: bool) -> "MaskedDiffusionModel":
    """A base model ready to run, with its adapter, or with a fresh one of rank --lora. Trained weights are float32 even
    with --bf16: a bf16 weight of 0.02 cannot take a step of 3e-6. Frozen matrices are bf16 then (`in_bf16`); what is
    computed in bf16 is up to the model's `forward`. Raises UsageError."""
    base, adapter = resolve(path)
    frozen, fresh = bool(cfg.lora or adapter) or not trainable, cfg.lora and trainable and not adapter
    if adapter or fresh:
        with in_one_line("--lora and adapters need PEFT: pip install peft"):
            import peft
    with in_one_line(f"--model {base}: cannot be loaded"):
        hf, tokenizer = load_published(base, torch.bfloat16 if cfg.bf16 and frozen else torch.float32)
    known = isinstance(hf, LlamaForCausalLM | Qwen2ForCausalLM)
    require({f"--cache {cfg.cache}: {base} keeps none; for models in Llama's shape": known or cfg.cache == "off"})
    if cfg.mask_token:
        hf.config.mask_token_id = tokenizer.get_vocab().get(cfg.mask_token)
        require({f"--mask_token {cfg.mask_token}: no token of {base}": hf.config.mask_token_id is not None})
    if adapter:
        with in_one_line(f"--model {adapter}: the adapter does not fit {base}"), warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing adapter keys")
            settings = peft.PeftConfig.from_pretrained(adapter)
            names = [name.removeprefix("base_model.model.") for name in peft.load_peft_weights(adapter, "cpu")]
            own = {f"^{re.escape(name)}$": llama_name(name) for name in names if ".transformer.blocks." in name}
            if own:  # made for LLaDA's own modules, as published ones are
                settings.target_modules = {name.split(".lora_")[0] for name in own.values()}
            hf = peft.PeftModel.from_pretrained(hf, adapter, config=settings, key_mapping=own, is_trainable=trainable)
    elif fresh:
        # the authors' targets; a base of another family has all of its linear layers adapted
        targets = ["q_proj", "k_proj", "v_proj", "up_proj"] if known else "all-linear"
        settings = dict(r=cfg.lora, lora_alpha=cfg.lora / 2, lora_dropout=0.0, target_modules=targets)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(cfg.seed)  # its initialisation; afterwards all is as before
            hf = peft.get_peft_model(hf, peft.LoraConfig(**settings))
    if not trainable:
        hf.requires_grad_(False)
    elif cfg.gradient_checkpointing and hf.supports_gradient_checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    return MaskedDiffusionModel(hf, tokenizer, bool(TASKS[cfg.task].codebook), cfg.bf16)


class Widened(torch.autograd.Function):
    """x W^T in the precision of x, of a frozen W in bf16, which the backward widens again: kept wide from the forward
    to there, LLaDA's weights would take 28 GiB."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return nn.functional.linear(x, weight.to(x.dtype))

    @staticmethod
    def backward(ctx, of_y: Tensor):
        return of_y @ ctx.saved_tensors[0].to(of_y.dtype), None


def in_bf16(hf: nn.Module) -> None:
    """Let a model that was loaded in bf16 compute in float32 where autocast is off. The weights of its linear layers,
    nearly all, stay bf16, and become float32 for the length of a product; norms, biases and embeddings become float32,
    and with them the residual stream."""

    def widened(layer: nn.Linear, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):  # rough
            return nn.functional.linear(x, layer.weight, layer.bias)
        y = Widened.apply(x, layer.weight)
        return y if layer.bias is None else y + layer.bias

    tied = {module.weight for module in hf.modules() if isinstance(module, nn.Embedding)}
    layers = [module for module in hf.modules() if isinstance(module, nn.Linear)]
    for p in set(hf.parameters()) - ({layer.weight for layer in layers} - tied):
        p.data = p.data.float()
    for layer in layers:
        layer.forward = functools.partial(widened, layer)


def tiny_model(texts: list[str], seed: int, task: str = "gsm8k") -> "MaskedDiffusionModel":
    """The embedded default, untrained: the class that LLaDA is loaded into, 150k parameters of the seed. Its tokenizer
    spells `texts` by words and whole numbers, without loss, and has LLaDA's special tokens and the marks of images."""
    codes = TASKS[task].codebook
    marks = tuple(IMAGE_MARKS) if codes else ()
    split = pre_tokenizers.Split(Regex(r" ?\d+| ?[^\s\d]+ ?|\s"), "isolated")
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    special = ["<|endoftext|>", "<|eot_id|>", "<|mdm_mask|>", "<|unknown|>", *marks]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token=special[3]))
    raw.pre_tokenizer, raw.decoder = split, decoders.Fuse()
    names = dict(eos_token=special[0], pad_token=special[0], mask_token=special[2], unk_token=special[3])
    names |= dict(additional_special_tokens=[special[1], *marks])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    sizes = TINY_SIZES | TINY_SIZES_OF.get(task, {}) | dict(vocab_size=len(tokenizer) + codes, codebook_size=codes)
    sizes |= dict(eos_token_id=tokenizer.eos_token_id, mask_token_id=tokenizer.mask_token_id)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return MaskedDiffusionModel(LlamaForCausalLM(LlamaConfig(**sizes | BIDIRECTIONAL)), tokenizer, codes > 0)


CHUNK = 2**25  # logits that are there at a time when log-probabilities are taken: 128 MiB of float32


class ChosenLogProbs(torch.autograd.Function):
    """log softmax(head(h) / T) of one token per row, without keeping the (N, V) logits; for a head that does not train.

    h (N, D), tokens (N,) long, head: (N, D) -> (N, V), any function -> (N,). A backward needs no more than the gradient
    with respect to h, which is as small as h: it is taken here, and the logits overwritten with
    d log p(o) / d logit_v = (1[v = o] - p(v)) / T. Left to autograd 4.5 (N, V) tensors live at the peak: logits,
    logits / T, logsumexp's, gather's gradient, their sum.
    """

    @staticmethod
    def forward(ctx, h: Tensor, tokens: Tensor, head: Callable, temperature: float) -> Tensor:
        """(N,) float32; what is kept for the backward is the gradient with respect to h (N, D), if that is wanted."""
        wanted, chosen = ctx.needs_input_grad[0], tokens[:, None]
        with torch.set_grad_enabled(wanted):
            logits = head(h := h.detach().requires_grad_(wanted))
        p = logits.detach().div_(temperature)  # in the logits' own memory, as what follows
        total = p.logsumexp(-1, keepdim=True)
        log_p = (p.gather(-1, chosen) - total)[:, 0]
        if wanted:
            p = p.sub_(total).exp_().neg_().scatter_add_(-1, chosen, torch.ones_like(total)).div_(temperature)
            ctx.save_for_backward(*torch.autograd.grad(logits, h, p))
        return log_p

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, of_log_p: Tensor):
        return of_log_p[:, None] * ctx.saved_tensors[0], None, None, None


def plain_log_probs(h: Tensor, tokens: Tensor, head: Callable, temperature: float) -> Tensor:
    """What ChosenLogProbs computes, by autograd, which has a trained head's gradient too."""
    logits = head(h) / temperature
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)


def chosen_log_probs(h: Tensor, tokens: Tensor, head: Callable, temperature: float, rows: int, trains: bool) -> Tensor:
    """The same for any head, `rows` rows at a time. Of a head that trains, chunks are computed again in the backward,
    unless one chunk is all."""
    of_chunk = plain_log_probs if trains else ChosenLogProbs.apply
    if trains and len(h) > rows:
        of_chunk = functools.partial(checkpoint, plain_log_probs, use_reentrant=False)
    chunks = zip(h.split(rows), tokens.split(rows))
    return torch.cat([of_chunk(*chunk, head, temperature) for chunk in chunks])


class MaskedDiffusionModel(nn.Module):
    """(x_t, attention, positions) -> logits at those positions, for every kind of base; and its text <-> tensors.

    hf: the transformers model (or its PEFT wrapper); mask_id, pad_id, end_id: int; eos_ids: every id that ends a
    completion; bf16: whether a `rough` forward is in bfloat16. The head runs at the positions asked for and nowhere
    else; of an image (codebook > 0) for its codes alone, whose ids, from first_id on, follow the tokenizer's own.
    """

    def __init__(self, hf: nn.Module, tokenizer, image: bool = False, bf16: bool = False):
        super().__init__()
        self.hf, self.tokenizer, self.bf16, config = hf, tokenizer, bf16, hf.config
        self._no_split_modules = list(hf._no_split_modules or [])  # what FSDP shards one by one
        self.name, self.shifted = config.name_or_path or "the model", getattr(config, "shifted_logits", False)
        known, first = tokenizer.get_vocab(), lambda *ids: next((i for i in ids if i is not None), None)
        self.mask_id = first(getattr(config, "mask_token_id", None), tokenizer.mask_token_id)
        eos, pad, of_config = tokenizer.eos_token_id, tokenizer.pad_token_id, config.eos_token_id
        # what a chat model ends its turn with, where its vocabulary has it
        self.end_id = first(known.get("<|eot_id|>"), known.get("<|im_end|>"), eos, tokenizer.sep_token_id, pad)
        self.pad_id = first(pad, self.end_id)
        of_config = of_config if isinstance(of_config, list) else [of_config]
        self.eos_ids = sorted({self.end_id, self.pad_id, eos, *of_config} - {None, self.mask_id})
        require({f"{self.name}: config.json has no mask_token_id; name one by --mask_token": self.mask_id is not None})
        rows, most = hf.get_input_embeddings().num_embeddings, max([self.mask_id, *known.values()])
        require({f"{self.name}: the tokenizer or the mask has id {most}, the embedding only {rows} rows": most < rows})
        tables = [t for name, t in hf.named_modules() if name.endswith("position_embeddings")]
        starts = [t.padding_idx + 1 for t in tables if getattr(t, "padding_idx", None) is not None]
        self.first_position = max(starts, default=0)  # RoBERTa counts from its padding_idx + 1
        for module in hf.modules():  # the old, the new and the reference policy must be the same function
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        head, self.first_id, self.codebook = hf.get_output_embeddings(), 0, 0
        project = head.forward
        if image:
            self.first_id, self.codebook = len(tokenizer), getattr(config, "codebook_size", None) or 0
            self.marks = {word: known.get(word, i) for word, i in IMAGE_MARKS.items()}
            self.pad_id, behind = self.marks["<|pad|>"], self.first_id + self.codebook
            none = f"{self.name} draws no images: its config.json has codebook_size {self.codebook or 'missing'}"
            require({none: self.codebook and max(behind - 1, *self.marks.values()) < config.vocab_size})
            project = lambda h: nn.functional.linear(h, head.weight[self.first_id : behind].to(h.dtype))
        self.put_in_place_of(head, project, max(CHUNK // (self.codebook or config.vocab_size), 1))

    def put_in_place_of(self, head: nn.Module, project: Callable, rows: int) -> None:
        """Let the head answer at the positions that `forward` was asked for alone; project: (n, D) -> (n, V), its own
        product; rows: so many at a time where log-probabilities are asked for."""

        def logits(h: Tensor) -> Tensor:
            found = project(h).float()
            if not self.codebook:  # in place: (N, V) is the largest tensor of a step; a logit of -inf has no gradient
                found.detach()[:, self.mask_id] = -torch.inf
            return found

        def read_out(h: Tensor) -> Tensor:
            """In the head's place, where it is asked: logits, or log-probabilities of the tokens asked for."""
            trains, of = any(p.requires_grad for p in head.parameters()), self.scored
            return chosen_log_probs(h[self.read], of[0], logits, of[1], rows, trains) if of else logits(h[self.read])

        head.forward = read_out

    def forward(
        self, x, attention: Tensor, positions, tokens=None, temperature=1.0, rough=False, past=None, window=None
    ) -> Tensor:
        """x (B, L) long; attention (B, L) bool, False at padding; positions (B, L) bool with N True, row-major. Returns
        logits (N, V) float32, column 0 being token first_id; of tokens (N,) long, columns, their log-probabilities at
        the temperature, (N,) float32. The mask token's logit is -inf: x0 never holds a mask. rough: in bf16 if --bf16
        is on, enough to draw tokens. Else in float32, whatever Accelerate has set: an update of 3e-6 moves
        log-probabilities by less than bf16 rounds them, wherever in the network. past: transformers' cache, which is
        filled; with window (L,) bool it holds what is outside of that, and x and positions are the window's."""
        # Dream reads the prediction of position i at i - 1; position 0 is a prompt's, so nothing wraps round
        self.read = positions.roll(-1, dims=1) if self.shifted else positions
        self.scored = None if tokens is None else (tokens, temperature)
        place = (attention.cumsum(1) - 1).clamp(min=0) + self.first_position
        cache = {} if past is None else dict(past_key_values=past, use_cache=True)
        if window is not None:  # keys and values need no order: their places are in them
            place, attention = place[:, window], torch.cat([attention[:, ~window], attention[:, window]], dim=1)
        # no cache: it would hold a copy of all weights that train, each of which is used once
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16 and rough, cache_enabled=False):
            return self.hf(input_ids=x, attention_mask=attention.long(), position_ids=place, **cache).logits

    def prompt_ids(self, task, problem: Problem) -> list[int]:
        """The ids in front of a problem's completion: the chat template's, up to where the model answers; plain lines
        for a tokenizer without one; MMaDA's frame for an image. Raises UsageError if the template loses a message."""
        messages = task.messages(problem)
        if task.codebook:
            return self.image_prompt(messages[-1]["content"])
        if getattr(self.hf.config, "embedded_default", False):
            messages = messages[-1:]  # it cannot read instructions
        if not self.tokenizer.chat_template:
            return self.tokenizer("".join(message["content"] + "\n" for message in messages))["input_ids"]
        merged = [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]
        for wording in (messages, merged):  # a template without a system role fails, or drops it
            with contextlib.suppress(jinja2.TemplateError):
                text = self.tokenizer.apply_chat_template(wording, add_generation_prompt=True, tokenize=False)
                if all(message["content"].strip() in text for message in messages):
                    return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        raise UsageError(f"{self.name}: its chat template loses a part of the prompt")

    def image_prompt(self, text: str) -> list[int]:
        """MMaDA's prompt of an image: t2i bos text eos, and the token that starts the image."""
        bos, eos = ([i] if i is not None else [] for i in (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id))
        words = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [self.marks["<|t2i|>"], *bos, *words, *eos, self.marks["<|soi|>"]]

    def start_ids(self, task, problem: Problem, gen_length: int) -> list[int]:
        """The gen_length ids that a completion starts from: all masks, or the given text with masks in its blanks; an
        image's masks end with its end-of-image token."""
        if task.codebook:
            return [self.mask_id] * (gen_length - 1) + [self.marks["<|eoi|>"]]
        if task.blanks is None:
            return [self.mask_id] * gen_length
        target, blanks = task.target(problem), task.blanks(problem)
        spelled = self.tokenizer(target, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(spelled["input_ids"], spelled["offset_mapping"])  # open if a part of the token is blank
        ids = [token if blanks[a:b] == target[a:b] else self.mask_id for token, (a, b) in spans] + [self.end_id]
        require({f"--gen_length {gen_length}: this task's completions have {len(ids)} tokens": len(ids) <= gen_length})
        return ids + [self.pad_id] * (gen_length - len(ids))

    def target_ids(self, task, problem: Problem) -> list[int]:
        """A problem's solution and what ends it, as the model would have to write it."""
        target = task.target(problem)
        if task.codebook:
            return [self.first_id + int(code) for code in target.split()] + [self.marks["<|eoi|>"]]
        return self.tokenizer(target, add_special_tokens=False)["input_ids"] + [self.end_id]

    def batch(self, prompts, starts, device, targets=None) -> Batch:
        """Prompts of any length beside starts of one length, which hold the mask token where the completion is open;
        all are lists of ids. With targets the completion is not open but filled in from them."""
        width = max(map(len, prompts))
        rows = [[self.pad_id] * (width - len(p)) + p + s for p, s in zip(prompts, starts, strict=True)]
        x, lengths = torch.tensor(rows, device=device), torch.tensor([[len(p)] for p in prompts], device=device)
        place = torch.arange(x.shape[1], device=device)
        completion = (x == self.mask_id) & (place >= width)
        if targets is not None:
            x[:, width:] = torch.tensor(targets, device=device)
        return Batch(x, place >= width - lengths, completion)

    def open_batch(self, task, problems: list[Problem], gen_length: int, device) -> Batch:
        """Prompts and open completions of the problems."""
        once = {id(p): p for p in problems}  # a group's prompt is encoded once
        ids = {i: (self.prompt_ids(task, p), self.start_ids(task, p, gen_length)) for i, p in once.items()}
        return self.batch(*zip(*(ids[id(p)] for p in problems)), device)

    def texts(self, batch: Batch, completion: Tensor, gen_length: int) -> list[str]:
        """What stands in the last gen_length columns of batch.x, text around blanks included, without special tokens
        and what is behind the first EOS, where completion (B, L) bool ends. Of an image: its codes, spaces between."""
        if self.codebook:
            return [" ".join(map(str, codes)) for codes in (batch.x[:, -gen_length:-1] - self.first_id).tolist()]
        kept = ~(batch.completion & ~completion)[:, -gen_length:]
        rows = [row[keep].tolist() for row, keep in zip(batch.x[:, -gen_length:], kept)]
        return self.tokenizer.batch_decode(rows, skip_special_tokens=True)

    def ends_of(self, task) -> list[int]:
        """The ids that end a completion; none where blanks or an image's codes are filled in: all are wanted."""
        return [] if task.blanks or task.codebook else self.eos_ids

    def unprompted(self, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
        """(x, attention) for guidance: with its prompt masked, or, of an image, with the prompt of no text at all."""
        if not self.codebook:
            return x.masked_fill(batch.attention & ~batch.completion, self.mask_id), batch.attention
        width, empty = int(batch.completion.long().argmax(1)[0]), self.image_prompt("")  # of prompt and padding
        x, attention = x.clone(), batch.attention.clone()
        x[:, :width] = torch.tensor([self.pad_id] * (width - len(empty)) + empty, device=x.device)
        attention[:, :width] = torch.arange(width, device=x.device) >= width - len(empty)
        return x, attention

    def save(self, path: Path, weights: dict | None = None) -> None:
        """The model (or its adapter) and tokenizer in transformers' own format and names; weights: if it is sharded."""
        self.hf.save_pretrained(path, state_dict=weights, save_original_format=False)
        self.tokenizer.save_pretrained(path)

    def check_problems(self, task, data: dict[str, list[Problem]], gen_length: int, say: Callable) -> None:
        """Take out of `data` whatever is longer, with its completion, than the model's context. Raise UsageError if
        nothing is left, or if a solution, as this model would have to write it, earns less than its text: a WordPiece
        tokenizer writes `#### 5` as `# # # # 5`, and such a base could never earn anything."""
        context = (getattr(self.hf.config, "max_position_embeddings", None) or math.inf) - self.first_position
        for split, problems in data.items():
            data[split] = [p for p in problems if len(self.prompt_ids(task, p)) + gen_length <= context]
            if long := len(problems) - len(data[split]):
                longest = max((p["question"] for p in problems), key=len)
                why = f"longer than {context} tokens with a completion of {gen_length}: {longest[:40]!r} ..."
                require({f"{self.name}: all {split} problems are {why}": data[split]})
                say(f"left out  {long} of {len(problems)} {split} problems, {why}")
        some, problem = (data["train"] or data["test"])[:100], None
        with contextlib.suppress(UsageError):  # some numbers of countdown make no target
            problem = next((p for p in some if not task.codebook and task.score(task.target(p), p) == 1), None)
        if problem is not None:
            target = task.target(problem)
            text = self.tokenizer.decode(self.target_ids(task, problem)[:-1], skip_special_tokens=True)
            fails = f"{self.name}: its tokenizer turns {target!r} into {text!r}, which does not earn the full reward"
            require({fails: task.reward(text, problem) == task.reward(target, problem)})


# --- The run: what every stage shares, its first lines, its directory and its checkpoints -----------------------------


CHECKPOINTS = ("checkpoint.pt", "checkpoint.pt.before")  # the last one, and the one before it
# of a checkpoint: what trains, put together from all shards, on the main process's CPU
WHOLE = state_dict.StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True, strict=False)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The weights that train; under FSDP the shards, for which what a rollout has left gathered is let go."""
    for module in model.modules():
        module.reshard() if isinstance(module, FSDPModule) else None
    return [p for p in model.parameters() if p.requires_grad]


class Run:
    """One process's share of a run: configuration, task, Accelerate, directory and clocks."""

    def __init__(self, cfg, accelerator: Accelerator):
        self.cfg, self.accelerator, self.path, self.task = cfg, accelerator, Path(cfg.output_dir), TASKS[cfg.task]
        self.device, self.world, self.rank = accelerator.device, accelerator.num_processes, accelerator.process_index
        self.main, self.say = accelerator.is_main_process, functools.partial(accelerator.print, flush=True)
        self.pixels: rewards.PixelReward | None = None  # the reward of --rewards
        self.state, self.lines = {}, []  # the checkpoint that the run goes on from, and what metrics.jsonl holds
        self.seconds, self.began = dict.fromkeys(("base", "rollout", "update", "eval"), 0.0), time.perf_counter()

    def prepare(self, model: nn.Module, weight_decay: float, accumulation: int) -> tuple[nn.Module, object]:
        """(the model as Accelerate wraps it, AdamW on those of its weights that train; `update` sets the rate)."""
        mine, count = trained(model), lambda of: sum(p.numel() for p in of) / 1e6
        self.say(f"weights   {count(mine):.2f}M of {count(model.parameters()):.2f}M parameters train")
        self.accelerator.gradient_accumulation_steps = accumulation
        optimizer = torch.optim.AdamW(mine, betas=BETAS, weight_decay=weight_decay)
        prepared, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.bare = model
        return prepared, self.optimizer

    def save(self, base: MaskedDiffusionModel, path: Path) -> None:
        """The base's weights, from all shards, as its own `save` writes them. All processes have to ask."""
        trained(base)
        weights = state_dict.get_model_state_dict(base.hf, options=WHOLE) if self.accelerator.is_fsdp2 else None
        if self.main:
            with in_one_line(f"{path} cannot be written"):
                base.save(path, weights)

    def steps(self, last: int, label: str, save_every: int) -> Iterator[int]:
        """The steps of a training loop that are left, under a bar where someone is looking (a terminal). A checkpoint
        follows every save_every-th one (0: none) and the last. Within the loop the first Ctrl-C or SIGTERM waits for
        the end of a step, which is saved before all processes leave; a second one ends the run at once."""

        def on_signal(number: int, frame) -> None:
            signal.signal(number, signal.SIG_DFL)
            self.accelerator.set_trigger()

        before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for step in tqdm(range(self.load_checkpoint(), last), label, disable=None if self.main else True):
                yield step
                stop, path = self.accelerator.check_trigger(), self.accelerator.project_dir
                if stop or step + 1 == last or (save_every and (step + 1) % save_every == 0):
                    self.save_checkpoint(step + 1)
                if stop:
                    self.say(f"stopped after step {step + 1}; to go on: --resume --output_dir {path}")
                    self.finish()
                    sys.exit(128 + signal.SIGTERM)
        finally:  # a base that is good enough leaves the loop early
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to `seconds[name]`, but for those of the clocks within it."""
        began, inside = time.perf_counter(), sum(self.seconds.values())
        yield
        self.seconds[name] += time.perf_counter() - began - (sum(self.seconds.values()) - inside)

    def total(self) -> dict[str, float]:
        """All seconds so far, those before a resume included."""
        return self.seconds | {"total": time.perf_counter() - self.began}

    def average(self, values: dict[str, float]) -> dict[str, float]:
        """Each value's mean over all processes, which all have to ask."""
        if self.world == 1:
            return values
        stacked = torch.tensor(list(values.values()), device=self.device)
        return dict(zip(values, self.accelerator.reduce(stacked, "mean").tolist()))

    def everyone(self, flag: bool) -> bool:
        """Whether the flag holds on all processes, which all have to ask."""
        return self.average({"flag": float(flag)})["flag"] == 1.0

    def update(self, model, optimizer, lr: float, most: float, losses: list[dict], where: str) -> dict[str, float]:
        """One step of AdamW at the learning rate lr, on the gradient with its norm clipped to `most` -> means of the
        micro-batches' losses over all processes, and the norm before; where they are not finite no step, UsageError."""
        norm = self.accelerator.clip_grad_norm_(model.parameters(), most)
        metrics = self.average(mean_of(losses) | {"grad_norm": float(norm)})
        lower = "lower --lr, by --resume, or --sft_lr, --init_lr, in a new run"
        wild = f"{where}: the loss or its gradient is not finite; {lower}"
        require({wild: math.isfinite(metrics["loss"] + metrics["grad_norm"])})
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        return metrics

    def open(self) -> None:
        """Take the run's directory for as long as this process lives. UsageError, on all processes, where another has
        it, or where --resume cannot go on from what is there, of which nothing is changed then. What a finished run
        left is moved aside, never overwritten."""
        refusal, lock = [None], self.path / "lock"
        try:
            if self.main:
                self.path.mkdir(parents=True, exist_ok=True)
                foreign = (self.path / "config.json").exists() and not lock.exists()
                require({f"--output_dir {self.path} holds something that is no run; name another": not foreign})
                self.lock = lock.open("a+")  # held by this process, until it ends in whatever way
                try:
                    import fcntl

                    fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):
                    holder = lock.read_text().strip()
                    raise UsageError(f"--output_dir {self.path} is in use by {holder}; name another") from None
                except (ImportError, OSError):  # Windows and some file systems have none of these locks
                    pass
                if not self.cfg.resume and (self.path / "config.json").exists():
                    names = (Path(f"{self.path.resolve()}.old{n}") for n in itertools.count(1))
                    (aside := next(path for path in names if not path.exists())).mkdir()
                    for item in {*self.path.iterdir()} - {lock}:
                        item.rename(aside / item.name)
                    self.say(f"moved     what was in {self.path} to {aside}")
                self.lock.truncate(0)
                own = f"process {os.getpid()} on {socket.gethostname()} since {time.ctime()}"
                print(own, file=self.lock, flush=True)
        except (UsageError, OSError) as error:
            refusal = [str(error) if isinstance(error, UsageError) else f"--output_dir {self.path}: {error}"]
        broadcast_object_list(refusal)
        require({refusal[0]: refusal[0] is None})
        if self.cfg.resume:
            self.state = self.checkpoint()
        self.write("config.json", json.dumps(vars(self.cfg), indent=1))

    def write(self, name: str, text: str) -> None:
        """A whole file of the run's directory, or the old one, whatever happens in between."""
        if self.main:
            part = self.path / f"{name}.part"
            part.write_text(text)
            part.replace(self.path / name)

    def log(self, line: dict) -> None:
        """A line of metrics.jsonl, whose numbers go to --log_with's tracker too."""
        self.lines.append(json.dumps(line) + "\n")
        if self.main:
            with (self.path / "metrics.jsonl").open("a") as file:
                file.write(self.lines[-1])
        self.accelerator.log({k: v for k, v in line.items() if not isinstance(v, str)}, step=line["step"])

    def conclude(self, results: dict, table: str) -> None:
        """results.json, with the settings, versions and memory behind its figures, and a table of them; the end."""
        results |= {"config": vars(self.cfg), "versions": {v.__name__: v.__version__ for v in (torch, transformers)}}
        if self.device.type == "cuda":
            results["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        self.write("results.json", json.dumps(results, indent=1))
        self.say(f"\n{table}\nresults   {self.path / 'results.json'}")
        self.finish()

    def finish(self) -> None:
        """End the trackers, and together: a process that leaves early can hang the others."""
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def save_checkpoint(self, step: int) -> None:
        """All of the state after `step` steps: the weights that train, the optimiser's, the clocks and the metrics.
        Masks, noise and data order are functions of (seed, step, j, row): there is no other."""
        trained(self.bare)
        weights, moments = state_dict.get_state_dict(self.bare, self.optimizer.optimizer, options=WHOLE)
        state = {"weights": weights, "optimizer": moments, "seconds": self.total(), "step": step}
        state |= {"lines": self.lines, "batches": self.cfg.batches(self.world)}
        last, before, part = (self.path / name for name in (*CHECKPOINTS, "checkpoint.pt.part"))
        with in_one_line("a new checkpoint cannot be written, the last one is intact"):
            if self.main:
                with part.open("wb") as out:
                    torch.save(state, out)
                if last.exists():
                    last.replace(before)
                part.replace(last)
        self.accelerator.wait_for_everyone()

    def checkpoint(self) -> dict:
        """The last complete checkpoint, {} where there never was one. UsageError if the run cannot go on from it."""
        state, files = {}, [file for name in reversed(CHECKPOINTS) if (file := self.path / name).exists()]
        for file in files:
            try:
                with in_one_line(f"damaged   {file}"):
                    state = torch.load(file, "cpu", mmap=os.name == "posix")
            except UsageError as error:
                self.say(str(error))
        log = self.path / "metrics.jsonl"
        begun = log.is_file() and 0 < self.cfg.save_every < len(log.read_text().splitlines())
        left = ", ".join(map(str, files)) or log
        gone = f"--resume: {self.path} has no checkpoint that is complete; without {left} it starts over"
        require({gone: state or not (files or begun)})
        require({f"--resume: {self.path} is of another version": not state or "lines" in state})
        has = self.cfg.batches(self.world)
        had = state.get("batches", has)
        require({f"--resume: {self.path} has batches over all processes of {had}, here of {has}": had == has})
        return state

    def load_checkpoint(self) -> int:
        """Steps done, after restoring weights, optimiser, clocks and metrics from what `open` has found; else 0."""
        state, self.state = self.state, {}
        if state:
            kept = dict(model_state_dict=state["weights"], optim_state_dict=state["optimizer"], options=WHOLE)
            trained(self.bare)
            state_dict.set_state_dict(self.bare, self.optimizer.optimizer, **kept)
            self.began -= state["seconds"].pop("total")
            self.seconds, self.lines = state["seconds"], state["lines"]
        if self.cfg.resume:
            self.write("metrics.jsonl", "".join(self.lines))  # what stood behind it will be made again
            self.say(f"resumed   after {state.get('step', 0)} steps")
        return state.get("step", 0)


def launcher() -> bytes:
    """Environment and command line of the `accelerate launch` that started this process; empty without it or /proc."""
    with contextlib.suppress(OSError):
        if "ACCELERATE_MIXED_PRECISION" in os.environ:
            parent = Path(f"/proc/{os.getppid()}")
            return (parent / "environ").read_bytes() + (parent / "cmdline").read_bytes()
    return b""


def take_the_cores(given: bytes) -> None:
    """A process that is alone on a CPU takes all cores, where `accelerate launch` gives it one thread, unless that was
    itself given OMP_NUM_THREADS or --num_cpu_threads_per_process."""
    if given and b"OMP_NUM_THREADS=" not in given and b"--num_cpu_threads" not in given:
        torch.set_num_threads(len(os.sched_getaffinity(0)))


def start(cfg, title: str) -> tuple[Run, dict[str, list[Problem]]]:
    """(the run, its problems by split): data, Accelerate, the run directory and the first lines. Raises UsageError."""
    data, precision = rewards.splits(TASKS[cfg.task], cfg, cfg.generated()), "bf16" if cfg.bf16 else "no"
    asked, given = os.environ.get("ACCELERATE_MIXED_PRECISION", "no"), launcher()
    unlike = f"accelerate launch --mixed_precision {asked}: --bf16 decides, which is {cfg.bf16} here; leave it out"
    steps = "accelerate launch --gradient_accumulation_steps: --accumulation decides; leave it out"
    require({unlike: asked in ("no", precision), steps: b"--gradient_accumulation_steps" not in given})
    with in_one_line("accelerate"):
        accelerator = Accelerator(mixed_precision=precision, log_with=cfg.log_with, project_dir=cfg.output_dir)
    kind, sharded = accelerator.distributed_type.value, accelerator.is_fsdp2
    whole = title == "MaskGRPO" and not cfg.lora and not (cfg.model and resolve(cfg.model)[1])
    unknown = f"accelerate: {kind} does not fit; use MULTI_GPU (DDP), or FSDP (fsdp_version: 2) where all weights train"
    require({unknown: kind in ("NO", "MULTI_CPU", "MULTI_GPU") or (sharded and whole)})
    if sharded:
        # Accelerate's bf16 would round off what an update changes, and its no_sync add up whole gradients on each card
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
        accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True
    run = Run(cfg, accelerator)
    if run.world == 1 and run.device.type == "cpu":
        take_the_cores(given)
    run.open()
    accelerator.init_trackers(title.lower(), config={k: str(v) for k, v in vars(cfg).items()})
    sizes = ", ".join(f"{len(problems)} {split}" for split, problems in data.items() if problems)
    run.say(f"{title:<9} {cfg.model or 'the tiny default, trained here first'} -> {run.path}")
    run.say(f"data      {cfg.data or ('generated' if cfg.generated() else 'published')}: {sizes}")
    processes = f"processes {run.world}{', sharded' * sharded}"
    run.say(f"device    {run.device}, {processes}, threads {torch.get_num_threads()}")
    if run.task.runs_code:
        run.say(f"sandbox   {rewards.protections()}")
    run.say("settings  " + " ".join(f"{name}={value}" for name, value in vars(cfg).items()))
    return run, data


# --- Rollouts and evaluation ------------------------------------------------------------------------------------------


def asking(model: nn.Module, view: Callable, cache: str, shifted: bool) -> Callable:
    """A sampler's `denoise`; view(x) -> (x, attention) of the model. Rows that have ended, where nothing is read, are
    not computed. One row stays: another process may go on.

    With a cache a block's first forward is as without, and keeps keys and values. The next ones compute the block, and
    with "prefix" what is behind it. It is approximate in these, from the second layer on: there the keys and values of
    the columns that are not computed would know the block's new tokens, and those kept know its masks. The places read
    in the first forward are the block; where rows are in blocks of their own, from the first of them to the last.
    """
    past, block, rows, window = None, range(0), None, None

    def denoise(x: Tensor, positions: Tensor) -> Tensor:
        """Logits (N, V) float32 at the N True positions (B, L); x (B, L) long."""
        nonlocal past, block, rows, window
        (x, attention), here = view(x), positions.any(0).nonzero()[:, 0].tolist()
        if past is not None and all(i in block for i in here):
            seen = x[rows][:, window], attention[rows], positions[rows][:, window]
            logits = model(*seen, rough=True, past=past, window=window)
            past.crop(-int(window.sum()))
            return logits
        rows = positions.any(1)
        rows[0] |= ~rows.any()
        past = transformers.DynamicCache() if cache != "off" else None
        logits = model(x[rows], attention[rows], positions[rows], rough=True, past=past)
        if past is not None:
            block, place = range(here[0], here[-1] + 1), torch.arange(x.shape[1], device=x.device)
            window = (place >= here[0] - shifted) & (place < (block.stop if cache == "dual" else x.shape[1]))
            for layer in past.layers:
                layer.keys, layer.values = layer.keys[:, :, ~window], layer.values[:, :, ~window]
        return logits

    return denoise


def roll_out(run: Run, model, base, problems: list[Problem], keys, temperature: float) -> Rollouts:
    """One completion per problem. keys: B keys of the rows' noise. `model` is the wrapped model: every process makes
    the same number of forwards, so nothing is unwrapped."""
    cfg, batch = run.cfg, base.open_batch(run.task, problems, run.cfg.gen_length, run.device)
    ends, options = base.ends_of(run.task), dict(temperature=temperature, everyone=run.everyone)
    if base.codebook:
        options |= dict(steps=cfg.steps, schedule="cosine", first_id=base.first_id)
        options |= dict(gumbel=cfg.gumbel, decay=cfg.gumbel_decay) if cfg.sampler == "maskgit" else {}
    else:
        names = ("block_length", "tokens_per_step", "eos_last", "threshold")
        options |= {name: getattr(cfg, name) for name in names} | dict(eos_ids=ends, pad_id=base.pad_id)
    options["generator"] = [seeded(*key, device=run.device) for key in keys]
    views = (lambda x: (x, batch.attention)), functools.partial(base.unprompted, batch)
    denoise = guided(*(asking(model, view, cfg.cache, base.shifted) for view in views), cfg.guidance)
    done = SAMPLERS[cfg.sampler](denoise, batch.x, batch.completion, **options)
    batch, completion = batch._replace(x=done.x), through_eos(done.x, batch.completion, ends)
    texts = base.texts(batch, completion, cfg.gen_length)
    return Rollouts(batch, completion, done.unmask_step, None, done.forwards, texts)


def sample_groups(run: Run, policy, base, problems: list[Problem], step: int, micro: int):
    """(Rollouts, rewards (B,) float32, metrics) of one micro-batch: G completions of each of its prompts. A group never
    straddles processes, so that advantages need no communication. Which prompts a step has, and the noise of each
    completion, depend on its global number alone."""
    cfg, g = run.cfg, run.cfg.group_size
    per_batch = cfg.batch_size // g
    first = (micro * run.world + run.rank) * per_batch
    groups, counter = range(first, first + per_batch), step * per_batch * run.world * cfg.accumulation + first
    asked = [problems[i] for i in shuffled(len(problems), per_batch, counter, cfg.seed, DATA, 1) for _ in range(g)]
    keys = [(cfg.seed, ROLLOUT, step, group, k) for group in groups for k in range(g)]
    policy.eval()
    with run.clock("rollout"):
        o = roll_out(run, policy, base, asked, keys, cfg.temperature)
        terms = [terms for terms, _ in judge_all(run.task, o.texts, asked, run.pixels)]
    r = torch.tensor([sum(term.values()) for term in terms])
    metrics = {"reward": r.mean().item()} | {f"reward/{name}": mean for name, mean in mean_of(terms).items()}
    metrics["zero_variance_groups"] = (r.view(-1, g).std(1) < 1e-6).float().mean().item()
    metrics |= {"completion_tokens": o.completion.sum(1).float().mean().item(), "forwards": float(o.forwards)}
    return o._replace(groups=torch.tensor(groups).repeat_interleave(g)), r, run.average(metrics)


def evaluate(run: Run, model, base, problems: list[Problem], samples: int = 0) -> list[dict]:
    """Completions of every problem, greedy, or `samples` of each at --temperature; the same on all processes. Images
    are never greedy: without noise one prompt has one image. One dict per completion, in order: sample (None if it is
    the only one), score, the terms of its reward, category, prompt, completion, answer. A row's noise is keyed by its
    problem, so the result depends on no batch size."""
    cfg, todo = run.cfg, [(i, s) for i in range(len(problems)) for s in range(max(samples, 1))]
    mine, done, size = todo[run.rank :: run.world], [], cfg.eval_batch_size
    temperature = cfg.temperature if samples or base.codebook else 0.0
    category = run.task.category or (lambda problem: None)
    model.eval()
    with run.clock("eval"):
        for first in range(0, -(-len(todo) // run.world), size):  # as many on every process
            part = mine[first : first + size]
            rows = part or todo[:1]  # a process without a share still makes its forwards
            keys, asked = [(cfg.seed, EVALUATION, *row) for row in rows], [problems[i] for i, _ in rows]
            texts = roll_out(run, model, base, asked, keys, temperature).texts[: len(part)]
            done += zip(part, texts, judge_all(run.task, texts, asked[: len(part)], run.pixels))
    return [
        {"sample": s if samples else None, "score": score, "terms": terms, "category": category(problems[i]) or None}
        | {"prompt": problems[i]["question"], "completion": text, "answer": problems[i]["answer"]}
        for (i, s), text, (terms, score) in sorted(gather_object(done), key=lambda row: row[0])
    ]


# --- Training: a base by its ELBO, from nothing (tiny) or a checkpoint (--sft_steps); then RL, and before and after ---


def elbo_step(run: Run, model, base, optimizer, lesson: list[tuple], step: int) -> None:
    """One step of ELBO training on this process's share of the batch; lesson: (prompt, start, target) of ids. The noise
    of the whole batch is drawn on every process, so that a row's does not depend on who computes it."""
    cfg, share, noise = run.cfg, run.cfg.sft_batch_size, seeded(run.cfg.seed, ELBO, step, 0)
    size, mine = share * run.world, slice(run.rank * share, (run.rank + 1) * share)
    prompts, starts, targets = zip(*[lesson[i] for i in shuffled(len(lesson), size, step * size, cfg.seed, DATA, 0)])
    if base.codebook:
        dropped = torch.rand(size, generator=noise) < 0.1  # guidance has to know what there is without a prompt
        prompts = [base.image_prompt("") if drop else ids for drop, ids in zip(dropped.tolist(), prompts)]
    batch = base.batch(prompts, starts, run.device, targets)
    # t is stratified over the batch, r_b = 1 - (b + u) / B: the same expectation at less variance; never rounded to 0
    r = (1 - (torch.arange(size) + torch.rand(1, generator=noise)) / size).clamp(min=2**-24)
    u = torch.rand(batch.x.shape, generator=noise)
    model.train()
    batch, r, u = Batch(*(v[mine] for v in batch)), r[mine].to(run.device), u[mine].to(run.device)
    loss = elbo_loss(model, batch, r, u, base.mask_id, base.first_id)
    run.accelerator.backward(loss)
    lr = cfg.sft_lr * min(1.0, (step + 1) / 100)
    run.update(model, optimizer, lr, 1.0, [{"loss": loss.item()}], f"ELBO training, step {step + 1}")


def train_elbo(run: Run, base, train: list[Problem], validation: list[Problem]) -> None:
    """Minimise Eq. 2 on the solutions that fit, ended and padded with EOS as in LLaDA's SFT. The tiny model stops when
    greedy validation accuracy reaches --base_accuracy: a fixed number of steps would give bases of very different
    strength from seed to seed."""
    cfg, task, n = run.cfg, run.task, run.cfg.gen_length
    solutions = [(p, base.target_ids(task, p)) for p in train]
    fitting = [(p, ids) for p, ids in solutions if len(ids) == n or (len(ids) < n and not task.codebook)]
    require({f"--gen_length {n}: none of the {len(train)} worked solutions fits": fitting})
    padded = lambda ids: ids + [base.pad_id] * (n - len(ids))
    lesson = [(base.prompt_ids(task, p), base.start_ids(task, p, n), padded(ids)) for p, ids in fitting]
    steps = cfg.sft_steps or cfg.base_steps
    look = cfg.eval_every if cfg.model else 200 if base.codebook else 50  # an image takes more forwards
    model, optimizer = run.prepare(base, weight_decay=0.01, accumulation=1)
    run.say(f"ELBO training, at most {steps} steps, on {len(lesson)} solutions of up to {n} tokens")
    for step in run.steps(steps, "ELBO training, at most", 10 * cfg.save_every):
        elbo_step(run, model, base, optimizer, lesson, step)
        if look and ((step + 1) % look == 0 or step + 1 == steps):
            accuracy = rewards.accuracy([row["score"] for row in evaluate(run, model, base, validation)])["accuracy"]
            run.say(f"  step {step + 1:>5}  validation accuracy {accuracy:.3f}")
            if accuracy >= cfg.base_accuracy and not cfg.model:
                break


def base_path(run: Run, data: dict[str, list[Problem]]) -> tuple[str, bool]:
    """(the model that RL starts from and is held to, whether it was there already). Trained bases are kept: the tiny
    one in runs/base-TASK-sSEED-KEY, whose key stands for all that it depends on, the SFT one in the run."""
    cfg, train, images = run.cfg, data["train"], bool(run.task.codebook)
    if cfg.eval_only or (cfg.model and not cfg.sft_steps):
        return cfg.model, True
    names = "gen_length block_length tokens_per_step base_accuracy base_steps sft_lr sft_batch_size seed".split()
    settings = [getattr(cfg, name) for name in names + ["temperature", "guidance", "steps"] * images]
    settings[names.index("sft_batch_size")] *= run.world
    about = [1, train, TINY_SIZES | TINY_SIZES_OF.get(cfg.task, {}), settings]
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    kept = run.path / "sft" if cfg.model else Path("runs", f"base-{cfg.task}-s{cfg.seed}-{key}")
    if run.everyone((kept / "seconds").is_file()):
        run.seconds["base"] = float((kept / "seconds").read_text())
        run.say(f"base      {kept}, trained earlier")
        return str(kept), True
    # A run within the run, and moved only when it is complete: runs that start together do not meet in there. Images
    # are drawn by emerge, and texts by no shortcut, so that every method starts from the same base; but for justgrpo,
    # whose decoding is another.
    of_base = dict(sampler="emerge" if images else cfg.sampler, threshold=1.0, cache="off", eos_last=False)
    of_base |= dict(output_dir=str(run.path / "base"), guidance=cfg.guidance * images)
    training = Run(dataclasses.replace(cfg, **of_base), run.accelerator)
    training.pixels = run.pixels
    training.open()
    words = [run.task.messages(p)[-1]["content"] + "\n" + run.task.target(p) * (not images) for p in train]
    base = load_model(cfg.model, cfg, True) if cfg.model else tiny_model(words, cfg.seed, cfg.task)
    base.check_problems(run.task, data, cfg.gen_length, run.say)
    train_elbo(training, base, data["train"], data["validation"])
    run.seconds["base"], run.began = training.total()["total"], min(run.began, training.began)
    run.save(base, training.path / "model")
    if run.main:
        (training.path / "seconds").write_text(f"{run.seconds['base']:.1f}")
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            shutil.move(training.path, kept)
        for name in CHECKPOINTS:
            (kept / name).unlink(missing_ok=True)
    run.accelerator.wait_for_everyone()
    return str(kept), False


def reference_of(run: Run, policy: nn.Module, base: MaskedDiffusionModel, path: str) -> Callable:
    """pi_ref, the policy as it is now, as a context that yields a model, without gradients: of a fresh adapter (--lora)
    the base without it, else the policy with copies of the weights that train. In the policy's own precision, so that
    equal weights give a KL of 0. path: what the policy was loaded from."""
    fresh = run.cfg.lora and resolve(path)[1] is None  # an adapter that was trained before is a part of pi_ref
    held = [p.detach().clone() for p in trained(base)] if run.cfg.beta and not fresh else []

    def exchange() -> None:  # in place: DDP and FSDP know the weights by where they are
        for p, other in zip(trained(base), held):
            now = p.detach().clone()
            p.data.copy_(other)
            other.copy_(now)

    @contextlib.contextmanager
    def reference() -> Iterator[nn.Module]:
        with torch.no_grad(), base.hf.disable_adapter() if fresh else contextlib.nullcontext():
            exchange()
            yield policy
            exchange()

    return reference


def train_policy(run: Run, policy, base, reference, optimizer, data: dict) -> None:
    """max_steps of MaskGRPO, with a look at the validation problems now and then."""
    cfg = run.cfg
    run.say(f"updates   {cfg.max_steps} rollouts x mu {cfg.mu}: {cfg.max_steps * cfg.mu:,}")
    for step in run.steps(cfg.max_steps, "RL steps", cfg.save_every):
        line = {"step": step + 1, "completions": (step + 1) * cfg.batch_size * cfg.accumulation * run.world}
        with run.clock("update"):
            line |= train_step(run, policy, base, reference, optimizer, data["train"], step)
        if cfg.eval_every and ((step + 1) % cfg.eval_every == 0 or step + 1 == cfg.max_steps):
            rows = evaluate(run, policy, base, data["validation"])
            line["validation_accuracy"] = rewards.accuracy([row["score"] for row in rows])["accuracy"]
            shown = ("reward", "kl", "validation_accuracy")
            run.say(f"  step {step + 1:>5}/{cfg.max_steps}  " + "  ".join(f"{name} {line[name]:.4f}" for name in shown))
        run.log(line)


def measure(run: Run, model, base, data: dict, phase: str) -> list[dict]:
    """Held-out completions of one phase: greedy ones of test and unseen, --pass_k sampled ones of test. Kept in
    completions_PHASE.jsonl; those before RL are read back when a run is resumed."""
    file, k = run.path / f"completions_{phase}.jsonl", run.cfg.pass_k
    if run.cfg.resume and phase == "before" and file.is_file():
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        asked = [row["prompt"] for row in rows if (row["split"], row["sample"]) == ("test", None)]
        same = asked == [problem["question"] for problem in data["test"]]
        require({f"--resume: {file} is about other test problems than --data or --eval_data has now": same})
        return rows
    rows = []
    for split, samples in (("test", 0), ("unseen", 0), *[("test", k)] * (k > 0)):
        rows += [{"split": split} | row for row in evaluate(run, model, base, data[split], samples)]
    run.write(file.name, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def report(run: Run, phases: dict[str, list[dict]], **more) -> None:
    """results.json, and its figures as a small table under the settings of the decoding. phases: name -> rows."""
    cfg, results = run.cfg, {name: getattr(run.cfg, name) for name in ("task", "method", "seed")} | more
    image, text = f"{cfg.steps} steps of {cfg.sampler}", f"blocks of {cfg.block_length}, {cfg.tokens_per_step} per step"
    extra = f", guidance {cfg.guidance:g}" * (cfg.guidance > 0) + ", EOS last" * cfg.eos_last
    extra += f", threshold {cfg.threshold:g}" * (cfg.threshold < 1) + f", cache {cfg.cache}" * (cfg.cache != "off")
    results["decoding"] = f"{cfg.gen_length} tokens, {image if run.task.codebook else text}{extra}"
    results |= rewards.figures(phases, cfg.pass_k)
    results["seconds"] = {name: round(value, 1) for name, value in run.total().items()}
    run.conclude(results, rewards.table(results, [*phases]))


def main(argv: list[str] | None = None) -> None:
    """Parse; get a base; then evaluate it, or measure, train by RL, measure again."""
    cfg = parse(argv)
    image, adapter = bool(TASKS[cfg.task].codebook), cfg.model and resolve(cfg.model)[1]
    rules = {
        f"--gamma {cfg.gamma}: at least 0 and below 1": 0 <= cfg.gamma < 1,
        f"--gamma: --remask {cfg.remask} has none": cfg.remask in ("fading_out", "uniform")
        or cfg.gamma == METHODS[cfg.method]["gamma"],
        f"--gen_length {cfg.gen_length}: an image has a square of codes, and one token more": not image
        or (cfg.gen_length > 1 and math.isqrt(cfg.gen_length - 1) ** 2 == cfg.gen_length - 1),
        f"--sampler {cfg.sampler}: not for --task {cfg.task}": image == (cfg.sampler != "semi_autoregressive"),
        "--cache, --threshold and --eos_last: of texts": not image
        or (cfg.cache, cfg.threshold, cfg.eos_last) == ("off", 1, False),
        "--rewards scores images of a --model: --task t2i": (image and not cfg.tiny()) or not cfg.rewards,
        "--eval_only, --lora and --sft_steps need --model": cfg.model or not cfg.eval_only + cfg.lora + cfg.sft_steps,
        "--eval_only trains nothing: without --lora, --sft_steps": not (cfg.eval_only and cfg.lora + cfg.sft_steps),
        f"--lora {cfg.lora}: {adapter} is an adapter already, and trains as it is": not (cfg.lora and adapter),
    }
    check(cfg, "temperature tokens_per_step threshold steps accumulation sft_batch_size sft_lr base_steps", rules)
    run, data = start(cfg, "MaskGRPO")
    asked = {problem["question"] for problem in sum(data.values(), []) if image and cfg.tiny()}
    require({f"prompt {q!r}: not one that the embedded t2i task knows": q in rewards.scene_table() for q in asked})
    drawn = not image or cfg.generated() or (cfg.model and not cfg.sft_steps)
    require({"--task t2i: of problems from a file no base can be trained, they have no images": drawn})
    if cfg.rewards:
        with in_one_line("--rewards"):
            run.pixels = rewards.PixelReward(load_magvit(cfg.decoder, run.device).pixels, cfg.rewards, run.device)
    torch.set_float32_matmul_precision("high" if cfg.bf16 else "highest")  # TF32: 8 times as exact as bf16
    path, cached = base_path(run, data)
    run.accelerator.free_memory()  # of the base's own training
    base = load_model(path, cfg, trainable=not cfg.eval_only)
    base.check_problems(run.task, data, cfg.gen_length, run.say)
    if cfg.eval_only:
        model = run.accelerator.prepare_model(base.to(run.device), evaluation_mode=True)  # FSDP leaves it where it is
        return report(run, {"eval_only": measure(run, model, base, data, "eval_only")})
    policy, optimizer = run.prepare(base, cfg.weight_decay, cfg.accumulation)
    before = measure(run, policy, base, data, "before")
    train_policy(run, policy, base, reference_of(run, policy, base, path), optimizer, data)
    after = measure(run, policy, base, data, "after")
    run.save(base, run.path / "model")
    report(run, {"before": before, "after": after}, base_cached=cached)


def cli(argv: list[str] | None = None, main: Callable = main, name: str = "maskgrpo.py") -> int:
    """main, with an exit code: 0 done; 2 something to change, one line says what; 143 or 130 stopped."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # load_published checks by itself what the library warns of
    warnings.filterwarnings("ignore", category=FutureWarning)
    with contextlib.suppress(AttributeError):  # a stream of somebody's own
        sys.stdout.reconfigure(errors="replace")  # a terminal that has no ±
    try:
        main(argv)
        code = 0
    except SystemExit as left:  # --help, or a run that was stopped and has saved itself
        code = left.code
    except KeyboardInterrupt:
        print(f"{name}: stopped; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    except (UsageError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:  # the very class is what gloo and NCCL raise
        if not re.search("(?i)gloo|nccl|peer|socket|time.?out", str(error)) or not torch.distributed.is_initialized():
            raise
        ended = "another process has ended or is out of reach; --resume goes on from the last checkpoint"
        print(f"{name}: error: {ended} ({first_line(error)[:80]} ...)", file=sys.stderr)
        return 2
    if torch.distributed.is_initialized():  # after the models: DDP's end would join gloo's threads, which need the GIL
        torch.distributed.destroy_process_group()
    return code


if __name__ == "__main__":
    sys.exit(cli())
