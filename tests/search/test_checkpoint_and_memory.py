"""The newest whole checkpoint is found, and a peak is a peak."""

import json

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from ila.runs.checkpoints import MARKER, MarkComplete, is_finished, last_complete
from ila.runs.meter import peak_bytes, reset_peak
from ila.training.adapter import save_adapter
from ila.training.config import TrainConfig
from ila.training.train import ADAPTER_FILES, train

CPU = torch.device("cpu")


def write(folder, step, content="weights", *, whole=True, also=None):
    path = folder / f"checkpoint-{step}"
    (path / "nested").mkdir(parents=True)
    (path / "a.bin").write_text(content)
    (path / "nested" / "b.bin").write_text(content)
    if whole:
        args = TrainingArguments(output_dir=str(folder), report_to="none")
        state = TrainerState(global_step=step, is_world_process_zero=True)
        MarkComplete(also).on_save(args, state, TrainerControl())
    return path


def test_the_whole_checkpoint_of_the_highest_number_is_found(tmp_path):
    assert last_complete(tmp_path / "nowhere") is None
    assert last_complete(tmp_path) is None
    nine, ten = write(tmp_path, 9), write(tmp_path, 10)  # by number, not by name
    write(tmp_path, 11, whole=False)
    assert last_complete(tmp_path) == ten
    (ten / "nested" / "b.bin").write_text("weight")
    assert last_complete(tmp_path) == nine
    (nine / "a.bin").unlink()
    assert last_complete(tmp_path) is None


@pytest.mark.parametrize(
    "name", ["checkpoint-", "checkpoint-x", "checkpoint-3.tmp", "tmp-checkpoint-3"]
)
def test_other_folders_are_no_checkpoints(tmp_path, name):
    write(tmp_path, 3).rename(tmp_path / name)
    assert last_complete(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "null", "[]", '{"step": 3}', '{"files": []}', "\xff"])
def test_a_damaged_marker_marks_nothing(tmp_path, text):
    path = write(tmp_path, 3)
    (path / MARKER).write_text(text, encoding="latin-1")
    assert last_complete(tmp_path) is None


def test_what_is_added_is_there_before_the_marker(tmp_path):
    def also(folder):
        assert not (folder / MARKER).exists()
        (folder / "sums.json").write_text("{}")

    path = write(tmp_path, 3, also=also)
    marker = json.loads((path / MARKER).read_text())
    sizes = {"a.bin": 7, "nested/b.bin": 7, "sums.json": 2}
    assert marker.keys() == {"step", "files", "crc32"} and marker["step"] == 3
    assert marker["files"] == sizes and marker["crc32"].keys() == sizes.keys()


@pytest.mark.parametrize("name", ["a.bin", "nested/b.bin"])
def test_a_file_of_the_same_size_with_another_content_is_damage(tmp_path, name):
    path = write(tmp_path, 3)
    assert last_complete(tmp_path) == path
    content = bytearray((path / name).read_bytes())
    content[3] ^= 1
    (path / name).write_bytes(content)
    assert last_complete(tmp_path) is None


def test_a_marker_of_before_without_checksums_still_marks(tmp_path):
    path = write(tmp_path, 3)
    marker = json.loads((path / MARKER).read_text())
    del marker["crc32"]
    (path / MARKER).write_text(json.dumps(marker))
    assert last_complete(tmp_path) == path


def flushed(path):
    status = path.stat()
    return "flush", f"{status.st_dev}:{status.st_ino}"


def test_a_checkpoint_is_on_the_disk_before_its_marker(tmp_path, disk):
    path = write(tmp_path, 3)
    marked = disk.index(("rename", str(path / MARKER)))
    kept = (path / "a.bin", path / "nested" / "b.bin", path, path / "nested", tmp_path)
    assert all(disk.index(flushed(one)) < marked for one in kept)


def test_a_training_is_on_the_disk_before_it_says_so(make_llama, rows, tmp_path, disk):
    out = tmp_path / "run"
    config = TrainConfig(steps=2, batch_size=2, save_every=2)
    train(make_llama(), rows, config, output_dir=out, progress=False)
    done = disk.index(("rename", str(out / "metrics.json")))
    adapter = [out / name for name in ADAPTER_FILES]
    assert all(disk.index(flushed(file)) < done for file in adapter)
    moved = max(disk.index(("rename", str(file))) for file in adapter)
    assert flushed(out) in disk[moved:done]


def test_only_the_first_process_marks(tmp_path):
    path = write(tmp_path, 3, whole=False)
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    state = TrainerState(global_step=3, is_world_process_zero=False)
    MarkComplete().on_save(args, state, TrainerControl())
    assert not (path / MARKER).exists()


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({}, False),
        ({"stateful_callbacks": {}}, False),
        ({"stateful_callbacks": {"TrainerControl": {"args": {}}}}, False),
        (
            {"stateful_callbacks": {"TrainerControl": {"args": {"should_training_stop": True}}}},
            True,
        ),
    ],
)
def test_a_checkpoint_says_whether_training_was_over(tmp_path, state, expected):
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert is_finished(tmp_path) is expected


def test_one_adapter_of_several_is_saved_without_a_subfolder(make_llama, tmp_path):
    model = make_llama()
    model.add_adapter("other", model.peft_config["default"])
    for name in ("default", "other"):
        save_adapter(model, name, tmp_path / name)
        assert not [path for path in (tmp_path / name).iterdir() if path.is_dir()]
        assert (tmp_path / name / "adapter_model.safetensors").is_file()
        assert (tmp_path / name / "adapter_config.json").is_file()


def test_a_peak_is_seen_after_the_tensor_is_gone():
    if not reset_peak(CPU):
        pytest.skip("this system does not let a process reset its peak")
    before = peak_bytes(CPU)
    assert before > 2**20
    size = 2**27
    torch.ones(size, dtype=torch.uint8)  # written, so resident; freed at once
    # Freed memory of other tests may be taken again, so only most of it must show.
    assert peak_bytes(CPU) - before > size // 2
    assert reset_peak(CPU)
    assert peak_bytes(CPU) - before < size // 2


def test_a_peak_that_cannot_be_known_is_none():
    assert peak_bytes(torch.device("meta")) is None
