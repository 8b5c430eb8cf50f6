# `make demo` and `make test` are all a newcomer needs: both set everything up first.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test lint types docs bench evidence clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt tests/requirements-no-deps.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,lint]'
	$(BIN)/python -m pip install --quiet --no-deps -r tests/requirements-no-deps.txt
	touch $@

demo: setup
	$(BIN)/tadrop demo

# In two parts: what compares executors bit for bit is compiled as users compile it, the rest in a hurry (conftest.py).
test: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile -m optimised
	$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not optimised'

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: setup
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	$(BIN)/mkdocs build --strict

bench: setup
	$(BIN)/python -m benchmarks --quick

# The image tasks that were merged first, 14, 20 and 30 of them; vision_tasks.py has those that took their place.
EARLIER_14 := mnist kmnist cifar10 gtsrb caltech101 turned_fashion_mnist turned_scenes turned_cifar10 \
	turned_caltech101 gtsrb_speed gtsrb_danger tiny_0 tiny_1 dtd10
EARLIER_20 := $(EARLIER_14) tiny_2 tiny_3 gtsrb_mandatory caltech_0 caltech_1 caltech_2
EARLIER_30 := $(EARLIER_20) tiny_4 tiny_5 caltech_3 caltech_4 pacs_photo pacs_art_painting fashion_mnist scenes \
	pacs_cartoon pacs_domain

TURNED := $(addprefix turned_,scenes cifar10 gtsrb pacs_photo pacs_cartoon pacs_art_painting caltech101 tiny)

# All of the evidence, from nothing but the data sets: make evidence DATA=directory OUT=directory. On one
# core 20 hours for 7000 merges (10 s each; EMR of 14 tasks or more 25 to 45), and about 30 for trainings.
# FLAGS=--bfloat16 halves the training on processors with AMX, and is what most of the page was made with.
#
# `run` merges by the main arms; `older` adds controls of the quantiles that the page began with, `growing` is what is
# followed from 8 to 30 tasks, `disjoint` what CABS is made of.
evidence: setup
	run() { $(BIN)/python -m examples.evidence $$1 --data $(DATA) --out $(OUT)/"$$@" $(FLAGS) || exit 1; }; \
	older() { run "$$@" --rules EMR T-Switch \
		--sparsifiers shuffled reversed "scaling alone" dominance "uniform 0.5" "uniform 0.9"; }; \
	growing() { run vision "$$@" --seeds 0 --rules EMR T-Switch; \
		run vision "$$@" --seeds 0 --rules EMR --sparsifiers shuffled reversed dominance "dominance 0.3" \
			"dominance 0.4" "TADrop 0.98/0.998" "uniform of 0.98/0.998" "reversed of 0.98/0.998"; }; \
	disjoint() { run "$$@" --rules "task arithmetic" \
		--sparsifiers "magnitude 3/32" "disjoint magnitude 3/32" "n:m 3:32" "disjoint n:m 3:32"; }; \
	run vision; run vision --rules EMR --sparsifiers all; \
	for suite in language multimodal; do \
		run $$suite; older $$suite; run $$suite --rules EMR --sparsifiers "equal energy" "one threshold"; done; \
	for count in 14 20 30; do growing --count $$count; done; \
	for tasks in "$(EARLIER_14)" "$(EARLIER_20)" "$(EARLIER_30)"; do growing --tasks $$tasks --table adamw-earlier; done; \
	for suite in vision language; do run $$suite --recipe frozen-head --seeds 0 --lines; done; \
	disjoint vision --recipe frozen-head --seeds 0; \
	run vision --recipe low-rate --seeds 0 --lines --rules EMR --sparsifiers none; \
	opinions="language --recipe frozen-head --count 4"; \
	run $$opinions --lines; disjoint $$opinions; \
	run $$opinions --rules "task arithmetic" TIES consensus TSV-M EMR \
		--sparsifiers shuffled reversed "scaling alone"; \
	run $$opinions --rules AdaMerging --sparsifiers none "TADrop 0.75/0.95"; \
	run vision --recipe low-rate --count 4 --lines; run vision --recipe low-rate --count 7 --seeds 0 1; \
	for turns in "4" "7 --seeds 0 1"; do disjoint vision --recipe low-rate --count $$turns; \
		run vision --recipe low-rate --count $$turns --rules EMR TIES "task arithmetic" \
			--sparsifiers shuffled reversed "scaling alone" dominance "uniform of dominance 0.5"; done; \
	pair="--rules EMR T-Switch"; \
	run language --recipe sgd $$pair; older language --recipe sgd; \
	run language --recipe lora --seeds 0 $$pair; older language --recipe lora --seeds 0; \
	base1="--base-seed 1 --out $(OUT)/vision-base1"; \
	run vision $$base1 --seeds 0 $$pair; older vision $$base1 --seeds 0; \
	run vision $$base1 --seeds 0 --rules EMR --sparsifiers "TADrop 0.25/0.75" "TADrop 0.5/0.9" "TADrop 0.9/0.99" \
		"TADrop 0.98/0.998" "uniform of 0.98/0.998" "reversed of 0.98/0.998"; \
	run vision $$base1 --recipe sgd --seeds 0 1 $$pair; older vision $$base1 --recipe sgd --seeds 0 1; \
	run vision $$base1 --recipe sgd --seeds 0 1 --rules EMR --sparsifiers "TADrop 0.98/0.998"; \
	second="--base-seed 1 --seeds 0 --out $(OUT)/language-second"; \
	run language $$second $$pair; older language $$second; \
	third="--base-seed 2 --out $(OUT)/vision-third"; \
	run vision $$third; run vision $$third --seeds 0 --rules AdaMerging --sparsifiers none; \
	photos="--base-seed 2 --pretraining 0.5 --recipe low-rate --count 4 --seeds 0 1 --out $(OUT)/vision-photos"; \
	run vision $$photos; run vision $$photos --rules AdaMerging --sparsifiers none "TADrop 0.95/0.99" \
		"uniform of 0.95/0.99" "shuffled of 0.95/0.99" "reversed of 0.95/0.99"; \
	run language --base-seed 2 --pretraining 0.4 --recipe frozen-head --count 4 --out $(OUT)/language-third; \
	small="--base-seed 3 --width 96 --layers 4 --out $(OUT)/vision-small"; \
	turned="$$small --recipe low-rate --tasks $(TURNED) --table turned"; \
	run vision $$turned; run vision $$turned --rules "AdaMerging, tuned" --sparsifiers none "TADrop 0.95/0.99" \
		"uniform of 0.95/0.99"; \
	run vision $$turned --rules AdaMerging "AdaMerging, tuned start" --sparsifiers none \
		"TADrop 0.95/0.99" "uniform of 0.95/0.99" "shuffled of 0.95/0.99" "reversed of 0.95/0.99" \
		"scaling alone of 0.95/0.99" "magnitude 0.5" "magnitude 0.2" "n:m 16:32" "DARE 0.5" "dominance 0.5"; \
	for recipe in sgd lora; do run vision $$small --recipe $$recipe $$pair; older vision $$small --recipe $$recipe; done; \
	run vision $$small --recipe lora --rules EMR --restored --sparsifiers none "TADrop 0.75/0.95" uniform \
		"TADrop 0.95/0.99" "uniform of 0.95/0.99" "uniform 0.7" dominance "dominance 0.5"; \
	run vision $$turned --rules EMR --restored --sparsifiers none "TADrop 0.95/0.99" "uniform of 0.95/0.99" \
		"reversed of 0.95/0.99" "magnitude 0.5" "magnitude 0.2" "n:m 16:32" "dominance 0.5"; \
	texts="--base-seed 3 --width 96 --layers 4 --recipe frozen-head --out $(OUT)/language-small"; \
	run language $$texts --restored; older language $$texts; \
	run language $$texts --rules EMR --sparsifiers "TADrop of nonzero 0.95/0.99" "TADrop of nonzero 0.75/0.95"

clean:
	rm -rf $(VENV) build dist site .pytest_cache .ruff_cache
