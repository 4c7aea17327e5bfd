import pytest
from django.core.exceptions import PermissionDenied
from django.db import connection
from django.test import override_settings
from django.urls import get_resolver

from tests.voicehelper.conftest import assert_problem


@pytest.mark.parametrize("path", ["/api/v1/nothing", "/api/nothing", "/api/v1/conversations/"])
def test_an_unknown_path_of_the_api(client, db, path):
    problem = assert_problem(client.get(path), 404)
    assert problem["title"] == "Not Found"


def test_an_unknown_path_elsewhere_is_a_page(client, db):
    answer = client.get("/nothing")
    assert answer.status_code == 404
    assert answer["Content-Type"].startswith("text/html")


def test_the_caller_s_correlation_id_comes_back(api, bob):
    answer = api(bob).get("/api/v1/nothing", headers={"X-Correlation-ID": "my-request-7"})
    assert assert_problem(answer, 404)["correlation_id"] == "my-request-7"


def test_an_unexpected_error_is_a_problem_without_inner_details(api, bob):
    client = api(bob)
    with connection.cursor() as cursor:
        cursor.execute("DROP TABLE analytics_dailytotal")
    answer = client.get("/api/v1/analytics/summary")
    assert_problem(answer, 500)
    assert b"dailytotal" not in answer.content


def test_what_django_forbids_under_the_api(rf):
    forbid = get_resolver().resolve_error_handler(403)
    answer = forbid(rf.get("/api/v1/conversations"), PermissionDenied())
    assert (answer.status_code, answer["Content-Type"]) == (403, "application/problem+json")
    assert forbid(rf.get("/elsewhere"), PermissionDenied())["Content-Type"].startswith("text/html")


@override_settings(ALLOWED_HOSTS=["example.com"])
def test_a_host_that_is_not_ours(client, db):
    assert_problem(client.get("/api/v1/conversations"), 400)


def test_a_representation_that_is_not_offered(api, bob):
    assert_problem(api(bob).get("/api/v1/conversations", headers={"Accept": "text/html"}), 406)
