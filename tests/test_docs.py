"""The documents: the examples of docs/handlers.md run for real, names and links lead to what there is."""

import importlib
import pkgutil
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from django.db import connection

from events_outbox import catalog, handlers
from monitoring.conf import MonitoringSettings

GUIDE = Path(__file__).parent.parent / "docs" / "handlers.md"
BLOCK = re.compile(r"^```(?:python|proto)\n(?:#|//) (shop/\S+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TEST = re.compile(r"^(@pytest.mark.django_db\(transaction=True\)\n)?def (test_\w+)", re.MULTILINE)
BLOCKS = BLOCK.findall(GUIDE.read_text())
TESTS = TEST.findall("".join(text for path, text in BLOCKS if path == "shop/tests.py"))
# What the guide takes for granted.
MODELS = """
from django.db import models

class Invoice(models.Model):
    order_id = models.CharField(max_length=36)
    cents = models.BigIntegerField()
    currency = models.CharField(max_length=3)

    class Meta:
        app_label = "shop"
"""
GATEWAY = """
shipped = []
_known = set()

def ship(order_id, *, idempotency_key):
    if idempotency_key not in _known:
        _known.add(idempotency_key)
        shipped.append(order_id)

def count(number):
    pass
"""


REGISTRIES = (catalog._catalog, catalog._upcasters, handlers._consumers)


@pytest.fixture(scope="session")
def guide(tmp_path_factory, django_db_setup, django_db_blocker):
    """The module `shop.tests`, and what the app has registered; taken out again."""
    root = tmp_path_factory.mktemp("guide")
    (root / "shop" / "proto").mkdir(parents=True)
    (root / "shop" / "models.py").write_text(MODELS)
    (root / "shop" / "gateway.py").write_text(GATEWAY)
    for path, text in BLOCKS:
        with (root / path).open("a") as file:
            file.write(text)
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.", "shop/proto/order.proto"]
    subprocess.run(protoc, cwd=root, check=True)
    before = [dict(registry) for registry in REGISTRIES]
    sys.path.insert(0, str(root))
    try:
        tests = importlib.import_module("shop.tests")
    finally:
        sys.path.remove(str(root))
    registered = []
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registered.append({key: registry.pop(key) for key in set(registry) - set(entries)})
    with django_db_blocker.unblock(), connection.schema_editor() as editor:
        editor.create_model(tests.Invoice)
    return tests, registered


@pytest.fixture
def shop(guide, monkeypatch):
    """The module `shop.tests`, with its app in place for one test."""
    tests, registered = guide
    for registry, entries in zip(REGISTRIES, registered, strict=True):
        for key, entry in entries.items():
            monkeypatch.setitem(registry, key, entry)
    return tests


def test_every_block_is_part_of_the_app():
    assert len(BLOCKS) == len(re.findall(r"^```\w", GUIDE.read_text(), re.MULTILINE))
    assert len(TESTS) >= 7


# Which tests use the database how, and so when they run, is to be known before the module is imported.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.django_db(transaction=bool(mark))) for mark, name in TESTS]
)
def test_the_guides_own_tests(shop, request, name):
    shop.Invoice.objects.all().delete()  # the table of no installed app: nobody else empties it
    test = getattr(shop, name)
    parameters = test.__code__.co_varnames[: test.__code__.co_argcount]
    test(**{parameter: request.getfixturevalue(parameter) for parameter in parameters})


MONITORING_GUIDE = GUIDE.parent / "monitoring.md"
IMPORT = re.compile(r"^from (monitoring[\w.]*) import (.+)$", re.MULTILINE)
NAMED = re.compile(r"`(monitoring(?:\.\w+)+)(?:\(\))?`")


@pytest.mark.parametrize("module,names", IMPORT.findall(MONITORING_GUIDE.read_text()))
def test_the_monitoring_guide_imports_what_there_is(module, names):
    for name in names.split(","):
        assert hasattr(importlib.import_module(module), name.strip())


@pytest.mark.parametrize("path", sorted(set(NAMED.findall(MONITORING_GUIDE.read_text()))))
def test_the_monitoring_guide_names_what_there_is(path):
    try:
        pkgutil.resolve_name(path)
    except AttributeError:
        importlib.import_module(path)


def test_the_monitoring_guide_has_every_setting():
    text = MONITORING_GUIDE.read_text() + (GUIDE.parent.parent / "README.md").read_text()
    missing = [one.name.upper() for one in fields(MonitoringSettings) if f"`{one.name.upper()}`" not in text]
    assert missing == []


@pytest.mark.parametrize(
    "document",
    ["README.md", "docs/handlers.md", "docs/monitoring.md", "docs/runbook.md", "docs/benchmarks.md", "docs/console.md"],
)
def test_links_lead_somewhere(document):
    root = GUIDE.parent.parent
    file = root / document
    for target in re.findall(r"\]\(([^)\s]+)\)", file.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (file.parent / path) if path else file
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}, target
