// The reference: plain C++ for any processor. Every other instruction set is tested against it.
#include "generic.h"

namespace sk {
extern const Kernels kPortable;
const Kernels kPortable = {"portable",    false,         never_fusable, nullptr,      generic_decode,
                           generic_micro, generic_dense, generic_store, generic_read, &kQuantisedPortable};
}  // namespace sk
