// The reference: plain C++ for any processor. Every other instruction set is tested against it.
#include "generic.h"

namespace sk {
namespace {

int64_t fusable(const View& w, bool) { return w.layout == SK_BLOCK ? kAnyTokens : w.layout == SK_CHUNK ? 4 : 0; }

void fused(const View& w, const Input& x, int64_t b, bool, float* out, int64_t ld) {
  if (w.layout == SK_BLOCK) return generic_block(w, x, b, out, ld);
  generic_chunk(w, x, b, out, ld);
}

}  // namespace

extern const Kernels kPortable;
const Kernels kPortable = {"portable",    false,         fusable,       fused,       generic_decode,
                           generic_micro, generic_dense, generic_store, generic_read, &kQuantisedPortable, &kColumnsPortable, nullptr, nullptr};
}  // namespace sk
