"""MaskGRPO: group relative policy optimisation of a masked diffusion language model, in one file.

Paper: "Consolidating Reinforcement Learning for Multimodal Discrete Diffusion Models", ICLR 2026.
One step: prompts -> G completions each -> rewards -> group advantages -> for j = 1 ... mu: re-mask the
completions at ratio t_j, predict what was hidden, compare with the old and the reference policy on
the same masks, update. Without --model a tiny model is trained first, by the masked ELBO, on generated
problems, and stopped while it is still imperfect; a published checkpoint runs through the same lines.

    symbol        shape            meaning
    x0, x_t       (B, L) long      a finished sequence, a partly masked one; x_1 hides the whole completion
    completion    (B, L) bool      the completion's positions, through its first EOS
    t, j, mu      float, int       mask ratio; inner update 1 ... mu; t_j = gamma + (1 - gamma) j / mu
    ell           (B,) float32     (1/t) sum over masked positions of log pi(x0^n | c, x_t)
    rho, D        (B,) or (B, L)   importance ratio and KL estimate, on ell (Eq. 9, 10) or token by token
    A, G, |o|     (B,), int, (B,)  advantage, group size, completion length

Departures from the paper
 1. As printed the objective is A (rho - beta D): a negative advantage would reward divergence. Here
    it is A rho - beta D, and rho A is clipped as in PPO.
 2. `--ratio token`, the default, is what the authors' code computes; `--ratio sequence` is Eq. 9 and
    10 as printed. Where the policies are equal their gradients differ only in the denominator, the number
    of masked tokens instead of its expectation t |o|. README.md says how they compare.
 3. Exponentials of log ratios beyond 1 go on as tangents (`tame_exp`), which the sequence form needs.
 4. Tokens behind the first EOS do not count, and stay hidden in x_t, as they were in the rollout.
 5. "Controlled random seeds" is read as: one mask noise for the completions of a group.
Departures from the authors' code
 6. Only masked completion tokens enter the loss; there the loss mask is not indexed by j.
 7. j is a loop index, so each rollout sees all mu masks whatever the gradient accumulation.
 8. Masks come from a generator keyed by (seed, step, j, group): the same for old, new and reference
    policy and for any number of processes. The global generator is never reseeded.
 9. Log-probabilities are taken at the rollout's temperature. The rollout also *selects* positions by
    confidence, and may be guided (--guidance); as in every method compared here, ell knows neither.
10. The reward asks for GSM8K's own `#### 42` (rewards.py), the masks' ramp is per row (remask.py).
11. The tiny images have advantages without std, and no guidance, unless flags say so: README.md says why.

    python maskgrpo.py --task gsm8k                        # the tiny default, minutes on a laptop
    accelerate launch maskgrpo.py --task gsm8k             # the same through Accelerate's launcher
    accelerate launch --config_file configs/one_gpu.yaml maskgrpo.py --task gsm8k \\
        --model GSAI-ML/LLaDA-8B-Instruct --lora 128       # the paper's run
    python maskgrpo.py --resume --output_dir runs/NAME     # goes on where a run was stopped
    python maskgrpo.py --eval_only --model runs/NAME       # accuracy and pass@k of any model or adapter
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jinja2
import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, gather_object
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.peft_utils import find_adapter_config_file

import remask
import rewards
from emerge_sampler import SCHEDULES, Rollout, emerge, guided, maskgit, semi_autoregressive, through_eos
from remask import Remask, seeded
from rewards import TASKS, DataError, Problem, first_line


class UsageError(ValueError):
    """Something the caller has to change: one line that says what, where, and what would be right."""


# ---------------------------------------------------------------------------------------------
# Configuration: one field per flag. Two defaults where they follow the model.
# ---------------------------------------------------------------------------------------------


def option(help: str, default=None, *, paper=None, tiny=None, choices=None, within="[0, inf)"):
    """A field whose default is `default`, or `paper` with --model and `tiny` without; numbers lie `within`."""
    meta = dict(help=help, paper=paper, tiny=tiny, choices=choices, within=within)
    return dataclasses.field(default=default, metadata=meta)


# A method is a row of choices; a flag given by hand wins over its row.
METHODS = {
    # the paper: fading-out masks at high ratios, a group compared on shared noise
    "maskgrpo": dict(remask="fading_out", gamma=0.6, managed_randomness=True, ratio="token", advantage="std"),
    # d1: the likelihood at full mask, 15% of the prompt hidden
    "diffu-grpo": dict(remask="full", gamma=0.0, managed_randomness=False, ratio="token", advantage="mean"),
    # MMaDA: uniform masks over the whole range
    "unigrpo": dict(remask="whole_range", gamma=0.0, managed_randomness=False, ratio="token", advantage="std"),
    # TraceRL: the recorded order of generation, in mu slices
    "tracerl": dict(remask="trace", gamma=0.0, managed_randomness=False, ratio="token", advantage="std"),
    # the paper's ablation on images: UniGRPO and truncation, but no emerge sampler
    "truncation": dict(remask="uniform", gamma=0.6, managed_randomness=True, ratio="token", advantage="std"),
    # not of a paper: each completion begins with another slice, and every update sees a sample of the whole
    "rotated-trace": dict(remask="rotated_trace", gamma=0.0, managed_randomness=False, ratio="token", advantage="std"),
}
# What these rows have instead where the completion is an image.
IMAGE_METHODS = {name: dict(sampler="maskgit") for name in METHODS} | {
    "maskgrpo": dict(remask="uniform", gamma=0.8, sampler="emerge"),
    "truncation": dict(gamma=0.8, sampler="maskgit"),
}
# What a task sets instead of the columns of Config, this one's or upo.py's: (with --model, for the tiny model).
TASK_SETTINGS = {
    "gsm8k": dict(topk=(None, 3)),  # its tiny blocks have 4 tokens
    "math500": dict(topk=(None, 3), base_accuracy=(None, 0.1)),
    "mbpp": dict(topk=(None, 3), max_steps=(None, 80), pass_k=(None, 0)),  # programs take time to run
    "countdown": dict(topk=(None, 3), base_accuracy=(None, 0.12)),
    # "accuracy" is the share of right entries, a third by chance
    "zebra": dict(
        topk=(None, 3), base_accuracy=(None, 0.5), sft_lr=(None, 1e-3), max_steps=(None, 100), eval_n=(None, 1000)
    ),
    # the grid, five clues at least: most confident cell first, one by one; "accuracy" is the share of right cells
    "sudoku": dict(gen_length=(64, 20), block_length=(16, 16), tokens_per_step=(1, 1), base_accuracy=(None, 0.73)),
    # All codes and one end-of-image token; the tiny model's images have 8 x 8 codes. Divided by its std, a group whose
    # images all miss the prompt pushes as hard, by fidelity alone, as one in which some are right: fewer objects then.
    "t2i": dict(
        gen_length=(1025, 65),
        guidance=(3.5, 0.0),
        temperature=(1.0, 1.0),
        base_accuracy=(None, 0.25),
        advantage=(None, "mean"),
        batch_size=(None, 64),
        lr=(None, 1e-4),
        max_steps=(None, 120),
        pass_k=(0, 0),
        rewards=("clip=1", None),
    ),
}
BETAS = (0.9, 0.99)  # AdamW: a shorter memory than 0.999 for the spikes of the 1/t weight


SAMPLERS = {"semi_autoregressive": semi_autoregressive, "emerge": emerge, "maskgit": maskgit}


@dataclasses.dataclass
class Config:
    """Every setting of a run. Published checkpoints default to the paper's values, the tiny model to its own."""

    # what runs
    task: str = option("task, a row of rewards.TASKS", "gsm8k", choices=tuple(TASKS))
    method: str = option("a row of METHODS", "maskgrpo", choices=tuple(METHODS))
    model: str = option("hub id, or path of a model, adapter or run directory; default: a tiny model, trained here")
    data: str = option('training problems, FILE.jsonl or "generated"; default: published, for tiny generated')
    eval_data: str = option("held-out problems, FILE.jsonl; default: published, or every tenth of --data")
    allow_code_execution: bool = option("task mbpp: run the programs that the model writes, in a sandbox", False)
    seed: int = option("seed of everything random", 0, within="[0, 4294967295]")
    output_dir: str = option("run directory; default runs/maskgrpo-TASK-METHOD-MODEL-sSEED")
    max_steps: int = option("RL steps (rollouts); the paper's run has 6000", paper=6000, tiny=250)
    resume: bool = option("go on from the last checkpoint in --output_dir", False)
    eval_only: bool = option("evaluate --model and leave", False)
    log_with: str = option("a tracker of Accelerate's: tensorboard, wandb, ...")
    save_every: int = option("steps between checkpoints, 0: only when stopped", paper=100, tiny=25)
    # base model
    lora: int = option("LoRA rank (alpha = rank / 2), 0: train all weights; the paper has 128", 0)
    bf16: bool = option("frozen weights and matrix products in bfloat16", paper=torch.cuda.is_available(), tiny=False)
    gradient_checkpointing: bool = option("recompute activations to save memory", paper=True, tiny=False)
    base_accuracy: float = option("tiny: training ends at this validation accuracy", 0.4, within="(0, 1]")
    base_steps: int = option("tiny: training ends after this many steps at the latest", 4000, within="[1, inf)")
    sft_steps: int = option("steps of supervised ELBO training before RL (SFT + MaskGRPO)", 0)
    sft_batch_size: int = option("sequences per process and step of ELBO training", paper=8, tiny=64, within="[1, inf)")
    prompt_dropout: float = option("share of ELBO training without prompt, for guidance; images", 0.1, within="[0, 1)")
    sft_lr: float = option("AdamW learning rate of ELBO training", paper=1e-5, tiny=3e-3, within="(0, inf)")
    # images
    rewards: str = option("reward on pixels: clip=1,http://HOST:PORT/hpsv3=0.5; the tiny model has a verifier instead")
    decoder: str = option("MAGVIT-v2's weights: a file, a folder or a hub id", "showlab/magvitv2")
    # rollout (emerge_sampler.py)
    sampler: str = option("text has the first, images the others", "semi_autoregressive", choices=tuple(SAMPLERS))
    steps: int = option("steps of an image", 12, within="[1, inf)")
    schedule: str = option("how fast an image's tokens are revealed", "cosine", choices=tuple(SCHEDULES))
    gen_length: int = option("completion length, tokens", paper=256, tiny=16, within="[1, inf)")
    block_length: int = option("tokens per semi-autoregressive block", paper=16, tiny=4, within="[1, inf)")
    tokens_per_step: int = option(
        "tokens revealed per step; the paper has 256 tokens in 128 steps", paper=2, tiny=4, within="[1, inf)"
    )
    temperature: float = option(
        "rollout temperature, also of the log-probabilities", paper=0.9, tiny=0.7, within="(0, 10]"
    )
    guidance: float = option("classifier-free guidance, 0: none", 0.0)
    eos_last: bool = option("EOS waits until the rest of its block is filled", False)
    # GRPO
    group_size: int = option("G, completions per prompt", paper=6, tiny=8, within="[2, inf)")
    batch_size: int = option(
        "completions per process and micro-batch, a multiple of G", paper=6, tiny=128, within="[1, inf)"
    )
    accumulation: int = option("micro-batches per update", paper=2, tiny=1, within="[1, inf)")
    mu: int = option("inner updates per rollout", paper=12, tiny=4, within="[1, inf)")
    gamma: float = option("truncation: the lowest mask ratio", within="[0, 1)")
    remask: str = option("re-masking scheme of remask.py", choices=remask.SCHEMES)
    managed_randomness: bool = option("one mask noise for a whole group instead of one per completion")
    ratio: str = option("ratio and KL per token, or per sequence on ell (Eq. 9, 10)", choices=("token", "sequence"))
    advantage: str = option("divide by the group's std (paper) or only subtract its mean (d1)", choices=("std", "mean"))
    beta: float = option("weight of the KL to the reference", 0.01)
    clip: float = option("PPO clip of the ratio", 0.2, within="(0, 1)")
    lr: float = option("AdamW learning rate, constant after warm-up", paper=3e-6, tiny=1.5e-4, within="(0, inf)")
    warmup: int = option("updates of linear warm-up", paper=100, tiny=20)
    weight_decay: float = option("AdamW weight decay", 0.0)
    max_grad_norm: float = option("gradient norm is clipped to this", paper=0.2, tiny=1.0, within="(0, inf)")
    # evaluation
    eval_n: int = option("held-out problems before and after, 0: all", paper=0, tiny=1000)
    eval_every: int = option("steps between looks at 256 validation problems, 0: never", paper=500, tiny=25)
    eval_batch_size: int = option(
        "completions per process and batch of evaluation", paper=32, tiny=256, within="[1, inf)"
    )
    pass_k: int = option("samples per problem for pass@k at --temperature, 0: greedy only", paper=0, tiny=8)


def require(rules: dict[str, object]) -> None:
    """Raise UsageError with the first message whose rule does not hold."""
    for message, holds in rules.items():
        if not holds:
            raise UsageError(message)


def check_ranges(cfg) -> None:
    """Raise UsageError for a number outside its range, for a tracker that is not installed, and for a task that runs
    code without --allow_code_execution."""
    for field in dataclasses.fields(cfg):
        value, within = getattr(cfg, field.name), field.metadata["within"]
        if field.type in (int, float) and value is not None and not inside(value, within):
            raise UsageError(f"--{field.name} {value} is outside {within}")
    trackers = [str(tracker) for tracker in get_available_trackers()]
    rules = {
        f"--log_with {cfg.log_with}: not installed; installed are {trackers}": cfg.log_with in (None, *trackers),
        rewards.CODE_REFUSED.format(cfg.task): cfg.allow_code_execution or not TASKS[cfg.task].runs_code,
    }
    require(rules)
    if cfg.allow_code_execution:
        rewards.allow_code_execution()


def check(cfg: Config) -> None:
    """Raise UsageError for a value out of range or a combination that makes no sense, naming its flag."""
    check_ranges(cfg)
    if cfg.rewards:
        rewards.parse_scorers(cfg.rewards)
    whole_groups = cfg.batch_size % cfg.group_size == 0
    generated = cfg.data == "generated" or (cfg.data is None and is_tiny(cfg.model))
    adapter, image = cfg.model is not None and resolve(cfg.model)[1], bool(TASKS[cfg.task].codebook)
    rules = {
        f"--lora {cfg.lora}: {adapter} is an adapter already, and trains as it is": not (cfg.lora and adapter),
        "--eval_data needs published problems; generated ones have their own": not (cfg.eval_data and generated),
        f"--batch_size {cfg.batch_size} is not a multiple of --group_size {cfg.group_size}": whole_groups,
        "--eval_only needs --model: a hub id, or a model, adapter or run directory": cfg.model or not cfg.eval_only,
        "--lora needs --model: the tiny default trains all its weights": cfg.model or not cfg.lora,
        "--sft_steps needs --model: the tiny default has its own ELBO training": cfg.model or not cfg.sft_steps,
        f"--sampler {cfg.sampler}: not for {'an image' if image else 'text'}, which --task {cfg.task} asks for": image
        == (cfg.sampler != "semi_autoregressive"),
        "--rewards scores images: --task t2i": image or not cfg.rewards,
    }
    require(rules)


def inside(value: float, interval: str) -> bool:
    """Whether a number lies in an interval like "[0, 1)"; nan lies in none."""
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    return above and (value <= high if interval[-1] == "]" else value < high)


# ---------------------------------------------------------------------------------------------
# Model: one interface to LLaDA, MMaDA, Dream, AutoModelForMaskedLM checkpoints and the tiny default
# ---------------------------------------------------------------------------------------------

# Names in a LLaDA or MMaDA checkpoint -> names in transformers' Llama; applied one after the other.
LLADA_KEYS = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    r"^model\.transformer\.blocks\.": "model.layers.",
    r"\.attn_norm\.": ".input_layernorm.",
    r"\.ff_norm\.": ".post_attention_layernorm.",
    r"\.q_proj\.": ".self_attn.q_proj.",
    r"\.k_proj\.": ".self_attn.k_proj.",
    r"\.v_proj\.": ".self_attn.v_proj.",
    r"\.attn_out\.": ".self_attn.o_proj.",
    r"\.ff_proj\.": ".mlp.gate_proj.",
    r"\.up_proj\.": ".mlp.up_proj.",
    r"\.ff_out\.": ".mlp.down_proj.",  # a block's; the top-level one is renamed above
}
# The tokens around an image. MMaDA's tokenizer does not spell its own: these are the ids it reserves for them.
IMAGE_MARKS = {"<|t2i|>": 126088, "<|soi|>": 126084, "<|eoi|>": 126085, "<|pad|>": 126093}
END_OF_TURN = ("<|eot_id|>", "<|im_end|>")  # what a chat model ends its turn with, where its vocabulary has it
BIDIRECTIONAL = dict(is_causal=False, use_cache=False)
TINY = dict(
    hidden_size=64,
    intermediate_size=176,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
    initializer_range=0.1,  # learns the first words faster than Llama's 0.02
    bos_token_id=None,
    pad_token_id=None,
    embedded_default=True,
)
# What a task changes in it: narrow, so that upo.py's rollouts are quick.
TINY_OF = {"sudoku": dict(hidden_size=48, intermediate_size=128, num_hidden_layers=5)}


def llada_config(raw: dict) -> LlamaConfig:
    """The Llama configuration of a LLaDA or MMaDA config.json. pad_token_id stays None: it would become the
    embedding's padding_idx, and LLaDA's pad is its EOS, whose embedding has to learn."""
    return LlamaConfig(
        vocab_size=raw.get("embedding_size") or raw["vocab_size"],
        hidden_size=raw["d_model"],
        intermediate_size=raw["mlp_hidden_size"],
        num_hidden_layers=raw["n_layers"],
        num_attention_heads=raw["n_heads"],
        num_key_value_heads=raw.get("n_kv_heads") or raw["n_heads"],
        max_position_embeddings=raw["max_sequence_length"],
        rms_norm_eps=raw["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": raw["rope_theta"]},
        tie_word_embeddings=raw.get("weight_tying", False),
        eos_token_id=raw.get("eos_token_id"),
        bos_token_id=None,
        pad_token_id=None,
        mask_token_id=raw.get("mask_token_id"),
        codebook_size=raw.get("codebook_size"),  # of MMaDA's images
        **BIDIRECTIONAL,
    )


def dream_config(raw: dict) -> Qwen2Config:
    """The Qwen2 configuration of a Dream config.json; `shifted_logits`: position i is predicted at i - 1."""
    kept = {
        k: v
        for k, v in raw.items()
        if k not in ("architectures", "auto_map", "model_type", "pad_token_id", "rope_theta", "rope_scaling")
    }
    rope = {"rope_type": "default", "rope_theta": raw.get("rope_theta", 10000.0)}
    return Qwen2Config(**kept | BIDIRECTIONAL | dict(rope_parameters=rope, pad_token_id=None, shifted_logits=True))


class MaskedDiffusionModel(nn.Module):
    """(x_t, attention, positions) -> logits at those positions, for every kind of base.

    hf: the transformers model (or its PEFT wrapper); mask_id, pad_id, end_id: int; eos_ids: every id that
    ends a completion. The vocabulary head runs at the positions asked for and nowhere else. Where the completion is
    an image (codebook > 0) it also runs for the image's codes alone, ids first_id ... first_id + codebook - 1, which
    follow the tokenizer's own.
    """

    def __init__(self, hf: nn.Module, tokenizer, image: bool = False):
        super().__init__()
        self.hf, self.tokenizer, config = hf, tokenizer, hf.config
        self.mask_id = getattr(config, "mask_token_id", None)
        if self.mask_id is None:
            self.mask_id = tokenizer.mask_token_id
        if self.mask_id is None:
            raise UsageError(
                f"{config.name_or_path}: no mask token; config.json needs mask_token_id, or the tokenizer a mask_token"
            )
        vocabulary = tokenizer.get_vocab()
        ends = [vocabulary[word] for word in END_OF_TURN if word in vocabulary]
        ends += [tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]
        self.end_id = next((i for i in ends if i is not None), None)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else self.end_id
        from_config = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        eos_ids = {self.end_id, self.pad_id, tokenizer.eos_token_id, *from_config} - {None, self.mask_id}
        if not eos_ids:
            raise UsageError(f"{config.name_or_path}: the tokenizer has no EOS token")
        self.eos_ids = sorted(eos_ids)
        self.shifted = getattr(config, "shifted_logits", False)
        forward = getattr(hf, "get_base_model", lambda: hf)().forward
        self.takes_positions = "position_ids" in inspect.signature(forward).parameters
        tables = [t for name, t in hf.named_modules() if name.endswith("position_embeddings")]
        starts = [t.padding_idx + 1 for t in tables if getattr(t, "padding_idx", None) is not None]
        self.first_position = max(starts, default=0)  # RoBERTa counts from its padding_idx + 1
        for module in hf.modules():  # the old, the new and the reference policy must be the same function
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        head = hf.get_output_embeddings()
        head.register_forward_pre_hook(lambda head, args: (args[0][self.read],))
        self.first_id, self.codebook = 0, 0
        if image:
            self.predict_codes(head)

    def predict_codes(self, head: nn.Module) -> None:
        """Narrow the vocabulary head to the image's codes; UsageError for a model that draws no images."""
        config, vocabulary = self.hf.config, self.tokenizer.get_vocab()
        self.first_id, self.codebook = len(self.tokenizer), getattr(config, "codebook_size", None) or 0
        self.marks = {word: vocabulary.get(word, i) for word, i in IMAGE_MARKS.items()}
        last = max(self.first_id + self.codebook - 1, *self.marks.values())
        if not self.codebook or last >= config.vocab_size:
            raise UsageError(
                f"{config.name_or_path or 'the model'}: draws no images: its config.json has codebook_size "
                f"{self.codebook or 'missing'}, its tokenizer {self.first_id} tokens, its embedding "
                f"{config.vocab_size}; --task t2i needs MMaDA or the tiny default"
            )
        self.pad_id = self.marks["<|pad|>"]
        codes = slice(self.first_id, self.first_id + self.codebook)
        head.forward = lambda h: nn.functional.linear(h, head.weight[codes])

    def forward(self, x: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        """x (B, L) long; attention (B, L) bool, False at padding; positions (B, L) bool with N True.
        Returns (N, V) float32, row-major, column 0 being token first_id; the mask token's logit is -inf: x0 never
        holds a mask."""
        # Dream reads the prediction of position i at i - 1; position 0 is a prompt's, so nothing wraps round
        self.read = positions.roll(-1, dims=1) if self.shifted else positions
        places = (
            {"position_ids": (attention.cumsum(1) - 1).clamp(min=0) + self.first_position}
            if self.takes_positions
            else {}
        )
        logits = self.hf(input_ids=x, attention_mask=attention.long(), **places).logits.float()
        if not self.codebook:
            logits[:, self.mask_id] = -torch.inf  # in place: (N, V) is the largest tensor of a step
        return logits


def native_class(path: str) -> tuple[type, dict]:
    """(transformers' own class for a checkpoint, keyword arguments of its from_pretrained); no remote code."""
    raw, _ = PreTrainedConfig.get_config_dict(path)
    kind = str(raw.get("model_type", "")).lower()
    if {"d_model", "mlp_hidden_size", "n_layers"} <= raw.keys():  # LLaDA, MMaDA
        return LlamaForCausalLM, {"config": llada_config(raw), "key_mapping": LLADA_KEYS}
    if kind == "dream":
        return Qwen2ForCausalLM, {"config": dream_config(raw)}
    if kind in ("llama", "qwen2"):  # saved by this project: is_causal=False and Dream's shift are in its config
        if raw.get("is_causal", True):
            raise UsageError(f"--model {path}: a causal {kind}; a masked diffusion model's config has is_causal: false")
        return (LlamaForCausalLM if kind == "llama" else Qwen2ForCausalLM), {}
    return transformers.AutoModelForMaskedLM, {"trust_remote_code": False}


def load_hf(path: str, dtype: torch.dtype) -> nn.Module:
    """A published or saved checkpoint, bidirectional; UsageError where weights are missing or do not fit."""
    try:
        family, options = native_class(path)
        model, info = family.from_pretrained(path, dtype=dtype, output_loading_info=True, **options)
    except UsageError:
        raise
    except Exception as error:  # what a broken checkpoint raises has no common class
        reason = f"config.json lacks {error}" if isinstance(error, KeyError) else first_line(error)
        raise UsageError(f"--model {path}: cannot be loaded: {reason}") from None
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    wrong = [f"{kind.replace('_', ' ')} {sorted(info[kind])[:3]} ..." for kind in kinds if info.get(kind)]
    if wrong:
        raise UsageError(f"--model {path}: its weights do not fit its config.json: {'; '.join(wrong)}")
    return model


def load_tokenizer(path: str):
    """The tokenizer of a checkpoint; Dream's own class is Qwen2's. Raises UsageError."""
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path)
        family = transformers.Qwen2Tokenizer if str(raw.get("model_type", "")).lower() == "dream" else AutoTokenizer
        return family.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise UsageError(f"--model {path}: its tokenizer cannot be loaded: {first_line(error)}") from None


def read_json(path: Path) -> dict:
    """A JSON object from a file; UsageError where it is none."""
    try:
        value = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def resolve(path: str) -> tuple[str, str | None]:
    """(base model, adapter or None) of a hub id, a model directory, an adapter directory or a run directory."""
    inner = Path(path) / "model"
    path = str(inner) if inner.is_dir() else path
    if not Path(path).is_dir() and (
        Path(path).exists() or path.startswith(("/", ".", "~", "runs/")) or path.count("/") > 1
    ):
        raise UsageError(f"--model {path}: not a directory, and not a hub id either (those read OWNER/NAME)")
    adapter = Path(path) / "adapter_config.json"
    if not adapter.is_file():
        return path, None
    base = read_json(adapter).get("base_model_name_or_path")
    if not base:
        raise UsageError(f"{adapter}: names no base_model_name_or_path")
    return base, path


def is_tiny(path: str | None) -> bool:
    """Whether a model is the embedded default, or was trained from it: then the tiny column of defaults applies."""
    if path is None or not Path(path).is_dir():
        return path is None
    config = Path(resolve(path)[0]) / "config.json"
    return config.is_file() and read_json(config).get("embedded_default", False)


def require_peft():
    """The module peft; UsageError with the pip command where it is not installed."""
    try:
        import peft
    except ImportError:
        raise UsageError("--lora and adapters need PEFT: pip install peft") from None
    return peft


def load_model(path: str, cfg: Config, trainable: bool) -> MaskedDiffusionModel:
    """A base model ready to run. Trained weights are float32 even with --bf16: a bf16 weight of 0.02 cannot
    take a step of 3e-6. Frozen ones are bf16 then; the matrix products are bf16 either way (autocast)."""
    base, adapter = resolve(path)
    if adapter is None and not Path(base).is_dir():  # a hub id may name an adapter too
        file = find_adapter_config_file(base)
        base, adapter = (read_json(Path(file))["base_model_name_or_path"], base) if file else (base, None)
    frozen = bool(cfg.lora) or adapter is not None or not trainable
    hf = load_hf(base, torch.bfloat16 if cfg.bf16 and frozen else torch.float32)
    if adapter is not None:
        peft = require_peft()
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*missing adapter keys")
                hf = peft.PeftModel.from_pretrained(hf, adapter, is_trainable=trainable)
        except Exception as error:  # an adapter of the remote-code LLaDA class has other module names
            raise UsageError(f"--model {adapter}: the adapter does not fit {base}: {first_line(error)[:200]}") from None
    elif cfg.lora and trainable:
        peft = require_peft()
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(cfg.seed)  # LoRA's initialisation; afterwards all is as before
            hf = peft.get_peft_model(
                hf, peft.LoraConfig(r=cfg.lora, lora_alpha=cfg.lora / 2, lora_dropout=0.0, target_modules="all-linear")
            )
    if not trainable:
        hf.requires_grad_(False)
    if trainable and cfg.gradient_checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    return MaskedDiffusionModel(hf, load_tokenizer(adapter or base), bool(TASKS[cfg.task].codebook))


def save_model(model: MaskedDiffusionModel, path: Path) -> None:
    """The model (or its adapter) and tokenizer in transformers' own format, under Llama's or Qwen2's own names."""
    model.hf.save_pretrained(path, save_original_format=False)
    model.tokenizer.save_pretrained(path)


def tiny_tokenizer(texts: list[str], marks: tuple[str, ...] = ()):
    """A tokenizer of words and whole numbers that spells `texts` without loss, with LLaDA's special tokens, and with
    `marks` as further ones."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    split = pre_tokenizers.Split(Regex(r" ?\d+| ?[^\s\d]+ ?|\s"), "isolated")
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    special = ["<|endoftext|>", "<|eot_id|>", "<|mdm_mask|>", "<|unknown|>", *marks]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<|unknown|>"))
    raw.pre_tokenizer, raw.decoder = split, decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token=special[0],
        pad_token=special[0],
        mask_token=special[2],
        unk_token=special[3],
        additional_special_tokens=[special[1], *marks],
    )
    # the question and a line break; instructions are for models that can read them
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"
    return tokenizer


def tiny_model(tokenizer, seed: int, task: str = "gsm8k") -> MaskedDiffusionModel:
    """The embedded default: the class that LLaDA is loaded into, 150k parameters, random weights from the seed."""
    names = {"eos_token_id": tokenizer.eos_token_id, "mask_token_id": tokenizer.mask_token_id}
    codes = TASKS[task].codebook
    sizes = TINY | TINY_OF.get(task, {}) | dict(vocab_size=len(tokenizer) + codes, codebook_size=codes)
    config = LlamaConfig(**sizes, **names, **BIDIRECTIONAL)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return MaskedDiffusionModel(LlamaForCausalLM(config), tokenizer, image=bool(codes))


# ---------------------------------------------------------------------------------------------
# Text <-> tensors
# ---------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """x: (B, L) long, prompts padded on the left, then gen_length columns; attention: (B, L) bool, False at
    padding; completion: (B, L) bool, what the model writes: all of these columns, or the blanks among them."""

    x: Tensor
    attention: Tensor
    completion: Tensor


def prompt_ids(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """The chat template's tokens up to where the model answers; plain lines for a tokenizer without a template."""
    if not tokenizer.chat_template:
        return tokenizer("".join(message["content"] + "\n" for message in messages))["input_ids"]
    try:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    except jinja2.TemplateError:  # some templates have no system role
        merged = [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]
        return tokenizer.apply_chat_template(merged, add_generation_prompt=True, return_dict=False)


def image_prompt(model: MaskedDiffusionModel, text: str) -> list[int]:
    """MMaDA's prompt of an image: t2i bos text eos, and the token that starts the image."""
    bos, eos = ([i] if i is not None else [] for i in (model.tokenizer.bos_token_id, model.tokenizer.eos_token_id))
    words = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    return [model.marks["<|t2i|>"], *bos, *words, *eos, model.marks["<|soi|>"]]


def prompt_of(model: MaskedDiffusionModel, task, problem: Problem) -> list[int]:
    """The ids in front of a problem's completion."""
    messages = task.messages(problem)
    return image_prompt(model, messages[-1]["content"]) if task.codebook else prompt_ids(model.tokenizer, messages)


def make_batch(model: MaskedDiffusionModel, prompts: list, starts: list, device, targets: list | None = None) -> Batch:
    """Prompts of any length beside starts of one length, which hold the mask token where the completion is open.

    All are lists of ids. With targets the completion is not open but filled in from them.
    """
    width = max(map(len, prompts))
    rows = [[model.pad_id] * (width - len(p)) + p + s for p, s in zip(prompts, starts, strict=True)]
    x = torch.tensor(rows, device=device)
    lengths = torch.tensor([[len(p)] for p in prompts], device=device)
    place = torch.arange(x.shape[1], device=device)
    completion = (x == model.mask_id) & (place >= width)
    if targets is not None:
        x[:, width:] = torch.tensor(targets, device=device)
    return Batch(x, place >= width - lengths, completion)


def texts_of(model: MaskedDiffusionModel, batch: Batch, completion: Tensor, gen_length: int) -> list[str]:
    """What stands in the last gen_length columns of batch.x, without special tokens and what lies behind the first
    EOS; completion (B, L) bool ends there. Where blanks were filled in, the text around them belongs to it. Of an
    image: its codes, with spaces between."""
    if model.codebook:
        return [" ".join(map(str, codes)) for codes in (batch.x[:, -gen_length:-1] - model.first_id).tolist()]
    kept = ~(batch.completion & ~completion)[:, -gen_length:]
    rows = [row[keep].tolist() for row, keep in zip(batch.x[:, -gen_length:], kept)]
    return model.tokenizer.batch_decode(rows, skip_special_tokens=True)


def start_of(model: MaskedDiffusionModel, task, problem: Problem, gen_length: int) -> list[int]:
    """The gen_length ids that a completion starts from: all masks, or the given text with masks in its blanks; an
    image's masks end with its end-of-image token."""
    if task.codebook:
        return [model.mask_id] * (gen_length - 1) + [model.marks["<|eoi|>"]]
    if task.blanks is None:
        return [model.mask_id] * gen_length
    target, blanks = task.target(problem), task.blanks(problem)
    spelled = model.tokenizer(target, add_special_tokens=False, return_offsets_mapping=True)
    open_at = [a for a, (b, t) in enumerate(zip(blanks, target, strict=True)) if b != t]  # characters
    ids = [
        model.mask_id if any(first <= a < behind for a in open_at) else token
        for token, (first, behind) in zip(spelled["input_ids"], spelled["offset_mapping"])
    ] + [model.end_id]
    if len(ids) > gen_length:
        raise UsageError(f"--gen_length {gen_length}: this task's completions have {len(ids)} tokens")
    return ids + [model.pad_id] * (gen_length - len(ids))


def ends_of(model: MaskedDiffusionModel, task) -> list[int]:
    """The ids that end a completion. Where blanks are filled in, or an image's codes, nothing does: all are wanted."""
    return [] if task.blanks or task.codebook else model.eos_ids


class Lesson(NamedTuple):
    """What ELBO training learns from: ids of prompts, of where completions start, and of the finished ones."""

    prompts: list[list[int]]
    starts: list[list[int]]
    targets: list[list[int]]


def encode_targets(model: MaskedDiffusionModel, task, problems: list[Problem], gen_length: int) -> Lesson:
    """The problems whose solutions, ended and padded with EOS as in LLaDA's SFT, fit into gen_length."""
    lesson = Lesson([], [], [])
    for problem in problems:
        if task.codebook:
            target = [model.first_id + int(code) for code in task.target(problem).split()] + [model.marks["<|eoi|>"]]
        else:
            target = model.tokenizer(task.target(problem), add_special_tokens=False)["input_ids"] + [model.end_id]
        if len(target) == gen_length or (len(target) < gen_length and not task.codebook):
            lesson.prompts.append(prompt_of(model, task, problem))
            lesson.starts.append(start_of(model, task, problem, gen_length))
            lesson.targets.append(target + [model.pad_id] * (gen_length - len(target)))
    return lesson


def shuffled(n: int, count: int, start: int, *key: int) -> list[int]:
    """Items start ... start + count of an endless series of shuffles of range(n), from a key; needs no state."""
    epochs = {
        epoch: torch.randperm(n, generator=seeded(*key, epoch))
        for epoch in range(start // n, (start + count - 1) // n + 1)
    }
    return [int(epochs[c // n][c % n]) for c in range(start, start + count)]


# ---------------------------------------------------------------------------------------------
# Likelihood: Eq. 2, and the terms of Eq. 9 and 10
# ---------------------------------------------------------------------------------------------


def token_log_probs(
    model: nn.Module,
    batch: Batch,
    hidden: Tensor,
    scored: Tensor,
    mask_id: int,
    temperature: float = 1.0,
    first_id: int = 0,
) -> Tensor:
    """log pi(x0^n | c, x_t) where scored (B, L) bool, else 0; (B, L) float32. x_t hides `hidden` (B, L) bool; first_id
    is the token that column 0 of the logits stands for."""
    x_t = batch.x.masked_fill(hidden, mask_id)
    logits = model(x_t, batch.attention, scored)  # (N, V)
    logits = logits if temperature == 1 else logits / temperature
    chosen = logits.gather(-1, batch.x[scored][:, None] - first_id)[:, 0]
    log_p = chosen - logits.logsumexp(-1)  # (N,), without a second (N, V) tensor
    return torch.zeros(batch.x.shape, device=log_p.device).masked_scatter(scored, log_p)


def sequence_ell(log_p: Tensor, t: Tensor) -> Tensor:
    """Eq. 2: ell = (1/t) sum_n log pi(x0^n | c, x_t) over scored positions; log_p (B, L), 0 elsewhere; t (B,)."""
    return log_p.sum(1) / t


def elbo_loss(model: nn.Module, batch: Batch, r: Tensor, u: Tensor, mask_id: int, first_id: int = 0) -> Tensor:
    """- E ell / |o|, the masked ELBO per token (Eq. 2). r (B,) mask ratios, u (B, L) noise."""
    masks = remask.uniform(batch.completion, r, u)
    log_p = token_log_probs(model, batch, masks.masked, masks.scored, mask_id, first_id=first_id)
    return -(sequence_ell(log_p, masks.t) / batch.completion.sum(1)).mean()


# ---------------------------------------------------------------------------------------------
# Advantages and the loss: pure functions of tensors
# ---------------------------------------------------------------------------------------------


def group_advantages(rewards: Tensor, group_size: int, convention: str) -> Tensor:
    """A = r - mean over the group, divided by the group's std ("std", the paper) or not ("mean", d1).

    rewards (B,) float, groups contiguous, B a multiple of G. A group without variance has A = 0 exactly.
    """
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if convention == "std":
        std = groups.std(1, keepdim=True)  # unbiased, as in most GRPO code
        centred = torch.where(std > 1e-6, centred / std.clamp(min=1e-6), 0.0)
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


class Loss(NamedTuple):
    """Scalars: the loss; the mean of D; the share of ratios outside the clip; the mean of |log rho|."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor
    log_ratio: Tensor


def policy_loss(log_p, old, ref, masks: Remask, advantages, lengths, *, ratio: str, clip: float, beta: float) -> Loss:
    """-(1/G) sum_i (A_i rho_i - beta D_i) / |o_i| of one inner update j, averaged over groups.

    log_p, old, ref (None without KL): (B, L) float32 token log-probabilities, 0 where not scored;
    advantages, lengths: (B,) float32, lengths = |o|. Raises ValueError where shapes disagree.
    """
    ref = log_p.detach() if ref is None else ref
    shapes = (log_p.shape, old.shape, ref.shape, masks.scored.shape, advantages.shape, lengths.shape)
    if shapes != (masks.scored.shape,) * 4 + (masks.t.shape,) * 2:
        raise ValueError(f"shapes disagree: log_p, old, ref, scored, A, |o| are {[tuple(shape) for shape in shapes]}")
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
        return Loss(loss, row_mean(kl), row_mean(outside), row_mean(log_rho.abs()))


# ---------------------------------------------------------------------------------------------
# The run: what every stage shares
# ---------------------------------------------------------------------------------------------

# First key of every seeded generator, so that no two uses share their noise.
DATA, ELBO, ROLLOUT, MASKS, EVALUATION = range(5)


class Run:
    """One process's share of a run: configuration, Accelerate, task, directory and clocks."""

    def __init__(self, cfg: Config, accelerator: Accelerator):
        self.cfg, self.accelerator, self.path = cfg, accelerator, Path(cfg.output_dir)
        self.task, self.device = TASKS[cfg.task], accelerator.device
        self.main, self.rank = accelerator.is_main_process, accelerator.process_index
        self.world = accelerator.num_processes
        self.seconds = dict.fromkeys(("base", "rollout", "update", "eval", "total"), 0.0)
        self.lap = time.perf_counter()
        self.signal = 0  # the SIGINT or SIGTERM that this process has received
        self.save: Callable[[], None] = lambda: None  # what has to be saved if the run is stopped now

    def say(self, text: str) -> None:
        """A line from the main process, above any progress bar."""
        if self.main:
            tqdm.write(text)
            sys.stdout.flush()

    def bar(self, total: int, label: str, **options) -> tqdm:
        """A progress bar with the time to completion, where someone is looking (a terminal)."""
        return tqdm(total=total, desc=label, disable=None if self.main else True, dynamic_ncols=True, **options)

    @contextlib.contextmanager
    def clock(self, name: str) -> Iterator[None]:
        """Add the block's wall-clock seconds to `seconds[name]`."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def stopwatch(self) -> dict[str, float]:
        """All seconds so far, those before a resume included."""
        now = time.perf_counter()
        self.seconds["total"] += now - self.lap
        self.lap = now
        return dict(self.seconds)

    def average(self, values: dict[str, float]) -> dict[str, float]:
        """Each value's mean over all processes, which all have to ask."""
        if self.world == 1:
            return values
        stacked = torch.tensor(list(values.values()), device=self.device)
        return dict(zip(values, self.accelerator.reduce(stacked, "mean").tolist()))

    @functools.cached_property
    def pixels(self) -> Callable[[Tensor], Tensor]:
        """Codes (B, L) long -> pixels (B, H, W, 3) uint8: the tiny model's own pictures, or MAGVIT-v2's decoder."""
        if is_tiny(self.cfg.model):
            return lambda codes: torch.stack([torch.from_numpy(self.task.render(row)) for row in codes.tolist()])
        return rewards.load_magvit(self.cfg.decoder, self.device).pixels

    @functools.cached_property
    def pixel_reward(self) -> rewards.PixelReward:
        """The reward of --rewards."""
        return rewards.PixelReward(self.pixels, self.cfg.rewards, self.device)

    def everyone(self, flag: bool) -> bool:
        """Whether the flag holds on all processes, which all have to ask."""
        return self.average({"flag": float(flag)})["flag"] == 1.0

    def on_signal(self, received: int, frame) -> None:
        """Note the signal; a second one ends the process at once."""
        self.signal = received
        signal.signal(received, signal.SIG_DFL)

    def leave_if_stopped(self) -> None:
        """Where a process has received SIGINT or SIGTERM: save, and exit all with the shell's code for a signal."""
        if not self.everyone(self.signal == 0):
            self.save()
            received = signal.Signals(self.signal or signal.SIGTERM)
            self.say(f"stopped by {received.name}; to go on: --resume --output_dir {self.path}")
            self.finish()
            sys.exit(128 + received)

    def finish(self) -> None:
        """End trackers and process group, together: a process that leaves early can hang the others."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()


def write_atomically(path: Path, text: str) -> None:
    """The whole file or the old one, whatever happens in between."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


# ---------------------------------------------------------------------------------------------
# Checkpoints: all of the state, replaced atomically
# ---------------------------------------------------------------------------------------------


def newest_slot(root: Path) -> Path | None:
    """The complete checkpoint of two slots, checkpoint/a and checkpoint/b; None before the first."""
    pointer = root / "checkpoint" / "newest"
    return pointer.with_name(pointer.read_text()) if pointer.is_file() else None


def save_checkpoint(run: Run, root: Path, progress: dict, held: dict | None = None) -> None:
    """Weights that train and optimiser (Accelerate), `progress` (JSON), and this process's `held` tensors.

    Written into the free slot; then `newest` names it, and only then the other goes. A process killed
    anywhere in here leaves a checkpoint that loads. Masks, noise and data order need no state: they are
    functions of (seed, step, j, row).
    """
    old = newest_slot(root)
    slot = root / "checkpoint" / ("b" if old is not None and old.name == "a" else "a")
    run.accelerator.wait_for_everyone()  # all have read `newest`
    if run.main:
        shutil.rmtree(slot, ignore_errors=True)
        slot.mkdir(parents=True)
    run.accelerator.wait_for_everyone()
    try:
        run.accelerator.save_state(str(slot))
        torch.save(held or {}, slot / f"held{run.rank}.pt")
    except (RuntimeError, SafetensorError) as error:  # what the two writers raise on a full disk
        raise OSError(f"{slot}: {str(error).splitlines()[0]}") from None
    run.accelerator.wait_for_everyone()
    if run.main:
        state = {"processes": run.world, "seconds": run.stopwatch()}
        write_atomically(slot / "progress.json", json.dumps(progress | state))
        write_atomically(root / "checkpoint" / "newest", slot.name)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    run.accelerator.wait_for_everyone()


def load_checkpoint(run: Run, root: Path) -> tuple[dict, dict] | None:
    """(progress, held) after restoring weights, optimiser and clocks; None where there is no checkpoint."""
    slot = newest_slot(root)
    if slot is None:
        return None
    progress = read_json(slot / "progress.json")
    if progress["processes"] != run.world:
        raise UsageError(f"--resume: {slot} was written by {progress['processes']} processes, this run has {run.world}")
    run.accelerator.load_state(str(slot), strict=False)
    run.seconds = progress.pop("seconds")
    return progress, torch.load(slot / f"held{run.rank}.pt", map_location="cpu")


def keep_trainable_only(models: list, weights: list, output_dir: str) -> None:
    """Accelerate's save hook: a LoRA checkpoint holds the adapter, not the 16 GB below it."""
    for i, model in enumerate(models[: len(weights)]):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        weights[i] = {name: value for name, value in weights[i].items() if name in trained}


# ---------------------------------------------------------------------------------------------
# Rollouts and evaluation
# ---------------------------------------------------------------------------------------------


def open_batch(run: Run, base: MaskedDiffusionModel, problems: list[Problem]) -> Batch:
    """Prompts and open completions of the problems, on the run's device."""
    prompts = [prompt_of(base, run.task, p) for p in problems]
    return make_batch(base, prompts, [start_of(base, run.task, p, run.cfg.gen_length) for p in problems], run.device)


def unprompted(base: MaskedDiffusionModel, batch: Batch, x: Tensor) -> tuple[Tensor, Tensor]:
    """(x, attention) for guidance: with its prompt masked, or, of an image, with the prompt of no text at all."""
    if not base.codebook:
        return x.masked_fill(batch.attention & ~batch.completion, base.mask_id), batch.attention
    width = int(batch.completion.long().argmax(1)[0])  # of prompt and padding
    empty = image_prompt(base, "")
    padding = width - len(empty)
    x, attention = x.clone(), batch.attention.clone()
    x[:, :width] = torch.tensor([base.pad_id] * padding + empty, device=x.device)
    attention[:, :width] = torch.arange(width, device=x.device) >= padding
    return x, attention


def roll_out(
    run: Run, model: nn.Module, base: MaskedDiffusionModel, problems, keys, temperature: float, tick=lambda: None,
    sampler: str | None = None,
):  # fmt: skip
    """One completion per problem: (Batch with the finished x, unmask_step (B, L) long, forwards).

    keys: B keys of the rows' noise; tick is called once per forward; sampler: cfg's, unless another is named. `model`
    is the wrapped model: every process makes the same number of forwards, so nothing is unwrapped.
    """
    cfg, batch = run.cfg, open_batch(run, base, problems)

    def predict(x: Tensor, positions: Tensor) -> Tensor:
        tick()
        return model(x, batch.attention, positions)

    def without_prompt(x: Tensor, positions: Tensor) -> Tensor:
        tick()
        return model(*unprompted(base, batch, x), positions)

    def everyone(finished: bool) -> bool:
        run.leave_if_stopped()  # a rollout of an 8B model takes longer than a scheduler's grace
        return run.everyone(finished)

    if base.codebook:
        options = dict(steps=cfg.steps, schedule=cfg.schedule, first_id=base.first_id)
    else:
        options = dict(block_length=cfg.block_length, tokens_per_step=cfg.tokens_per_step, eos_last=cfg.eos_last)
        options |= dict(eos_ids=ends_of(base, run.task), pad_id=base.pad_id)
    generator = [seeded(*key, device=run.device) for key in keys]
    options |= dict(temperature=temperature, generator=generator, everyone=everyone)
    denoise = guided(predict, without_prompt, cfg.guidance)
    done: Rollout = SAMPLERS[sampler or cfg.sampler](denoise, batch.x, batch.completion, **options)
    return batch._replace(x=done.x), done.unmask_step, done.forwards


def judge(run: Run, texts: list[str], problems: list[Problem], pixels: bool) -> list[tuple[dict[str, float], float]]:
    """(the terms of its reward, which is their sum; its score) of each completion. All processes have to ask.

    pixels: by --rewards. Images of a published model have no verifier: their score is their reward. Raises DataError
    on all processes if a scorer fails on one, when the run's state has been saved.
    """
    verdicts = [run.task.score(*pair) for pair in zip(texts, problems)]
    if not pixels:
        return [(run.task.reward(*pair), verdict) for pair, verdict in zip(zip(texts, problems), verdicts)]
    failed, terms = None, []
    try:
        if texts:
            codes = torch.tensor([[int(code) for code in text.split()] for text in texts])
            found = run.pixel_reward(codes, [p["question"] for p in problems])
            weights = run.pixel_reward.weights
            terms = [{name: weights[name] * found[name][i] for name in found} for i in range(len(texts))]
    except DataError as error:
        failed = str(error)
    if not run.everyone(failed is None):
        run.save()
        kept = f"; --resume --output_dir {run.path} goes on from here" if newest_slot(run.path) else ""
        raise DataError((failed or "a scorer failed on another process") + kept)
    tiny = is_tiny(run.cfg.model)
    return [(term, verdict if tiny else sum(term.values())) for term, verdict in zip(terms, verdicts)]


def evaluate(
    run: Run, model, base, problems: list[Problem], samples: int = 0, label="evaluation", base_training: bool = False
) -> list[dict]:
    """Completions of every problem, greedy, or `samples` of each at --temperature; the same on all processes. Images
    are never greedy: without noise one prompt has one image. While a base is trained they are drawn by emerge, so that
    every method starts from the same one, and the tiny model's are judged by its verifier alone.

    One dict per completion, in order: sample (None if it is the only one), score, the terms of its reward, prompt,
    completion, answer. A row's noise is keyed by its problem, so the result depends on no batch size.
    """
    todo = [(i, s) for i in range(len(problems)) for s in range(max(samples, 1))]
    size, mine, done = run.cfg.eval_batch_size, todo[run.rank :: run.world], []
    batches = -(-len(todo) // (run.world * size))  # the same number for every process
    model.eval()
    with run.clock("eval"), run.bar(batches, label, leave=False) as bar:
        for b in range(batches):
            part = mine[b * size : (b + 1) * size]
            rows = part or todo[:1]  # a process without a share still makes its forwards
            keys = [(run.cfg.seed, EVALUATION, i, s) for i, s in rows]
            temperature = run.cfg.temperature if samples or run.task.codebook else 0.0
            asked = [problems[i] for i, _ in rows]
            sampler = "emerge" if base_training and base.codebook else run.cfg.sampler
            batch, _, _ = roll_out(run, model, base, asked, keys, temperature, sampler=sampler)
            completion = through_eos(batch.x, batch.completion, ends_of(base, run.task))
            texts = texts_of(base, batch, completion, run.cfg.gen_length)
            texts = texts[: len(part)]
            pixels = bool(run.cfg.rewards) and not (base_training and is_tiny(run.cfg.model))
            judged = judge(run, texts, asked[: len(part)], pixels)
            done += [(i, s, text, *verdict) for (i, s), text, verdict in zip(part, texts, judged)]
            bar.update()
    return [
        {
            "sample": s if samples else None,
            "score": score,
            "terms": terms,
            "category": (run.task.category and run.task.category(problems[i])) or None,
            "prompt": problems[i]["question"],
            "completion": text,
            "answer": problems[i]["answer"],
        }
        for i, s, text, terms, score in sorted(gather_object(done) if run.world > 1 else done, key=lambda row: row[:2])
    ]


def validate(run: Run, model, base, problems: list[Problem], base_training: bool = False) -> float:
    """Accuracy on the validation problems."""
    rows = evaluate(run, model, base, problems, base_training=base_training)
    return rewards.accuracy([row["score"] for row in rows])["accuracy"]


# ---------------------------------------------------------------------------------------------
# The base model: ELBO training, from nothing (tiny) or from a published checkpoint (--sft_steps)
# ---------------------------------------------------------------------------------------------


def train_elbo(run: Run, base, train, validation, steps: int, target: float, root: Path) -> None:
    """Minimise Eq. 2 for `steps` steps, or until greedy validation accuracy reaches `target`.

    A fixed number of steps would give bases of very different strength from seed to seed. An interrupted
    training goes on from root/checkpoint.
    """
    cfg = run.cfg
    lesson = encode_targets(base, run.task, train, cfg.gen_length)
    run.say(
        f"ELBO training, at most {steps} steps, on {len(lesson.prompts)} solutions of up to {cfg.gen_length} tokens"
    )
    if not lesson.prompts:
        raise UsageError(f"--gen_length {cfg.gen_length}: none of the {len(train)} worked solutions fits")
    trained = [p for p in base.parameters() if p.requires_grad]
    run.accelerator.gradient_accumulation_steps = 1
    model, optimizer = run.accelerator.prepare(base, torch.optim.AdamW(trained, lr=cfg.sft_lr, betas=BETAS))
    start = (load_checkpoint(run, root) or ({"step": 0}, {}))[0]["step"]
    look = 200 if run.task.codebook else 50  # an image takes more forwards
    with run.bar(steps, "ELBO training, at most", initial=start) as bar:
        for step in range(start, steps + 1):
            run.save = functools.partial(save_checkpoint, run, root, {"step": step})
            run.leave_if_stopped()
            if step and (step % look == 0 or step == steps):
                accuracy = validate(run, model, base, validation, base_training=True)
                bar.set_postfix(validation=f"{accuracy:.3f}")
                if step % 200 == 0 or step == steps or accuracy >= target:
                    run.say(f"  step {step:>5}  validation accuracy {accuracy:.3f}")
                if accuracy >= target:
                    break
            if step < steps:
                elbo_step(run, model, base, optimizer, lesson, step)
                bar.update()
                if cfg.save_every and (step + 1) % (10 * cfg.save_every) == 0:
                    save_checkpoint(run, root, {"step": step + 1})
    run.save = lambda: None
    run.accelerator.free_memory()


def elbo_step(run: Run, model, base, optimizer, lesson: Lesson, step: int) -> None:
    """One step of ELBO training on this process's share of the batch."""
    cfg = run.cfg
    size = cfg.sft_batch_size
    chosen = shuffled(len(lesson.prompts), size, (step * run.world + run.rank) * size, cfg.seed, DATA, 0)
    prompts, starts, targets = ([rows[i] for i in chosen] for rows in lesson)
    noise = seeded(cfg.seed, ELBO, step, run.rank)
    if run.task.codebook:  # some images without a prompt: guidance needs to know what there is without one
        dropped = torch.rand(size, generator=noise) < cfg.prompt_dropout
        prompts = [image_prompt(base, "") if drop else ids for drop, ids in zip(dropped.tolist(), prompts)]
    batch = make_batch(base, prompts, starts, run.device, targets)
    # t is stratified over the batch, r_b = 1 - (b + u) / B: the same expectation at less variance
    r = 1 - (torch.arange(size) + torch.rand(1, generator=noise)) / size
    u = torch.rand(batch.x.shape, generator=noise)
    model.train()
    loss = elbo_loss(model, batch, r.to(run.device), u.to(run.device), base.mask_id, base.first_id)
    if not run.everyone(bool(loss.isfinite())):
        run.save()
        raise UsageError(
            f"ELBO training, step {step + 1}: the loss is not finite; the state before it is in {run.path}; "
            f"lower --sft_lr ({cfg.sft_lr:g})"
        )
    run.accelerator.backward(loss)
    run.accelerator.clip_grad_norm_(model.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = cfg.sft_lr * min(1.0, (step + 1) / 100)
    optimizer.step()
    optimizer.zero_grad()


def base_path(run: Run, train: list[Problem], validation: list[Problem]) -> tuple[str, bool]:
    """(the model that RL starts from and is held to, whether it was there already)."""
    cfg = run.cfg
    if cfg.model is not None and not cfg.sft_steps:
        return cfg.model, True
    root = cache = run.path / "sft"
    if cfg.model is None:
        names = "gen_length block_length tokens_per_step base_accuracy base_steps sft_lr sft_batch_size seed".split()
        names += "temperature guidance steps schedule prompt_dropout".split() if run.task.codebook else []
        settings = [run.world, train, TINY | TINY_OF.get(cfg.task, {}), [getattr(cfg, name) for name in names]]
        key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
        root, cache = run.path / "base", Path("runs") / f"base-{cfg.task}-s{cfg.seed}-{key}"
    if (cache / "seconds").is_file():
        run.seconds["base"] = float((cache / "seconds").read_text())
        run.say(f"base      {cache}, trained earlier")
        return str(cache), True
    run.say(f"base      training it, at most {cfg.sft_steps or cfg.base_steps} steps; it will be kept in {cache}")
    if cfg.model is None:
        completions = [run.task.target(p) for p in train] if not run.task.codebook else [""] * len(train)
        texts = [run.task.messages(p)[-1]["content"] + "\n" + text for p, text in zip(train, completions)]
        tokenizer = tiny_tokenizer(texts, tuple(IMAGE_MARKS) if run.task.codebook else ())
        base = tiny_model(tokenizer, cfg.seed, cfg.task).to(run.device)
    else:
        base = load_model(cfg.model, cfg, trainable=True).to(run.device)
    run.say("memory    " + memory_expected(cfg, base))
    start, target = time.perf_counter(), 2.0 if cfg.model else cfg.base_accuracy
    train_elbo(run, base, train, validation, cfg.sft_steps or cfg.base_steps, target, root)
    run.seconds |= {"base": run.seconds["base"] + time.perf_counter() - start, "eval": 0.0}
    if run.main:
        if cfg.lora:
            base.hf = base.hf.merge_and_unload()
        save_model(base, root / "model")
        shutil.rmtree(root / "checkpoint", ignore_errors=True)
        write_atomically(root / "seconds", f"{run.seconds['base']:.1f}")
        if root != cache and not cache.exists():
            cache.parent.mkdir(exist_ok=True)
            shutil.move(root, cache)  # only now: runs that start together do not meet in there
    run.accelerator.wait_for_everyone()
    return str(cache), False


# ---------------------------------------------------------------------------------------------
# MaskGRPO: rollout -> advantages -> mu updates on re-masked completions
# ---------------------------------------------------------------------------------------------


class Experience(NamedTuple):
    """One micro-batch of rollouts, kept for its mu updates.

    batch.completion spans all gen_length positions, `completion` (B, L) bool ends with the first EOS.
    unmask_step (B, L) long; groups (B,) long, each row's global group; advantages (B,) float32;
    old, ref: (mu, B, L) float32 token log-probabilities on the masks of update j (ref None if beta = 0).
    """

    batch: Batch
    completion: Tensor
    unmask_step: Tensor
    groups: Tensor
    advantages: Tensor
    old: Tensor | None = None
    ref: Tensor | None = None


def mask_noise(cfg: Config, e: Experience, step: int, j: int) -> tuple[Tensor, Tensor]:
    """Uniform noise of inner update j: u (B, L) for positions, u_ratio (B,) for ratios; float32, on the CPU.

    Keyed by (seed, step, j, group): the same for the old, the new and the reference policy, whichever process
    holds the group and however it is padded. With managed randomness a group's completions share it, so that
    they are compared on the same hidden positions; else each has its own.
    """
    u, u_ratio = torch.zeros(e.batch.x.shape), torch.zeros(len(e.batch.x))
    width, drawn = u.shape[1] - cfg.gen_length, {}
    for row, (group, prompt) in enumerate(zip(e.groups.tolist(), e.batch.attention[:, :width].sum(1).tolist())):
        key = (cfg.seed, MASKS, step, j, group, 0 if cfg.managed_randomness else 1 + row % cfg.group_size)
        if key not in drawn:
            noise = seeded(*key)
            drawn[key] = [torch.rand(n, generator=noise) for n in (cfg.gen_length, 1, prompt)]
        u[row, width:], u_ratio[row : row + 1], u[row, width - prompt : width] = drawn[key]
    return u, u_ratio


def remask_experience(cfg: Config, e: Experience, step: int, j: int) -> tuple[Remask, Tensor]:
    """(masks of inner update j, what x_t hides (B, L) bool): the tail behind EOS stays hidden, as in the rollout."""
    noise = mask_noise(cfg, e, step, 0 if cfg.remask in remask.ONE_RATIO else j)
    u, u_ratio = (v.to(e.completion.device) for v in noise)
    prompt = e.batch.attention & ~e.batch.completion
    masks = remask.by_name(cfg.remask, e.completion, prompt, e.unmask_step, u, u_ratio, j, cfg.mu, cfg.gamma)
    return masks, masks.masked | (e.batch.completion & ~e.completion)


def remasked_log_probs(cfg: Config, model, base, e: Experience, step: int, j: int) -> tuple[Tensor, Remask]:
    """Token log-probabilities (B, L) of the rollouts under `model` on the masks of update j, and the masks."""
    masks, hidden = remask_experience(cfg, e, step, j)
    log_p = token_log_probs(model, e.batch, hidden, masks.scored, base.mask_id, cfg.temperature, base.first_id)
    return log_p, masks


class Reference:
    """The policy before RL, as a context that yields a model: the base with LoRA off, or a frozen copy."""

    def __init__(self, run: Run, model: nn.Module, base: MaskedDiffusionModel, path: str):
        self.run, self.model, self.base, self.copy = run, model, base, None
        fresh_adapter = run.cfg.lora and resolve(path)[1] is None
        if run.cfg.beta and not fresh_adapter:  # an adapter that came with --model belongs to the reference
            self.copy = load_model(path, run.cfg, trainable=True).to(run.device).eval().requires_grad_(False)

    @contextlib.contextmanager
    def policy(self) -> Iterator[nn.Module]:
        """Without gradients, in the precision of the policy itself, so that equal weights give a KL of 0."""
        switched_off = contextlib.nullcontext() if self.copy is not None else self.base.hf.disable_adapter()
        with torch.no_grad(), self.run.accelerator.autocast(), switched_off:
            yield self.model if self.copy is None else self.copy


def collect(run: Run, model, base, reference: Reference, train, step: int, micro: int, tick) -> tuple[Experience, dict]:
    """One micro-batch: its experience, and the metrics of its rollout."""
    cfg, g = run.cfg, run.cfg.group_size
    per_batch = cfg.batch_size // g  # a group never straddles processes: advantages need no communication
    first = (micro * run.world + run.rank) * per_batch
    groups = range(first, first + per_batch)
    counter = step * per_batch * run.world * cfg.accumulation + first
    chosen = [train[i] for i in shuffled(len(train), per_batch, counter, cfg.seed, DATA, 1)]
    problems = [problem for problem in chosen for _ in range(g)]
    model.eval()
    with run.clock("rollout"):
        keys = [(cfg.seed, ROLLOUT, step, group, k) for group in groups for k in range(g)]
        batch, unmask_step, forwards = roll_out(run, model, base, problems, keys, cfg.temperature, tick)
        completion = through_eos(batch.x, batch.completion, ends_of(base, run.task))
        texts = texts_of(base, batch, completion, cfg.gen_length)
    terms = [terms for terms, _ in judge(run, texts, problems, bool(cfg.rewards))]
    reward = torch.tensor([sum(term.values()) for term in terms])
    advantages = group_advantages(reward, g, cfg.advantage).to(run.device)
    e = Experience(batch, completion, unmask_step, torch.tensor(groups).repeat_interleave(g), advantages)
    with run.clock("update"):
        at = lambda policy, j: remasked_log_probs(cfg, policy, base, e, step, j)[0]
        with torch.no_grad():  # update 1 starts from the old policy itself: only j = 2 ... mu are needed
            old = [torch.zeros_like(completion, dtype=torch.float32)] + [at(model, j) for j in range(2, cfg.mu + 1)]
        e = e._replace(old=torch.stack(old))
        if cfg.beta:
            with reference.policy() as policy:
                e = e._replace(ref=torch.stack([at(policy, j) for j in range(1, cfg.mu + 1)]))
    metrics = {"reward": reward.mean().item()}
    metrics |= {f"reward/{name}": sum(term[name] for term in terms) / len(terms) for name in terms[0]}
    metrics["zero_variance_groups"] = (reward.view(-1, g).std(1) < 1e-6).float().mean().item()
    metrics |= {"completion_tokens": completion.sum(1).float().mean().item(), "forwards": float(forwards)}
    return e, run.average(metrics)


def update(run: Run, model, base, optimizer, experience: list[Experience], step: int, j: int) -> dict | None:
    """Inner update j = 1 ... mu, one optimiser step over all micro-batches; None, undone, if the loss is not finite."""
    cfg, metrics = run.cfg, {}
    model.train()
    for e in experience:
        with run.accelerator.accumulate(model):
            log_p, masks = remasked_log_probs(cfg, model, base, e, step, j)
            old = log_p.detach() if j == 1 else e.old[j - 1]
            ref = e.ref[j - 1] if cfg.beta else None
            lengths = e.completion.sum(1).float()
            loss = policy_loss(
                log_p, old, ref, masks, e.advantages, lengths, ratio=cfg.ratio, clip=cfg.clip, beta=cfg.beta
            )
            run.accelerator.backward(loss.loss)  # divided by the number of micro-batches there
            for name, value in loss._asdict().items():
                metrics[name] = metrics.get(name, 0.0) + value.item() / len(experience)
            if run.accelerator.sync_gradients:
                metrics["grad_norm"] = float(run.accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm))
                metrics = run.average(metrics)
                if not math.isfinite(metrics["loss"] + metrics["grad_norm"]):
                    optimizer.zero_grad()
                    return None
                for group in optimizer.param_groups:
                    group["lr"] = cfg.lr * min(1.0, (step * cfg.mu + j) / max(cfg.warmup, 1))
            optimizer.step()
            optimizer.zero_grad()
    return metrics


def inner_updates(run: Run, model, base, optimizer, held: dict, progress: dict) -> dict:
    """Updates j = progress["j"] ... mu on the held experience; returns the progress, with their metrics added."""
    cfg = run.cfg
    with run.clock("update"), run.bar(cfg.mu, "  updates", leave=False, initial=progress["j"] - 1) as bar:
        for j in range(progress["j"], cfg.mu + 2):
            run.save = functools.partial(save_checkpoint, run, run.path, progress, pack(held))
            run.leave_if_stopped()
            if j > cfg.mu:
                break
            metrics = update(run, model, base, optimizer, held["experience"], progress["step"], j)
            if metrics is None:
                run.save()
                raise UsageError(
                    f"step {progress['step'] + 1}, inner update {j}: the loss or its gradient is not finite; "
                    f"the state before it is in {run.path}; go on with --resume and a lower --lr ({cfg.lr:g})"
                )
            progress = progress | {"j": j + 1, "updates": progress["updates"] + [metrics]}
            bar.update()
    return progress


def train_policy(run: Run, model, base, optimizer, reference, data: dict, progress: dict, held: dict) -> None:
    """The RL loop. progress: steps done, the j to do next, metrics of the step so far; held: its experience."""
    cfg, start, began = run.cfg, progress["step"], time.perf_counter()
    log = open_log(run, start)
    if not held:
        run.save = functools.partial(save_checkpoint, run, run.path, {"step": start, "j": 1})
    with run.bar(cfg.max_steps, "RL steps", initial=start) as bar:
        for step in range(start, cfg.max_steps):
            if not held:
                with run.bar(cfg.accumulation * forwards_of(cfg), "  rollouts, forwards", leave=False) as inner:
                    micros = range(cfg.accumulation)
                    got = [collect(run, model, base, reference, data["train"], step, m, inner.update) for m in micros]
                held = {"experience": [e for e, _ in got]}
                progress = {"step": step, "j": 1, "rollout": mean_of([metrics for _, metrics in got]), "updates": []}
            progress = inner_updates(run, model, base, optimizer, held, progress)
            line = progress["rollout"] | mean_of(progress["updates"])
            completions = (step + 1) * cfg.batch_size * cfg.accumulation * run.world
            line = {"step": step + 1, "completions": completions} | line
            if cfg.eval_every and ((step + 1) % cfg.eval_every == 0 or step + 1 == cfg.max_steps):
                line["validation_accuracy"] = validate(run, model, base, data["validation"])
                pace = (time.perf_counter() - began) / (step + 1 - start)
                run.say(progress_line(line, cfg.max_steps, pace))
            if run.main:
                with log.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            run.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step + 1)
            bar.update()
            bar.set_postfix(reward=f"{line['reward']:.2f}", kl=f"{line['kl']:.4f}")
            held, progress = {}, {"step": step + 1, "j": 1}
            run.save = functools.partial(save_checkpoint, run, run.path, progress)
            if step + 1 == cfg.max_steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
                run.save()
    run.save = lambda: None


def open_log(run: Run, steps: int) -> Path:
    """metrics.jsonl, cut back to its first `steps` lines: what is behind the checkpoint will be made again."""
    log = run.path / "metrics.jsonl"
    if run.main:
        lines = log.read_text().splitlines(keepends=True)[:steps] if log.is_file() else []
        write_atomically(log, "".join(lines))
    return log


def progress_line(line: dict, steps: int, pace: float) -> str:
    """What a person wants to know in between; pace in seconds per step, measured over this session."""
    return (
        f"  step {line['step']:>5}/{steps}  reward {line['reward']:.3f}  kl {line['kl']:.4f}  "
        f"validation {line['validation_accuracy']:.3f}  {pace:.2f} s/step, "
        f"{pace * (steps - line['step']) / 60:.1f} min left"
    )


def mean_of(rows: list[dict]) -> dict:
    """Key-wise means of dicts with the same keys."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def pack(held: dict) -> dict:
    """Experience as plain dicts of tensors, which torch.load reads without running code."""
    return {"experience": [e._replace(batch=e.batch._asdict())._asdict() for e in held["experience"]]}


def unpack(held: dict, device: torch.device) -> dict:
    """The inverse of `pack`, onto a device; {} stays {}."""
    place = lambda row: {name: v.to(device) if isinstance(v, Tensor) else v for name, v in row.items()}
    rows = [Experience(**place(row) | {"batch": Batch(**place(row["batch"]))}) for row in held.get("experience", [])]
    return {"experience": rows} if rows else {}


# ---------------------------------------------------------------------------------------------
# Setting up: flags, run directory, first lines
# ---------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(message + " (see --help)")  # one line, not a page of usage


# What may change when a run goes on; anything else would make it another run.
FREE_ON_RESUME = (
    "resume",
    "output_dir",
    "max_steps",
    "save_every",
    "log_with",
    "eval_batch_size",
    "lr",
    "max_grad_norm",
)


def parse(argv=None, kind: type = Config, about: str = __doc__, name: str = "maskgrpo", row="method", rows=METHODS):
    """(configuration, where each value comes from): default < the model's column < `rows` < task < flag.

    kind is the script's Config; its field `row` picks one of `rows`. With --resume: the saved run's
    configuration, which flags may repeat but not contradict.
    """
    fields = dataclasses.fields(kind)
    parser = Parser(description=about.splitlines()[0], allow_abbrev=False)
    for field in fields:
        meta, columns = field.metadata, "" if field.default is None else f" [{field.default}]"
        if meta["paper"] is not None or meta["tiny"] is not None:
            columns = f" [{meta['paper']} with --model, {meta['tiny']} without]"
        flag = dict(type=field.type, choices=meta["choices"])
        options = dict(action=argparse.BooleanOptionalAction) if field.type is bool else flag
        parser.add_argument(f"--{field.name}", default=None, help=meta["help"] + columns, **options)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    tiny = is_tiny(given.get("model"))
    values, source = {}, {}
    task, chosen = given.get("task", kind.task), given.get(row, getattr(kind, row))
    settings = {name: pair[tiny] for name, pair in TASK_SETTINGS.get(task, {}).items()}
    between = {row: rows[chosen] | (IMAGE_METHODS[chosen] if TASKS[task].codebook else {}), "task": settings}
    for field in fields:
        layers = {"default": field.default, "tiny" if tiny else "paper": field.metadata["tiny" if tiny else "paper"]}
        layers |= {origin: table.get(field.name) for origin, table in between.items()} | {"flag": given.get(field.name)}
        layers = {origin: value for origin, value in layers.items() if value is not None}
        source[field.name], values[field.name] = list(layers.items())[-1] if layers else ("default", None)
    cfg = kind(**values)
    model = "tiny" if cfg.model is None else Path(cfg.model.rstrip("/")).name
    mode = "-eval" if cfg.eval_only else ""
    cfg.output_dir = cfg.output_dir or f"runs/{name}-{cfg.task}-{getattr(cfg, row)}-{model}-s{cfg.seed}{mode}"
    if cfg.resume:
        cfg = resumed(cfg, given)
        source = {name: "flag" if name in given else "saved" for name in source}
    return cfg, source


def resumed(cfg, given: dict):
    """The configuration saved in cfg.output_dir, with what flags may change; UsageError where they contradict it."""
    file = Path(cfg.output_dir) / "config.json"
    if not file.is_file():
        raise UsageError(f"--resume: {cfg.output_dir} holds no run (no config.json); name one with --output_dir")
    saved = read_json(file)
    if saved.keys() != {field.name for field in dataclasses.fields(cfg)}:
        raise UsageError(f"--resume: {file} was written by another script, or another version of this one")
    for name, value in given.items():
        if name not in FREE_ON_RESUME and saved.get(name) != value:
            raise UsageError(f"--resume: --{name} {value} contradicts {file}, which has {saved.get(name)}")
    free = {name: given[name] for name in FREE_ON_RESUME if name in given}
    return type(cfg)(**saved | free | {"output_dir": cfg.output_dir})


def open_run(cfg: Config) -> None:
    """Make the run directory. An earlier run there is moved aside, never overwritten."""
    path = Path(cfg.output_dir)
    if not cfg.resume and (path / "config.json").exists():
        aside = (path.with_name(f"{path.name}.old{n}") for n in range(1, 10_000))
        path.rename(next(p for p in aside if not p.exists()))
    path.mkdir(parents=True, exist_ok=True)
    write_atomically(path / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1))


def load_splits(cfg: Config) -> dict[str, list[Problem]]:
    """train, validation, test and unseen problems; unseen is empty for published data."""
    if cfg.model:
        resolve(cfg.model)  # a mistyped path, before anything is downloaded
    if cfg.data == "generated" or (cfg.data is None and is_tiny(cfg.model)):
        return rewards.generated_splits(TASKS[cfg.task], cfg.eval_n or 1000, cfg.seed)
    splits = rewards.published_splits(TASKS[cfg.task], cfg.data, cfg.eval_data, cfg.eval_n)
    if TASKS[cfg.task].codebook and is_tiny(cfg.model):
        for problem in sum(splits.values(), []):
            rewards.scene_of(problem["question"])  # DataError for what the tiny model cannot read
    return splits


def forwards_of(cfg: Config) -> int:
    """Forwards of one rollout that no EOS cuts short."""
    whole, rest = divmod(cfg.gen_length, cfg.block_length)
    steps = whole * -(-cfg.block_length // cfg.tokens_per_step) + -(-rest // cfg.tokens_per_step)
    return (cfg.steps if TASKS[cfg.task].codebook else steps) * (2 if cfg.guidance else 1)


def decoding(cfg: Config) -> str:
    """The decoding settings that every accuracy depends on."""
    extra = (f", guidance {cfg.guidance:g}" if cfg.guidance else "") + (", EOS last" if cfg.eos_last else "")
    if TASKS[cfg.task].codebook:
        how = f"{cfg.sampler}, {cfg.schedule} schedule, temperature {cfg.temperature:g}{extra}"
        return f"{cfg.gen_length - 1} codes in {forwards_of(cfg)} forwards, {how}"
    most = "at most " if TASKS[cfg.task].blanks else ""  # what is given is not computed
    return f"{cfg.gen_length} tokens in {most}{forwards_of(cfg)} forwards, blocks of {cfg.block_length}{extra}"


def describe(run: Run, source: dict[str, str], data: dict) -> None:
    """The first lines: what runs, on what, and every value with where it comes from."""
    cfg = run.cfg
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    tiny = "the tiny default, trained here first on generated problems" if cfg.model is None else cfg.model
    sizes = ", ".join(f"{len(problems)} {split}" for split, problems in data.items() if problems)
    greedy = "" if run.task.codebook else f"; greedy for accuracy, temperature {cfg.temperature:g} in rollouts"
    run.say(f"MaskGRPO  task {cfg.task}, method {cfg.method}, seed {cfg.seed} -> {run.path}")
    run.say(f"model     {tiny}" + (f", LoRA rank {cfg.lora}" if cfg.lora else ""))
    run.say(f"data      {cfg.data or ('generated' if data['unseen'] else 'published')}: {sizes}")
    if run.task.runs_code:
        run.say(f"sandbox   {rewards.protections()}")
    run.say(f"decoding  {decoding(cfg)}{greedy}")
    run.say(f"device    {run.device}, {run.world} process{'es' * (run.world > 1)}{threads}")
    if run.world == 1 and "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        run.say(
            "note      `accelerate launch --cpu` starts one process whatever --num_processes; README.md says how two"
        )
    say_settings(run, source)


def say_settings(run: Run, source: dict[str, str]) -> None:
    """Every value of the configuration, by where it comes from."""
    cfg = run.cfg
    for origin in sorted(set(source.values()), key="flag method ref task paper tiny saved default".split().index):
        pairs = [f"{name}={getattr(cfg, name)}" for name in source if source[name] == origin]
        for i in range(0, len(pairs), 5):
            run.say(f"{origin if i == 0 else '':<9} " + " ".join(pairs[i : i + 5]))


def memory_expected(cfg: Config, base: MaskedDiffusionModel) -> str:
    """What a training step needs at least: weights, gradients and Adam's moments, the reference, logits."""
    everything = sum(p.numel() * p.element_size() for p in base.parameters())
    trained = sum(p.numel() for p in base.parameters() if p.requires_grad)
    copy = everything if cfg.beta and not cfg.lora else 0
    logits = 3 * 4 * cfg.batch_size * cfg.gen_length * base.hf.config.vocab_size  # float32, with their gradients
    total = (everything + 12 * trained + copy + logits) / 2**20
    size = f"{total / 1024:.1f} GiB" if total > 1024 else f"{total:.0f} MiB"
    share = f"{trained / 1e6:.2f}M of {sum(p.numel() for p in base.parameters()) / 1e6:.2f}M parameters train"
    return f"{share}; expect {size} and the activations of {cfg.batch_size} sequences"


# ---------------------------------------------------------------------------------------------
# Before, training, after
# ---------------------------------------------------------------------------------------------


def measure(run: Run, model, base, data: dict, phase: str) -> list[dict]:
    """Held-out completions of one phase: greedy ones of test and unseen, --pass_k sampled ones of test.

    Kept in completions_PHASE.jsonl; those before RL are read back when a run is resumed.
    """
    file = run.path / f"completions_{phase}.jsonl"
    if run.cfg.resume and phase == "before" and file.is_file():
        return [json.loads(line) for line in file.read_text().splitlines()]
    rows = []
    for split, samples in (("test", 0), ("unseen", 0), ("test", run.cfg.pass_k))[: 3 if run.cfg.pass_k else 2]:
        done = evaluate(run, model, base, data[split], samples, f"evaluation {phase}, {split}")
        rows += [{"split": split} | row for row in done]
    if run.main:
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def scores(rows: list[dict], split: str) -> list[float]:
    """The greedy scores of a split, one per problem."""
    return [row["score"] for row in rows if row["split"] == split and row["sample"] is None]


def summary(rows: list[dict], phase: str, k: int) -> dict:
    """The figures of one phase under their names in results.json; None where there is nothing to report."""
    sampled = [row["score"] for row in rows if row["sample"] is not None]
    groups = [sampled[i : i + k] for i in range(0, len(sampled), k)] if k else []
    of = {split: [r for r in rows if r["split"] == split and r["sample"] is None] for split in ("test", "unseen")}
    by_category = {}
    for row in of["test"]:
        by_category.setdefault(row["category"], []).append(row["score"])
    return {
        phase: rewards.accuracy(scores(rows, "test")),
        f"{phase}_unseen": rewards.accuracy(scores(rows, "unseen")) if of["unseen"] else None,
        f"{phase}_pass_at": {n: round(rewards.pass_at(groups, n), 6) for n in (1, 2, 4, 8, 16, 32) if n <= k} or None,
        f"{phase}_rewards": {split: mean_of([row["terms"] for row in part]) for split, part in of.items() if part},
        f"{phase}_categories": None
        if None in by_category
        else {c: rewards.accuracy(v) for c, v in by_category.items()},
    }


def report(run: Run, results: dict) -> None:
    """results.json, and the same as a small table under its decoding settings."""
    cfg, seconds = run.cfg, {name: round(value, 1) for name, value in run.stopwatch().items()}
    phases = [phase for phase in ("before", "after", "eval_only") if phase in results]
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    results = {"task": cfg.task, "method": cfg.method, "seed": cfg.seed} | results | {"decoding": decoding(cfg)}
    if run.device.type == "cuda":
        results["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    results |= {"seconds": seconds, "config": dataclasses.asdict(cfg), "versions": versions}
    if run.main:
        write_atomically(run.path / "results.json", json.dumps(results, indent=1))
    what = "accuracy" if run.task.codebook else "greedy accuracy"
    what = "mean reward" if cfg.rewards and not is_tiny(cfg.model) else what  # no verifier
    run.say(f"\n{what} ± standard error; {decoding(cfg)}")
    for split, suffix in (("test", ""), ("unseen", "_unseen")):
        figures = {phase: results[phase + suffix] for phase in phases}
        if all(figures.values()):
            cells = "   ".join(f"{p} {f['accuracy']:.3f} ± {f['stderr']:.3f}" for p, f in figures.items())
            paired = f"   paired p = {results['paired_p'][split]:.1e}" if "paired_p" in results else ""
            run.say(f"  {split:<7} {cells}{paired}   n = {figures[phases[0]]['n']}")
    for phase in phases:
        if results[f"{phase}_categories"]:
            cells = "  ".join(f"{c} {f['accuracy']:.3f}" for c, f in results[f"{phase}_categories"].items())
            run.say(f"  {phase:<7} {cells}")
        terms = "  ".join(f"{name} {value:.3f}" for name, value in results[f"{phase}_rewards"]["test"].items())
        run.say(f"  reward  {terms}   {phase}, test")
        if results[f"{phase}_pass_at"]:
            cells = "  ".join(f"@{k} {v:.3f}" for k, v in results[f"{phase}_pass_at"].items())
            run.say(f"  pass {cells}   {phase}, test, temperature {cfg.temperature:g}")
    run.say("seconds   " + "  ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    run.say(f"results   {run.path / 'results.json'}")


def draw_images(run: Run, before: list[dict], after: list[dict]) -> None:
    """images.png: the first test prompt of each category and two more, before and after RL, right ones framed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    test = [i for i, row in enumerate(before) if row["split"] == "test"]
    first = {before[i]["category"]: i for i in reversed(test)}
    chosen = sorted([*first.values(), *(i for i in test if i not in first.values())][:8])
    figure = Figure(figsize=(1.9 * len(chosen), 4.2))
    for axes, rows in zip(figure.subplots(2, len(chosen), squeeze=False), (before, after)):
        for ax, i in zip(axes, chosen):
            codes = torch.tensor([[int(code) for code in rows[i]["completion"].split()]])
            ax.imshow(run.pixels(codes)[0].cpu().numpy())
            ax.set(xticks=[], yticks=[])
            score = rows[i]["score"]
            verdict = {1.0: "right", 0.0: "wrong"}.get(score, f"{score:.2f}")
            ax.set_xlabel(f"{'before' if rows is before else 'after'}: {verdict}", fontsize=8)
            ax.spines[:].set(color={1.0: "tab:green", 0.0: "tab:red"}.get(score, "0.5"), linewidth=2)
            if rows is before:
                ax.set_title(textwrap.fill(rows[i]["prompt"], 24), fontsize=7)
    figure.savefig(run.path / "images.png", dpi=130, bbox_inches="tight")
    run.say(f"picture   {run.path / 'images.png'}")


def train_and_report(run: Run, path: str, cached: bool, data: dict) -> None:
    """Accuracy before, RL, accuracy after, on held-out problems; the trained model; results.json."""
    cfg = run.cfg
    run.accelerator.free_memory()  # of the base's own training
    base = load_model(path, cfg, trainable=True).to(run.device)
    run.say("memory    " + memory_expected(cfg, base))
    trained = [p for p in base.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, betas=BETAS, weight_decay=cfg.weight_decay)
    run.accelerator.gradient_accumulation_steps = cfg.accumulation
    model, optimizer = run.accelerator.prepare(base, optimizer)
    reference = Reference(run, model, base, path)
    progress, held = (load_checkpoint(run, run.path) if cfg.resume else None) or ({"step": 0, "j": 1}, {})
    if progress["step"] or held:
        run.say(f"resumed   after {progress['step']} steps and {progress['j'] - 1} inner updates")
    before = measure(run, model, base, data, "before")
    figures = rewards.accuracy(scores(before, "test"))
    run.say(f"before    accuracy {figures['accuracy']:.3f} on {figures['n']} test problems; {decoding(cfg)}")
    train_policy(run, model, base, optimizer, reference, data, progress, unpack(held, run.device))
    after = measure(run, model, base, data, "after")
    if run.main:
        save_model(base, run.path / "model")
    splits = [split for split in ("test", "unseen") if data[split]]
    paired = {split: rewards.paired_p(scores(before, split), scores(after, split)) for split in splits}
    figures = summary(before, "before", cfg.pass_k) | summary(after, "after", cfg.pass_k)
    report(run, figures | {"paired_p": paired, "base_cached": cached})
    if run.main and run.task.codebook:
        draw_images(run, before, after)


def main(argv: list[str] | None = None) -> None:
    """Parse, set up Accelerate and the run directory, then train or evaluate."""
    cfg, source = parse(argv)
    check(cfg)
    accelerator = Accelerator(
        mixed_precision="bf16" if cfg.bf16 else "no",
        log_with=cfg.log_with,
        project_dir=cfg.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # rotary tables, equal anyway
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UsageError(
            f"accelerate: {accelerator.distributed_type.value} is not supported; use MULTI_GPU (DDP) and --lora"
        )
    data = load_splits(cfg)
    if accelerator.is_main_process:
        open_run(cfg)
    accelerator.wait_for_everyone()
    run = Run(cfg, accelerator)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, run.on_signal)
    accelerator.register_save_state_pre_hook(keep_trainable_only)
    accelerator.init_trackers("maskgrpo", config={k: str(v) for k, v in dataclasses.asdict(cfg).items()})
    describe(run, source, data)
    if cfg.eval_only:
        base = load_model(cfg.model, cfg, trainable=False)
        run.say("memory    " + memory_expected(cfg, base))
        model = accelerator.prepare_model(base, evaluation_mode=True)
        report(run, summary(measure(run, model, base, data, "eval_only"), "eval_only", cfg.pass_k))
    else:
        path, cached = base_path(run, data["train"], data["validation"])
        train_and_report(run, path, cached, data)
    run.finish()


def cli(argv: list[str] | None = None, main: Callable = main, name: str = "maskgrpo.py") -> int:
    """main, with an exit code: 0 done, 2 something to change (one line says what); 128 + n leaves by signal n."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # load_hf checks by itself what the library warns of
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    try:
        main(argv)
    except (UsageError, DataError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
    except OSError as error:
        print(f"{name}: error: cannot write or read: {error}; checkpoints are intact", file=sys.stderr)
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(cli())
