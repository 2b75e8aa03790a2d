// A chunk of a checked call, as the CPU's instruction-set variants get it.
#ifndef KVC_CPU_CALL_H
#define KVC_CPU_CALL_H

#include "plan.h"

namespace kvc {

struct Call {
  const Part* parts;
  uint32_t n_parts;
  const kvc_segment* segments;
  uint32_t n_segments;
  const kvc_segment* later;  // the first segment of the next chunk; null after the last one
  uint64_t tokens;  // of the chunk
  uint8_t* wire;
  bool gather;
  bool stream;  // write past the cache
};

// Moves the chunk and adds to sums[unit].
using Run = void (*)(const Call&, uint64_t* sums);

}  // namespace kvc

#endif
