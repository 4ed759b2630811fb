"""Uploaded files and batches' outputs in the data directory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import orjson
import pytest

from workers.batch_lines import batch_line
from workers.errors import NoSuchFile, StorageError
from workers.files import File, Files, new_id, output_id
from workers.job import JobSpec, Record
from workers.job import new_id as new_job_id
from workers.store import JobFiles, encode_item

TENANT = new_job_id("tenant")
OTHER = new_job_id("tenant")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def put(files: Files, content: bytes = b"{}\n", *, now: float | None = None, expires_at: int | None = None) -> File:
    upload = files.begin()
    (upload / "content").write_bytes(content)
    file = File(
        id=new_id(now), tenant=TENANT, filename="in.jsonl", purpose="batch", bytes=len(content), lines=1, created=1,
        expires_at=expires_at,
    )  # fmt: skip
    files.publish(upload, file)
    return file


def test_a_file_is_there_whole(files: Files, tmp_path: Path) -> None:
    content = b"x" * 600_000 + b"\n"
    file = put(files, content)
    assert files.get(TENANT, file.id) == file
    assert b"".join(files.content(file)) == content
    assert not list((tmp_path / "uploads").iterdir())


def test_it_is_its_tenants_alone(files: Files) -> None:
    file = put(files)
    for tenant, file_id in ((OTHER, file.id), (TENANT, new_id()), (TENANT, "../" + file.id), ("..", file.id)):
        with pytest.raises(NoSuchFile):
            files.get(tenant, file_id)
        with pytest.raises(NoSuchFile):
            files.delete(tenant, file_id)
    assert files.page(OTHER, 10) == ([], False)


def test_pages_are_in_the_order_of_time(files: Files) -> None:
    made = [put(files, now=1000 + number).id for number in (3, 1, 4, 0, 2)]
    oldest = sorted(made, key=lambda file_id: file_id[:17])
    assert [made.index(file_id) for file_id in oldest] == [3, 1, 4, 0, 2]
    for oldest_first, wanted in ((True, oldest), (False, oldest[::-1])):
        seen: list[str] = []
        more = True
        while more:
            page, more = files.page(TENANT, 2, after=seen[-1] if seen else None, oldest_first=oldest_first)
            assert 1 <= len(page) <= 2
            seen += [file.id for file in page]
        assert seen == wanted
    assert files.page(TENANT, 5)[1] is False
    assert files.page(TENANT, 5, purpose="batch_output") == ([], False)
    with pytest.raises(NoSuchFile):
        files.page(TENANT, 5, after="file-x")


def test_what_is_deleted_or_expired_is_not_there(files: Files, tmp_path: Path) -> None:
    kept, gone, over = put(files), put(files), put(files, expires_at=int(time.time()) - 1)
    files.delete(TENANT, gone.id)
    for file in (gone, over):
        with pytest.raises(NoSuchFile):
            files.get(TENANT, file.id)
    assert [file.id for file in files.page(TENANT, 10)[0]] == [kept.id]
    assert list(files.expired(time.time())) == [(TENANT, over.id)]
    files.tidy()
    assert not list(files.expired(time.time()))
    assert not list((tmp_path / "trash").iterdir())


def test_a_download_outlives_the_deletion(files: Files) -> None:
    file = put(files, b"a" * 600_000)
    blocks = files.content(file)
    read = len(next(blocks))
    files.delete(TENANT, file.id)
    assert read + sum(map(len, blocks)) == 600_000
    with pytest.raises(NoSuchFile):
        next(files.content(file))


def test_uploads_that_nobody_goes_on_with_are_removed(files: Files) -> None:
    left, going = files.begin(), files.begin()
    for upload in (left, going):
        (upload / "content").write_bytes(b"x")
    hours_ago = time.time() - 3 * 3600
    os.utime(left / "content", (hours_ago, hours_ago))
    assert files.clear_uploads(time.time()) == 1
    assert (left.exists(), going.exists()) == (False, True)


def test_what_can_not_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "uploads").write_text("in the way")
    with pytest.raises(StorageError):
        Files(tmp_path).begin()


RECORDS = [
    Record(0, "a", 200, "r0", body={"choices": ["ü"], "usage": {}}),
    Record(1, "b", 400, "r1", error={"code": "invalid_request", "message": "No such field."}),
    Record(2, "c", 0, "r2", error={"code": "batch_expired", "message": "Too late."}),
    Record(3, "d", 200, "r3", body={"choices": []}),
]


@pytest.fixture
def spec(tmp_path: Path) -> JobSpec:
    """A finished batch."""
    spec = JobSpec(
        id=new_job_id("batch"), tenant=TENANT, endpoint="e", model="m", total=4, shard_items=8, created=7.9996,
        output_expires_after=3600,
    )  # fmt: skip
    files = JobFiles(tmp_path, TENANT, spec.id)
    files.create(spec, (encode_item(record.id, {}) for record in RECORDS))
    files.merge(iter(RECORDS), "x")()
    return spec


def test_lines_are_as_openai_has_them() -> None:
    done, refused, expired, _ = (orjson.loads(batch_line(record, "batch_0")) for record in RECORDS)
    assert list(done) == ["id", "custom_id", "response", "error"]
    assert done["id"].startswith("batch_req_")
    assert done["custom_id"] == "a"
    assert done["response"] == {"status_code": 200, "request_id": "r0", "body": RECORDS[0].body}
    assert done["error"] is None
    error = {"message": "No such field.", "type": "invalid_request_error", "param": None, "code": None}
    assert refused["response"] == {"status_code": 400, "request_id": "r1", "body": {"error": error}}
    assert refused["error"] is None
    assert (expired["response"], expired["error"]) == (None, {"code": "batch_expired", "message": "Too late."})
    assert len({line["id"] for line in (done, refused, expired)}) == 3


def test_an_output_file_is_made_from_the_results(files: Files, spec: JobSpec) -> None:
    lines = {True: b"", False: b""}
    for record in RECORDS:
        lines[record.ok] += batch_line(record, spec.id)
    for part, ok in (("output", True), ("error", False)):
        file_id = files.add_output(spec, part, len(lines[ok]), 2)  # type: ignore[arg-type] # they are these two
        assert file_id == output_id(spec.id, spec.created, part)  # type: ignore[arg-type] # the same
        file = files.get(TENANT, file_id)
        assert b"".join(files.content(file)) == lines[ok]
        assert (file.bytes, file.lines, file.purpose) == (len(lines[ok]), 2, "batch_output")
        assert file.expires_at == file.created + 3600
    assert [file.part for file in files.page(TENANT, 5, purpose="batch_output")[0]] != []


def test_finalizing_twice_makes_one_file(files: Files, spec: JobSpec) -> None:
    assert files.add_output(spec, "error", 0, 0) is None
    first = files.add_output(spec, "output", 5, 1)
    assert first is not None
    made = files.get(TENANT, first)
    assert files.add_output(spec, "output", 5, 1) == first
    assert files.get(TENANT, first) == made
    assert len(files.page(TENANT, 5)[0]) == 1
    files.delete_outputs(spec)
    files.delete_outputs(spec)
    assert files.page(TENANT, 5) == ([], False)


def test_the_ledgers_whole_seconds_give_the_same_id(spec: JobSpec) -> None:
    assert output_id(spec.id, spec.created, "output") == output_id(spec.id, spec.created_ms // 1000, "output")
