"""Do the members see the same image? Reads configs and image processors, never weights."""

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_proxy.config.engine_arguments import allows_images
from vllm_proxy.config.media import LIMITS, images_problem
from vllm_proxy.config.roles import Role
from vllm_proxy.members.images import family_problem
from vllm_proxy.members.location import Unreadable
from vllm_proxy.members.read import ReadMember
from vllm_proxy.members.towers import Tower, difference, read_tower
from vllm_proxy.members.weights import checkpoint_files, safetensors_header


def read_towers(
    members: Mapping[Role, ReadMember], engine: Mapping[str, Any]
) -> tuple[dict[Role, Tower], list[str]]:
    """Return how each member sees, of those that do, and the problems; nothing without images.

    Args:
        members: the members that can be used.
        engine: the configuration's engine arguments.
    """
    if not allows_images(engine.get(LIMITS)) or "base" not in members:
        return {}, []
    towers: dict[Role, Tower] = {}
    wrong = images_problem(engine, "engine.")
    problems = [] if wrong is None else [str(wrong)]
    changes = engine.get("mm_processor_kwargs")
    for role, member in members.items():
        try:
            tower = read_tower(
                str(member.files.directory),
                trust_remote_code=bool(engine.get("trust_remote_code")),
                changes=changes if isinstance(changes, Mapping) else None,
            )
        except Unreadable as error:
            problems.append(f"{member.name}: {error}")
            tower = None
        if tower is not None:
            towers[role] = tower
        elif role == "base":
            if not any(line.startswith(member.name) for line in problems):
                family = member.model_config.hf_config.model_type
                problems.append(_asked(engine, f"the base cannot see: {family_problem(family)}"))
            return {}, problems
    problems += [
        f"{members[role].name}: {problem}"
        for role, tower in towers.items()
        if (problem := difference(tower, towers["base"]))
    ]
    problems += _placeholder_problems(members, towers)
    load_format = str(engine.get("load_format", "auto"))
    for role, tower in towers.items() if load_format != "dummy" else ():
        problems += _weight_problems(members[role], tower, load_format)
    return towers, problems


def _asked(engine: Mapping[str, Any], problem: str) -> str:
    return f"`engine.{LIMITS}` is {engine[LIMITS]}: {problem}; remove it"


def _placeholder_problems(
    members: Mapping[Role, ReadMember], towers: Mapping[Role, Tower]
) -> Iterator[str]:
    """Yield the members of text only that cannot read the tokens of an image."""
    token = towers["base"].config.image_token_id
    for role, member in members.items():
        size = member.model_config.get_vocab_size()
        if role not in towers and token >= size:
            yield (
                f"{member.name}: an image is the token {token} in prompts, and it reads ids from 0 "
                f"to {size - 1}; use a member with the base's vocabulary"
            )


def _weight_problems(member: ReadMember, tower: Tower, load_format: str) -> Iterator[str]:
    """Yield the problem of a checkpoint that lacks weights of the tower, if its files are here."""
    try:
        files = checkpoint_files(member.files, load_format)
        found = {name: shape for file in files for name, shape in safetensors_header(file).items()}
    except Unreadable:  # reported with the member's other weights
        return
    if not found or member.model_config.is_quantized:
        return
    found = {_own(name): shape for name, shape in found.items()}
    wrong = [name for name, shape in tower.shapes.items() if found.get(_own(name)) != shape]
    if wrong:
        listed = ", ".join(wrong[:3]) + (", …" if len(wrong) > 3 else "")
        yield (
            f"{member.name}: {len(wrong)} of the tower's {len(tower.shapes)} tensors are not in "
            f"the checkpoint, or have another shape: {listed}; use a checkpoint of the whole "
            "model, or one of text only"
        )


def _own(name: str) -> str:
    """Return a tensor's name as checkpoints of every age have it."""
    return name.removeprefix("model.")


def context_problem(towers: Mapping[Role, Tower], context: int) -> str | None:
    """Return that no image fits into *context*, the most tokens of a sequence; None if one does."""
    if not towers:
        return None
    base = towers["base"]
    needed = base.image_tokens[0] + base.fields.around + 1  # and a token of the answer
    if needed <= context:
        return None
    return (
        f"`engine.max_model_len` is {context}: a prompt with an image has at least {needed - 1} "
        f"tokens; set it to {needed} or more"
    )


def describe_images(
    members: Mapping[Role, ReadMember], towers: Mapping[Role, Tower], itemsize: int, context: int
) -> Iterator[str]:
    """Yield who sees images, and what an image costs.

    Args:
        members: all members.
        towers: of those that see; none without images.
        itemsize: bytes of a weight in the engine.
        context: the most tokens of a sequence.
    """
    if not towers:
        return
    sizes = {role: tower.parameters * itemsize for role, tower in towers.items()}
    listed = ", ".join(f"{role} {size:,}" for role, size in sizes.items())
    base = towers["base"]
    fewest, most = base.image_tokens
    longest = context - base.fields.around - 1  # and a token of the answer
    yield (
        f"Members see images, each with its tower: {listed}, {sum(sizes.values()):,} bytes in "
        f"total. An image takes {fewest:,} to {most:,} tokens of the context."
    )
    if most > longest:
        yield (
            f"An image with more than {longest:,} tokens is refused, because a sequence has at "
            f"most {context:,}; `engine.mm_processor_kwargs: {{{base.fields.smaller}}}` makes "
            "images smaller."
        )
    if blind := [role for role in members if role not in towers]:
        verb = "does" if len(blind) == 1 else "do"
        yield (
            f"{' and '.join(blind)} {verb} not see images: to a model of text only, the tokens of "
            "an image are ordinary tokens."
        )
