"""The data directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from workers.errors import NoSuchJob, StorageError
from workers.job import JobSpec, Record, new_id
from workers.store import JobFiles, encode_item

TENANT = new_id("tenant")


@pytest.fixture
def files(tmp_path: Path) -> JobFiles:
    job = new_id("job")
    files = JobFiles(tmp_path, TENANT, job)
    spec = JobSpec(id=job, tenant=TENANT, endpoint="e", model="m", total=20, shard_items=8, created=0)
    files.create(spec, (encode_item(f"i{number}", {"text": "ü" * number}) for number in range(20)))
    return files


def record(index: int, *, ok: bool = True) -> Record:
    return Record(
        index, f"i{index}", 200, "r", {"n": index} if ok else None, None if ok else {"code": "c", "message": "m"}
    )


def test_items_are_read_one_by_one(files: JobFiles) -> None:
    item = files.item(11)
    assert (item.index, item.id, item.body) == (11, "i11", {"text": "ü" * 11})
    assert list(files.ids()) == [f"i{n}" for n in range(20)]
    assert files.spec().total == 20


def test_items_that_begin_alike_run_together(tmp_path: Path) -> None:
    files = JobFiles(tmp_path, new_id("tenant"), new_id("job"))

    def item(system: str, user: str) -> bytes:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        return encode_item(user, {"messages": messages})

    spec = JobSpec(id=files.path.name, tenant="t", endpoint="/", model="m", total=6, shard_items=8, created=0)
    files.create(spec, [item("abab"[n % 2] * 9, str(n)) for n in range(6)])
    assert files.plan(0, 6) == [0, 2, 4, 1, 3, 5]
    assert files.plan(1, 3) == [1, 3, 2]


def test_only_the_committed_part_of_a_segment_counts(files: JobFiles) -> None:
    with files.segment("0.1.a") as segment:
        length = segment.append([record(0), record(2)])
        segment.append([record(3)])
    assert set(files.committed({"0.1.a": length})) == {0, 2}


def test_a_damaged_record_is_noticed(files: JobFiles) -> None:
    with files.segment("0.1.a") as segment:
        length = segment.append([record(0)])
    path = files.path / "seg" / "0.1.a"
    path.write_bytes(path.read_bytes().replace(b'"n":0', b'"n":9'))
    with pytest.raises(StorageError, match="checksum"):
        files.committed({"0.1.a": length})


def test_final_files_are_merged_in_input_order(files: JobFiles) -> None:
    files.merge((record(index, ok=index % 3 != 0) for index in range(9)), "a")()
    assert files.output.read_text().count("\n") == 6
    assert files.errors.read_text().count("\n") == 3
    assert [found.index for found in files.results(-1)] == list(range(9))
    assert [found.index for found in files.results(6)] == [7, 8]


@pytest.mark.parametrize("evil", ["../../etc", "job_x", "", "job_" + "0" * 32 + "/..", "JOB_" + "0" * 32])
def test_ids_can_not_leave_the_directory(tmp_path: Path, evil: str) -> None:
    with pytest.raises(NoSuchJob):
        JobFiles(tmp_path, TENANT, evil)


def test_a_job_that_can_not_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text("in the way")
    job = new_id("job")
    files = JobFiles(tmp_path, TENANT, job)
    spec = JobSpec(id=job, tenant=TENANT, endpoint="e", model="m", total=1, shard_items=8, created=0)
    with pytest.raises(StorageError):
        files.create(spec, [encode_item("a", {})])
