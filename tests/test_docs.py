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
BLOCKS = re.findall(r"^```(python|proto)\n(?:#|//) (shop/\S+)\n(.*?)^```$", GUIDE.read_text(), re.DOTALL | re.MULTILINE)
TESTS = re.findall(
    r"^def (test_\w+)", "".join(text for _, path, text in BLOCKS if path == "shop/tests.py"), re.MULTILINE
)
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


@pytest.fixture(scope="module")
def shop(tmp_path_factory, django_db_setup, django_db_blocker):
    """The module `shop.tests`; the app's event types, consumers and table are gone afterwards."""
    root = tmp_path_factory.mktemp("guide")
    (root / "shop" / "proto").mkdir(parents=True)
    (root / "shop" / "models.py").write_text(MODELS)
    (root / "shop" / "gateway.py").write_text(GATEWAY)
    for _, path, text in BLOCKS:
        with (root / path).open("a") as file:
            file.write(text)
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "-I.", "--python_out=.", "shop/proto/order.proto"]
    subprocess.run(protoc, cwd=root, check=True)
    types, upcasters, consumers = dict(catalog._catalog), dict(catalog._upcasters), dict(handlers._consumers)
    sys.path.insert(0, str(root))
    try:
        tests = importlib.import_module("shop.tests")
        with django_db_blocker.unblock():
            with connection.schema_editor() as editor:
                editor.create_model(tests.Invoice)
            yield tests
            with connection.schema_editor() as editor:
                editor.delete_model(tests.Invoice)
    finally:
        sys.path.remove(str(root))
        for registry, before in (
            (catalog._catalog, types), (catalog._upcasters, upcasters), (handlers._consumers, consumers)
        ):  # fmt: skip
            registry.clear()
            registry.update(before)


def test_every_block_is_part_of_the_app():
    assert len(BLOCKS) == len(re.findall(r"^```\w", GUIDE.read_text(), re.MULTILINE))
    assert len(TESTS) >= 7


@pytest.mark.parametrize("name", TESTS)
def test_the_guides_own_tests(shop, request, name):
    test = getattr(shop, name)
    is_transactional = any(mark.kwargs.get("transaction") for mark in getattr(test, "pytestmark", []))
    request.getfixturevalue("transactional_db" if is_transactional else "db")
    shop.Invoice.objects.all().delete()  # the table of no installed app: nobody else empties it
    parameters = test.__code__.co_varnames[: test.__code__.co_argcount]
    test(**{parameter: request.getfixturevalue(parameter) for parameter in parameters})
