// The CUDA grid on the CPU, lane after lane: its index arithmetic, conversions and sums are tested
// where there is no GPU. Slow: `ops_cases.GridKernels` builds it for the tests.
#include <string.h>

#include <new>
#include <vector>

#include "kvc/grid_plan.h"

namespace {

using namespace kvc::grid;
using kvc::Part;

template <Path PATH, bool GATHER>
void run_group(const Plan& plan, const Group& group, uint32_t warps, uint64_t* sums) {
  for (uint32_t warp = 0; warp < warps; ++warp) {
    Cursor cursor = {plan.parts.data() + group.first_part, plan.pieces.data()};
    for (uint32_t i = warp; i < group.items; i += warps) {
      const Item item = cursor.decode(i);
      for (uint32_t lane = 0; lane < LANES; ++lane) {
        sums[item.unit] += work<PATH, GATHER>(cursor.parts[cursor.part], item, lane);
      }
    }
  }
}

template <bool GATHER>
void run_plan(const Plan& plan, uint32_t warps, uint64_t* sums) {
  for (const Group& group : plan.groups) {
    switch (group.path) {
      case Path::PLAIN16: run_group<Path::PLAIN16, GATHER>(plan, group, warps, sums); break;
      case Path::PLAIN8: run_group<Path::PLAIN8, GATHER>(plan, group, warps, sums); break;
      case Path::CELLS: run_group<Path::CELLS, GATHER>(plan, group, warps, sums); break;
      case Path::CONVERT_1_2: run_group<Path::CONVERT_1_2, GATHER>(plan, group, warps, sums); break;
      case Path::CONVERT_1_4: run_group<Path::CONVERT_1_4, GATHER>(plan, group, warps, sums); break;
      case Path::CONVERT_2_1: run_group<Path::CONVERT_2_1, GATHER>(plan, group, warps, sums); break;
      case Path::CONVERT_2_4: run_group<Path::CONVERT_2_4, GATHER>(plan, group, warps, sums); break;
      case Path::CONVERT_4_1: run_group<Path::CONVERT_4_1, GATHER>(plan, group, warps, sums); break;
      case Path::CONVERT_4_2: run_group<Path::CONVERT_4_2, GATHER>(plan, group, warps, sums); break;
    }
  }
}

}  // namespace

// As kvc_move of libkvc_cpu. Bits of *paths are set for the paths taken.
KVC_EXPORT int kvc_grid_move(int gather, const kvc_copy* copies, uint32_t n_copies,
                             const kvc_segment* segments, uint32_t n_segments,
                             const uint64_t* wires, uint32_t n_wires, uint64_t wire_bytes,
                             uint64_t* sums, uint32_t units, uint32_t warps, uint32_t* paths) {
  try {
    std::vector<Part> parts(n_copies);
    const kvc::Wires to = {wires, n_wires, wire_bytes};
    uint64_t tokens = 0;
    if (int error = kvc::make_plan(copies, n_copies, segments, n_segments, to, units,
                                   parts.data(), &tokens))
      return error;
    memset(sums, 0, units * sizeof(uint64_t));
    if (tokens == 0 || n_copies == 0) return KVC_OK;
    Plan plan;
    if (int error = make_grid(parts, segments, n_segments, tokens, to, &plan)) return error;
    for (const Group& group : plan.groups) *paths |= 1u << uint32_t(group.path);
    gather ? run_plan<true>(plan, warps, sums) : run_plan<false>(plan, warps, sums);
    return KVC_OK;
  } catch (const std::bad_alloc&) {
    return KVC_NO_MEMORY;
  }
}
