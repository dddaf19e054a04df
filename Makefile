# The one menu; CI calls the same targets. `make` alone lists them.
#
# Needs Python 3.11 or newer with venv, and a C++ compiler. Environments (.venv-*) are made when they are missing and
# made anew when pyproject.toml or constraints/ change; the package in them is installed anew when its sources change.

PYTHON ?= python3
# Options for pytest, e.g. `make test ARGS="-k tiles -x"`, or for the demo, the benchmarks.
ARGS ?=
# Tests for these may not be skipped here: their libraries belong to the environment that this file makes.
# (TensorRT-RTX has wheels for Linux on x86-64 and Python up to 3.12; the group `tensorrt` says the same.)
HAS_TENSORRT := $(shell $(PYTHON) -c "import platform, sys; print(',tensorrt' if sys.version_info < (3, 13) \
	and (sys.platform, platform.machine()) == ('linux', 'x86_64') else '')")
UNET_RT_REQUIRE ?= torch,onnxruntime,openvino,ncnn$(HAS_TENSORRT)$(HAS_VULKAN)
# Debian's packages that tests use: installed where this may be done, else the line is said and the tests are skipped.
DEBIAN := mesa-vulkan-drivers
VULKAN_DRIVERS := /usr/share/vulkan/icd.d/lvp_icd*.json
HAS_VULKAN = $(if $(shell ls $(VULKAN_DRIVERS) 2>/dev/null),$(comma)vulkan)
comma := ,
# Processes that share the tests: most of them keep one core busy, engines two. 0 is this process alone, for a debugger
# (ARGS=--pdb) and where tests need a GPU, of whose memory they expect to be the only users.
PROCESSES ?= $(if $(findstring gpu,$(UNET_RT_REQUIRE)),0,2)
# Without the directory of `python -c` and `python -m` on sys.path, the source tree cannot shadow the installed package.
export PYTHONSAFEPATH = 1
export UNET_RT_REQUIRE
export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Which other builder of sites the theme's authors recommend is no news for every build.
export NO_MKDOCS_2_WARNING = 1
# ONNX Runtime sends usage events unless told not to.
export ORT_DISABLE_TELEMETRY = 1

SOURCES := pyproject.toml CMakeLists.txt README.md $(shell find csrc unet_rt -type f \
	-not -name '*.so' -not -name '*.pyd' -not -name '*.ptx' -not -name '*.pyc' 2>/dev/null)
CPP := $(shell find csrc unet_rt/include examples -name '*.h' -o -name '*.cpp' -o -name '*.cu' 2>/dev/null)
TEST := .venv-test/bin
PEERS := .venv-peers/bin
DEMO := .venv-demo/bin
BENCH := .venv-bench/bin
BIOIO := .venv-bioio/bin
BROWSER := .venv-browser/bin
# The build of the test environment is kept between installs, so that only what changed is compiled.
KEEP_BUILD := --no-build-isolation --config-settings=build-dir=build/{wheel_tag}
# With the bodies of the CUDA kernels on host memory, and without any warning.
TEST_BUILD := $(KEEP_BUILD) --config-settings=cmake.define.UNET_RT_TEST_MODULES=ON \
	--config-settings=cmake.define.UNET_RT_WERROR=ON
# What CUDA kernels are compiled for here: two suffice to see that they compile, and any GPU runs the first.
export CUDAARCHS ?= 75-virtual;90-real

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo quick test test-peers test-bioio test-browser fire soak sanitize lint format bench guard site docs wheels clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

demo: .venv-demo/.installed  ## install without torch, build an engine, predict a large image, verify; report in demo-output/
	$(DEMO)/unet-rt demo --out demo-output $(ARGS)

test: .venv-test/.installed debian  ## install with everything that tests need, and run all tests
	$(TEST)/pytest --numprocesses=$(PROCESSES) --dist=worksteal $(ARGS)

.PHONY: debian
debian:
	@if [ -z "$(shell ls $(VULKAN_DRIVERS) 2>/dev/null)" ] && command -v apt-get > /dev/null; then \
		if [ "$$(id -u)" = 0 ]; then \
			echo "installing $(DEBIAN)"; \
			(apt-get update -q && DEBIAN_FRONTEND=noninteractive apt-get install -y -q $(DEBIAN)) > /dev/null \
				|| echo "$(DEBIAN) cannot be installed here; tests that need it are skipped"; \
		else echo "some tests are skipped without: sudo apt-get install $(DEBIAN)"; fi; \
	fi
# What needs MONAI or nnU-Net, and is skipped in the other environment.
PEER_TESTS := tests/peers tests/models/test_nnunet.py tests/training/test_export.py tests/judging/test_bench.py

test-peers: UNET_RT_REQUIRE := torch,onnxruntime,monai,nnunet
test-peers: .venv-peers/.installed  ## install beside MONAI and nnU-Net, and compare with them
	$(PEERS)/pytest --numprocesses=$(PROCESSES) --dist=worksteal -m "monai or nnunet" $(PEER_TESTS) $(ARGS)

# Apart from the others, as bioio brings some thirty packages that nothing else here needs.
test-bioio: .venv-bioio/.installed  ## install with bioio and its readers, and run the tests of microscopes' own files
	UNET_RT_REQUIRE= $(BIOIO)/pytest tests/images/test_image_bioio.py $(ARGS)

test-browser: .venv-browser/.installed  ## the service's page in Debian's chromium, its protocol and its document; a new screenshot
	UNET_RT_SCREENSHOTS=docs/images $(BROWSER)/pytest tests/serve $(ARGS)

# Some of every package: what a change breaks first.
QUICK := tests/test_house.py tests/test_imports.py tests/system/test_durable.py tests/system/test_json.py tests/contract \
	tests/drawing tests/kernels/test_kernels.py tests/tiling tests/images/test_axes.py tests/images/test_image.py \
	tests/outputs/test_output.py tests/outputs/test_objects.py tests/graph/test_graph.py tests/models/test_models.py \
	tests/engine/test_engine.py tests/training/test_metrics.py tests/prediction/test_cases.py tests/baseline/test_samples.py \
	tests/building/test_calibration.py tests/judging/test_verify.py tests/cli/test_doctor.py tests/benchmarks/test_figures.py

quick: .venv-test/.installed  ## a picked set of tests over all packages, in two minutes
	$(TEST)/pytest --numprocesses=$(PROCESSES) --dist=worksteal $(QUICK) $(ARGS)

# ARGS="--engine DIR" spares the build of an engine. Some hours on two cores.
FIRE := env PYTHONSAFEPATH= $(TEST)/python tests/fire
fire: .venv-test/.installed  ## hostile files, kills and wants by the thousand; records in build/
	$(FIRE)/fire.py --mutants 100000 --commands 50 --record build/fire.json $(ARGS)
	$(FIRE)/faults.py --kills 1000 --record build/faults.json $(ARGS)

soak: .venv-test/.installed  ## one hour of predictions: is memory flat, are descriptors and threads? plot in build/
	$(FIRE)/soak.py --minutes 60 --record build/soak.json --plot build/soak.svg $(ARGS)

# The sanitizers' libraries come before everything else that the interpreter loads.
SANITIZERS = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libubsan.so)
FOUND := -DPython_EXECUTABLE=$(abspath $(TEST))/python
sanitize: .venv-test/.made  ## the CPU kernels under AddressSanitizer, UBSan and ThreadSanitizer
	cmake --preset asan $(FOUND) -Dpybind11_DIR=$$($(TEST)/python -m pybind11 --cmakedir)
	cmake --build build/asan --target _cpu
	@rm -rf build/sanitized && mkdir -p build/sanitized && cp -r unet_rt tests pyproject.toml build/sanitized/
	@cp build/asan/_cpu*.so build/sanitized/unet_rt/
	cd build/sanitized && LD_PRELOAD="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 PYTHONSAFEPATH= PYTHONPATH=. \
		$(abspath $(TEST))/python -m pytest -q tests/kernels/test_kernels.py
	cmake --preset tsan $(FOUND) -Dpybind11_DIR=$$($(TEST)/python -m pybind11 --cmakedir)
	cmake --build build/tsan --target threads
	build/tsan/threads

lint: .venv-test/.made  ## ruff, mypy, import-linter, clang-format, codespell
	$(TEST)/ruff check .
	$(TEST)/ruff format --check .
	$(TEST)/mypy
	PYTHONPATH=. $(TEST)/lint-imports --no-cache
	$(if $(CPP),$(TEST)/clang-format --dry-run -Werror $(CPP))
	$(TEST)/codespell

format: .venv-test/.made  ## rewrite sources in the project's style
	$(TEST)/ruff check --fix-only --exit-zero --quiet .
	$(TEST)/ruff format .
	$(if $(CPP),$(TEST)/clang-format -i $(CPP))

site: .venv-test/.installed  ## the manual, in build/site; a broken link is an error
	$(TEST)/mkdocs build --strict

docs: site  ## the manual, and every code block of README.md and docs/ run
	$(TEST)/pytest --numprocesses=$(PROCESSES) --dist=worksteal tests/docs/test_docs.py $(ARGS)

# Half an hour on two cores. On demand besides: bench_precision, membranes (training), gpu.py; ARGS=--quick tries all.
BENCHES := bench_startup bench_kernels bench_roofline bench_overhead bench_latency bench_engine bench_predict bench_scaling \
	bench_memory bench_build bench_quality bench_train
# The directory of a script is on sys.path here: the benchmarks import each other, and no unet_rt lies beside them.
bench guard: export PYTHONSAFEPATH :=

bench: .venv-bench/.installed  ## run the benchmarks, draw README's figures anew; the method is in benchmarks/README.md
	@set -e; for name in $(BENCHES); do echo "== $$name"; $(BENCH)/python benchmarks/$$name.py $(ARGS); done
	@$(BENCH)/python benchmarks/tables.py

guard: .venv-bench/.installed  ## has anything become slower? instructions of the kernels, engines against bare libraries
	$(BENCH)/python benchmarks/guard_kernels.py
	$(BENCH)/python benchmarks/bench_overhead.py --out build/overhead.json $(ARGS)

# UNET_RT_CUDA=ON makes one with the CUDA kernels, for every architecture that the compiler knows.
wheels: export CUDAARCHS :=
wheels: export UNET_RT_CUDA ?= OFF
wheels: .venv-test/.made  ## source distribution, and the wheel for this machine's processor, in dist/; both checked
	$(TEST)/pip install -q --group wheels
	$(TEST)/python -m build --outdir dist
	$(TEST)/twine check --strict dist/*

clean:  ## remove environments, builds and caches
	rm -rf .venv-test .venv-peers .venv-demo .venv-bench .venv-bioio .venv-browser build dist demo-output .mypy_cache .ruff_cache .pytest_cache \
		.hypothesis

# `--group` needs pip 25.1; an environment starts with whatever pip its Python ships.
define new_environment
	@echo "creating $(@D) with $$($(PYTHON) --version)"
	@rm -rf $(@D)
	@$(PYTHON) -m venv $(@D)
	@$(@D)/bin/pip install -q --upgrade 'pip>=25.1'
endef

.venv-test/.made: pyproject.toml constraints/test.txt
	$(new_environment)
	@echo "installing build tools, linters and test tools"
	@$(@D)/bin/pip install -q --group build --group docs --group lint --group test --group tensorrt --group cuda
	@echo "installing unet-rt[cpu,ncnn,torch,tiff,zarr,...] and what it needs (torch is large)"
	@$(@D)/bin/pip install -q $(TEST_BUILD) --constraint constraints/test.txt '.[cpu,ncnn,torch,train,tiff,zarr,geo,slides,remote,objects,dask,nifti,dicom,mrc,hdf5,serve]'
	@touch $@

.venv-test/.installed: .venv-test/.made $(SOURCES)
	@echo "installing unet-rt into $(@D)"
	@$(@D)/bin/pip install -q $(TEST_BUILD) --no-deps --force-reinstall .
	@touch $@

.venv-peers/.installed: $(SOURCES) constraints/test.txt
	$(new_environment)
	@echo "installing unet-rt[cpu,torch,train], MONAI and nnU-Net (torch is large)"
	@$(@D)/bin/pip install -q --constraint constraints/test.txt --group test --group peers '.[cpu,torch,train,zarr]'
	@touch $@

.venv-browser/.installed: $(SOURCES) constraints/test.txt
	$(new_environment)
	@echo "installing unet-rt[cpu,serve] and what asks a service"
	@$(@D)/bin/pip install -q --constraint constraints/test.txt --group test --group browser '.[cpu,serve,tiff,zarr]'
	@touch $@

# As a user would: nothing kept, nothing but the extra.
.venv-demo/.installed: $(SOURCES) constraints/test.txt
	$(new_environment)
	@echo "installing unet-rt[cpu]"
	@$(@D)/bin/pip install -q --constraint constraints/test.txt '.[cpu]'
	@touch $@

.venv-bioio/.installed: $(SOURCES)
	$(new_environment)
	@echo "installing unet-rt[bioio,czi] and what writes CZI"
	@$(@D)/bin/pip install -q --group bioio '.[bioio,czi]'
	@touch $@

.venv-bench/.installed: $(SOURCES) constraints/test.txt
	$(new_environment)
	@echo "installing unet-rt[cpu,torch,tiff] and the benchmarks' tools (torch is large)"
	@$(@D)/bin/pip install -q --constraint constraints/test.txt --group bench '.[cpu,ncnn,torch,train,tiff,zarr,objects,dask]'
	@touch $@
