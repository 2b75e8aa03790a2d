// Element types and their conversion by way of float: round to nearest even, fp8 saturates, a NaN
// becomes the quiet NaN of its sign. Free of branches, so that compilers vectorise loops over it,
// and of float32 denormals, so that flush-to-zero modes change nothing.
#ifndef KVC_TYPES_H
#define KVC_TYPES_H

#include <stdint.h>
#include <string.h>

#include "abi.h"
#include "checksum.h"

namespace kvc {

KVC_HD float as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  float value;
  memcpy(&value, &bits, 4);
  return value;
#endif
}

KVC_HD uint32_t as_bits(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
#endif
}

// Types that are converted, with their bytes; `decode` and `encode` below have a line for each.
#define KVC_NUMBERS(ROW) ROW(BF16, 2) ROW(FP16, 2) ROW(FP32, 4) ROW(E4M3, 1) ROW(E5M2, 1)

KVC_HD constexpr uint32_t item_bytes(uint32_t type) {
  switch (type) {
#define ROW(TYPE, BYTES) \
  case KVC_##TYPE: return BYTES;
    KVC_NUMBERS(ROW) ROW(RAW1, 1) ROW(RAW2, 2) ROW(RAW4, 4) ROW(RAW8, 8) ROW(RAW16, 16)
#undef ROW
    default: return 0;
  }
}

KVC_HD constexpr bool is_raw(uint32_t type) { return type >= KVC_RAW1 && type <= KVC_RAW16; }

// A small IEEE-like float of E exponent and M mantissa bits; E4M3 has NaN but no infinity.
template <int E, int M, bool FN>
struct Small {
  static constexpr uint32_t BIAS = (1u << (E - 1)) - 1;
  static constexpr uint32_t MAGNITUDE = (1u << (E + M)) - 1;
  static constexpr uint32_t INFINITE = FN ? MAGNITUDE : ((1u << E) - 1) << M;
  static constexpr uint32_t QUIET = FN ? MAGNITUDE : INFINITE | (1u << (M - 1));
  // a float whose unit in the last place is this type's smallest denormal
  static constexpr uint32_t MAGIC = (127 + 24 - BIAS - M) << 23;

  KVC_HD static uint32_t decode(uint32_t bits) {
    const uint32_t mag = bits & MAGNITUDE;
    const uint32_t normal = (mag << (23 - M)) + ((127 - BIAS) << 23);
    const uint32_t denormal = as_bits(as_float(MAGIC + mag) - as_float(MAGIC));
    uint32_t found = mag < (1u << M) ? denormal : normal;
    if (FN) {
      found = mag == MAGNITUDE ? 0x7FC00000u : found;
    } else {
      found = mag >= INFINITE ? 0x7F800000u + ((mag - INFINITE) << (23 - M)) : found;
    }
    return found | ((bits & (MAGNITUDE + 1)) << (31 - E - M));
  }

  KVC_HD static uint32_t round(uint32_t abs) {  // of a finite value in range
    const uint32_t odd = (abs >> (23 - M)) & 1;
    const uint32_t normal =
        (abs - ((127 - BIAS) << 23) + ((1u << (22 - M)) - 1) + odd) >> (23 - M);
    const uint32_t denormal = as_bits(as_float(abs) + as_float(MAGIC)) - MAGIC;
    return abs < ((128 - BIAS) << 23) ? denormal : normal;
  }
};

using Half = Small<5, 10, false>;
using E4M3 = Small<4, 3, true>;
using E5M2 = Small<5, 2, false>;

// Bits of a float that equals the element.
template <uint32_t TYPE>
KVC_HD uint32_t decode(uint32_t bits) {
  if (TYPE == KVC_BF16) return bits << 16;
  if (TYPE == KVC_FP16) return Half::decode(bits);
  if (TYPE == KVC_E4M3) return E4M3::decode(bits);
  if (TYPE == KVC_E5M2) return E5M2::decode(bits);
  return bits;
}

// Element nearest to the float |abs| with the sign bit of `sign`.
template <uint32_t TYPE>
KVC_HD uint32_t encode(uint32_t abs, uint32_t sign) {
  const bool nan = abs > 0x7F800000u;
  if (TYPE == KVC_BF16) {
    const uint32_t rounded = (abs + 0x7FFF + ((abs >> 16) & 1)) >> 16;
    return (nan ? 0x7FC0u : rounded) | ((sign & 0x80000000u) >> 16);
  }
  if (TYPE == KVC_FP16) {
    const uint32_t finite = abs >= 0x477FF000u ? 0x7C00u : Half::round(abs);
    return (nan ? Half::QUIET : finite) | ((sign & 0x80000000u) >> 16);
  }
  if (TYPE == KVC_E4M3) {
    const uint32_t most = 0x43E00000u;  // 448
    const uint32_t finite = E4M3::round(abs < most ? abs : most);
    return (nan ? E4M3::QUIET : finite) | ((sign & 0x80000000u) >> 24);
  }
  if (TYPE == KVC_E5M2) {
    const uint32_t most = 0x47600000u;  // 57344
    const uint32_t finite = E5M2::round(abs < most ? abs : most);
    return (nan ? 0x7Fu : finite) | ((sign & 0x80000000u) >> 24);
  }
  return (nan ? 0x7FC00000u : abs) | (sign & 0x80000000u);
}

// One element. The sign is the source's: a product with NaN has any.
template <uint32_t FROM, uint32_t TO>
KVC_HD uint32_t convert(uint32_t bits, float factor) {
  const uint32_t source = decode<FROM>(bits);
  const uint32_t product = as_bits(as_float(source) * factor);
  return encode<TO>(product & 0x7FFFFFFFu, source);
}

}  // namespace kvc

#endif
