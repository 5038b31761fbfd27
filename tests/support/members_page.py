"""Writes the families in `docs/members.md`: `make members-page`."""

import re
import textwrap
from collections.abc import Iterable
from pathlib import Path

from support.architectures import BY_HAND, BY_HAND_ON_V2, NOT_RUN, OBSTACLES, compared
from vllm_proxy.config.roles import ROLES, Role

PAGE = Path(__file__).parents[2] / "docs/members.md"
BEGIN = "<!-- Families: written by `make members-page` -->\n"
END = "<!-- End of families -->\n"

NAMES = {
    "LlamaForCausalLM": "Llama",
    "Qwen2ForCausalLM": "Qwen2, Qwen2.5",
    "Qwen3ForCausalLM": "Qwen3",
    "MistralForCausalLM": "Mistral",
    "Gemma2ForCausalLM": "Gemma 2",
    "Phi3ForCausalLM": "Phi-3",
    "Olmo2ForCausalLM": "OLMo 2",
    "GPTNeoXForCausalLM": "GPT-NeoX (Pythia)",
    "CohereForCausalLM": "Command R",
    "GraniteForCausalLM": "Granite 3",
    "MixtralForCausalLM": "Mixtral",
    "GptOssForCausalLM": "gpt-oss",
    "HunYuanMoEV1ForCausalLM": "HunYuan MoE",
    "FlexOlmoForCausalLM": "FlexOlmo",
    "MellumForCausalLM": "Mellum",
    "Gemma3ForConditionalGeneration": "Gemma 3, text",
    "Gemma4ForConditionalGeneration": "Gemma 4, text",
    "Llama4ForConditionalGeneration": "Llama 4, text",
    "Mistral3ForConditionalGeneration": "Mistral 3, text",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL, text",
    "Qwen3VLForConditionalGeneration": "Qwen3-VL, text",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3-VL MoE, text",
    "GraniteMoeHybridForCausalLM": "Granite 4",
    "NemotronHForCausalLM": "Nemotron-H",
    "FalconH1ForCausalLM": "Falcon-H1",
    "Lfm2ForCausalLM": "LFM2",
    "Mamba2ForCausalLM": "Mamba 2",
    "Qwen3NextForCausalLM": "Qwen3-Next",
    "Qwen3_5ForConditionalGeneration": "Qwen3.5, text",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3.5 MoE, text",
    "Qwen3_5ForCausalLM": "Qwen3.5 without a tower",
    "DeepseekV2ForCausalLM": "DeepSeek-V2",
    "DeepseekV3ForCausalLM": "DeepSeek-V3, R1",
    "Glm4MoeLiteForCausalLM": "GLM-4.7-Flash",
}
"""What people call the architectures that the tests run, in the page's order."""


def rendered() -> str:
    """Return what stands between the page's marks."""
    found = compared()
    rows = [
        f"| {name} | `{architecture}` | {members(found[architecture].get('v1'))} | "
        f"{members(found[architecture].get('v2'))} |"
        for architecture, name in NAMES.items()
    ]
    obstacles = [
        f"| {listed(one.architectures)} | {one.stock} | {one.check} |" for one in OBSTACLES
    ]
    lines = [
        "Every run of the tests compares these members with the [reference](exactness.md), token "
        "for token.",
        "All: as base, expert and antiexpert. Of a multimodal checkpoint, the text model is meant.",
        "Qwen3.5 without a tower is compared with vLLM's logprobs "
        "([recurrent layers](#recurrent-layers)).",
        "",
        "| family | `architectures` in config.json | runner V1 | runner V2 |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        "Compared once by hand and exact, as was stock vLLM 0.32 (on a CPU, runner V1): three",
        "members of the family, and a base with a Llama pair. Cohere 2 was compared with vLLM's",
        "window, which is one larger than that of transformers.",
        "",
        wrapped(BY_HAND),
        "",
        "By hand under runner V2, and exact: text models of three Gemma 3, three Gemma 4, three",
        "Mistral 3, and of a Llama 4 with a Qwen3-VL MoE expert and a Llama antiexpert.",
        "",
        "Of mixtures of experts, three members of the family also under runner V2:",
        "",
        wrapped(BY_HAND_ON_V2),
        "",
        "In the same way under V1, in vLLM's Transformers backend (`TransformersMoEForCausalLM`):",
        "Qwen3-MoE, OLMoE and Solar Open. `python tests/families.py` compares today's families,",
        "and `python tests/families.py FAMILY` any other.",
        "",
        "Not exact, or not to be compared on a CPU (vLLM 0.32, runner V1, by hand):",
        "",
        "| `architectures` | stock vLLM | `check` |",
        "| --- | --- | --- |",
        *obstacles,
        "",
        "Refused by name: all other multimodal models, encoder-decoders and pooling models.",
        "",
        '<details markdown="1">',
        "<summary>Not tried: what else vLLM 0.32 and 0.33 have</summary>",
    ]
    for reason, names in NOT_RUN.items():
        lines += ["", f"{reason}:", "", wrapped(names)]
    return "\n".join([*lines, "", "</details>", ""])


def members(roles: Iterable[Role] | None) -> str:
    """Return a cell: the roles in which a family was compared."""
    given = {*(roles or ())}
    if given == {*ROLES}:
        return "all"
    return ", ".join(role for role in ROLES if role in given) or "not run"


def listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def wrapped(names: Iterable[str]) -> str:
    lines = textwrap.wrap(
        listed(names) + ".", width=120, break_long_words=False, break_on_hyphens=False
    )
    return "\n".join(lines)


def replaced(page: str) -> str:
    """Return the page's text with the families as they are now."""
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    text, count = re.subn(
        pattern, lambda _: BEGIN + "\n" + rendered() + "\n" + END, page, flags=re.S
    )
    assert count == 1, f"{PAGE} must have one line `{BEGIN.strip()}` and one `{END.strip()}`"
    return text


if __name__ == "__main__":
    PAGE.write_text(replaced(PAGE.read_text()))
