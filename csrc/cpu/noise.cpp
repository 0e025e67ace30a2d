// The noise family on the CPU: fill_normal_.
#include "normals.h"

namespace flatkern::cpu::FK_ISA {
namespace {

struct FillNormalWalk {
  const FillNormal& a;
  Gaussian gaussian;

  Squares prepare(const Block&, Scratch&) const { return {}; }
  float finish_row(int64_t, int64_t, const double*) const { return 1.0f; }
  void finish(const Block& b, const float*, Scratch& scratch) const {
    const float* z = gaussian.draw(b, scratch);
    store(a.outs[b.k], b.begin, b.n, b.rows > 1 ? Gaussian::scaled_rows(b, z, scratch) : z);
  }
};

}  // namespace

void fill_normal_(const FillNormal& a) {
  for_each_row(a.outs, FillNormalWalk{a, Gaussian(a.outs, a.noise, a.index, a.offset)});
}

}  // namespace flatkern::cpu::FK_ISA
