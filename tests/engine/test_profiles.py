"""The engine profiles: coherent in themselves, true to the models, and accepted by the real vLLM's own parser."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine import profile as profiles
from engine.errors import ProfileError
from engine.profile import FlagValue, Profile

REQUIRED_CONTEXT = 8192
EXPECTED = ["cpu", "llama-3.1-405b", "llama-3.1-70b", "mixtral-8x22b", "nemotron-4-340b", "velocity-30b"]

# vLLM is imported in a process of its own: it takes seconds, warns, and sets up logging for whoever imports it.
VLLM_SCRIPT = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.tool_parsers import ToolParserManager
from vllm.utils.argparse_utils import FlexibleArgumentParser

parser = make_arg_parser(FlexibleArgumentParser())
parsed = {}
for name, args in json.load(open(sys.argv[1])).items():
    namespace = parser.parse_args(args)
    validate_parsed_serve_args(namespace)
    if namespace.tool_call_parser:
        ToolParserManager.get_tool_parser(namespace.tool_call_parser)  # really loads the class
    parsed[name] = vars(namespace)
answer = {"parsed": parsed, "tool_parsers": ToolParserManager.list_registered()}
json.dump(answer, open(sys.argv[2], "w"), default=str)
"""


@pytest.fixture(params=EXPECTED)
def profile(request: pytest.FixtureRequest) -> Profile:
    return profiles.load(request.param)


@pytest.fixture(scope="module")
def vllm_view(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the real vLLM makes of the arguments: {"parsed": {profile: {option: value}}, "tool_parsers": [name]}."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed (extra cpu)")
    folder: Path = tmp_path_factory.mktemp("vllm")
    wanted, answer = folder / "args.json", folder / "answer.json"
    arguments = {name: profiles.load(name).vllm_args("/model", "127.0.0.1", 8000, coserving=True) for name in EXPECTED}
    arguments["overridden"] = profiles.load("cpu").vllm_args(
        "/model", "127.0.0.1", 8000, coserving=False, extra={"max_model_len": 4096, "enforce-eager": False}
    )
    wanted.write_text(json.dumps(arguments))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    done = subprocess.run(
        [sys.executable, "-c", VLLM_SCRIPT, str(wanted), str(answer)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    result: dict[str, Any] = json.loads(answer.read_text())
    return result


def test_names_are_the_six_profiles() -> None:
    assert profiles.names() == EXPECTED


@pytest.mark.parametrize("name", ["gpt-5", "", "../profile", "cpu.toml"])
def test_unknown_profile_is_named_with_the_known_ones(name: str) -> None:
    with pytest.raises(ProfileError, match=r"There is no engine profile .*cpu, llama"):
        profiles.load(name)


def test_dimensions_give_the_published_number_of_parameters(profile: Profile) -> None:
    """A wrong layer, width, head or expert count shows here; all of them enter the number of parameters."""
    computed = (profile.model.block_params + profile.model.embedding_params) / 1e9
    assert computed == pytest.approx(profile.model.params_billion, rel=0.002)


def test_kv_bytes_agree_with_a_measured_engine() -> None:
    """vLLM reported 93,184 tokens in 2 GiB for this model: whole blocks of 128."""
    assert profiles.load("cpu").kv_cache_tokens() // 128 * 128 == 93_184


def test_context_is_within_the_published_maximum(profile: Profile) -> None:
    assert 0 < profile.max_model_len <= profile.model.max_position_embeddings


def test_heads_and_quantised_blocks_divide_by_tensor_parallel_size(profile: Profile) -> None:
    size, model = profile.tensor_parallel_size, profile.model
    assert model.num_attention_heads % size == 0
    assert model.num_kv_heads % size == 0
    assert model.intermediate_size % size == 0
    assert profile.gpu_count in {0, size}
    if profile.quant_block:
        shares = [
            model.intermediate_size,
            *(h * model.head_dim for h in (model.num_attention_heads, model.num_kv_heads)),
        ]
        assert [share // size % profile.quant_block for share in shares] == [0, 0, 0]


def test_four_way_split_of_the_fp8_experts_would_not_divide() -> None:
    """The known trap of this checkpoint, so that the check above is known to see it."""
    velocity = profiles.load("velocity-30b")
    assert velocity.quant_block is not None
    assert velocity.model.intermediate_size // 4 % velocity.quant_block != 0


def test_unmet_has_reasons_exactly_where_a_requirement_is_not_met(profile: Profile) -> None:
    failures = {
        "context": profile.max_model_len < REQUIRED_CONTEXT,
        "tool": profile.tool_call_parser is None,
        "fit": profile.kv_cache_tokens() < profile.max_model_len,
    }
    assert len(profile.unmet) == sum(failures.values())
    for word, failed in failures.items():
        assert any(word in reason for reason in profile.unmet) is failed
    assert profile.requirements_met is not any(failures.values())


def test_only_nemotron_does_not_meet_the_requirements() -> None:
    assert [name for name in EXPECTED if not profiles.load(name).requirements_met] == ["nemotron-4-340b"]


@pytest.mark.parametrize(
    ("name", "fits", "does_not"),
    [
        ("llama-3.1-405b", {"int4"}, {"fp8", "bf16"}),
        ("llama-3.1-70b", {"int4", "fp8", "bf16"}, set()),
        ("mixtral-8x22b", {"int4", "fp8"}, {"bf16"}),
        ("nemotron-4-340b", {"int4"}, {"fp8", "bf16"}),
        ("velocity-30b", {"int4", "fp8", "bf16"}, set()),
    ],
)
def test_which_precisions_fit_two_h200(name: str, fits: set[str], does_not: set[str]) -> None:
    loaded = profiles.load(name)
    tokens = {p: loaded.model_copy(update={"precision": p}).kv_cache_tokens() for p in ("int4", "fp8", "bf16")}
    assert {p for p, kept in tokens.items() if kept >= loaded.max_model_len} == fits
    assert {p for p, kept in tokens.items() if kept < loaded.max_model_len} == does_not


def test_no_published_name_begins_with_o_and_none_is_twice(profile: Profile) -> None:
    assert not [name for name in profile.published_names if name.startswith("o")]
    assert len(set(profile.published_names)) == len(profile.published_names)


@pytest.mark.parametrize("name", ["cpu", "velocity-30b"])
def test_clients_settings_work_on_a_laptop_and_in_production(name: str) -> None:
    assert "velocity-30b" in profiles.load(name).published_names


def test_arguments_of_the_cpu_profile() -> None:
    args = profiles.load("cpu").vllm_args("/cache/model", "127.0.0.1", 8123, coserving=False)
    assert args[:12] == [
        *("--model", "/cache/model"),
        *("--served-model-name", "SmolLM2-135M-Instruct", "velocity-30b"),
        *("--host", "127.0.0.1", "--port", "8123"),
        *("--middleware", "engine.scheduler.door.SchedulerDoor"),
        "--enable-auto-tool-choice",
    ]
    assert "--scheduler-cls" not in args
    assert "--enforce-eager" in args


def test_coserving_adds_the_scheduler_where_there_is_one() -> None:
    cpu = profiles.load("cpu")
    args = cpu.vllm_args("/m", "127.0.0.1", 1, coserving=True)
    assert args[args.index("--scheduler-cls") + 1] == "engine.scheduler.CoServingScheduler"
    plain = cpu.model_copy(update={"scheduler_cls": None})
    assert "--scheduler-cls" not in plain.vllm_args("/m", "127.0.0.1", 1, coserving=True)


def test_overrides_replace_flags_whichever_way_they_are_written() -> None:
    extra: dict[str, FlagValue] = {
        "max_model_len": 4096,
        "--enforce-eager": False,
        "tool-call-parser": "pythonic",
        "kv-cache-dtype": "fp8",
    }
    args = profiles.load("cpu").vllm_args("/m", "127.0.0.1", 1, coserving=True, extra=extra)
    assert args.count("--max-model-len") == 1
    assert args[args.index("--max-model-len") + 1] == "4096"
    assert args[args.index("--tool-call-parser") + 1] == "pythonic"
    assert args[args.index("--kv-cache-dtype") + 1] == "fp8"
    assert "--no-enforce-eager" in args
    assert "--enforce-eager" not in args


@pytest.mark.parametrize("key", ["model", "--port", "served_model_name", "scheduler-cls"])
def test_what_the_launcher_sets_is_not_overridden(key: str) -> None:
    with pytest.raises(ProfileError, match="itself"):
        profiles.load("cpu").vllm_args("/m", "127.0.0.1", 1, coserving=True, extra={key: "x"})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"served_name": "o-model"}, "begin with 'o'"),
        ({"flags": {"max-model-len": 8193}}, "published maximum"),
        ({"flags": {}}, "max-model-len"),
        ({"flags": {"max-model-len": 8192, "port": 1}}, "port"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(changed: dict[str, object], message: str) -> None:
    whole = profiles.load("cpu").model_dump()
    with pytest.raises(ValueError, match=message):
        Profile.model_validate(whole | changed)


@pytest.mark.vllm
def test_vllm_takes_every_flag_for_what_it_was_meant(vllm_view: dict[str, Any], profile: Profile) -> None:
    parsed = vllm_view["parsed"][profile.name]
    for key, value in profile.flags.items():
        assert parsed[key.replace("-", "_")] == value, key
    assert parsed["served_model_name"] == list(profile.published_names)
    assert (parsed["model"], parsed["host"], parsed["port"]) == ("/model", "127.0.0.1", 8000)
    assert parsed["scheduling_policy"] == "priority"
    assert parsed["scheduler_cls"] == profile.scheduler_cls
    assert parsed["middleware"] == ["engine.scheduler.door.SchedulerDoor"]
    assert parsed["enable_auto_tool_choice"] is (profile.tool_call_parser is not None)
    assert parsed["max_num_seqs"] <= parsed["max_num_batched_tokens"]  # else vLLM refuses to start


@pytest.mark.vllm
def test_tool_call_parser_is_in_vllms_registry(vllm_view: dict[str, Any], profile: Profile) -> None:
    assert profile.tool_call_parser is None or profile.tool_call_parser in vllm_view["tool_parsers"]


@pytest.mark.vllm
def test_vllm_takes_overrides(vllm_view: dict[str, Any]) -> None:
    parsed = vllm_view["parsed"]["overridden"]
    assert (parsed["max_model_len"], parsed["enforce_eager"], parsed["scheduler_cls"]) == (4096, False, None)
