// int8 and int4 for any processor: the reference of the others.
#include "quantised.h"

namespace sk {
extern const QuantisedKernels kQuantisedPortable;
const QuantisedKernels kQuantisedPortable = {4, generic_quantise, generic_fused_quantised, generic_decode_quantised};
}  // namespace sk
