"""`check`: one test a mistake, asserting the words that name field, value and remedy."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
import vllm
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.checks import Mutate, edit_tensors, run, set_config
from support.quantized import write_quantized
from support.stand_ins import write_hole
from support.tiny_models import CONTEXT, VOCAB_SIZE, write_model, write_tokenizer, write_triple
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.roles import ROLES
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.members.weights import safetensors_header
from vllm_proxy.preflight.check.run import CheckReport, render, require_valid


@pytest.fixture(scope="module")
def triple(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_triple(tmp_path_factory.mktemp("triple"), "llama")


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def changed(triple: dict[str, str], tmp_path: Path, mutate: Mutate) -> dict[str, str]:
    """Return the triple with an expert that is a copy, changed by *mutate*."""
    copy = tmp_path / "changed"
    shutil.copytree(triple["expert"], copy)
    mutate(copy)
    return {**triple, "expert": str(copy)}


def only_problem(report: CheckReport) -> str:
    assert len(report.problems) == 1, report.problems
    assert "\n" not in report.problems[0]
    return report.problems[0]


# -- a configuration without mistakes --------------------------------------------------------------


def test_figures_of_a_good_triple_are_the_real_models(triple):
    report = run(triple)
    assert report.problems == ()
    assert [member.role for member in report.members] == ["base", "expert", "antiexpert"]
    for member in report.members:
        model = AutoModelForCausalLM.from_pretrained(triple[member.role])
        assert member.parameters == sum(parameter.numel() for parameter in model.parameters())
        assert member.tokenizer_size == len(AutoTokenizer.from_pretrained(triple[member.role]))
        assert member.vocabulary == VOCAB_SIZE
        assert member.context_length == CONTEXT
        assert member.tied == (member.role != "base")
        assert (member.architecture, member.dtype) == ("LlamaForCausalLM", "float32")
        assert member.quantization is None


def test_kv_cache_bytes_are_those_of_the_configs(triple):
    sizes = []
    for path in triple.values():
        values = json.loads(Path(path, "config.json").read_text())
        head_size = values["hidden_size"] // values["num_attention_heads"]
        numbers = 2 * values["num_hidden_layers"] * values["num_key_value_heads"] * head_size
        sizes.append(numbers * 4)  # float32
    report = run(triple, engine={"dtype": "float32"})
    wanted = "base {:,}, expert {:,}, antiexpert {:,}, ".format(*sizes)
    wanted += f"{sum(sizes):,} bytes per token in total (float32)"
    assert any(wanted in sentence for sentence in report.notes), report.notes


def test_kv_heads_fewer_than_ranks_are_copied(triple):
    def total(ranks: int) -> int:
        report = run(triple, engine={"tensor_parallel_size": ranks})
        (sentence,) = (s for s in report.notes if "bytes per token" in s)
        return int(sentence.split(" bytes per token")[0].split()[-1].replace(",", ""))

    assert total(4) == 2 * total(2) == 2 * total(1)  # two KV heads


def test_seams_say_what_will_run(triple):
    report = run(triple, alpha=0.0, engine={"max_model_len": 96, "dtype": "bfloat16"})
    assert "`alpha` is 0: the logits are the base's alone." in report.notes
    assert "A sequence (prompt and completion) has at most 96 tokens." in report.notes
    assert any("all members run in bfloat16" in sentence for sentence in report.notes)
    same = run(triple, antiexpert=triple["expert"])
    assert any(
        "the shift is always zero, except for requests" in sentence for sentence in same.notes
    )


def test_unlike_vocabularies_are_a_seam(triple, tmp_path):
    small = {"seed": 3, "vocab_size": VOCAB_SIZE - 64}
    expert = str(write_model(tmp_path / "small", **small))
    report = run(triple, expert=expert, antiexpert=expert)
    assert report.problems == ()
    wanted = "ids 448 to 511, which not every member has, are never generated"
    assert any(wanted in sentence for sentence in report.notes), report.notes
    large = str(write_model(tmp_path / "large", seed=3, vocab_size=VOCAB_SIZE + 64))
    report = run(triple, expert=large, antiexpert=large)
    wanted = "ids from 512 on, which the base does not have, are never generated"
    assert any(wanted in sentence for sentence in report.notes), report.notes


def test_headers_of_files_larger_than_any_memory_are_read(tmp_path):
    write_hole(tmp_path / "large.safetensors", {"weight": [2**40, 4]}, "bfloat16")
    assert safetensors_header(tmp_path / "large.safetensors") == {"weight": (2**40, 4)}


def test_a_model_used_twice_is_read_once(triple, monkeypatch):
    opened = []

    def count(file, **options):
        opened.append(Path(file).parent)
        return safe_open(file, **options)

    monkeypatch.setattr("safetensors.safe_open", count)
    run(triple, antiexpert=triple["expert"])
    assert opened == [Path(triple["base"]), Path(triple["expert"])]


def test_render_shows_members_seams_and_problems(triple):
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render(run(triple)))
    text = console.export_text()
    assert "antiexpert" in text
    assert "LlamaForCausalLM" in text
    assert "no problems" in text
    console.print(render(run(triple, sampling={"max_tokens": -1})))
    assert "✗ `sampling.max_tokens` is -1" in console.export_text()


def test_require_valid_raises_the_first_problem_and_counts_the_rest(triple):
    config = ProxyConfig.parse({**triple, "sampling": {"n": 0}}, "test")
    with pytest.raises(ProxyConfigError, match=r"`sampling.n` is 0: .*[^)]$"):
        require_valid(config)
    config = ProxyConfig.parse({**triple, "sampling": {"n": 0, "top_p": 2, "x": 1}}, "test")
    with pytest.raises(ProxyConfigError, match=r"\(and 2 more; run `vllm-proxy check`\)$"):
        require_valid(config)
    assert require_valid(ProxyConfig.parse(triple, "test")).problems == ()


def test_importing_the_module_imports_neither_torch_nor_vllm():
    code = (
        "import sys, vllm_proxy.preflight.check.run; "
        "print({'torch', 'vllm', 'transformers'} & {*sys.modules})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "set()"


# -- 1: where the member is ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("/no/such/model", "base `/no/such/model`: no such directory; check the path"),
        ("./none", "base `./none`: no such directory; check the path"),
        ("a/b/c", "base `a/b/c`: no such directory; check the path"),
        ("~/model", "base `~/model`: no such directory (`~` is not expanded); check the path"),
    ],
)
def test_missing_path_is_found_without_the_network(triple, monkeypatch, model, words):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", None)
    assert run(triple, base=model).problems == (words,)


def test_unknown_hub_id(triple):
    problem = only_problem(run(triple, antiexpert={"model": "nobody/none", "revision": "v1"}))
    assert problem == (
        "antiexpert `nobody/none@v1`: neither a local directory nor a model on the hub "
        "(HF_HUB_OFFLINE is set); check the path"
    )


def test_cached_hub_model_is_checked_without_the_network(triple, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--somebody--small"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(triple["expert"], snapshot, ignore=shutil.ignore_patterns("*.safetensors"))
    report = run(triple, expert="somebody/small")
    assert report.problems == ()
    assert report.members[1].parameters == report.members[2].parameters
    assert (
        "expert `somebody/small`: its weights are on the hub and were not inspected."
        in report.notes
    )


@pytest.mark.parametrize(
    ("mutate", "words"),
    [
        (
            lambda p: (p / "config.json").unlink(),
            "the directory has no config.json; give one with a whole",
        ),
        (lambda p: (p / "config.json").write_text('{"a": '), "config.json cannot be read"),
        (lambda p: (p / "config.json").write_text("[1]"), "config.json is not a JSON object"),
        (set_config(num_attention_heads="4"), "Field 'num_attention_heads' expected int, got str"),
        (
            lambda p: (p / "config.json").rename(p / "adapter_config.json"),
            "it is an adapter; give it as `{model: <the model it was trained on>, lora: <path>}`",
        ),
    ],
)
def test_directory_that_holds_no_model(triple, tmp_path, mutate, words):
    changed_triple = changed(triple, tmp_path, mutate)
    problem = only_problem(run(changed_triple))
    assert problem.startswith(f"expert `{changed_triple['expert']}`: ")
    assert words in problem


def test_file_instead_of_directory(triple, tmp_path):
    file = tmp_path / "model.gguf"
    file.touch()
    assert f"base `{file}`: it is a file; give the directory" in only_problem(
        run(triple, base=str(file))
    )


# -- 2: what the member is -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "T5ForConditionalGeneration is an encoder-decoder; members must be text-only decoders",
        ),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification is an encoder or pooling model; members must be",
        ),
        ({"architectures": ["BertModel"]}, "BertModel is an encoder or pooling model"),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}},
            "LlavaForConditionalGeneration is a multimodal model; members must be text-only "
            "decoders, or the text of gemma3, gemma4, llama4, mistral3, qwen2_vl, qwen2_5_vl, ",
        ),
        (
            {"architectures": ["NobodysForCausalLM"]},
            "Model architectures ['NobodysForCausalLM'] are not supported for now; check its",
        ),
    ],
)
def test_member_that_is_no_text_decoder(triple, tmp_path, values, words):
    report = run(changed(triple, tmp_path, set_config(**values)))
    problem = only_problem(report)
    assert problem.startswith("expert `")
    assert words in problem
    assert [member.role for member in report.members] == ["base", "antiexpert"]


QUANTIZATIONS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True},
    "compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": {}},
}


@pytest.mark.parametrize("role", ROLES)
def test_members_may_be_quantized(triple, tmp_path, role):
    quantized = tmp_path / "quantized"
    shutil.copytree(triple[role], quantized)
    set_config(quantization_config=QUANTIZATIONS["compressed-tensors"])(quantized)
    report = run({**triple, role: str(quantized)})
    assert not report.problems
    assert report.members[ROLES.index(role)].quantization == "compressed-tensors"


@pytest.mark.skipif(torch.cpu._is_amx_tile_supported(), reason="vLLM has a kernel for AMX")
@pytest.mark.parametrize("role", ["base", "expert"])
def test_experts_in_mxfp4_without_a_kernel(triple, tmp_path, role):
    model = write_model(tmp_path / "gpt-oss", "gpt_oss", seed=3)
    set_config(quantization_config={"quant_method": "mxfp4"})(model)
    (problem,) = run({**triple, role: str(model)}, engine={"dtype": "bfloat16"}).problems
    assert problem == (
        f"{role} '{model}': its experts are quantized to gpt_oss_mxfp4, for which vLLM has no "
        "kernel on a CPU without AMX; use an unquantized checkpoint, or another machine"
    )


@pytest.mark.skipif(
    torch.cpu._is_avx512_supported(), reason="vLLM has the kernel where the CPU has AVX512"
)
@pytest.mark.parametrize("role", ROLES)
def test_quantization_without_a_kernel(triple, tmp_path, role):
    quantized = tmp_path / "quantized"
    shutil.copytree(triple[role], quantized)
    set_config(quantization_config=QUANTIZATIONS["gptq"])(quantized)
    problem = only_problem(run({**triple, role: str(quantized)}, engine={"dtype": "bfloat16"}))
    assert problem.startswith(f"{role} '{quantized}': it is quantized to int4 (")
    assert "for which vLLM has no kernel on a CPU without AVX512; use the unquantized" in problem


def test_int8_that_this_cpu_cannot_multiply_is_said(triple, tmp_path):
    quantized = tmp_path / "quantized"
    write_quantized(Path(triple["base"]), quantized, tmp_path / "twin", "w8a8")
    said = [s for s in run(triple, base=str(quantized)).notes if "without VNNI" in s]
    assert bool(said) == (not torch.cpu._is_vnni_supported())
    assert not any("without VNNI" in s for s in run(triple).notes)


def test_windows_that_cannot_share_a_cache(triple, tmp_path):
    small = {"hidden_size": 128, "layers": 2, "kv_heads": 2}
    paths = {
        "base": write_model(tmp_path / "base", "mistral", seed=0),
        "expert": write_model(tmp_path / "expert", "mistral", seed=1, sliding_window=48, **small),
        "antiexpert": write_model(tmp_path / "anti", "mistral", seed=2, **small),
    }
    members = {role: str(path) for role, path in paths.items()}
    group = {"disable_hybrid_kv_cache_manager": True}
    problem = only_problem(run(members, engine={**group, "pipeline_parallel_size": 2}))
    assert problem == (
        "`engine.disable_hybrid_kv_cache_manager` is true: sliding windows (base 24, expert 48, "
        "antiexpert 24) cannot share one KV cache group with pipelines; leave it out"
    )
    assert not run(members).problems
    assert not run(members, engine=group).problems
    assert not run(members, speculate={"tokens": 3}).problems


# -- 3: tokenizers ---------------------------------------------------------------------------------


def test_tokenizers_that_disagree(triple, tmp_path):
    def other(model: Path) -> None:
        write_tokenizer(model, ["zebra zoo zigzag zeppelin"] * 20)

    bad = changed(triple, tmp_path, other)
    own, base = (
        {i: t for t, i in AutoTokenizer.from_pretrained(bad[role]).get_vocab().items()}
        for role in ("expert", "base")
    )
    first = next(i for i in sorted(own) if own[i] != base[i])
    problem = only_problem(run(bad))
    assert f"has {own[first]!r} at id {first}, the base's {base[first]!r} (" in problem
    assert "use members that share a tokenizer" in problem


def test_same_vocabulary_with_another_normalizer(triple, tmp_path):
    def lowercase(model: Path) -> None:
        file = str(model / "tokenizer.json")
        tokenizer = Tokenizer.from_file(file)
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.save(file)

    problem = only_problem(run(changed(triple, tmp_path, lowercase)))
    assert problem.startswith("expert `")
    assert "its tokenizer splits text differently from the base's" in problem


def test_more_tokens_than_the_base_are_a_seam(triple, tmp_path):
    def add(model: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens(["<tool>", "</tool>"])
        tokenizer.save_pretrained(model)

    report = run(changed(triple, tmp_path, add))
    assert report.problems == ()
    size = report.members[0].tokenizer_size
    wanted = f"has 2 tokens beyond the base's tokenizer, first id {size} ('<tool>')"
    assert any(wanted in sentence for sentence in report.notes), report.notes
    swapped = {"base": report.members[1].model, "expert": triple["expert"]}
    assert any("2 tokens that expert" in s for s in run(triple, **swapped).notes)


def test_expert_that_ends_texts_in_its_own_way(triple, tmp_path):
    def end_with(model: Path) -> None:
        (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 70]}))

    chat = changed(triple, tmp_path, end_with)
    token = AutoTokenizer.from_pretrained(chat["expert"]).convert_ids_to_tokens(70)
    sentence = (
        f"The expert ends texts with id 70 ({token!r}), at which the base does not stop; set "
        "`sampling.stop_token_ids: [70]` to stop there."
    )
    assert sentence in run(chat).notes
    assert not any("ends texts" in s for s in run(chat, sampling={"stop_token_ids": [70]}).notes)
    assert not any("ends texts" in s for s in run(triple).notes)


def test_tokenizer_larger_than_the_vocabulary(triple, tmp_path):
    last = len(AutoTokenizer.from_pretrained(triple["expert"])) - 1
    expert = str(write_model(tmp_path / "small", seed=3, vocab_size=last))
    problem = only_problem(run(triple, expert=expert))
    assert problem.startswith(f"expert `{expert}`: its tokenizer has id {last} (")
    assert f"but `vocab_size` is {last}; use the tokenizer" in problem


def add_tokens(*names: str, special: bool = False) -> Mutate:
    def mutate(model: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.add_tokens([AddedToken(name, special=special) for name in names])
        tokenizer.save_pretrained(model)

    return mutate


@pytest.mark.parametrize("role", ROLES)
def test_added_tokens_beyond_the_vocabulary_are_a_note(triple, tmp_path, role):
    """Gemma 3 1B has a token for images, and no row of weights for it."""
    size = len(AutoTokenizer.from_pretrained(triple[role]))
    model = write_model(tmp_path / "model", seed=3, vocab_size=size + 1)
    add_tokens("<pad2>", "<image>", "<more>")(model)
    report = run({**triple, role: str(model)})
    assert report.problems == ()
    (said,) = [sentence for sentence in report.notes if "that the model lacks" in sentence]
    assert said.startswith(f"{role} `{model}`: its tokenizer has 2 tokens that the model lacks, ")
    assert f"first id {size + 1} ('<image>'; `vocab_size` is {size + 1}): requests with" in said


def rename_tokens(**names: str) -> Mutate:
    """Give tokens other names: `old_i`, as R1-Distill-Qwen does with Qwen's special tokens."""

    def mutate(model: Path) -> None:
        path = model / "tokenizer.json"
        text = path.read_text()
        for old, new in names.items():
            assert f'"{old}"' in text
            text = text.replace(f'"{old}"', f'"{new}"')
        path.write_text(text)

    return mutate


def test_special_tokens_with_other_names_are_a_note(triple, tmp_path):
    names = {"think_start": "<think>", "think_end": "</think>", "user": "<User>"}
    special = add_tokens(*(f"<|{name}|>" for name in names), special=True)
    base = changed({"expert": triple["base"]}, tmp_path / "base", special)["expert"]

    def rename(model: Path) -> None:
        special(model)
        rename_tokens(**{f"<|{old}|>": new for old, new in names.items()})(model)

    members = {**changed(triple, tmp_path, rename), "base": base, "antiexpert": base}
    report = run(members)
    assert report.problems == ()
    first = len(AutoTokenizer.from_pretrained(triple["base"]))
    (said,) = [sentence for sentence in report.notes if "other names" in sentence]
    assert said.startswith(f"expert `{members['expert']}` has other names for 3 of the base's spec")
    for i, (old, new) in enumerate(names.items()):
        assert f"{first + i} '<|{old}|>' / '{new}'" in said
    assert "Text is read and written by the base's names, unless `engine.tokenizer`" in said


def test_a_token_of_the_vocabulary_with_another_name_is_a_problem(triple, tmp_path):
    """Also if the member's is an added one: the base's text is split into it."""
    tokenizer = AutoTokenizer.from_pretrained(triple["base"])
    last = len(tokenizer) - 1
    token = tokenizer.convert_ids_to_tokens(last)

    def replace_last(model: Path) -> None:
        path = model / "tokenizer.json"
        values = json.loads(path.read_text())
        del values["model"]["vocab"][token]
        values["model"]["merges"].pop()
        added = {**values["added_tokens"][0], "id": last, "content": "<think>"}
        values["added_tokens"].append(added)
        path.write_text(json.dumps(values))

    problem = only_problem(run(changed(triple, tmp_path, replace_last)))
    assert f"its tokenizer has '<think>' at id {last}, the base's {token!r} (1 of " in problem


def test_member_without_tokenizer(triple, tmp_path):
    def strip(model: Path) -> None:
        for file in model.glob("tokenizer*"):
            file.unlink()

    bad = changed(triple, tmp_path, strip)
    problem = only_problem(run(bad))
    assert problem.startswith(f"expert `{bad['expert']}`: no tokenizer can be read")
    assert "set `engine.skip_tokenizer_init: true`" in problem
    report = run(bad, engine={"skip_tokenizer_init": True})
    assert report.problems == ()
    assert any("Tokenizers were not compared" in sentence for sentence in report.notes)


# -- 4: context ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "source"),
    [
        ({}, f"`engine.max_model_len` is not set and the base's context is {CONTEXT}"),
        ({"max_model_len": 300}, "`engine.max_model_len` is 300"),
    ],
)
def test_member_with_a_short_context(triple, tmp_path, engine, source):
    bad = changed(triple, tmp_path, set_config(max_position_embeddings=256))
    assert only_problem(run(bad, engine=engine)) == (
        f"{source}, longer than the context of expert 256; set `engine.max_model_len: 256`"
    )
    assert run(bad, engine={"max_model_len": 256}).problems == ()


def test_context_counts_rope_scaling(triple, tmp_path):
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    scaled = set_config(max_position_embeddings=256, rope_parameters=rope)
    report = run(changed(triple, tmp_path, scaled))
    assert report.problems == ()
    assert report.members[1].context_length == 1024


# -- 5, 6: engine and sampling ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_modellen", 5, "unknown key `engine.max_modellen`; did you mean `max_model_len`?"),
        ("zzz", 5, "unknown key `engine.zzz`; see `vllm serve --help`"),
        ("tensor_parallel_size", -1, "is -1: Input should be greater than or equal to 1"),
        ("tensor_parallel_size", "two", "is 'two': Input should be a valid integer"),
        ("max_model_len", "abc", "is 'abc': Input should be a valid integer"),
        ("gpu_memory_utilization", 2, "is 2: Input should be less than or equal to 1"),
        ("kv_cache_dtype", "fp9", "is 'fp9': Input should be 'auto', "),
        ("quantization", "nope", "is 'nope': Unknown quantization method: nope"),
        ("trust_remote_code", "perhaps", "is 'perhaps': Input should be a valid boolean"),
        ("compilation_config", {"levle": 3}, "is {'levle': 3}: unknown key `levle`"),
        ("enable_lora", True, "is True: vLLM's adapters are of one model; name adapters of"),
        ("enable_prompt_embeds", True, "is True: each member needs different embeddings; send"),
        ("enable_dbo", True, "is True: microbatches are not supported: members would read"),
        ("ubatch_size", 2, "is 2: microbatches are not supported: members would read"),
        ("runner", "pooling", "is 'pooling': members generate text; remove it"),
        ("tokenizer", "/none", "is '/none': no such directory; check the path"),
        ("load_format", "gguf", "is 'gguf': it can read one checkpoint only; use one of auto, "),
        (
            "tensor_parallel_size",
            3,
            "is 3: it does not divide the attention and KV heads of base (4 and 2), expert "
            "(4 and 2), antiexpert (4 and 2); use 1 or 2 or 4",
        ),
    ],
)
def test_wrong_engine_argument(triple, key, value, words):
    problem = only_problem(run(triple, engine={key: value}))
    assert f"engine.{key}`" in problem
    assert words in problem


def test_pipeline_ranks_need_compiled_code_on_a_cpu(triple):
    engine = {"pipeline_parallel_size": 2, "enforce_eager": True}
    problem = only_problem(run(triple, engine=engine))
    assert problem.startswith("`engine.enforce_eager` is true: not possible on a CPU with")
    assert not run(triple, engine={"pipeline_parallel_size": 2}).problems


def test_tensor_parallel_size_names_only_the_member_it_does_not_fit(triple, tmp_path):
    three = str(write_model(tmp_path / "three", seed=3, hidden_size=96, heads=3, kv_heads=3))
    problem = only_problem(run(triple, expert=three, engine={"tensor_parallel_size": 2}))
    assert problem.endswith("heads of expert (3 and 3); use 1")


def test_engine_arguments_at_odds_with_each_other(triple):
    engine = {"enable_chunked_prefill": False, "max_num_batched_tokens": 32, "max_num_seqs": 4}
    problem = only_problem(run(triple, engine=engine))
    assert problem.startswith("`engine`: max_num_batched_tokens (32) is smaller than max_model_len")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("max_token", 5, "unknown key `sampling.max_token`; did you mean `max_tokens`?"),
        ("zzz", 5, "unknown key `sampling.zzz`; see the fields of vllm.SamplingParams"),
        ("max_tokens", -1, "`sampling.max_tokens` is -1: max_tokens must be at least 1, got -1"),
        ("temperature", "x", "`sampling.temperature` is 'x': "),
        ("top_p", 3, "`sampling.top_p` is 3: top_p must be in (0, 1], got 3; change it"),
    ],
)
def test_wrong_sampling_parameter(triple, key, value, words):
    assert words in only_problem(run(triple, sampling={key: value}))


def test_sampling_parameters_at_odds_with_each_other(triple):
    problem = only_problem(run(triple, sampling={"min_tokens": 9, "max_tokens": 5}))
    assert problem.startswith("`sampling` is {'min_tokens': 9, 'max_tokens': 5}: min_tokens")


def test_every_mistake_is_reported(triple, tmp_path):
    bad = changed(triple, tmp_path, lambda p: (p / "config.json").write_text("{"))
    engine = {"dtype": "floaty", "max_num_seqs": -1, "enforce_eagr": True, "enable_lora": True}
    problems = run(bad, base="/none", engine=engine, sampling={"n": 0, "top_p": 7}).problems
    fields = ("sampling.n", "sampling.top_p", "engine.dtype", "engine.max_num_seqs")
    fields += ("engine.enforce_eagr", "engine.enable_lora", "base `/none`", "expert `")
    for name in fields:
        assert sum(name in problem for problem in problems) == 1, (name, problems)
    assert len(problems) == len(fields)


# -- 7: weights ------------------------------------------------------------------------------------


def drop_projections(tensors: dict) -> None:
    for name in [name for name in tensors if "q_proj" in name or "k_proj" in name]:
        del tensors[name]


def index_of(*files: str) -> Mutate:
    def mutate(model: Path) -> None:
        names = load_file(model / "model.safetensors")
        weight_map = {name: files[i % len(files)] for i, name in enumerate(names)}
        (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    return mutate


@pytest.mark.parametrize(
    ("mutate", "words"),
    [
        (
            edit_tensors(drop_projections),
            "4 tensors that the architecture needs not in the checkpoint: "
            "model.layers.0.self_attn.q_proj.weight, model.layers.0.self_attn.k_proj.weight, "
            "model.layers.1.self_attn.q_proj.weight, …; use the config.json that belongs",
        ),
        (
            edit_tensors(lambda t: t.update({"model.extra": t["model.norm.weight"].clone()})),
            "1 tensor in the checkpoint that the architecture does not have: model.extra; use",
        ),
        (
            edit_tensors(lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:64]})),
            "1 tensor of another shape than config.json says: model.norm.weight [64] instead of "
            "[128]; use the config.json",
        ),
        (
            index_of("model.safetensors", "model-00002-of-00002.safetensors"),
            "model.safetensors.index.json names 'model-00002-of-00002.safetensors', which is "
            "missing (1 of 2 files are); download",
        ),
        (
            lambda p: (p / "model.safetensors.index.json").write_text("{}"),
            "model.safetensors.index.json cannot be read; restore",
        ),
        (
            lambda p: os.truncate(p / "model.safetensors", 5000),
            "model.safetensors: ",
        ),
        (
            lambda p: (p / "model.safetensors").write_bytes(b"x" * 20),
            "model.safetensors: ",
        ),
        (
            lambda p: (p / "model.safetensors").unlink(),
            "the directory has no weights; add *.safetensors, or set `engine.load_format: dummy`",
        ),
    ],
)
def test_checkpoint_that_does_not_fit_its_config(triple, tmp_path, mutate, words):
    bad = changed(triple, tmp_path, mutate)
    problem = only_problem(run(bad))
    assert problem.startswith(f"expert `{bad['expert']}`: {words}")
    assert run(bad, engine={"load_format": "dummy"}).problems == ()


def test_quantized_checkpoint_without_the_head(triple, tmp_path):
    """vLLM compares no names of a quantized checkpoint: its head would be whatever memory held."""
    model, quantized = write_model(tmp_path / "model", seed=4), tmp_path / "quantized"
    write_quantized(model, quantized, tmp_path / "twin", "w4a16")
    members = {**triple, "expert": str(quantized)}
    assert run(members).problems == ()
    edit_tensors(lambda tensors: tensors.pop("lm_head.weight"))(quantized)
    assert "its checkpoint lacks the head (lm_head), which its config does not tie to" in (
        only_problem(run(members))
    )
    set_config(tie_word_embeddings=True)(quantized)
    assert run(members).problems == ()


def test_factors_of_long_texts_in_all_texts_are_said(triple, tmp_path):
    rope = {"rope_type": "longrope", "long_factor": [2.0] * 16, "short_factor": [1.0] * 16}
    small = {"hidden_size": 128, "kv_heads": 2, "sliding_window": None}
    long = {"original_max_position_embeddings": 64, "rope_scaling": rope}
    expert = write_model(tmp_path / "phi3", "phi3", seed=4, **small, **long)

    def said(length: int) -> list[str]:
        report = run({**triple, "expert": str(expert)}, engine={"max_model_len": length})
        assert report.problems == ()
        return [sentence for sentence in report.notes if "LongRoPE" in sentence]

    assert said(64) == []
    (sentence,) = said(65)
    assert sentence.startswith(f"expert `{expert}` has LongRoPE: vLLM uses the factors for long")
    assert "set `engine.max_model_len: 64`" in sentence


def test_broken_weights_of_a_base_with_one_tensor_for_both(triple, tmp_path):
    """vLLM looks into them before any of its own checks, for a head."""
    bad = changed(triple, tmp_path, lambda p: (p / "model.safetensors").write_bytes(b"x" * 20))
    problem = only_problem(run({**triple, "base": bad["expert"]}))
    assert problem.startswith(f"base `{bad['expert']}`: model.safetensors: ")


@pytest.mark.parametrize(
    "mutate",
    [
        index_of("model.safetensors"),
        edit_tensors(
            lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()})
        ),
        edit_tensors(
            lambda t: t.update(
                {"model.layers.0.self_attn.rotary_emb.inv_freq": t["model.norm.weight"].clone()}
            )
        ),
    ],
    ids=["index", "tied head saved too", "old rotary buffer"],
)
def test_harmless_checkpoints_raise_no_alarm(triple, tmp_path, mutate):
    assert run(changed(triple, tmp_path, mutate)).problems == ()


def test_bin_weights_are_not_inspected(triple, tmp_path):
    def rename(model: Path) -> None:
        (model / "model.safetensors").rename(model / "pytorch_model.bin")

    report = run(changed(triple, tmp_path, rename))
    assert report.problems == ()
    assert any("not safetensors and were not inspected" in sentence for sentence in report.notes)


# -- 8: vLLM ---------------------------------------------------------------------------------------


def test_unsupported_vllm(triple, monkeypatch):
    monkeypatch.setattr(vllm, "__version__", "0.31.2")
    problem = only_problem(run(triple))
    assert problem == "vllm 0.31.2 is not supported; install a version >= 0.32, < 0.34"


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        (
            {"tensor_parallel_size": 2},
            r"`tensor_parallel_size` is 2: it does not divide .* of expert \(4 and 3\); use 1\b",
        ),
        (
            {"pipeline_parallel_size": 2, "enforce_eager": True},
            "`enforce_eager` is True: .* to false",
        ),
        ({"enable_lora": True}, "`enable_lora` is True: .*; name adapters of the"),
        ({"enable_dbo": True}, "`enable_dbo` is True: microbatches are not supported: .*; remove"),
        ({"ubatch_size": 2}, "`ubatch_size` is 2: microbatches are not supported: .*; remove"),
    ],
)
def test_stock_entry_points_refuse_it_too(triple, tmp_path, engine, words):
    """`vllm serve` and `vllm.LLM` do not call `check`: the model's config hook is all they pass."""
    triple = changed(triple, tmp_path, set_config(num_key_value_heads=3))
    config = ProxyConfig.parse({**triple, "engine": engine}, "test")
    with pytest.raises(ValueError, match=words):
        vllm.EngineArgs(**config.engine_args()).create_engine_config()
