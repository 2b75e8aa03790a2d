// Host side of a CUDA launch: from a checked call to the tables that grid.h reads.
#ifndef KVC_GRID_PLAN_H
#define KVC_GRID_PLAN_H

#include <vector>

#include "grid.h"
#include "plan.h"

namespace kvc {
namespace grid {

// Parts of one path; they are consecutive in Plan::parts and count their items from 0.
struct Group {
  Path path;
  uint32_t first_part, parts, items;
};

struct Plan {
  std::vector<GridPart> parts;
  std::vector<Piece> pieces;
  std::vector<Group> groups;
};

inline bool multiples(const Part& p, uint64_t wire, uint64_t of_kv, uint64_t of_wire) {
  const kvc_copy& c = p.c;
  const uint64_t strides = c.block_stride | c.head_stride | c.token_stride;
  return ((c.base | strides) % of_kv) == 0 && ((wire | p.wire | p.wire_row) % of_wire) == 0;
}

// The path of a part; `wire` has the bits of all chunks' addresses. `p` becomes one of bytes, or of
// larger elements, where that is its path.
inline int choose_path(Part& p, uint64_t wire, Path* path) {
  kvc_copy& c = p.c;
  *path = Path::CELLS;
  if (p.dense && p.even && !p.convert) {
    if (multiples(p, wire, 16, 16)) return *path = Path::PLAIN16, KVC_OK;
    if (multiples(p, wire, 8, 8)) return *path = Path::PLAIN8, KVC_OK;
    uint32_t item = 4;  // bytes are bytes: copy as the largest elements that are aligned
    while (!multiples(p, wire, item, item)) item /= 2;
    if (p.wire_row / item >= (1u << 31)) return KVC_BAD_SHAPE;
    c.content = c.content_tile = uint32_t(p.wire_row / item);
    c.content_stride = item;
    p.kv_item = p.wire_item = item;
    return KVC_OK;
  }
  if (p.dense && p.even && c.content % 8 == 0 && p.kv_item != p.wire_item) {
    const uint32_t kv = p.kv_item, w = p.wire_item;
    if (multiples(p, wire, kv == 1 ? 8 : 16, w == 1 ? 8 : 16)) {
      *path = kv == 1   ? (w == 2 ? Path::CONVERT_1_2 : Path::CONVERT_1_4)
              : kv == 2 ? (w == 1 ? Path::CONVERT_2_1 : Path::CONVERT_2_4)
                        : (w == 1 ? Path::CONVERT_4_1 : Path::CONVERT_4_2);
      return KVC_OK;
    }
  }
  const uint64_t all = c.base | c.block_stride | c.head_stride | c.token_stride | c.token_outer |
                       c.content_stride | c.content_outer;
  const uint64_t kv_need = p.kv_item == 16 ? 8 : p.kv_item, wire_need = p.wire_item == 16 ? 8 : p.wire_item;
  return all % kv_need || wire % wire_need ? KVC_MISALIGNED : KVC_OK;
}

inline uint32_t unit_bytes_of(Path path, const Part& p) {  // on the wire
  if (path == Path::PLAIN16) return 16;
  if (path == Path::PLAIN8) return 8;
  if (path == Path::CELLS) return p.wire_item == 16 ? 16 : 8;
  return 8 * p.wire_item;
}

inline int make_grid_part(const Part& p, Path path, uint64_t tokens, uint32_t pieces,
                          uint32_t piece_tokens, GridPart* out) {
  GridPart g = {};
  const kvc_copy& c = p.c;
  const uint32_t unit = unit_bytes_of(path, p);
  const uint64_t row_units = (p.wire_row + unit - 1) / unit;
  if (p.wire_row >= (1u << 31)) return KVC_BAD_SHAPE;
  g.kv = c.base, g.offset = p.wire;
  g.wire_head = tokens * p.wire_row, g.wire_row = uint32_t(p.wire_row);
  g.block_stride = c.block_stride, g.head_stride = c.head_stride;
  g.token_stride = c.token_stride, g.token_outer = c.token_outer;
  g.content_stride = c.content_stride, g.content_outer = c.content_outer;
  g.row_units = uint32_t(row_units);
  g.slice_units = piece_tokens > 1 || p.wire_row <= ITEM_BYTES ? g.row_units : ITEM_BYTES / unit;
  g.step_rows = LANES / g.row_units, g.step_columns = LANES % g.row_units;
  g.content = c.content, g.kv_item = p.kv_item, g.wire_item = p.wire_item;
  g.kv_type = c.kv_type, g.wire_type = c.wire_type, g.factor = c.factor;
  g.runs = p.runs, g.copied = !p.convert;
  g.heads = divisor(c.heads), g.pieces = divisor(pieces), g.row = divisor(g.row_units);
  g.token_tile = divisor(c.token_tile), g.content_tile = divisor(c.content_tile);
  const uint64_t slices = (row_units + g.slice_units - 1) / g.slice_units;
  uint64_t items;
  if (!product(&items, slices * c.heads, pieces) || items >= (1u << 31)) return KVC_BAD_SHAPE;
  g.items = uint32_t(items);
  *out = g;
  return KVC_OK;
}

inline int make_grid(std::vector<Part>& parts, const kvc_segment* segments, uint32_t n_segments,
                     uint64_t tokens, const Wires& wires, Plan* plan) {
  uint64_t longest = 1;
  for (const Part& p : parts) longest = p.wire_row > longest ? p.wire_row : longest;
  const uint32_t piece_tokens = longest < ITEM_BYTES ? uint32_t(ITEM_BYTES / longest) : 1;
  uint64_t tau = 0, all = 0;
  for (uint32_t i = 0; i < wires.n; ++i) all |= wires.addresses[i];
  const uint64_t* wire = wires.addresses;
  for (uint32_t i = 0; i < n_segments; ++i) {
    const kvc_segment& s = segments[i];
    if (tau == tokens) tau = 0, ++wire;
    for (int32_t done = 0; done < s.count; done += piece_tokens) {
      const int32_t rest = s.count - done, most = int32_t(piece_tokens);
      plan->pieces.push_back(
          {s.block, s.token + done, rest < most ? rest : most, s.unit, tau + done, *wire});
    }
    tau += s.count;
  }
  if (plan->pieces.size() >= (1u << 31)) return KVC_BAD_SHAPE;
  std::vector<Path> paths(parts.size());
  for (size_t i = 0; i < parts.size(); ++i)
    if (int error = choose_path(parts[i], all, &paths[i])) return error;
  for (uint32_t path = 0; path <= uint32_t(Path::CONVERT_4_2); ++path) {
    Group group = {Path(path), uint32_t(plan->parts.size()), 0, 0};
    for (size_t i = 0; i < parts.size(); ++i) {
      if (paths[i] != Path(path)) continue;
      GridPart g;
      if (int error = make_grid_part(parts[i], Path(path), tokens, uint32_t(plan->pieces.size()),
                                     piece_tokens, &g))
        return error;
      g.first_item = group.items;
      if (uint64_t(group.items) + g.items >= (1u << 31)) return KVC_BAD_SHAPE;
      group.items += g.items;
      ++group.parts;
      plan->parts.push_back(g);
    }
    if (group.items) plan->groups.push_back(group);
  }
  return KVC_OK;
}

// Appends a run of bytes; neighbours on both sides become one.
inline void add_run(std::vector<Run>& runs, uint64_t dst, uint64_t src, uint64_t bytes) {
  if (bytes == 0) return;
  if (!runs.empty()) {
    Run& last = runs.back();
    if (last.dst + last.bytes == dst && last.src + last.bytes == src) {
      last.bytes += bytes;
      return;
    }
  }
  runs.push_back({dst, src, bytes});
}

// Pieces for a warp each, and how wide all of them can be read and written.
inline uint32_t cut_runs(const std::vector<Run>& runs, std::vector<Run>* pieces) {
  uint64_t all = 16;
  for (const Run& run : runs) {
    all |= run.dst | run.src | run.bytes;
    for (uint64_t at = 0; at < run.bytes; at += ITEM_BYTES) {
      const uint64_t rest = run.bytes - at;
      pieces->push_back({run.dst + at, run.src + at, rest < ITEM_BYTES ? rest : ITEM_BYTES});
    }
  }
  return uint32_t(all & -all);
}

}  // namespace grid
}  // namespace kvc

#endif
