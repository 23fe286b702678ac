"""What a rollout step and an update of maskgrpo.py take, where, and beside what: seconds, memory, model FLOPs.

python experiments/speed.py                        # LLaDA's shape at width 512, one CPU thread, some minutes
python experiments/speed.py --device cuda --bf16 true --width 4096 --layers 32 --peak 990 --growth false

Random weights, LoRA, no server, no download; on Linux. Seconds are the best of --repeats; on one CPU thread they are
CPU seconds, which other work on the machine does not count into.
"""

import ctypes
import dataclasses
import itertools
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from common import table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import maskgrpo as m  # noqa: E402


@dataclasses.dataclass
class Config:
    """Sizes of the model and of a batch."""

    width: int = m.flag(512, "hidden size; the MLP has three times as many")
    layers: int = m.flag(8, "layers")
    vocabulary: int = m.flag(32768, "words; LLaDA has 126464")
    prompt: int = m.flag(128, "tokens of the prompt")
    length: int = m.flag(256, "tokens of the completion")
    rows: int = m.flag(6, "completions")
    block: int = m.flag(16, "tokens per block")
    lora: int = m.flag(16, "rank")
    checkpointing: bool = m.flag(False, "recompute activations, as maskgrpo.py does without LoRA")
    device: str = m.flag("cpu", "cpu or cuda")
    bf16: bool = m.flag(False, "frozen weights and rollouts in bfloat16")
    repeats: int = m.flag(3, "of which the best counts")
    peak: float = m.flag(0.0, "the device's TFLOP/s in a step's precision; 0: unknown")
    growth: bool = m.flag(True, "also over lengths, vocabularies and blocks")


def build(cfg: Config) -> m.MaskedDiffusionModel:
    """A random model in LLaDA's shape, with LoRA on the authors' targets."""
    import peft

    torch.manual_seed(0)
    sizes = dict(hidden_size=cfg.width, intermediate_size=3 * cfg.width, num_hidden_layers=cfg.layers)
    sizes |= dict(vocab_size=cfg.vocabulary, num_attention_heads=max(cfg.width // 128, 4), mask_token_id=2)
    with torch.device(cfg.device):
        hf = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **m.BIDIRECTIONAL))
    if cfg.bf16:
        m.in_bf16(hf := hf.bfloat16())
    targets = ["q_proj", "k_proj", "v_proj", "up_proj"]
    hf = peft.get_peft_model(hf, peft.LoraConfig(r=cfg.lora, lora_alpha=cfg.lora / 2, target_modules=targets))
    words = SimpleNamespace(get_vocab=dict, eos_token_id=1, pad_token_id=1, sep_token_id=None, mask_token_id=2)
    return m.MaskedDiffusionModel(hf, words, bf16=cfg.bf16)


def now(cfg: Config) -> float:
    if cfg.device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if cfg.device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter()


def peak_of(cfg: Config, work) -> tuple[float, float]:
    """(seconds of work(), MiB that it needed beyond what was there); of a CPU from Linux's high-water mark."""
    resident = lambda of: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(of)) / 1024
    if cfg.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before, highest = torch.cuda.memory_allocated() / 2**20, lambda: torch.cuda.max_memory_allocated() / 2**20
    else:
        ctypes.CDLL(None).malloc_trim(0)  # what is free goes back to the system, and counts no more
        Path("/proc/self/clear_refs").write_text("5")
        before, highest = resident("VmRSS"), lambda: resident("VmHWM")
    began = now(cfg)
    work()
    return now(cfg) - began, highest() - before


def measure(cfg: Config) -> dict[str, float]:
    """Seconds, MiB and GFLOP of a rollout step, by its parts, and of an update (mu = 2), by its policies."""
    model, found = build(cfg).eval(), {}
    x = torch.randint(3, cfg.vocabulary, (cfg.rows, cfg.prompt + cfg.length), device=cfg.device)
    seen = torch.ones_like(x, dtype=torch.bool)
    completion = seen & (torch.arange(x.shape[1], device=cfg.device) >= cfg.prompt)
    clock = {"head": 0.0, "model": 0.0}

    def timed(name: str, f):
        def call(*args, **how):
            began = now(cfg)
            out = f(*args, **how)
            clock[name] += now(cfg) - began
            return out

        return call

    def roll(steps: int = 2) -> None:
        """The first steps of a rollout, in which nothing has ended."""
        asked = itertools.count()
        settings = dict(block_length=cfg.block, tokens_per_step=2, temperature=0.9, eos_ids=(), pad_id=1)
        settings["everyone"] = lambda done: next(asked) == steps
        noise = [m.seeded(i, device=cfg.device) for i in range(cfg.rows)]
        ask = timed("model", lambda x, positions: model(x, seen, positions, rough=True))
        m.SAMPLERS["semi_autoregressive"](ask, x.masked_fill(completion, 2), completion, generator=noise, **settings)

    head = model.hf.get_output_embeddings()
    plain, head.forward = head.forward, timed("head", head.forward)
    roll()
    best = []
    for _ in range(cfg.repeats):
        clock.update(head=0.0, model=0.0)
        seconds, mib = peak_of(cfg, roll)
        best.append((seconds / 2, clock["head"] / 2, (clock["model"] - clock["head"]) / 2, mib))
    found["step"], found["head"], found["body"], found["step MiB"] = min(best)
    head.forward = plain
    masks = m.remask.uniform(completion, 0.8, torch.rand(x.shape, generator=m.seeded(1)).to(cfg.device))
    batch, lengths = m.Batch(x, seen, completion), completion.sum(1).float()
    log_p = lambda: m.token_log_probs(model, batch, masks.masked, masks.scored, 2, 0.9)
    advantages = torch.linspace(-1, 1, cfg.rows, device=cfg.device)

    def old() -> None:
        with torch.no_grad():
            log_p()

    def reference() -> None:
        with torch.no_grad(), model.hf.disable_adapter():
            log_p()

    def train() -> None:
        p = log_p()
        m.policy_loss(p, p.detach(), None, masks, advantages, lengths, ratio="token", clip=0.2, beta=0.0)[0].backward()
        model.zero_grad()

    for work in (old, reference, train):
        if work is train and cfg.checkpointing:
            model.train().hf.gradient_checkpointing_enable({"use_reentrant": False})
        work()
        found[work.__name__], found[f"{work.__name__} MiB"] = min(peak_of(cfg, work) for _ in range(cfg.repeats))
    found["update"] = found["old"] / 2 + found["reference"] + found["train"]  # of two updates one has an old policy
    # the model's own: two per weight and token, and attention's products; the head where it is read; backward as much
    body = x.numel() * (cfg.layers * (26 * cfg.width**2 + 4 * x.shape[1] * cfg.width))
    of_head = lambda positions: 2 * positions * cfg.width * cfg.vocabulary
    found["step GFLOP"] = (body + of_head(cfg.rows * cfg.block)) / 1e9
    found["update GFLOP"] = 3.5 * (body + of_head(int(masks.scored.sum()))) / 1e9
    return found


def cells(cfg: Config, f: dict[str, float]) -> list[str]:
    used = lambda of: f[f"{of} GFLOP"] / f[of]
    share = lambda of: f" ({used(of) / cfg.peak / 10:.0f}%)" if cfg.peak else ""
    model = (f["body"] + f["head"]) / f["step"]
    parts = f"{f['body'] / f['step']:.3f} + {f['head'] / f['step']:.3f} = {model:.3f}"
    split = f"{f['old']:.2f} + {f['reference']:.2f} + {f['train']:.2f}"
    speeds = [f"{used(of):.0f}{share(of)}" for of in ("step", "update")]
    return [f"{f['step']:.3f}", parts, f"{f['step MiB']:.0f}", speeds[0], f"{f['update']:.2f}", split] + [
        f"{f['train MiB']:.0f}",
        speeds[1],
    ]


HEAD = [
    "",
    "step, s",
    "body + head = model",
    "MiB",
    "GFLOP/s",
    "update, s",
    "old + reference + training",
    "MiB",
    "GFLOP/s",
]


def main() -> None:
    (cfg,) = transformers.HfArgumentParser(Config).parse_args_into_dataclasses()
    torch.set_num_threads(1 if cfg.device == "cpu" else torch.get_num_threads())
    torch.set_float32_matmul_precision("high" if cfg.bf16 else "highest")  # as in a run: an update's products are TF32
    size = sum(p.numel() * p.element_size() for p in build(cfg).parameters()) / 2**20
    print(f"{cfg}\ntorch {torch.__version__}; a forward reads {size:,.0f} MiB of weights")
    table(HEAD, {f"V = {cfg.vocabulary:,}": cells(cfg, measure(cfg))})
    over = dict(length=(64, 128, 256, 512), vocabulary=(8192, 32768, 126464), block=(8, 16, 32, 64))
    for name, values in over.items() if cfg.growth else ():
        table(
            HEAD,
            {f"{name} {value:,}": cells(cfg, measure(dataclasses.replace(cfg, **{name: value}))) for value in values},
        )


if __name__ == "__main__":
    main()
