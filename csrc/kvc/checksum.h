// Sum of a unit: over the 8-byte little-endian words of its rows on the wire, the last word of a
// row padded with zeros. Addition makes it independent of order, threads and CTAs; the key makes
// it depend on each word's place in the chunk. kvconnect/ops/plain.py is the oracle.
#ifndef KVC_CHECKSUM_H
#define KVC_CHECKSUM_H

#include <stdint.h>

#ifdef __CUDACC__
#define KVC_HD __host__ __device__ __forceinline__
#else
#define KVC_HD inline __attribute__((always_inline))
#endif

namespace kvc {

constexpr uint64_t KEY_STEP = 0x9E3779B97F4A7C15ull;
constexpr uint64_t KEY_START = 0xD1B54A32D192ED03ull;

// Key of the word at byte `offset` of the chunk.
KVC_HD uint64_t key_at(uint64_t offset) { return offset * KEY_STEP + KEY_START; }

KVC_HD uint64_t mix(uint64_t word, uint64_t key) {
  const uint64_t x = word ^ key;
  return ((word << 32) | (word >> 32)) + (x & 0xFFFFFFFFu) * (x >> 32);
}

}  // namespace kvc

#endif
