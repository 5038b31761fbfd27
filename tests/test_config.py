"""YAML and keywords to configuration to vLLM's arguments; each mistake in one line."""

import time
from pathlib import Path

import pytest
import yaml

from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ARCHITECTURE, ProxyConfig, ProxySection
from vllm_proxy.evaluate.tuned import read_tuned

MEMBERS = {"base": "big", "expert": "small-chat", "antiexpert": "small"}
SHIPPED = (Path(__file__).parents[1] / "configs").glob("**/*.yaml")
CONFIGS = sorted(path for path in SHIPPED if path.parent.name != "tasks")


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"experts": {"a b": "x"}},
            "experts.a b: a name has letters, digits, `.`, `_` and `-`; give another name",
        ),
        (
            {"experts": {"base": "x"}},
            "`experts.base`: it is the name of a member; give another name",
        ),
        ({"experts": {"x": ""}}, "`experts.x` is '': String should have at least 1 character"),
        ({"experts": ["x"]}, "`experts` is ['x']: it must be a valid dictionary"),
        *(
            (
                {"experts": {"x": "y"}, **more},
                "`experts` are adapters of the antiexpert's model, in one pass with it; give "
                "`antiexpert`, and as `expert` nothing or the same model with an adapter; remove "
                "`one_pass: false`",
            )
            for more in (
                {"expert": "other"},
                {"one_pass": False},
                {"expert": {"model": "s", "revision": "v"}},
            )
        ),
    ],
)
def test_experts_are_adapters_of_the_antiexpert(values, message):
    with pytest.raises(ProxyConfigError) as caught:
        ProxyConfig.parse({"base": "b", "antiexpert": "s", **values}, "test")
    assert str(caught.value) == f"test: {message}"


@pytest.mark.parametrize("default", [None, "d"])
def test_experts_have_slots(default):
    """Also as vLLM's processes read the configuration."""
    values = {"base": "b", "antiexpert": "s", "experts": {"legal": "x", "terse": "y"}}
    if default:
        values["expert"] = {"model": "s", "lora": default}
    config = ProxyConfig.parse(values, "test")
    section = ProxySection.parse(config.hf_overrides()["proxy"], "test")
    for one in (config, section):
        assert one.may_run_as_one
        assert [*one.adapters.items()] == [(None, default), ("legal", "x"), ("terse", "y")]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    config = ProxyConfig.from_yaml(path)
    assert config.antiexpert != config.expert
    assert config.sampling["max_tokens"] > 0


def test_members_are_strings_or_mappings(tmp_path):
    text = "base: {model: big, revision: v2}\nexpert: small-chat\nantiexpert: small\nalpha: 2"
    config = ProxyConfig.from_yaml(write(tmp_path / "c.yaml", text))
    assert (config.base.model, config.base.revision) == ("big", "v2")
    assert (config.expert.model, config.expert.revision) == ("small-chat", None)
    assert config.alpha == 2.0
    assert config.engine_args()["revision"] == "v2"


def test_engine_arguments_carry_the_members():
    engine = {"tensor_parallel_size": 8, "hf_overrides": {"rope_theta": 5.0}}
    config = ProxyConfig.parse({**MEMBERS, "alpha": 0.5, "engine": engine}, "test")
    assert config.engine_args() == {
        "model": "big",
        "tensor_parallel_size": 8,
        "hf_overrides": {
            "rope_theta": 5.0,
            "architectures": [ARCHITECTURE],
            "proxy": {
                "expert": {"model": "small-chat"},
                "antiexpert": {"model": "small"},
                "alpha": 0.5,
            },
        },
    }


def test_proxy_section_reads_what_the_stock_command_writes():
    section = ProxySection.parse({"expert": "a", "antiexpert": {"model": "b"}}, "hf_overrides")
    assert (section.expert.model, section.antiexpert.model, section.alpha) == ("a", "b", 1.0)


@pytest.mark.parametrize(
    "values",
    [
        {"alpha": "adaptive"},
        {"alpha": {"alpha": 2.0, "schedule": "linear", "steps": 5}},
        {"filters": {"top_p": 0.9}},
        {"filters": {"top_p": 0.9, "plausibility": 0.1}},
        {"chat": {"expert": "template"}},
        {"chat": {"base": "plain"}},
        {"speculate": {"tokens": 4}},
        {"speculate": {"tokens": 4, "requests": 8, "adapt": False}},
    ],
    ids=str,
)
def test_overrides_say_what_was_given_and_no_more(values):
    config = ProxyConfig.parse({**MEMBERS, **values}, "test")
    section = config.hf_overrides()["proxy"]
    members = {role: {"model": MEMBERS[role]} for role in ("expert", "antiexpert")}
    assert section == {**members, "alpha": 1.0, **values}
    read = ProxySection.parse(section, "hf_overrides")
    assert (read.control, read.chat) == (config.control, config.chat)


def test_formats_that_are_not_named_are_plain():
    chat = ProxyConfig.parse({**MEMBERS, "chat": {"expert": "template"}}, "test").chat
    assert [chat.of(role) for role in ROLES] == ["plain", "template", "plain"]


def test_serve_arguments_mean_the_same_to_vllms_parser():
    """The words of `vllm serve` give the engine what `ProxyLLM` would give it."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    engine = {
        "tensor_parallel_size": 2,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "max_model_len": 512,
        "dtype": "float32",
        "override_generation_config": {"temperature": 0.0},
        "seed": 3,
    }
    config = ProxyConfig.parse({**MEMBERS, "engine": engine}, "test")
    model, *words = config.serve_arguments()
    parsed = EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(words)
    assert model == "big"
    for name, value in config.engine_args().items():
        if name != "model":
            assert getattr(parsed, name) == value


@pytest.mark.parametrize(
    ("values", "field", "value", "word"),
    [
        ({"alpah": 1}, "alpah", None, "did you mean `alpha`?"),
        ({"base": {"model": "x", "revison": "y"}}, "base.revison", None, "`revision`"),
        ({"base": None}, "base", "None", "a member is a path"),
        ({"base": ""}, "base.model", "''", "at least 1 character"),
        ({"base": 7}, "base", "7", "a member is a path"),
        ({"base": {"model": "x", "lora": "y"}}, "base.lora", "'y'", "PEFT"),
        ({"alpha": float("nan")}, "alpha", "nan", "finite"),
        ({"alpha": float("inf")}, "alpha", "inf", "finite"),
        ({"alpha": "1.0"}, "alpha", "'1.0'", "give a finite number"),
        ({"alpha": True}, "alpha", "True", "give a finite number"),
        ({"alpha": {"schedule": "cosine", "steps": 3}}, "alpha.schedule", "'cosine'", "'linear'"),
        ({"alpha": {"schedule": "first"}}, "alpha.steps", None, "add `alpha.steps: <value>`"),
        ({"alpha": {"schedule": "first", "steps": 0}}, "alpha.steps", "0", "equal to 1"),
        ({"alpha": {"schdule": "first"}}, "alpha.schdule", None, "did you mean `schedule`?"),
        ({"filters": {"top_p": 1.5}}, "filters.top_p", "1.5", "equal to 1"),
        ({"filters": {"plausible": 0.1}}, "filters.plausible", None, "mean `plausibility`?"),
        ({"chat": "template"}, "chat", "'template'", "dictionary"),
        ({"chat": {}}, "chat", "{}", "name a member"),
        ({"chat": {"expert": "llama2"}}, "chat.expert", "'llama2'", "'template' or 'plain'"),
        ({"chat": {"exprt": "plain"}}, "chat.exprt", None, "did you mean `expert`?"),
        ({"speculate": 4}, "speculate", "4", "dictionary"),
        ({"speculate": {}}, "speculate.tokens", None, "add `speculate.tokens: <value>`"),
        ({"speculate": {"tokens": 0}}, "speculate.tokens", "0", "greater than or equal to 1"),
        ({"speculate": {"tokens": 129}}, "speculate.tokens", "129", "less than or equal to 128"),
        ({"speculate": {"tokens": 4, "requests": 0}}, "speculate.requests", "0", "equal to 1"),
        ({"speculate": {"tokens": 4, "adapt": "no"}}, "speculate.adapt", "'no'", "boolean"),
        ({"speculate": {"tokens": "4"}}, "speculate.tokens", "'4'", "integer"),
        ({"speculate": {"tokns": 4}}, "speculate.tokns", None, "did you mean `tokens`?"),
        (
            {"speculate": {"tokens": 4}, "engine": {"speculative_config": {"method": "ngram"}}},
            "speculate",
            None,
            "remove one of them",
        ),
        ({"engine": [1]}, "engine", "[1]", "dictionary"),
        ({"engine": {"model": "x"}}, "engine.model", None, "set `base` instead"),
        ({"engine": {"revision": "x"}}, "engine.revision", None, "set `base:"),
        ({"engine": {"hf_overrides": "x"}}, "engine.hf_overrides", "'x'", "mapping"),
        ({"engine": {"hf_overrides": {"proxy": {}}}}, "engine.hf_overrides.proxy", None, "remove"),
        (
            {"engine": {"hf_overrides": {"rope": [{"theta": float("nan")}]}}},
            "engine.hf_overrides.rope.theta",
            None,
            "give one",
        ),
        ({"engine": {1: 2}}, "engine.1", None, "write the key in quotes"),
        ({1: 2}, "1", None, "write the key in quotes"),
        ({"one_pass": True}, "one_pass", "True", "`expert: {model: <the antiexpert>, lora: …}`"),
    ],
)
def test_mistakes_are_one_line_with_field_value_and_remedy(values, field, value, word):
    with pytest.raises(ProxyConfigError) as caught:
        ProxyConfig.parse({**MEMBERS, **values}, "config 'c.yaml'")
    error = caught.value
    assert (error.field, error.value) == (field, value)
    assert word in error.remedy
    assert str(error).startswith("config 'c.yaml': ")
    assert all(part in str(error) for part in (field, value or "", error.remedy))
    assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("values", "field", "word"),
    [
        ({"expert": "a", "antiexpert": "b"}, "base", "add `base: <value>`"),
        ({"base": "a"}, "expert", "add one of them"),
        ({"base": "a", "antiexpert": "b", "speculate": {"tokens": 4}}, "speculate", "add one"),
        (
            {"base": "a", "expert": "b", "chat": {"antiexpert": "plain"}},
            "chat.antiexpert",
            "remove it",
        ),
    ],
)
def test_a_missing_member_is_named(values, field, word):
    with pytest.raises(ProxyConfigError) as error:
        ProxyConfig.parse(values, "test")
    assert error.value.field == field
    assert word in error.value.remedy


def test_the_json_schema_describes_every_field():
    schema = ProxyConfig.model_json_schema()
    ours = ("Member", "ChatFormats", "Speculate")
    for described in (schema, *(schema["$defs"][name] for name in ours)):
        for name, field in described["properties"].items():
            assert len(field.get("description", "")) > 10, name


@pytest.mark.parametrize(
    ("options", "schedule"),
    [
        ({"adapt": False}, None),
        ({}, [(1, 1, 4)]),  # what is drafted for one request is drafted for any number
        ({"requests": 8}, [(1, 8, 4), (9, 9, 0)]),
    ],
)
def test_drafts_are_an_engine_argument(options, schedule):
    values = {**MEMBERS, "base": {"model": "big", "revision": "v2"}}
    values["speculate"] = {"tokens": 4, **options}
    wanted = {
        "method": "draft_model",
        "model": "big",
        "revision": "v2",
        "num_speculative_tokens": 4,
        "num_speculative_tokens_per_batch_size": schedule,
    }
    found = ProxyConfig.parse(values, "test").engine_args()["speculative_config"]
    assert found == {key: value for key, value in wanted.items() if value is not None}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("base: [", "not YAML at line 1"),
        ("just words", "expected a mapping"),
        ("", "expected a mapping"),
    ],
)
def test_broken_files_are_one_line(tmp_path, text, words):
    with pytest.raises(ProxyConfigError, match=words) as error:
        ProxyConfig.from_yaml(write(tmp_path / "c.yaml", text))
    assert "\n" not in str(error.value)


def bomb(levels: int, fan: int) -> str:
    """Return a YAML file that means *fan* to the power of *levels* words."""
    lines = [f"a0: &a0 [{', '.join(['x'] * fan)}]"]
    for level in range(1, levels):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * fan)}]")
    return "\n".join(lines)


CHAIN = "\n".join(
    f"a{i}: &a{i} {'[' * 40}{f'*a{i - 1}' if i else 'x'}{']' * 40}" for i in range(60)
)
"""Lists within lists, more levels through aliases than any line has."""
HOSTILE = {
    "bomb": (bomb(12, 10), "line 4: more than 131,072 characters, with aliases written out"),
    "bomb of few values": (f"a: &a {'x' * 100_000}\nb: [*a, *a]", "line 2: more than 131,072"),
    "deep": ("engine: " + "[" * 2000 + "]" * 2000, "line 1: more than 64 levels deep"),
    "deep mappings": ("{a: " * 2000, "line 1: more than 64 levels deep"),
    "deep by dashes": ("- " * 2000 + "x", "line 1: more than 64 levels deep"),
    "deep by keys": ("? " * 50_000, "line 1: more than 64 levels deep"),
    "deep by aliases": (CHAIN, "line 2: more than 64 levels deep"),
    "itself": ("engine: &a [*a]", "line 1: an alias within what it stands for"),
    "many": ("engine: [" + "1," * 60_000 + "1]", "line 1: more than 131,072 characters"),
    "large": ("# " + "x" * 150_000, "more than 131,072 bytes"),
    "twice": ("alpha: 1\nbase: x\nalpha: 2", "line 3: the key `alpha` again, which line 1 has"),
    "twice below": ("engine: {seed: 1, 'seed': 2}", "line 1: the key `seed` again"),
    "a date": ("base: x\nengine: {seed: 2026-01-31}", "line 2: '2026-01-31' is read as a value of"),
    "no date": ("alpha: 2026-13-31", "line 1: '2026-13-31' is read as a value of the kind `tim"),
    "a huge integer": ("alpha: " + "1" * 5000, "line 1: '1111"),
    "no number": ("alpha: !!float x", "line 1: 'x' is read as a value of the kind `float`"),
    "a set": ("engine: !!set {a, b}", "line 1: this is read as a value of the kind `set`"),
    "bytes": ("base: !!binary aGk=", "line 1: 'aGk=' is read as a value of the kind `binary`"),
    "pairs": ("engine: !!omap [a: 1]", "line 1: this is read as a value of the kind `omap`"),
    "code": ("base: !!python/name:os.system", "not YAML at line 1: could not determine"),
    "a key that is no text": ("engine: {no: 1}", "line 1: a key is read as False, not as text"),
    "half a character": ('base: "\\ud800"', r"line 1: '\ud800' is read as a value of the kind"),
    "a character that none may have": ("base: \x00", "special characters are not allowed"),
}


@pytest.mark.parametrize(("text", "words"), HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_one_line_in_seconds(tmp_path, text, words):
    file = write(tmp_path / "c.yaml", text)
    for read in (ProxyConfig.from_yaml, lambda path: read_tuned(str(path))):
        start = time.thread_time()
        with pytest.raises(ProxyConfigError) as error:
            read(file)
        assert time.thread_time() - start < 5  # without a limit, minutes or all memory
        assert words in str(error.value)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 300


def test_aliases_and_merged_keys_are_taken(tmp_path):
    text = """
    base: big
    expert: &small {model: small, revision: chat}
    antiexpert: {<<: *small, revision: main}
    engine: &engine {seed: 1}
    sampling: *engine
    """
    config = ProxyConfig.from_yaml(write(tmp_path / "c.yaml", text))
    assert [str(config.member(role)) for role in ROLES] == ["big", "small@chat", "small@main"]
    assert config.engine == config.sampling == {"seed": 1}


def test_absent_file_is_named(tmp_path):
    with pytest.raises(ProxyConfigError, match=r"no\.yaml': No such file"):
        ProxyConfig.from_yaml(tmp_path / "no.yaml")


def test_keyword_arguments_and_yaml_agree(tmp_path):
    values = {**MEMBERS, "alpha": 1.5, "engine": {"seed": 1}, "sampling": {"top_k": 3}}
    from_yaml = ProxyConfig.from_yaml(write(tmp_path / "c.yaml", yaml.safe_dump(values)))
    assert from_yaml == ProxyConfig.parse(values, "keywords")
