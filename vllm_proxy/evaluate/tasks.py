"""The tasks of an evaluation: found, loaded and tried on one row each, before an engine starts."""

import re
from collections.abc import Iterator, Mapping, Sequence
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
"""Keys of a task's `metadata`. The first is a system prompt for members that see a chat template,
the second names a score that must be computed from the answers elsewhere."""

_LOCAL_BUILDERS = {"arrow", "csv", "json", "parquet", "text", "xml"}
_NO_LM_EVAL_MESSAGE = (
    "evaluate needs lm-evaluation-harness, which is not installed; pip install "
    "'vllm-proxy[evaluate]'"
)


@dataclass(frozen=True)
class Selection:
    """The selected tasks.

    Attributes:
        manager: that loaded them.
        items: groups, and the tasks in no group, as arguments of the harness.
        tasks: all tasks, by name.
        notes: for the user, one line each.
    """

    manager: "TaskManager"
    items: "list[Task | Group]"
    tasks: "Mapping[str, Task]"
    notes: tuple[str, ...]

    @property
    def system_prompts(self) -> dict[str, str]:
        """System prompts for members that see a chat template, by task."""
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
        specs: names of tasks, groups or tags, patterns of names (`arc_*`), or YAML files.
        include: directory with more tasks, which override the harness's own.
        num_fewshot: examples before each question, for tasks that allow them.
        confirm_run_unsafe_code: allow tasks that run code written by the models.

    Raises:
        ProxyConfigError: lm-eval is not installed; a task is unknown or invalid, or needs a network
            that does not answer.
    """
    if include is not None and not Path(include).is_dir():
        field = f"--include {include!r}"
        raise ProxyConfigError("no such directory", field=field, remedy="check the path")
    manager, configs = _found(specs, include)
    if not all(map(_is_local, configs.values())):
        _work_offline_if_the_hub_is_silent()
    items, tasks = _loaded(manager, configs)
    notes: list[str] = []
    for name, task in tasks.items():
        _require_supported(name, task, confirm_run_unsafe_code=confirm_run_unsafe_code)
        notes += _notes(name, task, num_fewshot)
        _build_first_request(name, task, num_fewshot)
    return Selection(manager, items, tasks, tuple(notes))


def _found(
    specs: Sequence[str], include: str | None
) -> "tuple[TaskManager, dict[str, dict[str, Any]]]":
    """Return the manager of the tasks, and the configuration of each one by name or path."""
    try:
        from lm_eval.tasks import TaskManager
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "lm_eval":
            raise
        raise ProxyConfigError(_NO_LM_EVAL_MESSAGE) from None

    files = {spec: _read(spec) for spec in specs if spec.endswith((".yaml", ".yml"))}
    # The index of the harness's own tasks takes seconds; a task in a file does not need it.
    only_files = len(files) == len(specs)
    is_complete = only_files and not any("group" in config for config in files.values())
    manager = TaskManager(include_path=include, include_defaults=not is_complete)
    names = [
        name for spec in specs for name in ([spec] if spec in files else _match(spec, manager))
    ]
    return manager, {name: files.get(name) or _index_entry(manager, name) for name in names}


def _loaded(
    manager: "TaskManager", configs: Mapping[str, Mapping[str, Any]]
) -> "tuple[list[Task | Group], dict[str, Task]]":
    """Return the groups and tasks at the top, and all tasks by name."""
    items: list[Task | Group] = []
    tasks: dict[str, Task] = {}
    for name, config in configs.items():
        loaded = _load(name, manager, config)
        for task in loaded["tasks"]:
            if task in tasks:
                raise ProxyConfigError(
                    "the task is selected twice", field=f"--tasks {task!r}", remedy="name it once"
                )
        tasks |= loaded["tasks"]
        every = {**loaded.get("groups", {}), **loaded["tasks"]}
        inner = {child for group in loaded.get("group_map", {}).values() for child in group}
        items += [item for key, item in every.items() if key not in inner]
    return items, tasks


def _require_supported(name: str, task: "Task", *, confirm_run_unsafe_code: bool) -> None:
    if getattr(task, "MULTIMODAL", False):
        raise ProxyConfigError(
            "the task shows images or sound, and members read only text",
            field=f"--tasks {name!r}",
            remedy="leave it out",
        )
    if getattr(task, "UNSAFE_CODE", False) and not confirm_run_unsafe_code:
        raise ProxyConfigError(
            "the task runs code written by the models",
            field=f"--tasks {name!r}",
            remedy="add --confirm-run-unsafe-code on a machine where such code may run",
        )


def _notes(name: str, task: "Task", num_fewshot: int | None) -> Iterator[str]:
    if num_fewshot and task.config.num_fewshot == 0:
        yield f"{name}: the task allows no examples; --num-fewshot does not apply to it"
    if missing := (task.config.metadata or {}).get(NOT_COMPUTED):
        yield f"{name}: not computed here: {missing}"


def _read(path: str) -> dict[str, Any]:
    from lm_eval.tasks._yaml_loader import load_yaml

    field, guide = f"--tasks {path!r}", "see lm-eval's guide to tasks"
    if not Path(path).is_file():
        raise ProxyConfigError("no such file", field=field, remedy="check the path")
    require_bounded_yaml(path, field, guide)
    try:
        config = load_yaml(path, resolve_func=False)
    except Exception as error:  # noqa: BLE001 - a file may be wrong in any way
        problem = f"it is not a task file ({one_line(error)})"
        raise ProxyConfigError(problem, field=field, remedy=guide) from None
    if "task" not in config:
        raise ProxyConfigError("`task` is missing", field=field, remedy="add `task: <name>`")
    return config


def _match(spec: str, manager: "TaskManager") -> list[str]:
    if matches := manager.match_tasks([spec]):
        return matches
    near = did_you_mean(spec, manager.all_tasks).removeprefix("; ")
    raise ProxyConfigError("unknown task", field=f"--tasks {spec!r}", remedy=near)


def _index_entry(manager: "TaskManager", name: str) -> dict[str, Any]:
    return manager.task_index[name].cfg or {}


def _is_local(config: Mapping[str, Any]) -> bool:
    path = config.get("dataset_path")
    if path in _LOCAL_BUILDERS:
        return "://" not in str((config.get("dataset_kwargs") or {}).get("data_files"))
    return isinstance(path, str) and Path(path).exists()


def _work_offline_if_the_hub_is_silent() -> None:
    """Try the Hub once; the libraries would try for half a minute for every task."""
    import datasets
    import huggingface_hub

    hub = huggingface_hub.constants
    if hub.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.utils.get_session().head(hub.ENDPOINT, timeout=5)
    except Exception:  # noqa: BLE001 - the exceptions depend on its HTTP client
        hub.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _load(name: str, manager: "TaskManager", config: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return manager.load([name])
    except Exception as error:  # noqa: BLE001 - a file may be wrong in any way
        if _is_network_error(error):
            found = re.search(r"'([^']+(?=' (on the Hub|doesn't exist))|\w+://[^']+)'", str(error))
            what = found[1] if found else _data_source(config)
            raise ProxyConfigError(
                f"the task needs the network: {what!r} does not answer, and is not in the cache",
                field=f"--tasks {name!r}",
                remedy="run it once on a machine with a network and copy HF_HOME, or use a task "
                "with local files",
            ) from None
        _require_metrics(name, config)
        raise ProxyConfigError(
            f"the task cannot be loaded ({type(error).__name__}: {one_line(error)})",
            field=f"--tasks {name!r}",
            remedy="check the task",
        ) from None


def _data_source(config: Mapping[str, Any]) -> str:
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
            near = did_you_mean(metric, metric_registry.keys()).removeprefix("; ")
            field = f"--tasks {name!r}"
            raise ProxyConfigError(f"unknown metric `{metric}`", field=field, remedy=near)


def _is_network_error(error: BaseException | None) -> bool:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    kinds = (ConnectionError, LocalEntryNotFoundError, OfflineModeIsEnabled)
    # Files at a URL, and metrics, which are scripts on the Hub.
    words = ("Unable to find 'http", "on the Hugging Face Hub either")
    while error is not None:
        if isinstance(error, kinds) or any(word in str(error) for word in words):
            return True
        error = error.__cause__ or error.__context__
    return False


def _build_first_request(name: str, task: "Task", num_fewshot: int | None) -> None:
    """Build the task's first request, so that errors in it appear before an engine starts."""
    from lm_eval.models.vllm_causallms import VLLM

    from vllm_proxy.llm.sampling import sampling_params

    if task.config.num_fewshot != 0 and num_fewshot is not None:
        task.set_config("num_fewshot", num_fewshot)
    try:
        task.set_fewshot_seed(0)
        task.build_all_requests(limit=1)
    except Exception as error:  # noqa: BLE001 - a task contains foreign code and data
        raise ProxyConfigError(
            f"its first row makes no request ({type(error).__name__}: {one_line(error)})",
            field=f"--tasks {name!r}",
            remedy="check the task and --num-fewshot",
        ) from None
    for request in task.instances:
        if request.request_type == "generate_until":
            kwargs, *_ = VLLM.modify_gen_kwargs(request.args[1])
            sampling_params(kwargs, f"{name}.generation_kwargs")
