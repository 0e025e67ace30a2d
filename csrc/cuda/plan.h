// What a call's tensors are cut into, in tables on the device: made once, and found again by what they depend on. And
// the memory that its kernels leave something in: one for each stream, and in a CUDA graph one for each call.
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

enum Needs : unsigned {
  kLongRows = 1,  // what is told of rows that are cut: they are summed, or have a mask
  kTotals = 2,    // something is summed or counted over a tensor or over all of them: tickets, and sums of tiles
  kProducts = 4,  // beside kTotals: three sums of each tile, instead of one
};

// How an operation walks tensors; one object for each way, by which its plans are found.
struct Walk {
  const char* op;
  int small, large;  // tensors whose arguments fit the two sizes of a launch
  int eights;        // that a thread of a block of kShortThreads takes; of a larger one it takes kLongEights
  int64_t resident;  // longest row that is not cut into segments
  unsigned needs;    // see Needs
  int words;         // `Plan::words`
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

// What kernels only read. Captured graphs read it at every replay, wherever they were captured.
struct Tables {
  std::vector<Launch> launches;
  std::vector<Launch> segments;  // the tiles of those with segments, for a second pass over them
  const LongRow* rows = nullptr;
  const uint32_t* blocks = nullptr;  // tiles of each tensor
  uint32_t long_rows = 0, partials = 0, tensors = 0, tiles = 0;
  uint32_t* zeros = nullptr;  // behind the tables, as they are uploaded with them: the Plan::zeros of their stream
  Buffer memory;
};

// The operation, the device and the stream of a call.
struct Place {
  const char* op;
  int device;
  Stream stream;
  bool captured;  // into a CUDA graph: nothing runs before its replays
};

// The tables of a call, and memory of its stream's. Two kernels that may run at the same time never share a plan.
struct Plan {
  Plan(const Walk& walk, std::shared_ptr<const Tables> tables);

  const std::shared_ptr<const Tables> tables;
  const std::vector<Launch>&launches, &segments;
  const uint32_t* const blocks;
  const uint32_t tiles;

  // Words that are 0 when a call begins, and that it leaves so: tickets of long rows, `tickets`, `words`.
  uint32_t zero_count;
  uint32_t* zeros = nullptr;
  LongRows long_rows = {};
  uint32_t* tickets = nullptr;  // one for each tensor, and one for all
  uint32_t* words = nullptr;    // Walk::words of them, at a multiple of 16 bytes, for whatever the operation counts
  double* sums = nullptr;       // one for each tile, or three; not zero

  Place place = {};       // if it is captured, the plan is for one call
  Buffer scratch;         // of a graph's it is given back behind the call, as all that torch allocates in a capture
  mutable bool are_zero;  // `zeros`: not in a graph's memory, and not behind a call that failed between two launches
  mutable std::mutex in_use;  // from a call's first launch to its last: what one leaves in `scratch` the next one needs
};

// While a call starts its kernels: other threads may run Python, and wait with calls of the same plan. Clears what is
// not zero first.
class Launching {
 public:
  explicit Launching(const Plan& plan);
  ~Launching();

 private:
  const Plan& plan_;
  const int exceptions_;
  WithoutGil released_;
  std::lock_guard<std::mutex> lock_;
};

// Throws WrongDevice where another device is current.
Place place_of(const char* op, const Table& like);

// The plan of a call; made, and its tables uploaded, where there is none. In a capture nothing can be uploaded:
// LaunchError where no earlier call, on any stream, has made the tables.
std::shared_ptr<const Plan> find_plan(const Walk& walk, const Call& call, const Place& place);

}  // namespace flatkern::cuda
