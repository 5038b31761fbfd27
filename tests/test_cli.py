"""The command line without an engine: what it refuses, what it prints, what it hands to vLLM."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

import vllm_proxy.preflight.check.run
from support.commands import run
from vllm_proxy.cli.quiet import explain
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.server import command as serve

CONFIG = """
base: /models/base
expert: /models/expert
antiexpert: {model: /models/antiexpert, revision: main}
alpha: 0.5
engine: {dtype: float32, tensor_parallel_size: 2}
sampling: {temperature: 0.7, max_tokens: 64}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("proxy.yaml").write_text(CONFIG)
    Path("rows.jsonl").write_text('{"prompt": "a"}\n')
    return "proxy.yaml"


@pytest.fixture
def members_fit(monkeypatch):
    """The members of CONFIG do not exist; what `check` says of them is tested elsewhere."""
    monkeypatch.setattr(vllm_proxy.preflight.check.run, "require_valid", lambda config: None)


def one_line_error(*words: str) -> str:
    """Run what must be refused; return the one line that says why."""
    result = run(*words)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


class TestHelp:
    def test_needs_neither_torch_nor_vllm(self):
        heavy = "{'torch', 'vllm', 'transformers', 'pydantic', 'yaml'}"
        code = (
            "import sys; from vllm_proxy.cli.app import app\n"
            "try: app(['--help'])\n"
            f"except SystemExit: sys.exit(str({heavy} & set(sys.modules) or ''))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.stderr.strip() == ""
        assert "generate" in result.stdout

    def test_version(self):
        assert run("--version").stdout == f"vllm-proxy {vllm_proxy.__version__}\n"

    def test_unknown_command_is_one_line(self):
        assert "generate" in one_line_error("generat")


class TestGenerateRefuses:
    """Nothing here may import vLLM, let alone start an engine: it would take minutes."""

    @pytest.mark.parametrize(
        "words",
        [
            ("--max-tokens", "-1"),
            ("--max-tokens", "many"),
            ("--temperature", "-0.1"),
            ("--temperature", "nan"),
            ("--top-p", "0"),
            ("--top-k", "-2"),
            ("--logprobs", "-2"),
            ("--limit", "0"),
            ("--alpha", "nan"),
            ("--alpha", "inf"),
            ("--alpha", "3e38"),
            ("--alpha", "adaptiv"),
        ],
    )
    def test_a_wrong_value_by_name(self, config, words):
        option, value = words
        line = one_line_error(
            "generate", config, "--input", "rows.jsonl", "--output", "out", *words
        )
        assert option in line
        assert value.removeprefix("-") in line or value == "many"
        assert not Path("out").exists()

    def test_a_missing_configuration(self, config):
        line = one_line_error("generate", "none.yaml", "--input", "rows.jsonl", "--output", "out")
        assert "'none.yaml': No such file" in line

    @pytest.mark.parametrize(
        ("source", "says"),
        [("none.jsonl", "No such file"), (".", "directory"), ("empty.jsonl", "no rows")],
    )
    def test_an_unusable_input(self, config, source, says):
        Path("empty.jsonl").touch()
        line = one_line_error("generate", config, "--input", source, "--output", "out")
        assert f"--input '{source}'" in line
        assert says in line
        assert not Path("out").exists()

    @pytest.mark.parametrize(("target", "says"), [("no/where", "No such file"), (".", "directory")])
    def test_an_unusable_output(self, config, target, says):
        line = one_line_error("generate", config, "--input", "rows.jsonl", "--output", target)
        assert f"--output '{target}'" in line
        assert says in line

    def test_an_output_that_is_the_input(self, config):
        """With --overwrite it would be emptied before it is read."""
        line = one_line_error(
            "generate", config, "--input", "rows.jsonl", "--output", "./rows.jsonl", "--overwrite"
        )
        assert "is the input" in line
        assert Path("rows.jsonl").read_text()

    def test_an_output_that_is_not_ours(self, config):
        Path("out").write_text("precious\n")
        line = one_line_error("generate", config, "--input", "rows.jsonl", "--output", "out")
        assert "--overwrite" in line
        assert Path("out").read_text() == "precious\n"


class TestInspectRefuses:
    """As `TestGenerateRefuses`."""

    @pytest.mark.parametrize(
        ("words", "says"),
        [
            ((), "--prompt and --input: neither is given; give one"),
            (
                ("--prompt", "a", "--input", "rows.jsonl"),
                "--prompt and --input: both are given; give one",
            ),
            (("--prompt", ""), "--prompt is '': give at least one token"),
            (("--prompt", "a", "--top-k", "0"), "--top-k is 0: give a count from 1 to 100"),
            (("--prompt", "a", "--top-k", "101"), "--top-k is 101: give a count from 1 to 100"),
            (("--prompt", "a", "--top-k", "many"), "'--top-k'"),
            (("--prompt", "a", "--max-tokens", "0"), "--max-tokens is 0: give at least 1"),
            (("--prompt", "a", "--temperature", "nan"), "--temperature is nan"),
            (("--prompt", "a", "--top-p", "2"), "--top-p is 2.0"),
            (("--prompt", "a", "--alpha", "inf"), "--alpha is 'inf'"),
            (("--prompt", "a", "--limit", "0"), "--limit is 0"),
            (
                ("--prompt", "a", "--output", "-"),
                "--output '-': the command reads its records again; give a",
            ),
            (("--prompt", "a", "--output", "a.parquet"), "give a file of JSON lines"),
            (("--prompt", "a", "--output", "a.gz"), "records are not compressed"),
            (
                ("--prompt", "a", "--output", "mine"),
                "'mine': the file exists and was not written by a job",
            ),
            (("--prompt", "a", "--output", "no/where"), "--output 'no/where': No such file"),
            (("--prompt", "a", "--html", "mine"), "'mine': the file exists and was not written by"),
            (
                ("--prompt", "a", "--html", "no/where"),
                "--html 'no/where': its directory does not exist",
            ),
            (("--prompt", "a", "--html", "."), "--html '.': it is a directory; give a file"),
            (
                ("--prompt", "a", "--html", "x", "--output", "x"),
                "--html 'x': it is an input or the output; give",
            ),
            (("--input", "rows.jsonl", "--html", "rows.jsonl"), "give another path"),
            (("--input", "rows.jsonl", "--output", "rows.jsonl"), "is the input"),
            (("--input", "none.jsonl"), "--input 'none.jsonl': No such file"),
        ],
    )
    def test_wrong_options_by_name(self, config, words, says):
        Path("mine").write_text("precious\n")
        before = sorted(path.name for path in Path().iterdir())
        assert says in one_line_error("inspect", config, *words)
        assert sorted(path.name for path in Path().iterdir()) == before
        assert Path("mine").read_text() == "precious\n"

    def test_another_worker_extension(self, config):
        Path("proxy.yaml").write_text(CONFIG.replace("{dtype", "{worker_extension_cls: a.B, dtype"))
        line = one_line_error("inspect", config, "--prompt", "a")
        assert "`engine.worker_extension_cls` is 'a.B': " in line


class TestServe:
    def command(self, *words: str) -> list[str]:
        result = run("serve", *words, "--dry-run")
        assert result.exit_code == 0, result.output
        completed = subprocess.run(
            ["bash", "-c", f'for word in {result.stdout.strip()}; do echo "$word"; done'],
            capture_output=True,
            text=True,
            check=True,
        )
        return completed.stdout.splitlines()

    def test_prints_a_stock_command_that_a_shell_reads(self, config, members_fit):
        words = self.command(config, "--port", "8001", "--api-server-count", "a b", "-O3")
        at = words.index("serve")
        assert words[at + 1] == "/models/base"
        assert words[-5:] == ["--port", "8001", "--api-server-count", "a b", "-O3"]
        overrides = json.loads(words[words.index("--hf-overrides") + 1])
        assert overrides["proxy"] == {
            "expert": {"model": "/models/expert"},
            "antiexpert": {"model": "/models/antiexpert", "revision": "main"},
            "alpha": 0.5,
        }

    def test_alpha_overrides_the_configuration(self, config, members_fit):
        words = self.command(config, "--alpha", "2")
        assert json.loads(words[words.index("--hf-overrides") + 1])["proxy"]["alpha"] == 2.0

    def test_alpha_may_be_adaptive(self, config, members_fit):
        words = self.command(config, "--alpha", "adaptive")
        assert json.loads(words[words.index("--hf-overrides") + 1])["proxy"]["alpha"] == "adaptive"

    def test_carries_all_that_requests_may_change(self, config, members_fit):
        schedule = {"alpha": 1.0, "schedule": "first", "steps": 8}
        section = {"filters": {"top_p": 0.9}, "chat": {"expert": "template"}, "alpha": schedule}
        Path("own.yaml").write_text(yaml.safe_dump({**yaml.safe_load(CONFIG), **section}))
        words = self.command("own.yaml")
        proxy = json.loads(words[words.index("--hf-overrides") + 1])["proxy"]
        assert {key: proxy[key] for key in section} == section

    def test_sampling_becomes_the_servers_defaults(self, config, members_fit):
        words = self.command(config)
        override = json.loads(words[words.index("--override-generation-config") + 1])
        assert override == {"temperature": 0.7}

    def test_names_the_sampling_that_a_server_has_no_default_for(self, config, members_fit):
        line = run("serve", config, "--dry-run").stderr
        assert "`sampling.max_tokens`" in line
        assert "temperature" not in line

    def test_keeps_the_overrides_of_the_configuration(self):
        config = ProxyConfig.parse(
            {
                "base": "b",
                "expert": "e",
                "antiexpert": "a",
                "engine": {"override_generation_config": {"top_k": 5, "temperature": 1.0}},
                "sampling": {"temperature": 0.0},
            },
            "test",
        )
        words = serve.serve_command(config, [])
        override = json.loads(words[words.index("--override-generation-config") + 1])
        assert override == {"top_k": 5, "temperature": 0.0}

    @pytest.mark.parametrize(
        "flag",
        [
            "--model",
            "--model=other",
            "--revision",
            "--hf-overrides",
            "--hf_overrides={}",
            "--hf-overrides.proxy.alpha=2",
        ],
    )
    def test_refuses_flags_that_change_the_members(self, config, members_fit, flag):
        assert flag in one_line_error("serve", config, flag, "x", "--dry-run")

    def test_becomes_the_server(self, config, members_fit, monkeypatch):
        executed = []
        monkeypatch.setattr(serve.os, "execvpe", lambda *words: executed.extend(words))
        result = run("serve", config, "--port", "1")
        assert result.exit_code == 0
        file, words, environment = executed
        assert words[0] == file
        assert environment == os.environ
        assert words[-2:] == ["--port", "1"]
        assert "/models/base" in result.stderr.splitlines()[-1]
        assert result.stdout == ""

    def test_secrets_reach_the_server_and_are_not_printed(self, config, members_fit, monkeypatch):
        executed = []
        monkeypatch.setattr(serve.os, "execvpe", lambda *words: executed.extend(words))
        Path("own.yaml").write_text(CONFIG.replace("{dtype", "{hf_token: hf_xyz, dtype"))
        result = run("serve", "own.yaml", "--api-key", "xyz", "--port", "1")
        _, words, environment = executed
        assert words[-4:] == ["--api-key", "xyz", "--port", "1"]
        assert environment["HF_TOKEN"] == "hf_xyz"
        assert "hf_xyz" not in words  # which `ps` shows to everybody
        assert "xyz" not in result.output
        assert "--api-key '***' --port 1" in result.stderr
        printed = run("serve", "own.yaml", "--api-key", "xyz", "--dry-run")
        assert "xyz" not in printed.output
        assert "set HF_TOKEN and what is shown as *** before" in printed.stderr

    def test_finds_vllm_as_a_module_where_there_is_no_script(self, monkeypatch):
        monkeypatch.setattr(serve.sys, "executable", "/nowhere/python")
        monkeypatch.setattr(serve.shutil, "which", lambda name: None)
        assert serve.vllm_command() == ["/nowhere/python", "-m", "vllm.entrypoints.cli.main"]

    def test_invalid_members_are_one_line(self, config):
        assert "/models/" in one_line_error("serve", config, "--dry-run")


class TestExplain:
    """The cause of an engine's death, out of the noise that all its processes make."""

    LOG = """
(Worker pid=2) ERROR 11-24 07:52:13 [multiproc_executor.py:949] Traceback (most recent call last):
(Worker pid=2) ERROR 11-24 07:52:13 [multiproc_executor.py:949] ValueError: No available memory for the cache blocks.
(EngineCore pid=1) ERROR 11-24 07:52:13 [core.py:1] Exception: WorkerProc initialization failed. See stack trace for root cause.
Process EngineCore:
Exception: WorkerProc initialization failed. See stack trace for root cause.
"""  # noqa: E501

    def test_is_the_last_error_that_points_to_no_other(self):
        error = RuntimeError("Engine core initialization failed. See root cause above.")
        assert explain(error, self.LOG) == "No available memory for the cache blocks."

    def test_is_a_process_that_was_killed_where_no_error_says_more(self):
        error = RuntimeError("EngineCore encountered an issue. See stack trace for the root cause.")
        log = "WARNING engine core exited unexpectedly; starting cleanup"
        assert explain(error, log).endswith(
            "ended without an error message: killed, or out of memory"
        )

    def test_is_the_error_itself_where_it_says_something(self):
        assert explain(ValueError("too\n  much"), self.LOG) == "too much"
        assert explain(KeyError("x")) == "KeyError: 'x'"

    def test_is_in_one_line_for_pydantic(self):
        with pytest.raises(ValueError, match="valid") as caught:
            TypeAdapter(int).validate_python("x")
        assert explain(caught.value) == (
            "Input should be a valid integer, unable to parse string as an integer"
        )
