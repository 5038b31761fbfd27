"""Members' own sequences inside a virtual one, position by position: no engine, plain loops beside.

A request lives here as it does in vLLM: a block table of random blocks, chunks of random length, a
prompt that `lengthen_prompt` made as long as the longest member's.
"""

import random
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from vllm_proxy.config.request import PROMPT_KEYS
from vllm_proxy.config.roles import ROLES
from vllm_proxy.engine.scheduler import lengthen_prompt
from vllm_proxy.model.alignment import CacheGroup, MemberPrompts, StepBatch, rows_differ
from vllm_proxy.model.shifts import MemberShifts, offsets_of

BLOCK = 8
LIMIT = 256
LENGTHS = (1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 50, 100)


def make_request(name: str, base: list[int], salt: str | None = None, **own: list[int]) -> Request:
    init_none_hash(sha256)
    extra_args = {PROMPT_KEYS[role]: ids for role, ids in own.items()}
    return Request(
        request_id=name,
        prompt_token_ids=base,
        sampling_params=SamplingParams(max_tokens=4, extra_args=extra_args or None),
        pooling_params=None,
        cache_salt=salt,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


@dataclass
class Sequence:
    """One request, what it has computed so far, and what each member has been seen to store."""

    prompts: dict[str, list[int]] | None
    virtual: list[int]
    blocks: list[int]
    own: MemberPrompts | None = None
    computed: int = 0
    stored: dict[str, dict[int, int]] = field(default_factory=lambda: {r: {} for r in ROLES})

    @classmethod
    def draw(cls, rng: random.Random, blocks: list[int], *, ordinary: bool) -> "Sequence":
        ids = {r: [rng.randrange(1000) for _ in range(rng.choice(LENGTHS))] for r in ROLES}
        generated = [rng.randrange(1000) for _ in range(20)]
        if ordinary:
            return cls(None, ids["base"] + generated, blocks)
        own = {role: ids[role] for role in ("expert", "antiexpert")}
        request = make_request("r", ids["base"], **own)
        lengthen_prompt(request, BLOCK, LIMIT)
        prompts = MemberPrompts(request.prompt_token_ids, request.sampling_params.extra_args, ROLES)
        return cls(ids, request.prompt_token_ids + generated, blocks, prompts)

    def own_sequence(self, role: str) -> list[int]:
        """What the member is to read, up to what is computed: its prompt, what was generated."""
        if self.prompts is None:
            return self.virtual[: self.computed]
        generated = self.virtual[len(self.virtual) - 20 :]
        length = self.computed - self.own.offsets[role]
        return (self.prompts[role] + generated)[: max(length, 0)]


def step(sequences: list[Sequence], scheduled: list[int], padding: int = 0) -> None:
    """Run one step of every member, with a KV cache that remembers which token a slot is of."""
    parts = [range(s.computed, s.computed + n) for s, n in zip(sequences, scheduled, strict=True)]
    ids = [s.virtual[v] for s, part in zip(sequences, parts, strict=True) for v in part]
    fill = [-7] * padding
    table = torch.zeros(len(sequences), LIMIT // BLOCK, dtype=torch.int32)
    for row, sequence in zip(table, sequences, strict=True):
        row[: len(sequence.blocks)] = torch.tensor(sequence.blocks)
    batch = StepBatch(
        prompts=[s.own for s in sequences],
        scheduled=np.array(scheduled, dtype=np.int32),
        computed=np.array([s.computed for s in sequences], dtype=np.int32),
        is_prefilling=np.array([s.computed < len(s.virtual) - 20 for s in sequences]),
        input_ids=torch.tensor(ids + fill, dtype=torch.int32),
        positions=torch.tensor([v for part in parts for v in part] + fill),
        seq_lens=torch.tensor([part.stop for part in parts]),
        groups=[CacheGroup(table, BLOCK, []), CacheGroup(1000 - table, BLOCK, [], True)],
    )
    before = [s.computed for s in sequences]
    for sequence, part in zip(sequences, parts, strict=True):
        sequence.computed = part.stop
    for role, inputs in batch.members().items():
        common, of_states = inputs.commons
        starts = common.query_start_loc.tolist()
        counts = [end - start for start, end in pairwise(starts)]
        assert inputs.input_ids.dtype == torch.int32
        assert common.num_actual_tokens == len(inputs.rows) == starts[-1]
        assert common.max_query_len == max(counts, default=0)
        active = []  # the requests with tokens of this member, and where theirs end in the batch
        for sequence, computed, end in zip(sequences, before, np.cumsum(scheduled), strict=True):
            offset = sequence.own.offsets[role] if sequence.own else 0
            if sequence.computed > offset:
                active.append((sequence, sequence.computed - max(computed, offset), int(end)))
        assert counts == [count for _, count, _ in active]
        for i, (sequence, count, end) in enumerate(active):
            part = slice(starts[i], starts[i + 1])
            cache = sequence.stored[role]
            slots, ids = common.slot_mapping[part].tolist(), inputs.input_ids[part].tolist()
            cache.update(zip(slots, ids, strict=True))
            assert inputs.rows[part].tolist() == list(range(end - count, end))
            # As attention reads them: the last tokens of a sequence that starts with the table.
            truth = sequence.own_sequence(role)
            in_prompt = before[sequences.index(sequence)] < len(sequence.virtual) - 20
            assert bool(common.is_prefilling[i]) == in_prompt
            length = int(common.seq_lens[i])
            assert length == len(truth) == int(common.seq_lens_cpu_upper_bound[i])
            assert inputs.positions[part].tolist() == list(range(length - count, length))
            blocks = common.block_table_tensor[i].tolist()
            assert [cache[blocks[j // BLOCK] * BLOCK + j % BLOCK] for j in range(length)] == truth
            # As recurrent layers read them: the column of the member's last token has the block of
            # the virtual one.
            states = of_states.block_table_tensor[i, (length - 1) // BLOCK]
            assert states == 1000 - sequence.blocks[(sequence.computed - 1) // BLOCK]
    if not rows_differ(batch.prompts, batch.is_prefilling):
        require_same_shifts(batch)


def require_same_shifts(batch: StepBatch) -> None:
    """What all members read on the same rows is what each of them reads on its own."""
    rows, requests = int(batch.scheduled.sum()), len(batch.scheduled)
    total = len(batch.positions)
    tables = torch.zeros(requests + 2, LIMIT // BLOCK).int()
    rooms = [replace(group, block_table=tables) for group in batch.groups]
    shifts = MemberShifts(ROLES, total + 3, rooms, {})
    slots = torch.full((2, total), -1)  # vLLM's, of rows that pad
    common = batch.seq_lens, batch.groups, slots, int(batch.seq_lens.max())
    shifts.shift(offsets_of(batch.prompts, ROLES), batch.scheduled, batch.positions, *common)
    positions = shifts.member_positions(batch.positions)
    for i, (role, inputs) in enumerate(batch.members().items()):
        truth, of_states = inputs.commons
        assert positions[role][:rows].tolist() == inputs.positions.tolist()
        assert (
            shifts.slots[i, 0, :total].tolist()
            == truth.slot_mapping.tolist() + slots[0, rows:].tolist()
        )
        assert shifts.seq_lens[i, :requests].tolist() == truth.seq_lens.tolist()
        for tables, its in zip(shifts.tables, (truth, of_states), strict=True):
            for own, table, length in zip(
                tables[i], its.block_table_tensor, truth.seq_lens, strict=False
            ):
                used = -(-int(length) // BLOCK)
                assert own[:used].tolist() == table[:used].tolist()
    shifts.share(*common)  # an ordinary step follows
    assert shifts.member_positions(batch.positions)["expert"].tolist() == batch.positions.tolist()
    assert shifts.slots[1, :, :total].tolist() == slots.tolist()


@pytest.mark.parametrize("seed", range(20))
def test_every_member_reads_its_own_sequence(seed):
    """Chunks end before, at and after members' starts; ordinary requests are in the batch."""
    rng = random.Random(seed)
    blocks = rng.sample(range(1, 1000), 8 * LIMIT // BLOCK)
    sequences = [Sequence.draw(rng, blocks[i::8], ordinary=i % 4 == 3) for i in range(8)]
    while running := [s for s in sequences if s.computed < len(s.virtual)]:
        some = rng.sample(running, rng.randrange(1, len(running) + 1))
        most = rng.choice((1, 3, BLOCK, 40))
        scheduled = [min(rng.randrange(1, most + 1), len(s.virtual) - s.computed) for s in some]
        if any(s.own for s in some):
            step(some, scheduled, padding=rng.randrange(4))
        else:  # an ordinary step, where each slot is that of its position
            for sequence, count in zip(some, scheduled, strict=True):
                for v in range(sequence.computed, sequence.computed + count):
                    slot = sequence.blocks[v // BLOCK] * BLOCK + v % BLOCK
                    for cache in sequence.stored.values():
                        cache[slot] = sequence.virtual[v]
                sequence.computed += count


def test_generated_tokens_never_lie_in_shared_blocks():
    """Two requests with the same prompts share cached blocks; what they generate may differ."""
    for seed in range(200):
        rng = random.Random(seed)
        sequence = Sequence.draw(rng, list(range(1, LIMIT // BLOCK + 1)), ordinary=False)
        length = len(sequence.virtual) - 20
        shared = (length - 1) // BLOCK  # vLLM computes a prompt's last token again
        step([sequence], [length], 0)
        before = {role: set(cache) for role, cache in sequence.stored.items()}
        step([sequence], [20], 0)
        for role, cache in sequence.stored.items():
            generated = {slot // BLOCK - 1 for slot in set(cache) - before[role]}
            assert min(generated) >= shared


def test_a_cached_prefix_holds_what_every_member_needs():
    """Another request that starts where the cached blocks end finds each slot before its own."""
    rng = random.Random(0)
    for _ in range(100):
        first = Sequence.draw(rng, list(range(1, LIMIT // BLOCK + 1)), ordinary=False)
        length = len(first.virtual) - 20
        step([first], [length], 0)
        cached = (length - 1) // BLOCK
        own = [b if i < cached else 500 + b for i, b in enumerate(first.blocks)]
        stored = {
            role: {slot: id_ for slot, id_ in cache.items() if slot // BLOCK - 1 < cached}
            for role, cache in first.stored.items()
        }
        second = Sequence(first.prompts, first.virtual, own, first.own, cached * BLOCK, stored)
        step([second], [length - cached * BLOCK], 0)
        step([second], [1], 0)


@pytest.mark.parametrize("longest", ROLES)
def test_prompt_is_lengthened_to_the_longest_member(longest):
    lengths = dict.fromkeys(ROLES, 5) | {longest: 21}
    base, expert, antiexpert = ([7 + i] * n for i, n in enumerate(lengths.values()))
    request = make_request("r", base, expert=expert, antiexpert=antiexpert)
    view = request.all_token_ids
    lengthen_prompt(request, BLOCK, LIMIT)
    assert request.num_prompt_tokens == len(request.prompt_token_ids) == 24
    assert request.prompt_token_ids[-len(base) :] == base
    assert list(view) == request.prompt_token_ids
    assert len(request.block_hashes) == 3
    prompts = MemberPrompts(request.prompt_token_ids, request.sampling_params.extra_args, ROLES)
    assert {role: ids.tolist() for role, ids in prompts.ids.items()} == {
        "base": base,
        "expert": expert,
        "antiexpert": antiexpert,
    }
    assert prompts.offsets == {role: 24 - n for role, n in lengths.items()}


def test_a_member_without_a_prompt_reads_the_base_s():
    request = make_request("r", [3, 4, 5], expert=[6] * 9)
    lengthen_prompt(request, BLOCK, LIMIT)
    prompts = MemberPrompts(request.prompt_token_ids, request.sampling_params.extra_args, ROLES)
    assert prompts.ids["antiexpert"].tolist() == prompts.ids["base"].tolist() == [3, 4, 5]
    assert prompts.offsets == {"base": 13, "expert": 7, "antiexpert": 13}


def test_blocks_are_shared_by_the_same_prompts_only():
    def hashes(name: str, *args, **own) -> list[bytes]:
        request = make_request(name, *args, **own)
        lengthen_prompt(request, BLOCK, LIMIT)
        return request.block_hashes

    base, other = list(range(20)), list(range(1, 21))
    first = hashes("a", base, expert=base, antiexpert=other)
    assert first == hashes("b", base, expert=base, antiexpert=other)
    for different in (
        hashes("c", base),
        hashes("c", base, expert=base),
        hashes("c", base, expert=other, antiexpert=base),
        hashes("c", base, expert=base, antiexpert=base),
        hashes("c", base, "salt", expert=base, antiexpert=other),
    ):
        assert not set(first) & set(different)
    # The same tokens, but for how many of them are the base's.
    assert not set(hashes("d", [5] * 8, expert=[6] * 16)) & set(
        hashes("e", [5] * 9, expert=[6] * 16)
    )


def test_near_the_context_s_end_no_block_is_shared():
    """A multiple of the block size does not fit; generated tokens may lie in a shared block."""
    length = LIMIT - 3
    hashes = []
    for name in "ab":
        request = make_request(name, [5] * length, expert=[6])
        lengthen_prompt(request, BLOCK, LIMIT)
        assert request.num_prompt_tokens == length
        hashes += request.block_hashes
    assert len(set(hashes)) == len(hashes) > 0


def test_ordinary_requests_are_left_alone():
    request = make_request("r", [1, 2, 3])
    before = list(request.block_hashes), request.sampling_params.extra_args
    lengthen_prompt(request, BLOCK, LIMIT)
    assert request.prompt_token_ids == [1, 2, 3]
    assert (request.block_hashes, request.sampling_params.extra_args) == before
