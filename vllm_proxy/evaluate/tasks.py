"""The tasks of an evaluation: found, loaded and tried on one row each before an engine starts."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError, did_you_mean, one_line
from vllm_proxy.config.yaml_file import require_bounded_yaml

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

SYSTEM_PROMPT, NOT_COMPUTED = "system_prompt", "not_computed"
"""Keys of a task's `metadata`: what members that see a chat template read before its messages; and
a score that somebody else has to find, of the answers."""

_LOCAL_BUILDERS = {"arrow", "csv", "json", "parquet", "text", "xml"}
_NO_LM_EVAL = (
    "evaluate needs lm-evaluation-harness, which is not installed; pip install "
    "'vllm-proxy[evaluate]'"
)


@dataclass(frozen=True)
class Selection:
    """What was asked for.

    Attributes:
        manager: which loaded it.
        items: groups, and tasks that are in none of them, as the harness takes them.
        tasks: all of them, by name.
        notes: what the user should know of them, a line each.
    """

    manager: "TaskManager"
    items: "list[Task | Group]"
    tasks: "Mapping[str, Task]"
    notes: tuple[str, ...]

    @property
    def system_prompts(self) -> dict[str, str]:
        """What tasks have for members that see a chat template, by task."""
        prompts = {
            name: (task.config.metadata or {}).get(SYSTEM_PROMPT)
            for name, task in self.tasks.items()
        }
        return {name: prompt for name, prompt in prompts.items() if prompt}


def select_tasks(
    specs: Sequence[str],
    include: str | None = None,
    *,
    num_fewshot: int | None = None,
    confirm_run_unsafe_code: bool = False,
) -> Selection:
    """Load tasks, and build the first request of each.

    Args:
        specs: names of tasks, groups and tags, patterns of them (`arc_*`), or YAML files.
        include: directory with more of them, which go before the harness's own.
        num_fewshot: examples before a question, for tasks that do not rule them out.
        confirm_run_unsafe_code: allow tasks that run the code they are answered with.

    Raises:
        ProxyConfigError: lm-eval is not installed; a task is unknown, wrong, or needs a network
            that is not there.
    """
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if error.name.partition(".")[0] != "lm_eval":
            raise
        raise ProxyConfigError(_NO_LM_EVAL) from None

    if include is not None and not Path(include).is_dir():
        raise ProxyConfigError(f"--include {include!r}: no such directory; check the path")
    files = {spec: _read(spec) for spec in specs if spec.endswith((".yaml", ".yml"))}
    # The index of the harness's own tasks takes seconds; a task from a file needs none of it.
    by_itself = len(files) == len(specs) and not any("group" in own for own in files.values())
    manager = TaskManager(include_path=include, include_defaults=not by_itself)
    names = [
        name for spec in specs for name in ([spec] if spec in files else _match(spec, manager))
    ]
    configs = {name: files.get(name) or _index_entry(manager, name) for name in names}
    if not all(map(_is_local, configs.values())):
        _use_the_cache_if_the_hub_is_silent()

    items: list[Task | Group] = []
    tasks: dict[str, Task] = {}
    for name in dict.fromkeys(names):
        loaded = _load(name, manager, configs[name])
        for task in loaded["tasks"]:
            if task in tasks:
                raise ProxyConfigError(f"--tasks: `{task}` is asked for twice; name it once")
        tasks |= loaded["tasks"]
        every = {**loaded.get("groups", {}), **loaded["tasks"]}
        inner = {child for group in loaded.get("group_map", {}).values() for child in group}
        items += [item for key, item in every.items() if key not in inner]
    notes = []
    for name, task in tasks.items():
        if getattr(task, "MULTIMODAL", False):
            raise ProxyConfigError(f"--tasks: `{name}` shows images or sound; members read text")
        if getattr(task, "UNSAFE_CODE", False) and not confirm_run_unsafe_code:
            raise ProxyConfigError(
                f"--tasks: `{name}` runs the code that models write; add "
                "--confirm-run-unsafe-code on a machine where it may"
            )
        if num_fewshot and task.config.num_fewshot == 0:
            notes.append(f"{name}: asked without examples, as the task says; --num-fewshot is not")
        if missing := (task.config.metadata or {}).get(NOT_COMPUTED):
            notes.append(f"{name}: not computed here: {missing}")
        _rehearse(name, task, num_fewshot)
    return Selection(manager, items, tasks, tuple(notes))


def _read(path: str) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    if not Path(path).is_file():
        raise ProxyConfigError(f"--tasks {path!r}: no such file; check the path")
    require_bounded_yaml(path, f"--tasks {path!r}", "see lm-eval's guide to tasks")
    try:
        config = load_yaml(path, resolve_func=False)
    except Exception as error:  # noqa: BLE001 - a file may be wrong in any way
        raise ProxyConfigError(
            f"--tasks {path!r}: not a task file ({one_line(error)}); see lm-eval's guide to tasks"
        ) from None
    if "task" not in config:
        raise ProxyConfigError(f"--tasks {path!r}: `task` is missing; add `task: <name>`")
    return config


def _match(spec: str, manager: "TaskManager") -> list[str]:
    if matches := manager.match_tasks([spec]):
        return matches
    known = manager.all_tasks
    raise ProxyConfigError(f"--tasks: unknown task `{spec}`{did_you_mean(spec, known)}")


def _index_entry(manager: "TaskManager", name: str) -> dict[str, Any]:
    return manager.task_index[name].cfg or {}


def _is_local(config: Mapping[str, Any]) -> bool:
    path = config.get("dataset_path")
    if path in _LOCAL_BUILDERS:
        return "://" not in str((config.get("dataset_kwargs") or {}).get("data_files"))
    return isinstance(path, str) and Path(path).exists()


def _use_the_cache_if_the_hub_is_silent() -> None:
    """Ask it once; the libraries would try for half a minute, for every task."""
    import datasets
    import huggingface_hub

    hub = huggingface_hub.constants
    if hub.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.utils.get_session().head(hub.ENDPOINT, timeout=5)
    except Exception:  # noqa: BLE001 - of whichever HTTP client it uses
        hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _load(name: str, manager: "TaskManager", config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return manager.load([name])
    except Exception as error:  # noqa: BLE001 - a file may be wrong in any way
        if _is_of_the_network(error):
            found = re.search(r"'([^']+(?=' (on the Hub|doesn't exist))|\w+://[^']+)'", str(error))
            what = found[1] if found else _data_of(config)
            raise ProxyConfigError(
                f"--tasks {name!r} needs the network: {what!r} does not answer, and is not in the "
                "cache; run it once where there is one and copy HF_HOME, or use a task with local "
                "files"
            ) from None
        _require_metrics(name, config)
        raise ProxyConfigError(
            f"--tasks {name!r}: it cannot be loaded ({type(error).__name__}: {one_line(error)}); "
            "check the task"
        ) from None


def _data_of(config: Mapping[str, Any]) -> str:
    path = config.get("dataset_path", "its data set")
    if path in _LOCAL_BUILDERS:
        files = config["dataset_kwargs"]["data_files"]
        return ", ".join(map(str, files.values())) if isinstance(files, Mapping) else str(files)
    return path


def _require_metrics(name: str, config: Mapping[str, Any]) -> None:
    from lm_eval.api.registry import metric_registry

    for entry in config.get("metric_list") or ():
        metric = entry.get("metric")
        if isinstance(metric, str) and metric not in metric_registry:
            near = did_you_mean(metric, metric_registry.keys())
            raise ProxyConfigError(f"--tasks {name!r}: unknown metric `{metric}`{near}")


def _is_of_the_network(error: BaseException | None) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    kinds = (ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    # files at an address, and metrics, which are scripts on the hub
    words = ("Unable to find 'http", "on the Hugging Face Hub either")
    while error is not None:
        if isinstance(error, kinds) or any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def _rehearse(name: str, task: "Task", num_fewshot: int | None) -> None:
    """Build the task's first request: what is wrong with it shows before an engine starts."""
    from lm_eval.models.vllm_causallms import VLLM

    from vllm_proxy.llm.sampling import sampling_params

    if task.config.num_fewshot != 0 and num_fewshot is not None:
        task.set_config("num_fewshot", num_fewshot)
    try:
        task.set_fewshot_seed(0)
        task.build_all_requests(limit=1)
    except Exception as error:  # noqa: BLE001 - a task is made of others' code and data
        raise ProxyConfigError(
            f"--tasks {name!r}: no request can be built of its first row "
            f"({type(error).__name__}: {one_line(error)}); check the task, and --num-fewshot"
        ) from None
    for request in task.instances:
        if request.request_type == "generate_until":
            kwargs, *_ = VLLM.modify_gen_kwargs(request.args[1])
            sampling_params(kwargs, f"{name}.generation_kwargs")
