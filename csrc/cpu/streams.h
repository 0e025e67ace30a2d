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

// How a thread walks its tiles.
struct StreamVariant {
  const char* name;
  int64_t step;  // elements of a stream that are moved before those of the next stream
  int64_t
      places;   // of a tile that are walked in turn: processors fetch ahead at each, and one does not fill the memory
  bool around;  // writes bypass the caches
};

// Each is the fastest for some calls. Measured on two threads of an AMD EPYC with AVX-512, ResNet-50's and GPT-2's
// weights, lists of 1000 small tensors, 1 to 6 streams of float32 or bfloat16. Prefetching the next block of each
// stream, and updates around the caches, were slower everywhere.
constexpr StreamVariant kStreamVariants[] = {
    {"cached", 1024, 1, false},
    {"256 elements", 256, 1, true},
    {"256 elements, 2 places", 256, 2, true},
    {"128 elements, 2 places", 128, 2, true},
    {"256 elements, 4 places", 256, 4, true},
    {"128 elements, 4 places", 128, 4, true},
};
constexpr int64_t kStreamVariantCount = sizeof(kStreamVariants) / sizeof(kStreamVariants[0]);

// What is compiled for every instruction set.
#define FK_FOR_EACH_WALK(_) \
  FK_FOR_EACH_OPERATION(_)  \
  _(Streams, stream)

}  // namespace flatkern::cpu
