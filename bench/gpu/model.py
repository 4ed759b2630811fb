"""A model directory that vLLM runs at real speed without any weights: config.json, a tokenizer, nothing else.

Served with `--load-format dummy`, vLLM fills the weights with small random numbers, so that every matrix has its real
shape and type. The text is noise; the time that a step takes is not. Two things differ from the trained model: its
router prefers some experts where random numbers spread tokens evenly (so more experts are read per step here, never
fewer), and nothing ends by itself (requests ask for `ignore_eos`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.gpu.tools import PIECES

END = "<|im_end|>"
START = "<|im_start|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '" + START + " ' + m['role'] + ' ' + m['content'] + ' " + END + " ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + START + " assistant ' }}{% endif %}"
)

_COMMON: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "output_router_logits": False,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10_000_000,
    "router_aux_loss_coef": 0.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "use_sliding_window": False,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}

SHAPES: dict[str, dict[str, Any]] = {
    # Qwen3-Coder-30B-A3B-Instruct-FP8, as its published config.json has it
    "qwen3-coder-30b-a3b-fp8": _COMMON
    | {
        "hidden_size": 2048,
        "intermediate_size": 5472,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "max_position_embeddings": 262_144,
        "vocab_size": 151_936,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head"] + [f"model.layers.{i}.mlp.gate" for i in range(48)],
        },
    },
    # the same architecture, small enough to prove the whole benchmark on one CPU core
    "tiny": _COMMON
    | {
        "hidden_size": 64,
        "intermediate_size": 128,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
        "vocab_size": 4096,
        "torch_dtype": "float32",
    },
}


def make_model(folder: Path, shape: str) -> Path:
    """Writes the model directory of a shape (a key of SHAPES) below `folder` and returns its path."""
    config = SHAPES[shape]
    path = folder / shape
    path.mkdir(parents=True, exist_ok=True)
    _tokenizer(config["vocab_size"]).save(str(path / "tokenizer.json"))
    _write(path / "config.json", config)
    _write(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": END,
            "eos_token": END,
            "pad_token": "<|pad|>",
            "unk_token": "<|unk|>",
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    return path


def _tokenizer(size: int) -> Tokenizer:
    """One word per token, `w5` … : a prompt of n words is n tokens, and every token prints as text.

    The last ones are what tool calls are made of; so nothing is put between tokens when they become text.
    """
    special = ["<|pad|>", END, "<|unk|>", START]
    vocabulary = {token: i for i, token in enumerate(special)}
    vocabulary |= {f"w{i}": i for i in range(len(special), size - len(PIECES))}
    vocabulary |= {piece: i for i, piece in enumerate(PIECES, start=size - len(PIECES))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))  # noqa: S106 - a token of text
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def _write(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
