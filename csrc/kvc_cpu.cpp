// libkvc_cpu: gather and scatter on the CPU, with the best instruction set that it has.
#include <stdlib.h>
#include <string.h>

#include <new>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "kvc/cpu_call.h"

#ifndef KVC_AHEAD
#define KVC_AHEAD 4096
#endif
#ifndef KVC_PANEL
#define KVC_PANEL 8192
#endif
#ifndef KVC_STREAM_FROM
#define KVC_STREAM_FROM (1u << 20)
#endif

#define KVC_NS base
#define KVC_ISA 0
#include "kvc/cpu_isa.inc"
#undef KVC_NS
#undef KVC_ISA

#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2,bmi2")
#define KVC_NS avx2
#define KVC_ISA 2
#include "kvc/cpu_isa.inc"
#undef KVC_NS
#undef KVC_ISA
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi2,prefer-vector-width=512")
#define KVC_NS avx512
#define KVC_ISA 512
#include "kvc/cpu_isa.inc"
#undef KVC_NS
#undef KVC_ISA
#pragma GCC pop_options
#endif

namespace {

using kvc::Part;

struct Isa {
  const char* name;
  kvc::Run run;
};

// Sets that this CPU has, best last.
std::vector<Isa> usable() {
  std::vector<Isa> found = {{"base", kvc::base::run}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2"))
    found.push_back({"avx2", kvc::avx2::run});
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    found.push_back({"avx512", kvc::avx512::run});
#endif
  return found;
}

Isa& isa() {
  static Isa chosen = usable().back();
  return chosen;
}

}  // namespace

// Cache -> wire if `gather`, else wire -> cache; sums[unit] is written for each of `units`.
KVC_EXPORT int kvc_move(int gather, const kvc_copy* copies, uint32_t n_copies,
                        const kvc_segment* segments, uint32_t n_segments, const uint64_t* wires,
                        uint32_t n_wires, uint64_t wire_bytes, uint64_t* sums, uint32_t units) {
  try {
    std::vector<Part> parts(n_copies);
    uint64_t tokens = 0;
    if (int error = kvc::make_plan(copies, n_copies, segments, n_segments,
                                   {wires, n_wires, wire_bytes}, units, parts.data(), &tokens))
      return error;
    memset(sums, 0, units * sizeof(uint64_t));
    if (tokens == 0 || n_copies == 0) return KVC_OK;
    const Part& last = parts.back();
    const uint64_t bytes = last.wire + last.c.heads * tokens * last.wire_row;
    for (uint32_t i = 0; i < n_wires; ++i) {
      uint32_t n = 0;
      for (uint64_t found = 0; found < tokens; ++n) found += segments[n].count;
      const kvc_segment* later = i + 1 < n_wires ? segments + n : nullptr;
      isa().run({parts.data(), n_copies, segments, n, later, tokens, (uint8_t*)wires[i],
                 gather != 0, bytes >= KVC_STREAM_FROM},
                sums);
      segments += n;
    }
    return KVC_OK;
  } catch (const std::bad_alloc&) {
    return KVC_NO_MEMORY;
  }
}

KVC_EXPORT const char* kvc_strerror(int error) { return kvc::describe(error); }
KVC_EXPORT const char* kvc_isa(void) { return isa().name; }

// For tests; not while another thread is in a call. -1 where the CPU lacks it.
KVC_EXPORT int kvc_use_isa(const char* name) {
  for (const Isa& one : usable())
    if (!strcmp(one.name, name)) {
      isa() = one;
      return 0;
    }
  return -1;
}

KVC_EXPORT int kvc_abi_version(void) { return KVC_ABI_VERSION; }
