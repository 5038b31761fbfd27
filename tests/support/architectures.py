"""What is known of each architecture in vLLM's registry: run, refused by name, or not run.

What the tests run is read from `matrix.py`. The rest is written here; `test_architectures.py` holds
it to the registries of the installed and of the newest vLLM.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from support.matrix import DELTA_NETS, MATRIX_OF_RUNNER, architecture_of, families_of
from support.vllm_source import Absent, SourceTree
from vllm_proxy.config.roles import Role
from vllm_proxy.members.text_part import TEXT_CLASSES

REGISTRY = "model_executor/models/registry.py"
REGISTRIES = (
    "_TEXT_GENERATION_MODELS",
    "_MULTIMODAL_MODELS",
    "_TRANSFORMERS_SUPPORTED_MODELS",
)
"""Those of vLLM with models that generate; its others are of pooling and draft models."""
MULTIMODAL_CLASSES = "SupportsMultiModal", "TransformersMultiModalForCausalLM"


@dataclass(frozen=True)
class Run:
    """A family in a test other than that of the matrix."""

    runner: str
    family: str
    roles: tuple[Role, ...]
    test: str


ELSEWHERE = (
    *(
        Run("v1", family, (role,), "test_exactness:test_gated_delta_nets_are_vllm_s_own")
        for role, family in DELTA_NETS.items()
    ),
    *(
        Run("v1", family, (role,), "test_start_failures:test_members_with_experts_of_one_name")
        for role, family in families_of("backend-mixtures").items()
    ),
    Run(
        "v2",
        "granite",
        ("base", "expert", "antiexpert"),
        "test_live_weights:test_answers_are_those_of_the_new_weights",
    ),
)


@dataclass(frozen=True)
class Obstacle:
    """Architectures that could not be compared, and why."""

    architectures: tuple[str, ...]
    stock: str
    check: str


OBSTACLES = (
    Obstacle(
        ("DeepseekV32ForCausalLM", "GlmMoeDsaForCausalLM"),
        "has no sparse attention on a CPU",
        "refuses on a CPU",
    ),
    Obstacle(("KimiLinearForCausalLM",), "needs CUDA's packages (`cutlass`)", "refuses on a CPU"),
    Obstacle(("OlmoHybridForCausalLM",), "needs Triton's kernels", "refuses on a CPU"),
    Obstacle(
        ("Ernie4_5_MoeForCausalLM",),
        "its router for CPUs leaves out the correction of scores (1 of 12 answers right)",
        "accepts; exact here, where the correction counts",
    ),
    Obstacle(
        ("LagunaForCausalLM",),
        "does not load the correction of scores; its router for CPUs refuses sigmoid scores",
        "refuses: the checkpoint has no tensor for the correction where vLLM looks for it",
    ),
    Obstacle(
        ("Lfm2MoeForCausalLM",),
        "its rotary kernel for CPUs is wrong (5 of 12 answers right; with `-rotary_embedding` 12)",
        "accepts; exact here, also under V2",
    ),
    Obstacle(
        ("MiniMaxM2ForCausalLM",),
        "its router for CPUs refuses sigmoid scores (AssertionError)",
        "accepts; exact here",
    ),
    Obstacle(
        ("PhiMoEForCausalLM",),
        "leaves out the bias of the head (no answer of 11 right; all if the bias is zero)",
        "accepts; exact here",
    ),
    Obstacle(
        ("MambaForCausalLM", "FalconMambaForCausalLM", "JambaForCausalLM"),
        "has no kernel for Mamba 1 on a CPU",
        "refuses on a CPU",
    ),
)
"""Found by hand, with vLLM 0.32 on a CPU (runner V1)."""

BY_HAND = (
    *("Gemma3ForCausalLM", "Gemma4ForCausalLM", "Gemma3nForCausalLM", "GemmaForCausalLM"),
    *("Llama4ForCausalLM", "Ministral3ForCausalLM", "Qwen3MoeForCausalLM"),
    *("GlmForCausalLM", "Glm4ForCausalLM", "Glm4MoeForCausalLM", "Olmo3ForCausalLM"),
    *("OlmoeForCausalLM", "SmolLM3ForCausalLM", "PhiForCausalLM", "NemotronForCausalLM"),
    *("Ernie4_5ForCausalLM", "HunYuanDenseV1ForCausalLM", "SeedOssForCausalLM"),
    *("Exaone4ForCausalLM", "Cohere2ForCausalLM", "StableLmForCausalLM", "ApertusForCausalLM"),
    *("ArceeForCausalLM", "Starcoder2ForCausalLM", "GPT2LMHeadModel", "OPTForCausalLM"),
    *("BloomForCausalLM", "Qwen2MoeForCausalLM", "GraniteMoeForCausalLM"),
    *("GraniteMoeSharedForCausalLM", "GraniteMoeSWAForCausalLM", "AfmoeForCausalLM"),
    *("Cohere2MoeForCausalLM", "ExaoneMoeForCausalLM", "HYV3ForCausalLM"),
    *("CwmForCausalLM", "GraniteSWAForCausalLM", "OlmoForCausalLM"),
)
"""Equal to transformers once, with vLLM 0.32 on a CPU (runner V1): three members of the family, and
a base with a Llama pair. So was stock vLLM."""

BY_HAND_ON_V2 = (
    *("Lfm2MoeForCausalLM", "MellumForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"),
    *("GraniteMoeForCausalLM", "HunYuanMoEV1ForCausalLM", "Llama4ForCausalLM"),
    *("Qwen2MoeForCausalLM", "PhiMoEForCausalLM", "Cohere2MoeForCausalLM"),
    *("ExaoneMoeForCausalLM", "AfmoeForCausalLM", "FlexOlmoForCausalLM"),
)
"""Mixtures of experts, three members of the family equal to transformers under Model Runner V2."""

MULTIMODAL_AMONG_TEXT = (
    *("HCXVisionV2ForCausalLM", "InklingForConditionalGeneration", "MuseGlimmerForCausalLM"),
)
"""Multimodal classes in vLLM's registry of text models: refused, as those in the other."""

HARDWARE = "With code in vLLM for certain hardware"
RECURRENT = "With recurrent layers"
LATENT = "With latent attention (MLA)"
OTHERS = "Others"
NOT_RUN: dict[str, tuple[str, ...]] = {
    HARDWARE: (
        *("BeamForCausalLM", "DeepseekV4ForCausalLM", "FlintForCausalLM"),
        *("Glm5NextForCausalLM", "HYV4ForCausalLM", "InklingForCausalLM"),
        *("MiniMaxM3SparseForCausalLM", "Qwen4ExpForCausalLM", "Step5ForCausalLM"),
    ),
    RECURRENT: (
        *("AliceAIForCausalLM", "BailingMoeV2_5ForCausalLM", "BailingMoeV3ForCausalLM"),
        *("NemotronHPuzzleForCausalLM", "Qwen3_5MoeForCausalLM", "Zamba2ForCausalLM"),
    ),
    LATENT: (
        *("AXK1ForCausalLM", "LongcatFlashForCausalLM", "LongcatFlashNgramForCausalLM"),
        *("MistralLarge3ForCausalLM", "PanguUltraMoEForCausalLM", "SarvamMLAForCausalLM"),
    ),
    OTHERS: (
        *("BailingMoeForCausalLM", "BailingMoeV2ForCausalLM"),
        *("ChatGLMForConditionalGeneration", "ChatGLMModel"),
        *("DbrxForCausalLM", "DeciLMForCausalLM", "DeepseekForCausalLM"),
        *("DomynEdgeForCausalLM", "DoryForCausalLM", "ExaoneForCausalLM", "ExaoneMoEForCausalLM"),
        *("FalconForCausalLM", "GPTBigCodeForCausalLM", "GPTJForCausalLM"),
        *("HrmTextForCausalLM", "HyperCLOVAXForCausalLM"),
        *("InternLM2ForCausalLM", "InternLM3ForCausalLM", "IQuestCoderForCausalLM"),
        *("IQuestLoopCoderForCausalLM", "Jais2ForCausalLM", "K2HorizonForCausalLM"),
        *("Kolibri1ForCausalLM", "LLaMAForCausalLM"),
        *("MiMoForCausalLM", "MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM"),
        *("MiniCPM3ForCausalLM", "MiniCPMForCausalLM", "NanbeigeForCausalLM"),
        *("OrionForCausalLM", "PanguEmbeddedForCausalLM", "PanguProMoEV2ForCausalLM"),
        *("Param2MoEForCausalLM", "Plamo3ForCausalLM"),
        *("Qwen2VLForConditionalGeneration", "Rnj1ForCausalLM"),
        *("SarvamMoEForCausalLM", "SolarForCausalLM", "Step1ForCausalLM", "Step3p5ForCausalLM"),
        *("Step3TextForCausalLM", "TeleChat2ForCausalLM", "TeleChat3ForCausalLM"),
        *("TeleFLMForCausalLM", "VaultGemmaForCausalLM"),
    ),
}
"""What `check` should accept, and nobody has tried."""


def registered(root: Path) -> dict[str, dict[str, tuple[str, str]]]:
    """Return module and class by architecture, by registry.

    Args:
        root: holds the package `vllm`; nothing of it is imported.
    """
    tables = {}
    for node in ast.parse((root / "vllm" / REGISTRY).read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in REGISTRIES:
                tables[name] = ast.literal_eval(node.value)
    return tables


def compared() -> dict[str, dict[str, set[Role]]]:
    """Return the members, by runner and architecture, that the tests compare."""
    found: dict[str, dict[str, set[Role]]] = {}
    for runner, family, role in _runs():
        of_runner = found.setdefault(architecture_of(family), {})
        of_runner.setdefault(runner, set()).add(role)
    return found


def _runs() -> Iterator[tuple[str, str, Role]]:
    for runner, matrix in MATRIX_OF_RUNNER.items():
        for name, _ in matrix:
            for role, family in families_of(name).items():
                yield runner, family, role
    for run in ELSEWHERE:
        for role in run.roles:
            yield run.runner, run.family, role


def read_as_text() -> set[str]:
    """Return the multimodal architectures of which members are the text model."""
    return {MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[name] for name in TEXT_CLASSES}


def refused(tables: dict[str, dict[str, tuple[str, str]]]) -> set[str]:
    """Return the architectures that are refused by name, as multimodal or encoder-decoder.

    Args:
        tables: see `registered`.
    """
    multimodal = {
        name
        for name, (_, cls) in tables["_TRANSFORMERS_SUPPORTED_MODELS"].items()
        if cls in MULTIMODAL_CLASSES
    }
    multimodal |= tables["_MULTIMODAL_MODELS"].keys() | {*MULTIMODAL_AMONG_TEXT}
    return multimodal - read_as_text()


def unknown(tables: dict[str, dict[str, tuple[str, str]]]) -> list[str]:
    """Return the architectures that are neither tested nor refused by name, nor listed here.

    Args:
        tables: see `registered`.
    """
    known = {name for names in written().values() for name in names} | refused(tables)
    return [name for table in tables.values() for name in table if name not in known]


def written() -> dict[str, list[str]]:
    """Return the architectures that are listed here, by list."""
    return {
        "tested": [*compared()],
        "by hand": [*BY_HAND],
        "obstacles": [name for one in OBSTACLES for name in one.architectures],
        "multimodal": [*MULTIMODAL_AMONG_TEXT],
        **{reason: [*names] for reason, names in NOT_RUN.items()},
    }


def bases(tree: SourceTree, module: str, name: str) -> set[str]:
    """Return the names of an architecture's class and of those it inherits from.

    Args:
        tree: of a vLLM.
        module: as the registry has it.
        name: of the class.

    Raises:
        Absent: the class is not found.
    """
    module = module if module.startswith("vllm.") else f"vllm.model_executor.models.{module}"
    for place in (module, f"{module}.nvidia.model", f"{module}.model"):  # some import it lazily
        try:
            return tree.bases(f"{place}:{name}")
        except Absent:
            continue
    raise Absent(f"no {name} in {module}")
