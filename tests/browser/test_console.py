"""What an operator does at the console, done in a real browser, before the running product."""

import re
import signal
import uuid

import psutil
import pytest
from playwright.sync_api import expect

from tests.stack import wait_for

from .console import expected_complaints

pytestmark = [pytest.mark.apache_kafka, pytest.mark.needs_tool("chromium"), pytest.mark.needs_tool("prometheus")]

SOON = 30_000  # ms: for what the processes do meanwhile, on a slow machine
EVENTS = "/admin/events_outbox/outboxevent/"
LETTERS = "/admin/events_outbox/deadletter/"
LISTS = {
    "events": EVENTS,
    "undeliverable": "/admin/events_outbox/undeliverableevent/",
    "dead-letters": LETTERS,
    "processed": "/admin/events_outbox/processedevent/",
    "workers": "/admin/events_outbox/worker/",
    "paused-consumers": "/admin/events_outbox/consumerpause/",
    "operator-actions": "/admin/events_outbox/operatoraction/",
    "relay": "/admin/events_outbox/relaycursor/",
    "conversations": "/admin/conversations/conversation/",
    "users": "/admin/identity/user/",
    "tokens": "/admin/identity/apitoken/",
    "documents": "/admin/knowledge/document/",
    "notifications": "/admin/notifications/notification/",
    "deliveries": "/admin/notifications/delivery/",
    "webhooks": "/admin/notifications/webhookendpoint/",
    "totals": "/admin/analytics/dailytotal/",
    "audit": "/admin/audit/auditentry/",
}


def event_of(product, aggregate):
    """The page of the first event of an aggregate, once it is emitted."""
    rows = product.sql("SELECT id FROM events_outbox_outboxevent WHERE aggregate_id = %s ORDER BY id", aggregate)
    return f"{EVENTS}{rows[0][0]}/change/"


def is_handled(product, aggregate):
    """Whether all three consumers are done with an aggregate's first event."""
    rows = product.sql(
        """SELECT count(*) FROM events_outbox_processedevent WHERE event_id =
           (SELECT event_id FROM events_outbox_outboxevent WHERE aggregate_id = %s ORDER BY id LIMIT 1)""",
        aggregate,
    )
    return rows[0][0] >= 3


def mark(console):
    """A mark that is gone when the page is loaded anew."""
    console.page.evaluate("window.notReloaded = true")


def is_marked(console):
    return console.page.evaluate("window.notReloaded === true")


def relay_process(product):
    return product.child("relay_outbox")


def test_the_first_page_says_that_all_is_well(product, window):
    console = window()
    expect(console.page).to_have_url(re.compile(r"/admin/$"))
    expect(console.page.locator("#state-line")).to_contain_text("Healthy", timeout=SOON)
    expect(console.page.locator('[data-panel="consumers"]')).to_contain_text("analytics")
    expect(console.page.locator('[data-figure="pending"]')).to_contain_text("0")


def test_a_conversation_completes_its_life_line_without_reload(product, window):
    console = window()
    relay = relay_process(product)
    relay.send_signal(signal.SIGSTOP)
    try:
        aggregate = product.conversation("Watch me")
        console.open(EVENTS)
        console.page.get_by_role("searchbox").or_(console.page.locator("#searchbar")).first.fill(aggregate)
        console.page.keyboard.press("Enter")
        console.page.locator("#result_list tbody tr").first.locator("a").first.click()
        expect(console.page.locator('[data-step="emitted"]')).to_be_visible()
        expect(console.page.locator('[data-step="published"]')).to_have_attribute("data-state", "pending")
        mark(console)
    finally:
        relay.send_signal(signal.SIGCONT)
    for consumer in ("analytics", "notification", "audit"):
        expect(console.page.locator(f'[data-consumer="{consumer}"]')).to_have_attribute(
            "data-state", "handled", timeout=SOON
        )
    expect(console.page.locator(".ev-record").first).to_contain_text("conversation.events", timeout=SOON)
    assert is_marked(console)


def test_the_overview_refreshes_itself_and_stops_while_it_is_hidden(product, window):
    console = window()
    asked = []
    console.page.on("request", lambda request: asked.append(request.url) if "fragment" in request.url else None)
    mark(console)
    wait_for(lambda: console.page.wait_for_timeout(100) or len(asked) >= 2, "two refreshes")
    hide = """hidden => {
        Object.defineProperty(document, "hidden", {value: hidden, configurable: true});
        Object.defineProperty(document, "visibilityState", {value: hidden ? "hidden" : "visible", configurable: true});
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    console.page.evaluate(hide, True)
    console.page.wait_for_load_state("networkidle")
    before = len(asked)
    console.page.wait_for_timeout(8_000)  # longer than a refresh takes to come: that none does has to be waited for
    assert len(asked) == before
    console.page.evaluate(hide, False)
    wait_for(lambda: console.page.wait_for_timeout(100) or len(asked) > before, "a refresh at once")
    assert is_marked(console)


def test_a_handler_that_breaks_and_a_replay(product, window):
    console = window()
    product.sql("ALTER TABLE analytics_dailytotal RENAME TO gone")
    try:
        aggregate = product.conversation("Break")
        found = "SELECT id FROM events_outbox_deadletter WHERE convert_from(key, 'UTF8') = %s AND resolution = ''"
        wait_for(lambda: product.sql(found, aggregate), "the dead letter", 60)
        (letter,) = product.sql(found, aggregate)[0]
        expect(console.page.locator("#state-line")).to_contain_text("dead letter", timeout=SOON, ignore_case=True)
        console.open(event_of(product, aggregate))
        expect(console.page.locator('[data-consumer="analytics"]')).to_have_attribute(
            "data-state", "dead-letter", timeout=SOON
        )
    finally:
        product.sql("ALTER TABLE gone RENAME TO analytics_dailytotal")
    console.open(f"{LETTERS}?state=open")
    console.page.locator(f'input[name="_selected_action"][value="{letter}"]').check()
    console.page.locator('select[name="action"]').select_option("replay")
    console.page.get_by_role("button", name="Run").click()
    console.page.get_by_role("button", name=re.compile("Replay")).click()  # the confirmation
    expect(console.page.get_by_text(re.compile("1 dead letters? replayed"))).to_be_visible()
    console.open(event_of(product, aggregate))
    expect(console.page.locator('[data-consumer="analytics"]')).to_have_attribute("data-state", "handled", timeout=SOON)
    trail = product.sql("SELECT by FROM events_outbox_operatoraction WHERE subject = %s", str(letter))
    assert ("alice",) in trail
    console.open("/admin/")
    expect(console.page.locator("#state-line")).not_to_contain_text("dead letter", timeout=SOON, ignore_case=True)


def test_the_state_line_when_the_broker_is_away(product, window):
    console = window()
    expect(console.page.locator("#state-line")).to_contain_text("Healthy", timeout=SOON)
    mark(console)
    brokers = [p for p in psutil.Process(product.process.pid).children(recursive=True) if p.name() == "java"]
    for broker in brokers:
        broker.suspend()
    try:
        aggregate = product.conversation("Wait")  # requests work all the same
        expect(console.page.locator("#state-line")).not_to_contain_text("Healthy", timeout=90_000)
        expect(console.page.locator("#state-line")).to_contain_text(re.compile("kafka|broker|pending", re.IGNORECASE))
    finally:
        for broker in brokers:
            broker.resume()
    wait_for(lambda: is_handled(product, aggregate), "the event handled", 60)
    expect(console.page.locator("#state-line")).to_contain_text("Healthy", timeout=90_000)
    assert is_marked(console)


def test_the_relay_is_paused_and_resumed(product, window):
    console = window("olga")
    console.page.locator('[data-panel="relay"]').get_by_role("link", name="Pause").click()
    console.page.get_by_role("textbox", name=re.compile("reason", re.IGNORECASE)).fill("maintenance")
    console.page.get_by_role("button", name=re.compile("Pause")).click()
    console.open("/admin/")
    expect(console.page.locator("#state-line")).to_contain_text("paused", timeout=SOON)
    expect(console.page.locator("#state-line")).to_contain_text("olga")
    console.page.locator('[data-panel="relay"]').get_by_role("link", name="Resume").click()
    console.page.get_by_role("button", name=re.compile("Resume")).click()
    console.open("/admin/")
    expect(console.page.locator("#state-line")).not_to_contain_text("paused", timeout=SOON)


class TestPermissions:
    def test_a_viewer_looks_and_does_nothing(self, product, window):
        aggregate = product.conversation("Secret title")
        wait_for(lambda: is_handled(product, aggregate), "the event handled")
        console = window("victor")
        expect(console.page.locator('[data-panel="relay"]').get_by_role("link", name="Pause")).to_have_count(0)
        console.open(event_of(product, aggregate))
        expect(console.page.locator("#payload")).not_to_contain_text("Secret title")
        expect(console.page.locator("#payload")).to_contain_text("permission")
        expect(console.page.locator("#replay")).to_have_count(0)
        console.open(EVENTS)
        expect(console.page.locator('select[name="action"]')).to_have_count(0)

    def test_who_sees_a_payload_is_noted(self, product, window):
        aggregate = product.conversation("Read by alice")
        wait_for(lambda: is_handled(product, aggregate), "the event handled")
        console = window()
        console.open(event_of(product, aggregate))
        expect(console.page.locator("#payload")).to_contain_text("Read by alice")
        viewed = "SELECT count(*) FROM events_outbox_operatoraction WHERE action = 'payload.viewed' AND by = 'alice'"
        assert product.sql(viewed)[0][0] >= 1

    def test_staff_of_a_tenant_see_their_own_alone(self, product, window):
        aggregate = product.conversation("Of tenant Demo")
        console = window("charlie")
        console.open(EVENTS)
        expect(console.page.locator("#result_list")).not_to_contain_text(aggregate[-12:])
        with expected_complaints(console, "404", "403"):
            console.open(event_of(product, aggregate))
            expect(console.page.locator("#payload")).to_have_count(0)


def test_light_and_dark_are_chosen_with_the_keyboard(product, window):
    console = window()
    background = "getComputedStyle(document.querySelector('main')).backgroundColor"
    light = console.page.evaluate(background)
    account = console.page.get_by_role("button", name=re.compile("alice"))
    account.focus()
    console.page.keyboard.press("Enter")
    dark = console.page.get_by_role("button", name="Dark")
    expect(dark).to_be_visible()
    dark.focus()
    console.page.keyboard.press("Enter")
    expect(console.page.locator("html")).to_have_class(re.compile("dark"))
    assert console.page.evaluate(background) != light
    console.page.reload()
    expect(console.page.locator("html")).to_have_class(re.compile("dark"))


def test_the_api_s_docs_are_read_and_tried(window):
    console = window()
    assert console.open("/api/v1/docs/") == 200
    operation = console.page.locator("#operations-tenant-tenant_retrieve")
    expect(operation).to_contain_text("/api/v1/tenant")
    operation.locator(".opblock-summary").click()
    operation.get_by_role("button", name="Try it out").click()
    operation.get_by_role("button", name="Execute").click()
    expect(operation.locator(".live-responses-table")).to_contain_text('"name": "Demo"')  # as whom the browser is


@pytest.fixture(scope="module")
def pages(product):
    """Every page, by name, with something on it."""
    for number in range(12):
        product.conversation(f"Conversation {number}")
    aggregate = product.conversation("A conversation with a title")
    product.post("/api/v1/messages", {"conversation_id": aggregate, "content": "Hello"})
    product.request(f"/api/v1/conversations/{aggregate}/complete", {"reason": "done"})
    wait_for(lambda: is_handled(product, aggregate), "the event handled")
    letters = make_letters(product)
    product.post("/api/v1/webhooks", {"url": f"{product.url}/api/v1/none", "description": "One that says no"})
    product.upload("delivery.txt", b"We deliver within three days.")
    wait_for(lambda: product.sql("SELECT id FROM notifications_delivery WHERE attempts > 0"), "a delivery tried")
    return {
        "overview": "/admin/",
        "event": event_of(product, aggregate),
        "dead-letter": f"{LETTERS}{letters}/change/",
        "replay": f"/admin/events_outbox/outboxevent/replay/?aggregate_id={aggregate}",
        **LISTS,
    }


def make_letters(product):
    """Have a dead letter that stays; returns its id."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": f"127.0.0.1:{product.env['KAFKA_PORT']}"})
    key = str(uuid.uuid4())
    producer.produce("conversation.events", key=key, value=b"<script>no event</script>")
    producer.flush(30)
    found = "SELECT id FROM events_outbox_deadletter WHERE key = convert_to(%s, 'UTF8') AND consumer = 'audit'"
    wait_for(lambda: product.sql(found, key), "the dead letter")
    return product.sql(found, key)[0][0]


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_every_page_can_be_used_by_everybody(product, window, pages, screenshots, look):
    console = window(dark=look == "dark", **({"width": 390, "height": 844} if look == "phone" else {}))
    found = []
    for name, path in pages.items():
        assert console.open(path) == 200, path
        console.page.wait_for_load_state("networkidle")
        console.page.screenshot(path=screenshots / f"{name}-{look}.png", full_page=look == "phone")
        for looked_for in (console.barriers, console.cut_off, console.hidden_text, console.raw_bytes):
            found += [f"{name}: {looked_for.__name__}: {each}" for each in looked_for()]
    assert not found, "\n".join(found)
