import json
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError

from voicehelper.audit.verification import UnknownTenant, Verified, as_json, guards_off, tenants, verify


class Command(BaseCommand):
    help = (
        "Read the audit log's hash chains and find any entry that was changed, removed, inserted or moved; name the "
        "first wrong position of each tenant. Exit status 0: all is as it was written, 1: it is not, or a trigger that "
        "keeps the log append-only is switched off, 2: it could not be read. Keep the output of --json elsewhere: an "
        "end that was cut off together with the row that says where the chain ends shows only --against an earlier one."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--tenant", metavar="ID", help="this tenant alone")
        parser.add_argument("--json", action="store_true", help="one JSON object a tenant and line")
        parser.add_argument(
            "--against", type=Path, metavar="FILE", help="an earlier output of --json: what was whole must still be so"
        )

    def handle(self, **options: Any) -> None:
        broken = 0
        kept = _kept(options["against"]) if options["against"] else {}
        try:
            for tenant_id in [options["tenant"]] if options["tenant"] is not None else sorted({*tenants(), *kept}):
                verified = verify(tenant_id, kept.get(tenant_id))
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


def _kept(path: Path) -> dict[str, tuple[int, str]]:
    """Tenant -> position and hash of its last entry, where the chain was whole."""
    kept = {}
    try:
        for told in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            if told["is_whole"]:
                kept[str(told["tenant_id"])] = int(told["position"]), str(told["hash"])
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}", returncode=2) from None
    except (ValueError, KeyError, TypeError):
        raise CommandError(f"{path} is not what --json writes", returncode=2) from None
    return kept


def _line(verified: Verified) -> str:
    if verified.bad_position is not None:
        return f"{verified.tenant_id}: BAD at position {verified.bad_position}: {verified.what}"
    begins = f" after position {verified.begins_after}" if verified.begins_after else ""
    return f"{verified.tenant_id}: {verified.entries} entries{begins}, last hash {verified.hash}"
