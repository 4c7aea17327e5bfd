# Everything a developer types. `make` alone lists it.
PYTHON ?= python3.11
KAFKA ?= embedded
ARGS ?=
ONLY ?=
SECONDS ?= 600
SEED ?=
ADVISORIES ?=

VENV_PYTHON := .venv/bin/python
INSTALLED := .venv/installed
PROTOS := events_outbox/proto/*.proto voicehelper/proto/*.proto
PROTOC := $(VENV_PYTHON) -m grpc_tools.protoc -I .
COMPILE := .venv/bin/uv pip compile -q --no-emit-index-url --universal --python-version 3.11 --no-header
AUDIT = .venv/bin/pip-audit --disable-pip --no-deps --progress-spinner off $(ADVISORIES) -r requirements.txt -r requirements-dev.txt
# Checks that read the settings, and no running service, also while `make up` runs.
NO_SERVICES := DATABASE_URL=postgresql://127.0.0.1:1/unused KAFKA_BOOTSTRAP_SERVERS=127.0.0.1:1 MILVUS_URI=http://127.0.0.1:1
IS_3_11 := -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null

.DEFAULT_GOAL := help
.PHONY: help up test soak bench screenshots coverage lint audit format proto proto-check dashboards requirements clean

help: ## list what there is
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 22

up: $(INSTALLED) ## run everything on this machine; KAFKA=apache for Apache Kafka itself (Java 17, Maven)
	@exec $(VENV_PYTHON) -m voicehelper.devstack up --kafka $(KAFKA)

test: $(INSTALLED) ## the whole test suite; ARGS="-k relay -x" goes to pytest
	$(VENV_PYTHON) -m pytest $(ARGS)

soak: $(INSTALLED) ## relay and consumers under faults mixed for SECONDS=600 in all, then 500,000 events at once; SEED= repeats
	SOAK_SECONDS=$(SECONDS) SOAK_SEED=$(SEED) $(VENV_PYTHON) -m pytest -m soak -s $(ARGS) tests/faults/test_soak.py

bench: $(INSTALLED) ## speed and size, a table and build/bench.json; ONLY=relay is a part, DOC=1 writes docs/benchmarks.md
	$(VENV_PYTHON) -m tests.benchmarks $(ONLY) $(if $(DOC),--doc) $(if $(QUICK),--quick)

screenshots: $(INSTALLED) ## pictures of the admin's pages, into docs/screenshots, to be looked at before they are committed
	$(VENV_PYTHON) -m pytest -p no:randomly $(ARGS) tests/browser # in order: what came before is on the pictures
	mkdir -p docs/screenshots
	cp build/screenshots/*-light.png build/screenshots/overview-dark.png build/screenshots/overview-phone.png \
	    build/screenshots/event-phone.png docs/screenshots

coverage: $(INSTALLED) ## the test suite with branch coverage (of the test process, not of the processes it starts)
	.venv/bin/coverage run -m pytest $(ARGS)
	.venv/bin/coverage report --skip-covered --show-missing

lint: $(INSTALLED) proto-check ## style, types, known vulnerabilities, generated code, migrations, the API's description, deployment checks
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/bandit -q -c pyproject.toml -r events_outbox monitoring voicehelper manage.py
	@mkdir -p build; $(AUDIT) >build/audit.txt 2>&1 || ! grep -q '^Found .* known vulnerabilit' build/audit.txt \
	    || { cat build/audit.txt; exit 1; }
	@grep -q '^No known vulnerabilities' build/audit.txt \
	    && echo "pip-audit: no known vulnerability; $$(grep -c 'could not be audited' build/audit.txt) packages without advisories here" \
	    || echo "pip-audit: nothing audited, the advisories are out of reach: see build/audit.txt"
	$(NO_SERVICES) .venv/bin/mypy
	$(NO_SERVICES) $(VENV_PYTHON) -W ignore::RuntimeWarning manage.py makemigrations --check --dry-run
	$(NO_SERVICES) $(VENV_PYTHON) manage.py spectacular --validate --fail-on-warn --file /dev/null
	$(NO_SERVICES) VOICEHELPER_ENV=prod DJANGO_ALLOWED_HOSTS=example.org \
	    DJANGO_SECRET_KEY="$$($(VENV_PYTHON) -c 'import secrets; print(secrets.token_urlsafe(64))')" \
	    $(VENV_PYTHON) manage.py check --deploy --fail-level WARNING

audit: $(INSTALLED) ## known vulnerabilities of the pinned packages, as in lint, and a failure where one has no advisories to ask for
	$(AUDIT) --strict

format: $(INSTALLED) ## put the code into shape
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

proto: $(INSTALLED) ## generate the Protobuf code anew
	$(PROTOC) --python_out=. --pyi_out=. $(PROTOS)

proto-check: $(INSTALLED) # the committed Protobuf code is what the .proto files give
	@rm -rf build/proto && mkdir -p build/proto
	$(PROTOC) --python_out=build/proto --pyi_out=build/proto $(PROTOS)
	@cd build/proto && for file in $$(find . -name '*_pb2.py*'); do \
	    diff -u ../../$$file $$file || { echo "$$file is not up to date: run make proto"; exit 1; }; \
	done

dashboards: $(INSTALLED) ## write Grafana's dashboards anew
	$(VENV_PYTHON) -m monitoring.ops.grafana.dashboards

requirements: $(INSTALLED) ## pin requirements*.in anew
	$(COMPILE) requirements.in -o requirements.txt
	$(COMPILE) requirements-dev.in -o requirements-dev.txt

clean: ## remove what can be made again; .data/ (your data) stays
	rm -rf .venv build staticfiles .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(INSTALLED): requirements.txt requirements-dev.txt
	@$(VENV_PYTHON) $(IS_3_11) || $(PYTHON) $(IS_3_11) || { \
	    echo "This needs Python 3.11; '$(PYTHON)' is another version or not there."; \
	    echo "Install it, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.11"; exit 1; }
	@$(VENV_PYTHON) $(IS_3_11) || $(PYTHON) -m venv --clear .venv
	@echo "installing requirements into .venv (once)"
	@$(VENV_PYTHON) -m pip install -q --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	@touch $@
