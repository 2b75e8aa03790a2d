// The C ABI of libkvc_cpu and libkvc_cuda: strided paged KV cells <-> dense wire, in one pass.
//
// Wire of a chunk, in this order: the copies in sequence, each at an offset rounded up to
// KVC_WIRE_ALIGN; within a copy dense [head][tau][content], tau counting the tokens of the chunk's
// segments in order. Bytes between copies are neither read nor written nor summed.
//
// A call moves any number of chunks of equally many tokens, each at an address of its own: the
// segments of the first, then those of the second, ...
//
// Everything is checked before a byte is written, except that addresses are mapped.
#ifndef KVC_ABI_H
#define KVC_ABI_H

#include <stdint.h>

#define KVC_ABI_VERSION 4
#define KVC_WIRE_ALIGN 256

#if defined(_WIN32)
#define KVC_EXPORT extern "C" __declspec(dllexport)
#else
#define KVC_EXPORT extern "C" __attribute__((visibility("default")))
#endif

enum kvc_type {
  KVC_BF16 = 1,
  KVC_FP16,
  KVC_FP32,
  KVC_E4M3,  // torch float8_e4m3fn: no infinity, saturates at 448
  KVC_E5M2,  // saturates at 57344
  KVC_RAW1,  // only ever copied, both sides equal
  KVC_RAW2,
  KVC_RAW4,
  KVC_RAW8,
  KVC_RAW16,
};

enum kvc_error {
  KVC_OK = 0,
  KVC_BAD_TYPE = -1,
  KVC_BAD_SHAPE = -2,
  KVC_BAD_BLOCK = -3,
  KVC_BAD_TOKENS = -4,
  KVC_BAD_UNIT = -5,
  KVC_WIRE_TOO_SMALL = -6,
  KVC_BAD_FACTOR = -7,
  KVC_NO_MEMORY = -8,
  KVC_NO_DEVICE = -9,
  KVC_DEVICE_FAILED = -10,
  KVC_MISALIGNED = -11,
  KVC_BAD_CHUNKS = -12,
  KVC_NO_CODE = -13,
};

// One part (K, V or both fused) of one layer. Strides are bytes and not negative. Token t is at
// (t / token_tile) * token_outer + (t % token_tile) * token_stride, elements likewise; the tile is
// block_tokens (or content) where there is none, and divides it.
typedef struct kvc_copy {
  uint64_t base;  // address of (block 0, first selected head, token 0, element 0)
  int64_t block_stride, head_stride;
  int64_t token_stride, token_outer;
  int64_t content_stride, content_outer;
  uint32_t token_tile, content_tile;
  uint32_t heads, content, block_tokens, num_blocks;
  uint32_t kv_type, wire_type;
  float factor;  // gather: wire = kv * factor; scatter: kv = wire * factor
  uint32_t reserved;
} kvc_copy;

// `count` tokens of one block from `token` on, summed up under `unit`.
typedef struct kvc_segment {
  int32_t block, token, count, unit;
} kvc_segment;

#endif
