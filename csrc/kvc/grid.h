// What one lane of the CUDA grid does, and which work is its: the same code under nvcc and, lane
// after lane, on the CPU (kvc_grid_gather, kvc_grid_scatter), where the tests run it.
//
// A launch covers the parts of one path. An item is one warp's work: the tokens of a piece (some
// KiB of a segment) of one head of one part, or a slice of a single long token. Warp w of W takes
// items w, w + W, ... Within an item, lane l of 32 takes units l, l + 32, ... of 8 or 16 bytes,
// several of them in flight. Items are decoded by multiplication, units by cursors: no divisions.
#ifndef KVC_GRID_H
#define KVC_GRID_H

#include "types.h"

#ifdef __CUDA_ARCH__
#define KVC_UNROLL _Pragma("unroll")
#else  // a CPU's compiler, nvcc's included, does not know it
#define KVC_UNROLL
#endif

namespace kvc {
namespace grid {

constexpr uint32_t LANES = 32;
constexpr uint32_t ITEM_BYTES = 8192;  // of the wire, for a warp

// n / d for n, d < 2^31 (Granlund and Montgomery).
struct Divisor {
  uint32_t multiplier, shift, d;
  KVC_HD uint32_t divide(uint32_t n) const { return uint32_t((uint64_t(n) * multiplier) >> shift); }
};

inline Divisor divisor(uint32_t d) {
  uint32_t log = 0;
  while ((1ull << log) < d) ++log;
  const uint64_t m = ((1ull << (31 + log)) + d - 1) / d;
  return {uint32_t(m), 31 + log, d};
}

struct GridPart {
  uint64_t kv;               // address of block 0
  uint64_t offset;           // of the part in a chunk
  uint64_t wire_head;        // bytes of a head on the wire
  int64_t block_stride, head_stride, token_stride, token_outer, content_stride, content_outer;
  uint32_t first_item, items;
  uint32_t wire_row;         // bytes of a token of one head on the wire
  uint32_t row_units;        // units of a token
  uint32_t slice_units;      // units of a slice of a token; row_units unless tokens are long
  uint32_t step_rows, step_columns;  // 32 units on
  uint32_t content, kv_item, wire_item, kv_type, wire_type;
  float factor;
  uint32_t runs;             // tokens follow one another
  uint32_t copied;           // bytes as they are
  uint32_t reserved;
  Divisor heads, pieces, row, token_tile, content_tile;
};

struct Piece {  // some tokens of a segment
  int32_t block, token, count, unit;
  uint64_t tau;   // in its chunk
  uint64_t wire;  // address of its chunk
};

enum class Path : uint32_t {
  PLAIN16,  // units of 16 bytes on both sides
  PLAIN8,
  CELLS,    // element by element: any strides, tiles, types
  // 8 elements of kv_item and wire_item bytes
  CONVERT_1_2,
  CONVERT_1_4,
  CONVERT_2_1,
  CONVERT_2_4,
  CONVERT_4_1,
  CONVERT_4_2,
};

struct alignas(16) Words16 {
  uint64_t w[2];
};

// ---- memory

// Through the cache: neighbours of an element are read soon.
template <class T>
KVC_HD T load_near(uint64_t address) {
#ifdef __CUDA_ARCH__
  return __ldg((const T*)__cvta_global_to_generic(address));
#else
  T v;
  memcpy(&v, (const void*)address, sizeof v);
  return v;
#endif
}

// Of what nobody reads again.
template <class T>
KVC_HD T load(uint64_t address) {
#ifdef __CUDA_ARCH__
  static_assert(sizeof(T) <= 16, "");
  T v;
  if constexpr (sizeof(T) == 16)
    asm volatile("ld.global.nc.L1::no_allocate.v2.u64 {%0, %1}, [%2];"
                 : "=l"(v.w[0]), "=l"(v.w[1])
                 : "l"(address));
  else if constexpr (sizeof(T) == 8)
    asm volatile("ld.global.nc.L1::no_allocate.u64 %0, [%1];" : "=l"(v) : "l"(address));
  else
    v = load_near<T>(address);
  return v;
#else
  return load_near<T>(address);
#endif
}

template <class T>
KVC_HD void store(uint64_t address, const T& v) {
#ifdef __CUDA_ARCH__
  *(T*)__cvta_global_to_generic(address) = v;  // says that it is no shared or local memory
#else
  memcpy((void*)address, &v, sizeof v);
#endif
}

// ---- conversion of types known at run time; equal for all lanes, so a branch costs little

KVC_HD uint32_t decode_any(uint32_t type, uint32_t bits) {
#define ROW(TYPE, BYTES) \
  if (type == KVC_##TYPE) return decode<KVC_##TYPE>(bits);
  KVC_NUMBERS(ROW)
#undef ROW
  return bits;
}

KVC_HD uint32_t encode_any(uint32_t type, uint32_t abs, uint32_t sign) {
#define ROW(TYPE, BYTES) \
  if (type == KVC_##TYPE) return encode<KVC_##TYPE>(abs, sign);
  KVC_NUMBERS(ROW)
#undef ROW
  return abs | sign;
}

KVC_HD uint32_t convert_any(uint32_t from, uint32_t to, uint32_t bits, float factor) {
  const uint32_t source = decode_any(from, bits);
  return encode_any(to, as_bits(as_float(source) * factor) & 0x7FFFFFFFu, source);
}

// 8 elements of ITEM bytes, as 64-bit words.
template <int ITEM>
struct Eight {
  uint64_t w[ITEM];
  KVC_HD uint32_t get(int i) const {
    const int bit = i * ITEM * 8;
    return uint32_t(w[bit / 64] >> (bit % 64)) & (ITEM == 4 ? ~0u : (1u << (ITEM * 8 % 32)) - 1);
  }
  KVC_HD void put(int i, uint32_t value) {
    const int bit = i * ITEM * 8;
    w[bit / 64] |= uint64_t(value) << (bit % 64);
  }
};

template <int ITEM>
KVC_HD Eight<ITEM> load_eight(uint64_t address) {
  Eight<ITEM> v;
  if constexpr (ITEM == 1) {
    v.w[0] = load<uint64_t>(address);
  } else {
    KVC_UNROLL
    for (int i = 0; i < ITEM; i += 2) {
      const Words16 pair = load<Words16>(address + 8 * i);
      v.w[i] = pair.w[0], v.w[i + 1] = pair.w[1];
    }
  }
  return v;
}

template <int ITEM>
KVC_HD void store_eight(uint64_t address, const Eight<ITEM>& v) {
  if constexpr (ITEM == 1) {
    store(address, v.w[0]);
  } else {
    KVC_UNROLL
    for (int i = 0; i < ITEM; i += 2) store(address + 8 * i, Words16{{v.w[i], v.w[i + 1]}});
  }
}

// Elements as floats' bits. Types are template parameters here and in encode_eight, so that a branch
// over them is taken once for eight elements.
template <uint32_t TYPE, int ITEM>
KVC_HD void decode_eight(const Eight<ITEM>& v, uint32_t* source) {
  KVC_UNROLL
  for (int i = 0; i < 8; ++i) source[i] = decode<TYPE>(v.get(i));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#define KVC_FP8_HARDWARE(TYPE) ((TYPE) == KVC_E4M3 || (TYPE) == KVC_E5M2)
template <uint32_t TYPE>
KVC_HD uint32_t fp8_pair(float low, float high) {
  uint16_t pair;
  if constexpr (TYPE == KVC_E4M3)
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}
#else
#define KVC_FP8_HARDWARE(TYPE) false
template <uint32_t TYPE>
KVC_HD uint32_t fp8_pair(float, float);  // never called
#endif

template <uint32_t TYPE, int ITEM>
KVC_HD void encode_eight(const uint32_t* source, float factor, Eight<ITEM>* found) {
  if constexpr (KVC_FP8_HARDWARE(TYPE)) {  // NaN and sign as in types.h
    KVC_UNROLL
    for (int i = 0; i < 8; i += 2) {
      const float low = as_float(source[i]) * factor, high = as_float(source[i + 1]) * factor;
      const uint32_t signs = ((source[i] >> 24) & 0x80) | ((source[i + 1] >> 16) & 0x8000);
      found->w[0] |= uint64_t((fp8_pair<TYPE>(low, high) & 0x7F7Fu) | signs) << (8 * i);
    }
  } else {
    KVC_UNROLL
    for (int i = 0; i < 8; ++i)
      found->put(i, encode<TYPE>(as_bits(as_float(source[i]) * factor) & 0x7FFFFFFFu, source[i]));
  }
}

template <int FROM, int TO>
KVC_HD Eight<TO> convert_eight(const Eight<FROM>& v, uint32_t from, uint32_t to, float factor) {
  uint32_t source[8] = {};
  Eight<TO> found = {};
#define ROW(TYPE, BYTES)          \
  if constexpr (FROM == BYTES)    \
    if (from == KVC_##TYPE) decode_eight<KVC_##TYPE>(v, source);
  KVC_NUMBERS(ROW)
#undef ROW
#define ROW(TYPE, BYTES)        \
  if constexpr (TO == BYTES)    \
    if (to == KVC_##TYPE) encode_eight<KVC_##TYPE>(source, factor, &found);
  KVC_NUMBERS(ROW)
#undef ROW
  return found;
}

// ---- an item, decoded

struct Item {
  uint64_t kv;       // of token 0 of the block and head
  uint64_t wire;     // address of the item's first unit
  uint64_t offset;   // of that unit in the chunk
  uint32_t token, first_unit;  // where in the block, and in the token, it begins
  uint32_t units;    // of all its tokens
  uint32_t columns;  // units until the next token
  uint32_t unit;     // index into sums
};

// Goes through the items of one warp in order.
struct Cursor {
  const GridPart* parts;
  const Piece* pieces;
  uint32_t part = 0;

  KVC_HD Item decode(uint32_t index) {
    while (index - parts[part].first_item >= parts[part].items) ++part;
    const GridPart& p = parts[part];
    const uint32_t local = index - p.first_item;
    const uint32_t outer = p.pieces.divide(local);
    const Piece piece = pieces[local - outer * p.pieces.d];
    const uint32_t slice = p.heads.divide(outer);
    const uint32_t head = outer - slice * p.heads.d;
    Item item;
    item.first_unit = slice * p.slice_units;
    item.kv = p.kv + int64_t(piece.block) * p.block_stride + int64_t(head) * p.head_stride;
    item.offset = p.offset + head * p.wire_head + piece.tau * p.wire_row;
    item.wire = piece.wire + item.offset;
    item.token = piece.token, item.unit = piece.unit;
    const uint32_t rest = p.row_units - item.first_unit;
    if (rest > p.slice_units || item.first_unit) {  // a slice: the piece has one token
      item.units = rest < p.slice_units ? rest : p.slice_units;
      item.columns = item.units;
      if (piece.count == 0) item.units = 0;
    } else {
      item.units = uint32_t(piece.count) * p.row_units;
      item.columns = p.runs ? ~0u : p.row_units;
    }
    return item;
  }
};

KVC_HD int64_t place_of(const GridPart& p, uint32_t token) {
  const uint32_t tile = p.token_tile.divide(token);
  return int64_t(tile) * p.token_outer + int64_t(token - tile * p.token_tile.d) * p.token_stride;
}

// Units l, l + 32, ... of an item whose tokens are token_stride apart, on the cache's side.
struct Rows {
  uint64_t address;  // of the token
  uint32_t column, columns, step_columns;
  uint64_t stride, step;  // to the next token; 32 units on

  KVC_HD Rows(const GridPart& p, const Item& item, uint32_t lane, uint32_t unit_bytes) {
    const bool one = item.columns == ~0u || item.columns == item.units;
    const uint32_t row = one ? 0 : p.row.divide(lane);
    columns = one ? ~0u : item.columns;
    column = lane - (one ? 0 : row * p.row_units);
    step_columns = one ? LANES : p.step_columns;
    stride = p.token_stride;
    step = one ? 0 : p.step_rows * stride;
    address = item.kv + item.token * stride + row * stride + uint64_t(item.first_unit) * unit_bytes;
  }
  KVC_HD uint64_t at(uint32_t unit_bytes) const { return address + uint64_t(column) * unit_bytes; }
  KVC_HD void next() {
    column += step_columns;
    address += step;
    if (column >= columns) column -= columns, address += stride;
  }
};

// ---- the paths: what lane `lane` does of an item; the sum of its words

template <class WORDS, bool GATHER>
KVC_HD uint64_t plain(const GridPart& p, const Item& item, uint32_t lane) {
  constexpr uint32_t BYTES = sizeof(WORDS), FLIGHT = 8;
  const uint64_t skip = uint64_t(item.first_unit) * BYTES;
  const uint64_t wire = item.wire + skip, offset = item.offset + skip;
  Rows rows(p, item, lane, BYTES);
  uint64_t found = 0;
  for (uint32_t u = lane; u < item.units; u += LANES * FLIGHT) {
    WORDS v[FLIGHT];
    KVC_UNROLL
    for (uint32_t j = 0; j < FLIGHT; ++j) {
      if (u + j * LANES < item.units) {
        v[j] = load<WORDS>(GATHER ? rows.at(BYTES) : wire + uint64_t(u + j * LANES) * BYTES);
      }
      if (GATHER) rows.next();
    }
    KVC_UNROLL
    for (uint32_t j = 0; j < FLIGHT; ++j) {
      const uint32_t at = u + j * LANES;
      if (at < item.units) {
        store(GATHER ? wire + uint64_t(at) * BYTES : rows.at(BYTES), v[j]);
        const uint64_t key = key_at(offset + uint64_t(at) * BYTES);
        const uint64_t* words = (const uint64_t*)&v[j];
        found += mix(words[0], key);
        if (BYTES == 16) found += mix(words[BYTES / 16], key + 8 * KEY_STEP);
      }
      if (!GATHER) rows.next();
    }
  }
  return found;
}

template <int KV, int WIRE, bool GATHER>
KVC_HD uint64_t converted(const GridPart& p, const Item& item, uint32_t lane) {
  constexpr uint32_t FLIGHT = 4;
  const uint64_t skip = uint64_t(item.first_unit) * 8 * WIRE;
  const uint64_t wire = item.wire + skip, offset = item.offset + skip;
  Rows rows(p, item, lane, 8 * KV);
  uint64_t found = 0;
  const auto add = [&](const Eight<WIRE>& v, uint32_t at) {
    uint64_t key = key_at(offset + uint64_t(at) * 8 * WIRE);
    KVC_UNROLL
    for (int i = 0; i < WIRE; ++i, key += 8 * KEY_STEP) found += mix(v.w[i], key);
  };
  for (uint32_t u = lane; u < item.units; u += LANES * FLIGHT) {
    Eight<GATHER ? KV : WIRE> v[FLIGHT];
    KVC_UNROLL
    for (uint32_t j = 0; j < FLIGHT; ++j) {
      const uint32_t at = u + j * LANES;
      if (at < item.units)
        v[j] = load_eight<GATHER ? KV : WIRE>(GATHER ? rows.at(8 * KV)
                                                     : wire + uint64_t(at) * 8 * WIRE);
      if (GATHER) rows.next();
    }
    KVC_UNROLL
    for (uint32_t j = 0; j < FLIGHT; ++j) {
      const uint32_t at = u + j * LANES;
      if (at < item.units) {
        if constexpr (GATHER) {
          const auto made = convert_eight<KV, WIRE>(v[j], p.kv_type, p.wire_type, p.factor);
          store_eight<WIRE>(wire + uint64_t(at) * 8 * WIRE, made);
          add(made, at);
        } else {
          add(v[j], at);
          store_eight<KV>(rows.at(8 * KV),
                          convert_eight<WIRE, KV>(v[j], p.wire_type, p.kv_type, p.factor));
        }
      }
      if (!GATHER) rows.next();
    }
  }
  return found;
}

KVC_HD uint64_t load_item(uint64_t address, uint32_t item) {
  if (item == 1) return load_near<uint8_t>(address);
  if (item == 2) return load_near<uint16_t>(address);
  if (item == 4) return load_near<uint32_t>(address);
  return load_near<uint64_t>(address);
}

KVC_HD void store_item(uint64_t address, uint32_t item, uint64_t value) {
  if (item == 1) store(address, uint8_t(value));
  if (item == 2) store(address, uint16_t(value));
  if (item == 4) store(address, uint32_t(value));
  if (item == 8) store(address, value);
}

// A unit is 8 bytes of a token on the wire, fewer at its end; 16 for elements that large.
template <bool GATHER>
KVC_HD uint64_t cells(const GridPart& p, const Item& item, uint32_t lane) {
  const uint32_t unit_bytes = p.wire_item == 16 ? 16 : 8;
  const uint32_t per_unit = unit_bytes / p.wire_item;
  const uint32_t parts = p.wire_item == 16 ? 2 : 1;  // an element of 16 bytes goes as two
  const uint32_t bytes = p.wire_item / parts, kv_bytes = p.kv_item / parts;
  uint64_t found = 0;
  const bool slice = item.columns != ~0u && item.units == item.columns;
  for (uint32_t u = lane; u < item.units; u += LANES) {
    const uint32_t row = slice ? 0 : p.row.divide(u);
    const uint32_t column = item.first_unit + u - row * p.row_units;
    const uint64_t token = item.kv + place_of(p, item.token + row);
    const uint64_t at = uint64_t(row) * p.wire_row + uint64_t(column) * unit_bytes;
    uint32_t element = column * per_unit;
    uint64_t words[2] = {0, 0};
    for (uint32_t i = 0; i < per_unit && element < p.content; ++i, ++element) {
      const uint32_t tile = p.content_tile.divide(element);
      const uint64_t cell = token + int64_t(tile) * p.content_outer +
                            int64_t(element - tile * p.content_tile.d) * p.content_stride;
      KVC_UNROLL
      for (uint32_t k = 0; k < 2; ++k) {
        if (k == parts) break;
        const uint64_t place = item.wire + at + uint64_t(i) * p.wire_item + k * 8;
        uint64_t value = GATHER ? load_item(cell + k * 8, kv_bytes) : load_item(place, bytes);
        if (GATHER && !p.copied) value = convert_any(p.kv_type, p.wire_type, value, p.factor);
        words[k] |= value << (8 * bytes * i % 64);
        if (!GATHER && !p.copied) value = convert_any(p.wire_type, p.kv_type, value, p.factor);
        if (GATHER)
          store_item(place, bytes, value);
        else
          store_item(cell + k * 8, kv_bytes, value);
      }
    }
    const uint64_t key = key_at(item.offset + at);
    found += mix(words[0], key);
    if (parts == 2) found += mix(words[1], key + 8 * KEY_STEP);
  }
  return found;
}

// ---- plain runs, of any addresses

struct Run {
  uint64_t dst, src, bytes;
};

// Bytes of a run, which are a multiple of sizeof(T), as are its addresses.
template <class T>
KVC_HD void copy_run(const Run& run, uint32_t lane) {
  constexpr uint32_t BYTES = sizeof(T), FLIGHT = 8;
  for (uint64_t at = lane * BYTES; at < run.bytes; at += LANES * FLIGHT * BYTES) {
    T v[FLIGHT];
    KVC_UNROLL
    for (uint32_t j = 0; j < FLIGHT; ++j)
      if (at + j * LANES * BYTES < run.bytes) v[j] = load<T>(run.src + at + j * LANES * BYTES);
    KVC_UNROLL
    for (uint32_t j = 0; j < FLIGHT; ++j)
      if (at + j * LANES * BYTES < run.bytes) store(run.dst + at + j * LANES * BYTES, v[j]);
  }
}

template <Path PATH, bool GATHER>
KVC_HD uint64_t work(const GridPart& p, const Item& item, uint32_t lane) {
  if constexpr (PATH == Path::PLAIN16) return plain<Words16, GATHER>(p, item, lane);
  if constexpr (PATH == Path::PLAIN8) return plain<uint64_t, GATHER>(p, item, lane);
  if constexpr (PATH == Path::CELLS) return cells<GATHER>(p, item, lane);
  if constexpr (PATH == Path::CONVERT_1_2) return converted<1, 2, GATHER>(p, item, lane);
  if constexpr (PATH == Path::CONVERT_1_4) return converted<1, 4, GATHER>(p, item, lane);
  if constexpr (PATH == Path::CONVERT_2_1) return converted<2, 1, GATHER>(p, item, lane);
  if constexpr (PATH == Path::CONVERT_2_4) return converted<2, 4, GATHER>(p, item, lane);
  if constexpr (PATH == Path::CONVERT_4_1) return converted<4, 1, GATHER>(p, item, lane);
  if constexpr (PATH == Path::CONVERT_4_2) return converted<4, 2, GATHER>(p, item, lane);
  return 0;
}

}  // namespace grid
}  // namespace kvc

#endif
