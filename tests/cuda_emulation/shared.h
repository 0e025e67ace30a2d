// Shared memory: every block has its own, each array of it apart, full of NaN and between red zones.
#pragma once

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(begin, size) ((void)(begin), (void)(size))
#define ASAN_UNPOISON_MEMORY_REGION(begin, size) ((void)(begin), (void)(size))
#endif

#include "scheduler.h"

namespace flatkern::cuda::emulation {

class SharedMemory {
 public:
  // The memory for `site` of the block with this serial number; the block's first thread to come makes it.
  void* find(SharedSite& site, uint64_t block) {
    if (site.block != block) allocate(site, block);
    return site.data;
  }

  // Checks the red zones of the block's memory and frees it. A fault is described in `fault`.
  void end_block(unsigned block, char* fault, size_t fault_size) {
    for (const Array& array : arrays_) {
      array.poison(false);
      if (const unsigned char* at = array.overwritten())
        std::snprintf(fault, fault_size,
                      "%s:%d: block %u wrote %td bytes behind the beginning of FK_SHARED %s, which has %zu",
                      array.site->site.file, array.site->site.line, block, at - array.data, array.site->site.what,
                      array.site->size);
    }
    release();
  }

  void release() {
    for (const Array& array : arrays_) array.poison(false);
    arrays_.clear();
    bytes_ = 0;
  }

 private:
  static constexpr size_t kZone = 256;
  static constexpr int kZoneByte = 0xA5;
  static constexpr int kNaN = 0xFF;  // four bytes of it are a NaN, and a large unsigned number

  struct Array {
    const SharedSite* site;
    std::unique_ptr<unsigned char[]> memory;
    unsigned char* data;

    unsigned char* end() const { return data + site->size; }

    void poison(bool on) const {
      for (unsigned char* zone : {data - kZone, end()}) {
        if (on)
          ASAN_POISON_MEMORY_REGION(zone, kZone);
        else
          ASAN_UNPOISON_MEMORY_REGION(zone, kZone);
      }
    }

    const unsigned char* overwritten() const {
      for (const unsigned char* zone : {data - kZone, end()})
        for (const unsigned char* at = zone; at < zone + kZone; ++at)
          if (*at != kZoneByte) return at;
      return nullptr;
    }
  };

  void allocate(SharedSite& site, uint64_t block) {
    bytes_ += site.size;
    if (bytes_ > kMaxShared)
      fail(site.site.file, site.site.line,
           "declares FK_SHARED %s, with which a block has %zu bytes of shared memory, "
           "but should have at most 49152",
           site.site.what, bytes_);
    // Aligned as its type asks and no better, so that a float[32] used as float4 is noticed.
    const size_t step = 2 * site.alignment;
    Array array{&site, std::make_unique<unsigned char[]>(site.size + 2 * kZone + 2 * step), nullptr};
    const auto from = reinterpret_cast<uintptr_t>(array.memory.get()) + kZone;
    array.data = reinterpret_cast<unsigned char*>((from + step - 1) / step * step + site.alignment);
    std::memset(array.data - kZone, kZoneByte, kZone);
    std::memset(array.data, kNaN, site.size);
    std::memset(array.end(), kZoneByte, kZone);
    array.poison(true);
    site.block = block;
    site.data = array.data;
    arrays_.push_back(std::move(array));
  }

  std::vector<Array> arrays_;
  size_t bytes_ = 0;
};

}  // namespace flatkern::cuda::emulation
