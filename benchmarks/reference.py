"""The authors' way, and its best batch size: `python benchmarks/reference.py`.

A plain loop over three transformers models, as the paper's evaluation scripts run it: a static
batch, padded on the left, that ends with its slowest row; a KV cache for each model; the same dtype
as the engines; all cores. The other benchmarks compare with it.
"""

import time
from typing import TYPE_CHECKING

import torch
from members import Members, prepare
from options import add_lengths, parser, positive, require_device
from report import finish, spread, table
from systems import Answer, Request, System, Workload, start_reference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_SIZES = (1, 4, 16, 64, 256)


class Reference:
    """The three models in this process, and the loop over them.

    On a GPU the models go to the host's memory while another system has its turn.
    """

    def __init__(self, members: Members, device: str) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        self.device, self.alpha = device, float(members.config.alpha)
        dtype = getattr(torch, members.dtype)
        self.models: list[PreTrainedModel] = []
        for role in ("base", "expert", "antiexpert"):
            path = members.config.member(role).model
            if members.config.engine.get("load_format") == "dummy":
                config = AutoConfig.from_pretrained(path)
                with torch.device(device):
                    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            else:
                model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
            self.models.append(model.to(device).eval())
            self.rest()

    def wake(self) -> None:
        """Bring the models to the device."""
        for model in self.models:
            model.to(self.device)

    def rest(self) -> None:
        """Take the models from a GPU."""
        if self.device == "cuda":
            for model in self.models:
                model.to("cpu")
            torch.cuda.empty_cache()

    def stop(self) -> None:
        """Nothing to end but the process."""

    @torch.inference_mode()
    def answer(self, requests: list[Request]) -> Answer:
        """Generate for one static batch, greedily.

        Returns tokens of exactly the lengths that were asked for; rows that are done go on being
        computed until the longest is, as they do when a row of `generate` has met its end token.
        """
        started = time.perf_counter()
        longest = max(len(request.prompt) for request in requests)
        rows = [[0] * (longest - len(r.prompt)) + r.prompt for r in requests]
        mask = [[0] * (longest - len(r.prompt)) + [1] * len(r.prompt) for r in requests]
        ids = torch.tensor(rows, device=self.device)  # [B, T]
        mask = torch.tensor(mask, device=self.device)
        caches = [None] * len(self.models)
        generated = []
        for _ in range(max(request.tokens for request in requests)):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            logits = []
            for i, model in enumerate(self.models):
                output = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=caches[i],
                    use_cache=True,
                    logits_to_keep=1,
                )
                caches[i] = output.past_key_values
                logits.append(output.logits[:, -1])
            base, expert, antiexpert = logits
            ids = (base + self.alpha * (expert - antiexpert)).argmax(-1, keepdim=True)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            generated.append(ids)
        tokens = torch.cat(generated, dim=1).tolist()
        seconds = time.perf_counter() - started
        return Answer(seconds, [t[: r.tokens] for t, r in zip(tokens, requests, strict=True)])


def best_batch_size(system: System, requests: list[Request]) -> int:
    """Return the size of `BATCH_SIZES` that answers *requests* fastest, tried from large to small.

    Stops where a size is slower than the one before.
    """
    best, least = 1, float("inf")
    for size in (size for size in reversed(BATCH_SIZES) if size <= len(requests)):
        seconds = system.answer(requests, size).seconds
        if seconds > least:
            break
        best, least = size, seconds
    return best


def main() -> None:
    """Measure every batch size, print a table, and one JSON line with everything."""
    command = parser(__doc__)
    command.add_argument("--requests", type=positive, default=16)
    add_lengths(command)
    arguments = command.parse_args()
    device = require_device(command, arguments.device)
    members = prepare(command, arguments.models, arguments.dtype, device, reference=True)
    members.require_context(command, max(arguments.prompt_tokens) + max(arguments.output_tokens))
    workload = Workload(arguments.prompt_tokens, arguments.output_tokens)
    requests = workload.draw(arguments.requests, members.vocab_size, arguments.seed)
    system = start_reference(members, device)
    sizes = [size for size in BATCH_SIZES if size <= arguments.requests]
    for size in sizes:
        system.answer(requests[:size], size)  # warm up
    rounds = [
        {size: system.answer(requests, size).seconds_per_token for size in sizes}
        for _ in range(arguments.repeats)
    ]
    system.stop()
    shown, results = table("batch size", "ms a token", "tokens/s"), []
    for size in sizes:
        times = spread([1e3 * one[size] for one in rounds])
        shown.add_row(str(size), str(times), f"{1e3 / times.median:.1f}")
        results.append({"batch_size": size, "ms_per_token": times})
    finish("reference", arguments, [shown], results=results)


if __name__ == "__main__":
    main()
