"""Members as vLLM reads their config.json."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_proxy.config.errors import ProxyConfigError, one_line
from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import Member, ProxyConfig
from vllm_proxy.members.adapters import require_possible_adapter
from vllm_proxy.members.attempt import attempt, make_config
from vllm_proxy.members.location import Files, Unreadable, locate
from vllm_proxy.members.supported import require_supported_member
from vllm_proxy.members.text_part import COMPOSITE, TEXT_CLASSES, with_text_part
from vllm_proxy.members.tying import follow_checkpoint

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# Engine arguments that decide how members' files are read; the same for all members.
_READING = (
    "allow_deprecated_quantization",
    "config_format",
    "disable_sliding_window",
    "hf_token",
    "model_impl",
    "tokenizer_mode",
    "trust_remote_code",
)
BASE_ONLY = ("code_revision", "hf_config_path", "hf_overrides", "quantization")
"""Engine arguments about the one checkpoint that vLLM knows: the base's."""

_NOT_FOUND = re.compile(r"packages that were not found in your environment: (\S+)\.")
"""In transformers' error when code that comes with a checkpoint imports a missing package."""


@dataclass(frozen=True, slots=True)
class ReadMember:
    """A member whose config vLLM accepts. `model_config` is that of the member served alone."""

    role: Role
    member: Member
    files: Files
    model_config: "ModelConfig"

    @property
    def name(self) -> str:
        """Its name in problems and notes."""
        return f"{self.role} `{self.member}`"

    @property
    def dtype(self) -> str:
        """The checkpoint's dtype."""
        dtype = getattr(self.model_config.hf_text_config, "dtype", None) or self.model_config.dtype
        return str(dtype).removeprefix("torch.")


def read_members(
    config: ProxyConfig, *, elsewhere: bool = False
) -> tuple[dict[Role, ReadMember], list[str]]:
    """Read every member's config. Returns the members that can be used, and the problems.

    *elsewhere*: the members will run on another machine, so kernels missing here do not matter.
    """
    from vllm.config import LoadConfig

    members: dict[Role, ReadMember] = {}
    problems: list[str] = []
    made: dict[str, ModelConfig] = {}
    for role in config.roles:
        member = config.member(role)
        keys = (*_READING, *BASE_ONLY) if role == "base" else _READING
        arguments = {key: config.engine[key] for key in keys if config.engine.get(key) is not None}
        try:
            files = locate(member)
            is_composite = _require_text_decoder(files.directory)
            arguments["model"] = str(files.directory)
            same = json.dumps(arguments, default=str)
            if is_composite:
                arguments = with_text_part(arguments)
            if same not in made:  # two members may be the same model
                made[same], wrong = _model_config(arguments, config.engine, files)
                problems += wrong
            load_config = None if elsewhere else LoadConfig()
            require_supported_member(made[same], role, load_config)
            require_possible_adapter(made[same], role, config)
        except Unreadable as error:
            problems.append(f"{role} `{member}`: {error}")
        except ProxyConfigError as error:
            problems.append(str(error))
        else:
            members[role] = ReadMember(role, member, files, made[same])
    return members, problems


def _model_config(
    arguments: Mapping[str, Any], engine: Mapping[str, Any], files: Files
) -> tuple["ModelConfig", list[str]]:
    """Return vLLM's config of a member, and the problems of arguments that it was built without.

    Raises:
        Unreadable: vLLM cannot build one.
    """
    from vllm import EngineArgs

    model_config, problems = make_config(arguments, EngineArgs.create_model_config)
    if isinstance(model_config, Exception):
        trusted = bool(arguments.get("trust_remote_code"))
        raise Unreadable(_refusal(model_config, files.directory, trusted))
    follow_checkpoint(model_config, engine.get("load_format", "auto"))
    return model_config, problems


def _refusal(error: Exception, directory: Path, trusted: bool) -> str:
    """Return why vLLM cannot build a member's config, and the remedy.

    vLLM inspects a model class in another process, and only says that this failed. Importing the
    class here tells which package is missing. *trusted*: code in the checkpoint may run, too.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    values = _config_json(directory)
    names = values.get("architectures") or ()
    imported = [attempt(known.load_model_cls) for n in names if (known := _registered(n))]
    if trusted:
        for name in (values.get("auto_map") or {}).values():
            imported.append(attempt(get_class_from_dynamic_module, name, str(directory)))
    causes = [error, *(cause for cause in imported if isinstance(cause, Exception))]
    for cause in causes:
        if package := _absent_package(cause):
            return f"it needs the Python package `{package}`, which is not installed; install it"
    if "trust_remote_code" in str(error):
        return (
            "its config.json names Python code that comes with the checkpoint (`auto_map`); set "
            "`engine.trust_remote_code: true` if you trust that code"
        )
    return f"{one_line(causes[-1])}; check its config.json, or use a model that vLLM supports"


def _registered(architecture: str) -> Any:
    from vllm import ModelRegistry

    return ModelRegistry.models.get(architecture)


def _absent_package(error: BaseException) -> str | None:
    """Return the missing package that made an import fail."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ModuleNotFoundError) and seen.name:
            return seen.name.partition(".")[0]
        if found := _NOT_FOUND.search(str(seen)):
            return found[1]
        seen = seen.__cause__ or seen.__context__
    return None


def _require_text_decoder(directory: Path) -> bool:
    """Reject by config.json alone what vLLM would first inspect in a separate process.

    Returns:
        Whether it is a multimodal model, of which members are the text model.

    Raises:
        Unreadable: the file is broken, or the model has no known text decoder.
    """
    from vllm.config.model import try_match_architecture_defaults

    values = _config_json(directory)
    names = values.get("architectures") or ["a model"]
    match = try_match_architecture_defaults(names[0])
    is_composite = any(key in values for key in COMPOSITE)
    is_known = is_composite and values.get("model_type") in TEXT_CLASSES
    kinds = {
        "an encoder-decoder": values.get("is_encoder_decoder"),
        "a multimodal model": is_composite and not is_known,
        "an encoder or pooling model": match is not None and match[1][0] == "pooling",
    }
    for kind, found in kinds.items():
        if found:
            more = f", or the text of {', '.join(TEXT_CLASSES)}" if is_composite else ""
            raise Unreadable(f"{names[0]} is {kind}; members must be text-only decoders{more}")
    return is_known


def _config_json(directory: Path) -> Mapping[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        if (directory / "adapter_config.json").is_file():
            raise Unreadable(
                "it is an adapter; give it as `{model: <the model it was trained on>, "
                "lora: <path>}`"
            )
        raise Unreadable("the directory has no config.json; give one with a whole model")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Unreadable(f"config.json cannot be read ({error}); restore the file") from None
    if not isinstance(values, dict):
        raise Unreadable("config.json is not a JSON object; restore the file")
    return values


# Cache dtypes that store nothing but the numbers: others pack them, or add scales.
PLAIN_CACHE_DTYPES = ("auto", "float16", "bfloat16", "fp8", "fp8_e4m3", "fp8_e5m2")


def end_ids(config: "ModelConfig") -> set[int]:
    """Return the ids at which vLLM stops generation with this model."""
    generation = config.try_get_generation_config().get("eos_token_id")
    ids = generation if generation is not None else config.hf_text_config.eos_token_id
    return {*ids} if isinstance(ids, list) else {ids} - {None}
