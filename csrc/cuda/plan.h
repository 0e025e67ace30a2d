// What a call's tensors are cut into, in tables on the device: made once, and found again by what they depend on.
#pragma once

#include <initializer_list>
#include <memory>
#include <mutex>
#include <vector>

#include "../common/table.h"
#include "rows.h"
#include "tile.h"
#include "torch.h"

namespace flatkern::cuda {

// How an operation walks tensors; one object for each way, by which its plans are found.
struct Walk {
  const char* op;
  int small, large;  // tensors whose arguments fit the two sizes of a launch
  int eights;        // that a thread of a block of kShortThreads takes; of a larger one it takes kLongEights
  int64_t resident;  // longest row that is not cut into segments
  bool sums;         // of rows that are cut LongRows is needed: they are summed, or have a mask
  int counters = 0;  // 64-bit ones that its launches leave at zero
};

// How one call of it does.
struct Call {
  bool by_rows;       // rows are filters, else all of a tensor
  bool odd_vectors;   // something has an entry per element of a vector, so that these are walked one by one
  const Table& like;  // the tensors that are walked
  std::initializer_list<const Table*> beside;  // lists like it, whose alignment matters
  const Ints* offset;
};

// One launch: tensors [begin, end) and their tiles.
struct Launch {
  int64_t begin, end;
  unsigned threads;
  int eights;  // that a thread takes
  const Tile* tiles;
  unsigned count;
};

struct Plan {
  std::vector<Launch> launches;
  std::vector<Launch> segments;  // the tiles of those with segments, for a second pass over them
  LongRows long_rows = {};
  uint32_t* tickets = nullptr;       // one for each tensor, and one for all
  const uint32_t* blocks = nullptr;  // tiles of each tensor
  double* sums = nullptr;            // one for each tile
  unsigned long long* counters = nullptr;
  mutable bool counters_are_zero = true;  // but for a call that failed between two launches
  uint32_t tiles = 0;
  Buffer table, scratch;
  mutable std::mutex in_use;  // from a call's first launch to its last: what one leaves in `scratch` the next one needs
};

// While a call starts its kernels: other threads may run Python, and wait with calls of the same plan.
class Launching {
 public:
  explicit Launching(const Plan& plan) : lock_(plan.in_use) {}

 private:
  WithoutGil released_;
  std::lock_guard<std::mutex> lock_;
};

// The device and the stream of a call. Throws WrongDevice where another device is current.
struct Place {
  int device;
  Stream stream;
};
Place place_of(const char* op, const Table& like);

// The plan of a call; made, and its tables uploaded, where there is none.
std::shared_ptr<const Plan> find_plan(const Walk& walk, const Call& call, const Place& place);

}  // namespace flatkern::cuda
