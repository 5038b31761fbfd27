"""One evaluation: every system answers the same tasks; all but the tuned model share one engine."""

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_proxy import __version__
from vllm_proxy.config.engine_arguments import RESOURCES
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.redaction import without_secrets
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import Member, ProxyConfig
from vllm_proxy.evaluate.scores import Metric, metrics_of
from vllm_proxy.evaluate.systems import TUNED, System
from vllm_proxy.evaluate.tasks import Selection
from vllm_proxy.evaluate.tuned import Tuned, require_tuned, tuned_engine
from vllm_proxy.jobs.files import replacing

if TYPE_CHECKING:
    from vllm_proxy.evaluate.lm import EngineLM, Progress, View

FORMAT = 1
"""Version of the layout of results, and of what a cache depends on."""
_VERSIONS = ("lm-eval", "vllm", "torch", "transformers", "datasets")


@dataclass
class Evaluation:
    """Which systems answer which tasks, how, and the results so far.

    Attributes:
        config: of the engine that answers as proxy, base, expert and antiexpert.
        systems: those of *config*; the tuned model runs after them.
        selection: the tasks.
        tuned: the directly tuned model, if there is one.
        limit: use only this many rows of each task.
        num_fewshot: examples before each question, for tasks that allow them.
        apply_chat_template: ask each question as a conversation, in the members' formats.
        confirm_run_unsafe_code: allow tasks that run code written by the models.
        cache: directory of answers, with one database per system; a later run reuses them.
        samples: directory for all questions and answers, in the harness's layout.
        results: of the harness, by system; of the systems that have finished.
        seconds: duration, by system.
        asked: number of requests that were not in the cache, by system.
        cut: number of requests whose contexts were cut, by system.
    """

    config: ProxyConfig
    systems: Sequence[System]
    selection: Selection
    tuned: Tuned | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    apply_chat_template: bool = False
    confirm_run_unsafe_code: bool = False
    cache: str | None = None
    samples: str | None = None
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    asked: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)

    @property
    def every(self) -> list[System]:
        """All systems, in the order of the table."""
        return [*self.systems, *([System(TUNED, TUNED)] if self.tuned else [])]

    def require_valid(self) -> None:
        """Check that every system can answer. Reads no weights.

        Raises:
            ProxyConfigError: names field, value and remedy.
        """
        from vllm_proxy.preflight.check.run import require_valid

        require_valid(self.config)
        if self.tuned:
            require_tuned(self.tuned, self.config)
        self._require_room()
        if self.apply_chat_template:
            self._require_chat()

    def _require_room(self) -> None:
        """Reject answers as long as the context: there would be no room for a question."""
        from lm_eval.models.vllm_causallms import VLLM

        from vllm_proxy.evaluate.lm import MAX_GEN_TOKS
        from vllm_proxy.members.read import read_members

        base = read_members(self.config)[0]["base"].model_config
        given = self.config.engine.get("max_model_len")
        context = given if isinstance(given, int) and given > 0 else base.max_model_len
        default = self.config.sampling.get("max_tokens") or MAX_GEN_TOKS
        for name, task in self.selection.tasks.items():
            if task.OUTPUT_TYPE == "generate_until":
                kwargs = task.config.generation_kwargs
                *_, most = VLLM.modify_gen_kwargs(kwargs, default_max_gen_toks=default)
                if most >= context:
                    raise ProxyConfigError(
                        f"answers have up to {most} tokens, and the engine's context has {context}",
                        field=f"--tasks {name!r}",
                        remedy="raise `engine.max_model_len`, or lower the task's `max_gen_toks`",
                    )

    def _require_chat(self) -> None:
        """Reject members that lack a chat template which the evaluation needs."""
        from vllm_proxy.evaluate.lm import views_of

        for kind in {system.kind for system in self.systems}:
            views_of(self.config, kind)
        if self.tuned:
            self.tuned_views()

    def tuned_views(self) -> "Mapping[Role, View]":
        """Return how the tuned model sees conversations: as the expert, or by its own template."""
        from vllm_proxy.evaluate.lm import views_of

        assert self.tuned is not None
        chat = self.config.chat
        format_ = "template" if chat is None else chat.of("expert")
        model = self.tuned.member.model_copy(update={"lora": None})
        values = {"base": model, "expert": model, "chat": {"base": format_}}
        return views_of(ProxyConfig.parse(values, "--tuned"), "base")

    def run(
        self,
        progress_of: "Callable[[System], Progress]",
        on_done: Callable[[System], None] = lambda system: None,
    ) -> None:
        """Run every system, and add its results to `results` when it is done.

        Args:
            progress_of: returns the function that shows a system's progress; called before its
                first answer.
            on_done: called when a system has answered everything.

        Raises whatever vLLM, the harness and the tasks raise.
        """
        from vllm_proxy.evaluate.lm import EngineLM, ProxyLM
        from vllm_proxy.llm.proxy_llm import ProxyLLM

        prompts = self.selection.system_prompts
        with ExitStack() as stack:
            llm = ProxyLLM.from_config(self.config)
            stack.callback(llm.llm_engine.engine_core.shutdown)
            for system in self.systems:
                lm = ProxyLM(
                    llm,
                    self.config,
                    system,
                    system_prompts=prompts,
                    progress=progress_of(system),
                )
                self._measure(lm, system, on_done)
        if not self.tuned:
            return
        with tuned_engine(self.tuned, self.config) as tuned_llm:
            (system,) = self.every[len(self.systems) :]
            lm = EngineLM(
                tuned_llm,
                views=self.tuned_views,
                sampling=self.config.sampling,
                system_prompts=prompts,
                progress=progress_of(system),
            )
            self._measure(lm, system, on_done)

    def _measure(self, lm: "EngineLM", system: System, on_done: Callable[[System], None]) -> None:
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker

        started = time.perf_counter()
        tracker = EvaluationTracker(output_path=self.samples) if self.samples else None
        result = simple_evaluate(
            model=lm,
            model_args={"model": system.name},
            tasks=list(self.selection.items),
            task_manager=self.selection.manager,
            num_fewshot=self.num_fewshot,
            limit=self.limit,
            use_cache=self.cache_of(system),
            log_samples=tracker is not None,
            evaluation_tracker=tracker,
            apply_chat_template=self.apply_chat_template,
            # Examples as separate turns only if all members see templates. A member that sees plain
            # text sees the task's own text only if it is one turn.
            fewshot_as_multiturn=self.apply_chat_template and self._all_see_templates,
            confirm_run_unsafe_code=self.confirm_run_unsafe_code,
        )
        if tracker:
            _write_samples(tracker, result)
        self.results[system.name] = result
        self.seconds[system.name] = time.perf_counter() - started
        self.asked[system.name], self.cut[system.name] = lm.asked, lm.cut
        on_done(system)

    @property
    def _all_see_templates(self) -> bool:
        chat = self.config.chat
        return chat is None or all(chat.of(role) == "template" for role in self.config.roles)

    # -- what answers depend on --------------------------------------------------------------------

    def cache_of(self, system: System) -> str | None:
        """Return the path of a system's cache without the suffix that the harness adds; or None.

        The harness looks answers up by question alone. So the file name contains everything else
        that they depend on: the system with its strength, and a digest of the configuration, the
        members' files and the versions.
        """
        if self.cache is None:
            return None
        values = {
            "format": FORMAT,
            "versions": versions(),
            "model": self._identity(system),
            "sampling": self.config.sampling,
            "chat": [
                self.apply_chat_template,
                self.config.model_dump(include={"chat"}, mode="json"),
                self.selection.system_prompts,
            ],
        }
        text = json.dumps(values, sort_keys=True, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        name = system.name.replace(" ", "-").replace("=", "-")
        return str(Path(self.cache) / f"{name}-{digest}")

    def _identity(self, system: System) -> dict[str, Any]:
        if self.tuned and system.kind == TUNED:
            engine, members = self.tuned.engine_args(self.config), [self.tuned.member]
        else:
            engine = {**self.config.engine, "proxy": self.config.hf_overrides()["proxy"]}
            members = [self.config.member(role) for role in self.config.roles]
        return {
            "engine": without_secrets({k: v for k, v in engine.items() if k not in RESOURCES}),
            "files": [_files(member) for member in members],
        }

    # -- results -----------------------------------------------------------------------------------

    def metrics(self) -> list[Metric]:
        """Return the metrics of all systems."""
        return metrics_of(self.results, self.every)

    @property
    def parts(self) -> set[str]:
        """Tasks in groups that have their own scores."""
        result = next(iter(self.results.values()))
        inner = (result["group_subtasks"][group] for group in result.get("groups", {}))
        return {task for tasks in inner for task in tasks}

    def record(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return versions, arguments, configuration, results and gaps, for JSON."""
        config = without_secrets(self.config.model_dump(mode="json", exclude_none=True))
        return {
            "format": FORMAT,
            "versions": versions(),
            "arguments": dict(arguments),
            "config": config,
            "tuned": None
            if self.tuned is None
            else without_secrets(asdict(self.tuned)) | {"member": str(self.tuned)},
            "systems": {system.name: self._system_record(system) for system in self.every},
            "scores": [metric.to_record() for metric in self.metrics()],
        }

    def _system_record(self, system: System) -> dict[str, Any]:
        result = self.results[system.name]
        return {
            "kind": system.kind,
            "request": system.control.to_extra_args(),
            "seconds": self.seconds[system.name],
            "requests_asked": self.asked[system.name],
            "contexts_cut": self.cut[system.name],
            "results": {key: value for key, value in result.items() if key != "samples"},
        }


def write(record: Mapping[str, Any], output: str) -> None:
    """Write a record atomically."""
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(record, indent=2, default=handle_non_serializable, ensure_ascii=False)
    with replacing(output) as file:
        file.write(f"{text}\n".encode())


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {"vllm-proxy": __version__, **{name: version(name) for name in _VERSIONS}}


def _files(member: Member) -> list[Any]:
    """Return a member's files: the same directory may hold other weights after more training."""
    from vllm_proxy.members.location import locate

    found: list[Any] = [str(member)]
    for name in filter(None, (member.model, member.lora)):
        revision = member.revision if name == member.model else None
        directory = locate(Member(model=name, revision=revision)).directory
        # The name of a snapshot from the Hub is its commit.
        found.append(directory.name)
        for path in sorted(directory.iterdir()):
            stat = path.stat()
            found.append([path.name, stat.st_size, stat.st_mtime_ns])
    return found


def _write_samples(tracker: Any, result: dict[str, Any]) -> None:
    """Write all questions and answers as the harness does."""
    samples = result.pop("samples")
    tracker.save_results_aggregated(results=dict(result), samples=samples)
    for task, rows in samples.items():
        tracker.save_results_samples(task_name=task, samples=rows)
    directory = Path(tracker.output_path) / tracker.general_config_tracker.model_name_sanitized
    missing = [task for task in samples if not [*directory.glob(f"samples_{task}_*.jsonl")]]
    if missing:  # the harness only warns
        raise ProxyConfigError(
            f"nothing could be written to {str(directory)!r}", field="--log-samples"
        )
