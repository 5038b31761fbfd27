"""Images on their way in: what is allowed, what is refused in one line, where files are."""

import asyncio
import base64
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media import MediaConnector
from vllm.renderers import renderer_from_config
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

from support.checks import edit_tensors, engine_config, planned_shapes, run, set_config
from support.random_images import random_image
from support.tiny_images import (
    IMAGE,
    VISION_TOKENS,
    special_tokens,
    with_images,
    write_seeing_triple,
)
from support.tiny_models import SHAPES, write_model, write_tokenizer
from support.tiny_multimodal import write_multimodal
from vllm_proxy.config.errors import ProxyConfigError
from vllm_proxy.config.media import limits_problem
from vllm_proxy.config.schema import ProxyConfig
from vllm_proxy.jobs.answerer import reraise_image_error
from vllm_proxy.jobs.inputs import Input
from vllm_proxy.jobs.media import has_images, with_file_urls
from vllm_proxy.jobs.rows import parse_row
from vllm_proxy.members.images import FAMILIES
from vllm_proxy.members.towers import difference, read_tower
from vllm_proxy.preflight.check.run import check
from vllm_proxy.preflight.plan.read import read_all
from vllm_proxy.server.command import with_media_limits
from vllm_proxy.server.media import check_media

ENGINE = {"dtype": "float32", "max_model_len": 256, "limit_mm_per_prompt": {"image": 2}}


@pytest.fixture(scope="module")
def seeing(tmp_path_factory) -> dict[str, str]:
    """Members that see images."""
    return write_seeing_triple(tmp_path_factory.mktemp("seeing"), "qwen2_5_vl")


@pytest.fixture(scope="module")
def blind(tmp_path_factory) -> str:
    """A member of text only."""
    return write_blind(tmp_path_factory.mktemp("blind") / "model")


def write_blind(path: Path) -> str:
    write_model(path, "llama", **SHAPES["expert"])
    write_tokenizer(path, more=list(VISION_TOKENS.values()))
    return str(path)


def changed(path: str, copy: Path, mutate: Callable[[Path], object]) -> str:
    shutil.copytree(path, copy)
    mutate(copy)
    return str(copy)


def require_refused(members: dict[str, str], expert: str, says: str, engine_says: str) -> None:
    """Check that another expert is a problem, and that an engine does not start without `check`.

    Args:
        members: those with which there is none.
        expert: the other one.
        says: how the problem of `check` begins.
        engine_says: a pattern of the engine's.
    """
    wrong = {**members, "expert": expert}
    (problem,) = run(wrong, engine=ENGINE).problems
    assert problem.startswith(f"expert `{expert}`: {says}")
    with pytest.raises(ValueError, match=f"expert '.*': {engine_says}"):
        engine_config(wrong, **ENGINE)


def set_processor(**values: object) -> Callable[[Path], object]:
    def mutate(model: Path) -> None:
        path = model / "processor_config.json"
        found = json.loads(path.read_text())
        found["image_processor"] |= values
        path.write_text(json.dumps(found))

    return mutate


class TestLimits:
    """`limit_mm_per_prompt` asks for images and nothing else."""

    @pytest.mark.parametrize(
        "limits",
        [None, {}, {"image": 2}, {"image": 0}, {"image": {"count": 1, "width": 64}, "video": 0}],
    )
    def test_what_is_right(self, limits):
        assert limits_problem(limits) is None

    @pytest.mark.parametrize(
        ("limits", "says"),
        [
            (
                {"image": 1, "video": 2},
                "`engine.limit_mm_per_prompt.video` is 2: members read images only; remove it",
            ),
            ({"audio": {"count": 1}}, "`engine.limit_mm_per_prompt.audio` is 1: members read"),
            ({"images": 1}, "unknown key `engine.limit_mm_per_prompt.images`; did you mean `im"),
            ({"image": "2"}, "`engine.limit_mm_per_prompt.image` is '2': give a number of items"),
            ({"image": -1}, "`engine.limit_mm_per_prompt.image` is -1: give a number of items"),
            (4, "`engine.limit_mm_per_prompt` is 4: give a mapping: {image: 1}"),
        ],
    )
    def test_what_is_wrong(self, seeing, limits, says):
        """In `check`, although vLLM would ignore some of it."""
        problems = run(seeing, engine={**ENGINE, "limit_mm_per_prompt": limits}).problems
        assert [problem for problem in problems if problem.startswith(says)]

    def test_a_flag_of_serve_is_part_of_the_configuration(self):
        config = ProxyConfig(base="b", expert="e")
        flags = ["--port", "1", "--limit-mm-per-prompt", '{"image": 3}']
        found, others = with_media_limits(config, flags)
        assert found.engine == {"limit_mm_per_prompt": {"image": 3}}
        assert found.hf_overrides()["architectures"] != config.hf_overrides()["architectures"]
        assert others == ["--port", "1"]
        assert with_media_limits(config, ["--port", "1"]) == (config, ["--port", "1"])

    @pytest.mark.parametrize(
        "flags", [["--limit-mm-per-prompt.image", "3"], ["--limit_mm_per_prompt", "image=3"]]
    )
    def test_a_flag_in_another_form_is_not_ignored(self, flags):
        with pytest.raises(ProxyConfigError, match="give its value as JSON"):
            with_media_limits(ProxyConfig(base="b", expert="e"), flags)


class TestCheck:
    """Do the members see the same image?"""

    def test_says_what_images_cost(self, seeing):
        report = run(seeing, engine=ENGINE)
        assert report.problems == ()
        weights = {}
        for member in report.members:
            model = AutoModelForImageTextToText.from_pretrained(seeing[member.role])
            assert member.parameters == sum(p.numel() for p in model.parameters())
            weights[member.role] = 4 * sum(p.numel() for p in model.model.visual.parameters())
        listed = ", ".join(f"{role} {size:,}" for role, size in weights.items())
        (note,) = (note for note in report.notes if "tower" in note)
        assert note == (
            f"Members see images, each with its tower: {listed}, {sum(weights.values()):,} bytes "
            "in total. An image takes 4 to 16 tokens of the context."
        )

    def test_says_who_does_not_see(self, seeing, blind):
        report = run({**seeing, "expert": blind, "antiexpert": blind}, engine=ENGINE)
        assert report.problems == ()
        assert "expert and antiexpert do not see images: to a model of text only," in " ".join(
            report.notes
        )

    @pytest.mark.parametrize(
        ("argument", "says"),
        [
            ({"language_model_only": True}, "language_model_only` is True: vLLM then allows none"),
            ({"allowed_local_media_path": "/no"}, "allowed_local_media_path` is '/no': no such di"),
        ],
    )
    def test_arguments_with_which_no_image_is_read(self, seeing, argument, says):
        (problem,) = run(seeing, engine={**ENGINE, **argument}).problems
        assert problem.startswith(f"`engine.{says}")
        with pytest.raises(ValueError, match=rf"`{says[:10]}.*` is "):
            engine_config(seeing, **ENGINE, **argument)

    def test_large_images_may_be_too_long(self, seeing):
        report = run(seeing, engine={**ENGINE, "max_model_len": 16})
        assert report.problems == ()
        assert "An image with more than 13 tokens is refused" in " ".join(report.notes)
        (problem,) = run(seeing, engine={**ENGINE, "max_model_len": 6}).problems
        assert problem == (
            "`engine.max_model_len` is 6: a prompt with an image has at least 6 tokens; set it to "
            "7 or more"
        )

    def test_a_base_of_text_only(self, seeing, blind):
        (problem,) = run({**seeing, "base": blind}, engine=ENGINE).problems
        assert problem == (
            "`engine.limit_mm_per_prompt` is {'image': 2}: the base cannot see: its model_type is "
            f"'llama', and images are possible with {', '.join(FAMILIES)}; remove it"
        )

    @pytest.mark.parametrize(
        ("mutate", "says"),
        [
            (set_processor(size={"shortest_edge": 256, "longest_edge": 2048}), "`size` in its im"),
            (set_processor(image_mean=[0.5, 0.5, 0.5]), "`image_mean` in its image processor (pr"),
            (set_processor(do_resize=False), "`do_resize` in its image processor (preprocessor_c"),
            (set_config(image_token_id=6), "`image_token_id` in config.json is 6, and the base's"),
        ],
    )
    def test_another_image(self, seeing, tmp_path, mutate, says):
        """In `check`, and in an engine that is started without it."""
        expert = changed(seeing["expert"], tmp_path / "expert", mutate)
        require_refused(seeing, expert, says, r"`\w+` in .* the base's is ")

    def test_other_patches(self, seeing):
        base = read_tower(seeing["base"])
        vision = replace(base, config=read_tower(seeing["expert"]).config)
        assert difference(vision, base) is None
        vision.config.vision_config.spatial_merge_size = 4
        assert difference(vision, base).startswith(
            "`vision_config.spatial_merge_size` in config.json is 4, and the base's is 2"
        )

    def test_a_size_for_all_members(self, seeing, tmp_path):
        """`mm_processor_kwargs` apply to every image, so what they set cannot differ."""
        larger = set_processor(size={"shortest_edge": 256, "longest_edge": 2048})
        wrong = {**seeing, "expert": changed(seeing["expert"], tmp_path / "expert", larger)}
        for given in ({"max_pixels": 512}, {"images_kwargs": {"max_pixels": 512}}):
            report = run(wrong, engine={**ENGINE, "mm_processor_kwargs": given})
            assert report.problems == ()
            assert "An image takes 4 to 8 tokens" in " ".join(report.notes)

    def test_another_family(self, seeing, tmp_path):
        other = write_seeing_triple(tmp_path, "qwen3_vl")
        (problem,) = run({**seeing, "expert": other["expert"]}, engine=ENGINE).problems
        assert "its model_type is 'qwen3_vl', and the base's is 'qwen2_5_vl'; to see" in problem

    def test_no_image_processor(self, seeing, tmp_path):
        def without(model: Path) -> None:
            (model / "processor_config.json").unlink()

        path = changed(seeing["expert"], tmp_path / "expert", without)
        (problem,) = run({**seeing, "expert": path}, engine=ENGINE).problems
        assert problem == (
            f"expert `{path}`: no image processor can be read from its files; add "
            "preprocessor_config.json from where the model was published"
        )

    def test_a_vocabulary_without_the_image_token(self, seeing, tmp_path):
        path = write_blind(tmp_path / "model")
        tower = read_tower(seeing["base"])
        size = json.loads((tmp_path / "model/config.json").read_text())["vocab_size"]
        mutate = set_config(image_token_id=size)
        seers = {r: changed(seeing[r], tmp_path / r, mutate) for r in ("base", "antiexpert")}
        problems = run({**seers, "expert": path}, engine=ENGINE).problems
        assert tower.config.image_token_id < size
        assert (
            f"an image is the token {size} in prompts, and it reads ids from 0 to " in problems[0]
        )

    def test_text_needs_no_processor(self, seeing, tmp_path):
        def without(model: Path) -> None:
            (model / "processor_config.json").unlink()

        path = changed(seeing["expert"], tmp_path / "expert", without)
        engine = {key: value for key, value in ENGINE.items() if key != "limit_mm_per_prompt"}
        report = run({**seeing, "expert": path}, engine=engine)
        assert report.problems == ()
        assert "tower" not in " ".join(report.notes)

    def test_a_tower_that_is_not_in_the_checkpoint(self, seeing, tmp_path):
        def without(tensors: dict) -> None:
            del tensors[next(name for name in tensors if "visual" in name)]

        path = changed(seeing["expert"], tmp_path / "expert", edit_tensors(without))
        (problem,) = run({**seeing, "expert": path}, engine=ENGINE).problems
        assert "visual" in problem


TOKENS = {"mistral3": (2, 20), "llama4": (7, 22)}
"""The fewest and most tokens of an image, by family."""
SMALLEST_AND_LARGEST = {"mistral3": ((8, 8), (90, 90)), "llama4": ((16, 16), (48, 16))}
"""Images that have as many."""


@pytest.fixture(scope="module")
def others(tmp_path_factory) -> dict[str, dict[str, str]]:
    """Members of other families that see images."""
    root = tmp_path_factory.mktemp("others")
    return {family: write_seeing_triple(root / family, family) for family in TOKENS}


def set_whole_processor(**values: object) -> Callable[[Path], object]:
    def mutate(model: Path) -> None:
        path = model / "processor_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return mutate


class TestOtherFamilies:
    """Mistral 3 has a break after each row, Llama 4 has tiles."""

    @pytest.mark.parametrize("family", TOKENS)
    def test_check_says_what_images_cost(self, others, family):
        report = run(others[family], engine=ENGINE)
        assert report.problems == ()
        base = AutoModelForImageTextToText.from_pretrained(others[family]["base"])
        tower = sum(
            p.numel()
            for name, p in base.named_parameters()
            if "language_model" not in name and not name.startswith("lm_head")
        )
        (note,) = (note for note in report.notes if "tower" in note)
        assert f"with its tower: base {4 * tower:,}, expert " in note
        fewest, most = TOKENS[family]
        assert f"An image takes {fewest} to {most} tokens of the context." in note

    @pytest.mark.parametrize("family", TOKENS)
    def test_images_have_as_many_tokens_as_check_says(self, others, family):
        processor = AutoProcessor.from_pretrained(others[family]["base"])
        for size, count in zip(SMALLEST_AND_LARGEST[family], TOKENS[family], strict=True):
            prompt = with_images(IMAGE, family)
            (ids,) = processor(text=[prompt], images=[random_image(1, *size)])["input_ids"]
            assert len(ids) == count

    @pytest.mark.parametrize(
        ("family", "mutate", "says"),
        [
            (
                "mistral3",
                set_processor(size={"longest_edge": 24}),
                "`size` in its image processor (preprocessor_config.json) is {'longest_edge': 24}, "
                "and the base's is {'longest_edge': 32}: ",
            ),
            (
                "mistral3",
                set_processor(size={"height": 64, "width": 64}),
                "`size` of its image processor is {'height': 64, 'width': 64}; give it longest",
            ),
            (
                "mistral3",
                set_whole_processor(image_break_token="</s>"),
                "`image_break_token` in processor_config.json is </s>, and the base's is [IMG_",
            ),
            (
                "mistral3",
                set_whole_processor(patch_size=8),
                "`patch_size` in processor_config.json is 8, and 4 in config.json; use the files",
            ),
            (
                "mistral3",
                lambda model: (model / "processor_config.json").write_text("[]"),
                "no image processor can be read from its files; add preprocessor_config.json from",
            ),
            (
                "llama4",
                set_processor(size={"height": 32, "width": 32}),
                "`size` of its image processor is {'height': 32, 'width': 32}, and `vision_config.",
            ),
            ("mistral3", set_config(image_token_index=4), "`image_token_index` in config.json is"),
            (
                "llama4",
                set_processor(max_patches=4),
                "`max_patches` in its image processor (preprocessor_config.json) is 4, and the ba",
            ),
        ],
    )
    def test_another_image(self, others, tmp_path, family, mutate, says):
        members = others[family]
        expert = changed(members["expert"], tmp_path / "expert", mutate)
        require_refused(members, expert, says, r"(`\w+`|no image processor) ")

    def test_larger_images_than_a_tower_has_positions_for(self, others):
        engine = {**ENGINE, "mm_processor_kwargs": {"size": {"longest_edge": 64}}}
        problems = run(others["mistral3"], engine=engine).problems
        assert problems[0].startswith(
            f"base `{others['mistral3']['base']}`: images may have a `longest_edge` of 64, and its "
            "tower sees at most 32 (`vision_config.image_size`); make `size` smaller"
        )

    def test_large_images_may_be_too_long(self, others):
        report = run(others["mistral3"], engine={**ENGINE, "max_model_len": 16})
        assert (
            "An image with more than 15 tokens is refused, because a sequence has at most 16; "
            "`engine.mm_processor_kwargs: {size: {longest_edge: …}}` makes images smaller."
        ) in report.notes
        smaller = {"mm_processor_kwargs": {"size": {"longest_edge": 16}}}
        report = run(others["mistral3"], engine={**ENGINE, **smaller})
        assert "An image takes 2 to 6 tokens" in " ".join(report.notes)

    def test_image_tokens_that_attend_to_each_other(self, tmp_path):
        """In vLLM on a CPU they do not: if that changes, the reason for the refusal is gone."""
        assert not CPUAttentionBackend.supports_mm_prefix()
        paths = {
            role: str(write_multimodal(tmp_path / role, "gemma3", **SHAPES[role]))
            for role in SHAPES
        }
        says = "its model_type is 'gemma3' (the tokens of an image attend to each other in both di"
        problems = run(paths, engine=ENGINE).problems
        assert problems[0].startswith(f"base `{paths['base']}`: {says}")
        with pytest.raises(ValueError, match=r"`limit_mm_per_prompt`.* 'gemma3' \(the tokens of"):
            engine_config(paths, **ENGINE)


@pytest.mark.parametrize("family", TOKENS)
def test_plan_counts_the_towers_of_other_families(others, family):
    config = ProxyConfig(**others[family], engine=ENGINE)
    for role, shape in planned_shapes(config).items():
        model = AutoModelForImageTextToText.from_pretrained(others[family][role])
        assert shape.weight_bytes == 4 * sum(p.numel() for p in model.parameters())


def test_plan_counts_towers(seeing, blind):
    """Where images are allowed, and for members that see them."""
    members = {**seeing, "antiexpert": blind}
    for limits, sees in (({}, False), ({"image": 1}, True)):
        config = ProxyConfig(**members, engine={**ENGINE, "limit_mm_per_prompt": limits})
        shapes = planned_shapes(config)
        for role in ("base", "expert"):
            model = AutoModelForImageTextToText.from_pretrained(seeing[role])
            tower = sum(p.numel() for p in model.model.visual.parameters())
            whole = sum(p.numel() for p in model.parameters())
            assert shapes[role].weight_bytes == 4 * (whole if sees else whole - tower)
        assert shapes["antiexpert"].tower.parameters == 0


def test_a_mixture_of_experts_and_dense_models_see_alike(tmp_path):
    """Qwen3.5, in `check` and in `plan`."""
    members = write_seeing_triple(tmp_path, "qwen3_5_moe", "qwen3_5")
    config = ProxyConfig(**members, engine={**ENGINE, "dtype": "bfloat16"})
    report = check(config)
    assert report.problems == ()
    shapes = planned_shapes(config)
    weights = {}
    for role, path in members.items():
        model = AutoModelForImageTextToText.from_pretrained(path)
        weights[role] = 2 * sum(p.numel() for p in model.model.visual.parameters())
        assert shapes[role].tower.bytes == weights[role]
        assert shapes[role].weight_bytes == 2 * sum(p.numel() for p in model.parameters())
    listed = ", ".join(f"{role} {size:,}" for role, size in weights.items())
    assert f"Members see images, each with its tower: {listed}, " in " ".join(report.notes)


def test_plan_refuses_what_check_refuses(seeing, blind):
    config = ProxyConfig(**{**seeing, "base": blind}, engine=ENGINE)
    with pytest.raises(ProxyConfigError, match=r"limit_mm_per_prompt.*run `vllm-proxy check`"):
        read_all(config)


def conversation(*urls: str) -> list[dict]:
    images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*images, {"type": "text", "text": "what"}]}]


class TestRows:
    def test_a_file_where_no_directory_is_allowed(self):
        row = parse_row(json.dumps({"messages": conversation("file:///a.png")}).encode())
        wanted = "an image cannot be read .*without `engine.allowed_local_media_path`"
        with pytest.raises(ValueError, match=wanted), reraise_image_error(row):
            MediaConnector().fetch_image("file:///a.png")

    def test_images_are_parts_of_messages(self):
        row = parse_row(json.dumps({"messages": conversation("a.png")}).encode())
        assert has_images(row.messages)
        assert not has_images([{"role": "user", "content": "text"}])

    @pytest.mark.parametrize(
        "part",
        [
            {"type": "video_url", "video_url": {"url": "a.mp4"}},
            {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}},
            {"type": "image_url", "image_url": {}},
            {"type": "image_url", "image_url": "a.png"},
            {"type": "image_url"},
        ],
    )
    def test_nothing_else_is(self, part):
        row = {"messages": [{"role": "user", "content": [part]}]}
        with pytest.raises(ProxyConfigError, match=r"`messages\.0`.*image_url"):
            parse_row(json.dumps(row).encode())

    def test_paths_begin_at_the_file_of_the_row(self, tmp_path, monkeypatch):
        """Also in a table, and in one of several inputs."""
        import pyarrow as pa
        from pyarrow.parquet import write_table

        for name in ("a", "b"):
            (tmp_path / name).mkdir()
        row = {"messages": conversation("images/x y.png")}
        (tmp_path / "a/rows.jsonl").write_text(json.dumps(row))
        write_table(pa.Table.from_pylist([row]), tmp_path / "b/rows.parquet")
        monkeypatch.chdir(tmp_path)
        lines = list(Input(["a/rows.jsonl", "b/rows.parquet"]).lines())
        for line, name in zip(lines, ("a", "b"), strict=True):
            messages = with_file_urls(parse_row(line.data).messages, line.directory)
            url = messages[0]["content"][0]["image_url"]["url"]
            assert url == f"file://{tmp_path}/{name}/images/x%20y.png"

    def test_urls_are_left_alone(self):
        urls = ["http://h/a.png", "https://h/a.png", "data:image/png;base64,AA==", "file:///a.png"]
        messages = conversation(*urls)
        assert with_file_urls(messages, "/where") == messages
        texts = [{"role": "user", "content": "a"}, {"role": "assistant"}, "no message"]
        assert with_file_urls(texts, "/where") == texts


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """A directory with an image, and a file that is none."""
    directory = tmp_path_factory.mktemp("pictures")
    random_image(1, 24, 16).save(directory / "image.png")
    (directory / "text.png").write_text("no image")
    return directory


def renderer(members: dict[str, str], **engine: object) -> OnlineRenderer:
    """Return what renders the conversations of a server, which is not running."""
    config = engine_config(members, **engine)
    options = {"request_logger": None, "chat_template": None}
    online = OnlineRenderer(
        config.model_config,
        renderer_from_config(config),
        chat_template_content_format="auto",
        **options,
    )
    check_media(online, sees=config.model_config.is_multimodal_model)
    return online


def rendered(online: OnlineRenderer, messages: list[dict]) -> list[int]:
    request = ChatCompletionRequest.model_validate({"messages": messages})
    _, (prompt,) = asyncio.run(online.render_chat(request))
    return prompt["prompt_token_ids"]


REFUSED = ValueError, VLLMValidationError
"""What a server answers with HTTP 400."""


class TestHTTP:
    """As vLLM renders a conversation."""

    @pytest.fixture(scope="class")
    def online(self, seeing, pictures) -> OnlineRenderer:
        return renderer(seeing, **ENGINE, allowed_local_media_path=str(pictures))

    def test_an_image_is_as_many_tokens_as_it_has_patches(self, online, pictures):
        data = base64.b64encode((pictures / "image.png").read_bytes()).decode()
        for url in ((pictures / "image.png").as_uri(), f"data:image/png;base64,{data}"):
            ids = rendered(online, conversation(url))
            assert ids.count(read_tower(online.model_config.model).config.image_token_id) == 6

    @pytest.mark.parametrize(
        ("urls", "says"),
        [
            (["text.png"], "Failed to load image"),
            (["none.png"], "`messages`: an image cannot be read"),
            (["data:image/png;base64,AAAA"], "Failed to load image"),
            (["data:image/png;base64,A"], "base64"),
            (["data:image/png,A"], "base64"),
            (["file:///etc/hostname"], "must be a subpath"),
            (["http://127.0.0.1:9/x.png"], "`messages`: an image cannot be read"),
            (["image.png"] * 3, "At most 2 image"),
        ],
    )
    def test_a_bad_image_is_a_mistake(self, online, pictures, urls, says):
        full = [url if ":" in url else (pictures / url).as_uri() for url in urls]
        with pytest.raises(REFUSED, match=says):
            rendered(online, conversation(*full))

    @pytest.mark.parametrize(
        ("family", "changes", "tokens"),
        [
            ("mistral3", {}, 20),
            ("mistral3", {"size": {"longest_edge": 16}}, 6),
            ("llama4", {}, 22),
            ("llama4", {"max_patches": 1}, 7),
        ],
    )
    def test_images_of_other_families(self, others, tmp_path, family, changes, tokens):
        """Also when all are made smaller."""
        largest = SMALLEST_AND_LARGEST[family][1]
        random_image(1, *largest).save(tmp_path / "image.png")
        url = (tmp_path / "image.png").as_uri()
        given = {"allowed_local_media_path": str(tmp_path), "mm_processor_kwargs": changes}
        online = renderer(others[family], **ENGINE, **given)
        special = range(3, 3 + len(special_tokens(family)))
        assert sum(one in special for one in rendered(online, conversation(url))) == tokens

    def test_a_file_where_no_directory_is_allowed(self, seeing, pictures):
        online = renderer(seeing, **ENGINE)
        wanted = "`messages`: an image cannot be read .*without `--allowed-local-media-path`"
        with pytest.raises(VLLMValidationError, match=wanted):
            rendered(online, conversation((pictures / "image.png").as_uri()))

    def test_a_video_is_a_mistake(self, online):
        video = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}
        with pytest.raises(REFUSED, match="At most 0 video"):
            rendered(online, [{"role": "user", "content": [video]}])

    def test_an_engine_of_text_says_how_to_allow_images(self, seeing):
        online = renderer(seeing)
        with pytest.raises(
            VLLMValidationError,
            match=r"^`messages`: it has more than text, and this engine reads text only; send "
            r"text, or allow images by `engine: \{limit_mm_per_prompt: \{image: 1\}\}`",
        ):
            rendered(online, conversation("http://127.0.0.1:9/x.png"))
        assert rendered(online, [{"role": "user", "content": "what"}])
