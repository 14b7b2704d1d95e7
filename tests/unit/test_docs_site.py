"""The documentation as a site: it is built, no link leads nowhere, nothing is left out, and nothing comes from other hosts."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from scripts.diagrams import DiagramError, draw
from tests.servers.browser import find_chromium

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS) for page in DOCS.rglob("*.md"))
MAX_LINE = 120
REPOSITORY = "https://git.example.org/our/tidegate"


def build(directory: Path, configuration: Path, repository: str, *options: str) -> Path:
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--config-file",
        str(configuration),
        "--site-dir",
        str(directory),
        *options,
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "TIDEGATE_REPO_URL": repository}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170, check=False)
    assert done.returncode == 0, done.stderr
    return directory


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages, as who has no repository builds them."""
    return build(tmp_path_factory.mktemp("site"), ROOT / "mkdocs.yml", "", "--strict")


@pytest.fixture(scope="module")
def site_with_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages whose links are looked at, and those that they lead to: to build all of them again takes twice as long."""
    directory = tmp_path_factory.mktemp("sources")
    for page in ("index.md", "catalog.md", "gateways.md", "tutorials/nginx.md"):
        (directory / "docs" / page).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(DOCS / page, directory / "docs" / page)
    configuration = directory / "mkdocs.yml"
    configuration.write_text(
        f"INHERIT: {ROOT / 'mkdocs.yml'}\nhooks: [{ROOT / 'scripts/docs_site.py'}]\nplugins: []\nnav: [Start: index.md]\n"
    )
    return build(tmp_path_factory.mktemp("site"), configuration, REPOSITORY)


@pytest.fixture
def origin(site: Path) -> Iterator[str]:
    """The site, served on loopback."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def page_in(site: Path, page: Path) -> Path:
    return site / ("index.html" if page == Path("index.md") else f"{page.with_suffix('')}/index.html")


def test_every_page_is_there_and_reached(site: Path) -> None:
    start = (site / "index.html").read_text()
    for page in PAGES:
        assert page_in(site, page).exists()
        if page != Path("index.md"):
            assert f'href="{page.with_suffix("")}/"' in start, f"{page} is in no menu"


def test_what_is_made_from_the_code_is_there(site: Path) -> None:
    told = {name: (site / f"reference/{name}/index.html").read_text() for name in ("python", "data-plane", "control-plane")}
    assert 'id="tidegate.Limiter.check"' in told["python"]
    assert "POST /v1/check" in told["data-plane"]
    assert "/v1/authorize" in told["data-plane"]
    assert "/admin/v1/api-keys" in told["control-plane"]


def test_links_to_other_files_lead_to_the_repository(site_with_repository: Path) -> None:
    linked = f"{REPOSITORY}/blob/main/deploy/postgres/README.md"
    assert linked in (site_with_repository / "catalog/index.html").read_text()
    assert 'href="../../gateways/"' in (site_with_repository / "tutorials/nginx/index.html").read_text()


def test_without_a_repository_there_is_no_placeholder(site: Path) -> None:
    pages = {page: page_in(site, page).read_text() for page in PAGES}
    assert [str(page) for page, text in pages.items() if re.search(r'href="[^"]*(git\.example|/blob/main/)', text)] == []
    assert "deploy/postgres" in pages[Path("catalog.md")], "the name of the file stays"


def test_pages_load_nothing_from_other_hosts(origin: str, site: Path) -> None:
    from playwright.sync_api import sync_playwright

    chromium = find_chromium()
    asked: set[str] = set()
    failed: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.on("request", lambda request: asked.add(request.url))
        # The browser itself ends what a page still loads when the next one is opened.
        page.on("requestfailed", lambda request: request.failure == "net::ERR_ABORTED" or failed.append(request.url))
        page.goto(f"{origin}/", wait_until="networkidle")
        # Each page makes the index of all pages for the search, which takes longer than all else that it does.
        index = json.loads((site / "search/search_index.json").read_text()) | {"docs": []}
        page.route("**/search_index.json", lambda route: route.fulfill(json=index))
        for path in ("architecture/", "catalog/", "tutorials/nginx/", "simulate/", "reference/python/"):
            page.goto(f"{origin}/{path}", wait_until="networkidle")
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            page.goto(f"{origin}/architecture/", wait_until="networkidle")
            shown = page.evaluate(
                """() => [...document.querySelectorAll("svg.diagram")].map(svg => [
                    svg.querySelector("title").textContent.length,
                    getComputedStyle(svg.querySelector("text")).fill,
                    getComputedStyle(document.querySelector(".md-typeset")).color,
                    [...svg.querySelectorAll("rect")].every(box => box.getBoundingClientRect().width > 20),
                ])"""
            )
            assert len(shown) >= 4
            for alternative, fill, color, drawn in shown:
                assert alternative > 20
                assert fill == color, "the text of a diagram has the color of the page's text"
                assert drawn
        tabs = page.goto(f"{origin}/", wait_until="networkidle") and page.locator(".tabbed-labels label").all_inner_texts()
        browser.close()
    assert tabs == ["nginx", "Envoy", "FastAPI"]
    assert failed == []
    assert {urlsplit(url).netloc for url in asked if not url.startswith(("data:", "blob:"))} == {urlsplit(origin).netloc}


def test_the_picture_of_the_readme_is_the_one_of_the_landing_page() -> None:
    source = re.search(r"^```diagram\n(.*?)^```$", (DOCS / "index.md").read_text(), re.MULTILINE | re.DOTALL)
    assert source is not None
    drawn = draw(source[1], stands_alone=True) + "\n"
    assert (DOCS / "img/overview.svg").read_text() == drawn, "make docs draws it"
    assert "docs/img/overview.svg" in (ROOT / "README.md").read_text()
    assert "prefers-color-scheme:dark" in drawn


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("box a 1,1 " + "x" * 40, "too long for its box"),
        ("arrow a -> b", "no box 'a'"),
        ("circle a 1,1 A", "not a line of a diagram"),
        ("box a 1,1 A\nbox b 2,2 B\narrow a -> b", "neither a row nor a column"),
        ("box a 1,1 A\nbox b 2,1 B\narrow a -> b " + "x" * 40, "too long for its arrow"),
        ("box a 1,1 A", "alt"),
    ],
)
def test_what_cannot_be_drawn_is_rejected(line: str, said: str) -> None:
    with pytest.raises(DiagramError, match=re.escape(said)):
        draw(line if said == "alt" else f"alt: a picture\n{line}")


def test_a_database_schema_is_a_table(site: Path) -> None:
    page = (site / "catalog/index.html").read_text()
    assert "<td><code>sha256</code></td><td>string</td><td>UK</td><td>never the key itself</td>" in page
    assert "erDiagram" not in page


def test_texts_of_a_diagram_are_escaped() -> None:
    drawn = draw("alt: a < b\nbox a 1,1 <script>")
    assert "<script>" not in drawn
    assert "a &lt; b" in drawn


@pytest.mark.parametrize("page", [*(f"docs/{page}" for page in PAGES), "README.md"])
def test_lines_are_short(page: str) -> None:
    """Lines of prose have at most 120 characters; code, tables and links may be longer."""
    long = []
    fenced = False
    for number, line in enumerate((ROOT / page).read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith(("    ", "|")) and len(re.sub(r"\]\([^)]*\)", "]", line)) > MAX_LINE:
            long.append(number)
    assert long == []
