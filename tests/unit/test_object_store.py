"""What storage promises when the store does what stores do: refuse, lose answers, cut, wait, die."""

import io
import os
import socket
import threading
import time

import pyarrow as pa
import pytest
from object_store import KEY, SECRET, SIGNATURE, upload

from pipeline import delta, lock, objectstore, results, runs, storage, tables
from pipeline.errors import CommitConflict, ConfigError, StoreFailed
from pipeline.formats import FORMATS, open_source
from pipeline.records import SHARD_COLUMNS, CaseRef


@pytest.fixture
def impatient(monkeypatch):
    """The store is given up after two seconds."""
    monkeypatch.setenv("RESEG_STORE_PATIENCE_S", "2")


def test_a_created_file_whose_answer_was_lost_is_ours_and_is_written_once(proxy, bucket):
    uri = f"{bucket}/receipt.json"
    lost = proxy.give(method="PUT", lose=True)
    assert storage.create(uri, b"mine")
    assert lost.seen == 1
    assert not storage.create(uri, b"another's")
    assert storage.read(uri) == b"mine"


def test_a_conflict_with_nobody_is_not_taken_for_a_file_that_is_there(proxy, bucket):
    conflict = proxy.give(
        method="PUT", path="/a$", refuse=409, code="ConditionalRequestConflict", times=2
    )
    assert storage.create(f"{bucket}/a", b"mine")
    assert storage.read(f"{bucket}/a") == b"mine"
    assert conflict.seen == 2


def test_a_storm_of_503_is_ridden_out(proxy, bucket):
    storms = [proxy.give(method=m, refuse=503, code="SlowDown", times=6) for m in ("PUT", "GET")]
    storage.write(f"{bucket}/a", b"1")
    assert storage.create(f"{bucket}/b", b"2")
    assert storage.read(f"{bucket}/a") == b"1"
    assert [info.path for info in storage.list_files(bucket)] == ["a", "b"]
    assert [storm.seen for storm in storms] == [6, 6]


def test_a_storm_without_end_ends_in_one_sentence(proxy, bucket, impatient):
    proxy.give(refuse=503, code="SlowDown", times=10_000)
    started = time.monotonic()
    with pytest.raises(StoreFailed, match=r"did not serve reading .*503.*RESEG_STORE_PATIENCE_S"):
        storage.read(f"{bucket}/a")
    assert time.monotonic() - started < 15


def test_a_long_listing_is_counted_and_goes_on_after_a_storm_between_its_pages(
    proxy, bucket, config
):
    names = [f"k{number:05d}.png" for number in range(1003)]
    writes = [lambda n=n: objectstore.put(f"{bucket}/{n}", b"") for n in names]
    list(storage.read_ahead(bucket, writes))
    source = open_source(bucket, config(patterns=False).source, config().limits)
    storm = proxy.give(
        method="GET", path="continuation-token", refuse=503, code="SlowDown", times=4
    )
    told: list[int] = []
    listing = FORMATS["folder"].list_shards(source, told.append)
    assert sum(len(shard.cases or ()) for shard in listing.shards) == 1003
    assert storm.seen == 4
    assert told == [1000]


def test_cut_bodies_are_read_again(proxy, bucket):
    data = os.urandom(20 << 20)
    storage.write(f"{bucket}/big", data)
    storage.write(f"{bucket}/small", data[:5000])
    cuts = [
        proxy.give(method="GET", path="/big", cut=70_000, skip=1, times=2),
        proxy.give(method="GET", path="/small", cut=50, times=2),
    ]
    assert storage.read(f"{bucket}/big") == data
    assert storage.read(f"{bucket}/small") == data[:5000]
    assert [cut.seen for cut in cuts] == [2, 2]


def test_a_reader_asks_for_what_it_wants_and_fetches_ahead_when_reads_follow(proxy, bucket):
    data = os.urandom(30 << 20)
    storage.write(f"{bucket}/shard", data)
    proxy.requests.clear()
    with storage.open_reader(f"{bucket}/shard") as file:
        file.seek(-1000, io.SEEK_END)
        assert file.read(1000) == data[-1000:]
        file.seek(12_345_678)
        assert file.read(10) == data[12_345_678 : 12_345_678 + 10]
        assert len(proxy.requests) <= 4
        file.seek(0)
        parts = []
        while part := file.read(100_000):
            parts.append(part)
    assert b"".join(parts) == data
    assert len(proxy.requests) < 20


def test_a_file_that_changes_between_two_ranges_is_not_mixed(bucket, monkeypatch):
    uri = f"{bucket}/shard"
    storage.write(uri, b"a" * (20 << 20))
    real, calls = objectstore._range, []

    def spied(*arguments):
        if not calls:
            calls.append(arguments)
            storage.write(uri, b"b" * (20 << 20))
        return real(*arguments)

    monkeypatch.setattr(objectstore, "_range", spied)
    with pytest.raises(storage.Changed):
        storage.read(uri)
    with pytest.raises(storage.Changed):
        storage.read_version(uri, '"0123456789abcdef0123456789abcdef"')


def test_slow_first_bytes_of_many_files_are_waited_for_together(
    proxy, bucket, config, own_phantoms
):
    for path in sorted(own_phantoms.rglob("*.png"))[:36]:
        storage.write(f"{bucket}/{path.relative_to(own_phantoms)}", path.read_bytes())
    source = open_source(bucket, config().source, config().limits)
    shards = FORMATS["folder"].list_shards(source).shards
    cases: list[CaseRef] = [case for shard in shards for case in shard.cases or ()]
    slow = proxy.give(method="GET", wait_s=0.4, times=10_000)
    started = time.monotonic()
    read = list(FORMATS["folder"].read_cases(source, "", cases))
    assert slow.seen == 36
    assert all(item.image for case in read for item in case.slices)
    assert time.monotonic() - started < 36 * 0.4 / 4


@pytest.mark.parametrize("code", ["ExpiredToken", "InvalidAccessKeyId"])
def test_refused_credentials_are_told_as_such_and_tried_once_anew(proxy, bucket, code):
    refused = proxy.give(method="GET|PUT|HEAD", refuse=403, code=code, times=10_000)
    for ask in (
        lambda: storage.read(f"{bucket}/a"),
        lambda: storage.file_info(f"{bucket}/a"),
        lambda: storage.create(f"{bucket}/a", b""),
        lambda: list(storage.list_files(bucket)),
    ):
        before = refused.seen
        with pytest.raises(StoreFailed, match=f"credentials.*{code}"):
            ask()
        assert refused.seen - before <= 4


def test_one_object_that_is_forbidden_is_a_bad_image_not_a_failed_store(
    proxy, bucket, config, own_phantoms
):
    for path in sorted(own_phantoms.rglob("phantom_0001*.png")):
        storage.write(f"{bucket}/{path.relative_to(own_phantoms)}", path.read_bytes())
    source = open_source(bucket, config().source, config().limits)
    (shard,) = FORMATS["folder"].list_shards(source).shards
    proxy.give(path="phantom_0001_3.png", refuse=403, code="AccessDenied", times=100)
    (case,) = FORMATS["folder"].read_cases(source, "", shard.cases)
    problems = [item.problem and item.problem.error_class for item in case.slices]
    assert problems == [None, None, "UnreadableFile", None, None, None]


def test_chunked_uploads_are_never_sent(proxy, bucket):
    """Old stores answer 411 to uploads without a length."""
    proxy.give(method="PUT", header="Transfer-Encoding", refuse=411, code="MissingContentLength")
    storage.write(f"{bucket}/large", b"x" * (12 << 20))
    assert storage.create(f"{bucket}/small", b"x")
    assert storage.file_info(f"{bucket}/large").size == 12 << 20
    assert proxy.faults[0].seen == 0


def _commit(bucket, number, base):
    delta.commit(
        f"{bucket}/table",
        delta.pa.schema([("a", delta.pa.int64())]),
        adds=[delta.AddedPart(path=f"{number}.parquet", size_bytes=1, stats={"numRecords": 1})],
        removes=[],
        run_id=f"run-{number}",
        metadata={"run": number},
        base_version=base,
    )


@pytest.mark.parametrize(
    "fault",
    [
        {"lose": True},
        {"refuse": 409, "code": "ConditionalRequestConflict"},
        {"refuse": 412, "code": "PreconditionFailed"},
        {"refuse": 503, "code": "SlowDown", "times": 3},
        {"drop": True},
    ],
)
def test_a_commit_lands_once_whatever_its_answer(proxy, bucket, monkeypatch, fault):
    monkeypatch.setattr(results, "_COMMIT_PAUSES_S", (0.1, 0.1))

    def commit(number, base):
        part = delta.AddedPart(path=f"{number}.parquet", size_bytes=1, stats={"numRecords": 1})
        run_id = f"run-{number}"
        return results._commit(bucket, "masks", run_id, ([part], []), {"versions": {}}, base)

    assert commit(0, None) == 0
    struck = proxy.give(method="PUT", path=r"_delta_log/0*1\.json", **{"times": 1, **fault})
    assert commit(1, 0) == 1
    assert struck.seen >= 1
    assert [night["run_id"] for night in results.history(bucket)] == ["run-1", "run-0"]
    with pytest.raises(CommitConflict):
        commit(2, 0)


def test_a_commit_that_never_lands_is_told_on_one_line(proxy, bucket, impatient, monkeypatch):
    monkeypatch.setattr(results, "_COMMIT_PAUSES_S", (0.1,))
    proxy.give(method="PUT", path="_delta_log", drop=True, times=10_000)
    with pytest.raises(StoreFailed, match="the same command publishes it") as caught:
        results._commit(bucket, "masks", "run", ([], []), {"versions": {}}, None)
    assert not {"\n", "\x1b"} & set(str(caught.value))


def test_a_whole_run_goes_through_a_bad_hour_of_the_store(
    proxy, bucket, own_phantoms, demo_bundle, config, segment_here, read_rows
):
    faults = [
        proxy.give(method="PUT", path="/_runs/", lose=True, times=3),
        proxy.give(method="PUT", path="part-", refuse=503, code="SlowDown", times=3),
        proxy.give(method="PUT", path="_delta_log", lose=True, times=2),
        proxy.give(method="GET", path="receipts", drop=True, times=2),
        proxy.give(method="GET", path="_delta_log", cut=5, times=2),
        proxy.give(method="HEAD", refuse=500, times=3),
    ]
    assert segment_here(str(own_phantoms), f"{bucket}/r", demo_bundle, config(), limit=2).night == 0
    assert [fault.times for fault in faults] == [0] * len(faults)
    assert len(read_rows(f"{bucket}/r", "masks")) == 12


def test_a_store_that_keeps_its_promises_is_accepted(bucket):
    found = storage.probe(f"{bucket}/results")
    assert (found.put_if_absent, found.read_after_write) == (True, True)
    assert not list(storage.list_files(bucket))
    storage.require_commits(f"{bucket}/results")


def test_a_store_without_put_if_absent_is_refused_unless_there_is_a_lock(
    proxy, bucket, tmp_path, monkeypatch, own_phantoms, demo_bundle, config, segment_here
):
    proxy.give(method="PUT", without=("if-none-match", *SIGNATURE), times=100_000)
    arguments = (str(own_phantoms), f"{bucket}/r", demo_bundle, config())
    with pytest.raises(ConfigError, match="If-None-Match.*RESEG_STORE_LOCK"):
        segment_here(*arguments, limit=1)
    assert storage.is_empty(f"{bucket}/r")
    monkeypatch.setenv("RESEG_STORE_LOCK", str(tmp_path / "locks"))
    assert segment_here(*arguments, limit=1).night == 0
    assert segment_here(*arguments, limit=2).night == 1
    winners = []

    def race(number):
        try:
            _commit(bucket, number, None)
            winners.append(number)
        except delta.CommitFailed:
            pass

    threads = [threading.Thread(target=race, args=[number]) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    entry = storage.read(f"{bucket}/table/_delta_log/{0:020d}.json")
    assert f"{winners[0]}.parquet".encode() in entry


def test_a_wrong_address_is_told_in_seconds(monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
        monkeypatch.setattr(objectstore, "_FIRST_PATIENCE_S", 1.0)
        objectstore.forget_clients()
        with pytest.raises(StoreFailed, match=r"127\.0\.0\.1.*no connection.*address right"):
            storage.read("s3://bucket/a")


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://169.254.169.254",
        "http://2852039166/",
        "http://0xa9.0xfe.0xa9.0xfe:80",
        "http://[fe80::1]:9000",
        "ftp://store",
        "https://key:secret@store.example",
        "https://store.example/?sig=secret",
    ],
)
def test_endpoints_that_are_no_place_for_images_are_refused(monkeypatch, endpoint):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    objectstore.forget_clients()
    with pytest.raises(ConfigError) as caught:
        storage.resolve("s3://bucket/images")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "location",
    [
        "http://host/x",
        "https://169.254.169.254/latest/meta-data",
        "ftp://host/x",
        "s3://",
        "s3://user@bucket/x",
        "s3://bucket/a/../b",
        "s3://bucket/./b",
        "s3://bucket/a//b",
        "s3://bucket/a?versionId=1",
        "gopher://bucket",
        "",
        " ",
        "s3://bucket/a?X-Amz-Signature=hidden",
        "gs://KEY:hidden@bucket/a",
        "ftp://me:hidden@host/x",
    ],
)
def test_other_schemes_and_odd_uris_are_refused_and_what_may_be_a_secret_not_told(location):
    with pytest.raises(ConfigError) as raised:
        storage.resolve(location)
    assert "hidden" not in str(raised.value)


def test_schemes_can_be_narrowed(monkeypatch):
    assert storage.resolve("gs://bucket/x/") == "gs://bucket/x"
    assert storage.resolve("az://container") == "az://container"
    monkeypatch.setenv("RESEG_SCHEMES", "s3")
    with pytest.raises(ConfigError, match="'gs' is not served; use a path or s3://"):
        storage.resolve("gs://bucket/x")


@pytest.mark.parametrize("kills", [(3,), pytest.param((2, 5), marks=pytest.mark.storm)])
def test_a_store_that_is_killed_in_a_run_costs_only_time(
    kills,
    object_store,
    bucket,
    own_phantoms,
    tmp_path,
    demo_bundle,
    config,
    segment_here,
    read_digests,
    monkeypatch,
):
    """SIGKILL after a receipt was acknowledged, and up again a second later."""
    upload(own_phantoms, f"{bucket}/images")
    real, filed = runs.put_receipt, []
    restarts: list[threading.Thread] = []

    def killing(*arguments):
        receipt = real(*arguments)
        filed.append(receipt.shard_id)
        if len(filed) in kills:
            object_store.kill()
            restarts.append(threading.Timer(1.0, object_store.start))
            restarts[-1].start()
        return receipt

    monkeypatch.setattr(runs, "put_receipt", killing)
    summary = segment_here(f"{bucket}/images", f"{bucket}/r", demo_bundle, config())
    for restart in restarts:
        restart.join()
    assert len(restarts) == len(kills)
    assert (summary.night, summary.computed_images) == (0, 48)
    segment_here(str(own_phantoms), str(tmp_path / "r"), demo_bundle, config())
    assert read_digests(f"{bucket}/r") == read_digests(tmp_path / "r")
    assert (
        segment_here(f"{bucket}/images", f"{bucket}/r", demo_bundle, config()).computed_images == 0
    )


def test_a_lock_outlives_an_outage_of_its_store(proxy, bucket, impatient, monkeypatch, capfd):
    """The thread that renews it goes on; and letting it go does not hide what went wrong."""
    monkeypatch.setattr(lock, "_RENEW_S", 0.2)
    folder = f"{bucket}/_runs"

    def work():
        first = storage.read(f"{folder}/{lock.LOCK_FILE}")
        outage = proxy.give(refuse=503, code="SlowDown", times=10_000)
        while outage.seen < 8:
            time.sleep(0.1)
        outage.times = 0
        deadline = time.monotonic() + 20
        while storage.read(f"{folder}/{lock.LOCK_FILE}") == first:
            assert time.monotonic() < deadline, "it is not renewed any more"
            time.sleep(0.1)
        proxy.give(refuse=503, code="SlowDown", times=10_000)
        raise StoreFailed("what really went wrong")

    with (
        pytest.raises(StoreFailed, match="what really went wrong"),
        lock.locked(folder, "testing"),
    ):
        work()
    assert "Traceback" not in capfd.readouterr().err


DENIED = (
    "<DeleteResult><Error><Key>{key}</Key><Code>AccessDenied</Code><Message>no</Message></Error>"
    "</DeleteResult>"
)


@pytest.mark.parametrize(
    "answer", [{"refuse": 200, "body": DENIED}, {"refuse": 403, "code": "AccessDenied"}]
)
def test_a_key_that_may_not_delete_is_told_before_anything_is_computed(
    proxy, bucket, own_phantoms, demo_bundle, config, segment_here, answer
):
    """A store answers 200 to the deletion of several objects, with a code for each."""
    proxy.give(method="POST", path="delete", times=10_000, **answer)
    started = time.monotonic()
    with pytest.raises(ConfigError, match="denies deleting .*deleting are needed there"):
        segment_here(str(own_phantoms), f"{bucket}/r", demo_bundle, config(), limit=1)
    assert time.monotonic() - started < 20
    assert not [info for info in storage.list_files(f"{bucket}/r") if "receipts" in info.path]


@pytest.fixture
def foreign(object_store):
    """Another client of the same store, which writes what ours would not."""
    from pyarrow.fs import S3FileSystem

    return S3FileSystem(
        access_key=KEY,
        secret_key=SECRET,
        scheme="http",
        endpoint_override=object_store.endpoint.removeprefix("http://"),
        region="us-east-1",
    )


def test_a_name_that_cannot_be_read_is_named(bucket, foreign):
    with foreign.open_output_stream(f"{bucket.removeprefix('s3://')}/x/new\nline.png") as file:
        file.write(b"x")
    with pytest.raises(
        ConfigError, match=r"name that cannot be read: 'x/new\\nline.png'; rename it"
    ):
        list(storage.list_files(f"{bucket}/x"))


def test_what_a_console_writes_to_show_a_folder_is_no_file(bucket, foreign):
    place = bucket.removeprefix("s3://")
    foreign.create_dir(f"{place}/new")
    foreign.create_dir(f"{place}/new/case")
    storage.write(f"{bucket}/new/case/1.png", b"x")
    storage.write(f"{bucket}/new/empty.png", b"")
    assert [info.path for info in storage.list_files(f"{bucket}/new")] == [
        "case/1.png",
        "empty.png",
    ]
    foreign.create_dir(f"{place}/other")
    assert storage.is_empty(f"{bucket}/other")


@pytest.mark.parametrize("value", ["nan", "inf", "-5", "0", "soon"])
def test_patience_is_a_number_of_seconds(bucket, monkeypatch, value):
    monkeypatch.setenv("RESEG_STORE_PATIENCE_S", value)
    with pytest.raises(ConfigError, match=f"RESEG_STORE_PATIENCE_S is '{value}'"):
        storage.read("s3://no-such-bucket-here/a")


def test_the_check_of_a_footer_costs_no_request(proxy, bucket):
    rows = pa.table({name: ["a" * 64] * 3 for name, _ in SHARD_COLUMNS})
    rows = rows.append_column("mask", pa.array([os.urandom(300_000)] * 3))
    rows = rows.append_column("image_id", pa.array(["a", "b", "c"]))
    part = tables.write_part(bucket, "masks", rows, "a" * 64, "run")
    proxy.requests.clear()
    found = tables.read_part(bucket, "masks", part.path, ["image_id"])
    assert found.column("image_id").to_pylist() == ["a", "b", "c"]
    assert [request[0] for request in proxy.requests] == ["HEAD", "GET"]


def test_missing_credentials_are_told_as_such(bucket, monkeypatch):
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    objectstore.forget_clients()
    started = time.monotonic()
    with pytest.raises(ConfigError, match="no credentials for .*AWS_SECRET_ACCESS_KEY"):
        storage.read(f"{bucket}/a")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("name", ["a%41", "a[0]", "a{b}", "a|b"])
def test_results_do_not_lie_where_their_log_would_go_elsewhere(name):
    with pytest.raises(ConfigError, match="would lead to another place"):
        results.check_place(f"s3://bucket/{name}/results")
    results.check_place(f"/disk/{name}")
    results.check_place("s3://bucket/ü and b+c, (d)/results")


def test_the_error_of_a_worker_is_its_sentence_and_not_its_traceback():
    """Ray wraps it in an error that is of our class too, and whose text is the traceback."""
    from ray.exceptions import RayTaskError

    from pipeline.flows.stream import _cause
    from pipeline.flows.train import _as_sentence

    ours = StoreFailed("the object store refuses the credentials")
    wrapped = RayTaskError("finish_stage", "Traceback ...\n  at /archive/patient", ours)
    around = wrapped.as_instanceof_cause()
    assert isinstance(around, StoreFailed), "as Ray does it"
    assert _cause(around, "run") is ours
    assert _as_sentence(around) is ours


def test_what_ray_data_adds_to_an_error_of_ours_is_not_told():
    from ray.data._internal.util import iterate_with_retry
    from ray.exceptions import RayTaskError

    from pipeline.flows.stream import _cause

    def rows():
        raise StoreFailed("the store is down; start it")
        yield

    with pytest.raises(StoreFailed, match="retry attempts") as raised:
        list(iterate_with_retry(rows, "apply UDF transform", max_attempts=1))
    around = RayTaskError("stage", "Traceback", raised.value).as_instanceof_cause()
    assert str(_cause(around, "run")) == "the store is down; start it"


def test_a_metadata_service_with_a_bad_minute_is_waited_for(bucket):
    """Where the store has answered before there were credentials, so there will be again."""
    calls = []

    def ask(store, key):
        calls.append(key)
        if len(calls) % 3:
            raise RuntimeError("PUT http://169.254.169.254/latest/api/token: 503 Slow Down")
        return key

    with pytest.raises(ConfigError, match="no credentials"):
        objectstore._persist("reading", f"{bucket}/a", ask)
    calls.clear()
    objectstore.expect(bucket)
    assert objectstore._persist("reading", f"{bucket}/a", ask) == "a"
    assert len(calls) == 3
