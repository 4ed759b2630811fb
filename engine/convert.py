"""Turns a GGUF model into a directory that vLLM serves: `python -m engine.convert SOURCE.gguf TARGET`.

A program of its own, because it needs torch and transformers (extra `cpu`), which no other part of velocity imports.
The embedded model comes as GGUF in a package; vLLM reads bf16 safetensors. Each stage is one JSON line on stdout.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers


def report(stage: str, share: float) -> None:
    """One line of progress; `share` is the part of the work that is done, 0 to 1."""
    sys.stdout.write(json.dumps({"stage": stage, "share": share}) + "\n")
    sys.stdout.flush()


def convert(source: Path, target: Path) -> None:
    """Read the GGUF file and write config, tokenizer, chat template and bf16 weights into `target`."""
    transformers.utils.logging.disable_progress_bar()
    where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    report("reading the tokenizer", 0.05)
    tokenizer = transformers.AutoTokenizer.from_pretrained(**where)
    report("reading and dequantising the weights", 0.2)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=transformers.GgufConfig(dequantize=True)
    )
    report("writing bf16 weights", 0.8)
    tokenizer.chat_template = Path(__file__).with_name("profiles").joinpath("smollm2.jinja").read_text()
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    report("ready", 1.0)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
