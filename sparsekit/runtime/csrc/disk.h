// Reading a tensor as it lies on disk: sizes are trusted, contents are not.
#pragma once
#include <vector>

#include "mask.h"

namespace sk {

// Where every row of values begins, [rows + 1]; for whole blocks a row of blocks counts as a row.
using Starts = std::vector<int64_t>;

// Both return whether the part holds what it must; they may throw std::bad_alloc.
bool read_split(const sk_disk& d, const Starts& start, uint8_t* values, int threads);
bool read_codes(const sk_disk& d, const Starts& start, int8_t* values, int threads);

namespace {

inline bool has(const sk_part& part, int64_t bytes) { return part.bytes == bytes && (part.data || bytes == 0); }
inline const uint8_t* bytes_of(const sk_part& part) { return static_cast<const uint8_t*>(part.data); }

}  // namespace
}  // namespace sk
