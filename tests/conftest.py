"""Fixtures: random checkpoints in the official on-disk formats, GSM8K-format data, and the scripts as commands."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ |= {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}  # GPUs or not
torch.set_num_threads(1)  # tiny tensors: threads only get in each other's way

import rewards  # noqa: E402


def llada_checkpoint(path: Path, tokenizer, *, drop="", extra="", mask_token_id=None, codebook=0) -> Path:
    """A random checkpoint with LLaDA's config.json and weight names: hidden 32, 2 layers, 4 heads. With a codebook:
    MMaDA's, whose image codes follow the tokenizer's tokens."""
    torch.manual_seed(0)
    d, f, v, layers = 32, 48, len(tokenizer) + codebook, 2
    config = {
        "architectures": ["LLaDAModelLM"], "model_type": "llada", "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
        "d_model": d, "mlp_hidden_size": f, "n_layers": layers, "n_heads": 4, "n_kv_heads": 4, "vocab_size": v, "embedding_size": v,
        "max_sequence_length": 512, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "weight_tying": False,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "mask_token_id": tokenizer.convert_tokens_to_ids("<|mdm_mask|>") if mask_token_id is None else mask_token_id,
    }  # fmt: skip
    if codebook:
        config |= {"architectures": ["MMadaModelLM"], "model_type": "mmada", "num_vq_tokens": 16}
        config |= {"codebook_size": codebook, "new_vocab_size": v}
    if mask_token_id == -1:
        del config["mask_token_id"]
    square, up, down = ("q_proj", "k_proj", "v_proj", "attn_out"), ("ff_proj", "up_proj"), ("ff_out",)
    block = {"attn_norm": (d,), "ff_norm": (d,)} | dict.fromkeys(square, (d, d)) | dict.fromkeys(up, (f, d))
    block |= dict.fromkeys(down, (d, f))
    shapes = {"wte.weight": (v, d), "ln_f.weight": (d,), "ff_out.weight": (v, d)}
    shapes |= {f"blocks.{n}.{name}.weight": shape for n in range(layers) for name, shape in block.items()}
    draw = lambda shape: torch.randn(shape) * (0.3 if len(shape) > 1 else 0.1) + (len(shape) == 1)
    weights = {f"model.transformer.{name}": draw(shape) for name, shape in shapes.items()}
    weights = {k: w for k, w in weights.items() if not (drop and drop in k)}
    return write_checkpoint(path, config, weights | ({extra: torch.zeros(2)} if extra else {}), tokenizer)


def dream_checkpoint(path: Path, tokenizer) -> Path:
    """A random checkpoint with Dream's config.json and weight names: Qwen2-shaped, 2 key heads for 4 query heads."""
    torch.manual_seed(1)
    d, f, v, layers = 32, 48, len(tokenizer), 2
    config = {
        "architectures": ["DreamModel"], "model_type": "Dream", "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
        "hidden_size": d, "intermediate_size": f, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": v, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None,
        "tie_word_embeddings": False, "hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True,
        "bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "mask_token_id": tokenizer.convert_tokens_to_ids("<|mdm_mask|>"),
    }  # fmt: skip
    shapes = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)}
    layer = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,), "self_attn.o_proj.weight": (d, d)}
    layer |= {"mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}
    for part, rows in (("q", d), ("k", 16), ("v", 16)):
        layer |= {f"self_attn.{part}_proj.weight": (rows, d), f"self_attn.{part}_proj.bias": (rows,)}
    shapes |= {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}
    weights = {k: torch.randn(s) * (0.3 if len(s) > 1 else 0.1) + ("norm" in k) for k, s in shapes.items()}
    return write_checkpoint(path, config, weights, tokenizer, tokenizer_class="DreamTokenizer")


def write_checkpoint(path: Path, config: dict, weights: dict, tokenizer, tokenizer_class: str | None = None) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(path)
    if tokenizer_class:  # Dream ships vocab.json and merges.txt, and a tokenizer class of its own
        tokenizer.backend_tokenizer.model.save(str(path))
        (path / "tokenizer.json").unlink()
        file = path / "tokenizer_config.json"
        remote = {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}
        settings = json.loads(file.read_text()) | {"tokenizer_class": tokenizer_class, "auto_map": remote}
        file.write_text(json.dumps(settings))
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    """60 problems in GSM8K's own format: prose with <<calculator marks>> and a last line `#### N`."""
    lines, path = [], tmp_path_factory.mktemp("data") / "gsm8k.jsonl"
    for p in rewards.TASKS["gsm8k"].generate("train", 60, 7):
        *steps, last = p["answer"].splitlines()
        marked = [f"So it is {s.rpartition(' ')[0]} <<{s.replace(' ', '')}>>{s.rpartition(' ')[2]}." for s in steps]
        lines.append(json.dumps({"question": p["question"], "answer": "\n".join(marked + [last])}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def bpe(data_file):
    """A byte-level BPE tokenizer trained on the data file, with LLaDA's special tokens and chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|eot_id|>", "<|mdm_mask|>", "<|start_header_id|>", "<|end_header_id|>"]
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    raw.train([str(data_file)], trainer)
    names = {"eos_token": special[0], "pad_token": special[0], "additional_special_tokens": special[1:]}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **names)
    tokenizer.chat_template = (
        "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def llada(tmp_path_factory, bpe) -> Path:
    return llada_checkpoint(tmp_path_factory.mktemp("llada") / "llada", bpe)


@pytest.fixture(scope="session")
def dream(tmp_path_factory, bpe) -> Path:
    return dream_checkpoint(tmp_path_factory.mktemp("dream") / "dream", bpe)


def launch(*argv) -> subprocess.CompletedProcess:
    """What `accelerate launch` makes of maskgrpo.py on two processes."""
    # `--cpu --num_processes 2` would start one process (accelerate issue 2741); this starts two, with gloo
    flags = "--multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0 maskgrpo.py".split()
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, *map(str, argv)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
