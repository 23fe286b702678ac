"""Fixtures: random checkpoints in the official on-disk formats, GSM8K-format data, and the scripts as commands."""

import json
import os
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


def random_weights(seed: int, top: dict, layers: str, layer: dict) -> dict:
    """Of two layers, from the shapes by name; those of norms are about 1."""
    torch.manual_seed(seed)
    shapes = top | {f"{layers}.{n}.{name}": shape for n in range(2) for name, shape in layer.items()}
    norm = lambda name: len(shapes[name]) == 1 and not name.endswith("bias")
    return {name: torch.randn(s) * (0.3 if len(s) > 1 else 0.1) + norm(name) for name, s in shapes.items()}


def llada_checkpoint(path: Path, tokenizer, codebook=0, change=lambda config, weights: None) -> Path:
    """A random checkpoint with LLaDA's config.json and weight names: hidden 32, 2 layers, 4 heads. With a codebook:
    MMaDA's, whose image codes follow the tokenizer's tokens."""
    d, f, v = 32, 48, len(tokenizer) + codebook
    config = {
        "architectures": ["LLaDAModelLM"], "model_type": "llada", "auto_map": {"AutoModel": "modeling_llada.LLaDAModelLM"},
        "d_model": d, "mlp_hidden_size": f, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "vocab_size": v, "embedding_size": v,
        "max_sequence_length": 512, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "weight_tying": False,
        "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        "mask_token_id": tokenizer.convert_tokens_to_ids("<|mdm_mask|>"),
    }  # fmt: skip
    if codebook:
        config |= {"architectures": ["MMadaModelLM"], "model_type": "mmada", "num_vq_tokens": 16}
        config |= {"codebook_size": codebook, "new_vocab_size": v}
    shapes = {(d,): "attn_norm ff_norm", (d, d): "q_proj k_proj v_proj attn_out", (f, d): "ff_proj up_proj"}
    layer = {f"{name}.weight": s for s, names in (shapes | {(d, f): "ff_out"}).items() for name in names.split()}
    top = {"wte.weight": (v, d), "ln_f.weight": (d,), "ff_out.weight": (v, d)}
    top = {f"model.transformer.{name}": shape for name, shape in top.items()}
    weights = random_weights(0, top, "model.transformer.blocks", layer)
    change(config, weights)
    return write_checkpoint(path, config, weights, tokenizer)


def write_checkpoint(path: Path, config: dict, weights: dict, tokenizer) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(path)
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
    """A random checkpoint with Dream's config.json and weight names: Qwen2-shaped, 2 key heads for 4 query heads."""
    d, f, v = 32, 48, len(bpe)
    config = {
        "architectures": ["DreamModel"], "model_type": "Dream", "auto_map": {"AutoModel": "modeling_dream.DreamModel"},
        "hidden_size": d, "intermediate_size": f, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": v, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "rope_scaling": None,
        "tie_word_embeddings": False, "hidden_act": "silu", "attention_dropout": 0.0, "use_cache": True,
        "bos_token_id": bpe.eos_token_id, "eos_token_id": bpe.eos_token_id, "pad_token_id": bpe.pad_token_id,
        "mask_token_id": bpe.convert_tokens_to_ids("<|mdm_mask|>"),
    }  # fmt: skip
    top = {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)}
    layer = {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,), "self_attn.o_proj.weight": (d, d)}
    layer |= {"mlp.gate_proj.weight": (f, d), "mlp.up_proj.weight": (f, d), "mlp.down_proj.weight": (d, f)}
    for part, rows in (("q", d), ("k", 16), ("v", 16)):
        layer |= {f"self_attn.{part}_proj.weight": (rows, d), f"self_attn.{part}_proj.bias": (rows,)}
    weights = random_weights(1, top, "model.layers", layer)
    path = write_checkpoint(tmp_path_factory.mktemp("dream") / "dream", config, weights, bpe)
    bpe.backend_tokenizer.model.save(str(path))  # Dream ships vocab.json and merges.txt, and a tokenizer of its own
    (path / "tokenizer.json").unlink()
    own = {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]},
    }
    (file := path / "tokenizer_config.json").write_text(json.dumps(json.loads(file.read_text()) | own))
    return path
