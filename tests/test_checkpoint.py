"""A checkpoint is whole or refused, survives crashes while it is written, and holds no pickles."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from tiny_world import PowerCutError

from mtrl_imgrad.checkpoint import (
    FORMAT,
    Checkpoint,
    DamagedError,
    drop_replay,
    read_manifest,
    save_checkpoint,
    step_name,
    verify,
)
from mtrl_imgrad.kept_checkpoints import choose_checkpoint, prune

WITHOUT_FILES = json.dumps({"format": FORMAT}).encode()

CPU = torch.device("cpu")
BLOCKS = ("replay-0000000000-000000000004", "replay-0000000004-000000000006")


def save(folder: Path, step: int, value: float, blocks=BLOCKS, base: Checkpoint | None = None, **options) -> Checkpoint:
    """A checkpoint all of whose contents tell the value, saved as training does it."""
    tensors = {"weights": torch.full((3,), value), "count": torch.tensor(step)}
    makers = {name: lambda: {"x": torch.full((5,), value)} for name in blocks} if blocks is not None else None
    state = {"value": value}
    made = save_checkpoint(
        folder, step_name(step), step, state, {"learner": lambda: tensors}, makers, base=base, **options
    )
    prune(folder, made, base)
    return made


def value_of(folder: Path) -> float:
    """The value of the newest checkpoint that is whole, the same in the JSON and in the tensors."""
    checkpoint = choose_checkpoint(folder)
    learner = checkpoint.part("learner", CPU)
    assert learner["weights"].tolist() == [checkpoint.state()["value"]] * 3
    assert learner["count"].item() == checkpoint.step
    return checkpoint.state()["value"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


class TestSaveAndLoad:
    def test_what_was_saved_is_loaded(self, tmp_path):
        tensors = {
            "float32": torch.randn(3, 2),
            "float64": torch.randn(2, dtype=torch.float64),
            "bool": torch.tensor([True, False]),
            "scalar": torch.tensor(7),
            "strided": torch.arange(6.0).reshape(2, 3).T,
        }
        state = {"tasks": ["a", "b"], "envs": {"big": 2**100, "none": None}}
        save_checkpoint(tmp_path, step_name(10), 10, state, {"learner": lambda: tensors})
        checkpoint = choose_checkpoint(tmp_path)
        assert (checkpoint.step, checkpoint.state(), checkpoint.resumable) == (10, state, False)
        loaded = checkpoint.part("learner", CPU)
        assert set(loaded) == set(tensors)
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype
            assert torch.equal(loaded[name], tensor)

    def test_the_manifest_names_every_other_file_with_its_size(self, tmp_path):
        place = save(tmp_path, 10, 1.0).place
        manifest = json.loads((place / "manifest.json").read_text())
        assert (manifest["format"], manifest["step"]) == (FORMAT, 10)
        sizes = {path.name: path.stat().st_size for path in place.iterdir() if path.name != "manifest.json"}
        assert {name: file["size"] for name, file in manifest["files"].items()} == sizes

    def test_the_same_step_can_be_saved_again(self, tmp_path):
        save(tmp_path, 10, 1.0)
        save(tmp_path, 10, 2.0)
        assert value_of(tmp_path) == 2.0
        assert names(tmp_path) == ["0000000010"]


class TestLinkedBlocks:
    """A block's name tells its content: what the base has under the same name is not written again."""

    def test_unchanged_blocks_are_links_and_changed_ones_are_written(self, tmp_path):
        base = save(tmp_path, 10, 1.0)
        new = save(tmp_path, 20, 2.0, (BLOCKS[0], "replay-0000000004-000000000008"), base)
        assert new.part(BLOCKS[0], CPU)["x"][0] == 1.0
        assert new.part("replay-0000000004-000000000008", CPU)["x"][0] == 2.0
        file = f"{BLOCKS[0]}.safetensors"
        assert (base.place / file).samefile(new.place / file)
        verify(new)

    def test_each_folder_is_whole_by_itself(self, tmp_path):
        base = save(tmp_path, 10, 1.0)
        new = save(tmp_path, 20, 2.0, BLOCKS, base)
        shutil.rmtree(base.place)
        verify(new)
        assert new.part(BLOCKS[1], CPU)["x"][0] == 1.0

    def test_where_files_cannot_be_linked_they_are_copied(self, tmp_path, monkeypatch):
        def refuse(*paths):
            raise PermissionError(1, "Operation not permitted")

        base = save(tmp_path, 10, 1.0)
        monkeypatch.setattr("mtrl_imgrad.checkpoint.os.link", refuse)
        new = save(tmp_path, 20, 2.0, BLOCKS, base)
        file = f"{BLOCKS[0]}.safetensors"
        assert not (base.place / file).samefile(new.place / file)
        assert new.part(BLOCKS[0], CPU)["x"][0] == 1.0
        verify(new)

    def test_a_base_that_is_gone_is_not_needed(self, tmp_path):
        base = save(tmp_path, 10, 1.0)
        shutil.rmtree(base.place)
        new = save(tmp_path, 20, 2.0, BLOCKS, base)
        assert new.part(BLOCKS[0], CPU)["x"][0] == 2.0

    def test_without_its_replay_a_checkpoint_is_still_whole(self, tmp_path):
        made = save(tmp_path, 10, 1.0)
        drop_replay(made)
        left = read_manifest(made.place)
        verify(left)
        assert not left.resumable
        assert sorted(path.name for path in made.place.iterdir()) == [
            "learner.safetensors",
            "manifest.json",
            "state.json",
        ]


class TestCrashes:
    """The process dies at one of the moments of a save; what was saved before stays usable."""

    @pytest.mark.parametrize("step", [10, 20], ids=["saving the same step again", "saving a later step"])
    @pytest.mark.parametrize("moment", ["save", "json.dumps", "sync", "_write_manifest", "os.replace"])
    def test_a_crash_while_saving(self, tmp_path, monkeypatch, moment, step):
        base = save(tmp_path, 10, 1.0)

        def die(*args, **kwargs):
            raise PowerCutError

        with monkeypatch.context() as patched:
            patched.setattr(f"mtrl_imgrad.checkpoint.{moment}", die)
            with pytest.raises(PowerCutError):
                save(tmp_path, step, 2.0, BLOCKS, base)
        assert value_of(tmp_path) == 1.0
        save(tmp_path, step, 3.0, BLOCKS, base)
        assert value_of(tmp_path) == 3.0
        assert names(tmp_path) == sorted({step_name(10), step_name(step)})

    def test_a_crash_after_a_rename_leaves_the_old_or_the_new_one(self, tmp_path, monkeypatch):
        replace = os.replace
        for calls in (1, 2, 3, 4):
            folder, count = tmp_path / str(calls), 0
            save(folder, 10, 1.0)

            def die_after(*paths, last=calls):
                nonlocal count
                replace(*paths)
                count += 1
                if count == last:
                    raise PowerCutError

            with monkeypatch.context() as patched:
                patched.setattr("mtrl_imgrad.checkpoint.os.replace", die_after)
                with pytest.raises(PowerCutError):
                    save(folder, 10, 2.0)
            assert value_of(folder) == (1.0 if calls <= 2 else 2.0)
            save(folder, 20, 3.0)
            assert value_of(folder) == 3.0
            assert not [name for name in names(folder) if name.endswith(".tmp")]

    def test_a_crash_while_removing_an_older_one(self, tmp_path, monkeypatch):
        for step in (10, 20):
            save(tmp_path, step, float(step))

        def die(path, ignore_errors=False):
            if path.exists() and path.name == "0000000010.tmp":
                raise PowerCutError

        with monkeypatch.context() as patched:
            patched.setattr("mtrl_imgrad.checkpoint.shutil.rmtree", die)
            with pytest.raises(PowerCutError):
                save(tmp_path, 30, 30.0)
        assert value_of(tmp_path) == 30.0
        save(tmp_path, 40, 40.0)
        assert names(tmp_path) == ["0000000030", "0000000040"]


class TestDamage:
    @pytest.mark.parametrize("file", ["state.json", "learner.safetensors", f"{BLOCKS[1]}.safetensors"])
    @pytest.mark.parametrize(
        ("spoil", "says"),
        [
            (lambda path: path.unlink(), "is missing"),
            (lambda path: path.write_bytes(path.read_bytes()[:-1]), r"has [\d,]+ bytes of [\d,]+"),
            (lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]), "checksum"),
            (lambda path: path.write_bytes(b"foreign"), "has 7 bytes"),
            (lambda path: (path.unlink(), path.mkdir()), "is missing"),
        ],
        ids=["missing", "truncated", "one bit", "foreign", "a folder"],
    )
    def test_a_file_that_is_not_what_was_saved_is_named(self, tmp_path, file, spoil, says):
        made = save(tmp_path, 10, 1.0)
        spoil(made.place / file)
        with pytest.raises(DamagedError, match=rf"0000000010 is damaged \({file}.*{says}") as caught:
            verify(made)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "content",
        [b"", b"\x80\x04.", b"[]", b"3", b"{}", b"[" * 100_000, WITHOUT_FILES, WITHOUT_FILES[:-1] + b', "files": []}'],
        ids=["empty", "pickle", "list", "number", "object", "deep", "no files", "list of files"],
    )
    def test_a_manifest_that_is_none_is_damage(self, tmp_path, content):
        made = save(tmp_path, 10, 1.0)
        (made.place / "manifest.json").write_bytes(content)
        with pytest.raises(DamagedError, match=r"0000000010 is damaged \(manifest\.json"):
            read_manifest(made.place)

    @pytest.mark.parametrize(
        "name", ["../../../secret.json", "/etc/secret.json", "..", "a/b.json", "manifest.json\n", "x.pkl", ""]
    )
    def test_names_in_a_manifest_lead_nowhere_else(self, tmp_path, name):
        made = save(tmp_path, 10, 1.0)
        manifest = json.loads((made.place / "manifest.json").read_text())
        manifest["files"][name] = {"size": 0, "sha256": ""}
        (made.place / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(DamagedError, match=r"manifest\.json is not one of this checkpoint"):
            read_manifest(made.place)

    def test_a_replay_in_one_that_says_it_has_none_is_damage(self, tmp_path):
        made = save(tmp_path, 10, 1.0)
        manifest = json.loads((made.place / "manifest.json").read_text())
        (made.place / "manifest.json").write_text(json.dumps(manifest | {"resumable": False}))
        with pytest.raises(DamagedError, match=r"manifest\.json is not one of this checkpoint"):
            read_manifest(made.place)

    def test_a_file_that_the_manifest_does_not_name_is_not_read(self, tmp_path):
        made = save(tmp_path, 10, 1.0)
        shutil.copy(made.place / "learner.safetensors", made.place / "other.safetensors")
        with pytest.raises(ValueError, match="not in its manifest"):
            made.part("other", CPU)

    def test_a_file_where_the_next_one_is_to_be_written_is_in_no_way(self, tmp_path):
        save(tmp_path, 10, 1.0)
        (tmp_path / "checkpoints" / "0000000020.tmp").write_text("odd")
        assert verify(save(tmp_path, 20, 2.0)) is None

    def test_the_manifest_of_another_step_is_foreign(self, tmp_path):
        first, second = save(tmp_path, 10, 1.0), save(tmp_path, 20, 2.0)
        shutil.copy(first.place / "manifest.json", second.place / "manifest.json")
        with pytest.raises(DamagedError, match="not one of this checkpoint"):
            read_manifest(second.place)

    @pytest.mark.parametrize("number", [0, FORMAT - 1, FORMAT + 1])
    def test_another_format_is_refused_by_its_number(self, tmp_path, number):
        made = save(tmp_path, 10, 1.0)
        path = made.place / "manifest.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"format": number}))
        with pytest.raises(ValueError, match=rf"run: .* has format {number}; this version reads {FORMAT}"):
            choose_checkpoint(tmp_path)

    @pytest.mark.parametrize("number", [1, 2])
    def test_formats_without_a_manifest_are_refused_by_their_number(self, tmp_path, number):
        place = tmp_path / "checkpoints" / "0000000010"
        place.mkdir(parents=True)
        (place / "state.json").write_text(json.dumps({"format": number, "step": 10}))
        with pytest.raises(ValueError, match=rf"run: .* has format {number}; this version reads {FORMAT}"):
            choose_checkpoint(tmp_path)
