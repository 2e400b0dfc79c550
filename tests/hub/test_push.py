"""Models that are pushed to a hub over HTTP, and loaded from it in fresh processes, with and without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import get_session
from huggingface_hub.utils import _http
from selective_models import own
from server import STAGES, TOKEN, Hub

from hf_compressm.hub import push

TESTS = Path(__file__).resolve().parents[1]
CODE = {"modeling_compressm_mamba.py", "configuration_compressm_mamba.py"}


@pytest.fixture(scope="module")
def hub():
    with Hub() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """Function that runs a command of `client.py` in a fresh process; `client.folder` is its working folder."""
    folder = tmp_path_factory.mktemp("hub")

    def run(command, *arguments, **environment):
        settings = {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HOME": str(folder / f"home-{command}"), "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS)]),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, TESTS / "hub/client.py", command, folder, *arguments], capture_output=True, text=True,
            env=os.environ | settings | environment,
        )  # fmt: skip
        assert TOKEN not in done.stdout + done.stderr
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def shared(client):
    """What one process pushed, trained and had cut off; see `client.py`."""
    return client("share")


@pytest.fixture(scope="module")
def published(shared):
    return shared["pushed"]


@pytest.mark.multi_process
def test_command_line_pushes_in_one_commit_and_says_what(hub, published):
    code, printed, errors = published["own-mamba2"]
    done = json.loads(printed)
    assert (code, errors) == (0, "") and done["repo_id"] == "someone/own-mamba2" and done["form"] == "remote-code"
    assert done["state_sizes"] == [3, 8, 5] and done["url"] == f"{hub.url}/someone/own-mamba2"
    files = hub.files("someone/own-mamba2")
    assert set(files) == {*done["files"], ".gitattributes"} and b"# A card" in files["README.md"]
    assert done["commit"] in hub.repos["someone/own-mamba2"].commits
    for repo, commits in (("own-mamba2", 1), ("plain-mamba", 1), ("private-mimo", 1)):
        assert len(hub.repos[f"someone/{repo}"].commits) == 1 + commits
    code, printed, _ = published["again"]
    assert code == 0 and json.loads(printed)["commit"] == done["commit"], "an unchanged model makes no commit"


@pytest.mark.multi_process
def test_private_branch_and_files_of_an_earlier_model(hub, published):
    repo = hub.repos["someone/private-mimo"]
    assert repo.private and "config.json" not in hub.files("someone/private-mimo")
    assert "config.json" in hub.files("someone/private-mimo", "trial")
    done = json.loads(published["stock"][1])
    assert done["deleted"] == ["adapter_config.json", "model.safetensors.index.json"] and done["form"] == "stock"
    assert set(hub.files("someone/stock")) == {*done["files"], ".gitattributes", "notes.txt"}
    assert not any(name.endswith(".py") for name in hub.files("someone/stock"))


@pytest.mark.multi_process
def test_refusals_of_the_hub_are_one_line(hub, published):
    code, printed, errors = published["someone-else/mimo"]
    assert code == 2 and not printed and errors.count("\n") == 1
    assert "the hub refused the push to someone-else/mimo: 403" in errors and "don't have the rights" in errors
    code, _, errors = published["plain-mamba"]
    assert code == 2 and "someone/plain-mamba exists and is public" in errors


@pytest.mark.multi_process
def test_three_ways_to_load_in_two_fresh_processes(client, published):
    code = ["someone/plain-mamba=mamba.pt", "someone/own-mamba2=mamba2.pt", "someone/private-mimo@trial=mimo.pt"]
    for name, (cls, error, same_tokens) in client("load", *code).items():
        assert cls.startswith("hf_compressm.") and error < 1e-6 and same_tokens, (name, cls, error)
    found = client("load-blocked", "someone/stock=mamba.pt", *code)
    stock = found.pop("someone/stock")
    for name, (cls, error, same_tokens) in found.items():
        assert cls.startswith("transformers_modules.someone.") and error < 1e-6 and same_tokens, (name, cls, error)
    cls, error, same_tokens = stock
    assert cls == "transformers.models.mamba.modeling_mamba.MambaForCausalLM" and error < 1e-5 and same_tokens


@pytest.mark.multi_process
def test_trainer_pushes_code_with_every_commit(hub, client, shared):
    sizes = shared["trained"]
    assert sizes == [12, 12]
    models = [files for files in hub.repos["someone/trained"].commits.values() if "config.json" in files]
    seen = [json.loads(files["config.json"][0])["state_sizes"] for files in models]
    assert [24, 24] in seen and seen[-1] == sizes
    for files in models:
        assert {"modeling_mimo_ssm.py", "configuration_mimo_ssm.py", "model.safetensors"} <= set(files)
    for name, content in hub.files("someone/trained").items():
        (client.folder / "arrived").mkdir(exist_ok=True)
        (client.folder / "arrived" / Path(name).name).write_bytes(content)
    from hf_compressm import MimoSSMForSequenceClassification

    arrived = MimoSSMForSequenceClassification.from_pretrained(client.folder / "arrived").eval()
    expected = torch.load(client.folder / "trained.pt")
    assert torch.equal(arrived(input_values=torch.ones(1, 6, 1)).logits, expected)


@pytest.mark.multi_process
def test_no_interrupted_upload_leaves_a_model_that_loads_wrongly(hub, shared):
    found = shared["cut"]
    assert len(hub.cuts) == len(found) == 20, "every fault is to strike"
    assert len({cut.split(",")[0] for cut in hub.cuts}) > 10
    stopped = [error for error, *_ in found if error]
    assert len(stopped) > 10 and all("the same command again completes it" in error for error in stopped)
    for (error, before, after, completed), cut in zip(found, hub.cuts, strict=True):
        assert before in ("absent", "old") and completed == "new", (cut, before, completed)
        assert after in ((before, "new") if error else ("new",)), (cut, before, after)


@pytest.mark.parametrize("stage", STAGES)
def test_a_hub_that_keeps_silent_is_given_up(stage, tmp_path, monkeypatch):
    own("mamba").save_pretrained(tmp_path)
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=lambda _: None))  # between tries
    with Hub() as silent:
        silent.stand_in(monkeypatch)
        silent.silent = stage
        before = get_session().timeout
        with pytest.raises(
            RuntimeError, match=r"stopped: .*the hub did not answer within 0.2 s\. .* again completes it"
        ):
            push(str(tmp_path), "mine", timeout=0.2)
        assert get_session().timeout == before
        silent.silent = None
        assert "config.json" in silent.files(push(str(tmp_path), "mine", timeout=5).repo_id)


def test_a_timeout_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match="greater than 0; got 0"):
        push(str(tmp_path), "mine", timeout=0)


@pytest.mark.multi_process
def test_token_is_in_no_file(hub, client, published):
    everything = [
        content for repo in hub.repos.values() for files in repo.commits.values() for content, _ in files.values()
    ]
    everything += [
        path.read_bytes() for path in client.folder.rglob("*") if path.is_file() and path.name != "training_args.bin"
    ]
    assert len(everything) > 50 and not any(TOKEN.encode() in content for content in everything)
