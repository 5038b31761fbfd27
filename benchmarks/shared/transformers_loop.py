"""The authors' way: a plain loop over three transformers models.

As the paper's evaluation scripts run it: a static batch, padded on the left, that ends with its
slowest row; a KV cache for each model; the same dtype as the engines; all cores.
"""

import time
from typing import TYPE_CHECKING

import torch

from shared.members import Members
from shared.workload import Answer, Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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
