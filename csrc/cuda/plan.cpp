// Cutting tensors into tiles, and remembering the tables.
//
// In a capture a call has memory of its own, which torch allocates from the graph's pool: two graphs may be replayed at
// the same time, and the stream's own memory is in use by calls outside. As soon as the call is captured it is given
// back, and later calls of the same graph may be given it again, which run behind. The tables are those of the calls
// outside. They stay for as long as the process, as nobody tells when a graph is gone.
#include "plan.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <list>
#include <map>
#include <string>

#include "../common/check.h"
#include "runtime.h"

namespace flatkern::cuda {
namespace {

constexpr int kMostPlans = 32;  // of an operation

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What of one tensor decides about its tiles.
struct Form {
  int64_t rows, cols;
  uint32_t counter_row;
  uint64_t first_eight;
  uint32_t flags;  // kFlat, and kWhole where its rows may be moved 16 bytes at a time
  uint32_t shift;

  bool is_cut(int64_t resident) const { return cols > resident; }
  // Threads of a team: a power of two inside of a warp, or whole warps; 32 have a chunk, and each so many eights.
  int threads(int eights) const {
    if (cols > kChunk) return kWarp * static_cast<int>(ceil_div(ceil_div(cols, kChunk), eights));
    int lanes = 1;
    while (lanes * kEight < cols) lanes *= 2;
    return lanes;
  }
};

bool is_aligned(const Call& call, int64_t k) {
  if (reinterpret_cast<uintptr_t>(call.like[k].data) % 16 != 0) return false;
  for (const Table* list : call.beside)
    if (*list && reinterpret_cast<uintptr_t>((*list)[k].data) % 16 != 0) return false;
  return true;
}

Form form_of(const Call& call, int64_t k) {
  const View& t = call.like[k];
  const bool flat = t.ndim < 2;
  const int64_t offset = call.offset != nullptr ? (*call.offset)[k] : 0;
  Form f = {};
  f.rows = call.by_rows ? t.rows : 1;
  f.cols = call.by_rows ? t.cols : t.numel;
  f.counter_row = flat ? 0 : static_cast<uint32_t>(offset);
  f.first_eight = flat ? static_cast<uint64_t>(offset) / kEight : 0;
  f.shift = flat ? static_cast<uint32_t>(offset % kEight) : 0;
  const bool whole = is_aligned(call, k) && (f.rows <= 1 || f.cols % kEight == 0) && f.shift == 0;
  f.flags = (flat ? kFlat : 0) | (whole && !(flat && call.odd_vectors) ? kWhole : 0);
  return f;
}

// Everything on the host that becomes a plan.
struct Builder {
  explicit Builder(const Walk& walk) : walk(walk) {}

  const Walk& walk;
  std::vector<Tile> tiles;
  std::vector<LongRow> long_rows;
  std::vector<uint32_t> blocks;  // of each tensor
  uint32_t segments = 0;
  int block_threads = 0, eights = 0;
  size_t first_tensor = 0;  // of the launch that is being made

  void add(Tile tile, const Form& f, uint32_t tensor, int64_t length, int64_t last, int64_t teams, int threads) {
    tile.tensor = tensor;
    tile.length = static_cast<uint16_t>(length);
    tile.last = static_cast<uint16_t>(last);
    tile.teams = static_cast<uint16_t>(teams);
    tile.threads = static_cast<uint16_t>(threads);
    tile.reciprocal = static_cast<uint32_t>(ceil_div(int64_t{1} << 20, threads));
    const bool whole = (f.flags & kWhole) != 0 && length % kEight == 0 && last % kEight == 0;
    tile.flags |= ((f.flags & kFlat) | (whole ? kWhole : 0) | f.shift << kShiftBit);
    tiles.push_back(tile);
    ++blocks[first_tensor + tensor];
  }

  void add_rows(const Form& f, uint32_t tensor) {
    const int threads = f.threads(eights);
    const int64_t teams = block_threads / threads;
    for (int64_t row = 0; row < f.rows; row += teams) {
      Tile tile = {};
      tile.start = row * f.cols;
      tile.row = static_cast<uint32_t>(row);
      tile.counter_row = f.counter_row + static_cast<uint32_t>(row);
      tile.counter_eight = static_cast<uint32_t>(f.first_eight);
      add(tile, f, tensor, f.cols, f.cols, std::min(teams, f.rows - row), threads);
    }
  }

  // Of rows that are cut; teams have segments of one of them.
  void add_segments(const Form& f, uint32_t tensor) {
    const int threads = kWarp * static_cast<int>(ceil_div(kSegment / kChunk, eights));
    const int64_t teams = block_threads / threads, count = ceil_div(f.cols, kSegment);
    for (int64_t row = 0; row < f.rows; ++row) {
      for (int64_t first = 0; first < count; first += teams) {
        const int64_t here = std::min(teams, count - first);
        Tile tile = {};
        tile.start = row * f.cols + first * kSegment;
        tile.row = static_cast<uint32_t>(row);
        tile.counter_row = f.counter_row + static_cast<uint32_t>(row);
        tile.counter_eight = static_cast<uint32_t>(f.first_eight + static_cast<uint64_t>(first) * (kSegment / kEight));
        tile.flags = kSegments;
        tile.long_row = static_cast<uint32_t>(long_rows.size());
        tile.segment = static_cast<uint32_t>(first);
        const int64_t last = std::min<int64_t>(kSegment, f.cols - (first + here - 1) * kSegment);
        add(tile, f, tensor, kSegment, last, here, threads);
      }
      if ((walk.needs & kLongRows) == 0) continue;
      long_rows.push_back({f.cols, segments, static_cast<uint32_t>(count)});
      segments += static_cast<uint32_t>(count);
    }
  }
};

void check_counts(const Walk& walk, const std::vector<Form>& forms) {
  for (size_t k = 0; k < forms.size(); ++k)
    if (forms[k].rows > UINT32_MAX)
      throw Mismatch(std::string(walk.op) + ": tensor " + std::to_string(k) + " has more than 2^32 - 1 rows");
}

// Offsets of parts of one allocation, each at a multiple of 16 bytes.
struct Parts {
  size_t size = 0;
  size_t add(size_t bytes) {
    const size_t at = size;
    size += (bytes + 15) / 16 * 16;
    return at;
  }
};

// The words that are 0 between calls.
uint32_t count_zeros(const Walk& walk, const Tables& tables) {
  return tables.long_rows + ((walk.needs & kTotals) != 0 ? tables.tensors + 1 : 0) + static_cast<uint32_t>(walk.words);
}

std::shared_ptr<const Tables> make_tables(const Walk& walk, const std::vector<Form>& forms, int device) {
  check_counts(walk, forms);
  auto made = std::make_shared<Tables>();
  Builder b{walk};
  const int64_t count = static_cast<int64_t>(forms.size());
  const int64_t most = count <= walk.small ? walk.small : walk.large;
  struct Range {
    size_t first, cut, end;
  };
  std::vector<Range> ranges;
  // Without tensors there is one launch, too, of an empty tile: a norm is then zero.
  for (int64_t begin = 0; begin == 0 || begin < count; begin += most) {
    const int64_t end = std::min(count, begin + most);
    const auto needed = [&](int eights) {
      int threads = kShortThreads;
      for (int64_t k = begin; k < end; ++k)
        if (!forms[k].is_cut(walk.resident)) threads = std::max(threads, forms[k].threads(eights));
      return threads;
    };
    const bool is_long = needed(walk.eights) > kShortThreads;
    b.eights = is_long ? kLongEights : walk.eights;
    b.block_threads = is_long ? needed(kLongEights) : kShortThreads;
    Range range = {b.tiles.size(), 0, 0};
    b.first_tensor = b.blocks.size();
    b.blocks.resize(b.first_tensor + std::max<int64_t>(1, end - begin));
    if (count == 0) b.add(Tile{}, Form{}, 0, 0, 0, 0, 1);
    // Tiles with segments come last, so that a second pass over them is a range.
    for (const bool cut : {false, true}) {
      if (cut) range.cut = b.tiles.size();
      for (int64_t k = begin; k < end; ++k) {
        if (forms[k].is_cut(walk.resident) != cut) continue;
        const auto tensor = static_cast<uint32_t>(k - begin);
        cut ? b.add_segments(forms[k], tensor) : b.add_rows(forms[k], tensor);
        // An empty tensor has a step to count, too.
        if (b.blocks[b.first_tensor + tensor] == 0) b.add(Tile{}, forms[k], tensor, 0, 0, 0, 1);
      }
    }
    range.end = b.tiles.size();
    ranges.push_back(range);
    made->launches.push_back({begin, end, static_cast<unsigned>(b.block_threads), b.eights, nullptr, 0});
  }

  made->long_rows = static_cast<uint32_t>(b.long_rows.size());
  made->partials = b.segments;
  made->tensors = static_cast<uint32_t>(b.blocks.size());
  made->tiles = static_cast<uint32_t>(b.tiles.size());
  Parts table;
  const size_t tiles = table.add(b.tiles.size() * sizeof(Tile)), rows = table.add(b.long_rows.size() * sizeof(LongRow));
  const size_t blocks = table.add(b.blocks.size() * sizeof(uint32_t));
  const size_t zeros = table.add(count_zeros(walk, *made) * sizeof(uint32_t));
  std::vector<char> bytes(table.size, 0);
  std::memcpy(bytes.data() + tiles, b.tiles.data(), b.tiles.size() * sizeof(Tile));
  if (!b.long_rows.empty()) std::memcpy(bytes.data() + rows, b.long_rows.data(), b.long_rows.size() * sizeof(LongRow));
  std::memcpy(bytes.data() + blocks, b.blocks.data(), b.blocks.size() * sizeof(uint32_t));
  made->memory = upload(device, bytes.data(), bytes.size());
  made->rows = made->memory.at<LongRow>(rows);
  made->blocks = made->memory.at<uint32_t>(blocks);
  made->zeros = made->memory.at<uint32_t>(zeros);
  for (size_t i = 0; i < ranges.size(); ++i) {
    const Range& range = ranges[i];
    Launch& launch = made->launches[i];
    launch.tiles = made->memory.at<Tile>(tiles) + range.first;
    launch.count = static_cast<unsigned>(range.end - range.first);
    if (range.cut == range.end) continue;
    made->segments.push_back(launch);
    made->segments.back().tiles = made->memory.at<Tile>(tiles) + range.cut;
    made->segments.back().count = static_cast<unsigned>(range.end - range.cut);
  }
  return made;
}

// With memory for what kernels leave there.
std::shared_ptr<const Plan> make_plan(const Walk& walk, std::shared_ptr<const Tables> tables, const Place& place) {
  auto plan = std::make_shared<Plan>(walk, std::move(tables));
  const Tables& t = *plan->tables;
  Parts parts;
  const size_t zeros = place.captured ? parts.add(plan->zero_count * sizeof(uint32_t)) : 0;
  const size_t partials = parts.add(2 * t.partials * sizeof(double)), norms = parts.add(t.long_rows * sizeof(float));
  const size_t sums_of_tile = (walk.needs & kProducts) != 0 ? 3 : (walk.needs & kTotals) != 0 ? 1 : 0;
  const size_t sums = parts.add(sums_of_tile * t.tiles * sizeof(double));
  if (parts.size > 0) plan->scratch = allocate(place.device, parts.size);
  plan->place = place;
  plan->zeros = place.captured ? plan->scratch.at<uint32_t>(zeros) : t.zeros;
  plan->are_zero = !place.captured;
  plan->words = plan->zeros;
  uint32_t* tickets = plan->zeros + walk.words;
  plan->long_rows = {t.rows, plan->scratch.at<double>(partials), tickets, plan->scratch.at<float>(norms), t.partials};
  plan->tickets = tickets + t.long_rows;
  plan->sums = plan->scratch.at<double>(sums);
  return plan;
}

// What a plan depends on, as numbers.
struct PlanKey {
  std::vector<int64_t> words;
  bool operator==(const PlanKey& other) const {
    return words.size() == other.words.size() &&
           std::memcmp(words.data(), other.words.data(), words.size() * sizeof(int64_t)) == 0;
  }
};

struct Known {
  PlanKey key;
  std::shared_ptr<const Plan> plan;
  bool in_graphs;  // a captured graph reads its tables
};

// Gives up what was not used for longest, and what no graph reads.
void drop_oldest(std::list<Known>& plans) {
  const auto can_go = [](const Known& k) { return !k.in_graphs; };
  if (std::count_if(plans.begin(), plans.end(), can_go) <= kMostPlans) return;
  plans.erase(std::prev(std::find_if(plans.rbegin(), plans.rend(), can_go).base()));
}

}  // namespace

Plan::Plan(const Walk& walk, std::shared_ptr<const Tables> given)
    : tables(std::move(given)),
      launches(tables->launches),
      segments(tables->segments),
      blocks(tables->blocks),
      tiles(tables->tiles),
      zero_count(count_zeros(walk, *tables)) {}

Launching::Launching(const Plan& plan) : plan_(plan), exceptions_(std::uncaught_exceptions()), lock_(plan.in_use) {
  if (!plan.are_zero && plan.zero_count > 0) clear(plan.place.op, plan.zeros, plan.zero_count, plan.place.stream);
  plan.are_zero = false;
}

Launching::~Launching() { plan_.are_zero = std::uncaught_exceptions() == exceptions_; }

Place place_of(const char* op, const Table& like) {
  const int device = like.size() > 0 ? like[0].device.index : 0;
  const int current = current_device();
  if (like.size() > 0 && current != device)
    throw WrongDevice(std::string(op) + ": device " + std::to_string(current) + " is current, but the tensors are on " +
                      std::to_string(device));
  const Stream stream = current_stream(device);
  return {op, device, stream, is_capturing(stream)};
}

std::shared_ptr<const Plan> find_plan(const Walk& walk, const Call& call, const Place& place) {
  // A list for each way of walking, the plan of the last call first. The GIL protects it. It lives as long as the
  // process, as its tensors cannot be given back when Python is gone.
  static auto& known = *new std::map<const Walk*, std::list<Known>>;
  std::vector<Form> forms(call.like.size());
  PlanKey key;
  key.words.reserve(1 + 5 * forms.size());
  key.words = {place.device};
  for (int64_t k = 0; k < call.like.size(); ++k) {
    const Form& f = forms[k] = form_of(call, k);
    for (const int64_t word : {f.rows, f.cols, static_cast<int64_t>(f.counter_row), static_cast<int64_t>(f.first_eight),
                               static_cast<int64_t>(f.flags | f.shift << kShiftBit)})
      key.words.push_back(word);
  }
  std::list<Known>& plans = known[&walk];
  // Outside of a capture another stream has other tables, whose upload it need not wait for.
  const auto found = std::find_if(plans.begin(), plans.end(), [&](const Known& k) {
    return (place.captured || k.plan->place.stream == place.stream) && k.key == key;
  });
  if (found != plans.end()) {
    plans.splice(plans.begin(), plans, found);
    if (!place.captured) return found->plan;
    found->in_graphs = true;
    return make_plan(walk, found->plan->tables, place);
  }
  if (place.captured)
    throw LaunchError(
        std::string(place.op) +
        ": a CUDA graph captures a call whose tables are not on the device yet; run the same steps on the "
        "same tensors before the capture, as torch.cuda.graph asks");
  auto plan = make_plan(walk, make_tables(walk, forms, place.device), place);
  if (plan->zero_count > 0) prepare_clear(place.op);  // for captures, in which no kernel can be loaded
  plans.push_front({std::move(key), std::move(plan), false});
  drop_oldest(plans);
  return plans.front().plan;
}

}  // namespace flatkern::cuda
