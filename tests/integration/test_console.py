"""The console in a real browser: what people do with it, and what nobody may do through it. One server, one browser."""

from __future__ import annotations

import importlib.util
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Serve
from tests.integration.console_browser import TOKEN, Console, opened, see, settled
from tests.moments import PATIENCE_S

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>\"'&"
PAGES = ("/", "/callers", "/customers", "/policy", "/violations", "/audit", "/system")
AXE = """async (rules) => {
  const only = rules === null ? {} : {runOnly: rules};
  const found = await axe.run(document, {resultTypes: ["violations"], ...only});
  return found.violations.filter((each) => ["serious", "critical"].includes(each.impact))
    .map((each) => each.id + ": " + each.nodes.map((node) => node.html).join(" | ").slice(0, 400));
}"""


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Console]:
    server = Serve(
        tmp_path_factory.mktemp("console"),
        TIDEGATE_ADMIN__TOKEN=TOKEN,
        TIDEGATE_VIOLATIONS__FLUSH_S="0.2",
        TIDEGATE_LEDGER__FLUSH_S="0.2",
    )
    with opened(server) as made:
        yield made


@pytest.fixture(autouse=True)
def no_problems(console: Console) -> Iterator[None]:
    """Whatever a test does: no script of elsewhere, no error in the browser's console, no request to another host."""
    console.problems.clear()
    yield
    assert console.problems == []


def axe() -> str:
    spec = importlib.util.find_spec("axe_playwright_python")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).with_name("axe.min.js").read_text()


def test_every_page_is_useful_when_there_is_nothing(console: Console) -> None:
    page = console.open()
    see(page, "components are healthy")
    for path, text in (
        ("/callers", "There are no API keys yet."),
        ("/customers", "There are no customers yet."),
        ("/policy", "There is no tier yet."),
        ("/violations", "Nothing was blocked"),
        ("/audit", "Nothing was changed yet."),
        ("/system", "Components"),
    ):
        page.goto(console.base + path)
        see(page, text)
    page.goto(f"{console.base}/callers")
    page.get_by_role("button", name="Sign out").click()
    see(page, "Signed out.")
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.context.close()


def test_new_rule_in_shadow_then_enforced(console: Console) -> None:
    page = console.open("/policy")
    page.get_by_role("button", name="New tier").click()
    page.get_by_label("Name").fill("free")
    page.get_by_role("button", name="Create").click()
    see(page, "The tier free has no rules.")
    page.get_by_role("button", name="New rule").click()
    page.get_by_label("Endpoint").fill("/api/*")
    page.get_by_label("Limits", exact=True).fill("2/fortnight")
    see(page, "limit '2/fortnight'")
    page.get_by_label("Limits", exact=True).fill("2/hour")
    see(page, "Valid.")
    page.get_by_role("button", name="Save").click()
    page.get_by_role("row", name=re.compile("shadow")).wait_for()
    key = console.post("/api-keys", tier="free", name="customer")
    for _ in range(4):
        assert console.check(key["api_key"], "/api/x") == 200
    page.goto(f"{console.base}/policy?tier=free&method=GET&path=/api/x&with={key['id']}")
    see(page, "watches (shadow)")
    see(page, "allowed: no rule of the tier")
    page.get_by_role("link", name="what it would block").click()
    see(page, "Would have been blocked most")
    page.get_by_role("row", name=f"{key['id']} API key 2").wait_for()
    page.go_back()
    page.get_by_role("button", name="Enforce the rule").click()
    see(page, "What it counted before counts.")
    page.get_by_role("dialog").get_by_role("button", name="Enforce").click()
    see(page, "blocked with 429: 0 of 2 left under the limits of the rule '/api/*'")
    assert console.check(key["api_key"], "/api/x") == 429
    page.context.close()


def test_blocked_customer_why_override_allowed(console: Console) -> None:
    console.any_key()
    key = console.post("/api-keys", tier="free", name="blocked customer")
    assert [console.check(key["api_key"], "/api/x") for _ in range(3)] == [200, 200, 429]
    console.wait_for_violation("/api/*")
    page = console.open("/violations")
    page.get_by_role("link", name=key["id"]).first.click()
    see(page, "blocked customer")
    page.get_by_label("Path").fill("/api/x")
    page.get_by_role("button", name="Explain").click()
    see(page, "blocked with 429: 0 of 2 left under the limits of the rule '/api/*'")
    page.get_by_role("button", name="Override limits").click()
    # Another operator changes the key meanwhile: nothing is overwritten unseen.
    renamed = console.api.patch(f"/api-keys/{key['id']}", json={"name": "good customer"}, headers={"If-Match": "*"})
    assert renamed.status_code == 200
    page.get_by_label("/api/*", exact=True).fill("5/hour")
    page.get_by_role("button", name="Save").click()
    see(page, "Another operator changed it after you opened it")
    see(page, "good customer")
    page.get_by_role("button", name="Save mine over it").click()
    see(page, "allowed: the rule '/api/*' answers, 3 of 5 left")
    page.context.close()
    changed = console.api.get(f"/api-keys/{key['id']}").json()
    assert (changed["name"], changed["overrides"]) == ("good customer", [{"rule": "/api/*", "limits": ["5/hour"]}])


def test_leaked_key_is_revoked(console: Console) -> None:
    console.any_key()
    page = console.open("/callers")
    page.get_by_role("button", name="New key").click()
    page.get_by_role("dialog").get_by_label("Name").fill("leaked")
    page.get_by_role("button", name="Create").click()
    key = page.get_by_role("textbox", name="New API key").input_value()
    assert console.check(key, "/api/x") == 200
    page.get_by_role("button", name="Done").click()
    see(page, "leaked")
    page.get_by_role("button", name="Revoke").click()
    page.get_by_label("Reason").fill("found in a log")
    page.get_by_role("dialog").get_by_role("button", name="Revoke").click()
    see(page, "found in a log")
    assert console.check(key, "/api/x") == 403
    page.get_by_role("link", name="Changes of this key").click()
    see(page, "revoke api_key")
    page.locator("summary").first.click()
    see(page, "revoked_reason")
    assert key not in page.content()
    page.context.close()


def test_lists_fill_themselves_with_and_without_a_stream(console: Console) -> None:
    page = console.open()
    other = page.context.new_page()
    other.route("**/admin/v1/live?*", lambda route: route.fulfill(status=429, json={"error": {"code": "", "message": ""}}))
    for each, is_streamed in ((page, True), (other, False)):
        if is_streamed:
            with each.expect_response(lambda response: "/admin/v1/live?" in response.url) as stream:
                each.goto(f"{console.base}/customers?q=late")
            assert (stream.value.status, stream.value.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        else:
            each.goto(f"{console.base}/customers?q=late")
        see(each, "No customer matches.")
    console.post("/customers", name="late")
    for each in (page, other):
        each.get_by_role("link", name="late").wait_for()
    page.context.close()


def test_customer_over_its_quota_gets_a_higher_one_until_a_time(console: Console) -> None:
    made = console.api.get("/tiers/sold")
    if made.status_code == 404:
        console.post("/tiers", name="sold", quotas=["3/month"])
    page = console.open("/customers")
    page.get_by_role("button", name="New customer").click()
    dialog = page.get_by_role("dialog")
    dialog.get_by_label("Name").fill("acme")
    dialog.get_by_label("Tier").select_option("sold")
    dialog.get_by_label("Quota periods begin on the day of").fill("2026-01-31")
    dialog.get_by_label("Time zone of quota periods").fill("Europe/Nowhere")
    page.get_by_role("button", name="Create").click()
    see(page, "Europe/Nowhere")
    dialog.get_by_label("Time zone of quota periods").fill("Europe/Berlin")
    page.get_by_role("button", name="Create").click()
    see(page, "on day 31, Europe/Berlin")
    page.get_by_role("button", name="New key").click()
    page.get_by_role("button", name="Create").click()
    key = page.get_by_role("textbox", name="New API key").input_value()
    assert [console.check(key, "/any") for _ in range(4)] == [200, 200, 200, 429]
    page.goto(f"{console.base}/customers?name=acme")
    see(page, "3 / month (quota)")
    page.get_by_label("3 of 3 used").wait_for()
    page.get_by_role("button", name="Override limits").click()
    page.get_by_label("Quotas").fill("5/month")
    page.get_by_label("Ends").fill("2099-12-04T10:00")
    page.get_by_role("button", name="Save").click()
    page.get_by_role("row").filter(has_text="quota 5/month").filter(has_text="2099").wait_for()
    page.get_by_label("3 of 5 used").wait_for()
    assert [console.check(key, "/any") for _ in range(3)] == [200, 200, 429]
    page.get_by_label("5 of 5 used").wait_for()
    page.get_by_role("button", name="Remove the override").click()
    page.get_by_role("dialog").get_by_role("button", name="Remove").click()
    page.get_by_label("5 of 3 used").wait_for()
    see(page, "5 (2 over)")
    assert console.api.get("/customers/acme").json()["overrides"] == []
    while '"admitted":5' not in console.api.get("/usage/export", params={"customer": "acme", "format": "jsonl"}).text:
        page.wait_for_timeout(300)
    page.reload()
    see(page, "5 allowed, ")
    page.get_by_role("region", name="Units by rule").wait_for()
    assert page.get_by_role("alert").all_inner_texts() == []
    page.context.close()


def test_two_operators_edit_one_rule(console: Console) -> None:
    console.any_key()
    rule = console.post("/rate-limit-rules", tier="free", endpoint="/edited/*", limits=["7/hour"])
    one, other = console.open("/policy?tier=free&rule=edited"), console.open("/policy?tier=free&rule=edited")
    for page, limit in ((one, "8/hour"), (other, "9/hour")):
        page.get_by_role("button", name="Edit the rule /edited/*").click()
        page.get_by_label("Limits", exact=True).fill(limit)
    one.get_by_role("button", name="Save").click()
    # What the other operator sees behind the form is up to date before it saves.
    one.get_by_role("cell", name="8/hour").wait_for()
    other.get_by_text("8/hour").first.wait_for(state="attached")
    other.get_by_role("button", name="Save").click()
    see(other, "Another operator changed it after you opened it")
    other.get_by_role("cell", name="7/hour").wait_for()
    other.get_by_role("button", name="Cancel").last.click()
    see(other, "Nothing was saved: the newer version was kept.")
    assert console.api.get(f"/rate-limit-rules/{rule['id']}").json()["limits"] == ["8/hour"]
    one.context.close()
    other.context.close()


def test_a_long_list_of_rules_is_shown_in_parts_and_searched_as_a_whole(console: Console) -> None:
    tier = console.post("/tiers", name="many-rules")
    for number in range(60):
        console.post("/rate-limit-rules", tier=tier["name"], endpoint=f"/many/{number}/*", limits=["1/hour"])
    page = console.open("/policy?tier=many-rules")
    rows = page.locator("tbody tr")
    page.get_by_role("button", name="Show 10 more").wait_for()
    assert rows.count() == 50
    page.get_by_role("button", name="Show 10 more").click()
    page.locator("tbody").get_by_text("/many/59/*").first.wait_for()
    assert rows.count() == 60
    assert page.get_by_role("button", name=re.compile("more$")).count() == 0
    assert page.get_by_label("Rule", exact=True).locator("option").count() == 60
    page.get_by_label("Rules with").fill("/58/")
    page.locator("tbody tr:only-child").get_by_text("/many/58/*").first.wait_for()
    # A link to a rule that is not among the first ones.
    page.goto(f"{console.base}/policy?tier=many-rules&rule=/57/")
    page.locator("tbody tr:only-child").get_by_text("/many/57/*").first.wait_for()
    # A rule that another operator adds appears among the rows that are shown.
    console.post("/rate-limit-rules", tier=tier["name"], endpoint="/many/57/added", limits=["1/hour"])
    page.locator("tbody").get_by_text("/many/57/added").first.wait_for()
    page.context.close()


def test_a_whole_policy_is_tried_and_a_run_is_cancelled(console: Console, tmp_path: Path) -> None:
    console.any_key()
    log = tmp_path / "access.log"
    line = '203.0.113.{} - - [01/Nov/2026:10:{:02}:00 +0000] "GET /api/a HTTP/1.1" 200 1\n'
    log.write_text("".join(line.format(n % 3, n % 60) for n in range(9)))
    page = console.open("/policy?tier=free")
    page.get_by_label("What changes").select_option("policy")
    page.get_by_role("button", name="Begin with the policy as it is").click()
    while "[[tiers]]" not in page.get_by_label("Policy file").input_value():
        page.wait_for_timeout(100)
    page.get_by_label("Access log").set_input_files(str(log))
    page.get_by_label("Policy file").fill('[[tiers]]\nname = "free"\nlimits = ["1/fortnight"]\n')
    page.get_by_role("button", name="Try").click()
    see(page, "limit '1/fortnight'")
    page.get_by_label("Policy file").fill('[[tiers]]\nname = "free"\n[[tiers.rules]]\nendpoint = "/api/*"\nlimits = ["1/day"]\n')
    page.get_by_label("Tier of requests without a key").select_option("free")
    page.get_by_role("button", name="Try").click()
    see(page, "9 requests: 3 blocked as it is, 6 with the change.")
    large = tmp_path / "large.log"
    large.write_text("".join(line.format(n % 250, n // 4000 % 60) for n in range(60_000)))
    page.get_by_label("Access log").set_input_files(str(large))
    page.get_by_role("button", name="Try").click()
    page.get_by_role("button", name="Cancel").click()
    see(page, "Cancelled.")
    page.context.close()


def test_what_if_shows_who_would_be_hit(console: Console, tmp_path: Path) -> None:
    console.any_key()
    log = tmp_path / "access.log"
    log.write_text("".join(f'203.0.113.9 - - [01/Nov/2026:10:00:{n:02} +0000] "GET /api/a HTTP/1.1" 200 1\n' for n in range(9)))
    page = console.open("/policy?tier=free")
    page.get_by_label("New limits").fill("4/hour")
    page.get_by_label("Access log").set_input_files(str(log))
    page.get_by_role("button", name="Try").click()
    see(page, "9 requests: 7 blocked as it is, 5 with the change.")
    see(page, "Callers that would be hit first")
    page.context.close()


def test_nothing_that_others_wrote_is_read_as_markup(console: Console) -> None:
    console.any_key()
    name = HOSTILE[:190]
    key = console.post("/api-keys", tier="free", name=name)
    rule = {"tier": "free", "endpoint": "/x/*", "limits": ["1/hour"], "name": name, "subject": "user", "on_missing": "skip"}
    console.post("/rate-limit-rules", **rule)
    console.post("/customers", name="hostile", external_id=name, metadata={HOSTILE: HOSTILE}, match={"org": HOSTILE})
    console.post("/blocks", attribute={"user": HOSTILE}, until="2099-01-01T00:00:00Z", reason=HOSTILE, message=HOSTILE[:200])
    console.api.delete(f"/blocks/{console.api.get('/blocks').json()['items'][0]['id']}")
    console.post("/blocks", attribute={"other": HOSTILE}, reason=HOSTILE)
    for _ in range(3):
        console.check(key["api_key"], "/x/" + "%3Cscript%3Ealert(3)%3C/script%3E", attributes={"user": HOSTILE})
    console.wait_for_violation(name)
    page = console.open("/violations")
    for path in (
        "/violations",
        "/violations?by=rule",
        "/",
        "/callers",
        f"/callers?key={key['id']}&path=/x/%3Cb%3E",
        "/callers?subject=user%3D%3Cb%3E",
        "/callers?q=%3Cscript%3Ealert(4)%3C/script%3E",
        "/customers",
        "/customers?name=hostile",
        "/customers?name=%3Cscript%3E",
        "/policy?tier=free&rule=%3Cimg%20src=x%3E",
        "/audit?actor=%3Cscript%3E",
        "/audit",
    ):
        page.goto(console.base + path)
        settled(page)
        assert page.evaluate("document.querySelectorAll('main script, main img').length") == 0, path
    page.goto(f"{console.base}/callers")
    see(page, "onerror=alert(1)")
    page.context.close()


def test_a_viewer_sees_no_buttons_that_it_may_not_use(console: Console) -> None:
    viewer = console.post("/tokens", name="viewer of the console", role="viewer")
    key = console.any_key()
    page = console.open("/callers", token=viewer["token"])
    for path in ("/callers", f"/callers?key={key['id']}", "/customers", "/policy?tier=free", "/violations", "/audit"):
        page.goto(console.base + path)
        settled(page)
        buttons = set(page.get_by_role("button").all_inner_texts())
        assert buttons <= {"Sign out", "Find", "Explain", "Filter", "Next page", "Older"}, path
    page.context.close()


def test_pages_are_accessible_and_fit_small_screens_light_and_dark(console: Console) -> None:
    key = console.any_key()
    customer = console.post("/customers", name="small-screen", tier="free", external_id="crm-7", timezone="Europe/Berlin")
    console.post("/api-keys", customer=customer["name"], name="key of a customer")
    page = console.open(viewport={"width": 360, "height": 700}, color_scheme="light")
    script = axe()

    def assess(what: str) -> None:
        page.evaluate(script)
        assert page.evaluate(AXE, None) == [], what
        # Only colors depend on the scheme.
        page.emulate_media(color_scheme="dark")
        assert page.evaluate(AXE, ["color-contrast"]) == [], f"{what}, dark"
        page.emulate_media(color_scheme="light")

    for path in (*PAGES, f"/callers?key={key['id']}&path=/api/x", "/customers?name=small-screen"):
        page.goto(console.base + path)
        settled(page)
        page.locator("h1").first.wait_for()
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide <= 360, (path, wide)
        assess(path)
    page.goto(f"{console.base}/policy?tier=free")
    page.get_by_role("button", name="New rule").click()
    assess("a dialog")
    page.keyboard.press("Escape")
    # The keyboard alone: skip link, navigation, and back.
    page.goto(console.base + "/")
    page.get_by_role("link", name="Callers").focus()
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Callers").wait_for()
    assert page.evaluate("document.activeElement.tagName") == "H1"
    page.go_back()
    page.get_by_role("heading", name="Overview").wait_for()
    page.context.close()


def test_other_sites_can_neither_show_it_nor_use_its_session(console: Console, tmp_path: Path) -> None:
    page = console.open()
    before = console.api.get("/tiers").json()
    other = page.context.new_page()
    blocked: list[str] = []
    other.on("console", lambda message: blocked.append(message.text))
    # Another origin on another site, with the browser's cookies.
    other.goto(f"http://localhost:{console.server.port}/livez")
    other.evaluate(
        """(base) => new Promise((resolve) => {
          const frame = document.createElement("iframe");
          frame.onload = resolve; frame.src = base + "/"; document.documentElement.append(frame);
        })""",
        console.base,
    )
    assert any("frame" in text and console.base in text for text in blocked), blocked
    answers = other.evaluate(
        """async (base) => {
          const answers = [];
          for (const [mode, type] of [["cors", "application/json"], ["no-cors", "text/plain"]]) {
            try {
              const answer = await fetch(base + "/admin/v1/tiers",
                {method: "POST", mode, credentials: "include", headers: {"Content-Type": type}, body: '{"name": "made"}'});
              answers.push(answer.status);
            } catch (error) { answers.push("refused"); }
          }
          return answers;
        }""",
        console.base,
    )
    assert set(answers) <= {"refused", 0}
    assert console.api.get("/tiers").json() == before
    page.context.close()


def test_a_session_that_is_over_asks_to_sign_in_again(console: Console) -> None:
    page = console.open("/system")
    see(page, "Components")
    with sqlite3.connect(console.server.directory / "tidegate.db") as database:
        database.execute("DELETE FROM console_sessions")
    see(page, "The session is over. Sign in again.")
    page.context.close()


def test_holds_are_shown(console: Console) -> None:
    before = console.api.get("/system").json()["holds"]
    limits = {"namespace": "held", "subject": "me", "limits": ["10/day"], "ttl_s": 600}
    held = [console.checks.post("/v1/holds", json=limits).json()["hold"] for _ in range(3)]
    assert console.checks.post(f"/v1/holds/{held[0]}/settle", json={"cost": 1}).status_code == 200
    page = console.open("/system")
    section = page.locator("section", has=page.get_by_role("heading", name="Holds", exact=True))
    section.wait_for()
    for name, shown, more in (
        ("open", "open, of all instances", 2),
        ("opened", "opened here", 3),
        ("settled", "settled in time", 1),
    ):
        fact = section.locator("dl > div", has=page.get_by_text(shown, exact=True))
        fact.get_by_text(str(before[name] + more), exact=True).wait_for()
    see(page, "open holds")
    page.context.close()


def test_settings_are_shown_without_secrets(console: Console) -> None:
    text = json.dumps(console.api.get("/system").json())
    assert TOKEN not in text
    assert "(hidden)" in text
    page = console.open("/system")
    page.get_by_text("Settings in use").click()
    see(page, "admin.token")
    assert TOKEN not in page.content()
    page.context.close()


def test_the_command_line_explains_what_the_console_does(console: Console) -> None:
    console.any_key()
    key = console.post("/api-keys", tier="free", name="of the command line")
    ran = console.server.run("check", key["api_key"], "GET", "/api/x", "--explain")
    assert (ran.returncode, "-> /api/*: it matches" in ran.stdout) == (0, True), ran.stdout + ran.stderr
    assert key["api_key"] not in ran.stdout
    assert [console.check(key["api_key"], "/api/x") for _ in range(3)] == [200, 200, 429], "it charged nothing"
    ran = console.server.run("check", key["api_key"], "GET", "/api/x", "--explain", "--json")
    assert (ran.returncode, json.loads(ran.stdout)["allowed"]) == (1, False)


def test_the_demo_opens_signed_in_with_example_traffic(console: Console, tmp_path: Path) -> None:
    server = Serve(tmp_path, ("--demo",), admin=True)
    try:
        server.wait_ready()
        page = console.browser.new_page()
        page.set_default_timeout(PATIENCE_S * 1000)
        page.goto(f"http://127.0.0.1:{server.admin_port}/callers")
        page.get_by_role("link", name="partner import").click()
        see(page, "Counters now")
        page.get_by_role("row").filter(has_text="/api/orders/*").filter(has=page.get_by_label(re.compile("^[1-9]"))).wait_for()
        page.goto(f"http://127.0.0.1:{server.admin_port}/customers")
        page.get_by_role("link", name="acme").click()
        see(page, "100,000 / month (quota)")
        page.get_by_role("link", name="reports").wait_for()
        page.close()
        out = server.stop()[1]
        assert f"http://127.0.0.1:{server.admin_port}/" in out
    finally:
        server.stop()
