// The emulation's own tests: a case is a function that throws where something is not as it should be.
#pragma once

#include <functional>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation.h"

namespace cases {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& all() {
  static std::vector<Case> list;
  return list;
}

struct Register {
  Register(const char* name, void (*run)()) { all().push_back({name, run}); }
};

// CASE(name) { ... }
#define CASE(name)                                                  \
  static void case_##name();                                        \
  static const cases::Register register_##name(#name, case_##name); \
  static void case_##name()

#define EXPECT(condition) cases::expect((condition), #condition, __FILE__, __LINE__)

inline void expect(bool holds, const std::string& what, const char* file, int line) {
  if (!holds) throw std::runtime_error(std::string(file) + ":" + std::to_string(line) + ": not so: " + what);
}

// The text of the fault that `run` ends with, "" if with none.
inline std::string fault_of(const std::function<void()>& run) {
  try {
    run();
  } catch (const flatkern::cuda::emulation::Fault& fault) {
    return fault.what();
  }
  return "";
}

// Every order, each of the permuted ones with several seeds.
inline const std::vector<std::string>& schedules() {
  static const std::vector<std::string> list = {"forward",  "reverse", "random:1", "random:2",
                                                "random:3", "warps:1", "warps:2",  "warps:3"};
  return list;
}

}  // namespace cases
