// A stream's handle, for code that knows no CUDA.
#pragma once

namespace flatkern::cuda {

using Stream = void*;

}  // namespace flatkern::cuda
