"""Do the members' tokenizers give every id the same meaning?"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from vllm_proxy.config.roles import Role
from vllm_proxy.config.schema import Member
from vllm_proxy.members.attempt import attempt
from vllm_proxy.members.location import Unreadable, locate
from vllm_proxy.members.read import ReadMember

# Scripts, spaces, digits, accents and an emoji: two tokenizers with the same vocabulary that
# normalise or split differently encode one of these differently.
_PROBE = (
    "The  Quick 1234 brown\nfox's caf\u00e9, na\u00efve \ufb01 Stra\u00dfe "
    "\u4f60\u597d\uff0c\u4e16\u754c \u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631 "
    "\u0928\u092e\u0938\u094d\u0924\u0947 \U0001f642\t{x: [0.5]}"
)


MOST_LISTED = 32
"""Most ids that one sentence lists with their names."""


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """The properties of a tokenizer that are compared.

    Attributes:
        size: number of tokens.
        tokens: id -> token.
        added: ids of special and added tokens, which text is never split into unless it contains
            their names.
        probe: the ids of the probe text.
    """

    size: int
    tokens: Mapping[int, str]
    added: frozenset[int]
    probe: list[int]


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a member's tokenizer differs from the base's.

    Attributes:
        renamed: ids that both have, with different names.
        problem: why the member cannot be used with the base, or None.
    """

    renamed: frozenset[int]
    problem: str | None


def load_tokenizers(
    members: Mapping[Role, ReadMember], engine: Mapping[str, Any]
) -> tuple[dict[Role, Tokenizer], list[str]]:
    """Load each member's tokenizer. Returns those that can be read, and the problems."""
    if engine.get("skip_tokenizer_init"):
        return {}, []
    tokenizers, problems = {}, []
    load = cache(_load)  # two members may be one model
    for role, member in members.items():
        config = member.model_config
        try:
            directory = _directory(member, engine)
            tokenizers[role] = load(directory, config.tokenizer_mode, config.trust_remote_code)
        except Unreadable as error:
            problems.append(f"{member.name}: {error}")
    return tokenizers, problems


def _directory(member: ReadMember, engine: Mapping[str, Any]) -> Path:
    """Return the tokenizer's directory; for the base, `engine.tokenizer` may name another one."""
    other = engine.get("tokenizer")
    if member.role != "base" or not isinstance(other, str):
        return member.files.directory
    try:
        return locate(Member(model=other, revision=engine.get("tokenizer_revision"))).directory
    except Unreadable as error:
        raise Unreadable(f"`engine.tokenizer` is {other!r}: {error}") from None


def _load(directory: Path, tokenizer_mode: str, trust_remote_code: bool) -> Tokenizer:
    from vllm.tokenizers import get_tokenizer

    def load() -> Tokenizer:
        tokenizer = get_tokenizer(
            str(directory), tokenizer_mode=tokenizer_mode, trust_remote_code=trust_remote_code
        )
        tokens = {index: token for token, index in tokenizer.get_vocab().items()}
        added = {*getattr(tokenizer, "added_tokens_decoder", ()), *tokenizer.all_special_ids}
        probe = tokenizer.encode(_PROBE, add_special_tokens=False)
        return Tokenizer(len(tokenizer), tokens, frozenset(added), probe)

    tokenizer = attempt(load)
    if isinstance(tokenizer, Exception):
        reason = (str(tokenizer).strip() or "no reason given").splitlines()[0][:120]
        raise Unreadable(
            f"no tokenizer can be read from {str(directory)!r} ({reason}); add its tokenizer "
            "files, or set `engine.skip_tokenizer_init: true` and send token ids"
        )
    return tokenizer


def compare_tokenizers(tokenizers: Mapping[Role, Tokenizer]) -> dict[Role, Comparison]:
    """Compare each member's tokenizer with the base's; nothing if that could not be read."""
    base = tokenizers.get("base")
    return {} if base is None else {role: _compare(t, base) for role, t in tokenizers.items()}


def _compare(tokenizer: Tokenizer, base: Tokenizer) -> Comparison:
    common = tokenizer.tokens.keys() & base.tokens.keys()
    renamed = {index for index in common if tokenizer.tokens[index] != base.tokens[index]}
    problem = None
    if clashes := renamed - (tokenizer.added & base.added):
        first = min(clashes)
        problem = (
            f"its tokenizer has {tokenizer.tokens[first]!r} at id {first}, the base's "
            f"{base.tokens[first]!r} ({len(clashes)} of {len(common)} ids differ)"
        )
    elif tokenizer.probe != base.probe:
        pairs = enumerate(zip(tokenizer.probe, base.probe, strict=False))
        shorter = min(len(tokenizer.probe), len(base.probe))
        at = next((i for i, (a, b) in pairs if a != b), shorter)
        problem = (
            "its tokenizer splits text differently from the base's, with the same vocabulary "
            f"(probe text, token {at}: {_piece(tokenizer, at)} against {_piece(base, at)})"
        )
    return Comparison(frozenset(renamed), problem)


def tokenizer_problems(
    members: Mapping[Role, ReadMember],
    tokenizers: Mapping[Role, Tokenizer],
    comparisons: Mapping[Role, Comparison],
) -> Iterator[str]:
    """Yield where a tokenizer does not fit its model, or the base's tokenizer."""
    for role, tokenizer in tokenizers.items():
        vocab_size = members[role].model_config.get_vocab_size()
        last = max(tokenizer.tokens.keys() - tokenizer.added, default=-1)
        if last >= vocab_size:
            yield (
                f"{members[role].name}: its tokenizer has id {last} ({tokenizer.tokens[last]!r}) "
                f"of {tokenizer.size} tokens, but `vocab_size` is {vocab_size}; use the tokenizer "
                "the model was trained with"
            )
    for role, comparison in comparisons.items():
        if comparison.problem is not None:
            yield f"{members[role].name}: {comparison.problem}; use members that share a tokenizer"


def _piece(tokenizer: Tokenizer, at: int) -> str:
    if at >= len(tokenizer.probe):
        return "nothing"
    return repr(tokenizer.tokens.get(tokenizer.probe[at], tokenizer.probe[at]))


def describe_tokenizers(
    members: Mapping[Role, ReadMember],
    tokenizers: Mapping[Role, Tokenizer],
    comparisons: Mapping[Role, Comparison],
) -> Iterator[str]:
    """Yield which tokens only some members have, or have under other names."""
    for role, tokenizer in tokenizers.items():
        tokens = tokenizer.tokens
        name, size = members[role].name, members[role].model_config.get_vocab_size()
        if lacked := sorted(i for i in tokenizer.added & tokens.keys() if i >= size):
            yield (
                f"{name}: its tokenizer has {_count(lacked)} that the model lacks, first id "
                f"{lacked[0]} ({tokens[lacked[0]]!r}; `vocab_size` is {size}): requests with "
                "such ids, or with text that contains their names, are rejected."
            )
        if role not in comparisons or comparisons[role].problem is not None:
            continue
        base = tokenizers["base"].tokens
        if renamed := sorted(comparisons[role].renamed):
            names = [f"{i} {base[i]!r} / {tokens[i]!r}" for i in renamed[:MOST_LISTED]]
            more = f", and {len(renamed) - MOST_LISTED} more" if len(renamed) > MOST_LISTED else ""
            yield (
                f"{name} has other names for {len(renamed)} of the base's special and added tokens "
                f"(id base / {role}): {', '.join(names)}{more}. Text is read and written by the "
                "base's names, unless `engine.tokenizer` names another model."
            )
        if extra := sorted(tokens.keys() - base.keys()):
            yield (
                f"{name} has {_count(extra)} beyond the base's tokenizer, first id {extra[0]} "
                f"({tokens[extra[0]]!r}): text is never encoded to them."
            )
        if extra := sorted(base.keys() - tokens.keys()):
            yield (
                f"The base's tokenizer has {_count(extra)} that {name} does not know, first id "
                f"{extra[0]} ({base[extra[0]]!r})."
            )


def _count(tokens: list[int]) -> str:
    return f"{len(tokens)} token" + ("" if len(tokens) == 1 else "s")
