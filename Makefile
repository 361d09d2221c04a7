PYTHON ?= python3
VENV = .venv/bin/python
METHOD = tests/test_data.py tests/test_model.py tests/test_packed.py tests/test_qrm.py tests/test_rewards.py \
         tests/test_reinforce.py tests/test_ppo.py tests/test_house.py tests/test_readme.py tests/test_tables.py
SEEDS = 0 1 2 3 4

demo: .venv/ready
	$(VENV) train.py

test: .venv/ready
	@echo "make test: all tests, 6 to 7 minutes on two cores (make quick: the method's own, under a minute)"
	$(VENV) -m pytest -q tests

quick: .venv/ready
	@echo "make quick: the method's own tests, under a minute"
	$(VENV) -m pytest -q $(METHOD)

test-all: .venv/ready
	@echo "make test-all: also the long tests, about 15 minutes on two cores"
	$(VENV) -m pytest -q --slow tests

# Every table and figure of README.md and the chapters that a laptop can make; call again to continue.
results: .venv/ready $(SEEDS:%=runs/seed%/done)
	$(VENV) classroom/demo_table.py $(SEEDS:%=runs/seed%) --write
	$(VENV) classroom/pictures.py
	$(VENV) classroom/theory.py > runs/theory.txt
	$(VENV) classroom/study.py --curves runs/seed0 --out runs/curves
	$(VENV) classroom/bench.py > runs/bench.jsonl
	$(VENV) classroom/study.py --minutes 240 --out runs/study

# The demo of one seed, and its baseline: PPO on an outcome reward model of the same pairs, lambda 1.
runs/seed%/done: | .venv/ready
	$(VENV) train.py --seed $* --run_dir runs/seed$*
	$(VENV) train.py --stage rm --reward orm --seed $* --run_dir runs/seed$*
	$(VENV) train.py --stage ppo --reward orm --reward_model runs/seed$*/rm-orm --lam 1 \
	    --seed $* --run_dir runs/seed$* --out runs/seed$*/ppo-orm
	$(VENV) train.py --stage eval --seed $* --run_dir runs/seed$*
	touch $@

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install -q -r requirements.txt
	touch $@

.PHONY: demo test quick test-all results
