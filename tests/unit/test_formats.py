import gzip
import io
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import LimitsConfig, SourceConfig
from pipeline.errors import ConfigError, ErrorClass, SourceError
from pipeline.formats import FORMATS, open_source
from pipeline.formats.patterns import compile_pattern, natural_key, pattern_keys
from pipeline.sharding import write_shards
from pipeline.synthetic import encode_png

PICTURE = encode_png(np.arange(64, dtype=np.uint8).reshape(8, 8))


def open_here(path, limits=None, **source):
    return open_source(str(path), SourceConfig(**source), limits or LimitsConfig())


def read_all(source):
    """Every case of a source by id, as read."""
    reader = FORMATS[source.format]
    found = {}
    for shard in reader.list_shards(source).shards:
        cases = reader.list_cases(source, shard)
        assert cases == reader.list_cases(source, shard)
        for encoded in reader.read_cases(source, shard.path, cases):
            assert encoded.case_id not in found
            found[encoded.case_id] = encoded
    return found


def problems(source):
    return {
        f"{case_id}/{item.name}": item.problem and item.problem.error_class
        for case_id, case in read_all(source).items()
        for item in case.slices
    }


def make_tar(path, members, *, end=True, kind=tarfile.USTAR_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for name, data in members:
            info = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.size = len(data) if info.isreg() else 0
            tar.addfile(info, io.BytesIO(data))
        stop = tar.offset
    data = buffer.getvalue()
    path.write_bytes(data if end else data[:stop])
    return path


# Patterns


def test_patterns_tell_case_slice_and_mask():
    keys_of = pattern_keys("{case}/{case}_{slice}.tif", "{case}/{case}_{slice}_mask.tif")
    assert keys_of("P_1/P_1_12.tif") == (("P_1", "12"), None)
    assert keys_of("P_1/P_1_12_mask.tif")[1] == ("P_1", "12")
    assert keys_of("P_1/P_2_12.tif") == (None, None)
    assert pattern_keys("{case:path}/img*.png", "")("a/b/img7.png") == (("a/b", "0"), None)
    assert compile_pattern("{case}.x+y", "--images").fullmatch("a.x+y")


@pytest.mark.parametrize("pattern", ["{cse}.png", "no-field.png", "{case"])
def test_patterns_that_cannot_work_are_refused(pattern):
    with pytest.raises(ConfigError, match="--images"):
        pattern_keys(pattern, "")
    with pytest.raises(ConfigError, match="needs --images"):
        pattern_keys("", "{case}_mask.png")


def test_slices_order_by_number():
    assert sorted(["s10", "s9", "s1", "s1b"], key=natural_key) == ["s1", "s1b", "s9", "s10"]


# Folders


def test_folder_of_cases(phantoms):
    source = open_here(
        phantoms, images="{case}/{case}_{slice}.png", masks="{case}/{case}_{slice}_mask.png"
    )
    cases = read_all(source)
    assert sorted(cases) == [f"phantom_{i:04d}" for i in range(8)]
    assert [s.name for s in cases["phantom_0003"].slices] == list("123456")
    assert all(s.mask and s.image for c in cases.values() for s in c.slices)


def test_a_new_case_moves_no_other(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(PICTURE)

    def places():
        shards = FORMATS["folder"].list_shards(open_here(tmp_path)).shards
        return {c.case_id: s.shard_id for s in shards for c in s.cases}

    before = places()
    (tmp_path / "new.png").write_bytes(PICTURE)
    after = places()
    assert {k: after[k] for k in before} == before


def test_hostile_names_survive_unchanged(tmp_path):
    names = [
        "sp ace.png",
        "new\nline.png",
        "-rf.png",
        ".hidden.png",
        "a.b.c.png",
        "Case.png",
        "case.png",
        "caf\u00e9.png",
        "cafe\u0301.png",
        'quote\'s "x" & $(touch pwned) ;.png',
        "x" * 250 + ".png",
    ]
    for name in names:
        (tmp_path / name).write_bytes(PICTURE)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "case.png").write_bytes(PICTURE)
    with open(str(tmp_path).encode() + b"/bad\xff.png", "wb") as file:
        file.write(PICTURE)
    cases = read_all(open_here(tmp_path))
    assert set(cases) == {*names, "sub/case.png", "bad\\xff.png"}
    assert all(case.slices[0].image == PICTURE for case in cases.values())


def test_missing_orphaned_changed_and_special_files_are_told(tmp_path):
    import os

    for name in ("a.png", "a_mask.png", "b.png", "c_mask.png", "d.png", "d_mask.png"):
        (tmp_path / name).write_bytes(PICTURE)
    os.mkfifo(tmp_path / "pipe.png")
    os.symlink("nowhere", tmp_path / "link.png")
    source = open_here(tmp_path, images="{case}.png", masks="{case}_mask.png")
    shards = FORMATS["folder"].list_shards(source).shards
    (tmp_path / "d.png").write_bytes(PICTURE + b"longer")
    found = {}
    for shard in shards:
        for case in FORMATS["folder"].read_cases(source, shard.path, shard.cases):
            found[case.case_id] = case.slices[0].problem and case.slices[0].problem.error_class
    assert found == {
        "a": None,
        "b": ErrorClass.MISSING_MASK,
        "c": ErrorClass.MISSING_IMAGE,
        "d": ErrorClass.CHANGED_DURING_RUN,
        "pipe": ErrorClass.UNSAFE_PATH,
        "link": ErrorClass.UNREADABLE_FILE,
    }
    relaxed = open_here(
        tmp_path, images="{case}.png", masks="{case}_mask.png", references="optional"
    )
    assert problems(relaxed)["b/0"] is None


def test_an_image_named_like_a_mask_is_known_by_its_own_mask(tmp_path):
    for name in ("a.png", "a_mask.png", "b_mask.png", "b_mask_mask.png", "c_mask.png"):
        (tmp_path / name).write_bytes(PICTURE)
    found = problems(open_here(tmp_path, images="{case}.png", masks="{case}_mask.png"))
    assert found == {"a/0": None, "b_mask/0": None, "c/0": ErrorClass.MISSING_IMAGE}


def test_sources_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(SourceError, match="not a folder that exists"):
        open_here(tmp_path / "none")
    with pytest.raises(ConfigError, match="scheme 'http'"):
        open_here("http://example.org/x")
    (tmp_path / "x.parquet").write_bytes(b"")
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(SourceError, match="parquet and tar shards"):
        open_here(tmp_path)


# Tar


def test_names_like_dicom_uids_stay_apart(tmp_path):
    make_tar(
        tmp_path / "a.tar", [("1.2.840.113619.1.png", PICTURE), ("1.2.840.113619.2.png", PICTURE)]
    )
    assert sorted(read_all(open_here(tmp_path))) == ["1.2.840.113619.1", "1.2.840.113619.2"]


def test_webdataset_roles_and_missing_masks(tmp_path):
    names = [
        "d/s0.image.png",
        "d/s0.mask.png",
        "d/s1.png",
        "d/s1_mask.png",
        "d/s2.image.png",
        "d/s0.json",
    ]
    make_tar(tmp_path / "a.tar", [(name, PICTURE) for name in names])
    assert problems(open_here(tmp_path)) == {
        "d/s0/0": None,
        "d/s1/0": None,
        "d/s2/0": ErrorClass.MISSING_MASK,
    }
    assert problems(open_here(tmp_path, references="ignore"))["d/s2/0"] is None


def test_patterns_apply_to_members_too(tmp_path):
    make_tar(tmp_path / "a.tar", [(f"p/{i}.png", PICTURE) for i in (1, 2, 10)])
    cases = read_all(open_here(tmp_path, images="{case}/{slice}.png"))
    assert [s.name for s in cases["p"].slices] == ["1", "2", "10"]


def test_unsafe_members_are_rows_and_nothing_is_written(tmp_path):
    def special(name, kind):
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, "/etc/passwd"
        return info

    source = tmp_path / "in"
    source.mkdir()
    make_tar(
        source / "a.tar",
        [
            ("ok.png", PICTURE),
            ("../../up.png", PICTURE),
            ("/abs.png", PICTURE),
            ("x/../../y", PICTURE),
            (special("sym.png", tarfile.SYMTYPE), b""),
            (special("hard.png", tarfile.LNKTYPE), b""),
            (special("fifo.png", tarfile.FIFOTYPE), b""),
            (special("dev.png", tarfile.CHRTYPE), b""),
        ],
    )
    found = problems(open_here(source))
    assert found.pop("ok/0") is None
    assert set(found.values()) == {ErrorClass.UNSAFE_PATH}
    assert len(found) == 7
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar", "in"]


def test_a_tar_without_its_end_is_reported_and_its_whole_members_are_used(tmp_path):
    members = [(f"{i}.png", PICTURE) for i in range(3)]
    make_tar(tmp_path / "a.tar", members, end=False)
    found = problems(open_here(tmp_path))
    assert found.pop("a.tar/(shard)") == ErrorClass.TRUNCATED_ARCHIVE
    assert set(found.values()) == {None}
    assert len(found) == 3


@pytest.mark.parametrize("keep", range(100, 2600, 173))
def test_every_cut_of_a_tar_is_noticed_and_loses_no_whole_member(tmp_path, keep):
    whole = make_tar(tmp_path / "a.tar", [(f"{i}.png", PICTURE) for i in range(3)])
    data = whole.read_bytes()
    whole.write_bytes(data[:keep])
    found = problems(open_here(tmp_path))
    assert found["a.tar/(shard)"] in (ErrorClass.TRUNCATED_ARCHIVE, ErrorClass.CORRUPT_ARCHIVE)
    good = [name for name, problem in found.items() if problem is None]
    step = 512 + 512 * -(-len(PICTURE) // 512)
    assert len(good) == sum(keep >= i * step + 512 + len(PICTURE) for i in range(3))


def test_duplicate_keys_are_both_visible(tmp_path):
    make_tar(tmp_path / "a.tar", [("s0.png", PICTURE), ("s0.png", PICTURE[:-4] + b"abcd")])
    assert problems(open_here(tmp_path)) == {"s0/0": None, "s0/0~2": ErrorClass.DUPLICATE_KEY}


def test_archive_bombs_are_refused_by_their_headers(tmp_path):
    info = tarfile.TarInfo("big.png")
    info.size = 300 << 20
    head = info.tobuf(tarfile.USTAR_FORMAT)
    with gzip.open(tmp_path / "bomb.tar.gz", "wb", compresslevel=1) as file:
        file.write(head)
        for _ in range(300):
            file.write(bytes(1 << 20))
        file.write(bytes(1024))
    assert problems(open_here(tmp_path)) == {"big/0": ErrorClass.ARCHIVE_TOO_LARGE}
    limits = LimitsConfig(max_archive_bytes=10 << 20, max_member_bytes=400 << 20)
    assert (
        problems(open_here(tmp_path, limits))["bomb.tar.gz/(shard)"] == ErrorClass.ARCHIVE_TOO_LARGE
    )


def test_rubbish_named_tar_is_one_bad_row(tmp_path):
    for name, data in (
        ("a.tar", b"rubbish" * 500),
        ("b.tar", b""),
        ("c.tar.gz", b"\x1f\x8b" + b"x" * 99),
    ):
        (tmp_path / name).write_bytes(data)
    assert set(problems(open_here(tmp_path))) == {
        f"{n}/(shard)" for n in ("a.tar", "b.tar", "c.tar.gz")
    }


@pytest.mark.parametrize("form", ["folder", "tar"])
def test_a_case_too_large_to_hold_is_not_fetched_and_its_neighbours_are(tmp_path, form):
    names = ["big/0.png", "big/1.png", "small/0.png"]
    if form == "tar":
        make_tar(tmp_path / "a.tar", [(name, PICTURE) for name in names])
    for name in names if form == "folder" else ():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(PICTURE)
    limits = LimitsConfig(max_case_bytes=2 * len(PICTURE) - 1)
    images = "{case}/{slice}.png"
    found = problems(open_here(tmp_path, limits, images=images))
    assert found == {
        "big/0": ErrorClass.CASE_TOO_LARGE,
        "big/1": ErrorClass.CASE_TOO_LARGE,
        "small/0": None,
    }
    enough = LimitsConfig(max_case_bytes=2 * len(PICTURE))
    assert set(problems(open_here(tmp_path, enough, images=images)).values()) == {None}


# Parquet


def test_plain_tables_row_by_row(tmp_path):
    table = pa.table(
        {
            "key": ["ok", "null", "empty", "dup", "dup"],
            "image": pa.array([PICTURE, None, b"", PICTURE, PICTURE], pa.binary()),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert problems(open_here(tmp_path)) == {
        "ok/0": None,
        "null/0": ErrorClass.MISSING_IMAGE,
        "empty/0": None,
        "dup/0": None,
        "dup~2/0": ErrorClass.DUPLICATE_KEY,
    }


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"id": [1], "picture": ["x"]}),
        pa.table({"key": ["a"], "image": ["not binary"]}),
        pa.table({"case_id": [1], "slice_names": [["a"]], "images": [[b"x"]]}),
    ],
)
def test_other_schemas_are_named(tmp_path, table):
    pq.write_table(table, tmp_path / "a.parquet")
    assert problems(open_here(tmp_path)) == {"a.parquet/(shard)": ErrorClass.SCHEMA_MISMATCH}


def test_truncated_parquet_is_one_bad_row(tmp_path):
    pq.write_table(pa.table({"key": ["a"], "image": [b"x" * 999]}), tmp_path / "a.parquet")
    data = (tmp_path / "a.parquet").read_bytes()
    for keep in range(0, len(data), 97):
        (tmp_path / "a.parquet").write_bytes(data[:keep])
        assert problems(open_here(tmp_path)) == {"a.parquet/(shard)": ErrorClass.CORRUPT_PARQUET}


# Shards


@pytest.fixture
def phantom_source(phantoms):
    return open_here(
        phantoms,
        images="{case}/{case}_{slice}.png",
        masks="{case}/{case}_{slice}_mask.png",
        spacing_mm=(3.0, 1.0, 1.0),
    )


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_shards_hold_what_the_source_held(phantom_source, tmp_path, kind):
    write_shards(phantom_source, str(tmp_path / "s"), kind)
    before, after = read_all(phantom_source), read_all(open_here(tmp_path / "s"))
    assert {k: c.digest() for k, c in before.items()} == {k: c.digest() for k, c in after.items()}
    assert all(c.spacing_mm == (3.0, 1.0, 1.0) for c in after.values())


@pytest.mark.parametrize("kind", ["parquet", "tar"])
def test_sharding_is_deterministic_and_resumable(phantom_source, tmp_path, kind):
    one = write_shards(phantom_source, str(tmp_path / "1"), kind, shard_bytes=40_000)
    write_shards(phantom_source, str(tmp_path / "2"), kind, shard_bytes=40_000)
    names = sorted(p.name for p in (tmp_path / "1").iterdir() if p.is_file())
    for name in names:
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert one.num_written == one.num_shards > 2
    again = write_shards(phantom_source, str(tmp_path / "1"), kind, shard_bytes=40_000)
    assert again.num_written == 0
    (tmp_path / "1" / names[-1]).unlink()
    assert (
        write_shards(phantom_source, str(tmp_path / "1"), kind, shard_bytes=40_000).num_written == 1
    )
    with pytest.raises(ConfigError, match="another source"):
        write_shards(phantom_source, str(tmp_path / "1"), kind, shard_bytes=90_000)


def test_sharding_never_overwrites_what_is_not_its_own(phantom_source, tmp_path):
    (tmp_path / "thesis.docx").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.docx"):
        write_shards(phantom_source, str(tmp_path), "tar")


def test_a_flipped_bit_in_a_shard_is_told(phantom_source, tmp_path):
    write_shards(phantom_source, str(tmp_path / "s"), "parquet")
    path = tmp_path / "s" / "shard-00000.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(bytes(data))
    found = set(problems(open_here(tmp_path / "s")).values())
    assert found & {ErrorClass.CORRUPT_PARQUET, ErrorClass.CHECKSUM_MISMATCH}


def test_two_sidecars_of_one_case_are_both_visible(phantom_source, tmp_path):
    write_shards(phantom_source, str(tmp_path / "s"), "tar")
    path = tmp_path / "s" / "shard-00000.tar"
    with tarfile.open(path) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar]
    first = [item for item in members if item[0].startswith("000000.")]
    make_tar(path, [*first, *first, ("000000.9999.image.png", PICTURE)])
    found = problems(open_here(tmp_path / "s"))
    assert [k for k, v in found.items() if v is None] == [
        f"phantom_0000/{i}" for i in range(1, 7)
    ] + ["000000.9999/0"]
    assert {v for k, v in found.items() if k.startswith("phantom_0000~2")} == {
        ErrorClass.DUPLICATE_KEY
    }


def test_sharding_refuses_what_it_cannot_read(tmp_path):
    import os

    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(PICTURE)
    os.symlink("nowhere", tmp_path / "in" / "b.png")
    with pytest.raises(SourceError, match="UnreadableFile"):
        write_shards(open_here(tmp_path / "in"), str(tmp_path / "out"), "tar")


def test_shards_of_an_interrupted_run_with_other_settings_are_not_mixed_in(
    phantom_source, tmp_path, monkeypatch
):
    def stop(done, total, what):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(phantom_source, str(tmp_path / "s"), "tar", 40_000, stop)
    with pytest.raises(ConfigError, match="not of these shards"):
        write_shards(phantom_source, str(tmp_path / "s"), "tar", 90_000)
    assert write_shards(phantom_source, str(tmp_path / "s"), "tar", 40_000).num_written > 0
    assert len(read_all(open_here(tmp_path / "s"))) == 8


def test_linked_folders_do_not_rename_cases(tmp_path):
    import os

    os.symlink("z", tmp_path / "a")
    os.symlink(".", tmp_path / "loop")
    for name in ("m", "z"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(PICTURE)
    (tmp_path / "far").mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "2.png").write_bytes(PICTURE)
    os.symlink(outside, tmp_path / "far" / "link")
    assert sorted(read_all(open_here(tmp_path))) == ["far/link/2.png", "m/1.png", "z/1.png"]
