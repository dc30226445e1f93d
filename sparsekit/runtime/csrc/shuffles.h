// Expanding eight 16-bit places by a byte shuffle (pshufb, tbl): for each mask of eight places the bytes to take, 0x80
// for holes, which both instructions turn into zero.
#pragma once
#include <stdint.h>

namespace sk {
namespace {

struct alignas(64) Shuffles {
  uint8_t bytes[256][16];
  constexpr Shuffles() : bytes() {  // constexpr: nothing here may run before the processor has been asked
    for (int mask = 0; mask < 256; ++mask)
      for (int place = 0, from = 0; place < 8; ++place) {
        const bool set = mask >> place & 1;
        bytes[mask][2 * place] = uint8_t(set ? 2 * from : 0x80);
        bytes[mask][2 * place + 1] = uint8_t(set ? 2 * from + 1 : 0x80);
        from += set;
      }
  }
};
constexpr Shuffles shuffles;

}  // namespace
}  // namespace sk
