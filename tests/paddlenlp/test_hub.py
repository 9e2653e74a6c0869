"""Hub names: both hubs serve the published layout, the one stands in for the other, and a cut transfer goes on."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
from huggingface_hub import hf_hub_download
from loopback_hub import COMMIT, LoopbackHub

from paddle_qwen1m.paddlenlp import hub

bos_download = importlib.import_module("paddlenlp.utils.download.bos_download")  # a function hides the module

NAME = "Qwen/Tiny-1M"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
SHARD_BYTES = 300_000


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A repository in the published layout; the hub looks at names and bytes only."""
    directory = tmp_path / "published"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    (directory / "generation_config.json").write_text("{}")
    index = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    for number, shard in enumerate(SHARDS):
        (directory / shard).write_bytes(bytes([number + 1]) * SHARD_BYTES)
    for filename in hub.TOKENIZER_FILES:
        (directory / filename).write_text("{}")
    return directory


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub() as server:
        bos = f"{server.url}/bos"
        monkeypatch.setattr(
            bos_download, "BOS_URL_TEMPLATE_WITHOUT_REVISION", bos + "/{repo_type}/community/{repo_id}/{filename}"
        )
        monkeypatch.setattr(hub, "hf_hub_download", partial(hf_hub_download, endpoint=f"{server.url}/hf"))
        monkeypatch.setattr(hub, "_PAUSE", 0.01)
        monkeypatch.setattr(hub, "_PIECE", 10_000)
        monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def fetch_all(cache: Path, **options: bool) -> hub.Checkpoint:
    checkpoint = hub.locate(NAME, cache_dir=cache, **options)
    checkpoint.fetch_weights()
    checkpoint.fetch_tokenizer()
    return checkpoint


def assert_complete(checkpoint: hub.Checkpoint, published: Path) -> None:
    for filename in ["config.json", "model.safetensors.index.json", *SHARDS, *hub.TOKENIZER_FILES]:
        assert (checkpoint.directory / filename).read_bytes() == (published / filename).read_bytes(), filename


def complete_looking_files(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*.safetensors") if path.is_file()]


@pytest.mark.parametrize("from_hf_hub", [False, True])
def test_a_whole_checkpoint_comes_from_either_hub(
    server: LoopbackHub, published: Path, cache: Path, from_hf_hub: bool
) -> None:
    server.bos[NAME] = server.hf[NAME] = published
    checkpoint = fetch_all(cache, from_hf_hub=from_hf_hub)
    assert_complete(checkpoint, published)
    assert {seen.hub for seen in server.seen} == ({"hf", "cdn"} if from_hf_hub else {"bos"})
    assert not checkpoint.note


def test_the_cache_is_the_one_paddlenlp_uses(server: LoopbackHub, published: Path, cache: Path) -> None:
    server.bos[NAME] = published
    assert fetch_all(cache).directory == cache / NAME
    assert bos_download.bos_try_to_load_from_cache(NAME, SHARDS[0], cache_dir=str(cache)) is not None


@pytest.mark.parametrize("from_hf_hub", [False, True])
def test_when_the_hub_asked_for_lacks_the_repository_the_other_is_tried(
    server: LoopbackHub, published: Path, cache: Path, from_hf_hub: bool
) -> None:
    (server.bos if from_hf_hub else server.hf)[NAME] = published
    checkpoint = fetch_all(cache, from_hf_hub=from_hf_hub)
    assert_complete(checkpoint, published)
    asked, other = ("Hugging Face's hub", "PaddleNLP's hub")[:: 1 if from_hf_hub else -1]
    assert checkpoint.note == f"{NAME}: {asked} has no such repository; taking it from {other}"


def test_a_copy_in_the_other_hubs_cache_is_used_without_asking_again(
    server: LoopbackHub, published: Path, cache: Path
) -> None:
    server.hf[NAME] = published
    fetch_all(cache)
    server.seen.clear()
    checkpoint = fetch_all(cache)
    assert_complete(checkpoint, published)
    assert server.seen == []
    assert "cache of Hugging Face's hub" in checkpoint.note


def test_a_name_that_no_hub_has_names_both(server: LoopbackHub, cache: Path) -> None:
    with pytest.raises(hub.HubError, match=r"PaddleNLP's hub has no such repository.*Hugging Face's hub has no such"):
        hub.locate(NAME, cache_dir=cache)


def test_a_hub_out_of_reach_is_said(
    server: LoopbackHub, published: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.hf[NAME] = published
    monkeypatch.setattr(
        bos_download, "BOS_URL_TEMPLATE_WITHOUT_REVISION", "http://127.0.0.1:9/{repo_type}{repo_id}{filename}"
    )
    assert "cannot be reached" in hub.locate(NAME, cache_dir=cache).note


@pytest.mark.parametrize("from_hf_hub", [False, True])
def test_a_broken_transfer_is_one_clear_error_and_a_second_call_goes_on(
    server: LoopbackHub, published: Path, cache: Path, from_hf_hub: bool
) -> None:
    server.bos[NAME] = server.hf[NAME] = published
    server.cut[SHARDS[1]] = 100_000
    with pytest.raises(hub.HubError, match=f"(?s){NAME} on .*{SHARDS[1]}.*call again to go on"):
        fetch_all(cache, from_hf_hub=from_hf_hub)
    assert [path.name for path in complete_looking_files(cache)] == [SHARDS[0]]

    server.cut.clear()
    server.seen.clear()
    assert_complete(fetch_all(cache, from_hf_hub=from_hf_hub), published)
    assert SHARDS[0] not in [seen.filename for seen in server.seen]
    starts = [seen.start for seen in server.seen if seen.filename == SHARDS[1] and seen.method == "GET"]
    assert starts[-1] == 100_000


def test_a_transfer_that_breaks_now_and_then_still_arrives(server: LoopbackHub, published: Path, cache: Path) -> None:
    server.bos[NAME] = published
    cuts = iter([50_000, 120_000, 120_000, 250_000])

    class Cuts(dict):
        def get(self, name: str, default: object = None) -> object:
            return next(cuts, None) if name == SHARDS[0] else None

    server.cut = Cuts()
    assert_complete(fetch_all(cache), published)
    starts = [seen.start for seen in server.seen if seen.filename == SHARDS[0] and seen.method == "GET"]
    assert starts == [0, 50_000, 120_000, 120_000, 250_000]


@pytest.fixture
def half_a_file(server: LoopbackHub, published: Path, cache: Path) -> None:
    """Is in the cache, of the first shard."""
    server.bos[NAME] = published
    server.cut[SHARDS[0]] = 100_000
    with pytest.raises(hub.HubError):
        fetch_all(cache)
    server.cut.clear()


@pytest.mark.usefixtures("half_a_file")
def test_a_server_without_ranges_sends_the_file_anew(server: LoopbackHub, published: Path, cache: Path) -> None:
    server.ignore_range = True
    assert_complete(fetch_all(cache), published)


@pytest.mark.usefixtures("half_a_file")
def test_half_a_file_of_another_version_is_not_continued(published: Path, cache: Path) -> None:
    (published / SHARDS[0]).write_bytes(b"new" * 100_000)
    assert_complete(fetch_all(cache), published)
    assert not list(cache.rglob("*.incomplete"))


def test_offline_a_cached_checkpoint_loads(
    server: LoopbackHub, published: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.bos[NAME] = published
    fetch_all(cache)
    monkeypatch.setattr(
        bos_download, "BOS_URL_TEMPLATE_WITHOUT_REVISION", "http://127.0.0.1:9/{repo_type}{repo_id}{filename}"
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    checkpoint = fetch_all(cache)
    assert_complete(checkpoint, published)
    assert checkpoint.extra_file("sparse_attention_config.json") is None


def test_every_file_from_hugging_face_is_of_the_commit_of_its_config(
    server: LoopbackHub, published: Path, cache: Path
) -> None:
    server.hf[NAME] = published
    checkpoint = fetch_all(cache, from_hf_hub=True)
    assert checkpoint.directory.name == COMMIT


def test_a_subfolder_of_a_repository(server: LoopbackHub, published: Path, cache: Path, tmp_path: Path) -> None:
    shutil.copytree(published, tmp_path / "outer" / "inner")
    server.bos[f"{NAME}/inner"] = tmp_path / "outer" / "inner"
    server.hf[NAME] = tmp_path / "outer"
    for from_hf_hub in (False, True):
        checkpoint = hub.locate(NAME, cache_dir=cache / str(from_hf_hub), from_hf_hub=from_hf_hub, subfolder="inner")
        checkpoint.fetch_weights()
        checkpoint.fetch_tokenizer()
        assert_complete(checkpoint, published)


def test_a_shard_missing_on_the_hub_is_named(server: LoopbackHub, published: Path, cache: Path) -> None:
    (published / SHARDS[1]).unlink()
    server.bos[NAME] = published
    with pytest.raises(FileNotFoundError, match=f"{SHARDS[1]}, which its index names"):
        fetch_all(cache)


def test_a_shard_outside_its_directory_is_refused(server: LoopbackHub, published: Path, cache: Path) -> None:
    (published / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../outside"}}))
    server.bos[NAME] = published
    with pytest.raises(ValueError, match="lies beside its index"):
        fetch_all(cache)


@pytest.mark.parametrize(
    "name",
    [
        "/no/such/place",
        "./nowhere",
        "a/../../b",
        "~/models/mine",
        "models/qwen/7b",
        "models/",
        "Qwen/Tiny-1M/",
        "",
        " ",
        Path("models/mine"),
        Path("mine"),
    ],
)
def test_a_path_that_does_not_exist_is_not_looked_up_on_a_hub(server: LoopbackHub, name: str | Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such directory"):
        hub.locate(name)
    assert server.seen == []


def test_a_name_below_a_directory_that_exists_is_a_path(
    server: LoopbackHub, published: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "Qwen" / "needle").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    server.bos["Qwen/nedle"] = server.hf["Qwen/nedle"] = published
    message = r"Qwen/nedle: no such directory, Qwen holds needle; if a repository on a hub is meant, give from_hf_hub"
    with pytest.raises(FileNotFoundError, match=message):
        hub.locate("Qwen/nedle", cache_dir=cache)
    assert server.seen == []
    assert hub.locate("Qwen/nedle", cache_dir=cache, from_hf_hub=True).hub is not None
    server.seen.clear()
    assert hub.locate("Qwen/nedle", cache_dir=cache).hub is not None  # a hub's copy is in a cache
    assert server.seen == []


@pytest.mark.parametrize("name", hub.RELEASED)
def test_the_released_models_are_looked_up_whatever_directories_are_here(
    server: LoopbackHub, published: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "Qwen").mkdir()
    monkeypatch.chdir(tmp_path)
    server.bos[name] = published
    assert hub.locate(name, cache_dir=cache).hub is not None


def test_a_chat_template_of_its_own_comes_from_either_hub(server: LoopbackHub, published: Path, cache: Path) -> None:
    (published / hub.CHAT_TEMPLATE).write_text("{{ messages }}")
    server.bos[NAME] = server.hf[NAME] = published
    for from_hf_hub in (False, True):
        checkpoint = fetch_all(cache / str(from_hf_hub), from_hf_hub=from_hf_hub)
        assert (checkpoint.directory / hub.CHAT_TEMPLATE).read_text() == "{{ messages }}"


def test_a_directory_without_a_config_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        hub.locate(tmp_path)


@pytest.mark.parametrize("by_environment", [False, True])
def test_other_hubs_are_left_to_paddlenlp(
    published: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, by_environment: bool
) -> None:
    asked = []

    def resolve(repository: str, filenames: list[str], **options: object) -> str | None:
        asked.append((repository, options["from_aistudio"]))
        path = published / filenames[0]
        return str(path) if path.is_file() else None

    monkeypatch.setattr(hub, "resolve_file_path", resolve)
    if by_environment:
        monkeypatch.setenv("from_modelscope", "True")
    checkpoint = fetch_all(cache, from_aistudio=not by_environment)
    assert_complete(checkpoint, published)
    assert set(asked) == {(NAME, not by_environment)}
    assert checkpoint.extra_file("sparse_attention_config.json") is None
