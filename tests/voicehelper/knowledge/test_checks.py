import pytest
from django.core.checks import run_checks


@pytest.mark.parametrize(
    ("is_dev", "uri", "count"),
    [(True, "data/milvus.db", 0), (False, "data/milvus.db", 1), (False, "http://milvus:19530", 0)],
)
def test_production_shares_one_milvus(settings, change, is_dev, uri, count):
    settings.IS_DEV = is_dev
    change(milvus_uri=uri)
    errors = run_checks(tags=["knowledge"])
    assert [error.id for error in errors] == ["knowledge.E001"] * count
