"""The real planning, receipt and commit code in a simulated world: crashes, lost answers, zombies, rivals.

A seed is one world. Several drivers run `stage_run` and `publish_staged` over an in-memory store; at
every store operation one may be killed before or after it, may lose its answer, or be overtaken by
another that takes it for dead. Readers look all the time: each must see exactly what the source
held when the published run was planned. Broken variants of the protocol must be caught.
"""

import json
import random
import threading
from dataclasses import replace
from types import SimpleNamespace

import pyarrow as pa
import pytest

from pipeline import delta, planning, results, runs, storage, tables, upkeep
from pipeline.cases import CaseRows
from pipeline.config import SegmentConfig
from pipeline.delta import AddedPart, Commit, CommitFailed
from pipeline.errors import ResegError, ResultsError
from pipeline.flows import segment, stages
from pipeline.flows.placement import Pool
from pipeline.formats.source import FORMATS, Format, Listing, Source
from pipeline.policy import KeepConfig
from pipeline.records import CaseRef, Locator, Shard, SliceRef, shard_id_of

OUT = "/simulated/results"
GRACE_HOURS = 100.0
MOST_STEPS = 20_000


class Killed(BaseException):
    """SIGKILL: nothing that the process still tries has an effect."""


class Broken(AssertionError):
    """A reader saw what must not be."""


class World:
    """One seed: the store, the logs, the source, and the processes that work on them."""

    def __init__(self, seed, faults=True):
        self.random = random.Random(seed)
        self.faults = faults
        self.files, self.logs = {}, {}
        self.clock_s = 1e9
        self.steps = 0
        self.num_faults = 0
        self.source = {f"s{i}": {f"c{i}{j}": 0 for j in range(2)} for i in range(3)}
        self.bundle = "A"
        self.planned = {}
        self.num_runs = 0
        self.here = threading.local()

    # what a store operation costs

    def step(self, effect, *, changes=False, lost=None):
        """One operation of the process that runs now, with everything that may befall it."""
        process = getattr(self.here, "process", None)
        if process is None or not self.faults:
            return effect()
        if process.dead:
            raise Killed
        process.pause()
        self.steps += 1
        self.clock_s += 1
        if self.steps > MOST_STEPS:
            raise Broken("the drivers never end")
        chance = self.random.random()
        if chance < 0.004:
            process.die(self)
        result = effect()
        if changes and chance > 0.992:
            process.die(self)
        if changes and lost and chance > 0.985:
            self.num_faults += 1
            return lost(result)
        return result

    # storage

    def read(self, uri):
        def effect():
            if uri not in self.files:
                raise FileNotFoundError(uri)
            return self.files[uri][0]

        return self.step(effect)

    def write(self, uri, data):
        self.step(lambda: self._put(uri, data), changes=True, lost=_no_answer)

    def create(self, uri, data):
        def effect():
            if uri in self.files:
                return False
            self._put(uri, data)
            return True

        return self.step(effect, changes=True, lost=self._create_without_answer)

    def _create_without_answer(self, created):
        """A retry of the client finds the file there, or the connection is gone."""
        return False if created and self.random.random() < 0.5 else _no_answer(created)

    def _put(self, uri, data):
        self.files[uri] = (bytes(data), self.clock_s)

    def remove(self, uri):
        self.step(lambda: self.files.pop(uri, None), changes=True, lost=_no_answer)

    def file_info(self, uri):
        def effect():
            if uri not in self.files:
                return None
            data, when = self.files[uri]
            return storage.FileInfo(path="", size=len(data), version="", modified_s=when)

        return self.step(effect)

    def list_files(self, uri):
        def effect():
            return [
                storage.FileInfo(
                    path=key[len(uri) + 1 :], size=len(data), version="", modified_s=when
                )
                for key, (data, when) in self.files.items()
                if key.startswith(f"{uri}/")
            ]

        return iter(self.step(effect))

    # the tables' logs

    def open_log(self, uri, version=None):
        def effect():
            log = self.logs.get(uri)
            if log is None:
                return None
            if version is not None and not 0 <= version < len(log):
                raise ResultsError(f"{uri} has no version {version}")
            return FakeLog(log[: len(log) if version is None else version + 1])

        return self.step(effect)

    def commit(self, uri, schema, *, adds, removes, run_id, metadata, base_version):
        def effect():
            log = self.logs.get(uri)
            newest = None if log is None else len(log) - 1
            if newest != base_version:
                raise CommitFailed("the version exists already")
            if self.faults and self.random.random() < 0.01:
                raise CommitFailed("503 Slow Down")
            parts = {} if log is None else dict(log[-1].parts)
            for path in removes:
                parts.pop(path, None)
            parts |= {part.path: part for part in adds}
            version = 0 if newest is None else newest + 1
            commit = Commit(
                version=version,
                timestamp_ms=version,
                operation="WRITE",
                metadata=json.loads(json.dumps(dict(metadata))),
            )
            self.logs.setdefault(uri, []).append(
                SimpleNamespace(commit=commit, parts=parts, run_id=run_id)
            )

        self.step(effect, changes=True, lost=_commit_unknown)

    # the source

    def list_shards(self, source, counted=None):
        process = self.here.process
        process.snapshot = {s: dict(c) for s, c in self.source.items()}
        shards = []
        for path, cases in process.snapshot.items():
            refs = tuple(
                CaseRef(
                    case_id=case_id,
                    version=str(content),
                    slices=(SliceRef(name="0", image=Locator(path=case_id, size=1)),),
                )
                for case_id, content in sorted(cases.items())
            )
            shards.append(
                Shard(
                    shard_id=shard_id_of(path),
                    path=path,
                    format="simulated",
                    version=json.dumps(cases, sort_keys=True),
                    size_bytes=1,
                    cases=refs,
                )
            )
        return Listing(shards=tuple(shards))

    def change_source(self):
        shard = self.source[self.random.choice(sorted(self.source))]
        chance = self.random.random()
        if chance < 0.25 and shard:
            shard.pop(self.random.choice(sorted(shard)))
        elif chance < 0.5:
            shard[f"n{self.steps}{self.random.random():.4f}"] = 0
        elif shard:
            shard[self.random.choice(sorted(shard))] += 1

    # what a reader sees

    def check(self):
        """Open what is published as users do: whole, single, and as planned."""
        before, self.here.process = getattr(self.here, "process", None), None
        try:
            self._check()
        finally:
            self.here.process = before

    def _check(self):
        try:
            night = results.open_night(OUT)
        except ResultsError as error:
            raise Broken(str(error)) from None
        if night is None:
            return
        run_id = night.metadata["run_id"]
        found = {
            table: [(row["case_id"], self._content(row, table)) for row in self._rows(night, table)]
            for table in tables.TABLES
        }
        wanted = sorted(self.planned[_identity(runs.load_plan(OUT, run_id))])
        for table, rows in found.items():
            if sorted(rows) != wanted:
                raise Broken(f"{table} of night {night.number}: {sorted(rows)} instead of {wanted}")
        published = [entry.commit.metadata["run_id"] for entry in self.logs[f"{OUT}/masks"]]
        if len(set(published)) != len(published):
            raise Broken(f"a run was published twice: {published}")

    def _rows(self, night, table):
        for uri in night.paths(table):
            if uri not in self.files:
                raise Broken(f"the part {uri} of night {night.number} is gone")
            yield from json.loads(self.files[uri][0])

    @staticmethod
    def _content(row, table):
        return row["mask_sha256"] if table == "masks" else row["label_name"]


def _no_answer(result):
    raise OSError("connection reset")


def _commit_unknown(result):
    raise CommitFailed("connection reset")


class FakeLog:
    """What `delta.TableLog` is of a table."""

    def __init__(self, entries):
        self._entries = list(entries)
        self.version = len(entries) - 1

    def parts(self, wanted=None):
        parts = self._entries[-1].parts
        return [part for path, part in parts.items() if wanted is None or path in wanted]

    def paths(self):
        return set(self._entries[-1].parts)

    def columns(self, *names):
        rows = [_flat(part) for part in self._entries[-1].parts.values()]
        return [[row.get(name) for row in rows] for name in names]

    def paths_added_since(self, version):
        found = set()
        for number in range(version + 1, self.version + 1):
            before = set(self._entries[number - 1].parts) if number else set()
            found |= set(self._entries[number].parts) - before
        return found

    def commits(self):
        return (entry.commit for entry in reversed(self._entries))

    def commit_of(self, version):
        return self._entries[version].commit


def _flat(part):
    row = {
        "path": part.path,
        "size_bytes": part.size_bytes,
        "num_records": part.stats["numRecords"],
    }
    for key, prefix in (("minValues", "min"), ("maxValues", "max"), ("nullCount", "null_count")):
        row |= {f"{prefix}.{name}": value for name, value in part.stats[key].items()}
    return row


class Process:
    """A driver in a thread of its own that runs only when the scheduler lets it."""

    def __init__(self, world, action):
        self.world, self.action = world, action
        self.dead = self.ended = False
        self.error = None
        self.weight = world.random.choice([1.0, 1.0, 0.3, 0.01])  # the last is taken for dead
        self.snapshot = None
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self):
        self._mine.acquire()
        self.world.here.process = self
        try:
            self.action()
        except (Killed, ResegError, OSError):
            pass
        except BaseException as error:  # noqa: BLE001
            self.error = error
        self.ended = True
        self._theirs.release()

    def pause(self):
        """Let others run, sometimes."""
        if self.world.random.random() < 0.3:
            self._theirs.release()
            self._mine.acquire()

    def resume(self):
        self._mine.release()
        self._theirs.acquire()
        if self.error is not None:
            raise self.error

    def die(self, world):
        world.num_faults += 1
        self.dead = True
        raise Killed


# One night, with the real code of the driver


def compute(world, plan, receipts, results_uri, *_):
    """In place of the workers: real parts and receipts, of masks that are named by their content."""
    job = SimpleNamespace(
        results=results_uri,
        run_id=plan.run_id,
        bundle_digest=plan.bundle["digest"],
        config_digest=plan.config_digest,
    )
    for work in plan.works:
        if work.shard_id in receipts:
            continue
        rows = []
        for case in work.compute:
            content = f"{case.case_id}={case.version}:{plan.bundle['digest']}"
            common = {"case_id": case.case_id, "label": 1}
            image = {"case_id": case.case_id, "image_id": f"{case.case_id}/0", "slice_index": 0}
            mask = {"slice_name": "0", "status": "ok", "error_class": None, "case_digest": content}
            rows.append(
                CaseRows(
                    masks=[{**image, **mask, "mask_sha256": content}],
                    metrics=[{**image, "label": 1, "label_name": content}],
                    cases=[{**common, "label_name": content}],
                )
            )
        receipt = stages.write_shard(work, rows, job, {"numerics": ""})
        receipts[work.shard_id] = runs.put_receipt(results_uri, plan.run_id, receipt)


def one_night(world, run_id=None):
    """What `reseg segment` does, from plan to publication."""

    def action():
        staged = segment.stage_run("source", OUT, world.bundle, SegmentConfig(), run_id=run_id)
        if staged.published_as is None and not staged.is_idle:
            segment.publish_staged(staged, segment.make_record(staged))

    return action


def collect(world):
    def action():
        if results.latest_night_number(OUT) is not None:
            keep = KeepConfig(nights=2, grace_hours=GRACE_HOURS)
            upkeep.collect(OUT, upkeep.find_waste(OUT, keep, now_s=world.clock_s))

    return action


class InOrder:
    """A pool without threads: all operations of a process are its own."""

    def __init__(self, *_):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def map(self, function, *items):
        return map(function, *items)


@pytest.fixture(scope="module")
def simulated():
    """The modules of the protocol, moved into whatever world `simulated.world` is."""
    patch = pytest.MonkeyPatch()
    place = SimpleNamespace(world=None)
    for name in ("read", "write", "create", "remove", "file_info", "list_files"):
        patch.setattr(storage, name, lambda *a, name=name: getattr(place.world, name)(*a))
    patch.setattr(storage, "is_folder", lambda uri: True)
    patch.setattr(storage, "check_writable", lambda uri: None)
    patch.setattr(delta, "open_log", lambda *a: place.world.open_log(*a))
    patch.setattr(delta, "commit", lambda *a, **k: place.world.commit(*a, **k))
    patch.setattr(tables, "encode_part", lambda rows: json.dumps(rows.to_pylist()).encode())
    patch.setattr(tables, "read_part", read_part)
    patch.setattr(results, "read_part", read_part)
    patch.setattr(runs, "decode_part", lambda data, columns: json.loads(data))
    for module in (runs, upkeep, planning):
        patch.setattr(module, "ThreadPoolExecutor", InOrder)
    FORMATS.register("simulated")(
        Format(
            suffixes=(".simulated",),
            list_shards=lambda source, counted: place.world.list_shards(source),
            list_cases=lambda source, shard: list(shard.cases),
            read_cases=lambda source, path, cases: iter(
                SimpleNamespace(case_id=case.case_id, digest=lambda case=case: f"{case}")
                for case in cases
            ),
        )
    )
    patch.setattr(
        planning,
        "open_source",
        lambda location, config, limits: Source(
            uri="/simulated/source", format="simulated", config=config, limits=limits
        ),
    )
    patch.setattr(
        segment,
        "load_bundle",
        lambda name: SimpleNamespace(uri=name, name=name, digest=name, labels=("x",)),
    )
    patch.setattr(results, "_COMMIT_PAUSES_S", (0.0, 0.0))
    patch.setattr(segment, "build_model", lambda bundle: None)
    patch.setattr(segment, "connect", lambda *_: InOrder())
    pool = Pool(num_actors=1, cpus_per_actor=1.0, gpus_per_actor=0.0)
    patch.setattr(segment, "plan_pool", lambda *_: pool)
    patch.setattr(segment, "_compute", lambda plan, *rest: compute(place.world, plan, *rest))
    patch.setattr(segment, "make_plan", lambda *a, **k: remember_plan(place.world, *a, **k))
    yield place
    FORMATS._entries.pop("simulated")
    patch.undo()


def remember_plan(world, *arguments, **options):
    """The real plan; and, for the readers, what the source held when it was made."""
    options["run_id"] = options["run_id"] or f"run{world.num_runs:04d}"
    world.num_runs += 1
    plan = planning.make_plan(*arguments, **options)
    digest = plan.bundle["digest"]
    held = [
        (case_id, f"{case_id}={content}:{digest}")
        for cases in world.here.process.snapshot.values()
        for case_id, content in cases.items()
    ]
    world.planned[_identity(plan)] = held
    return plan


def _identity(plan):
    """Two drivers may plan under one run id; the plan that was frozen counts."""
    return plan.run_id, tuple(sorted(plan.work_keys().items())), plan.removed


def read_part(results_uri, table, path, columns=None):
    try:
        rows = json.loads(storage.read(storage.join(results_uri, table, path)))
    except FileNotFoundError:
        raise ResultsError(f"the part {path} is gone") from None
    schema = tables.table_schema(table)
    if columns is not None:
        schema = pa.schema([schema.field(name) for name in columns])
    return pa.Table.from_pylist(rows, schema=schema)


def simulate(place, seed):
    """Live through one world; raise Broken if a reader ever sees what must not be."""
    try:
        return live(place, seed)
    except Broken as broken:
        raise Broken(f"seed {seed}: {broken}") from None


def live(place, seed):
    world = place.world = World(seed)
    shared_id = "shared" if world.random.random() < 0.15 else None
    waiting = []
    for _ in range(world.random.randint(2, 5)):
        waiting.append(one_night(world, shared_id if world.random.random() < 0.5 else None))
        if world.random.random() < 0.25:
            waiting.append(collect(world))
    alive = [Process(world, waiting.pop(0))]
    while alive or waiting:
        if waiting and (not alive or world.random.random() < 0.02):
            pass_time(world, idle=not alive)
            alive.append(Process(world, waiting.pop(0)))
        process = world.random.choices(alive, [p.weight for p in alive])[0]
        process.resume()
        if process.ended:
            alive.remove(process)
            if process.dead and len(waiting) < 6 and world.random.random() < 0.7:
                waiting.insert(0, process.action)
        if world.random.random() < 0.05 or process.ended:
            world.check()
    world.faults = False
    last = Process(world, one_night(world))
    last.resume()
    world.check()
    check_final(world)
    return world


def pass_time(world, *, idle):
    """Between the starts of two drivers."""
    if world.random.random() < 0.4:
        world.change_source()
    if world.random.random() < 0.1:
        world.bundle = world.random.choice("AB")
    if idle and world.random.random() < 0.5:
        world.clock_s += 2 * GRACE_HOURS * 3600  # everybody is gone: days pass


def check_final(world):
    """After one night without faults: all that the source holds, and nothing left at the side."""
    world.here.process = None
    night = results.open_night(OUT)
    if night is None:
        raise Broken("a night without faults published nothing")
    found = sorted((row["case_id"], row["mask_sha256"]) for row in world._rows(night, "masks"))
    wanted = sorted(
        (case_id, f"{case_id}={content}:{world.bundle}")
        for cases in world.source.values()
        for case_id, content in cases.items()
    )
    for table in tables.TABLES:
        held = {storage.join(OUT, table, path) for path in delta.open_log(f"{OUT}/{table}").paths()}
        if held != set(night.paths(table)):
            raise Broken(f"the newest version of {table} is not the published night")
    if found != wanted:
        raise Broken(f"the last night holds {found} instead of {wanted}")


def test_the_simulated_log_is_like_the_real_one(tmp_path):
    """The same commits, good and stale ones, to Delta and to the simulation."""
    world, draw = World(0, faults=False), random.Random(1)
    uri, schema = str(tmp_path / "masks"), tables.table_schema("masks")
    for number in range(25):
        there = sorted(world.logs[uri][-1].parts) if uri in world.logs else []
        options = {
            "adds": [_part(f"part-{number}-{k}.parquet", draw) for k in range(draw.randint(0, 3))],
            "removes": draw.sample(there, min(len(there), draw.randint(0, 2))),
            "run_id": f"run{draw.randint(0, 30)}",
            "metadata": {"run_id": f"run{number}", "text": "\u2603 {}"},
            "base_version": draw.choice(
                [None, None, 0, 3] + 12 * [len(world.logs.get(uri, [])) - 1]
            ),
        }
        if options["base_version"] == -1:
            options["base_version"] = None
        outcomes = []
        for commit in (delta.commit, world.commit):
            try:
                commit(uri, schema, **options)
                outcomes.append("landed")
            except CommitFailed:
                outcomes.append("refused")
        assert outcomes[0] == outcomes[1]
    real, simulated = delta.open_log(uri), world.open_log(uri)
    assert real.version == simulated.version > 10
    for version in range(real.version + 1):
        ours, theirs = delta.open_log(uri, version), world.open_log(uri, version)
        assert _by_path(ours.parts()) == _by_path(theirs.parts())
        some = set(sorted(ours.paths())[::2])
        assert ours.paths() == theirs.paths()
        assert _by_path(ours.parts(some)) == _by_path(theirs.parts(some))
        columns = ("path", "size_bytes", "num_records", "min.shard_id", "max.case_index")
        ours_rows, theirs_rows = (
            sorted(zip(*log.columns(*columns), strict=True)) for log in (ours, theirs)
        )
        assert ours_rows == theirs_rows
        for older in range(-1, version):
            assert ours.paths_added_since(older) == theirs.paths_added_since(older)
        assert [c.metadata for c in ours.commits()] == [c.metadata for c in theirs.commits()]
    for log in (delta, world):
        with pytest.raises(ResultsError, match="no version 99"):
            log.open_log(uri, 99)
        assert log.open_log(str(tmp_path / "nothing")) is None


def _part(path, draw):
    low = {"shard_id": path, "shard_version": "v", "case_index": -draw.randint(0, 3)}
    return AddedPart(
        path=path,
        size_bytes=draw.randint(1, 99),
        stats={
            "numRecords": draw.randint(1, 9),
            "minValues": low,
            "maxValues": {**low, "case_index": 4},
            "nullCount": {"shard_id": 0, "shard_version": 0, "error_class": draw.randint(0, 3)},
        },
    )


def _by_path(parts):
    return sorted((p.path, p.size_bytes, json.dumps(p.stats, sort_keys=True)) for p in parts)


def test_nothing_is_lost_doubled_or_half_visible(simulated):
    faults = sum(simulate(simulated, seed).num_faults for seed in range(300))
    assert faults > 300, "a world without faults proves nothing"


@pytest.mark.storm
@pytest.mark.timeout(3600)
def test_twenty_thousand_worlds(simulated):
    faults = steps = 0
    for seed in range(20_000):
        world = simulate(simulated, seed)
        faults, steps = faults + world.num_faults, steps + world.steps
    print(f"20,000 seeds, {faults:,} faults, {steps:,} store operations")
    assert faults > 20_000


# Variants of the protocol that are wrong: a check that catches none of them proves nothing.


def no_compare_and_swap(patch):
    """A stale run publishes on whatever is the newest night."""
    real = results._replace_night
    patch.setattr(
        results,
        "_replace_night",
        lambda out, run_id, base, *rest: real(out, run_id, results.latest_night_number(out), *rest),
    )


def no_second_look(patch):
    """A commit whose answer was lost is believed to have failed, and made again."""
    real = results._commit

    def commit(out, table, run_id, change, metadata, base_version):
        for _ in range(3):
            try:
                delta.commit(
                    storage.join(out, table),
                    tables.table_schema(table),
                    adds=change[0],
                    removes=change[1],
                    run_id=run_id,
                    metadata={**metadata, "run_id": run_id},
                    base_version=results.latest_version(out, table),
                )
            except CommitFailed:
                continue
            return results.latest_version(out, table)
        return real(out, table, run_id, change, metadata, base_version)

    patch.setattr(results, "_commit", commit)


def receipts_from_memory(patch):
    """The driver publishes what it computed itself; shards done before it was killed are forgotten."""
    load, publish, earlier = runs.load_receipts, segment.publish_staged, {}

    def remember(out, plan):
        found = load(out, plan)
        earlier[threading.get_ident()] = set(found)
        return found

    def forget(staged, record):
        done = earlier.get(threading.get_ident(), set())
        works = tuple(work for work in staged.plan.works if work.shard_id not in done)
        return publish(replace(staged, plan=replace(staged.plan, works=works)), record)

    patch.setattr(runs, "load_receipts", remember)
    patch.setattr(segment, "publish_staged", forget)


def dangling_commits_stay(patch):
    """What a dead run committed to metrics and cases is built upon."""
    patch.setattr(
        results, "_settle_table", lambda out, table, base: results.latest_version(out, table)
    )


def any_receipt_is_adopted(patch):
    """Another run's receipt is taken over whatever it was made from."""

    def load(out, run_id, shard_id, work_key):
        try:
            return runs.load_receipt(out, run_id, shard_id)
        except ResultsError:
            return None

    patch.setattr(runs, "_load_reliable", load)


def publication_first(patch):
    """masks is committed before the tables that it names."""
    real = results._replace_night

    def publish(out, run_id, base, changes, record):
        if results.night_of_run(out, run_id) is None and (results.latest_night_number(out) == base):
            versions = {
                table: None if (v := results.latest_version(out, table)) is None else v + 1
                for table in tables.TABLES[:-1]
            }
            metadata = {**record, "run_id": run_id, "versions": versions}
            results._commit(out, "masks", run_id, changes["masks"], metadata, base)
            for table in tables.TABLES[:-1]:
                results._commit(
                    out, table, run_id, changes[table], {}, results.latest_version(out, table)
                )
        return real(out, run_id, base, changes, record)

    patch.setattr(results, "_replace_night", publish)


def no_grace(patch):
    """Vacuum takes what no night needs, though a run has just written it."""
    real = upkeep.find_waste
    patch.setattr(
        upkeep,
        "find_waste",
        lambda out, keep, now_s: real(out, keep, now_s=now_s + 3 * GRACE_HOURS * 3600),
    )


def newest_side_versions(patch):
    """masks names whatever versions of the other tables are newest, not those that belong to it."""
    real = results._commit

    def commit(out, table, run_id, change, metadata, base_version):
        if table == "masks":
            newest = {name: results.latest_version(out, name) for name in tables.TABLES[:-1]}
            metadata = {**metadata, "versions": newest}
        return real(out, table, run_id, change, metadata, base_version)

    patch.setattr(results, "_commit", commit)


@pytest.mark.parametrize(
    ("variant", "first_seed"),  # near a world that tells; some are rare
    [
        (no_compare_and_swap, 430),
        (no_second_look, 0),
        (receipts_from_memory, 0),
        (dangling_commits_stay, 0),
        (any_receipt_is_adopted, 0),
        (publication_first, 0),
        (no_grace, 375),
        (newest_side_versions, 1950),
    ],
)
def test_a_broken_protocol_is_caught(simulated, variant, first_seed):
    with pytest.MonkeyPatch.context() as patch:
        variant(patch)
        for seed in range(first_seed, first_seed + 1500):
            try:
                simulate(simulated, seed)
            except Broken:
                return
    pytest.fail("1,500 worlds, and nobody noticed")
