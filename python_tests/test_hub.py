"""push_to_hub and from_pretrained("org/name") against a local fake Hub, good and hostile."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from fake_hub import TOKEN, FakeHub, Handler, HubClient, Repository

from c2c_ext import CardInfo, Fuser, FuserConfig
from c2c_ext.files import MAX_JSON_BYTES
from c2c_ext.model_card import CARD_MARKER, CARD_NAME
from c2c_ext.model_kv import KVShape, ModelKV
from c2c_ext.serialization import CONFIG_NAME, WEIGHTS_NAME

NAME = "org/fuser"


@pytest.fixture(scope="module")
def server() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def client(server: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubClient]:
    with HubClient(server.endpoint, tmp_path_factory.mktemp("home")) as client:
        yield client


@pytest.fixture
def hub(server: FakeHub) -> Iterator[FakeHub]:
    yield server
    server.reset()


def small_fuser(seed: int = 0) -> Fuser:
    receiver = ModelKV("qwen3", "org/receiver", (KVShape(2, 6), KVShape(1, 8)))
    sharer = ModelKV("llama", "sharer", (KVShape(3, 4), KVShape(3, 4)))
    torch.manual_seed(seed)
    return Fuser(FuserConfig(receiver, sharer, (0, 1), 10, 7))


def files_of(fuser: Fuser, directory: Path) -> dict[str, bytes]:
    fuser.save_pretrained(directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture
def good(hub: FakeHub, tmp_path: Path) -> Repository:
    """A repository with a fuser and much that is none of our business."""
    repository = hub.repositories[NAME] = Repository()
    files = files_of(small_fuser(), tmp_path / "good")
    repository.commit({**files, "config.json": b"{", "pytorch_model.bin": b"x", "run.py": b"x"})
    return repository


def pull(client: HubClient, tmp_path: Path, name: str = NAME, **options: object) -> dict:
    return client.call("pull", repo_id=name, **{"cache_dir": str(tmp_path / "cache"), **options})


def assert_fails(answer: dict, kind: str, *parts: str) -> None:
    assert "error" in answer, answer
    assert kind in answer["types"], answer
    for part in parts:
        assert part in answer["error"]
    assert TOKEN not in answer["error"]
    assert "\n" not in answer["error"]


# Upload


def test_push_then_pull_keeps_every_bit(hub: FakeHub, client: HubClient, tmp_path: Path) -> None:
    files = files_of(small_fuser(), tmp_path / "mine")
    pushed = client.call(
        "push", directory=str(tmp_path / "mine"), repo_id=NAME, token=TOKEN, license="apache-2.0"
    )
    assert pushed.get("result", "").startswith(f"{hub.endpoint}/{NAME}/commit/"), pushed
    stored = hub.repositories[NAME].files()
    assert set(stored) == {CONFIG_NAME, WEIGHTS_NAME, CARD_NAME}
    card = stored.pop(CARD_NAME).decode()
    assert "license: apache-2.0" in card and f'from_pretrained("{NAME}")' in card
    assert stored == {name: files[name] for name in stored}

    pulled = pull(client, tmp_path, save_to=str(tmp_path / "theirs"))
    assert pulled == {"result": "Fuser", "warnings": []}
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        assert (tmp_path / "theirs" / name).read_bytes() == files[name]


def test_weights_go_the_large_file_way(hub: FakeHub, tmp_path: Path) -> None:
    hub.lfs_suffixes = (".safetensors",)
    files = files_of(small_fuser(), tmp_path / "mine")
    # Without Xet, for which there is no fake.
    with HubClient(hub.endpoint, tmp_path, HF_HUB_DISABLE_XET="1", HF_TOKEN=TOKEN) as client:
        pushed = client.call("push", directory=str(tmp_path / "mine"), repo_id=NAME)
        assert "result" in pushed, pushed
        assert hub.repositories[NAME].lfs == {WEIGHTS_NAME}
        pulled = pull(client, tmp_path, save_to=str(tmp_path / "theirs"))
        assert "result" in pulled, pulled
    assert (tmp_path / "theirs" / WEIGHTS_NAME).read_bytes() == files[WEIGHTS_NAME]


def test_push_makes_a_private_repository_of_the_tokens_user(
    hub: FakeHub, client: HubClient, tmp_path: Path
) -> None:
    files_of(small_fuser(), tmp_path / "mine")
    arguments = {"directory": str(tmp_path / "mine"), "repo_id": "fuser", "private": True}
    assert "result" in client.call("push", **arguments, token=TOKEN)
    assert hub.repositories["me/fuser"].private
    assert "result" in pull(client, tmp_path, "me/fuser", token=TOKEN)
    answer = pull(client, tmp_path, "me/fuser", cache_dir=str(tmp_path / "other"))
    assert_fails(answer, "FileNotFoundError", "me/fuser", "private and needs a token")


def test_push_to_a_branch_leaves_main_alone(
    good: Repository, client: HubClient, tmp_path: Path
) -> None:
    main = good.branches["main"]
    good.branches["next"] = main
    files = files_of(small_fuser(seed=1), tmp_path / "mine")
    arguments = {"directory": str(tmp_path / "mine"), "repo_id": NAME, "token": TOKEN}
    assert "result" in client.call("push", **arguments, branch="next")
    assert good.branches["main"] == main
    assert good.files("next")[WEIGHTS_NAME] == files[WEIGHTS_NAME]
    answer = client.call("push", **arguments, branch="nowhere")
    assert_fails(answer, "FileNotFoundError", NAME, "no revision 'nowhere'")


def test_push_replaces_only_a_card_of_ours(
    good: Repository, client: HubClient, tmp_path: Path
) -> None:
    assert CARD_MARKER.encode() in good.files()[CARD_NAME]
    files_of(small_fuser(seed=1), tmp_path / "mine")
    arguments = {"directory": str(tmp_path / "mine"), "repo_id": NAME, "token": TOKEN}
    assert "result" in client.call("push", **arguments, license="mit")
    assert b"license: mit" in good.files()[CARD_NAME]

    good.commit({CARD_NAME: b"# My own words\n"})
    files = files_of(small_fuser(seed=2), tmp_path / "mine")
    answer = client.call("push", **arguments, license="mit")
    assert "result" in answer
    assert any("card is not written" in warning for warning in answer["warnings"])
    assert good.files()[CARD_NAME] == b"# My own words\n"
    assert good.files()[WEIGHTS_NAME] == files[WEIGHTS_NAME]


def test_push_without_permission_is_refused(
    hub: FakeHub, client: HubClient, tmp_path: Path
) -> None:
    files_of(small_fuser(), tmp_path / "mine")
    arguments = {"directory": str(tmp_path / "mine"), "repo_id": NAME}
    for token in (None, "hf_wrong"):
        answer = client.call("push", **arguments, token=token)
        assert_fails(answer, "OSError", NAME, hub.endpoint)
    assert not hub.repositories


def test_push_with_metadata_that_the_hub_refuses_commits_nothing(
    hub: FakeHub, client: HubClient, tmp_path: Path
) -> None:
    files_of(small_fuser(), tmp_path / "mine")
    arguments = {"directory": str(tmp_path / "mine"), "repo_id": NAME, "token": TOKEN}
    answer = client.call("push", **arguments, license="unheard-of")
    assert "ValueError" in answer["types"] and "license" in answer["error"]
    assert hub.repositories[NAME].files() == {}


@pytest.mark.parametrize("name", ["", "../x", "a/b/c", "/etc", "a/..", "a b/c", "a/b\n", 7])
def test_push_refuses_what_is_no_repository(name: object) -> None:
    with pytest.raises(ValueError, match="repo_id must be the name of a Hub repository"):
        small_fuser().push_to_hub(name)


def test_push_refuses_a_damaged_fuser_before_any_request(
    monkeypatch: pytest.MonkeyPatch, hub: FakeHub
) -> None:
    fuser = small_fuser()
    with torch.no_grad():
        fuser.groups[0].out_bias[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"groups\.0\.out_bias holds NaN"):
        fuser.push_to_hub(NAME)
    with pytest.raises(TypeError, match="card must be a CardInfo, got dict"):
        small_fuser().push_to_hub(NAME, card={"license": "mit"})


# Download


def test_pull_asks_for_two_files_of_one_commit(
    hub: FakeHub, good: Repository, client: HubClient, tmp_path: Path
) -> None:
    assert "result" in pull(client, tmp_path)
    asked = {path.rpartition("/resolve/")[2] for _, path in hub.requests}
    assert asked == {f"main/{CONFIG_NAME}", f"{good.branches['main']}/{WEIGHTS_NAME}"}
    kept = {path.name for path in (tmp_path / "cache").rglob("*") if "snapshots" in path.parts}
    assert kept == {"snapshots", good.branches["main"], CONFIG_NAME, WEIGHTS_NAME}


def test_pull_takes_revisions(good: Repository, client: HubClient, tmp_path: Path) -> None:
    old = good.branches["v1"] = good.branches["main"]
    files = files_of(small_fuser(seed=1), tmp_path / "new")
    new = good.commit(files)
    weights = {}
    for revision in (None, "main", "v1", old, new):
        place = tmp_path / "pulled"
        assert "result" in pull(client, tmp_path, revision=revision, save_to=str(place))
        weights[revision] = (place / WEIGHTS_NAME).read_bytes()
    assert weights[None] == weights["main"] == weights[new] == files[WEIGHTS_NAME]
    assert weights["v1"] == weights[old] == good.files(old)[WEIGHTS_NAME] != weights[new]
    answer = pull(client, tmp_path, revision="../../main")
    assert_fails(answer, "FileNotFoundError", NAME, "no revision '../../main'")


def test_pull_follows_a_renamed_repository(
    hub: FakeHub, good: Repository, client: HubClient, tmp_path: Path
) -> None:
    hub.renamed["old/name"] = NAME
    assert "result" in pull(client, tmp_path, "old/name")


def test_pulled_files_are_found_again_without_the_hub(
    hub: FakeHub, good: Repository, client: HubClient, tmp_path: Path
) -> None:
    answer = pull(client, tmp_path, local_files_only=True)
    assert_fails(answer, "FileNotFoundError", NAME, "not downloaded before", "local_files_only")
    assert hub.requests == []
    assert "result" in pull(client, tmp_path)
    commit = good.branches["main"]
    hub.requests.clear()
    assert pull(client, tmp_path, local_files_only=True) == {"result": "Fuser", "warnings": []}
    assert pull(client, tmp_path, revision=commit) == {"result": "Fuser", "warnings": []}
    assert hub.requests == []
    with hub.down():
        answer = pull(client, tmp_path)
        assert answer["result"] == "Fuser"
        assert any("is taken as it was downloaded before" in w for w in answer["warnings"])
        answer = pull(client, tmp_path, force_download=True)
        assert_fails(answer, "ConnectionError", hub.endpoint, "cannot be reached")


def test_an_unreachable_hub_is_one_clear_error(
    hub: FakeHub, client: HubClient, tmp_path: Path
) -> None:
    files_of(small_fuser(), tmp_path / "mine")
    with hub.down():
        answer = pull(client, tmp_path)
        assert_fails(answer, "ConnectionError", hub.endpoint, "cannot be reached", NAME)
        answer = client.call("push", directory=str(tmp_path / "mine"), repo_id=NAME, token=TOKEN)
        assert_fails(answer, "ConnectionError", hub.endpoint, "cannot be reached", NAME)


def test_offline_mode_is_one_clear_error(
    hub: FakeHub, good: Repository, client: HubClient, tmp_path: Path
) -> None:
    assert "result" in pull(client, tmp_path)
    hub.requests.clear()
    with HubClient(hub.endpoint, tmp_path, HF_HUB_OFFLINE="1") as offline:
        assert pull(offline, tmp_path) == {"result": "Fuser", "warnings": []}
        answer = pull(offline, tmp_path, "org/other")
        assert_fails(answer, "ConnectionError", "cannot be reached", "org/other")
    assert hub.requests == []


def test_pull_names_what_is_missing_or_forbidden(
    hub: FakeHub, good: Repository, client: HubClient, tmp_path: Path
) -> None:
    for token in (None, TOKEN):
        answer = pull(client, tmp_path, "org/nothing", token=token)
        assert_fails(answer, "FileNotFoundError", "no fuser directory at org/nothing")
    answer = pull(client, tmp_path, revision="v9")
    assert_fails(answer, "FileNotFoundError", NAME, "no revision 'v9'")
    hub.repositories["org/empty"] = Repository()
    answer = pull(client, tmp_path, "org/empty")
    assert_fails(answer, "FileNotFoundError", f"{CONFIG_NAME} of org/empty", "is missing")
    half = hub.repositories["org/half"] = Repository()
    half.commit({CONFIG_NAME: good.files()[CONFIG_NAME]})
    answer = pull(client, tmp_path, "org/half")
    assert_fails(answer, "FileNotFoundError", f"{WEIGHTS_NAME} of org/half", "is missing")
    good.gated = True
    assert_fails(pull(client, tmp_path), "PermissionError", NAME, "is gated")
    assert "result" in pull(client, tmp_path, token=TOKEN)


@pytest.mark.parametrize(
    "name", ["./my_fuser", "../x", "a/b/c", "/nowhere", "nowhere", "a/b\n", "a/..", "a b/c", "a//b"]
)
def test_what_is_no_repository_stays_off_the_network(
    hub: FakeHub, client: HubClient, tmp_path: Path, name: str
) -> None:
    answer = pull(client, tmp_path, name)
    assert "FileNotFoundError" in answer["types"]
    assert f"no fuser directory at {name}" in answer["error"]
    assert hub.requests == []


def test_a_local_directory_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: FakeHub
) -> None:
    monkeypatch.chdir(tmp_path)
    small_fuser().save_pretrained(tmp_path / "org" / "fuser")
    # In this process the endpoint is the real one: nothing may be asked there.
    assert Fuser.from_pretrained(NAME).config == small_fuser().config
    with pytest.raises(ValueError, match="revision goes with a repository of the Hub, but org/f"):
        Fuser.from_pretrained(NAME, revision="main")
    with pytest.raises(TypeError, match="must be a path or 'org/name', got 3"):
        Fuser.from_pretrained(3)
    with pytest.raises(FileNotFoundError, match="no fuser directory at org/missing"):
        Fuser.from_pretrained(Path("org/missing"))
    with pytest.raises(ValueError, match="local_files_only and force_download exclude"):
        Fuser.from_pretrained("org/missing", local_files_only=True, force_download=True)


# A hostile or broken Hub


def send(sent: Callable[[bytes], bytes], **headers: object) -> Callable[[Handler, bytes], None]:
    """A fault: the right headers, another body."""

    def fault(handler: Handler, data: bytes) -> None:
        repository = handler.hub.repositories[NAME]
        handler.serve(repository.branches["main"], data, sent(data), **headers)

    return fault


def error_page(handler: Handler, data: bytes) -> None:
    handler.answer(502, b"<html>" + b"bad gateway " * 1000, handler.command == "HEAD")


def login_page(handler: Handler, data: bytes) -> None:
    handler.answer(200, b"<html>please log in", handler.command == "HEAD", ETag='"x"')


FAULTS = {
    "truncated weights": (("GET", WEIGHTS_NAME), send(lambda d: d[:-9]), "should be of size"),
    "surplus bytes": (("GET", WEIGHTS_NAME), send(lambda d: d + b"x"), "should be of size"),
    "a pickle": (
        ("GET", WEIGHTS_NAME),
        send(lambda d: b"\x80\x04cos\nsystem\n.".ljust(len(d))),
        "is not a whole safetensors file",
    ),
    "another configuration": (
        ("GET", CONFIG_NAME),
        send(lambda d: b"[" * len(d)),
        "is not valid JSON|nested too deeply",
    ),
    "a huge configuration": (
        ("HEAD", CONFIG_NAME),
        send(lambda d: d, Content_Length=MAX_JSON_BYTES + 1),
        f"must be at most {MAX_JSON_BYTES} bytes, got {MAX_JSON_BYTES + 1}; not downloaded",
    ),
    "huge weights": (
        ("HEAD", WEIGHTS_NAME),
        send(lambda d: d, Content_Length=1 << 40),
        f"got {1 << 40}; not downloaded",
    ),
    "an error page": (("GET", WEIGHTS_NAME), error_page, "HTTP status 502"),
    "an error page first": (("HEAD", CONFIG_NAME), error_page, "HTTP status 502"),
    "a login page": (("HEAD", CONFIG_NAME), login_page, "does not answer like a Hub"),
    "a path for a commit": (
        ("HEAD", CONFIG_NAME),
        send(lambda d: d, X_Repo_Commit="../../../x"),
        "does not answer like a Hub",
    ),
    "a path for an ETag": (
        ("HEAD", CONFIG_NAME),
        send(lambda d: d, ETag='"../../../x"'),
        "does not answer like a Hub",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_answer_is_one_clear_error_and_is_not_kept(
    hub: FakeHub, good: Repository, client: HubClient, tmp_path: Path, fault: str
) -> None:
    place, answer_with, message = FAULTS[fault]
    hub.faults[place] = answer_with
    answer = pull(client, tmp_path)
    assert "error" in answer, answer
    assert any(part in answer["error"] for part in message.split("|")), answer
    assert {"OSError", "ValueError"} & set(answer["types"])
    assert "\n" not in answer["error"]
    outside = {path.name for path in tmp_path.iterdir()} - {"cache", "good"}
    assert not outside
    hub.faults.clear()  # the Hub is well again: so are we, without being told
    assert pull(client, tmp_path) == {"result": "Fuser", "warnings": []}


def test_a_committed_file_that_is_no_fuser_is_refused(
    hub: FakeHub, good: Repository, client: HubClient, tmp_path: Path
) -> None:
    files = good.files()
    fixed = good.branches["main"]
    broken = good.commit({WEIGHTS_NAME: b"PK\x03\x04 a pickle in a zip"})
    answer = pull(client, tmp_path)
    assert_fails(answer, "ValueError", "is not a whole safetensors file", NAME, broken)
    config = json.loads(files[CONFIG_NAME])
    good.commit({CONFIG_NAME: json.dumps(config | {"hidden_size": 1 << 18}).encode()})
    assert_fails(pull(client, tmp_path), "ValueError", WEIGHTS_NAME)
    good.commit({CONFIG_NAME: b"[]"})
    hub.requests.clear()
    assert_fails(pull(client, tmp_path), "ValueError", "expected a JSON object", NAME)
    assert not any(WEIGHTS_NAME in path for _, path in hub.requests)
    assert "result" in pull(client, tmp_path, revision=fixed)


def test_a_card_is_not_needed_and_not_read(
    hub: FakeHub, good: Repository, client: HubClient, tmp_path: Path
) -> None:
    good.commit({CARD_NAME: b"\xff\xfe---\nnot: [yaml"})
    assert "result" in pull(client, tmp_path)
    assert not any(CARD_NAME in path for _, path in hub.requests)


def test_card_info_is_taken_by_push_and_save(tmp_path: Path) -> None:
    small_fuser().save_pretrained(tmp_path, card=CardInfo(license="mit"))
    assert "license: mit" in (tmp_path / CARD_NAME).read_text()
