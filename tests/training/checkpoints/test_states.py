from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from capfilt.errors import ModelError
from capfilt.models import Blip
from capfilt.models.checkpoints import store as weights
from capfilt.objectives.momentum import NO_IMAGE, Momentum
from capfilt.storage.paths import StoragePath
from capfilt.storage.remote_path import RemotePath
from capfilt.training.checkpoints import states as checkpoint
from capfilt.training.checkpoints.files import StateFiles
from capfilt.training.checkpoints.states import States


def pair(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    """A module that has taken a step, and its optimizer."""
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return module, optimizer


def flat(state: object) -> list[object]:
    """All leaves of a nest of dicts and lists."""
    if isinstance(state, dict):
        return [leaf for key in state for leaf in flat(state[key])]
    if isinstance(state, list | tuple):
        return [leaf for item in state for leaf in flat(item)]
    return [state.tolist() if isinstance(state, torch.Tensor) else state]


def states(folder: StoragePath, identity: str = "me", keep: int = 2, **options: bool) -> States:
    return States(folder, {"architecture": "a", "settings": identity}, keep, **options)


def saved(folder: StoragePath, *steps: int, keep: int = 2) -> tuple[nn.Module, torch.optim.AdamW]:
    """A training that has left states after these steps."""
    module, optimizer = pair(0)
    kept = states(folder, keep=keep)
    for step in steps:
        kept.save(module, optimizer, step)
    kept.finish()
    return module, optimizer


@pytest.fixture(params=["folder", "store"])
def home(request: pytest.FixtureRequest, tmp_path: Path, store: RemotePath) -> StoragePath:
    return tmp_path if request.param == "folder" else store


def test_a_state_comes_back_whole(home: StoragePath) -> None:
    (module, optimizer), (other, its) = saved(home, 7), pair(1)
    assert flat(other.state_dict()) != flat(module.state_dict())
    assert states(home).resume(other, its) == 7
    assert flat(other.state_dict()) == flat(module.state_dict())
    assert flat(its.state_dict()) == flat(optimizer.state_dict())


def test_what_is_written_is_the_state_when_it_was_asked_for(tmp_path: Path) -> None:
    """Training goes on while the state is written."""
    (module, optimizer), kept = pair(0), states(tmp_path)
    before = flat(module.state_dict())
    kept.save(module, optimizer, 7)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1)
    kept.finish()
    other, its = pair(1)
    kept.resume(other, its)
    assert flat(other.state_dict()) == before


def test_without_a_state_a_training_begins_at_0(tmp_path: Path) -> None:
    assert states(tmp_path).resume(*pair(0)) == 0


@pytest.mark.parametrize(("keep", "left"), [(1, ["000000009"]), (2, ["000000006", "000000009"])])
def test_the_newest_are_kept_and_no_scraps(home: StoragePath, keep: int, left: list[str]) -> None:
    module, optimizer = saved(home, 3, 6, 9, keep=keep)
    assert sorted(path.name for path in (home / "states").iterdir()) == left
    assert states(home).resume(module, optimizer) == 9


def test_what_a_kill_left_half_written_is_passed_over_and_swept(home: StoragePath) -> None:
    module, optimizer = saved(home, 3, 6)
    (home / "states/000000006/state.json").unlink()
    assert states(home).resume(module, optimizer) == 3
    again = states(home)
    again.save(module, optimizer, 9)
    again.finish()
    assert sorted(path.name for path in (home / "states").iterdir()) == ["000000003", "000000009"]


def test_a_state_that_cannot_be_written_says_where_and_why(store: RemotePath, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch tells of it by what is no Exception."""

    def refused(*_: object, **__: object) -> None:
        raise PermissionError("Access Denied")

    monkeypatch.setattr(MemoryFileSystem, "open", refused)
    (module, optimizer), kept = pair(0), states(store)
    with pytest.raises(OSError, match=f"{store}/states/000000009: PermissionError: Access Denied"):
        for step in (3, 6, 9):
            kept.save(module, optimizer, step)
            kept.finish()
    assert kept.failed == 3


def test_a_training_outlives_a_store_that_is_away_for_a_while(
    store: RemotePath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    (module, optimizer), kept = pair(0), states(store)
    kept.save(module, optimizer, 3)
    kept.finish()
    with monkeypatch.context() as away:
        away.setattr(MemoryFileSystem, "open", refused)
        for step in (6, 9):
            kept.save(module, optimizer, step)
            kept.finish()
    assert kept.failed == 2
    assert "the state after step 9 is not on disk, and training goes on" in caplog.text
    assert states(store).files.steps() == [3]
    kept.save(module, optimizer, 12)
    kept.finish()
    assert kept.failed == 0
    assert states(store).resume(*pair(1)) == 12


def test_an_old_state_that_cannot_be_removed_stays(
    store: RemotePath, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    remove = MemoryFileSystem.rm_file

    def refused(self: MemoryFileSystem, path: str) -> None:
        if path.endswith("state.json"):
            raise PermissionError("Access Denied")
        remove(self, path)

    monkeypatch.setattr(MemoryFileSystem, "rm_file", refused)
    saved(store, 3, 6, keep=1)
    assert "Access Denied" in caplog.text
    assert states(store).resume(*pair(1)) == 6


def test_a_state_on_a_store_that_was_cut_gives_way_to_the_one_before(store: RemotePath) -> None:
    module, optimizer = saved(store, 3, 6)
    path = store / "states/000000006/__0_0.distcp"
    path.write_bytes(path.read_bytes()[:100])
    assert states(store).resume(module, optimizer) == 3


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, 7)
    module, optimizer = pair(1)
    before = flat(module.state_dict())
    with pytest.raises(ModelError, match=r"000000007 belongs to another training: other settings; use another folder"):
        states(tmp_path, "you").resume(module, optimizer)
    assert flat(module.state_dict()) == before


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    (module, optimizer), kept = pair(0), states(tmp_path, keep=1, keep_best=True)
    for step, loss in ((3, 2.0), (6, 1.0), (9, 1.5), (12, 1.5)):
        kept.save(module, optimizer, step, loss)
        kept.finish()
    assert sorted(path.name for path in (tmp_path / "states").iterdir()) == ["000000006", "000000012"]
    assert kept.best() == 6
    assert kept.better_than(None) == kept.better_than(1.1) == 6
    assert kept.better_than(0.9) is None, "the end is better"
    assert kept.better_than(0.9, 0.1) == 6, "a few steps at the end, of which those before them think otherwise"
    assert kept.better_than(0.3, 0.9) is None
    cut(next((tmp_path / "states/000000006").glob("*.distcp")))
    assert kept.better_than(None) is None, "damaged"
    assert states(tmp_path).resume(module, optimizer) == 12


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, flip, Path.unlink])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_damaged_state_gives_way_to_the_one_before(
    tmp_path: Path, harm: Callable[[Path], None], name: str, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path, 3, 6)
    harm(tmp_path / "states/000000006" / name)
    with caplog.at_level(logging.WARNING):
        assert states(tmp_path).resume(*pair(0)) == 3
    assert "000000006 is damaged" in caplog.text
    harm(tmp_path / "states/000000003" / name)
    with pytest.raises(ModelError, match=r"all 2 states in .* are damaged; delete them to begin again"):
        states(tmp_path).resume(*pair(0))


def test_a_marker_that_is_cut_is_a_damaged_state(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path, 3, 6)
    cut(tmp_path / "states/000000006/state.json")
    assert states(tmp_path).resume(*pair(0)) == 3
    assert "state.json cannot be read" in caplog.text


@pytest.mark.parametrize("place", ["", "storage_data", "state_dict_metadata"])
def test_a_state_that_somebody_else_made_runs_no_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, place: str
) -> None:
    """torch reads the description of a state as any pickle, and makes objects of bytes in it by another."""
    saved(tmp_path, 3, 6)
    folder, ran = tmp_path / "states/000000006", tmp_path / "ran"

    class Code:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (ran,)

    found = pickle.loads((folder / ".metadata").read_bytes())
    if place == "state_dict_metadata":
        found.state_dict_metadata["learner.weight"] = BytesStorageMetadata()
    elif place == "storage_data":
        for part in found.storage_data.values():
            part.relative_path = "../../../outside"
    (folder / ".metadata").write_bytes(pickle.dumps(found if place else Code()))
    about = json.loads((folder / "state.json").read_text())
    (folder / "state.json").unlink()
    StateFiles(tmp_path / "states").commit(6, about)
    assert states(tmp_path).resume(*pair(0)) == 3
    assert "is not a state of tensors alone" in caplog.text
    assert not ran.exists()


@pytest.mark.parametrize("name", ["../../outside", "/etc/passwd", "a/b"])
def test_a_state_has_no_files_elsewhere(tmp_path: Path, name: str) -> None:
    saved(tmp_path, 3, 6)
    marker = tmp_path / "states/000000006/state.json"
    tree = json.loads(marker.read_text())
    marker.write_text(json.dumps({**tree, "files": {**tree["files"], name: [1, "0"]}}))
    assert states(tmp_path).resume(*pair(0)) == 3


def test_what_a_kill_left_half_written_does_not_count(tmp_path: Path) -> None:
    saved(tmp_path, 3, 6)
    (tmp_path / "states/000000006/state.json").unlink()
    assert states(tmp_path).resume(*pair(0)) == 3
    assert [path.name for path in (tmp_path / "states").iterdir()] == ["000000003"]


def test_a_state_may_be_moved(tmp_path: Path) -> None:
    saved(tmp_path / "here", 3)
    (tmp_path / "here").rename(tmp_path / "there")
    module, optimizer = pair(1)
    assert states(tmp_path / "there").resume(module, optimizer) == 3


def test_weights_that_are_not_finite_are_not_saved_over_good_ones(tmp_path: Path) -> None:
    module, optimizer = saved(tmp_path, 3)
    with torch.no_grad():
        module[0].bias[1] = torch.nan  # type: ignore[index, operator]
    with pytest.raises(ModelError, match=r"1 weights are not finite after step 6, first 0\.bias"):
        states(tmp_path).save(module, optimizer, 6)
    assert states(tmp_path).resume(module, optimizer) == 3


def test_a_state_that_could_not_be_written_is_reported_at_the_next(tmp_path: Path) -> None:
    (module, optimizer), kept = pair(0), states(tmp_path / "file")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NotADirectoryError):
        kept.save(module, optimizer, 3)
        kept.save(module, optimizer, 6)


MakeBlip = Callable[..., Blip]


def filled(model: Blip, queue: int = 6, image_ids: bool = False) -> Momentum:
    """A momentum copy that has moved away from its model, its queues half full."""
    momentum = Momentum(model, 0.9, queue, image_ids)
    with torch.no_grad():
        for p in momentum.model.parameters():
            p.add_(0.5)
    momentum.enqueue(torch.ones(3, 8), torch.full((3, 8), 2.0), torch.arange(3))
    return momentum


class TestMomentum:
    def test_a_fine_tuning_goes_on_with_the_momentum_of_the_pretraining(
        self, tmp_path: Path, small_blip: MakeBlip
    ) -> None:
        kept = filled(small_blip())
        weights.save(small_blip(), tmp_path)
        checkpoint.save_momentum(kept.state_dict(), tmp_path)
        taken = Momentum(small_blip(seed=1, roles=("encoder",)), 0.9, 6, image_ids=True)
        checkpoint.load_momentum(taken, tmp_path)
        assert flat(taken.model.state_dict()) == flat(kept.model.state_dict())
        assert torch.equal(taken.queue_image, kept.queue_image)
        assert torch.equal(taken.queue_text, kept.queue_text)
        assert taken.queue_groups is not None
        assert taken.queue_groups.tolist() == [NO_IMAGE] * 6  # of images of another training
        assert int(taken.pointer) == 0

    def test_to_pictures_of_another_size(self, tmp_path: Path, small_blip: MakeBlip) -> None:
        kept = filled(small_blip())
        weights.save(small_blip(), tmp_path)
        checkpoint.save_momentum(kept.state_dict(), tmp_path)
        taken = Momentum(small_blip(image_size=32), 0.9, 6)
        checkpoint.load_momentum(taken, tmp_path)
        assert taken.model.vision.positions.shape[1] == 17
        assert torch.equal(taken.model.vision.positions[:, 0], kept.model.vision.positions[:, 0])

    def test_from_a_pth_of_blip(self, tmp_path: Path, small_blip: MakeBlip) -> None:
        """Under its names: `visual_encoder_m`, `text_encoder_m`, the two projections, queues that stand on end."""
        model, kept = small_blip(), filled(small_blip())
        weights.save_pth(model, tmp_path / "model.pth")
        copy = tmp_path / "copy.pth"
        weights.save_pth(kept.model, copy)
        tensors = torch.load(tmp_path / "model.pth", weights_only=True)["model"]
        for name, tensor in torch.load(copy, weights_only=True)["model"].items():
            tower, _, rest = name.partition(".")
            if tower in ("visual_encoder", "text_encoder", "vision_proj", "text_proj"):
                tensors[f"{tower}_m.{rest}"] = tensor
        tensors |= {"image_queue": kept.queue_image.T, "text_queue": kept.queue_text.T, "queue_ptr": torch.zeros(1)}
        torch.save({"model": tensors}, tmp_path / "model.pth")
        taken = Momentum(small_blip(seed=1, roles=("encoder",)), 0.9, 6)
        heads = {name: tensor.clone() for name, tensor in taken.model.match_head.state_dict().items()}
        checkpoint.load_momentum(taken, tmp_path / "model.pth")
        for name, tensor in taken.model.state_dict().items():
            if not name.startswith(("match_head", "temperature")):
                assert torch.equal(tensor, kept.model.state_dict()[name]), name
        assert torch.equal(taken.queue_image, kept.queue_image)
        assert all(torch.equal(t, heads[name]) for name, t in taken.model.match_head.state_dict().items())
        assert (
            weights.load(tmp_path / "model.pth").capabilities == model.capabilities
        )  # and the model itself is read as before

    def test_what_was_not_kept_is_refused(self, tmp_path: Path, small_blip: MakeBlip) -> None:
        weights.save(small_blip(), tmp_path / "folder")
        weights.save_pth(small_blip(), tmp_path / "model.pth")
        momentum = Momentum(small_blip(), 0.9, 6)
        with pytest.raises(ModelError, match="has no momentum copy beside the model; train it with keep_momentum"):
            checkpoint.load_momentum(momentum, tmp_path / "folder")
        with pytest.raises(ModelError, match=r"missing: image_queue, text_encoder_m\.embeddings"):
            checkpoint.load_momentum(momentum, tmp_path / "model.pth")

    def test_queues_of_another_size_are_refused(self, tmp_path: Path, small_blip: MakeBlip) -> None:
        weights.save(small_blip(), tmp_path)
        checkpoint.save_momentum(filled(small_blip()).state_dict(), tmp_path)
        with pytest.raises(ModelError, match=r"with a queue of 6; set objectives\.queue to it, not to 9"):
            checkpoint.load_momentum(Momentum(small_blip(), 0.9, 9), tmp_path)
