"""The examples of docs/handlers.md, run for real: an app is made of them, and its tests are run here."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from django.db import connection

from events_outbox import catalog, handlers

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
