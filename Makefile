PYTHON ?= python3
VENV = .venv/bin/python

demo: .venv/ready
	$(VENV) train.py

test: .venv/ready
	$(VENV) -m pytest -q tests

test-all: .venv/ready
	$(VENV) -m pytest -q --slow tests

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install -q -r requirements.txt
	touch $@

.PHONY: demo test test-all
