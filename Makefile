PYTHON ?= python3
VENV = .venv/bin/python
METHOD = tests/test_data.py tests/test_model.py tests/test_packed.py tests/test_qrm.py tests/test_rewards.py \
         tests/test_reinforce.py tests/test_ppo.py tests/test_house.py tests/test_readme.py tests/test_tables.py
LONG = tests/test_train.py tests/test_trust.py tests/test_exercises.py tests/test_walkthrough.py tests/test_device.py
SEEDS = 0 1 2 3 4
MINUTES = 240

demo: .venv/ready
	$(VENV) train.py

test: .venv/ready
	@echo "make test: all tests, about 4 minutes on two cores (make quick: the method's own, under a minute)"
	@$(MAKE) -s -j2 test-long test-others

# The two halves of make test, which run side by side.
test-long: .venv/ready
	$(VENV) -m pytest -q $(LONG)

test-others: .venv/ready
	$(VENV) -m pytest -q $(filter-out $(LONG), $(sort $(wildcard tests/test_*.py)))

quick: .venv/ready
	@echo "make quick: the method's own tests, under a minute"
	$(VENV) -m pytest -q $(METHOD)

test-all: .venv/ready
	@echo "make test-all: also the long tests, about 15 minutes on two cores"
	$(VENV) -m pytest -q --slow tests

# The tables and figures of README.md and the chapters that need no real weights; call again to continue. The two
# large studies take at most MINUTES each a call.
# (Single runs, such as those of reward hacking, have their commands in the chapters.)
results: .venv/ready $(SEEDS:%=runs/seed%/done) $(SEEDS:%=runs/carry%/done)
	$(VENV) classroom/demo_table.py $(SEEDS:%=runs/seed%) --write
	$(VENV) classroom/demo_table.py $(SEEDS:%=runs/carry%) --carry --write
	$(VENV) classroom/carry_credit.py $(SEEDS:%=runs/carry%) > runs/carry_credit.txt
	$(VENV) classroom/partition.py runs/seed0 --pairs 12 > runs/partition.txt
	$(VENV) classroom/probes.py $(SEEDS:%=runs/seed%) --parts samples sizes > runs/probes.txt
	$(VENV) classroom/probes.py runs/seed0 runs/seed1 runs/seed2 --parts shaping >> runs/probes.txt
	$(VENV) train.py --run_dir runs/seed0 --stage rm --reward verifier
	$(VENV) train.py --run_dir runs/seed0 --stage rm --reward dpo
	$(VENV) classroom/credit.py runs/seed0 --answers 80 --rollouts 16 --picture classroom/calibration.png \
	    > runs/credit.txt
	$(VENV) classroom/guided.py runs/seed0 --limit 100 --coefs 0.2 0.5 1 5 > runs/guided.txt
	$(VENV) classroom/tabular.py > runs/tabular.txt
	$(VENV) classroom/tabular.py --share 0.2 --batch 64 --steps 100 >> runs/tabular.txt
	$(VENV) classroom/theory.py > runs/theory.txt
	$(VENV) classroom/study.py --curves runs/seed0 --out runs/curves
	$(VENV) classroom/bench.py > runs/bench.jsonl
	$(VENV) classroom/granularity.py --minutes $(MINUTES)
	$(VENV) classroom/granularity.py --write
	$(VENV) classroom/pictures.py
	$(VENV) classroom/study.py --minutes $(MINUTES) --out runs/study

ORM = --reward orm --lam 1 --kl_coef 0.2
GRADED = --reward outcome --lam 1 --kl_coef 0.2
GRPO = --reward outcome --advantage grpo --group_size 8 --kl_coef 0.2

# The demo of one seed, and its baselines: PPO on an outcome reward model of the same pairs, and on grades.
runs/seed%/done: R = runs/seed$*
runs/seed%/done: RUN = $(VENV) train.py --seed $* --run_dir runs/seed$*
runs/seed%/done: | .venv/ready
	$(RUN)
	$(RUN) --stage rm --reward orm
	$(RUN) --stage ppo $(ORM) --reward_model $R/rm-orm --out $R/ppo-orm
	$(RUN) --stage ppo $(GRADED) --out $R/ppo-outcome
	$(RUN) --stage reinforce $(GRPO) --out $R/grpo
	$(RUN) --stage eval
	touch $@

# The same for the carry task (classroom/carry.md).
runs/carry%/done: R = runs/carry$*
runs/carry%/done: RUN = $(VENV) train.py --preset tiny --seed $* --run_dir runs/carry$*
runs/carry%/done: PAIRS = --model $R/sft --data $R/pairs.jsonl --heldout $R/pairs-heldout.jsonl --steps 150
runs/carry%/done: PROMPTS = --model $R/sft --data $R/data/prompts.jsonl --heldout $R/data/heldout.jsonl
runs/carry%/done: | .venv/ready
	$(VENV) classroom/carry.py $R/data --seed $*
	$(RUN) --stage sft --data $R/data/sft.jsonl
	$(RUN) --stage pairs $(PROMPTS)
	$(RUN) --stage rm $(PAIRS)
	$(RUN) --stage rm $(PAIRS) --reward orm
	$(RUN) --stage reinforce $(PROMPTS) --reward_model $R/rm
	$(RUN) --stage ppo $(PROMPTS) --reward_model $R/rm
	$(RUN) --stage ppo $(PROMPTS) $(ORM) --reward_model $R/rm-orm --out $R/ppo-orm
	$(RUN) --stage ppo $(PROMPTS) $(GRADED) --out $R/ppo-outcome
	$(RUN) --stage reinforce $(PROMPTS) $(GRPO) --out $R/grpo
	for policy in sft reinforce ppo ppo-orm ppo-outcome grpo; do \
	    $(RUN) --stage eval --model $R/$$policy --reward_model $R/rm --data $R/data/heldout.jsonl || exit; \
	done
	touch $@

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(VENV) -m pip install -q -r requirements.txt
	touch $@

.PHONY: demo test test-long test-others quick test-all results
