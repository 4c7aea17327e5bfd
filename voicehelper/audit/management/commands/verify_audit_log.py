import json
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError

from voicehelper.audit.verification import UnknownTenant, Verified, as_json, guards_off, tenants, verify


class Command(BaseCommand):
    help = (
        "Read the audit log's hash chains and find any entry that was changed, removed, inserted or moved; name the "
        "first wrong position of each tenant. Exit status 0: all is as it was written, 1: it is not, or a trigger that "
        "keeps the log append-only is switched off, 2: it could not be read. Keep the output of --json elsewhere: an "
        "end that was cut off together with the row that says where the chain ends shows only against an earlier one."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--tenant", metavar="ID", help="this tenant alone")
        parser.add_argument("--json", action="store_true", help="one JSON object a tenant and line")

    def handle(self, **options: Any) -> None:
        broken = 0
        try:
            for tenant_id in [options["tenant"]] if options["tenant"] is not None else tenants():
                verified = verify(tenant_id)
                broken += verified.bad_position is not None
                self.stdout.write(json.dumps(as_json(verified)) if options["json"] else _line(verified))
            off = guards_off()
        except UnknownTenant as error:
            raise CommandError(str(error), returncode=2) from None
        except DatabaseError as error:
            raise CommandError(f"the log could not be read: {str(error).strip()}", returncode=2) from error
        wrong = [f"the trigger {trigger} is switched off or gone" for trigger in off]
        if broken:
            wrong.append(f"the log of {broken} {'tenant is' if broken == 1 else 'tenants are'} not what was written")
        if wrong:
            raise CommandError("; ".join(wrong))


def _line(verified: Verified) -> str:
    if verified.bad_position is not None:
        return f"{verified.tenant_id}: BAD at position {verified.bad_position}: {verified.what}"
    begins = f" after position {verified.begins_after}" if verified.begins_after else ""
    return f"{verified.tenant_id}: {verified.entries} entries{begins}, last hash {verified.hash}"
