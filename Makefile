# make demo, make test, make lint, make notebook: each makes the environment it needs (.venv) and starts at once the second time.
PYTHON ?= $(firstword $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && echo $$p; done))
RUN := .venv/bin/python
READY := .venv/.ready

.PHONY: demo test test-slow test-easydistill lint notebook bench-demo micro setup clean

setup: $(READY)

# Without ensurepip (Debian without python3-venv, Colab) the environment is filled by the pip of the Python that made it.
$(READY): requirements.txt constraints.txt requirements-dev.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; say which: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "Making .venv with $(PYTHON): once, a few minutes"
	@test -x $(RUN) || $(PYTHON) -m venv --without-pip .venv
	@$(PYTHON) -m pip --python $(RUN) install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt -c constraints.txt
	@touch $@

demo: $(READY)
	@$(RUN) distill_app.py demo

test: $(READY)
	@$(RUN) -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(READY)
	@$(RUN) -m pytest

# Needs the real EasyDistill: EASYDISTILL_HOME=CHECKOUT_OF_1.0:CHECKOUT_OF_2.0 make test-easydistill (MAJORS=1 for the first alone)
MAJORS ?= 1 2
test-easydistill: $(READY)
	@$(RUN) distill_app.py setup-easydistill $(MAJORS)
	@$(RUN) -m pytest -m easydistill

lint: $(READY)
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .

notebook: $(READY)
	@$(RUN) benchmarks/run_notebook.py

bench-demo: $(READY)
	@$(RUN) benchmarks/bench_demo.py

micro: $(READY)
	@$(RUN) distill_app.py build-micro

clean:
	rm -rf .venv .train-env .easydistill runs reports .pytest_cache .ruff_cache
