"""Engine profiles: one TOML file per model in `engine/profiles/`, and how they become vLLM's command line.

A profile holds what can be known before anything runs: which checkpoint, in which precision, on which hardware, with
which vLLM flags, and the model's published dimensions. The dimensions are enough to compute weights and KV cache, so
that "does it fit" is arithmetic here and not a crash after twenty minutes of loading.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib import resources
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine import embedded
from engine.errors import ProfileError

FlagValue = str | int | float | bool
Precision = Literal["bf16", "fp8", "int4"]

GIB = 2**30
OVERHEAD_GIB = 4.0
"""Allowance per GPU for activations, CUDA graphs and NCCL buffers, in GiB. An estimate: vLLM profiles the real one."""

_BYTES_PER_WEIGHT: Mapping[Precision, float] = {
    "bf16": 2.0,
    "fp8": 1.0,
    "int4": (4 + (16 + 4) / 128) / 8,  # AWQ and GPTQ: a 16-bit scale and a 4-bit zero point per group of 128
}
_EMBEDDING_BYTES = 2  # token embedding and output head stay 16 bit in all the checkpoints named here
_DOOR = "engine.scheduler.door.SchedulerDoor"
"""Tells, on the engine's own port, which scheduler runs and what it does; also where it is vLLM's own."""
_LAUNCHER_OWNS = ("model", "host", "port", "served-model-name", "scheduler-cls")


class ModelDimensions(BaseModel):
    """A model's published dimensions, named as in its config.json where that has a name."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    source: str
    """Where the numbers were published."""
    max_position_embeddings: int = Field(gt=0)
    """Longest context in tokens that the model was published for."""
    num_layers: int = Field(gt=0)
    hidden_size: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    """Width of the MLP, of one expert in a mixture of experts."""
    mlp_matrices: int = Field(default=3, ge=2)
    """Weight matrices per MLP: 3 with a gate (SwiGLU), 2 without (squared ReLU)."""
    num_experts: int = Field(default=1, gt=0)
    vocab_size: int = Field(gt=0)
    tie_word_embeddings: bool = False
    """The output head shares the token embedding's weights."""
    params_billion: float = Field(gt=0)
    """Published number of parameters, in 10^9."""
    active_params_billion: float = Field(gt=0)
    """Published number of parameters that one token passes through, in 10^9."""

    @property
    def block_params(self) -> int:
        """Parameters of attention and MLP matrices in all layers: what a quantised checkpoint quantises."""
        heads = 2 * (self.num_attention_heads + self.num_kv_heads) * self.head_dim * self.hidden_size
        mlp = self.mlp_matrices * self.hidden_size * self.intermediate_size * self.num_experts
        return self.num_layers * (heads + mlp)

    @property
    def embedding_params(self) -> int:
        """Parameters of the token embedding and the output head."""
        return self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)

    def weights_gib(self, precision: Precision) -> float:
        """Memory of all weights in GiB, over all GPUs."""
        blocks = self.block_params * _BYTES_PER_WEIGHT[precision]
        return (blocks + self.embedding_params * _EMBEDDING_BYTES) / GIB

    def kv_bytes_per_token(self, element_bytes: int = 2) -> int:
        """KV cache of one token in bytes, over all GPUs; `element_bytes` is 2 for bf16 and fp16, 1 for fp8."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * element_bytes


class Profile(BaseModel):
    """How one model is served by vLLM on one kind of machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: str
    """Name of the profile, and of its file."""
    title: str
    """One line for people."""
    hardware: str
    """What it is meant for, such as "2 x H200" or "cpu"."""
    gpu_count: int = Field(ge=0)
    gpu_memory_gib: float = Field(ge=0)
    """Memory of one GPU in GiB as the driver reports it (an H200's "141 GB" are 139 GiB to a program); 0 on a CPU."""
    checkpoint: str
    """Hugging Face id, or "embedded:NAME" for the model that the `cpu` extra brings along."""
    precision: Precision
    quant_block: int | None = None
    """Side of a block, or length of a group, of weights that share a scale: a GPU's share must be whole blocks."""
    served_name: str
    """The model's true name, which answers carry."""
    aliases: tuple[str, ...] = Field(default=(), strict=False)
    """Further names under which clients may ask for it."""
    tool_call_parser: str | None = None
    """vLLM's parser for this model's tool calls; None: the model has no tool calls."""
    scheduler_cls: str | None = "engine.scheduler.CoServingScheduler"
    """Scheduler class for co-serving, as a dotted name; None: the profile can't co-serve inside the engine."""
    unmet: tuple[str, ...] = Field(default=(), strict=False)
    """Why the user's requirement (context of 8,192 tokens, tools, fits the hardware) isn't met; empty if it is."""
    model: ModelDimensions
    flags: dict[str, FlagValue]
    """vLLM's flags without dashes; true is a bare flag, false its `--no-` form."""
    env: dict[str, str] = {}
    """Environment variables for vLLM's process."""

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        """Refuse a file that contradicts itself or its model."""
        if not 0 < self.max_model_len <= self.model.max_position_embeddings:
            raise ValueError("flags.max-model-len must be set, and not above the model's published maximum")
        owned = sorted({*_LAUNCHER_OWNS, "tool-call-parser", "enable-auto-tool-choice"} & self.flags.keys())
        if owned:
            raise ValueError(f"flags that follow from other fields must not be set: {', '.join(owned)}")
        if any(name.startswith("o") for name in self.published_names):
            raise ValueError("no published name may begin with 'o': client libraries take those for reasoning models")
        return self

    @property
    def published_names(self) -> tuple[str, ...]:
        """The true name, then the aliases: what `/v1/models` may list."""
        return (self.served_name, *self.aliases)

    @property
    def requirements_met(self) -> bool:
        """Whether the profile meets the user's requirement on its hardware."""
        return not self.unmet

    @property
    def embedded(self) -> bool:
        """The checkpoint is the one in the `cpu` extra, to be prepared on this machine first."""
        return self.checkpoint.startswith(embedded.PREFIX)

    @property
    def max_model_len(self) -> int:
        """Context in tokens (prompt and answer) that the profile serves."""
        return int(self.flags.get("max-model-len", 0))

    @property
    def tensor_parallel_size(self) -> int:
        """GPUs that one copy of the model is spread over."""
        return int(self.flags.get("tensor-parallel-size", 1))

    def kv_cache_tokens(self) -> int:
        """Tokens of KV cache that memory leaves, an estimate; negative by as much as the weights don't fit."""
        if self.gpu_count:
            usable = self.gpu_memory_gib * float(self.flags.get("gpu-memory-utilization", 0.92)) - OVERHEAD_GIB
            space = usable * self.gpu_count - self.model.weights_gib(self.precision)
        else:
            space = float(self.env.get("VLLM_CPU_KVCACHE_SPACE", "0"))
        return int(space * GIB) // self.model.kv_bytes_per_token()

    def vllm_args(
        self, model: str, host: str, port: int, coserving: bool, extra: Mapping[str, FlagValue] | None = None
    ) -> list[str]:
        """The arguments that follow `python -m vllm.entrypoints.openai.api_server`.

        `model` is the checkpoint's id or a directory, `coserving` chooses velocity's scheduler where the profile has
        one. `extra` overrides the profile's flags: keys with or without dashes or underscores, values as in `flags`.
        Raises ProfileError for a flag in `extra` that is the launcher's own.
        """
        args = ["--model", model, "--served-model-name", *self.published_names, "--host", host, "--port", str(port)]
        args += ["--middleware", _DOOR]
        if coserving and self.scheduler_cls:
            args += ["--scheduler-cls", self.scheduler_cls]
        merged: dict[str, FlagValue] = {}
        if self.tool_call_parser:
            merged |= {"enable-auto-tool-choice": True, "tool-call-parser": self.tool_call_parser}
        merged |= self.flags | _overrides(extra or {})
        for key, value in merged.items():
            if isinstance(value, bool):
                args.append(f"--{key}" if value else f"--no-{key}")
            else:
                args += [f"--{key}", str(value)]
        return args


def _overrides(extra: Mapping[str, FlagValue]) -> dict[str, FlagValue]:
    """`extra` with its keys as in `Profile.flags`, checked."""
    flags = {key.strip().lstrip("-").replace("_", "-"): value for key, value in extra.items()}
    owned = sorted(flags.keys() & set(_LAUNCHER_OWNS))
    if owned:
        raise ProfileError(f"velocity sets {', '.join('--' + key for key in owned)} itself; it can't be overridden.")
    return flags


def names() -> list[str]:
    """Names of the profiles that velocity brings along, sorted."""
    files = resources.files("engine").joinpath("profiles").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load(name: str) -> Profile:
    """Read one profile. Raises ProfileError where there is none of that name or its file is unusable."""
    known = names()
    if name not in known:
        raise ProfileError(f"There is no engine profile {name!r}. There are: {', '.join(known)}.")
    text = resources.files("engine").joinpath("profiles", f"{name}.toml").read_text(encoding="utf-8")
    try:
        profile = Profile.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise ProfileError(f"The engine profile {name!r} is unusable: {error}") from error
    if profile.name != name:
        raise ProfileError(f"The engine profile in {name}.toml calls itself {profile.name!r}.")
    return profile
