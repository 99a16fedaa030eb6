# Urchin: `make run` serves the default model, `make help` lists the rest.
BUILD  ?= build
CC      = gcc
AR      = ar
PREFIX ?= /usr/local
OPT    ?= -O2
CFLAGS  = -std=c17 -D_GNU_SOURCE $(OPT) -g -Wall -Wextra -Wshadow -fno-math-errno -pthread -I. $(SAN)
LDFLAGS = -pthread $(SAN)
LIBS    = -lmicrohttpd -lcjson -lpcre2-8 -lutf8proc -lm
JEMALLOC = $(if $(SAN),,-ljemalloc)
ARCH   ?= $(shell uname -m)
ifeq (,$(findstring -j,$(MAKEFLAGS)))
MAKEFLAGS += -j$(shell nproc)
endif

# Debian packages that each job needs; deploy/setup installs those that are missing.
BUILD_PACKAGES = gcc libc6-dev libmicrohttpd-dev libcjson-dev libjemalloc-dev libpcre2-dev libutf8proc-dev
RUN_PACKAGES   = $(BUILD_PACKAGES) python3-pip
TEST_PACKAGES  = $(RUN_PACKAGES) libcmocka-dev g++

LAYERS   = config compute attention model scheduler convert server
KERNELS  = compute/kernels.c compute/gemm_kernel.c attention/kernels.c convert/kernels.c convert/backward_kernels.c
GPU_NONE = model/gpu_none.c convert/gpu_none.c
GPU_C    = $(filter-out $(GPU_NONE),$(wildcard attention/gpu_*.c model/gpu_*.c convert/gpu_*.c))
SOURCES  = $(filter-out $(KERNELS) compute/gemm_bf16.c $(GPU_C) $(GPU_NONE),$(foreach d,$(LAYERS),$(wildcard $d/*.c)))
MAIN     = server/main.c
ISAS     = generic $(if $(filter x86_64,$(ARCH)),avx2 avx512) $(if $(filter aarch64,$(ARCH)),dotprod)
# One kernel source, built once per instruction family; lanes and the order of sums are the same in all.
ISA_generic = -DISA=generic
ISA_avx2    = -DISA=avx2 -mavx2 -mfma -mf16c
ISA_avx512  = -DISA=avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma -mf16c -mprefer-vector-width=512
# AVX-512 and AMX tiles.  For the tests of any machine: the same kernels in portable C, over tile instructions in C.
ISA_amx     = -DAMX $(subst ISA=avx512,ISA=amx,$(ISA_avx512)) -mamx-tile -mamx-int8 -mamx-bf16
ISA_amx_model = -DAMX -DAMX_MODEL -DISA=amx_model
ISA_bf16    = $(subst ISA=avx512,ISA=bf16,$(ISA_avx512)) -mavx512bf16 # gemm_bf16.c alone
ISA_dotprod = -DISA=dotprod -march=armv8.2-a+dotprod
# No contraction: which products and sums are fused is written out (v16_fma), or bits depend on the compiler.
# Sanitized, -O3 compiles for 1.7 times as long as -O2.
KERNEL_OPT  = $(if $(SAN),-O2,-O3) -ffp-contract=off -Wno-psabi

OBJECTS  = $(patsubst %.c,$(BUILD)/%.o,$(filter-out $(MAIN),$(SOURCES))) \
           $(foreach i,$(ISAS),$(patsubst %.c,$(BUILD)/%.$i.o,$(wildcard $(KERNELS)))) \
           $(if $(filter x86_64,$(ARCH)),$(BUILD)/compute/kernels.amx.o $(BUILD)/compute/gemm_bf16.bf16.o)
LIB      = $(BUILD)/liburchin.a
UNIT     = $(wildcard tests/unit/test_*.c)
TESTS    = $(patsubst tests/unit/%.c,$(BUILD)/tests/%,$(UNIT))
EMULATED = $(GPU_TESTS) $(BUILD)/urchin-emu
TESTED   = $(TESTS) $(EMULATED) $(BUILD)/urchin $(BUILD)/docs/settings
GPU_TESTS = $(patsubst tests/gpu/%.c,$(BUILD)/tests/%,$(wildcard tests/gpu/test_*.c))
FUZZERS  = $(patsubst tests/fuzz/%.c,$(BUILD)/fuzz/%,$(wildcard tests/fuzz/fuzz_*.c))

# The CUDA backend: built where nvcc is, unless CUDA=0; GPU_NONE stands in for it.  Programs link one of the two, or EMU_LIB.
NVCC    := $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
CUDA    ?= $(if $(and $(NVCC),$(wildcard model/gpu_model.c)),1,0)
ifneq (,$(SAN))
CUDA     = 0
endif
KERNEL_CU = $(filter-out compute/gpu_cuda.cu,$(wildcard compute/*.cu attention/*.cu convert/*.cu))
GPU_ARCHS ?= 80 90 100
NVCCFLAGS = -std=c++17 -O3 -lineinfo -I. -Xcompiler -O2,-Wall -Xptxas --warn-on-spills \
            $(foreach a,$(GPU_ARCHS),-gencode arch=compute_$a,code=sm_$a) \
            -gencode arch=compute_$(lastword $(GPU_ARCHS)),code=compute_$(lastword $(GPU_ARCHS))
GPU_OBJECTS = $(patsubst %.c,$(BUILD)/%.o,$(GPU_C))
CUDA_LIB = $(BUILD)/libcuda_backend.a
CUDA_LIBS = -L$(patsubst %/bin/nvcc,%/lib64,$(realpath $(NVCC))) -lcudart_static -lstdc++ -ldl -lrt
NONE     = $(patsubst %.c,$(BUILD)/%.o,$(GPU_NONE))
# What a program links: the library and a backend, which need each other.
with     = -Wl,--start-group $(LIB) $1 -Wl,--end-group
# The same kernels for the CPU, thread by thread: tests/emu.
EMU_LIB  = $(BUILD)/libemu.a
CXXFLAGS = -std=c++17 $(OPT) -g -Wall -Wextra -Wno-unknown-pragmas -ffp-contract=off -pthread -I. -Itests/emu $(SAN) \
           $(if $(filter x86_64,$(ARCH)),-march=native) $(CXXFLAGS_MORE)

all: $(BUILD)/urchin

# ---- building ----

$(BUILD)/urchin: $(BUILD)/server/main.o $(LIB) $(if $(filter 1,$(CUDA)),$(CUDA_LIB),$(NONE))
	$(CC) $(LDFLAGS) -o $@ $< $(call with,$(filter-out $< $(LIB),$^)) $(LIBS) $(if $(filter 1,$(CUDA)),$(CUDA_LIBS)) $(JEMALLOC)

$(BUILD)/urchin-emu: $(BUILD)/server/main.o $(LIB) $(EMU_LIB)
	$(CC) $(LDFLAGS) -o $@ $< $(call with,$(EMU_LIB)) $(LIBS) -lstdc++ $(JEMALLOC)

$(CUDA_LIB): $(GPU_OBJECTS) $(patsubst %.cu,$(BUILD)/cuda/%.o,$(KERNEL_CU) compute/gpu_cuda.cu)
	@rm -f $@
	$(AR) rcs $@ $^

$(BUILD)/cuda/%.o: %.cu
	@mkdir -p $(@D)
	$(NVCC) $(NVCCFLAGS) -MMD -MP -c $< -o $@

$(EMU_LIB): $(GPU_OBJECTS) $(patsubst %.cu,$(BUILD)/emu/%.o,$(KERNEL_CU)) $(BUILD)/emu/tests/emu/emu.o $(BUILD)/emu/tests/emu/emu_gpu.o
	@rm -f $@
	$(AR) rcs $@ $^

$(BUILD)/emu/%.o: %.cu
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -MMD -MP -x c++ -c $< -o $@
$(BUILD)/emu/%.o: %.cpp
	@mkdir -p $(@D)
	$(CXX) $(CXXFLAGS) -MMD -MP -c $< -o $@

$(LIB): $(OBJECTS)
	@rm -f $@
	$(AR) rcs $@ $^

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -MMD -MP -c $< -o $@

define kernel_rule
$(BUILD)/%.$1.o: %.c
	@mkdir -p $$(@D)
	$(CC) $(CFLAGS) $(KERNEL_OPT) $(ISA_$1) -MMD -MP -c $$< -o $$@
endef
$(foreach i,$(ISAS) amx amx_model bf16,$(eval $(call kernel_rule,$i)))

$(BUILD)/server/page.o: server/page.html

define program_rule # folder in BUILD, folder of its source, what it links besides
$(BUILD)/$1/%: $2/%.c $(LIB) $(NONE)
	@mkdir -p $$(@D)
	$(CC) $(CFLAGS) -MMD -MP $(LDFLAGS) -o $$@ $$< $$(MORE) $(call with,$(NONE)) $3 $(LIBS)
endef
$(eval $(call program_rule,tests,tests/unit,-lcmocka))
$(BUILD)/tests/test_compute_amx: MORE = $(BUILD)/compute/kernels.amx_model.o
$(BUILD)/tests/test_compute_amx: $(BUILD)/compute/kernels.amx_model.o
$(GPU_TESTS): $(BUILD)/tests/%: tests/gpu/%.c $(EMU_LIB) $(LIB)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -MMD -MP $(LDFLAGS) -o $@ $< $(call with,$(EMU_LIB)) -lcmocka $(LIBS) -lstdc++ $(CXXFLAGS_MORE)
$(BUILD)/gpu/%: tests/gpu/%.c tests/emu/none.c $(LIB) $(CUDA_LIB) # the same tests on a device
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -MMD -MP $(LDFLAGS) -o $@ $< tests/emu/none.c $(call with,$(CUDA_LIB)) -lcmocka $(LIBS) $(CUDA_LIBS)
$(BUILD)/bench/gpu_%: bench/gpu_%.c $(LIB) $(CUDA_LIB)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -MMD -MP $(LDFLAGS) -o $@ $< $(call with,$(CUDA_LIB)) $(LIBS) $(CUDA_LIBS)
$(BUILD)/bench/gpu_%-emu: bench/gpu_%.c $(LIB) $(EMU_LIB)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -MMD -MP $(LDFLAGS) -o $@ $< $(call with,$(EMU_LIB)) $(LIBS) -lstdc++
$(eval $(call program_rule,fuzz,tests/fuzz,-fsanitize=fuzzer))
$(eval $(call program_rule,bench,bench,))
$(eval $(call program_rule,docs,docs,))

docs/settings.md: $(BUILD)/docs/settings
	$< > $@.new && mv $@.new $@

tests: $(TESTS)
docs: docs/settings.md

# ---- using ----

run: ## build, fetch the default model and serve it: make run [MODEL=...] [ARGS="--port 9000"]
	@deploy/setup $(RUN_PACKAGES)
	@$(MAKE) --no-print-directory $(BUILD)/urchin
	@[ "$(MODEL)" ] || deploy/fetch-model || true
	@exec $(BUILD)/urchin serve $(MODEL) $(ARGS)

packages:
	@deploy/setup $(BUILD_PACKAGES)

model: ## fetch the default model's base
	@deploy/setup python3-pip
	@deploy/fetch-model

install: $(BUILD)/urchin ## install the program and the embedded models under PREFIX (/usr/local)
	install -D -m 755 $< $(DESTDIR)$(PREFIX)/bin/urchin
	for f in models/*/*; do install -D -m 644 $$f $(DESTDIR)$(PREFIX)/share/urchin/$$f || exit; done

# ---- checking ----

test: ## all tests; the last line counts them
	@deploy/setup $(TEST_PACKAGES)
	@$(if $(SAN),,deploy/fetch-model || true)
	@$(MAKE) --no-print-directory $(TESTED)
	@$(if $(SAN),URCHIN_CACHE=$(BUILD)) tests/run $(TESTED) # sanitized, without the default model: ten times slower

asan: ## the tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(MAKE) --no-print-directory test BUILD=$(BUILD)-asan EMULATED='$$(GPU_TESTS)' \
	    SAN="-fsanitize=address,undefined -fno-sanitize-recover=undefined"

tsan: ## the tests of what has threads under ThreadSanitizer; the emulated device has none, but fibres that it does not know
	@$(MAKE) --no-print-directory test BUILD=$(BUILD)-tsan SAN=-fsanitize=thread EMULATED= \
	    UNIT="$(foreach t,team sched,$(wildcard tests/unit/test_*$t*.c))"

fuzz: ## every parser's fuzz target, FUZZ_SECONDS (30) each
	@deploy/setup $(BUILD_PACKAGES) clang-14 libclang-rt-14-dev llvm-14 python3
	@$(MAKE) --no-print-directory fuzz-run BUILD=$(BUILD)-fuzz CC=clang-14 \
	    SAN="-fsanitize=fuzzer-no-link,address,undefined -fno-sanitize-recover=undefined"
fuzz-run: $(FUZZERS)
	@tests/run $(FUZZERS)

layers: ## includes point one way
	@tests/layers

CARD_TESTS = $(patsubst tests/gpu/%.c,$(BUILD)/gpu/%,$(wildcard tests/gpu/test_*.c))
card: $(CARD_TESTS) $(BUILD)/urchin $(patsubst %.c,$(BUILD)/%,$(wildcard bench/gpu_*.c)) # what the two below run
test-gpu: ## on a machine with a CUDA device: its kernels beside their CPU twins, and the HTTP tests with --device cuda
	@$(MAKE) --no-print-directory card
	@URCHIN_DEVICE=cuda tests/run $(CARD_TESTS) $(BUILD)/urchin
	@tests/gpu/sanitize $(CARD_TESTS)

bench-gpu: ## on a machine with a CUDA device: the speeds of bench/RESULTS.md's section on GPUs
	@$(MAKE) --no-print-directory card
	@bench/gpu.sh

gpu-registers: ## registers, spills and shared memory of every kernel, as nvcc gives them
	@tests/gpu/registers $(NVCC) $(GPU_ARCHS)

gpu-barriers: ## leaves out every barrier of every kernel: a test must fail (long)
	@$(MAKE) --no-print-directory $(GPU_TESTS)
	@tests/emu/barriers $(GPU_TESTS)

gpu-coverage: ## lines of kernels that the tests run on the emulated device
	@$(MAKE) --no-print-directory coverage-run BUILD=$(BUILD)-coverage OPT=-O1 CXXFLAGS_MORE=--coverage
coverage-run: $(GPU_TESTS)
	@tests/gpu/coverage $(BUILD) $(GPU_TESTS)

test-arm64: ## kernels on 64-bit Arm, by a cross compiler and qemu (as root: it installs both)
	@deploy/setup gcc-aarch64-linux-gnu qemu-user python3 libc6-dev-arm64-cross
	@tests/arm64 $(BUILD)-arm64

test-clients: ## real OpenAI clients against a running server (needs PyPI)
	@deploy/setup $(RUN_PACKAGES) python3-venv
	@$(MAKE) --no-print-directory $(BUILD)/urchin
	@tests/clients/run $(BUILD)

fresh: ## the README's commands and the Dockerfile's steps in a clean Debian 12 root
	@tests/fresh

bench: ## every speed in bench/RESULTS.md, measured again
	@$(MAKE) --no-print-directory $(BUILD)/urchin
	@for b in decode_depth.sh batch.sh prefill.sh server_curl.sh server_load.py; do echo "== bench/$$b"; bench/$$b || exit; done

format: ## clang-format over all sources
	clang-format -i $(foreach d,$(LAYERS) tests docs,$(shell find $d -name '*.[ch]'))

clean: ## remove every build folder
	rm -rf build build-*

help: ## this list
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## /\1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

.SECONDARY: $(NONE)
.PHONY: test-arm64 card test-gpu bench-gpu gpu-registers gpu-barriers gpu-coverage coverage-run all tests docs run packages model install test asan tsan fuzz fuzz-run layers test-clients fresh bench format clean help
-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
