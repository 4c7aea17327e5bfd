"""The product as `make up` starts it, with Apache Kafka and Prometheus, and Chromium before it."""

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psycopg
import pytest
from playwright.sync_api import Browser, sync_playwright

from tests.stack import Stack
from voicehelper.services import BASE_DIR

from .console import Console

PASSWORD = "demo-password"
FLAGS = [
    "--headless",
    "--no-sandbox",  # it is our own page, and root may not have one
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


class Product(Stack):
    """The running product and what goes on in it."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.env['WEB_PORT']}"

    def post(self, path: str, body: dict[str, str]) -> dict[str, str]:
        status, text = self.request(path, body)
        assert status < 300, text
        return httpx.Response(status, text=text).json()

    def upload(self, name: str, content: bytes) -> None:
        headers = {"Authorization": f"Token {self.token()}"}
        answer = httpx.post(f"{self.url}/api/v1/documents", files={"file": (name, content)}, headers=headers)
        assert answer.status_code == 201, answer.text

    def conversation(self, title: str = "Hello") -> str:
        """Post a conversation; returns its id."""
        return self.post("/api/v1/conversations", {"title": title, "mode": "chat"})["id"]

    def manage(self, *arguments: str) -> str:
        done = self.run(sys.executable, "manage.py", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def sql(self, statement: str, *parameters: object) -> list[tuple[object, ...]]:
        url = json.loads((self.data_dir / "services.json").read_text())["database_url"]
        with psycopg.connect(url, autocommit=True) as session:
            cursor = session.execute(statement.encode(), parameters or None)
            return cursor.fetchall() if cursor.description else []


PEOPLE = """
from django.contrib.auth.models import Group
from voicehelper.identity.models import Tenant, User

for name, role, tenant in (("victor", "Viewer", None), ("olga", "Operator", None), ("charlie", "Operator", "Other")):
    user, _ = User.objects.get_or_create(username=name)
    user.tenant = Tenant.objects.get(name=tenant) if tenant else None
    user.is_staff = True
    user.set_password("demo-password")
    user.save()
    user.groups.set(Group.objects.filter(name=role))
"""
"""Besides alice: a viewer and an operator of all tenants, and the operator of one."""


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Product]:
    product = Product(tmp_path_factory.mktemp("product"))
    product.env["JAEGER_URL"] = "http://127.0.0.1:16686"
    try:
        product.start("--kafka", "apache")
        product.manage("shell", "-c", PEOPLE)
        yield product
    finally:
        if product.process and product.process.poll() is None:
            product.end(signal.SIGTERM)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def window(product: Product, browser: Browser) -> Iterator[Callable[..., Console]]:
    """Open a window, by default as alice, who may do everything. In the end none has had anything to complain of."""
    opened: list[Console] = []

    def open_window(username: str | None = "alice", **look: object) -> Console:
        console = Console(browser, product.url, **look)  # type: ignore[arg-type]
        opened.append(console)
        if username:
            console.log_in(username, PASSWORD)
        return console

    yield open_window
    complaints = [complaint for console in opened for complaint in console.complaints]
    for console in opened:
        console.close()
    assert complaints == []


@pytest.fixture
def screenshots() -> Path:
    """Where pictures of the pages go: `make screenshots` keeps some."""
    directory = BASE_DIR / "build/screenshots"
    directory.mkdir(parents=True, exist_ok=True)
    return directory
