# Everything from a fresh clone: `make demo`, `make test`. `make help` lists the rest.
#
# Each target first makes what it needs: a virtual environment in .venv, and flatkern compiled in it.
#
#   make test PYTHON=python3.12          another Python for the environment
#   make test TORCH='torch==2.12.1'      another torch (the environment is updated)
#   make test NO_VENV=1 PYTHON=python3   offline: only what that Python has, nothing is installed; tools
#                                        that are missing are named as "not checked" instead of failing

PYTHON ?= python3
NO_VENV ?=
VENV ?= .venv
# The version that the results were taken with. pip's own settings (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL)
# choose between torch's CPU and CUDA wheels.
TORCH ?= torch==2.13.0
# Test processes: as many as there are cores, from two to sixteen. No more on few cores: two already compete for two cores
# with the threads that the kernels start.
CORES := $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
JOBS ?= $(shell n=$(CORES); [ "$$n" -ge 2 ] || n=2; [ "$$n" -le 16 ] || n=16; echo "$$n")
# `make gpu`: seconds, lists of stages or stages (bench/gpu/run.py --help), where results go, DRY=1 for the CPU.
# On the CPU nothing is in a hurry, and a host may be slow.
BUDGET ?= $(if $(filter-out 0,$(DRY)),600,280)
STAGES ?=
OUT ?=
DRY ?=
# `make gpu`, after a repair: an expression for pytest's -k, for some tests only.
TESTS ?=
# `make gpu-report`: a folder that `make gpu` wrote.
FROM ?=
# Further arguments of pytest, of the demo, of the benchmarks.
ARGS ?=
# `make wheel-cuda`: where the wheel goes.
WHEELS ?= dist
# Tests that the sanitizers watch: those that call the compiled kernels with every shape and dtype, or change what they read.
SANITIZE_TESTS ?= tests/test_backends.py tests/test_cpp.py tests/test_streams.py tests/test_noise.py tests/test_describe.py tests/test_hostile_callers.py

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help env build demo test test-matrix test-triton test-stacks stacks-page docs test-cuda matrix-cuda check format bench gpu gpu-report gpu-model
.PHONY: sanitize sanitize-cuda races-cuda wheel-check wheel-cuda show clean

NATIVE := $(shell find csrc -type f 2>/dev/null) setup.py pyproject.toml
TREE := $(CURDIR)/build/tree

ifdef NO_VENV
  PY := $(PYTHON)
  READY = tree
  IMPORTS = PYTHONPATH="$(TREE)$${PYTHONPATH:+:$$PYTHONPATH}"
else
  PY := $(VENV)/bin/python
  READY = $(COMPILED)
  IMPORTS =
endif

# PYTHONSAFEPATH keeps the current folder off sys.path: our triton_kernels/ would hide a package of that
# name, and flatkern must be found where it is installed. The number of threads is the machine's.
RUN = env -u OMP_NUM_THREADS PYTHONSAFEPATH=1 $(IMPORTS) $(PY)

# $(call has,MODULE): a shell test
has = $(PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("$(1)") is None)'
# $(call quoted,TEXT): one word of a shell
quoted = '$(subst ','\'',$(1))'
# $(call missing,WHAT WAS TO BE DONE,WHY NOT): offline this is a remark, in our own environment an error
missing = $(if $(NO_VENV),echo "not checked: $(1) ($(2))",{ echo "error: $(1): $(2); remove $(VENV) and run make again" >&2; exit 1; })
# $(call tool,NAME,HOW TO CALL IT,WHAT IT CHECKS,ARGUMENTS): call it, if it is there in the version of
# requirements-dev.txt: other versions format differently and would complain about code that is right.
define tool
@if ! version=$$($(2) --version 2>/dev/null); then $(call missing,$(3),$(1) is not installed); \
elif pin=$$(sed -n 's/^$(1)==//p' requirements-dev.txt) && ! echo "$$version" | grep -qF "$$pin"; then \
  $(call missing,$(3),$(1) $$pin is needed and this is $$version); \
else echo "$(1) $(4)"; $(2) $(4); fi
endef

help: ## this list
	@echo "make TARGET [NO_VENV=1] [PYTHON=$(PYTHON)] [TORCH=$(TORCH)] [JOBS=$(JOBS)] [ARGS=...]"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

# ---- environment and build

ENV_STAMP := $(VENV)/.installed-$(subst =,-,$(TORCH))

$(ENV_STAMP): requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "flatkern needs Python 3.10 or later: make PYTHON=...")'
	@echo "[1/3] creating the environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@echo "[2/3] installing $(TORCH) and requirements-dev.txt (once; torch is large, this can take minutes)"
	@$(VENV)/bin/python -m pip install -qq --disable-pip-version-check '$(TORCH)' -r requirements-dev.txt
	@rm -f $(VENV)/.installed-* && touch $@

# The editable installation itself compiles nothing, because pip would compile everything anew each time.
$(VENV)/.editable: $(ENV_STAMP) pyproject.toml setup.py
	@FLATKERN_BUILD=skip FLATKERN_CUDA=0 $(PY) -m pip install -qq --disable-pip-version-check --no-build-isolation --no-deps -e .
	@touch $@

# Compiled in place, and only what has changed; the CUDA kernels are not (see cuda-tree), so that every machine builds and
# tests the same. Code that does not compile is an error; a missing compiler is not,
# unless FLATKERN_BUILD=require: `build` says what is live, and the next make tries again.
SUFFIX := $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
COMPILED := build/.compiled$(SUFFIX)
POLICY = $${FLATKERN_BUILD:-$$(if $(CAN_COMPILE); then echo require; else echo auto; fi)}
CAN_COMPILE = $(call has,pybind11) && $(call has,ninja) && \
  { command -v "$${CXX:-g++}" || command -v clang++ || command -v c++; } > /dev/null

$(COMPILED): $(NATIVE) $(if $(NO_VENV),,$(VENV)/.editable)
	@mkdir -p build && rm -f flatkern/_C$(SUFFIX)
	@if [ "$$FLATKERN_BUILD" = skip ]; then echo "not compiled: FLATKERN_BUILD=skip"; \
	elif $(call has,setuptools); then \
	  echo "[3/3] compiling flatkern" && FLATKERN_CUDA=0 FLATKERN_BUILD=$(POLICY) $(PY) setup.py -q build_ext --inplace; \
	else echo "not compiled: this Python has no setuptools"; fi
	@if [ -e flatkern/_C$(SUFFIX) ]; then touch $@; fi

# Offline there is no installed package, so a folder of links stands in for one: flatkern/ as it would be
# installed, with triton_kernels/ and bench/ inside it. Made anew each time: it takes no time and is never stale.
.PHONY: tree
tree: $(COMPILED)
	@rm -rf $(TREE) && mkdir -p $(TREE)/flatkern
	@ln -s $(CURDIR)/flatkern/* $(CURDIR)/triton_kernels $(CURDIR)/bench $(TREE)/flatkern/

# The same with the CUDA kernels, which stand nowhere else.
CUDA := build/cuda
.PHONY: cuda-library cuda-tree
cuda-library:
	@FLATKERN_BUILD=skip FLATKERN_CUDA=1 $(PY) setup.py -q build_ext --build-lib $(CUDA)/lib
cuda-tree: $(READY) cuda-library
	@rm -rf $(CUDA)/tree && mkdir -p $(CUDA)/tree/flatkern
	@ln -s $$(ls -d $(CURDIR)/flatkern/* | grep -v '/_CUDA[.]') $(CURDIR)/triton_kernels $(CURDIR)/bench \
	  $(CURDIR)/$(CUDA)/lib/flatkern/_CUDA$(SUFFIX) $(CUDA)/tree/flatkern/

env: $(if $(NO_VENV),,$(ENV_STAMP)) ## the virtual environment (with NO_VENV=1: nothing)

build: $(READY) ## compile, and say what is live
	@$(RUN) -m flatkern doctor --brief

# ---- what it is for

demo: build ## methods on handwritten digits, under a minute (ARGS=--full: all of them): accuracy, time, passes over memory
	@$(RUN) -m flatkern demo $(ARGS)

bench: build ## benchmarks against PyTorch and other libraries, into bench/results (ARGS=--quick: into bench-results)
	@$(RUN) -m flatkern bench $(if $(ARGS),$(ARGS),--out bench/results --name cpu)

# To compile is the first stage of `gpu`, so that it counts. `exec`, so that make's SIGTERM reaches it.
gpu: $(if $(NO_VENV),,$(VENV)/.editable) ## all checks and races that need a GPU, in BUDGET seconds (DRY=1: without one)
	@export FLATKERN_GPU_TESTS=$(call quoted,$(TESTS)); exec $(RUN) bench/gpu/run.py --budget $(call quoted,$(BUDGET)) --stages $(call quoted,$(STAGES)) $(if $(OUT),--out $(call quoted,$(OUT))) $(if $(filter-out 0,$(DRY)),--dry-run)

gpu-report: $(if $(NO_VENV),,$(VENV)/.editable) ## a report of what `make gpu` wrote: make gpu-report FROM=build/gpu
	@$(if $(FROM),,echo "error: FROM: name a folder that make gpu wrote: make gpu-report FROM=build/gpu" >&2; exit 1)
	@$(RUN) bench/gpu/report.py $(call quoted,$(FROM))

# By the Triton that is installed, and by the oldest one that is supported, which .ci/run installs there, too.
OLDEST_TRITON := build/triton-3.6
gpu-model: build ## what a GPU should make of the Triton kernels, by their compiled code (no GPU needed): bench/results/model.json
	@$(if $(NO_VENV),,[ -d $(OLDEST_TRITON) ] || $(PY) -m pip install -qq --disable-pip-version-check --no-deps --target $(OLDEST_TRITON) triton==3.6.0)
	@$(RUN) bench/gpu/model.py --json bench/results/model.json
	@if [ -d $(OLDEST_TRITON) ]; then export PYTHONPATH=$(CURDIR)/$(OLDEST_TRITON); $(RUN) bench/gpu/model.py --json bench/results/model.json; \
	else echo "not made: the part of Triton 3.6 ($(OLDEST_TRITON) is not there)"; fi
	@$(RUN) bench/gpu/report.py

# ---- checks

# Arguments that need a plugin are given only where the plugin is. The benchmarks' own tests run by themselves,
# and before the others: both folders have a conftest.py and are no packages.
PYTEST = $(RUN) -m pytest \
  $$($(call has,xdist) && echo "-n $(JOBS) --dist worksteal") $$($(call has,pytest_benchmark) && echo --benchmark-disable)

# Of tests with several parameters few combinations, in which every two values meet, and none that takes minutes and seldom
# finds what others do not (tests/covering.py); test-matrix runs what is left out. With ARGS, what they name, and all of it.
CHOICE ?= $(if $(ARGS),,--covering)

test: build check ## build, check, the tests (the wheel's too); of many combinations of parameters few that cover them
	@$(call has,pytest) || { echo "error: pytest is not installed for $(PY)" >&2; exit 1; }
	@$(if $(ARGS),,$(PYTEST) -q $(CHOICE) bench)
	@$(if $(ARGS),,$(MAKE) --no-print-directory test-triton CHOICE=$(CHOICE))
	@$(PYTEST) $(CHOICE) $(ARGS)

test-matrix: $(READY) ## what `test` leaves out: the other combinations; Triton's kernels for other architectures, and their code executed
	@$(call has,pytest) || { echo "error: pytest is not installed for $(PY)" >&2; exit 1; }
	@$(if $(ARGS),,$(MAKE) --no-print-directory test-triton CHOICE=--left-out)
	@CUDA_VISIBLE_DEVICES= $(PYTEST) -q --left-out $(ARGS)

# Where there is a GPU, kernels that these compile for a stand-in would be launched on it.
WITHOUT_GPU := tests/test_host.py tests/test_warm_up.py tests/test_triton_model.py

# By Triton's kernels and by the CUDA kernels.
CAPTURES := tests/test_capturable.py tests/test_failed_captures.py

# The interpreter has to be chosen before triton is imported, so this is a process of its own. There is a triton for few
# platforms only. Of tests that take a backend, those for this one are run.
TRITON_TESTS := tests/test_triton.py tests/test_triton_counts.py $(CAPTURES) \
  tests/test_backends.py tests/test_read_on_device.py tests/test_noise.py::test_which_normals_a_counter_gives tests/test_streams_triton.py
test-triton: $(READY) ## the Triton kernels in Triton's interpreter (no GPU needed; part of `test`)
	@if $(call has,triton) && $(call has,pytest); then \
	  TRITON_INTERPRET=1 $(PYTEST) -q $(CHOICE) -k "triton or captur" $(TRITON_TESTS) $(ARGS); \
	else echo "not checked: Triton kernels (triton is not installed)"; fi
	@$(if $(ARGS),,if $(call has,triton) && $(RUN) -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  CUDA_VISIBLE_DEVICES= $(PYTEST) -q $(WITHOUT_GPU); fi)

# Training libraries have an environment of their own, since they choose versions of what others need.
STACKS := build/stacks
STACKS_PY := $(if $(NO_VENV),$(PYTHON),$(STACKS)/bin/python)
STACKS_STAMP := $(STACKS)/.installed-$(subst =,-,$(TORCH))
STACKS_LIBRARIES := lightning transformers peft accelerate timm skorch schedulefree bitsandbytes torchao diffusers

$(STACKS_STAMP): requirements-stacks.txt
	@echo "installing $(TORCH) and requirements-stacks.txt in $(STACKS) (once)"
	@$(PYTHON) -m venv $(STACKS)
	@$(STACKS_PY) -m pip install -qq --disable-pip-version-check '$(TORCH)' -r requirements-stacks.txt
	@rm -f $(STACKS)/.installed-* && touch $@

# A file of tests is one process, because tests of several ranks keep theirs.
test-stacks: tree $(if $(NO_VENV),,$(STACKS_STAMP)) ## flatkern inside of training libraries: Lightning, Transformers, Accelerate, timm, skorch
	@has() { $(STACKS_PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec(sys.argv[1]) is None)' $$1; }; \
	for library in $(STACKS_LIBRARIES); do has $$library || \
	  $(if $(NO_VENV),echo "not checked: flatkern inside of $$library (it is not installed)",{ echo "error: $$library is not installed; remove $(STACKS) and run make again" >&2; exit 1; }); done; \
	has pytest || { echo "error: pytest is not installed for $(STACKS_PY)" >&2; exit 1; }; \
	env -u OMP_NUM_THREADS FLATKERN_STACKS=1 PYTHONSAFEPATH=1 PYTHONPATH="$(TREE)$${PYTHONPATH:+:$$PYTHONPATH}" \
	  $(STACKS_PY) -m pytest -q $$(has xdist && echo "-n $(JOBS) --dist loadfile") $(or $(ARGS),tests/stacks)

stacks-page: tree $(if $(NO_VENV),,$(STACKS_STAMP)) ## the table of docs/stacks.md, by the names of those tests
	@PYTHONSAFEPATH=1 PYTHONPATH="$(TREE)$${PYTHONPATH:+:$$PYTHONPATH}" $(STACKS_PY) docs/stacks.py

# The site has an environment of its own, too: it is built by reading the sources, without torch.
DOCS := build/docs
DOCS_PY := $(if $(NO_VENV),$(PYTHON),$(DOCS)/bin/python)

$(DOCS)/.installed: requirements-docs.txt
	@echo "installing requirements-docs.txt in $(DOCS) (once)"
	@$(PYTHON) -m venv $(DOCS)
	@$(DOCS_PY) -m pip install -qq --disable-pip-version-check -r requirements-docs.txt
	@touch $@

docs: $(if $(NO_VENV),,$(DOCS)/.installed) ## the site of docs/, into build/site; no warning, no dead link (ARGS=--serve: shown while it is written)
	@export NO_MKDOCS_2_WARNING=1 PYTHONSAFEPATH=1; \
	if ! $(DOCS_PY) -c 'import material, mkdocs, mkdocstrings_handlers.python' 2> /dev/null; then \
	  $(if $(NO_VENV),echo "not checked: the site (mkdocs-material or mkdocstrings-python is not installed)",echo "error: remove $(DOCS) and run make again" >&2; exit 1); \
	elif [ "$(ARGS)" = --serve ]; then exec $(DOCS_PY) -m mkdocs serve; \
	else $(DOCS_PY) -m mkdocs build --strict && echo "the site is $(CURDIR)/build/site/index.html"; fi

# What nvcc compiles is looked at and not run; what is run is the same sources, compiled by the C++ compiler for a GPU that
# is emulated (tests/cuda_emulation).
HAS_NVCC = $(call has,setuptools) && $(PY) -c 'import runpy; runpy.run_path("setup.py")["find_nvcc"]()' 2> /dev/null
COMPILED_CUDA_TESTS := $(wildcard tests/test_cuda_compile.py tests/test_cuda_code.py tests/test_cuda_wheel.py)
EMULATED_CUDA_TESTS := $(filter-out $(COMPILED_CUDA_TESTS) tests/test_cuda_build.py tests/test_cuda_architectures.py \
  tests/test_cuda_races.py tests/test_cuda_sanitized.py,$(wildcard tests/test_cuda*.py)) $(CAPTURES)
# Of tests that take a backend, those for this one are run: what every backend does, and others' stacks with kernels of
# a GPU beneath them.
EMULATED_CUDA_TESTS += $(patsubst %,tests/test_%.py,backends read_on_device noise selection mask amp closures state \
  rolling skipped_steps library functional)
test-cuda: $(READY) ## the CUDA kernels: emulated on the CPU, and compiled where nvcc is (no GPU needed)
	@$(call has,pytest) || { echo "error: pytest is not installed for $(PY)" >&2; exit 1; }
	@if $(CAN_COMPILE); then $(MAKE) --no-print-directory checked-cuda; \
	else echo "not checked: CUDA kernels (pybind11 or ninja or a compiler is not installed)"; fi

.PHONY: checked-cuda
checked-cuda:
	@echo "compiling the CUDA kernels for an emulated GPU"
	@$(PY) tests/cuda_emulation/build.py
	@if $(HAS_NVCC); then $(MAKE) --no-print-directory cuda-tree wheel-cuda WHEELS=$(CUDA)/dist; \
	else rm -rf $(CUDA); echo "not checked: what nvcc makes of the CUDA kernels (no nvcc, or no setuptools)"; fi
	@export FLATKERN_CUDA_EMULATION=$(CURDIR)/build/cuda-emulation/_CUDA_emul$(SUFFIX); \
	if [ -d $(CUDA) ]; then export FLATKERN_CUDA_BUILD=$(CURDIR)/$(CUDA) compiled="$(COMPILED_CUDA_TESTS)"; fi; \
	$(PYTEST) -q $(CHOICE) -k "cuda or captur" $(EMULATED_CUDA_TESTS) $$compiled $(ARGS)

# PTX is kept, and made anew where a source has changed.
matrix-cuda: $(READY) ## what nvcc makes of the CUDA kernels for the architectures that a wheel has no code of (no GPU needed)
	@if ! $(call has,pytest); then echo "not checked: other architectures (pytest is not installed)"; \
	elif $(HAS_NVCC); then \
	  FLATKERN_CUDA_ARCHITECTURES=$(CURDIR)/build/cuda-architectures $(PYTEST) -q tests/test_cuda_architectures.py $(ARGS); \
	else echo "not checked: other architectures (no nvcc, or no setuptools)"; fi

check: $(if $(NO_VENV),,$(ENV_STAMP)) ## formatting, lint, types
	$(call tool,ruff,$(PY) -m ruff,Python lint,check .)
	$(call tool,ruff,$(PY) -m ruff,Python format,format --check .)
	$(call tool,mypy,$(PY) -m mypy,types,flatkern)
	$(call tool,clang-format,$(CLANG_FORMAT),C++ format,--dry-run -Werror $(CPP_FILES))

# Installed by pip beside the Python, or by the system.
CLANG_FORMAT = $$(PATH="$$($(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$$PATH" command -v clang-format || echo clang-format)
CPP_FILES = $(filter %.h %.cpp %.cu %.cuh,$(NATIVE))

format: $(if $(NO_VENV),,$(ENV_STAMP)) ## rewrite what `check` would complain about, where a tool can
	$(call tool,ruff,$(PY) -m ruff,Python lint,check --fix .)
	$(call tool,ruff,$(PY) -m ruff,Python format,format .)
	$(call tool,clang-format,$(CLANG_FORMAT),C++ format,-i $(CPP_FILES))

wheel-check: $(READY) ## what a wheel and an sdist contain, and that they build without a compiler
	@$(RUN) -m pytest tests/test_package.py $(ARGS)

wheel-cuda: $(READY) ## a wheel with the CUDA kernels, in WHEELS=dist (needs nvcc; `pip install .` builds them where it is, too)
	@FLATKERN_BUILD=require FLATKERN_CUDA=1 $(PY) -m pip wheel -q --disable-pip-version-check --no-index \
	  --no-build-isolation --no-deps -w $(WHEELS) .
	@ls $(WHEELS)/flatkern-*.whl

# The runtimes must be loaded before Python, hence LD_PRELOAD; a compiled probe tells where they are.
# Leaks are not looked for: CPython and torch keep what they allocate until exit, on purpose, and would
# drown ours. PYTHONMALLOC shows AddressSanitizer the small blocks that Python's own allocator would hide,
# and --capture=sys lets its report through, which it writes to the file descriptor.
SANITIZE := build/sanitize
sanitize: build ## the compiled kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	@mkdir -p $(SANITIZE)
	@if ! { $(CAN_COMPILE); }; then $(call missing,sanitizers,pybind11 or ninja or a compiler is not installed); \
	elif ! echo 'int main() {}' | $${CXX:-g++} -fsanitize=address,undefined -x c++ - -o $(SANITIZE)/probe; then \
	  $(call missing,sanitizers,the compiler has no AddressSanitizer runtime); \
	else $(MAKE) --no-print-directory sanitized-tests; fi

.PHONY: sanitized-tests
sanitized-tests:
	@echo "compiling flatkern with sanitizers"
	@FLATKERN_SANITIZE=address,undefined FLATKERN_BUILD=require FLATKERN_CUDA=0 \
	  $(PY) setup.py -q build_ext --build-lib $(SANITIZE)/lib --build-temp $(SANITIZE)/temp
	@rm -rf $(SANITIZE)/tree && mkdir -p $(SANITIZE)/tree/flatkern
	@ln -s $(filter-out %.so,$(wildcard $(CURDIR)/flatkern/*)) $(CURDIR)/triton_kernels $(CURDIR)/bench \
	  $(CURDIR)/$(SANITIZE)/lib/flatkern/*.so $(SANITIZE)/tree/flatkern/
	@export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONMALLOC=malloc \
	  PYTHONPATH=$(CURDIR)/$(SANITIZE)/tree PYTHONSAFEPATH=1 \
	  LD_PRELOAD=$$(ldd $(SANITIZE)/probe | awk '/lib(asan|ubsan)/ { print $$3 }' | paste -sd:); \
	$(PY) -c 'import flatkern._C as C; assert "/$(SANITIZE)/" in C.__file__, C.__file__; print("testing", C.__file__)' && \
	env -u OMP_NUM_THREADS $(PY) -m pytest $(CHOICE) --capture=sys -p no:cacheprovider $(SANITIZE_TESTS) $(ARGS)

# The same for the CUDA kernels, emulated: every operation in every variant. pytest's faulthandler would keep
# AddressSanitizer from saying where an address is none.
EMULATED := $(CURDIR)/build/cuda-emulation
SANITIZE_CUDA_TESTS ?= tests/test_cuda_sanitized.py tests/test_backends.py -k "sanitized or (cuda and matches_eager)"
# $(call sanitized,WHAT,LIST OF -fsanitize,TARGET THAT DOES IT)
define sanitized
@$(call has,pytest) || { echo "error: pytest is not installed for $(PY)" >&2; exit 1; }
@mkdir -p $(SANITIZE)
@if ! { $(CAN_COMPILE); }; then $(call missing,$(1),pybind11 or ninja or a compiler is not installed); \
elif ! echo 'int main() {}' | $${CXX:-g++} -fsanitize=$(2) -x c++ - -o $(SANITIZE)/probe-cuda; then \
  $(call missing,$(1),the compiler has no runtime for -fsanitize=$(2)); \
else echo "compiling the CUDA kernels for an emulated GPU with -fsanitize=$(2)"; $(MAKE) --no-print-directory $(3); fi
endef

COMMA := ,
sanitize-cuda: $(READY) ## the emulated CUDA kernels under AddressSanitizer and UndefinedBehaviorSanitizer
	$(call sanitized,wrong accesses of the CUDA kernels,address$(COMMA)undefined,sanitized-cuda)

races-cuda: $(READY) ## the same under ThreadSanitizer: no race, and no barrier or fence that can be left out
	$(call sanitized,races of the CUDA kernels,thread,raced-cuda)

.PHONY: sanitized-cuda raced-cuda
sanitized-cuda:
	@$(PY) tests/cuda_emulation/build.py --sanitize address,undefined module wrong
	@export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 PYTHONMALLOC=malloc \
	  FLATKERN_CUDA_SANITIZED=$(EMULATED) FLATKERN_CUDA_EMULATION=$(EMULATED)/address-undefined/_CUDA_emul$(SUFFIX) \
	  LD_PRELOAD=$$(ldd $(EMULATED)/address-undefined/wrong | awk '/lib(asan|ubsan)/ { print $$3 }' | paste -sd:); \
	$(PYTEST) -q $(CHOICE) --capture=sys -p no:cacheprovider -p no:faulthandler $(SANITIZE_CUDA_TESTS) $(ARGS)
raced-cuda:
	@$(PY) tests/cuda_emulation/build.py --sanitize thread driver wrong
	@FLATKERN_CUDA_SANITIZED=$(EMULATED) $(PYTEST) -q tests/test_cuda_races.py $(ARGS)

# ---- reading and tidying

show: ## every place of one operation: make show OP=perturb_gaussian_
	@$(PYTHON) -c 'import runpy; ops = runpy.run_path("flatkern/ops.py")["OPS"]; \
	print(ops["$(OP)"].family if "$(OP)" in ops else "", *ops)' | { read family ops; \
	case " $$ops " in *" $(OP) "*) ;; *) echo "make show OP=name, one of: $$family $$ops" >&2; exit 1;; esac; \
	grep -rnwE --include="$$family.*" --include="test_$$family.py" --include="bench_$$family.py" \
	  --include='*.cu' --include=ops.py --include=cases.py --include=arguments.h --include=check.cpp --include=bind.h '$(OP)|$(OP:_=)' \
	  flatkern csrc triton_kernels tests bench; }

clean: ## remove build products and caches (the environment stays)
	rm -rf build dist *.egg-info flatkern/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
