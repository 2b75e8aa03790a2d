// What both implementations derive from a call before they move a byte: checks, where each copy is
// on the wire, and which of its dimensions are contiguous.
#ifndef KVC_PLAN_H
#define KVC_PLAN_H

#include "types.h"

namespace kvc {

struct Part {
  kvc_copy c;
  uint64_t wire;  // offset in a chunk
  uint64_t kv_row, wire_row;  // bytes of a token of one head
  uint32_t kv_item, wire_item;
  bool convert;  // types differ, or a factor applies
  bool dense;    // a token's elements are contiguous
  bool even;     // tokens are token_stride apart in the whole block
  bool runs;     // dense, and a token follows the other: segments are contiguous
};

inline bool product(uint64_t* out, uint64_t a, uint64_t b) {
  return !__builtin_mul_overflow(a, b, out) && *out < (1ull << 62);
}

inline int check_copy(const kvc_copy& c) {
  const uint32_t most = 1u << 31;
  const uint32_t counts[] = {c.heads, c.content, c.block_tokens, c.num_blocks};
  for (uint32_t n : counts)
    if (n == 0 || n >= most) return KVC_BAD_SHAPE;
  if (c.token_tile == 0 || c.block_tokens % c.token_tile) return KVC_BAD_SHAPE;
  if (c.content_tile == 0 || c.content % c.content_tile) return KVC_BAD_SHAPE;
  if (item_bytes(c.kv_type) == 0 || item_bytes(c.wire_type) == 0) return KVC_BAD_TYPE;
  if ((is_raw(c.kv_type) || is_raw(c.wire_type)) && c.kv_type != c.wire_type) return KVC_BAD_TYPE;
  if (!(c.factor > 0 && c.factor <= 3.4028235e38f)) return KVC_BAD_FACTOR;
  if (is_raw(c.kv_type) && c.factor != 1) return KVC_BAD_FACTOR;
  const int64_t strides[] = {c.block_stride,  c.head_stride,    c.token_outer,
                             c.token_stride,  c.content_outer,  c.content_stride};
  const uint32_t extents[] = {c.num_blocks,   c.heads,          c.block_tokens / c.token_tile,
                              c.token_tile,   c.content / c.content_tile, c.content_tile};
  uint64_t end = c.base;
  for (int i = 0; i < 6; ++i) {
    uint64_t reach = 0;
    if (strides[i] < 0 || !product(&reach, strides[i], extents[i] - 1)) return KVC_BAD_SHAPE;
    if (end >= (1ull << 62)) return KVC_BAD_SHAPE;
    end += reach;
  }
  return end < (1ull << 62) ? KVC_OK : KVC_BAD_SHAPE;
}

inline Part derive(const kvc_copy& c) {
  Part p = {};
  p.c = c;
  p.kv_item = item_bytes(c.kv_type);
  p.wire_item = item_bytes(c.wire_type);
  p.kv_row = uint64_t(c.content) * p.kv_item;
  p.wire_row = uint64_t(c.content) * p.wire_item;
  p.convert = c.kv_type != c.wire_type || c.factor != 1;
  const bool whole = c.content_tile == c.content || c.content_outer == c.content_tile * c.content_stride;
  p.dense = c.content == 1 || (c.content_stride == p.kv_item && whole);
  if (c.content_tile == 1 && c.content > 1) p.dense = c.content_outer == p.kv_item;
  p.even = c.token_tile == c.block_tokens || c.token_outer == c.token_tile * c.token_stride;
  p.runs = p.dense && ((p.even && uint64_t(c.token_stride) == p.kv_row) || c.block_tokens == 1);
  if (c.token_tile == 1 && c.block_tokens > 1) {  // token_stride says nothing then
    p.c.token_stride = c.token_outer;
    p.c.token_tile = c.block_tokens;
    p.even = true;
    p.runs = p.dense && uint64_t(c.token_outer) == p.kv_row;
  }
  return p;
}

// Where chunks are on the wire; each has room for `bytes`.
struct Wires {
  const uint64_t* addresses;
  uint32_t n;
  uint64_t bytes;
};

// Fills parts[copies]; returns an error, or KVC_OK with the tokens of a chunk in *tokens.
inline int make_plan(const kvc_copy* copies, uint32_t n_copies, const kvc_segment* segments,
                     uint32_t n_segments, const Wires& wires, uint32_t units, Part* parts,
                     uint64_t* tokens) {
  uint64_t blocks = 1ull << 31, block_tokens = 1ull << 31, total = 0, end = 0;
  for (uint32_t i = 0; i < n_copies; ++i) {
    const kvc_copy& c = copies[i];
    if (int error = check_copy(c)) return error;
    parts[i] = derive(c);
    blocks = c.num_blocks < blocks ? c.num_blocks : blocks;
    block_tokens = c.block_tokens < block_tokens ? c.block_tokens : block_tokens;
  }
  for (uint32_t i = 0; i < n_segments; ++i) {
    const kvc_segment& s = segments[i];
    if (s.block < 0 || uint64_t(s.block) >= blocks) return KVC_BAD_BLOCK;
    if (s.token < 0 || s.count < 0 || uint64_t(s.token) + uint64_t(s.count) > block_tokens)
      return KVC_BAD_TOKENS;
    if (s.unit < 0 || uint32_t(s.unit) >= units) return KVC_BAD_UNIT;
    total += s.count;
  }
  const uint64_t each = wires.n ? total / wires.n : 0;
  if (each * wires.n != total) return KVC_BAD_CHUNKS;
  for (uint64_t i = 0, at = 0; i < n_segments; ++i) {
    at += segments[i].count;
    if (at > each) return KVC_BAD_CHUNKS;
    if (at == each) at = 0;
  }
  for (uint32_t i = 0; i < n_copies; ++i) {
    uint64_t bytes;
    end = (end + KVC_WIRE_ALIGN - 1) / KVC_WIRE_ALIGN * KVC_WIRE_ALIGN;
    parts[i].wire = end;
    if (!product(&bytes, each, copies[i].heads) || !product(&bytes, bytes, parts[i].wire_row))
      return KVC_WIRE_TOO_SMALL;
    end += bytes;
    if (end > wires.bytes) return KVC_WIRE_TOO_SMALL;
  }
  *tokens = each;
  return KVC_OK;
}

// Where token `t` is, relative to its block and head.
KVC_HD int64_t token_place(const kvc_copy& c, uint32_t t) {
  return int64_t(t / c.token_tile) * c.token_outer + int64_t(t % c.token_tile) * c.token_stride;
}

inline const char* describe(int error) {
  switch (error) {
    case KVC_OK: return "no error";
    case KVC_BAD_TYPE: return "unknown type, or a RAW type beside another";
    case KVC_BAD_SHAPE: return "count, tile or stride out of range";
    case KVC_BAD_BLOCK: return "block id out of range";
    case KVC_BAD_TOKENS: return "tokens beyond the end of a block";
    case KVC_BAD_UNIT: return "unit out of range";
    case KVC_WIRE_TOO_SMALL: return "wire too small for the chunk";
    case KVC_BAD_FACTOR: return "factor not finite and above 0, or on a RAW type";
    case KVC_NO_MEMORY: return "out of memory";
    case KVC_NO_DEVICE: return "no usable CUDA device or driver";
    case KVC_DEVICE_FAILED: return "a CUDA call or kernel failed";
    case KVC_MISALIGNED: return "an address or stride is not a multiple of its element";
    case KVC_NO_CODE: return "the library has no code for this GPU";
    case KVC_BAD_CHUNKS: return "segments do not fill all chunks with equally many tokens";
    default: return "unknown error";
  }
}

}  // namespace kvc

#endif
