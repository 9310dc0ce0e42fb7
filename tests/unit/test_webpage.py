"""The report: nothing that is shown becomes part of the page, and a browser has nothing to complain of."""

import base64
import hashlib
import html.parser
import re
import shutil
import subprocess

import pyarrow as pa
import pytest

from pipeline import charts, webpage
from pipeline.compare import CASES_SCHEMA, COUNTS

HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</title><body onload=alert(1)>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}{% raw %}",
    "</style><style>*{display:none}</style>",
    "a\x00b\nc\u202ed",
    "x" * 400,
    "$\\frac{1}{2}$",
    "=HYPERLINK(1)",
    "\ud800",
]


class Elements(html.parser.HTMLParser):
    """Tags and attributes in the order in which they come, and the text between them."""

    def __init__(self):
        super().__init__()
        self.tags, self.text = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, tuple(sorted(name for name, _ in attributes))))
        for name, value in attributes:
            assert not name.startswith("on"), f"{name} = {value}"
            if name in ("src", "href"):
                assert value.startswith(("data:", "#")), value

    def handle_data(self, data):
        self.text.append(data)


def examined(names, tmp_path, monkeypatch):
    """What a nightly run kept about cases of these names, without a run."""
    rows = [
        {
            "case_id": name,
            "shard_id": "s",
            "group": name,
            "label": 1,
            "label_name": name,
            "state": "recomputed",
            "volume_px_before": 100,
            "volume_px_after": 40 + number,
            "confidence_before": 0.9,
            "confidence_after": 0.8,
            "dice": 0.5,
            "volume_change": -0.6,
            "appeared": 0,
            "vanished": 1,
        }
        for number, name in enumerate(names)
    ]
    # names from a file system can hold what no table can
    rows = [{k: _storable(v) for k, v in row.items()} for row in rows]
    cases = pa.Table.from_pylist(rows, CASES_SCHEMA)
    monkeypatch.setattr(webpage, "read_rows", lambda *_: cases)
    drift = [
        {
            "population": "recomputed",
            "group": row["group"],
            "label_name": row["label_name"],
            "quantity": "volume",
            "num_before": 20,
            "num_after": 20,
            "mean_before": 1.0,
            "mean_after": 2.0,
            "ks": 0.5,
            "p_value": 0.01,
            "psi": 0.3,
        }
        for row in rows
    ]
    counts = dict.fromkeys(("new", "changed", "stale", "removed", "unchanged", "bad"), 1)
    limit = {"name": "max_bad_share", "value": 0.5, "limit": 0.05, "passed": False}
    return {
        "run_id": "run",
        "base_night": 3,
        "examined_s": 0.0,
        "bundle": {"name": rows[0]["case_id"], "uri": rows[0]["case_id"], "digest": "d"},
        "source": {"uri": rows[0]["case_id"], "format": "folder"},
        "code": {"reseg": "1", "operator": rows[0]["case_id"]},
        "summary": {
            "cases": counts,
            "images": counts,
            "bad_by_class": {"NotAnImage": 1},
            "computed_images": 5,
            "seconds": 1.0,
            "stage_seconds": {"decode": 1.0, "predict": 2.0},
            "notes": [row["case_id"] for row in rows],
        },
        "verdict": {
            "passed": False,
            "limits": [
                {**limit, "what": row["label_name"], "note": row["case_id"]} for row in rows
            ],
        },
        "comparison": {"counts": dict.fromkeys(COUNTS, 1), "case_states": {}},
        "drift": drift,
        "scores": None,
        "review": [
            {
                "case_id": row["case_id"],
                "group": row["group"],
                "state": "recomputed",
                "score": 1.0,
                "reasons": [row["case_id"]],
                "image_id": None,
            }
            for row in rows
        ],
    }


def _storable(value):
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def make_page(names, tmp_path, monkeypatch):
    return webpage.write_page(str(tmp_path), examined(names, tmp_path, monkeypatch), 3).decode()


def elements(page):
    parser = Elements()
    parser.feed(page)
    return parser


def test_no_name_becomes_an_element(tmp_path, monkeypatch):
    plain = [f"case{number}" for number in range(len(HOSTILE))]
    hostile = elements(make_page(HOSTILE, tmp_path, monkeypatch))
    assert hostile.tags == elements(make_page(plain, tmp_path, monkeypatch)).tags
    text = "".join(hostile.text)
    for name in HOSTILE[:6]:
        assert name in text, "shown as it is, as text"


def test_the_policy_names_exactly_our_script_and_style(tmp_path, monkeypatch):
    page = make_page(HOSTILE, tmp_path, monkeypatch)
    policy = (
        re.search(r'Content-Security-Policy" content="([^"]*)"', page)
        .group(1)
        .replace("&#39;", "'")
    )
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not re.search(r"https?://(?!www\.w3\.org)", page.replace("http-equiv", ""))


def test_every_picture_says_what_it_shows(tmp_path, monkeypatch):
    page = make_page(["a", "b"], tmp_path, monkeypatch)
    figures = re.findall(r'<button type="button" class="zoom"><img [^>]*>', page)
    assert len(figures) == 5
    assert all(re.search(r'alt="[^"]{20,}"', figure) for figure in figures)


def test_charts_take_any_values():
    row = {"volume_px_before": 0, "volume_px_after": 0, "label_name": "$x$"}
    drawn = [
        charts.draw_volume_changes([row, {**row, "volume_px_after": 10**9, "label_name": "y"}]),
        charts.draw_dice_histogram([0.0]),
        charts.draw_confidence([], [0.2]),
        charts.draw_stages({"decode": 0.0}),
        charts.draw_nights([{"night": 1, "computed": 0}]),
        charts.draw_volume_changes([row] * 20_000),
    ]
    assert all(svg.startswith(b"<?xml") and len(svg) < 400_000 for svg in drawn)


@pytest.mark.parametrize("width", [390, 820, 1400])
def test_a_browser_shows_it_without_complaint(width, tmp_path, monkeypatch):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium, which is not installed (apt-get install chromium)")
    file = tmp_path / "report.html"
    page = make_page(HOSTILE, tmp_path, monkeypatch)
    plain = elements(page)
    # the page's own script must run: it makes the heads of sortable tables focusable
    file.write_text(page)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-quic"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},2000"]
    done = subprocess.run(
        [browser, *flags, "--enable-logging=stderr", "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr, [x for x in done.stderr.splitlines() if "CONSOLE" in x]
    shown = elements(done.stdout)
    names = [tag for tag, _ in shown.tags if tag != "tbody"]
    assert names == [tag for tag, _ in plain.tags if tag != "tbody"]
    assert 'tabindex="0"' in done.stdout
