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
 2. The default `--ratio token` is what the authors' code computes. `sequence` is Eq. 9 and 10 as
    printed; `sequence_mean` takes the exponent per token, which has the same gradient at rho = 1 and
    does not explode. README.md has the measurements.
 3. Tokens behind the first EOS do not count, and stay hidden in x_t, as they were in the rollout.
Departures from the authors' code
 4. Only masked completion tokens enter the loss; there the loss mask is not indexed by j.
 5. j is a loop index, so each rollout sees all mu masks whatever the gradient accumulation.
 6. Masks come from a generator keyed by (seed, step, j, group): the same for old, new and reference
    policy and for any number of processes. The global generator is never reseeded.
 7. Log-probabilities are taken at the rollout's temperature. The rollout also *selects* positions by
    confidence; like every method compared here, ell leaves that choice out.
 8. The reward asks for GSM8K's own `#### 42` (rewards.py), the masks' ramp is per row (remask.py).

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
import hashlib
import inspect
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from accelerate import Accelerator, DistributedDataParallelKwargs
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, Qwen2Config, Qwen2ForCausalLM

import remask
from emerge_sampler import Rollout, guided, semi_autoregressive, through_eos
from remask import Remask, inner_time, seeded
from rewards import TASKS, DataError, Problem


class UsageError(ValueError):
    """Something the caller has to change: one line that says what, where, and what would be right."""


# ---------------------------------------------------------------------------------------------
# Configuration: one field per flag. Two defaults where they follow the model.
# ---------------------------------------------------------------------------------------------


def option(help: str, default=None, *, paper=None, tiny=None, choices=None):
    """A field whose default is `default`, or `paper` with --model and `tiny` without."""
    return dataclasses.field(default=default, metadata=dict(help=help, paper=paper, tiny=tiny, choices=choices))


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
}
BETAS = (0.9, 0.99)  # AdamW: a shorter memory than 0.999 for the spikes of the 1/t weight
REMASKS = ("fading_out", "uniform", "full", "whole_range", "trace")


@dataclasses.dataclass
class Config:
    """Every setting of a run. Published checkpoints default to the paper's values, the tiny model to its own."""

    # what runs
    task: str = option("task, a row of rewards.TASKS", "gsm8k", choices=tuple(TASKS))
    method: str = option("a row of METHODS", "maskgrpo", choices=tuple(METHODS))
    model: str = option("hub id or path of a masked diffusion model, an adapter or a run directory; default: tiny, trained here")
    data: str = option('training problems: FILE.jsonl, or "generated"; default: generated for tiny, else the published data')
    eval_data: str = option("held-out problems, FILE.jsonl; default: every tenth problem of --data, or the published test split")
    seed: int = option("seed of everything random", 0)
    output_dir: str = option("run directory; default runs/maskgrpo-TASK-METHOD-MODEL-sSEED")
    max_steps: int = option("RL steps (rollouts); the paper's run has 6000", paper=6000, tiny=200)
    resume: bool = option("go on from the last checkpoint in --output_dir", False)
    eval_only: bool = option("evaluate --model and leave", False)
    log_with: str = option("a tracker of Accelerate's: tensorboard, wandb, ...")
    save_every: int = option("steps between checkpoints, 0: only when stopped", paper=100, tiny=25)
    # base model
    lora: int = option("LoRA rank (alpha = rank / 2), 0: train all weights; the paper has 128", 0)
    bf16: bool = option("frozen weights and matrix products in bfloat16", paper=torch.cuda.is_available(), tiny=False)
    gradient_checkpointing: bool = option("recompute activations to save memory", paper=True, tiny=False)
    base_accuracy: float = option("tiny: training ends at this validation accuracy, in (0, 1]", 0.4)
    base_steps: int = option("tiny: training ends after this many steps at the latest", 4000)
    sft_steps: int = option("steps of supervised ELBO training before RL (SFT + MaskGRPO)", 0)
    sft_batch_size: int = option("sequences per process and step of ELBO training", paper=8, tiny=64)
    sft_lr: float = option("AdamW learning rate of ELBO training", paper=1e-5, tiny=3e-3)
    # rollout (emerge_sampler.py)
    gen_length: int = option("completion length, tokens", paper=256, tiny=16)
    block_length: int = option("tokens per semi-autoregressive block", paper=16, tiny=4)
    tokens_per_step: int = option("tokens revealed per step; the paper has 256 tokens in 128 steps", paper=2, tiny=4)
    temperature: float = option("rollout temperature, also of the log-probabilities", paper=0.9, tiny=1.0)
    guidance: float = option("classifier-free guidance, 0: none", 0.0)
    eos_last: bool = option("EOS waits until the rest of its block is filled", False)
    # GRPO
    group_size: int = option("G, completions per prompt", paper=6, tiny=8)
    batch_size: int = option("completions per process and micro-batch, a multiple of G", paper=6, tiny=128)
    accumulation: int = option("micro-batches per update", paper=2, tiny=1)
    mu: int = option("inner updates per rollout", paper=12, tiny=4)
    gamma: float = option("truncation: the lowest mask ratio, in [0, 1)")
    remask: str = option("re-masking scheme of remask.py", choices=REMASKS)
    managed_randomness: bool = option("one mask noise for a whole group instead of one per completion")
    ratio: str = option("importance ratio on single tokens, on ell (Eq. 9), or on ell / |o|", choices=("token", "sequence", "sequence_mean"))
    advantage: str = option("divide by the group's std (paper) or only subtract its mean (d1)", choices=("std", "mean"))
    beta: float = option("weight of the KL to the reference", 0.01)
    clip: float = option("PPO clip of the ratio", 0.2)
    lr: float = option("AdamW learning rate, constant after warm-up", paper=3e-6, tiny=3e-4)
    warmup: int = option("updates of linear warm-up", paper=100, tiny=20)
    weight_decay: float = option("AdamW weight decay", 0.0)
    max_grad_norm: float = option("gradient norm is clipped to this", paper=0.2, tiny=1.0)
    # evaluation
    eval_n: int = option("held-out problems before and after, 0: all", paper=0, tiny=1000)
    eval_every: int = option("steps between looks at 256 validation problems, 0: never", paper=500, tiny=25)
    eval_batch_size: int = option("completions per process and batch of evaluation", paper=32, tiny=256)
    pass_k: int = option("samples per problem for pass@k at --temperature, 0: greedy only", paper=0, tiny=8)


def check(cfg: Config) -> None:
    """Raise UsageError for a value out of range, naming its flag."""
    rules = [
        (cfg.group_size >= 2, f"--group_size {cfg.group_size}: a group of one has no advantage; give 2 or more"),
        (cfg.batch_size > 0 and cfg.batch_size % max(cfg.group_size, 1) == 0, f"--batch_size {cfg.batch_size} is not a positive multiple of --group_size {cfg.group_size}"),
        (0 <= cfg.gamma < 1, f"--gamma {cfg.gamma} is outside [0, 1)"),
        (0 < cfg.temperature <= 10, f"--temperature {cfg.temperature} is outside (0, 10]; a group drawn at 0 would be G copies"),
        (0 < cfg.base_accuracy <= 1, f"--base_accuracy {cfg.base_accuracy} is outside (0, 1]"),
        (0 < cfg.clip < 1, f"--clip {cfg.clip} is outside (0, 1)"),
        (not (cfg.lora and cfg.model is None), "--lora needs --model: the tiny default trains all its weights"),
        (not (cfg.sft_steps and cfg.model is None), "--sft_steps needs --model: the tiny default is trained by the ELBO already"),
        (cfg.seed >= 0 and cfg.seed < 2**32, f"--seed {cfg.seed} is outside 0..2^32-1"),
    ]
    positive = ("gen_length", "block_length", "tokens_per_step", "accumulation", "mu", "base_steps", "sft_batch_size", "eval_batch_size", "lr", "sft_lr", "max_grad_norm")
    rules += [(getattr(cfg, name) > 0, f"--{name} {getattr(cfg, name)} must be above 0") for name in positive]
    natural = ("max_steps", "save_every", "lora", "sft_steps", "warmup", "weight_decay", "eval_n", "eval_every", "pass_k", "beta", "guidance")
    rules += [(getattr(cfg, name) >= 0, f"--{name} {getattr(cfg, name)} must not be negative") for name in natural]
    for holds, message in rules:
        if not holds:
            raise UsageError(message)


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
    r"(layers\.\d+)\.([qkv]_proj)\.": r"\1.self_attn.\2.",
    r"\.attn_out\.": ".self_attn.o_proj.",
    r"\.ff_proj\.": ".mlp.gate_proj.",
    r"\.up_proj\.": ".mlp.up_proj.",
    r"(layers\.\d+)\.ff_out\.": r"\1.mlp.down_proj.",
}
END_OF_TURN = ("<|eot_id|>", "<|im_end|>")  # what a chat model ends its turn with, where its vocabulary has it
BIDIRECTIONAL = dict(is_causal=False, use_cache=False)


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
        **BIDIRECTIONAL,
    )


def dream_config(raw: dict) -> Qwen2Config:
    """The Qwen2 configuration of a Dream config.json; `shifted_logits` records that position i is predicted at i - 1."""
    kept = {k: v for k, v in raw.items() if k not in ("architectures", "auto_map", "model_type", "pad_token_id", "rope_theta", "rope_scaling")}
    rope = {"rope_type": "default", "rope_theta": raw.get("rope_theta", 10000.0)}
    return Qwen2Config(**kept | BIDIRECTIONAL | dict(rope_parameters=rope, pad_token_id=None, shifted_logits=True))


class MaskedDiffusionModel(nn.Module):
    """log-probability factory: (x_t, attention, positions) -> logits at those positions, for every kind of base.

    hf: the transformers model (or its PEFT wrapper); mask_id, pad_id, end_id: int; eos_ids: every id that
    ends a completion. The vocabulary head runs at the positions asked for and nowhere else.
    """

    def __init__(self, hf: nn.Module, tokenizer):
        super().__init__()
        self.hf, self.tokenizer, config = hf, tokenizer, hf.config
        self.mask_id = getattr(config, "mask_token_id", None)
        if self.mask_id is None:
            self.mask_id = tokenizer.mask_token_id
        if self.mask_id is None:
            raise UsageError(f"{config.name_or_path}: no mask token; config.json needs mask_token_id, or the tokenizer a mask_token")
        vocabulary = tokenizer.get_vocab()
        self.end_id = next((vocabulary[word] for word in END_OF_TURN if word in vocabulary), tokenizer.eos_token_id)
        self.pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        from_config = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        eos_ids = {self.end_id, self.pad_id, tokenizer.eos_token_id, *from_config} - {None, self.mask_id}
        if not eos_ids:
            raise UsageError(f"{config.name_or_path}: the tokenizer has no EOS token")
        self.eos_ids = sorted(eos_ids)
        self.pad_id = self.pad_id if self.pad_id is not None else self.eos_ids[0]
        self.shifted = getattr(config, "shifted_logits", False)
        self.takes_positions = "position_ids" in inspect.signature(getattr(hf, "get_base_model", lambda: hf)().forward).parameters
        for module in hf.modules():  # the old, the new and the reference policy must be the same function
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
        hf.get_output_embeddings().register_forward_pre_hook(lambda head, args: (args[0][self.read],))

    def forward(self, x: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        """x (B, L) long; attention (B, L) bool, False at padding; positions (B, L) bool with N True.
        Returns (N, V) float32, row-major; the mask token's logit is -inf: x0 never holds a mask."""
        # Dream reads the prediction of position i at i - 1; position 0 is a prompt's, so nothing wraps round
        self.read = positions.roll(-1, dims=1) if self.shifted else positions
        places = {"position_ids": (attention.cumsum(1) - 1).clamp(min=0)} if self.takes_positions else {}
        logits = self.hf(input_ids=x, attention_mask=attention.long(), **places).logits.float()
        hide = torch.arange(logits.shape[-1], device=x.device) == self.mask_id
        return logits.masked_fill(hide, -torch.inf)


def load_hf(path: str, dtype: torch.dtype) -> nn.Module:
    """A published or saved checkpoint in transformers' own classes, bidirectional; no remote code.

    Raises UsageError where weights are missing, unexpected or unreadable.
    """
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path)
        kind = str(raw.get("model_type", "")).lower()
        options = dict(dtype=dtype, output_loading_info=True)
        if {"d_model", "mlp_hidden_size", "n_layers"} <= raw.keys():  # LLaDA, MMaDA
            model, info = LlamaForCausalLM.from_pretrained(path, config=llada_config(raw), key_mapping=LLADA_KEYS, **options)
        elif kind == "dream":
            model, info = Qwen2ForCausalLM.from_pretrained(path, config=dream_config(raw), **options)
        elif kind in ("llama", "qwen2"):  # saved by this project: is_causal=False and the shift are in its config
            family = LlamaForCausalLM if kind == "llama" else Qwen2ForCausalLM
            if raw.get("is_causal", True):
                raise UsageError(f"{path}: a causal {kind} model; a masked diffusion model has is_causal: false in config.json")
            model, info = family.from_pretrained(path, **options)
        else:
            model, info = transformers.AutoModelForMaskedLM.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if isinstance(error, UsageError):
            raise
        reason = f"config.json lacks {error}" if isinstance(error, KeyError) else str(error).strip().splitlines()[0]
        raise UsageError(f"--model {path}: cannot be loaded: {reason}") from None
    wrong = {name: sorted(info[name])[:3] for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info.get(name)}
    if wrong:
        raise UsageError(f"--model {path}: its weights do not fit its config.json: " + "; ".join(f"{k.replace('_', ' ')} {v} ..." for k, v in wrong.items()))
    return model


def load_tokenizer(path: str):
    """The tokenizer of a checkpoint; Dream's own class is Qwen2's. Raises UsageError."""
    try:
        raw, _ = PreTrainedConfig.get_config_dict(path)
        family = transformers.Qwen2Tokenizer if str(raw.get("model_type", "")).lower() == "dream" else AutoTokenizer
        return family.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UsageError(f"--model {path}: its tokenizer cannot be loaded: {str(error).strip().splitlines()[0]}") from None


def resolve(path: str) -> tuple[str, str | None]:
    """(base model, adapter or None) of a hub id, a model directory, an adapter directory or a run directory."""
    inner = Path(path) / "model"
    path = str(inner) if inner.is_dir() else path
    if Path(path).exists() and not Path(path).is_dir():
        raise UsageError(f"--model {path}: a file; expected a directory or a hub id")
    adapter = Path(path) / "adapter_config.json"
    if adapter.is_file():
        return json.loads(adapter.read_text())["base_model_name_or_path"], path
    return path, None


def is_tiny(path: str | None) -> bool:
    """Whether a model is the embedded default, or was trained from it: then the tiny column of defaults applies."""
    if path is None or not Path(path).is_dir():
        return path is None
    config = Path(resolve(path)[0]) / "config.json"
    return config.is_file() and json.loads(config.read_text()).get("embedded_default", False)


def require_peft():
    try:
        import peft
    except ImportError:
        raise UsageError("--lora and adapters need PEFT: pip install peft") from None
    return peft


def load_model(path: str, cfg: Config, trainable: bool) -> MaskedDiffusionModel:
    """A base model ready to run. Trained weights are float32 even with --bf16: a bf16 weight of 0.02 cannot
    take a step of 3e-6. Frozen ones are bf16 then; the matrix products are bf16 either way (autocast)."""
    base, adapter = resolve(path)
    frozen = bool(cfg.lora) or adapter is not None or not trainable
    hf = load_hf(base, torch.bfloat16 if cfg.bf16 and frozen else torch.float32)
    if adapter is not None:
        peft = require_peft()
        hf = peft.PeftModel.from_pretrained(hf, adapter, is_trainable=trainable)
    elif cfg.lora and trainable:
        peft = require_peft()
        with torch.random.fork_rng():
            torch.manual_seed(cfg.seed)  # LoRA's initialisation; outside this block nothing changes
            hf = peft.get_peft_model(hf, peft.LoraConfig(r=cfg.lora, lora_alpha=cfg.lora / 2, lora_dropout=0.0, target_modules="all-linear"))
    if not trainable:
        hf.requires_grad_(False)
    if trainable and cfg.gradient_checkpointing:
        hf.gradient_checkpointing_enable({"use_reentrant": False})
    return MaskedDiffusionModel(hf, load_tokenizer(adapter or base))


def save_model(model: MaskedDiffusionModel, path: Path) -> None:
    """The model (or its adapter) and tokenizer in transformers' own format, under Llama's or Qwen2's own names."""
    model.hf.save_pretrained(path, save_original_format=False)
    model.tokenizer.save_pretrained(path)


def tiny_tokenizer(texts: list[str]):
    """A tokenizer of words and whole numbers that spells `texts` without loss, with LLaDA's special tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    split = pre_tokenizers.Split(Regex(r"\d+| ?[^\s\d]+ ?|\s"), "isolated")
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    special = ["<|endoftext|>", "<|eot_id|>", "<|mdm_mask|>", "<|unknown|>"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + words)}, unk_token="<|unknown|>"))
    raw.pre_tokenizer, raw.decoder = split, decoders.Fuse()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token=special[0], pad_token=special[0], mask_token=special[2], unk_token=special[3], additional_special_tokens=[special[1]]
    )
    # the question and a line break; instructions are for models that can read them
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}\n{% endfor %}"
    return tokenizer


def tiny_model(tokenizer, seed: int) -> MaskedDiffusionModel:
    """The embedded default: the class that LLaDA is loaded into, 167k parameters, random weights from the seed."""
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        max_position_embeddings=128, bos_token_id=None, pad_token_id=None, eos_token_id=tokenizer.eos_token_id, mask_token_id=tokenizer.mask_token_id,
        initializer_range=0.1, embedded_default=True, **BIDIRECTIONAL,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MaskedDiffusionModel(LlamaForCausalLM(config), tokenizer)


# ---------------------------------------------------------------------------------------------
# Text <-> tensors
# ---------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """x: (B, L) long, prompts padded on the left, then gen_length completion tokens; attention: (B, L) bool,
    False at padding; completion: (B, L) bool."""

    x: Tensor
    attention: Tensor
    completion: Tensor


def prompt_ids(tokenizer, messages: list[dict[str, str]]) -> list[int]:
    """The chat template's tokens up to where the model answers; plain lines for a tokenizer without a template."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    return tokenizer("".join(message["content"] + "\n" for message in messages))["input_ids"]


def make_batch(model: MaskedDiffusionModel, prompts: list[list[int]], completions: list[list[int]], device) -> Batch:
    """Prompts of any length beside completions of one length; masks for completions yield a rollout's start."""
    width = max(map(len, prompts))
    x = torch.tensor([[model.pad_id] * (width - len(p)) + p + c for p, c in zip(prompts, completions, strict=True)], device=device)
    lengths = torch.tensor([[len(p)] for p in prompts], device=device)
    place = torch.arange(x.shape[1], device=device)
    return Batch(x, place >= width - lengths, (place >= width).expand(x.shape))


def texts_of(tokenizer, x: Tensor, completion: Tensor) -> list[str]:
    """The completions of x (B, L) as text, without special tokens."""
    return tokenizer.batch_decode([row[keep].tolist() for row, keep in zip(x, completion)], skip_special_tokens=True)


def encode_targets(model: MaskedDiffusionModel, task, problems: list[Problem], gen_length: int) -> tuple[list, list]:
    """Prompts and completions (ended, padded with EOS to gen_length as in LLaDA's SFT) of the problems that fit."""
    prompts, completions = [], []
    for problem in problems:
        target = model.tokenizer(task.target(problem), add_special_tokens=False)["input_ids"] + [model.end_id]
        if len(target) <= gen_length:
            prompts.append(prompt_ids(model.tokenizer, task.messages(problem)))
            completions.append(target + [model.pad_id] * (gen_length - len(target)))
    return prompts, completions


def shuffled(n: int, count: int, start: int, *key: int) -> list[int]:
    """Items start ... start + count of an endless series of shuffles of range(n), from a key; needs no state."""
    epochs = {epoch: torch.randperm(n, generator=seeded(*key, epoch)) for epoch in range(start // n, (start + count - 1) // n + 1)}
    return [int(epochs[c // n][c % n]) for c in range(start, start + count)]


# ---------------------------------------------------------------------------------------------
# Likelihood: Eq. 2, and the terms of Eq. 9 and 10
# ---------------------------------------------------------------------------------------------


def token_log_probs(model: nn.Module, batch: Batch, hidden: Tensor, scored: Tensor, mask_id: int, temperature: float = 1.0) -> Tensor:
    """log pi(x0^n | c, x_t) where scored (B, L) bool, else 0; (B, L) float32. x_t hides `hidden` (B, L) bool."""
    x_t = batch.x.masked_fill(hidden, mask_id)
    logits = model(x_t, batch.attention, scored) / temperature  # (N, V)
    chosen = logits.gather(-1, batch.x[scored][:, None])[:, 0]
    log_p = chosen - logits.logsumexp(-1)  # (N,), without a second (N, V) tensor
    return torch.zeros(batch.x.shape, device=log_p.device).masked_scatter(scored, log_p)


def sequence_ell(log_p: Tensor, t: Tensor) -> Tensor:
    """ell = (1/t) sum_n log pi(x0^n | c, x_t) over the scored positions (Eq. 2); log_p (B, L) is 0 elsewhere, t (B,)."""
    return log_p.sum(1) / t


def elbo_loss(model: nn.Module, batch: Batch, r: Tensor, u: Tensor, mask_id: int) -> Tensor:
    """- E ell / |o|, the masked ELBO per token (Eq. 2). r (B,) mask ratios, u (B, L) noise."""
    masks = remask.uniform(batch.completion, r, u)
    log_p = token_log_probs(model, batch, masks.masked, masks.scored, mask_id)
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


def surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's pessimistic min(rho A, clip(rho, 1 - clip, 1 + clip) A), elementwise; rho = exp(log_ratio)."""
    rho = log_ratio.clamp(max=20).exp()  # e^20 is far outside the clip; more would overflow
    return torch.minimum(rho * advantage, rho.clamp(1 - clip, 1 + clip) * advantage)


def kl_estimate(log_ref_ratio: Tensor) -> Tensor:
    """D = e^d - d - 1 with d = log pi_ref - log pi: >= 0, and unbiased for KL(pi || pi_ref) under samples of pi."""
    d = log_ref_ratio.clamp(max=20)
    return d.exp() - d - 1


class Loss(NamedTuple):
    """loss: scalar; kl: scalar mean of D; clipped: share of ratios outside the clip; spread: mean |log rho|."""

    loss: Tensor
    kl: Tensor
    clipped: Tensor
    spread: Tensor


def policy_loss(
    log_p: Tensor, old: Tensor, ref: Tensor | None, masks: Remask, advantages: Tensor, lengths: Tensor, *, ratio: str, clip: float, beta: float
) -> Loss:
    """-(1/G) sum_i (A_i rho_i - beta D_i) / |o_i| for one inner update j, averaged over groups.

    log_p, old, ref: (B, L) float32 token log-probabilities, 0 where not scored; advantages, lengths: (B,).
    token: rho and D per token, mean over the row's *scored* tokens, about t |o_i| of them (authors' code).
    sequence: Eq. 9 and 10 on the ell of a whole row; 1/|o_i| turns its sum over tokens into a mean.
    sequence_mean: the same on ell / |o_i|, whose exponent is per token; 1/|o_i| is then inside.
    The final mean is over B = groups x G rows: 1/G and the mean over groups at once.
    """
    if not log_p.shape == old.shape == masks.scored.shape or advantages.shape != lengths.shape or len(lengths) != len(log_p):
        raise ValueError(f"shapes disagree: log_p {log_p.shape}, old {old.shape}, scored {masks.scored.shape}, A {advantages.shape}")
    ref = log_p.detach() if ref is None else ref
    if ratio == "token":
        counts = masks.scored.sum(1).clamp(min=1)
        log_rho, d, a = log_p - old, ref - log_p, advantages[:, None]
        mean = lambda v: (v * masks.scored).sum(1) / counts  # (B, L) -> (B,)
    else:
        scale = lengths if ratio == "sequence_mean" else torch.ones_like(lengths)
        # Eq. 9: log rho = ell_theta - ell_old;  Eq. 10: d = ell_ref - ell_theta
        log_rho = sequence_ell(log_p - old, masks.t) / scale
        d, a = sequence_ell(ref - log_p, masks.t) / scale, advantages
        mean = (lambda v: v) if ratio == "sequence_mean" else (lambda v: v / lengths)
    kl = kl_estimate(d)
    objective = mean(surrogate(log_rho, a, clip) - beta * kl)  # (B,)
    with torch.no_grad():
        outside = mean(((log_rho.exp() - 1).abs() > clip).float())
        spread = mean(log_rho.abs())
    return Loss(-objective.mean(), mean(kl).mean().detach(), outside.mean(), spread.mean())


# ---------------------------------------------------------------------------------------------
# The run: what every stage shares
# ---------------------------------------------------------------------------------------------

# First key of every seeded generator, so that no two uses share their noise.
DATA, ELBO, ROLLOUT, MASKS, EVALUATION = range(5)


class Run:
    """One process's share of a run: configuration, Accelerate, task and the run directory."""

    def __init__(self, cfg: Config, accelerator: Accelerator, path: Path):
        self.cfg, self.accelerator, self.path = cfg, accelerator, path
        self.task, self.device = TASKS[cfg.task], accelerator.device
        self.main, self.rank, self.world = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
        self.seconds = dict.fromkeys(("base", "rollout", "update", "eval", "total"), 0.0)
        self.started = time.perf_counter()
        self.stop_signal = 0  # set by SIGINT and SIGTERM

    def say(self, text: str) -> None:
        """One line from the main process, above any progress bar."""
        if self.main:
            tqdm.write(text)
            sys.stdout.flush()

    @contextlib.contextmanager
    def clock(self, name: str):
        """Adds the block's wall-clock seconds to `seconds[name]`."""
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def total(self, value: float) -> float:
        """The sum of a number over all processes; every process has to call it."""
        if self.world == 1:
            return value
        return float(self.accelerator.reduce(torch.tensor(value, device=self.device, dtype=torch.float64), "sum"))

    def everyone(self, flag: bool) -> bool:
        """Whether all processes say so."""
        return self.total(float(not flag)) == 0

    def stopping(self) -> int:
        """The signal that some process has received, 0: none. Asked at the same place by all."""
        return int(self.total(float(self.stop_signal)) / max(1.0, self.total(float(self.stop_signal > 0))))

    def bar(self, total: int, label: str, **options) -> tqdm:
        """A progress bar with a time to completion, on the main process, where someone is looking (a terminal)."""
        return tqdm(total=total, desc=label, disable=None if self.main else True, dynamic_ncols=True, smoothing=0.1, **options)


def free_space_error(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path}: cannot be written ({str(error).strip().splitlines()[0]}); earlier checkpoints are intact")


def write_atomically(path: Path, text: str) -> None:
    """The whole file or the old one, whatever happens in between."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


# ---------------------------------------------------------------------------------------------
# Checkpoints: all of the state, replaced atomically
# ---------------------------------------------------------------------------------------------


def save_checkpoint(run: Run, root: Path, progress: dict, held: dict | None = None) -> None:
    """root/checkpoint/NAME: weights that train, optimiser (Accelerate), progress, and this process's `held` tensors.

    Written beside the last one; `latest` then names it, and only then the last one goes. A process that is
    killed anywhere in here leaves a checkpoint that loads. Masks, noise and data order need no state: they
    are functions of (seed, step, j, row).
    """
    folder = root / "checkpoint"
    target = folder / f"step{progress['step']:06d}-{progress.get('j', 1):03d}"
    try:
        target.mkdir(parents=True, exist_ok=True)
        run.accelerator.wait_for_everyone()
        run.accelerator.save_state(str(target))
        torch.save(held or {}, target / f"held{run.rank}.pt")
        run.accelerator.wait_for_everyone()
        if run.main:
            write_atomically(target / "progress.json", json.dumps(progress))
            write_atomically(folder / "latest", target.name)
            for other in folder.iterdir():
                if other.is_dir() and other.name != target.name:
                    shutil.rmtree(other)
    except (OSError, RuntimeError, Exception) as error:
        if isinstance(error, OSError) or "write" in str(error).lower() or "space" in str(error).lower():
            raise free_space_error(target, error) from None
        raise
    run.accelerator.wait_for_everyone()


def load_checkpoint(run: Run, root: Path) -> tuple[dict, dict] | None:
    """(progress, held) after restoring weights and optimiser; None where there is no checkpoint."""
    pointer = root / "checkpoint" / "latest"
    if not pointer.is_file():
        return None
    source = root / "checkpoint" / pointer.read_text().strip()
    progress = json.loads((source / "progress.json").read_text())
    if progress["processes"] != run.world:
        raise UsageError(f"--resume: {source} was written by {progress['processes']} processes, this run has {run.world}")
    run.accelerator.load_state(str(source), strict=False)
    return progress, torch.load(source / f"held{run.rank}.pt", map_location=run.device)


def keep_trainable_only(models: list, weights: list, output_dir: str) -> None:
    """Accelerate's save hook: a LoRA checkpoint holds the adapter, not the 16 GB below it."""
    for i, model in enumerate(models[: len(weights)]):
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        weights[i] = {name: value for name, value in weights[i].items() if name in trained}


def leave_if(run: Run, signalled: int) -> None:
    """Exit with the shell's code for a signal, after the state was saved."""
    if signalled:
        run.say(f"stopped by {signal.Signals(signalled).name}; state saved. Go on with: --resume --output_dir {run.path}")
        run.accelerator.end_training()
        sys.exit(128 + signalled)


# ---------------------------------------------------------------------------------------------
# Rollouts and evaluation
# ---------------------------------------------------------------------------------------------


def roll_out(run: Run, model: nn.Module, base: MaskedDiffusionModel, prompts: list[list[int]], keys: list[tuple], temperature: float, tick=lambda: None):
    """One completion per prompt: (Batch with the finished x, Rollout). keys: the noise's key for each row.

    `model` is the wrapped model: every process makes the same number of forwards, so nothing is unwrapped.
    """
    cfg = run.cfg
    batch = make_batch(base, prompts, [[base.mask_id] * cfg.gen_length] * len(prompts), run.device)

    def predict(x: Tensor, positions: Tensor) -> Tensor:
        tick()
        return model(x, batch.attention, positions)

    denoise = guided(predict, lambda x: x.masked_fill(batch.attention & ~batch.completion, base.mask_id), cfg.guidance)
    out: Rollout = semi_autoregressive(
        denoise, batch.x, batch.completion,
        block_length=cfg.block_length, tokens_per_step=cfg.tokens_per_step, temperature=temperature,
        generator=[seeded(*key, device=run.device) for key in keys],
        eos_ids=base.eos_ids, pad_id=base.pad_id, eos_last=cfg.eos_last, everyone=run.everyone,
    )  # fmt: skip
    return batch._replace(x=out.x), out


def evaluate(run: Run, model: nn.Module, base: MaskedDiffusionModel, problems: list[Problem], samples: int = 0, label: str = "evaluation", leave: bool = False):
    """Completions of every problem, greedy or `samples` per problem at cfg.temperature.

    Returns (correct, texts): (n, max(samples, 1)) bool tensor on the CPU and as many texts, the same on all
    processes. Each row's noise is keyed by its problem, so the result depends on no batch size.
    """
    k = max(samples, 1)
    rows = [(i, s) for i in range(len(problems)) for s in range(k)]
    size = run.cfg.eval_batch_size
    mine = [rows[i] for i in range(run.rank, len(rows), run.world)]
    batches = -(-len(rows) // (run.world * size))  # the same for every process
    found: list[tuple[int, int, bool, str]] = []
    model.eval()
    with run.clock("eval"), run.bar(batches, label, leave=False) as bar:
        for b in range(batches):
            if leave:
                leave_if(run, run.stopping())
            part = mine[b * size : (b + 1) * size]
            filled = part or rows[:1]  # an empty share still makes its forwards
            prompts = [prompt_ids(base.tokenizer, run.task.messages(problems[i])) for i, _ in filled]
            keys = [(run.cfg.seed, EVALUATION, i, s) for i, s in filled]
            batch, _ = roll_out(run, model, base, prompts, keys, run.cfg.temperature if samples else 0.0)
            texts = texts_of(base.tokenizer, batch.x, through_eos(batch.x, batch.completion, base.eos_ids))
            found += [(i, s, run.task.correct(text, problems[i]), text) for (i, s), text in zip(part, texts)]
            bar.update()
    if run.world > 1:
        from accelerate.utils import gather_object

        found = gather_object(found)
    correct = torch.zeros(len(problems), k, dtype=torch.bool)
    texts = [[""] * k for _ in problems]
    for i, s, right, text in found:
        correct[i, s], texts[i][s] = right, text
    return correct, texts


def accuracy_of(correct: Tensor) -> dict:
    """{"accuracy", "stderr", "n"} of (n, 1) bool; the binomial standard error."""
    n, p = len(correct), correct.float().mean().item()
    return {"accuracy": round(p, 6), "stderr": round(math.sqrt(p * (1 - p) / n), 6), "n": n}


def pass_at(correct: Tensor, k: int) -> float:
    """pass@k from c of n right samples: the mean of 1 - C(n - c, k) / C(n, k), unbiased; correct (problems, n) bool."""
    n = correct.shape[1]
    return sum(1 - math.comb(n - c, k) / math.comb(n, k) for c in correct.sum(1).tolist()) / len(correct)


def paired_p(before: Tensor, after: Tensor) -> float:
    """Two-sided exact McNemar test: the probability of so uneven a split of the problems whose verdict changed."""
    won, lost = int((after & ~before).sum()), int((before & ~after).sum())
    tail = sum(math.comb(won + lost, i) for i in range(min(won, lost) + 1))
    return min(1.0, 2 * tail / 2 ** (won + lost))


# ---------------------------------------------------------------------------------------------
# The base model: ELBO training, from nothing (tiny) or from a published checkpoint (--sft_steps)
# ---------------------------------------------------------------------------------------------


def train_elbo(run: Run, base: MaskedDiffusionModel, problems: list[Problem], validation: list[Problem], steps: int, target: float, root: Path) -> None:
    """Minimise Eq. 2 for `steps` steps, or until greedy validation accuracy reaches `target`.

    A fixed number of steps would give bases of very different strength from seed to seed. Resumes from
    root/checkpoint, which is removed by the caller when the model is saved.
    """
    cfg, every = run.cfg, 50
    run.accelerator.gradient_accumulation_steps = 1
    prompts, completions = encode_targets(base, run.task, problems, cfg.gen_length)
    run.say(f"ELBO training on {len(prompts)} problems ({len(problems) - len(prompts)} do not fit --gen_length {cfg.gen_length}), at most {steps} steps")
    if not prompts:
        raise UsageError(f"--gen_length {cfg.gen_length}: no worked solution fits; the shortest needs more")
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=cfg.sft_lr, betas=BETAS, weight_decay=cfg.weight_decay)
    model, optimizer = run.accelerator.prepare(base, optimizer)
    resumed = load_checkpoint(run, root)
    start, rows = resumed[0]["step"] if resumed else 0, cfg.sft_batch_size * run.world
    bar = run.bar(steps, "ELBO training, at most", initial=start)
    for step in range(start, steps):
        model.train()
        chosen = shuffled(len(prompts), rows, step * rows, cfg.seed, DATA, 0)[run.rank :: run.world]
        batch = make_batch(base, [prompts[i] for i in chosen], [completions[i] for i in chosen], run.device)
        noise = seeded(cfg.seed, ELBO, step, run.rank)
        # t is stratified over the batch, r_b = (b + u) / B: the same expectation at less variance
        r = 1 - (torch.arange(len(chosen)) + torch.rand(1, generator=noise)) / len(chosen)
        u = torch.rand(batch.x.shape, generator=noise)
        loss = elbo_loss(model, batch, r.to(run.device), u.to(run.device), base.mask_id)
        run.accelerator.backward(loss)
        run.accelerator.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = cfg.sft_lr * min(1.0, (step + 1) / 100)
        optimizer.step()
        optimizer.zero_grad()
        bar.update()
        last, signalled = step + 1 == steps, run.stopping()
        if (step + 1) % every == 0 or last:
            accuracy = evaluate(run, model, base, validation)[0].float().mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", validation=f"{accuracy:.3f}")
            if (step + 1) % 200 == 0 or last or accuracy >= target:
                run.say(f"  step {step + 1:>5}  ELBO loss {loss.item():.3f}  validation accuracy {accuracy:.3f}")
            if accuracy >= target:
                break
        if signalled or (cfg.save_every and (step + 1) % (10 * cfg.save_every) == 0):
            save_checkpoint(run, root, {"step": step + 1, "processes": run.world})
        leave_if(run, signalled)
    bar.close()
    run.accelerator.free_memory()


def base_path(run: Run, train: list[Problem], validation: list[Problem]) -> tuple[str, bool]:
    """(where the policy and the reference are loaded from, whether it was there already)."""
    cfg = run.cfg
    if cfg.model is not None and not cfg.sft_steps:
        return cfg.model, True
    if cfg.model is None:
        fields = ("task", "data", "seed", "base_accuracy", "base_steps", "sft_lr", "sft_batch_size", "gen_length", "block_length", "tokens_per_step")
        key = hashlib.sha256(json.dumps([run.world] + [getattr(cfg, f) for f in fields]).encode()).hexdigest()[:8]
        root = Path("runs") / f"base-{cfg.task}-s{cfg.seed}-{key}"
    else:
        root = run.path / "sft"
    if (root / "seconds").is_file():
        run.seconds["base"] = float((root / "seconds").read_text())
        run.say(f"base model: {root}, trained earlier")
        return str(root), True
    start = time.perf_counter()
    if cfg.model is None:
        run.say(f"base model: training it here, until greedy validation accuracy is {cfg.base_accuracy:.2f}; kept in {root}")
        tokenizer = tiny_tokenizer([run.task.messages(p)[-1]["content"] + "\n" + run.task.target(p) for p in train])
        base = tiny_model(tokenizer, cfg.seed).to(run.device)
    else:
        base = load_model(cfg.model, cfg, trainable=True)
    train_elbo(run, base, train, validation, cfg.sft_steps or cfg.base_steps, 2.0 if cfg.model else cfg.base_accuracy, root)
    if run.main:
        if hasattr(base.hf, "merge_and_unload"):
            base.hf = base.hf.merge_and_unload()
        save_model(base, root / "model")
        shutil.rmtree(root / "checkpoint", ignore_errors=True)
        write_atomically(root / "seconds", f"{time.perf_counter() - start:.1f}")
    run.accelerator.wait_for_everyone()
    run.seconds["base"], run.seconds["eval"] = time.perf_counter() - start, 0.0
    return str(root), False


# ---------------------------------------------------------------------------------------------
# MaskGRPO: rollout -> advantages -> mu updates on re-masked completions
# ---------------------------------------------------------------------------------------------


def mask_noise(run: Run, batch: Batch, step: int, j: int, groups: list[int]) -> tuple[Tensor, Tensor]:
    """u (B, L) and u_ratio (B,) uniform noise of inner update j, on the run's device.

    Keyed by (seed, step, j, group): the same for the old, the new and the reference policy, whichever
    process holds the group. With managed randomness a group's completions share it, so that they are
    compared on the same hidden positions; else each has its own.
    """
    cfg, width = run.cfg, batch.x.shape[1] - run.cfg.gen_length
    u, u_ratio = torch.zeros(batch.x.shape), torch.zeros(len(batch.x))
    for row, g in enumerate(groups):
        own = 0 if cfg.managed_randomness else 1 + row % cfg.group_size
        noise = seeded(cfg.seed, MASKS, step, j, g, own)
        u[row, width:] = torch.rand(cfg.gen_length, generator=noise)
        u_ratio[row] = torch.rand((), generator=noise)
        prompt = int(batch.attention[row, :width].sum())  # the prompt's noise does not depend on its padding
        u[row, width - prompt : width] = torch.rand(prompt, generator=noise)
    return u.to(run.device), u_ratio.to(run.device)


def remask_batch(run: Run, held: dict, step: int, j: int) -> tuple[Remask, Tensor]:
    """(masks, hidden) of inner update j: what is scored, and what x_t hides (the tail behind EOS included)."""
    cfg, batch, completion = run.cfg, Batch(held["x"], held["attention"], held["whole"]), held["completion"]
    u, u_ratio = mask_noise(run, batch, step, j, held["groups"].tolist())
    r = inner_time(j, cfg.mu, cfg.gamma)
    masks = {
        "fading_out": lambda: remask.fading_out(completion, r, u),
        "uniform": lambda: remask.uniform(completion, r, u),
        "full": lambda: remask.full(completion, batch.attention & ~batch.completion, u),
        "whole_range": lambda: remask.whole_range(completion, u, u_ratio),
        "trace": lambda: remask.trace(completion, held["unmask_step"], j, cfg.mu),
    }[cfg.remask]()
    return masks, masks.masked | (batch.completion & ~completion)


def log_probs_at(run: Run, model: nn.Module, base: MaskedDiffusionModel, held: dict, step: int, j: int) -> tuple[Tensor, Remask]:
    """Token log-probabilities (B, L) of a micro-batch under `model` on the masks of update j, and the masks."""
    masks, hidden = remask_batch(run, held, step, j)
    batch = Batch(held["x"], held["attention"], held["whole"])
    return token_log_probs(model, batch, hidden, masks.scored, base.mask_id, run.cfg.temperature), masks


def collect(run: Run, model, base, reference, train: list[Problem], step: int, micro: int, tick=lambda: None) -> tuple[dict, dict]:
    """One micro-batch of experience: (tensors to keep for the mu updates, metrics of the rollout)."""
    cfg = run.cfg
    per_batch = cfg.batch_size // cfg.group_size  # groups; a group never straddles processes
    first = (micro * run.world + run.rank) * per_batch
    groups = list(range(first, first + per_batch))
    per_step = per_batch * run.world * cfg.accumulation
    problems = [train[shuffled(len(train), 1, step * per_step + g, cfg.seed, DATA, 1)[0]] for g in groups]
    rows = [(g, k) for g in groups for k in range(cfg.group_size)]
    model.eval()
    with run.clock("rollout"):
        prompts = [prompt_ids(base.tokenizer, run.task.messages(p)) for p in problems]
        keys = [(cfg.seed, ROLLOUT, step, g, k) for g, k in rows]
        batch, out = roll_out(run, model, base, [prompts[g - first] for g, _ in rows], keys, cfg.temperature, tick)
        completion = through_eos(batch.x, batch.completion, base.eos_ids)
        texts = texts_of(base.tokenizer, batch.x, completion)
        terms = [run.task.reward(text, problems[g - first]) for text, (g, _) in zip(texts, rows)]
        rewards = torch.tensor([sum(term.values()) for term in terms])
        held = {
            "x": batch.x, "attention": batch.attention, "whole": batch.completion.clone(), "completion": completion,
            "unmask_step": out.unmask_step, "groups": torch.tensor([g for g, _ in rows]),
            "advantages": group_advantages(rewards, cfg.group_size, cfg.advantage).to(run.device),
        }  # fmt: skip
    with run.clock("update"), torch.no_grad():
        # the first update starts from the old policy itself, so only j = 2 ... mu need its log-probabilities
        old = [torch.zeros(batch.x.shape, device=run.device)] + [log_probs_at(run, model, base, held, step, j)[0] for j in range(2, cfg.mu + 1)]
        held["old"] = torch.stack(old)  # (mu, B, L)
        if cfg.beta:
            with reference as frozen:
                held["ref"] = torch.stack([log_probs_at(run, frozen, base, held, step, j)[0] for j in range(1, cfg.mu + 1)])
    spread = rewards.view(-1, cfg.group_size).std(1)
    metrics = {"reward": rewards.mean().item(), "zero_variance_groups": (spread < 1e-6).float().mean().item()}
    metrics |= {f"reward/{name}": sum(term[name] for term in terms) / len(terms) for name in terms[0]}
    metrics |= {"completion_tokens": completion.sum(1).float().mean().item(), "forwards": float(out.forwards)}
    return held, metrics


def update(run: Run, model, base, optimizer, micro_batches: list[dict], step: int, j: int) -> dict | None:
    """Inner update j = 1 ... mu over all micro-batches: one optimiser step. None if the loss is not finite."""
    cfg, metrics = run.cfg, {}
    model.train()
    for held in micro_batches:
        with run.accelerator.accumulate(model):
            log_p, masks = log_probs_at(run, model, base, held, step, j)
            old = log_p.detach() if j == 1 else held["old"][j - 1]
            ref = held["ref"][j - 1] if cfg.beta else None
            lengths = held["completion"].sum(1).float()
            loss = policy_loss(log_p, old, ref, masks, held["advantages"], lengths, ratio=cfg.ratio, clip=cfg.clip, beta=cfg.beta)
            run.accelerator.backward(loss.loss)
            for name, value in loss._asdict().items():
                metrics[name] = metrics.get(name, 0.0) + value.item() / len(micro_batches)
            if run.accelerator.sync_gradients:
                metrics["grad_norm"] = float(run.accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm))
                if not run.everyone(math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"])):
                    optimizer.zero_grad()
                    return None
                for group in optimizer.param_groups:
                    group["lr"] = cfg.lr * min(1.0, (step * cfg.mu + j) / max(cfg.warmup, 1))
            optimizer.step()
            optimizer.zero_grad()
    return metrics


class Reference:
    """The policy before RL, as a context that yields a model: LoRA's base with the adapter off, or a frozen copy."""

    def __init__(self, run: Run, model: nn.Module, base: MaskedDiffusionModel, path: str):
        self.model, self.base, self.frozen = model, base, None
        self.adapter_off = getattr(base.hf, "disable_adapter", None)
        if not run.cfg.beta:
            return
        if self.adapter_off is None or resolve(path)[1] is not None:  # an adapter that came with --model belongs to the reference
            self.adapter_off = None
            self.frozen = load_model(path, run.cfg, trainable=False).to(run.device).eval()

    def __enter__(self) -> nn.Module:
        if self.frozen is not None:
            return self.frozen
        self.context = self.adapter_off()
        self.context.__enter__()
        return self.model

    def __exit__(self, *error) -> None:
        if self.frozen is None:
            self.context.__exit__(*error)


def train_policy(run: Run, model, base, optimizer, reference, train: list[Problem], validation: list[Problem], progress: dict, held: dict) -> None:
    """The RL loop from `progress` (step, j, sums of metrics) on; `held` are the rollouts of an unfinished step."""
    cfg, log = run.cfg, run.path / "metrics.jsonl"
    start, began = progress["step"], time.perf_counter()
    lines = log.read_text().splitlines(keepends=True)[:start] if log.is_file() else []
    if run.main:
        write_atomically(log, "".join(lines))  # lines behind the checkpoint will be written again
    outer = run.bar(cfg.max_steps, "RL steps", initial=start)
    for step in range(start, cfg.max_steps):
        if not held:
            with run.bar(cfg.accumulation * forwards_of(cfg), "  rollouts, forwards", leave=False) as bar:
                micro = [collect(run, model, base, reference, train, step, a, bar.update) for a in range(cfg.accumulation)]
            held = {"micro": [m[0] for m in micro]}
            progress |= {"j": 1, "rollout": mean_of([m[1] for m in micro]), "updates": []}
        with run.clock("update"), run.bar(cfg.mu, "  updates", leave=False, initial=progress["j"] - 1) as bar:
            for j in range(progress["j"], cfg.mu + 1):
                metrics = update(run, model, base, optimizer, held["micro"], step, j)
                if metrics is None:
                    save_checkpoint(run, run.path, progress | {"step": step}, held)
                    raise UsageError(f"step {step + 1}, update {j}: the loss or its gradient is not finite; the state before it is in {run.path}; lower --lr ({cfg.lr:g}) or --clip")
                progress = progress | {"j": j + 1, "updates": progress["updates"] + [metrics]}
                bar.update()
                signalled = run.stopping()
                if signalled and j < cfg.mu:
                    save_checkpoint(run, run.path, progress | {"step": step, "seconds": run.seconds}, held)
                    leave_if(run, signalled)
        line = progress["rollout"] | mean_of(progress["updates"])
        line = {name: run.total(value) / run.world for name, value in line.items()}
        line = {"step": step + 1, "completions": (step + 1) * cfg.batch_size * cfg.accumulation * run.world} | line
        if cfg.eval_every and ((step + 1) % cfg.eval_every == 0 or step + 1 == cfg.max_steps):
            line["validation_accuracy"] = evaluate(run, model, base, validation)[0].float().mean().item()
            pace = (time.perf_counter() - began) / (step + 1 - start)
            run.say(f"  step {step + 1:>5}/{cfg.max_steps}  reward {line['reward']:.3f}  validation {line['validation_accuracy']:.3f}"
                    f"  kl {line['kl']:.4f}  {pace:.2f} s/step, {pace * (cfg.max_steps - step - 1) / 60:.1f} min left")  # fmt: skip
        if run.main:
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")
        run.accelerator.log({k: v for k, v in line.items() if k != "step"}, step=step + 1)
        outer.update()
        outer.set_postfix(reward=f"{line['reward']:.2f}", kl=f"{line['kl']:.4f}")
        held, signalled = {}, run.stopping()
        progress = progress | {"step": step + 1, "j": 1, "updates": [], "seconds": run.seconds}
        if signalled or step + 1 == cfg.max_steps or (cfg.save_every and (step + 1) % cfg.save_every == 0):
            save_checkpoint(run, run.path, progress)
        leave_if(run, signalled)
    outer.close()


def mean_of(rows: list[dict]) -> dict:
    """Key-wise means of dicts with the same keys."""
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]} if rows else {}


# ---------------------------------------------------------------------------------------------
# Setting up: flags, data, run directory
# ---------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    def error(self, message: str):  # one line, not a page of usage
        raise UsageError(message + " (see --help)")


def parse(argv: list[str] | None = None) -> tuple[Config, dict[str, str]]:
    """(configuration, where each value comes from). Defaults < model's column < method's row < saved run < flags."""
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    for field in dataclasses.fields(Config):
        meta, kind = field.metadata, field.type
        columns = f" [{meta['paper']} with --model, {meta['tiny']} without]" if meta["paper"] is not None or meta["tiny"] is not None else ""
        columns = columns or (f" [{field.default}]" if field.default is not None else "")
        options = dict(action=argparse.BooleanOptionalAction) if kind is bool else dict(type=kind, choices=meta["choices"])
        parser.add_argument(f"--{field.name}", default=None, help=meta["help"].replace("%", "%%") + columns, **options)
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    saved = {}
    if given.get("resume"):
        if "output_dir" in given and not (Path(given["output_dir"]) / "config.json").is_file():
            raise UsageError(f"--resume: {given['output_dir']} holds no run (no config.json)")
        saved = saved_config(given)
    values, source = {}, {}
    column = "tiny" if is_tiny(given.get("model", saved.get("model"))) else "paper"
    method = METHODS[given.get("method", saved.get("method", "maskgrpo"))]
    for field in dataclasses.fields(Config):
        name = field.name
        layers = (("default", field.default), (column, field.metadata[column]), ("method", method.get(name)), ("saved", saved.get(name)), ("flag", given.get(name)))
        source[name], values[name] = [(origin, value) for origin, value in layers if value is not None or origin == "default"][-1]
    cfg = Config(**values)
    check(cfg)
    cfg.output_dir = cfg.output_dir or default_output_dir(cfg)
    return cfg, source


# What may change when a run goes on; everything else would make it another run.
FREE_ON_RESUME = ("resume", "output_dir", "max_steps", "save_every", "log_with", "eval_n", "eval_batch_size", "pass_k")


def saved_config(given: dict) -> dict:
    """The configuration of the run to resume. UsageError where a flag contradicts it."""
    place = Path(given.get("output_dir") or default_output_dir(parse([w for w in flags_of(given) if w != "--resume"])[0]))
    if not (place / "config.json").is_file():
        raise UsageError(f"--resume: {place} holds no run (no config.json); name one with --output_dir")
    saved = json.loads((place / "config.json").read_text())
    for name, value in given.items():
        if name not in FREE_ON_RESUME and saved.get(name) != value:
            raise UsageError(f"--resume: --{name} {value} contradicts {place / 'config.json'}, which has {saved.get(name)}")
    return {name: value for name, value in saved.items() if name not in ("resume", "output_dir")}


def flags_of(given: dict) -> list[str]:
    """The command line that gives these values."""
    words = []
    for name, value in given.items():
        words += [f"--{name}" if value else f"--no-{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return words


def default_output_dir(cfg: Config) -> str:
    model = "tiny" if cfg.model is None else Path(cfg.model.rstrip("/")).name
    return f"runs/maskgrpo-{cfg.task}-{cfg.method}-{model}-s{cfg.seed}" + ("-eval" if cfg.eval_only else "")


def load_data(run: Run) -> dict[str, list[Problem] | None]:
    """train, validation, test, unseen (None for published data). Held-out problems never train."""
    cfg, task = run.cfg, run.task
    if cfg.data == "generated" or (cfg.data is None and is_tiny(cfg.model)):
        n = cfg.eval_n or 1000
        return {
            "train": task.generate("train", 20_000, cfg.seed),
            **{split: task.generate(split, n if split != "validation" else 256, 0) for split in ("validation", "test", "unseen")},
        }
    train = task.load(cfg.data, "train")
    if cfg.eval_data:
        test = task.load(cfg.eval_data, "test")
    elif cfg.data is None:
        test = task.load(None, "test")
    else:
        train, test = [p for i, p in enumerate(train) if i % 10 != 9], train[9::10]
        if not test:
            raise UsageError(f"--data {cfg.data}: {len(train)} problems are too few to hold every tenth one out; give --eval_data")
    validation = train[-min(256, max(1, len(train) // 10)) :]
    train = train[: -len(validation)] or train
    return {"train": train, "validation": validation, "test": test[: cfg.eval_n or None], "unseen": None}


def describe(run: Run, source: dict[str, str], data: dict) -> None:
    """The first lines of a run: what runs, on what, with which values, and where each comes from."""
    cfg = run.cfg
    run.say(f"MaskGRPO: --task {cfg.task} --method {cfg.method} --seed {cfg.seed} -> {run.path}")
    run.say(f"model     {cfg.model or 'tiny default: trained here from nothing (167k parameters)'}{f', LoRA rank {cfg.lora}' if cfg.lora else ''}")
    held_out = ", ".join(f"{len(data[s])} {s}" for s in ("validation", "test", "unseen") if data[s])
    origin = cfg.data or ("generated from the seed" if data["unseen"] else "published")
    run.say(f"data      {origin}: {len(data['train'])} train, {held_out}")
    run.say(f"decoding  {decoding(cfg)}; greedy for accuracy, temperature {cfg.temperature:g} in rollouts")
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    run.say(f"device    {run.device}, {run.world} process{'es' * (run.world > 1)}{threads}")
    for origin in ("flag", "method", "paper", "tiny", "saved", "default"):
        pairs = [f"{name}={getattr(cfg, name)}" for name in source if source[name] == origin and getattr(cfg, name) is not None]
        for i in range(0, len(pairs), 6):
            run.say(f"{origin if i == 0 else '':<9} " + " ".join(pairs[i : i + 6]))


def forwards_of(cfg: Config) -> int:
    """Forwards of one rollout that no EOS cuts short."""
    steps = -(-cfg.gen_length // cfg.block_length) * -(-cfg.block_length // cfg.tokens_per_step)
    return steps * (2 if cfg.guidance else 1)


def decoding(cfg: Config) -> str:
    """The decoding settings that every accuracy depends on."""
    extra = (f", guidance {cfg.guidance:g}" if cfg.guidance else "") + (", EOS last" if cfg.eos_last else "")
    return f"{cfg.gen_length} tokens in {forwards_of(cfg)} forwards, blocks of {cfg.block_length}, most confident first{extra}"


def memory_expected(cfg: Config, base: MaskedDiffusionModel) -> str:
    """A lower estimate of a training step's memory: weights, gradients, Adam's two moments, reference, logits."""
    everything = sum(p.numel() * p.element_size() for p in base.parameters())
    trained = sum(p.numel() for p in base.parameters() if p.requires_grad)
    copy = everything if cfg.beta and not cfg.lora else 0
    logits = 3 * 4 * cfg.batch_size * cfg.gen_length * base.hf.config.vocab_size  # at masked positions, with gradients
    total = everything + 12 * trained + copy + logits
    return f"{trained / 1e6:.2f}M of {sum(p.numel() for p in base.parameters()) / 1e6:.2f}M parameters train; at least {total / 2**30:.2f} GiB plus activations"


def open_run(cfg: Config) -> Path:
    """The run directory, made. An earlier run there is moved aside, never overwritten; UsageError if not writable."""
    path = Path(cfg.output_dir)
    try:
        if not cfg.resume and (path / "config.json").exists():
            n = next(n for n in range(1, 10_000) if not path.with_name(f"{path.name}.old{n}").exists())
            path.rename(path.with_name(f"{path.name}.old{n}"))
        path.mkdir(parents=True, exist_ok=True)
        write_atomically(path / "config.json", json.dumps(dataclasses.asdict(cfg), indent=1))
    except OSError as error:
        raise UsageError(f"--output_dir {path}: cannot be written ({error.strerror or error})") from None
    return path


def measure(run: Run, model, base, data: dict, phase: str) -> list[dict]:
    """Held-out completions, kept in completions_PHASE.jsonl and read back on resume: greedy ones of both splits,
    and --pass_k sampled ones of the test split. One dict per completion."""
    file = run.path / f"completions_{phase}.jsonl"
    if run.cfg.resume and file.is_file():
        return [json.loads(line) for line in file.read_text().splitlines()]
    rows = []
    for split, samples in (("test", 0), ("unseen", 0), ("test", run.cfg.pass_k)):
        if not data[split] or (split, samples) == ("test", 0) and rows:
            continue
        correct, texts = evaluate(run, model, base, data[split], samples, f"evaluation {phase}, {split}", leave=True)
        for i, problem in enumerate(data[split]):
            for s, text in enumerate(texts[i]):
                row = {"split": split, "sample": s if samples else None, "correct": bool(correct[i, s])}
                rows.append(row | {"prompt": problem["question"], "completion": text, "answer": problem["answer"]})
    if run.main:
        write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def verdicts(rows: list[dict], split: str, sampled: bool = False) -> Tensor:
    """(n, k) bool of the completions of a split; k = 1 for greedy ones; empty where there are none."""
    right = [row["correct"] for row in rows if row["split"] == split and (row["sample"] is not None) == sampled]
    k = 1 + max((row["sample"] for row in rows if row["sample"] is not None), default=0) if sampled else 1
    return torch.tensor(right, dtype=torch.bool).view(-1, k)


def summary(rows: list[dict], phase: str) -> dict:
    """Accuracies of one phase under the names of results.json; None for a split that does not exist."""
    test, unseen, sampled = verdicts(rows, "test"), verdicts(rows, "unseen"), verdicts(rows, "test", sampled=True)
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= sampled.shape[1]] if len(sampled) else []
    return {
        phase: accuracy_of(test),
        f"{phase}_unseen": accuracy_of(unseen) if len(unseen) else None,
        f"{phase}_pass_at": {str(k): round(pass_at(sampled, k), 6) for k in ks} or None,
    }


def report(run: Run, results: dict) -> None:
    """results.json, and the same as a small table with its decoding settings."""
    run.seconds["total"] += time.perf_counter() - run.started
    results = {"task": run.cfg.task, "method": run.cfg.method, "seed": run.cfg.seed} | results
    results |= {"decoding": decoding(run.cfg), "seconds": {k: round(v, 1) for k, v in run.seconds.items()}}
    results |= {"config": dataclasses.asdict(run.cfg), "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    if run.main:
        write_atomically(run.path / "results.json", json.dumps(results, indent=1))
    phases = [phase for phase in ("before", "after") if phase in results]
    run.say(f"\ngreedy accuracy ± standard error; {results['decoding']}")
    for split, suffix in (("test", ""), ("unseen", "_unseen")):
        if results[phases[0] + suffix]:
            cells = "   ".join(f"{p} {results[p + suffix]['accuracy']:.3f} ± {results[p + suffix]['stderr']:.3f}" for p in phases)
            test = f"   paired p = {results['paired_p'][split]:.1e}" if "paired_p" in results else ""
            run.say(f"  {split:<7} {cells}   n = {results[phases[0] + suffix]['n']}{test}")
    for p in phases:
        if results[f"{p}_pass_at"]:
            cells = "  ".join(f"@{k} {v:.3f}" for k, v in results[f"{p}_pass_at"].items())
            run.say(f"  pass, {p:<6} {cells}   (test, temperature {run.cfg.temperature:g})")
    run.say("seconds   " + "  ".join(f"{k} {v:.0f}" for k, v in run.seconds.items()) + f"\nresults   {run.path / 'results.json'}")


def main(argv: list[str] | None = None) -> None:
    cfg, source = parse(argv)
    kwargs = DistributedDataParallelKwargs(broadcast_buffers=False)  # rotary tables, the same everywhere
    precision = "bf16" if cfg.bf16 else "no"
    accelerator = Accelerator(mixed_precision=precision, log_with=cfg.log_with, project_dir=cfg.output_dir, kwargs_handlers=[kwargs])
    if accelerator.is_main_process:
        open_run(cfg)
    accelerator.wait_for_everyone()
    run = Run(cfg, accelerator, Path(cfg.output_dir))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, frame: setattr(run, "stop_signal", received))
    accelerator.register_save_state_pre_hook(keep_trainable_only)
    accelerator.init_trackers("maskgrpo", config={k: v for k, v in dataclasses.asdict(cfg).items() if v is not None})

    data = load_data(run)
    describe(run, source, data)
    path, cached = (cfg.model, True) if cfg.eval_only else base_path(run, data["train"], data["validation"])
    base = load_model(path, cfg, trainable=not cfg.eval_only).to(run.device)
    if cfg.eval_only:
        model = accelerator.prepare(base) if run.world == 1 else base
        report(run, summary(measure(run, model, base, data, "before"), "before"))
        return
    run.say("memory    " + memory_expected(cfg, base))
    optimizer = torch.optim.AdamW([p for p in base.parameters() if p.requires_grad], lr=cfg.lr, betas=BETAS, weight_decay=cfg.weight_decay)
    accelerator.gradient_accumulation_steps = cfg.accumulation
    model, optimizer = accelerator.prepare(base, optimizer)
    reference = Reference(run, model, base, path)
    progress, held = {"step": 0, "j": 1, "updates": [], "processes": run.world}, {}
    if cfg.resume and (loaded := load_checkpoint(run, run.path)):
        progress, held = loaded
        run.seconds |= progress["seconds"]
        run.say(f"resumed after step {progress['step']}" + (f", inner update {progress['j'] - 1}" if held else ""))
    before = measure(run, model, base, data, "before")
    run.say(f"before RL: {accuracy_of(verdicts(before, 'test'))['accuracy']:.3f} on test")
    train_policy(run, model, base, optimizer, reference, data["train"], data["validation"], progress, held)
    after = measure(run, model, base, data, "after")
    if run.main:
        save_model(base, run.path / "model")
    pairs = {split: paired_p(verdicts(before, split), verdicts(after, split)) for split in ("test", "unseen") if data[split]}
    report(run, summary(before, "before") | summary(after, "after") | {"paired_p": pairs, "base_cached": cached})
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (UsageError, DataError) as error:
        print(f"maskgrpo.py: error: {error}", file=sys.stderr)
        sys.exit(2)
