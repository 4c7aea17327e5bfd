"""The console as a person has it: a browser that is logged in, and what the browser complains of."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

LOADING_SECONDS = 20
RAW_BYTES = re.compile(r"""\\x[0-9a-f]{2}|\\[0-7]{3}|\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f]|\bb['"]""")


class Console:
    """One person's browser window. `complaints`: errors, refusals of the policy and requests to elsewhere, as seen."""

    def __init__(self, browser: Browser, url: str, *, width: int = 1440, height: int = 900, dark: bool = False) -> None:
        self.url = url
        self.complaints: list[str] = []
        scheme = "dark" if dark else "light"
        self._context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        self.page: Page = self._context.new_page()
        self.page.set_default_timeout(LOADING_SECONDS * 1000)
        self.page.on("console", lambda line: line.type in ("error", "warning") and self._complain(line.text))
        self.page.on("pageerror", lambda error: self._complain(f"uncaught: {error}"))
        self.page.on("request", lambda request: self._look_at(request.url))

    def close(self) -> None:
        self._context.close()

    def log_in(self, username: str, password: str) -> None:
        self.page.goto(f"{self.url}/admin/")
        self.page.get_by_label("Username").fill(username)
        self.page.get_by_label("Password", exact=False).first.fill(password)
        self.page.get_by_role("button", name="Log in").click()
        expect(self.page.locator("main#main")).to_be_visible()

    def open(self, path: str) -> int:
        """Go to a page; returns its HTTP status."""
        answer = self.page.goto(f"{self.url}{path}", wait_until="load")
        assert answer is not None
        return answer.status

    def barriers(self) -> list[str]:
        """What axe-core finds on the page that keeps somebody from using it."""
        found = Axe().run(self.page).response["violations"]
        return [
            f"{each['id']} ({each['impact']}): {node['html'][:160]}  {node['failureSummary'][:300]}"
            for each in found
            for node in each["nodes"]
        ]

    def cut_off(self) -> list[str]:
        """What stands out of the page at the right, so that a phone has to scroll sideways."""
        return self.page.evaluate(
            """() => {
                const width = document.documentElement.clientWidth, found = [];
                if (document.documentElement.scrollWidth <= width + 1) return found;
                for (const element of document.querySelectorAll("main *")) {
                    const box = element.getBoundingClientRect();
                    if (box.width && box.right > width + 1) found.push(element.outerHTML.slice(0, 120));
                }
                return found.slice(0, 5);
            }"""
        )

    def hidden_text(self) -> list[str]:
        """Text that its own box cuts off, but for what ends in an ellipsis or is there to be read out alone."""
        return self.page.evaluate(
            """() => [...document.querySelectorAll("main *")].filter(element => {
                const style = getComputedStyle(element);
                return element.clientWidth > 1 && style.overflowX !== "visible" && style.overflowX !== "auto"
                    && style.overflowX !== "scroll" && style.textOverflow !== "ellipsis"
                    && element.innerText && element.scrollWidth > element.clientWidth + 1;
            }).map(element => element.outerHTML.slice(0, 160))"""
        )

    def raw_bytes(self) -> list[str]:
        """What on the page is bytes where a person wants to read: escapes, control and replacement characters."""
        return RAW_BYTES.findall(self.page.evaluate("document.body.innerText"))

    def _complain(self, text: str) -> None:
        self.complaints.append(text)

    def _look_at(self, url: str) -> None:
        if urlsplit(url).scheme in ("http", "https", "ws", "wss") and not url.startswith(self.url):
            self._complain(f"request to elsewhere: {url}")


@contextmanager
def expected_complaints(console: Console, *texts: str) -> Iterator[None]:
    """Forget complaints with these texts that come within the block, as when a test takes a server away."""
    before = len(console.complaints)
    yield
    console.complaints[before:] = [
        complaint for complaint in console.complaints[before:] if not any(text in complaint for text in texts)
    ]
