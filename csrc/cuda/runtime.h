// The CUDA runtime, as code that knows no CUDA sees it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

#include "stream.h"

namespace flatkern::cuda {

// Another device is current than the one that the tensors are on. Nothing was done.
struct WrongDevice : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The driver has refused a launch, or reports that an earlier one failed.
struct LaunchError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

int current_device();
bool is_capturing(Stream stream);
int64_t launch_count();  // of this thread

struct Driver {
  int version, needed, devices;  // as CUDA counts versions: 13000 is 13.0
  std::string error;             // why devices cannot be counted; empty where they can
};
Driver driver();

}  // namespace flatkern::cuda
