"""`python -m tests.benchmarks.job MODULE:FUNCTION ARGUMENTS`: the other end of `Bench.call()`."""

import importlib
import json
import os
import sys

import django

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "voicehelper.settings")
django.setup()
module, _, function = sys.argv[1].partition(":")
result = getattr(importlib.import_module(module), function)(**json.loads(sys.argv[2]))
print(f"\n{json.dumps(result)}")
