// How the tensors of a call are cut into tiles, one a block: a table on the device, made once per plan.
//
// A *row* is a filter; where an operation sums nothing over filters, it is all of a tensor. A row of at most kResident
// columns stays in one block from the first load to the last store. A longer one is cut into segments.
//
// A *team* of threads has one row, or one segment, of a tile. A thread takes eight neighbours at a time, because a draw
// of Philox gives eight normals; 32 threads take a *chunk* of 256 columns. Sums are taken in an order that depends on
// the length of a row alone (rows.cuh), so that it does not matter how many teams share a block.
#pragma once

#include <cstdint>

namespace flatkern::cuda {

constexpr int kEight = 8;
constexpr int kWarp = 32;
constexpr int kChunk = kEight * kWarp;
constexpr int kResident = 32768;
constexpr int kSegment = 4096;

// Threads of a block, but for those of rows that so many cannot hold; and how many eights each of the many takes.
constexpr int kShortThreads = 256, kLongThreads = 1024, kLongEights = 4;

// Of Tile::flags; above them, from bit kShiftBit on, the place of the first element in its eight.
constexpr uint32_t kWhole = 1;     // no eight is cut short, and all may be moved 16 bytes at a time
constexpr uint32_t kSegments = 2;  // teams have segments of one row
constexpr uint32_t kFlat = 4;      // rank <= 1: a history and a mask have an entry per element
constexpr uint32_t kShiftBit = 8;

struct alignas(16) Tile {
  // Where its teams are, 32 bytes:
  int64_t start;          // offset of the first element in its tensor
  uint32_t tensor;        // which one of a launch
  uint16_t length, last;  // elements of a row or segment; of the last team's
  uint32_t reciprocal;    // of a team's threads: 2^20 / threads, rounded up
  uint16_t threads, teams;
  uint32_t flags;
  uint32_t row;  // the first row
  // What is seldom needed, 16 bytes:
  uint32_t counter_row, counter_eight;  // of the first element's normals: the row of the unsharded tensor, and which
                                        // eight of its columns
  uint32_t long_row, segment;           // of segments: which of the long rows, and which segment of it is the first
};
static_assert(sizeof(Tile) == 48);

// A row that is cut into segments.
struct LongRow {
  int64_t columns;
  uint32_t first, segments;  // its partial sums
};

}  // namespace flatkern::cuda
