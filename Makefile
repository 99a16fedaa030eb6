# Urchin: `make` builds build/urchin; `make help` lists the rest.
BUILD  ?= build
CC     ?= gcc
OPT    ?= -O2
CFLAGS  = -std=c17 -D_GNU_SOURCE $(OPT) -g -Wall -Wextra -Wshadow -fno-math-errno -pthread -I. $(SAN)
LDFLAGS = -pthread $(SAN)
LIBS    = -lmicrohttpd -lcjson -lpcre2-8 -lutf8proc -lm
JEMALLOC = $(if $(SAN),,-ljemalloc)
ARCH   := $(shell uname -m)

LAYERS   = config compute attention model scheduler convert server
KERNELS  = compute/kernels.c attention/kernels.c
SOURCES  = $(filter-out $(KERNELS),$(foreach d,$(LAYERS),$(wildcard $d/*.c)))
MAIN     = server/main.c
ISAS     = generic $(if $(filter x86_64,$(ARCH)),avx2 avx512)
# One kernel source, built once per instruction family; lanes and the order of sums are the same in all.
ISA_generic = -DISA=generic
ISA_avx2    = -DISA=avx2 -mavx2 -mfma -mf16c
ISA_avx512  = -DISA=avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512vnni -mavx2 -mfma -mf16c -mprefer-vector-width=512
KERNEL_OPT  = -O3 -ffp-contract=off -Wno-psabi

OBJECTS  = $(patsubst %.c,$(BUILD)/%.o,$(filter-out $(MAIN),$(SOURCES))) \
           $(foreach i,$(ISAS),$(patsubst %.c,$(BUILD)/%.$i.o,$(wildcard $(KERNELS))))
LIB      = $(BUILD)/liburchin.a
TESTS    = $(patsubst tests/unit/%.c,$(BUILD)/tests/%,$(wildcard tests/unit/test_*.c))

all: $(BUILD)/urchin

$(BUILD)/urchin: $(BUILD)/server/main.o $(LIB)
	$(CC) $(LDFLAGS) -o $@ $^ $(LIBS) $(JEMALLOC)

$(LIB): $(OBJECTS)
	@rm -f $@
	ar rcs $@ $^

$(BUILD)/%.o: %.c
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -MMD -MP -c $< -o $@

define kernel_rule
$(BUILD)/%.$1.o: %.c
	@mkdir -p $$(@D)
	$(CC) $(CFLAGS) $(KERNEL_OPT) $(ISA_$1) -MMD -MP -c $$< -o $$@
endef
$(foreach i,$(ISAS),$(eval $(call kernel_rule,$i)))

$(BUILD)/tests/%: tests/unit/%.c $(LIB)
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -MMD -MP $(LDFLAGS) -o $@ $< $(LIB) -lcmocka $(LIBS)

tests: $(TESTS)

format:
	clang-format -i $(foreach d,$(LAYERS) tests,$(shell find $d -name '*.[ch]'))

clean:
	rm -rf build build-*

.PHONY: all tests format clean
-include $(shell find $(BUILD) -name '*.d' 2>/dev/null)
