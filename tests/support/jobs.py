"""Jobs: their configuration, rows and records, and an engine for what happens to their files."""

import json
from pathlib import Path
from types import SimpleNamespace

from vllm_proxy.config.errors import EngineDiedError
from vllm_proxy.config.schema import ProxyConfig

JOB_ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 4,
    "gpu_memory_utilization": 0.1,
}


def make_config(**values) -> ProxyConfig:
    members = {"base": "b", "expert": "e", "antiexpert": "a"}
    return ProxyConfig.parse({**members, "engine": JOB_ENGINE, **values}, "test")


def write_rows(path: Path, *rows: dict | str) -> str:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))
    return str(path)


def records(path: Path | str) -> list[dict]:
    # Not `splitlines`, which also breaks at the U+2028 and U+0085 that a text may have.
    return [json.loads(line) for line in Path(path).read_bytes().split(b"\n")[:-1]]


class FakeEngine:
    """Answers a row with its own ids, one row a step; after *dies_after* answers it raises *error*.

    So it does with a row whose id is *poison* among those that it was asked.

    Only for what happens to files: nothing here says anything about generation.
    """

    def __init__(
        self,
        dies_after: int | None = None,
        error: type[Exception] = EngineDiedError,
        poison: int | None = None,
    ):
        self._error, self._poison = error, poison
        self.asked, self.most_waiting, self._left = [], 0, dies_after
        self._waiting: list[tuple[str, list[int]]] = []
        model = SimpleNamespace(
            get_vocab_size=lambda: 100,
            get_diff_sampling_param=dict,
            max_logprobs=20,
            is_diffusion=False,
        )
        self.model_config = model
        self.llm_engine = SimpleNamespace(
            step=self._step,
            tokenizer=object(),
            vllm_config=SimpleNamespace(
                model_config=model,
                scheduler_config=SimpleNamespace(max_num_seqs=2),
                speculative_config=None,
                structured_outputs_config=None,
            ),
        )

    def enqueue(self, prompts, params, use_tqdm):
        if self._left == 0:
            raise self._error("the engine died")
        (prompt,) = prompts
        number = len(self.asked)
        self.asked.append(prompt["prompt_token_ids"])
        self._waiting.append((str(number), prompt["prompt_token_ids"]))
        self.most_waiting = max(self.most_waiting, len(self._waiting))
        return [f"{number}-suffix"]

    def _step(self):
        if self._left == 0 or any(ids == [self._poison] for _, ids in self._waiting):
            raise self._error("the engine died")
        self._left = None if self._left is None else self._left - 1
        number, ids = self._waiting.pop()  # the last first: rows finish in any order
        completion = SimpleNamespace(text="", token_ids=ids, finish_reason="length", logprobs=None)
        return [
            SimpleNamespace(
                request_id=number,
                finished=True,
                outputs=[completion],
                prompt_token_ids=ids,
                prompt_logprobs=None,
            )
        ]
