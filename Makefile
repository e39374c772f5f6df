# Everything a newcomer or CI runs. `make demo` and `make test` need only Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP ?= $(BIN)/pip

# What is not installed is deselected here, never skipped; CI installs it all.
need = $(if $(shell command -v $(2)),, and not $(1))
MARKS := not image and not alertmanager$(call need,redis7,redis-server)$(call need,prometheus,promtool)$(call need,prometheus,prometheus)
MARKS += $(call need,npm,npm)$(call need,npm,node)
MARKS += $(call need,browser,chromium)$(call need,browser,node)$(call need,browser,npm)
# Debian keeps the server's binaries off the PATH.
MARKS += $(if $(wildcard /usr/lib/postgresql/*/bin/postgres),, and not postgres)
WORKERS ?= 2
# Without its dependencies: it asks for all of pydantic-ai, whose releases lag behind the slim ones.
PEER := pydantic-ai-stream==0.1.1

# Of no use in a test's output, nor beside a table.
export PYDANTIC_AI_NO_BANNER := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo example test check format docs docs-api docs-metrics docs-diagrams dashboards dashboards-preview console-preview helm chaos audit
.PHONY: bench image-check ops-check lock clean

help: ## Show the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 22

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -e '.[dev,docs,ops]'
	$(PIP) install --quiet --no-deps $(PEER)
	touch $@

demo: $(READY) ## Show the whole flow: agents, a sidecar, live output, and the numbers compared
	$(BIN)/agx demo

example: $(READY) ## Run examples/shop: a chat with workers, on this machine, until Ctrl-C
	$(BIN)/python examples/shop/run.py

test: $(READY) ## Run the tests (on real servers, which the packages bring along)
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m '$(MARKS)' $(ARGS)

check: $(READY) ## Lint, types, and generated files up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/python -m agx_sidecar.metrics.catalogue | diff - docs/metrics.md
	$(BIN)/python docs/api.py --check
	$(BIN)/python docs/diagrams.py --check
	$(BIN)/python -m dashboards --check
	$(BIN)/python helm/sync.py --check

format: $(READY) ## Format, and fix what can be fixed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY) ## Build the documentation's site into build/site; a link that leads nowhere fails it
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

docs-metrics: $(READY) ## Write docs/metrics.md from the sidecar's own catalogue
	$(BIN)/python -m agx_sidecar.metrics.catalogue > docs/metrics.md

docs-api: $(READY) ## Write the reference from the docstrings and the event catalogue
	$(BIN)/python docs/api.py

docs-diagrams: $(READY) ## Draw the Mermaid diagrams of the pages for the site (needs chromium and npm)
	$(BIN)/python docs/diagrams.py

dashboards: $(READY) ## Write the Grafana boards from their Python
	$(BIN)/python -m dashboards

dashboards-preview: $(READY) ## Draw the boards from live demo data (needs prometheus; ARGS=--grafana)
	$(BIN)/python -m dashboards.preview $(ARGS)

console-preview: $(READY) ## Draw the console from live demo runs (needs chromium)
	PYTHONPATH=tests $(BIN)/python -m support.console_picture

helm: $(READY) ## Copy boards and rules into the chart, and its values into its README
	$(BIN)/python helm/sync.py

chaos: $(READY) ## Inject faults and report what was kept (CHAOS_MINUTES, CHAOS_SEED)
	PYTHONPATH=tests $(BIN)/python -m chaos

audit: $(READY) ## Compare the metrics with a ledger of what happened, on a real Prometheus
	cd tests && ../$(BIN)/python -m audit

bench: $(READY) ## Measure beside the bare agent loop and the peer
	$(BIN)/python -m benchmarks

image-check: $(READY) ## Build the image without Docker and run it locked down (root; buildah, bubblewrap, debootstrap)
	$(BIN)/python -m pytest -v -s -m image tests/ops/test_image.py

ops-check: $(READY) ## Fire and resolve each alert through an Alertmanager (needs prometheus and prometheus-alertmanager)
	$(BIN)/python -m pytest -v -s -m alertmanager tests/ops/test_alertmanager.py

lock: $(READY) ## Lock the versions of the image's dependencies anew
	$(BIN)/uv pip compile pyproject.toml --quiet --upgrade --extra sidecar --universal --python-version 3.11 \
		--generate-hashes --no-annotate --custom-compile-command 'make lock' --output-file sidecar/requirements.txt

clean: ## Remove the environment and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis dist build
