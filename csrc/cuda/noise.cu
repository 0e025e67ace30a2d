// The noise family on CUDA: fill_normal_.
#include "host.cuh"
#include "noise.cuh"
#include "operations.h"

namespace flatkern::cuda {
namespace {

template <size_t kBytes>
struct FillArguments {
  static constexpr int kTensors = (kBytes - sizeof(void*) - sizeof(Key)) / (sizeof(void*) + sizeof(uint32_t) + 1) - 1;
  const Tile* tiles;
  Key key;
  void* outs[kTensors];
  uint32_t index[kTensors];
  uint8_t codes[kTensors];
};

constexpr int kEights = 2;
const Walk kFill = walk_of<FillArguments>("fill_normal_", kEights, kSegment);

template <class T, bool kWhole, class Args>
FK_DEVICE void fill_tile(const Args& a, const Tile& t) {
  const Team<kWhole> team(t);
  const Counters counters(t, team, a.index[t.tensor]);
  const Key key = a.key.get();
  const Elements<T> out(a.outs[t.tensor], a.codes[t.tensor], team.start);
  for_each_eight<kEights>(team, [&](int, const auto& s) {
    float z[8];
    if constexpr (kWhole) {
      draw(key, counters, s.place / kEight, z);
    } else {
      shifted_normals(key, counters, s.place, z);
    }
    out.template store<Use::kAgain>(s, out.rounded(z));
  });
}

template <class T, class Args>
__global__ void __launch_bounds__(kShortThreads) fill_kernel(FK_PARAM(Args) a) {
  const Tile& t = a.tiles[blockIdx.x];
  if ((t.flags & kWhole) != 0) {
    fill_tile<T, true>(a, t);
  } else {
    fill_tile<T, false>(a, t);
  }
}

template <class T>
void run(const FillNormal& a, const Plan& plan, Stream stream) {
  for_each_launch<FillArguments>(plan.launches, [&](const Launch& launch, auto& args) {
    args.tiles = launch.tiles;
    args.key = key_of(a.noise);
    for (int64_t k = launch.begin; k < launch.end; ++k) {
      args.outs[k - launch.begin] = a.outs[k].data;
      args.index[k - launch.begin] = static_cast<uint32_t>(a.index[k]);
      args.codes[k - launch.begin] = static_cast<uint8_t>(code_of(a.outs[k].dtype));
    }
    start(kFill.op, kernel<fill_kernel<T, std::decay_t<decltype(args)>>>, launch.count, launch.threads, stream, args);
  });
}

}  // namespace

void fill_normal_(const FillNormal& a) {
  if (a.outs.size() == 0) return;
  const Place place = place_of(kFill.op, a.outs);
  const auto plan = find_plan(kFill, {true, false, a.outs, {}, &a.offset}, place);
  const Launching launching(*plan);
  if (all_are(DType::kFloat32, {&a.outs})) {
    run<float>(a, *plan, place.stream);
  } else {
    run<AnyFloat>(a, *plan, place.stream);
  }
}

}  // namespace flatkern::cuda
