// In which order threads and blocks run.
#pragma once

#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>

namespace flatkern::cuda::emulation {

// xorshift64*, Vigna 2016.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9E3779B97F4A7C15u + 0x2545F4914F6CDD1Du) {
    if (state_ == 0) state_ = 1;
    for (int i = 0; i < 4; ++i) next();
  }
  uint32_t next() {
    state_ ^= state_ >> 12;
    state_ ^= state_ << 25;
    state_ ^= state_ >> 27;
    return static_cast<uint32_t>((state_ * 0x2545F4914F6CDD1Du) >> 32);
  }

 private:
  uint64_t state_;
};

enum class Order { kForward, kReverse, kRandom, kWarps };
constexpr const char* kOrders[] = {"forward", "reverse", "random", "warps"};

struct Schedule {
  Order order;
  uint64_t seed;

  std::string text() const { return std::string(kOrders[static_cast<int>(order)]) + ":" + std::to_string(seed); }
};

// The schedule of launch number `launch`, where the user has asked for `text`.
inline Schedule schedule_of(const std::string& text, uint64_t launch) {
  if (text.empty()) return {static_cast<Order>(launch % 4), launch};
  const size_t colon = text.find(':');
  const std::string name = text.substr(0, colon), seed = colon == text.npos ? "" : text.substr(colon + 1);
  const bool is_number = !seed.empty() && seed.size() < 19 && seed.find_first_not_of("0123456789") == seed.npos;
  if (colon == text.npos || is_number)
    for (int i = 0; i < 4; ++i)
      if (name == kOrders[i]) return {static_cast<Order>(i), is_number ? std::stoull(seed) : launch};
  throw std::invalid_argument("emulation: the schedule is \"" + text +
                              "\", but should be forward, reverse, random or warps, or one of them with :seed");
}

// One of the set bits of `bits`, which has some; each is as likely as the others.
inline unsigned any_bit(uint32_t bits, Random& random) {
  const auto count = static_cast<uint32_t>(__builtin_popcount(bits));
  auto skip = static_cast<uint32_t>(uint64_t{random.next()} * count >> 32);
  if (count == 32) return skip;
  for (; skip > 0; --skip) bits &= bits - 1;
  return static_cast<unsigned>(__builtin_ctz(bits));
}

// The order of a launch's blocks. start + i * step visits each once where step and count have no common divisor.
class BlockOrder {
 public:
  BlockOrder(Order order, uint64_t count, Random& random) : count_(count) {
    if (order == Order::kReverse) start_ = step_ = count - 1;
    if (order == Order::kForward || order == Order::kReverse) return;
    start_ = random.next() % count;
    do step_ = 1 + random.next() % count;
    while (std::gcd(step_, count) != 1);
  }
  unsigned operator[](uint64_t i) const { return static_cast<unsigned>((start_ + i * step_) % count_); }

 private:
  uint64_t count_, start_ = 0, step_ = 1;
};

}  // namespace flatkern::cuda::emulation
