"""`push_to_hub` of `ila train`: what would be uploaded, and where it is refused. No network."""

import json
from pathlib import Path
from typing import NamedTuple

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file

from ila.commands.hub import _without_local_base
from ila.masks.mask import LayerMask

TOKEN = "hf_" + "x" * 34
PUSH = ("--set", "push_to_hub=true", "--set", "hub_model_id=me/tiny")


class Made(NamedTuple):
    repo_id: str


@pytest.fixture
def hub(monkeypatch):
    """Record what reaches the hub; the files are read while they are there."""
    seen = {"order": []}
    monkeypatch.setenv("HF_TOKEN", TOKEN)

    def create_repo(self, repo_id, **more):
        seen["order"].append("create")
        seen["create"] = (repo_id, more)
        return Made(repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **more):
        seen["order"].append("upload")
        seen["upload"] = (repo_id, more)
        seen["files"] = {p.name: p.read_bytes() for p in Path(folder_path).iterdir()}
        if "fail" in seen:
            raise seen["fail"]

    monkeypatch.setattr(HfApi, "create_repo", create_repo)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    return seen


@pytest.fixture
def mask_file(train, tmp_path):
    """Return the mask of a run with a selection."""
    answer = train(tmp_path / "once", "--select-at", "0.5", "--top", "0.3")
    assert answer.code == 0, answer.err
    assert (tmp_path / "once/tokenizer.json").is_file()
    return tmp_path / "once/mask.json"


OURS = {"adapter_model.safetensors", "adapter_config.json", "README.md", "mask.json"}
OF_THE_RUN = {"run.json", "train.json", "metrics.json", "log.jsonl", "config.yaml", "heatmap.png"}


def assert_the_mask(files, mask_file, tmp_path):
    """The mask is whole, and names no folder of this machine."""
    uploaded = tmp_path / "uploaded.json"
    uploaded.write_bytes(files["mask.json"])
    mask = LayerMask.load(mask_file)
    assert LayerMask.load(uploaded).open == mask.open
    assert LayerMask.load(uploaded).scores == mask.scores
    here = str(tmp_path.parent)
    assert here in mask_file.read_text() and here not in uploaded.read_text()


def test_a_training_under_a_mask_uploads_adapter_card_tokenizer_and_mask(
    train, hub, mask_file, tmp_path, tiny_model_folder
):
    out = tmp_path / "out"
    answer = train(
        out, *PUSH, "--set", "hub_private_repo=true", "--set", "hub_revision=dev",
        "--mask", mask_file,
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert hub["order"] == ["create", "upload"] and "Uploaded to me/tiny" in answer.out
    assert hub["create"] == ("me/tiny", {"private": True, "exist_ok": True})
    repo, more = hub["upload"]
    assert (repo, more["revision"], more["commit_message"]) == ("me/tiny", "dev", "End of training")
    files = hub["files"]
    assert set(files) > OURS and {"tokenizer.json", "tokenizer_config.json"} < set(files)
    assert not (OF_THE_RUN | {"verdicts.json"}) & set(files)
    assert_the_mask(files, mask_file, tmp_path)
    assert files["adapter_model.safetensors"] == (out / "adapter_model.safetensors").read_bytes()
    assert len(load_file(out / "adapter_model.safetensors")) == 2 * len(
        LayerMask.load(mask_file).open
    )
    card = files["README.md"].decode()
    assert "4 of 14 layers were trained" in card and "base_model:" not in card
    whole = b"".join(p.read_bytes() for p in out.rglob("*") if p.is_file()) + b"".join(
        files.values()
    )
    assert TOKEN.encode() not in whole and TOKEN not in answer.out + answer.err


def test_one_run_uploads_its_own_mask_under_the_name_of_its_folder(train, hub, tmp_path):
    answer = train(
        tmp_path / "chosen", "--set", "push_to_hub=true", "--select-at", "0.5", "--top", "0.3"
    )
    assert answer.code == 0, answer.err
    assert hub["upload"][0] == "me/chosen" and set(hub["files"]) > OURS | {"tokenizer.json"}
    assert_the_mask(hub["files"], tmp_path / "chosen/mask.json", tmp_path)


def test_an_upload_that_fails_is_one_line_and_resume_uploads_again(ila, train, hub, tmp_path):
    hub["fail"] = ConnectionError(f"403 for token {TOKEN}")
    line = train(tmp_path / "out", *PUSH).error()
    assert "push_to_hub to 'me/tiny' failed: ConnectionError: 403 for token …" in line
    assert "the adapter is whole in" in line and TOKEN not in line
    assert (tmp_path / "out/metrics.json").is_file()
    del hub["fail"]
    assert train(tmp_path / "out", *PUSH, "--resume").code == 0
    assert set(hub["files"]) > OURS - {"mask.json"}
    again = ila("train", "--config", tmp_path / "out/config.yaml", "--out", tmp_path / "again")
    assert again.code == 0 and hub["create"][0] == "me/tiny" and len(hub["order"]) == 6


def test_without_a_network_nothing_is_trained(train, tmp_path, monkeypatch):
    def offline(self, *args, **kwargs):
        raise OfflineModeIsEnabled("cannot reach the hub:\noffline mode is enabled")

    monkeypatch.setattr(HfApi, "create_repo", offline)
    line = train(tmp_path / "out", *PUSH).error()
    assert "push_to_hub to 'me/tiny' failed: OfflineModeIsEnabled" in line
    assert "nothing was trained" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--set", "hub_model_id=me/x"), "hub_model_id does nothing without push_to_hub"),
        ((*PUSH, "--set", f"hub_token={TOKEN}"), "log in instead"),
        ((*PUSH, "--set", "hub_strategy=every_save"), "a run uploads once, at its end"),
        ((*PUSH, "--set", "push_to_hub=perhaps"), "push_to_hub"),
    ],
)
def test_fields_that_do_not_fit_are_one_line(train, hub, tmp_path, options, said):
    line = train(tmp_path / "out", *options).error()
    assert said in line and TOKEN not in line and hub["order"] == []


def test_a_search_and_a_training_in_full_upload_nothing(ila, learn, source, hub, tmp_path):
    assert "`ila train` alone uploads" in learn(tmp_path / "a", *PUSH).error()
    without_rank = source[: source.index("--rank")]
    answer = ila("train", *without_rank, "--out", tmp_path / "b", "--full", *PUSH)
    assert "push_to_hub uploads an adapter, and --full trains none" in answer.error()
    assert hub["order"] == []


def test_a_card_names_a_base_model_of_the_hub_alone():
    card = '---\nbase_model: "{0}"\ntags:\n- "base_model:adapter:{0}"\n- "lora"\n---\ntext\n'
    assert _without_local_base(card.format("a/b")) == card.format("a/b")
    assert _without_local_base(card.format("/a/b")) == '---\ntags:\n- "lora"\n---\ntext\n'


def test_config_yaml_keeps_the_fields_of_the_hub(train, hub, tmp_path):
    assert train(tmp_path / "out", *PUSH).code == 0
    text = (tmp_path / "out/config.yaml").read_text()
    assert "push_to_hub: true" in text and "hub_model_id: me/tiny" in text
    record = json.loads((tmp_path / "out/metrics.json").read_text())
    assert "push_to_hub" not in record["config"]["training_args"]
