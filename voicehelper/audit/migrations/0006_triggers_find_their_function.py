"""The triggers find the function that they ask also where the search path is another one, or empty.

So it is when a logical replica applies what was appended: it runs the chain's trigger for every row, and would stop.
"""

from django.db import migrations

SET = """
ALTER FUNCTION audit_refuse() SET search_path FROM CURRENT;
ALTER FUNCTION audit_chain_goes_on() SET search_path FROM CURRENT;
"""
RESET = """
ALTER FUNCTION audit_refuse() RESET search_path;
ALTER FUNCTION audit_chain_goes_on() RESET search_path;
"""


class Migration(migrations.Migration):
    dependencies = [("audit", "0005_find_by_type")]

    operations = [migrations.RunSQL(SET, RESET)]
