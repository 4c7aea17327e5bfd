"""What two do at once: the second waits for the first, and finds what it has left."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta

import pytest
from django.db import connection, transaction

from tests.voicehelper.conftest import PASSWORD
from voicehelper.identity.models import ApiToken, User
from voicehelper.identity.services import (
    LastAdmin,
    TokenNotValid,
    UserInactive,
    change_role,
    create_token,
    deactivate_user,
    log_in,
    register_user,
    rotate_token,
)

pytestmark = pytest.mark.django_db(transaction=True)
# Not pg_stat_activity, which a transaction sees as it was at its first look.
WAITING = "SELECT count(*) FROM pg_locks WHERE NOT granted"


@contextmanager
def meanwhile(work):
    """Run the block in a transaction, and `work` in another once the block is through; yield what becomes of it.

    The block commits when the other waits for it, or has ended without.
    """

    def run():
        try:
            return work()
        except Exception as error:
            return error
        finally:
            connection.close()

    outcome = {}
    with ThreadPoolExecutor(1) as pool:
        with transaction.atomic():
            yield outcome
            future = pool.submit(run)
            deadline = time.monotonic() + 20
            while not future.done() and not _is_somebody_waiting():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            outcome["waited"] = not future.done()
        outcome["result"] = future.result(20)


def _is_somebody_waiting() -> bool:
    with connection.cursor() as cursor:
        cursor.execute(WAITING)
        return cursor.fetchone()[0] > 0


def demote(user):
    return change_role(user=user, role="member")


def deactivate(user):
    return deactivate_user(user=user)


@pytest.fixture
def erin(tenant):
    return register_user(tenant=tenant, username="erin", password=PASSWORD, role=User.Role.ADMIN)


@pytest.mark.parametrize("first", [demote, deactivate])
@pytest.mark.parametrize("second", [demote, deactivate])
def test_of_two_last_admins_one_stays(alice, erin, first, second, emitted):
    with meanwhile(lambda: second(erin)) as other:
        first(alice)
    assert other["waited"]
    assert isinstance(other["result"], LastAdmin)
    assert list(User.objects.filter(role="admin", is_active=True)) == [erin]
    assert len(emitted("identity.user.role.changed", "identity.user.deactivated")) == 1


def test_of_many_demotions_at_once_one_admin_is_left(tenant, emitted):
    admins = [
        register_user(tenant=tenant, username=f"admin-{n}", password=PASSWORD, role=User.Role.ADMIN) for n in range(8)
    ]

    def end(number):
        try:
            (demote, deactivate)[number % 2](admins[number])
        except LastAdmin:
            return False
        else:
            return True
        finally:
            connection.close()

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(end, range(8))) == 7
    assert User.objects.filter(role="admin", is_active=True).count() == 1
    assert len(emitted("identity.user.role.changed", "identity.user.deactivated")) == 7


@pytest.mark.parametrize(
    "get_token", [lambda user: create_token(user=user, name="laptop", scopes=["read"]), lambda user: log_in(user=user)]
)
def test_no_token_is_made_while_its_user_is_deactivated(alice, bob, get_token):
    with meanwhile(lambda: get_token(bob)) as other:
        deactivate_user(user=bob, by=alice)
    assert other["waited"]
    assert isinstance(other["result"], UserInactive)
    assert not ApiToken.objects.exists()


def test_a_token_made_just_before_the_deactivation_is_revoked_by_it(alice, bob, emitted):
    with meanwhile(lambda: deactivate_user(user=bob, by=alice)) as other:
        token, _ = create_token(user=bob, name="laptop", scopes=["read"])
    assert other["waited"]
    token.refresh_from_db()
    assert token.state == "revoked"
    assert len(emitted("identity.token.revoked")) == 1


def test_a_token_is_rotated_once(bob, emitted):
    token, _ = create_token(user=bob, name="laptop", scopes=["read"])
    with meanwhile(lambda: rotate_token(token=token, grace=timedelta(0))) as other:
        rotate_token(token=token, grace=timedelta(days=1))
    assert other["waited"]
    assert isinstance(other["result"], TokenNotValid)
    assert len(emitted("identity.token.rotated")) == 1
    assert ApiToken.objects.count() == 2
