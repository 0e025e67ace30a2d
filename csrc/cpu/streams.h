// Memory moved as an operation moves it, and nothing computed: what a benchmark holds the operation's time against.
// No operation calls it.
#pragma once

#include "../common/arguments.h"

namespace flatkern::cpu {

enum class Access : uint8_t {
  kRead,
  kUpdate,  // read, and the same bits written back
  kWrite,   // zeros, over what has not been read
};

// A list of tensors. Of weights an element has 4 or 2 bytes, of uint8 masks a bit.
struct Stream {
  const Table* tensors;
  Access access;
};

constexpr int64_t kMostStreams = 16;  // of a call; Adam with everything has ten

struct Streams {
  Array<Stream> streams;
  const Table* weights;  // one of the streams: its tensors have a byte or more per element
  int64_t variant;       // of kStreamVariants
};

// How a thread walks its tiles. Processors fetch ahead at each place, and one place does not fill the memory.
struct StreamVariant {
  const char* name;
  int64_t step;    // elements of a stream that are moved before those of the next stream
  int64_t places;  // of a tile that are walked in turn
};

// Two threads of an AMD EPYC with AVX-512, 2026-11-28; float32 where nothing else is said. The first is the fastest for
// four matrices of 2^18 weights, which the caches hold, the second for bfloat16, the third for the updates of
// ResNet-50's and GPT-2's weights, the last where one tensor is read and for an ascent. What is not here gained 3 % at
// most: 64, 512 or 1024 elements at a time, 4 places with 256, 8 places; or nothing: prefetching the next block of each
// stream, updates around the caches, and writes through the caches, of lists that fit into them, too.
constexpr StreamVariant kStreamVariants[] = {
    {"256 elements", 256, 1},
    {"256 elements, 2 places", 256, 2},
    {"128 elements, 2 places", 128, 2},
    {"128 elements, 4 places", 128, 4},
};
constexpr int64_t kStreamVariantCount = sizeof(kStreamVariants) / sizeof(kStreamVariants[0]);

// What is compiled for every instruction set.
#define FK_FOR_EACH_WALK(_) \
  FK_FOR_EACH_OPERATION(_)  \
  _(Streams, stream)

}  // namespace flatkern::cpu
