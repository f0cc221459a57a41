"""The report: its charts and tables, and the page in a real browser."""

import base64
import json
import re
import shutil
import subprocess
import threading
import xml.etree.ElementTree as xml
from functools import partial
from html import escape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from PIL import Image

from tvkernels.benchmarks import stored
from tvkernels.benchmarks.report import charts, figures, markup, page, plots, publish, tables
from tvkernels.benchmarks.report.charts import Axis, Dots, Lane, Mark
from tvkernels.cli import main

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "report.html"
NONE = {name: [] for name in stored.SOURCES}
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
VOID = {"meta", "link", "img", "input", "br"}


class Reader(HTMLParser):
    """Checks that tags close in order, and collects ids, links and sources."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.links, self.sources = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name == "href" and tag == "a":
                self.links.append(value)
            elif name in ("src", "srcset", "poster", "href"):
                self.sources.append(value)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def results():
    return stored.load()


def test_the_page_is_of_the_stored_rows(results):
    text = page.html(results, publish.media(), publish.COMMAND)
    # Not `==` alone: pytest would compare megabytes line by line.
    assert (text == PAGE.read_text(encoding="utf-8")) is True, (
        f"docs/report.html is old: {publish.COMMAND}"
    )


def test_the_readme_is_of_the_stored_rows(results):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tables.MARKED.search(text), "the README has no marked table"
    assert tables.update(text, results) == text, f"the README's tables are old: {publish.COMMAND}"


def test_figures_in_the_readmes_prose_are_of_rows_and_pages(results):
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    page = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
    compiled = sum(
        map(int, re.findall(r"^\| \w+ \| \w+ \| sm_\d+ \| (\d+) \|", page, re.MULTILINE))
    )
    assert f"{compiled:,} kernels" in text
    [points] = re.findall(r"TCVE - the form that the paper writes \| -([\d.]+) ", text)
    assert f"edits better by {points} points" in text
    told = re.search(r"EI2's sampling step.*? ms with every op.*?`compile`\.", text)[0]
    steps = [f"{1000 * row['step_s']:.0f}" for row in results["runtimes"]]
    said = re.findall(r"\b\d{3}\b", told)
    assert len(said) == 8 and set(said) <= set(steps)
    assert f"{int(said[0]) / int(said[4]):.1f} times as fast as the reference" in told


def test_the_pictures_are_of_the_stored_rows(results):
    """Without matplotlib: each holds a digest of what it shows."""
    for name, found in figures.all_figures(results).items():
        path = ROOT / "docs" / f"{name}.png"
        assert path.is_file() == bool(found), path.name
        if found:
            shown = Image.open(path).info.get("Comment")
            told = f"{path.name} is old: {publish.COMMAND}, with matplotlib (the extra bench)"
            assert shown == plots.content([f.chart for f in found]), told


def test_the_page_is_whole_and_links_to_its_rows():
    read = Reader(PAGE.read_text(encoding="utf-8"))
    assert read.open == ["html"] or not read.open
    assert len(read.ids) == len(set(read.ids))
    assert {link for link in read.links if not link.startswith("#")} == set()
    assert {link[1:] for link in read.links} <= set(read.ids)
    assert all(source.startswith("data:") for source in read.sources)
    assert not re.search(
        r"url\(|@import|<script src|fetch\(|XMLHttpRequest", PAGE.read_text(encoding="utf-8")
    )
    assert PAGE.stat().st_size < 6e6


def test_what_was_not_measured_says_so():
    text = page.html(NONE, markup.Media(), publish.COMMAND)
    for what in markup.SAYS.values():
        assert f"Not measured:</strong> {escape(what[0].lower() + what[1:])}" in text
    assert "<figure>" not in text
    assert {link[1:] for link in Reader(text).links} <= set(Reader(text).ids)


def test_ops_of_a_gpu_are_drawn_with_their_rivals():
    same = {
        "op": "frame_attention", "case": "sd15-64", "dtype": "bfloat16", "backward": False,
        "form": "as used", "status": "timed", "p20_s": 1e-4, "p80_s": 3e-4, "peak_bytes": 2**20,
        "device": "Some GPU, sm_90", "commit": "abc", "date": "2030-01-01T00:00:00+00:00",
    }  # fmt: skip
    given = [
        same | {"id": "ops-1", "provider": "sdpa-flash", "median_s": 2e-4, "percent_of_limit": 40,
                "vs_reference": 3.0},
        same | {"id": "ops-2", "provider": "triton", "median_s": 1e-4, "percent_of_limit": 80,
                "vs_reference": 6.0},
        same | {"id": "ops-3", "provider": "xformers", "median_s": None,
                "status": "absent", "reason": "not installed"},
    ]  # fmt: skip
    (figure,) = figures.ops(NONE | {"ops": given})
    assert list(figure.chart.series) == ["triton", "sdpa-flash"]
    assert [m.value for m in figure.chart.lanes[0].marks] == [40, 80]
    text = page.html(NONE | {"ops": given}, markup.Media(), publish.COMMAND)
    assert "<b>6.0 ×</b>" in text and "Some GPU, sm_90" in text and "<b>not measured" not in text


def test_a_table_is_the_same_in_the_readme_and_the_page():
    rows = [
        {"id": f"native-{side}", "op": "guided_ddim_step", "variant": "", "side": side,
         "channels": channels, "device": "cpu", "native_s": 1.0, "cpu_s": 2.0, "reference_s": 4.04}
        for side, channels in tables.LEVELS[:2]
    ]  # fmt: skip
    older = rows[0] | {"native_s": 8.0, "id": "native-1"}
    text = "before\n<!-- report: native -->\nold\n<!-- end -->\nafter\n"
    text = tables.update(text, NONE | {"native": [older, *rows]})
    assert "| guided DDIM step | 4.0 / 2.0 | 4.0 / 2.0 | not measured |\n<!-- end -->" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    with pytest.raises(ValueError, match="no table 'nothing'"):
        tables.update("<!-- report: nothing -->\n<!-- end -->", NONE)


def test_axes_have_few_round_ticks_inside():
    for low, high in ((0.9, 11), (0.02, 5000), (3, 4)):
        for log in (True, False):
            ticks = Axis(low, high, log).ticks()
            assert ticks == sorted(ticks) and len(ticks) <= 7
            assert all(low <= tick <= high for tick in ticks)
    axis = Axis(1, 100, True, 0, 100)
    assert [axis(1), axis(10), axis(100)] == pytest.approx([0, 50, 100])


def test_the_exponent_is_that_of_the_power_law():
    same = {
        "method": "ei2", "model": "sd15", "backend": "auto", "dtype": "float32",
        "size": [512, 512], "phase": "sampling", "runtime": "eager", "device": "cpu",
    }  # fmt: skip
    rows = [
        same | {"id": f"pipelines-{n + (name == 'ours')}", "frames": n, "provider": name,
                "status": "timed", "seconds": s * n**1.7, "peak_bytes": 2**20 * n,
                "ratio": s, "ratio_low": s, "ratio_high": s}
        for n in (4, 8, 16)
        for name, s in (("reference", 3.0), ("ours", 1.0))
    ]  # fmt: skip
    why = {"status": "absent", "seconds": None, "reason": "no such device", "provider": "ours"}
    rows.append(same | why | {"id": "pipelines-18", "frames": 8, "runtime": "cuda_graph"})
    time, memory = figures.scaling(NONE | {"pipelines": rows})
    assert time.chart.series == ["reference, ∝ n^1.70 ± 0.00", "ours, ∝ n^1.70 ± 0.00"]
    assert memory.chart.series == ["reference, ∝ n^1.00 ± 0.00", "ours, ∝ n^1.00 ± 0.00"]
    first, *_ = figures.pipelines(NONE | {"pipelines": rows})
    assert [m.value for m in first.chart.lanes[0].marks] == pytest.approx([3, 1])
    text = page.html(NONE | {"pipelines": rows}, markup.Media(), publish.COMMAND)
    assert "<b>3.0 ×</b>" in text and "#pipelines-17" in text
    assert "ours, cuda_graph, sampling: absent: no such device" in text
    xml.fromstring(charts.svg(time.chart, "x"))


def test_a_chart_is_accessible_and_escaped():
    mark = Mark(0, 2.0, "a < b", "row-1", 1.0, 3.0)
    drawn = charts.svg(Dots("x & y", "what", ("one",), [Lane("<lane>", [mark])], line=1), "c")
    tree = xml.fromstring(drawn)
    assert tree.attrib["aria-labelledby"] == "c-t c-d"
    assert [tree.find("title").text, tree.find("desc").text] == ["x & y", "what"]
    link = tree.find("a")
    assert link.attrib["href"] == "#row-1" and link.find("title").text == "<lane>: a < b"


def test_the_command_writes_the_page(tmp_path, capsys):
    out = tmp_path / "deep" / "page.html"
    assert main(["report", "-o", str(out)]) == 0
    assert (out.read_bytes() == PAGE.read_bytes()) is True
    assert str(out) in capsys.readouterr().out
    assert main(["report", "-o", str(tmp_path / "page.txt")]) == 2
    assert main(["report", "-o", str(out), "--results", str(tmp_path / "none")]) == 2
    assert main(["report", "-o", str(out), "--demo", str(tmp_path)]) == 2
    (tmp_path / "ops.jsonl").write_text("{broken\n", encoding="utf-8")
    assert main(["report", "-o", str(out), "--results", str(tmp_path)]) == 2
    assert "ops.jsonl, line 1: not a row" in capsys.readouterr().err


# Around a page of the width of a phone: waits for its media, then sends what it finds.
FRAME = """<!doctype html><iframe src="page.html" style="width:360px;height:700px"></iframe>
<script>
onload = async () => {
  const page = document.querySelector("iframe").contentDocument;
  const videos = [...page.querySelectorAll("video")];
  for (let i = 0; i < 100 && videos.some((v) => v.readyState < 1 && !v.error); i++)
    await new Promise((done) => setTimeout(done, 100));
  const root = page.documentElement;
  const wide = () => root.scrollWidth - root.clientWidth;
  const folded = wide();
  for (const details of page.querySelectorAll("details")) details.open = true;
  const button = page.querySelector("table th");
  button?.click();
  await fetch("found", {method: "POST", body: JSON.stringify({
    wide: Math.max(folded, wide()),
    images: [...page.images].map((image) => image.naturalWidth),
    videos: videos.map((video) => video.videoWidth * (video.duration > 0)),
    sorted: button?.getAttribute("aria-sort"),
    asked: performance.getEntriesByType("resource").map((entry) => entry.name).concat(
      page.defaultView.performance.getEntriesByType("resource").map((entry) => entry.name)),
  })});
};
</script>"""


class Server(ThreadingHTTPServer):
    """Serves a folder on this machine, keeps what is asked of it and what is sent to it."""

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.asked, self.found, self.done = [], None, threading.Event()


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        super().do_GET()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.found = json.loads(body)
        self.send_response(204)
        self.end_headers()
        self.server.done.set()

    def log_message(self, *args):
        pass


def browse(text: str, folder: Path) -> dict:
    """What Chromium finds on a page 360 pixels wide: measures, console, what it asked for."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine: the page was not opened in a browser")
    (folder / "page.html").write_text(text, encoding="utf-8")
    (folder / "index.html").write_text(FRAME, encoding="utf-8")
    with Server(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        words = [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--mute-audio", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0",
            f"http://127.0.0.1:{server.server_address[1]}/",
        ]  # fmt: skip
        with (folder / "log").open("w", encoding="utf-8") as log:
            browser = subprocess.Popen(words, stdout=log, stderr=log)
            try:
                assert server.done.wait(120), (folder / "log").read_text(encoding="utf-8")[-2000:]
            finally:
                browser.terminate()
                browser.wait(30)
                server.shutdown()
        lines = (folder / "log").read_text(encoding="utf-8").splitlines()
        console = [line for line in lines if "CONSOLE" in line]
        return server.found | {"console": console, "served": server.asked}


def test_the_page_in_a_browser(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    found = browse(text, tmp_path)
    assert found["console"] == []
    assert found["wide"] == 0
    assert len(found["images"]) == text.count("<img") and all(found["images"])
    assert len(found["videos"]) == text.count("<video") and all(found["videos"])
    assert found["sorted"] == "ascending"
    assert found["served"] == ["/", "/page.html"]
    assert [name for name in found["asked"] if not name.endswith("/page.html")] == []


def test_a_broken_page_is_found_out(tmp_path):
    picture = base64.b64encode(b"no picture").decode()
    found = browse(
        '<!doctype html><link rel="icon" href="data:,"><div style="width:500px">wide</div>'
        f'<img src="data:image/png;base64,{picture}"><img src="http://nowhere.example/a.png">'
        '<video src="data:video/mp4;base64,AAAA"></video><script>nothing()</script>',
        tmp_path,
    )
    assert any("nothing is not defined" in line for line in found["console"])
    assert found["wide"] > 0 and found["images"] == [0, 0] and found["videos"] == [0]
    assert any("nowhere.example" in name for name in found["asked"])
