// Reading a tensor as it lies on disk: sizes are trusted, contents are not.
#pragma once
#include <vector>

#include "mask.h"

namespace sk {

// Where every row of values begins, [rows + 1]; for whole blocks a row of blocks counts as a row.
using Starts = std::vector<int64_t>;

bool sound(const sk_disk& d);  // sizes and enums, before any part is looked at
// These return whether the part holds what it must; they may throw std::bad_alloc.
// Where rows begin, from the positions; for nm and block also the mask of all weights if `mask` is given.
bool read_positions(const sk_disk& d, Starts& start, uint8_t* mask, int threads);
// Proves widths, dictionaries, lengths, padding and patches; codes[r] = first byte of row r's codes, [rows + 1].
bool prove_split(const sk_disk& d, const Starts& start, Starts& codes);
bool read_split(const sk_disk& d, const Starts& start, uint8_t* values, int threads);
bool read_codes(const sk_disk& d, const Starts& start, int8_t* values, int threads);

namespace {

inline bool has(const sk_part& part, int64_t bytes) { return part.bytes == bytes && (part.data || bytes == 0); }
inline int64_t patch_count(const sk_disk& d) { return d.patch_row.bytes < 0 ? 0 : d.patch_row.bytes / 4; }
inline const uint8_t* bytes_of(const sk_part& part) { return static_cast<const uint8_t*>(part.data); }

}  // namespace
}  // namespace sk
